"""Tiny samplers for tests of sampling; without diffusers, so that ranks need not import it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvideo_dist.config.schema import Sampling
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import DiTConfig, tiny
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.tasks.sampling import Sampler
from launch.sampling_setup import sliced

SCHEDULE = Schedule(ScheduleConfig())
SIZES = {"cogvideox-5b-i2v": (17, 96, 128)}  # its positions are learned for one size
OTHER_SIZE = (25, 32, 64)


def config_of(name: str) -> DiTConfig:
    """4 heads, so that they divide over two ranks; five latent frames, since diffusers decodes even numbers otherwise."""
    return replace(tiny(name), heads=4, sample_frames=5)


def settings_of(name: str, **changes: Any) -> Sampling:
    base = Sampling(
        steps=4, sampler="ddim", guidance=3.0, guidance_kind="constant", size=SIZES.get(name, OTHER_SIZE), fps=8
    )
    return replace(base, **changes)


def sampler_of(name: str, tp: Axis | None = None, **given: Any) -> Sampler:
    """A tiny model all of whose gates are open, so that a prompt, an image and every token matter, with an autoencoder whose
    pixels are about as large as a trained one's. ``given`` are the model's sizes and the sampler's fields."""
    sizes = {key: given.pop(key) for key in [*given] if key in DiTConfig.__dataclass_fields__}
    model = DiT(replace(config_of(name), **sizes))
    vae = VAE(VAEConfig(block_out_channels=(4, 4, 8, 8), norm_groups=2, layers_per_block=1, latent_channels=4))
    draw_parameters(model, 0)
    draw_parameters(vae, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for parameter in vae.decoder.conv_out.parameters():
            parameter *= 0.1
    model = sliced(model, tp or Axis("tp"))
    return Sampler(model, vae, SCHEDULE, vae.config.scaling_factor, given.pop("semantics", "chunked"), **given)


def text_of(name: str, seed: int = 3) -> Tensor:
    config = config_of(name)
    return torch.randn(config.text_length, config.text_dim, generator=torch.Generator().manual_seed(seed))


def image_for(name: str, seed: int = 4) -> Tensor | None:
    """A picture of smooth colours [3, H, W] in [-1, 1] for a model that takes one."""
    if not config_of(name).image_channels:
        return None
    rough = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    size = settings_of(name).size[1:]
    return torch.nn.functional.interpolate(rough, size, mode="bilinear")[0].clamp(-1, 1)


def clip_of(frames: int, height: int, width: int) -> Tensor:
    """A moving pattern, uint8 [T, H, W, 3]."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(9 * t + 3 * y) % 256, (5 * x + 7 * t) % 256, (x + y) % 256], dim=-1).to(torch.uint8)
