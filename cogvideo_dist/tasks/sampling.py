"""From a prompt's features to a video: the one path that validation, launch/sample.py and tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Sampling, Size
from cogvideo_dist.diffusion.guidance import guidance_scale, guide
from cogvideo_dist.diffusion.samplers import SAMPLERS, Draw, folded_noise, sample
from cogvideo_dist.diffusion.schedule import Schedule
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.vae import VAE, Semantics
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.pixels import tiling_of

Preview = Callable[[int, Tensor], None]


def latent_shape(size: Size, *, channels: int, patch_t: int) -> tuple[int, int, int, int]:
    """[T, C, H, W] of the latent that becomes a video of ``size``, with the frames in front that whole patches need."""
    frames = (size[0] - 1) // TEMPORAL + 1
    return frames + (-frames) % patch_t, channels, size[1] // SPATIAL, size[2] // SPATIAL


@dataclass(frozen=True)
class Sampler:
    """A transformer with all that turns its velocities into pixels."""

    model: DiT
    vae: VAE
    schedule: Schedule
    latent_scale: float
    vae_semantics: Semantics
    vae_tiling: bool = False

    def initial_noise(self, settings: Sampling, seed: int) -> Tensor:
        """[T, C, H, W] float32 on the CPU."""
        config = self.model.config
        shape = latent_shape(settings.size, channels=config.out_channels, patch_t=config.patch[0])
        return torch.randn(shape, generator=fold(seed, "initial noise"))

    @torch.no_grad()
    def latents(
        self, text: Tensor, settings: Sampling, *, noise: Tensor, draw: Draw, preview: Preview | None = None
    ) -> Tensor:
        """Text features [L, dim] and initial noise -> latents [T, C, H, W] (scaled, padding removed).

        The two guidance branches run as one batch of two clips: zero features, then the prompt's.
        """
        device, dtype = self.model.embed.patch.weight.device, self.model.embed.patch.weight.dtype
        features = torch.stack([torch.zeros_like(text), text]).to(device, dtype)

        def denoise(x: Tensor, timestep: int, *, index: int) -> Tensor:
            times = torch.full((2,), timestep, device=device)
            without, with_text = self.model.denoise(x.to(dtype).expand(2, *x.shape), features, times).float()
            scale = guidance_scale(
                settings.guidance_kind, settings.guidance, step_index=index, timestep=timestep, steps=settings.steps
            )
            return guide(without, with_text, scale=scale)

        sampler = SAMPLERS[settings.sampler](self.schedule, settings.steps)
        latents = sample(denoise, noise.to(device), sampler=sampler, draw=draw, preview=preview)
        return latents[(-((settings.size[0] - 1) // TEMPORAL + 1)) % self.model.config.patch[0] :]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [T, C, H, W] -> video [3, T, H, W] in about [-1, 1]."""
        weight = next(self.vae.parameters())
        z = (latents / self.latent_scale).to(weight.device, weight.dtype).transpose(0, 1)[None]
        tiling = tiling_of(self.vae, self.vae_tiling)
        return self.vae.decode(z, semantics=self.vae_semantics, tiling=tiling)[0].float()

    def video(self, text: Tensor, settings: Sampling, *, seed: int, preview: Preview | None = None) -> Tensor:
        """Text features [L, dim] -> video [3, T, H, W], a function of the seed alone."""
        noise = self.initial_noise(settings, seed)
        return self.decode(self.latents(text, settings, noise=noise, draw=folded_noise(seed), preview=preview))
