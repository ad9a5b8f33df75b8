"""Sampling: videos of the right length, and those of the public pipelines from the same noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor

from cogvideo_dist.config.schema import ImageCondition, Sampling
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.samplers import first_step, folded_noise
from cogvideo_dist.models.vae import VAE
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.sampling import Edit, Sampler
from tests.tasks.samplers import OTHER_SIZE, SCHEDULE, clip_of, image_for, sampler_of, settings_of, text_of


@pytest.mark.parametrize("name", ["cogvideox-5b", "cogvideox1.5-5b"])
@pytest.mark.parametrize("frames", [49, 81, 161])
def test_videos_have_exactly_the_frames_asked_for(name: str, frames: int) -> None:
    settings = settings_of(name, size=(frames, 32, 32), steps=1)
    sampler = sampler_of(name)
    latents = sampler.latents_of(text_of(name), settings, seed=0)
    assert latents.shape == (1 + (frames - 1) // 4, 4, 4, 4)
    whole = replace(sampler, vae_semantics="whole").decode(latents)
    assert sampler.decode(latents).shape == whole.shape == (3, frames, 32, 32)
    assert whole.isfinite().all()


def test_a_video_depends_on_its_prompt_image_and_seed() -> None:
    """Else equality with other ranks would say nothing."""
    name = "cogvideox1.5-5b-i2v"
    sampler, settings, image = sampler_of(name), settings_of(name), image_for(name)
    latents = sampler.latents_of(text_of(name), settings, seed=5, image=image)
    others = (
        sampler.latents_of(text_of(name, seed=6), settings, seed=5, image=image),
        sampler.latents_of(text_of(name), settings, seed=5, image=image_for(name, seed=6)),
        sampler.latents_of(text_of(name), settings, seed=6, image=image),
    )
    assert all((latents - other).abs().max() > 3e-3 for other in others)
    again = sampler.latents_of(text_of(name), settings, seed=5, image=image)
    assert torch.equal(latents, again)


def public_parts(sampler: Sampler, folder: Path, **vae_fields: Any) -> dict[str, Any]:
    """The same weights in the public classes."""
    hf.save_transformer(sampler.model, folder / "transformer")
    hf.save_vae(sampler.vae, folder / "vae")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | vae_fields))
    return {
        "tokenizer": None, "text_encoder": None,
        "transformer": CogVideoXTransformer3DModel.from_pretrained(folder / "transformer"),
        "vae": AutoencoderKLCogVideoX.from_pretrained(folder / "vae"),
        "scheduler": CogVideoXDDIMScheduler.from_config(scheduler_config(sampler.schedule.config, "ddim")),
    }  # fmt: skip


def common(text: Tensor, settings: Sampling) -> dict[str, Any]:
    return {
        "prompt_embeds": text[None], "negative_prompt_embeds": torch.zeros_like(text)[None],
        "height": settings.size[1], "width": settings.size[2], "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance, "use_dynamic_cfg": settings.guidance_kind == "dynamic", "output_type": "pt",
        "max_sequence_length": len(text),
    }  # fmt: skip


def shown(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] as the public pipelines give it, [T, 3, H, W] in [0, 1]."""
    return (video / 2 + 0.5).clamp(0, 1).transpose(0, 1)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("cogvideox-5b-i2v", "scale"), ("cogvideox1.5-5b-i2v", "scale"), ("cogvideox1.5-5b-i2v", "inverse")],
)
def test_the_public_image_to_video_pipeline_renders_the_same_video(name: str, scale: str, tmp_path: Path) -> None:
    settings, text, image = settings_of(name), text_of(name), image_for(name)
    assert image is not None
    sampler = sampler_of(name, image=ImageCondition(latent_scale=scale))  # type: ignore[arg-type]
    ours = sampler.video(text, settings, seed=5, image=image)
    public = CogVideoXImageToVideoPipeline(**public_parts(sampler, tmp_path, invert_scale_latents=scale == "inverse"))
    public.set_progress_bar_config(disable=True)
    theirs = public(
        image=image[None] / 2 + 0.5, num_frames=settings.size[0], latents=sampler.initial_noise(settings, 5)[None],
        generator=fold(5, "image posterior"), **common(text, settings),
    ).frames[0]  # fmt: skip
    assert shown(ours).shape == theirs.shape == (settings.size[0], 3, *settings.size[1:])
    assert (shown(ours) - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.01


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_the_public_video_to_video_pipeline_renders_the_same_video(strength: float, tmp_path: Path) -> None:
    name = "cogvideox-5b"
    settings, text = settings_of(name, steps=5, guidance_kind="dynamic"), text_of(name)
    sampler, clip = sampler_of(name), clip_of(*OTHER_SIZE)
    with torch.no_grad():  # a posterior without spread: the two draw its noise from other generators
        last = sampler.vae.encoder.conv_out
        for parameter in last.parameters():
            parameter[4:] = 0
        last.bias[4:] = -30
    start = sampler.start(Edit(clip, strength), settings, seed=5)
    assert start is not None
    generator = torch.Generator().manual_seed(7)
    torch.randn(start.latents.shape, generator=generator)  # theirs, of the posterior
    noise = torch.randn(start.latents.shape, generator=generator)
    ours = sampler.decode(sampler.latents(text, settings, noise=noise, draw=folded_noise(5), start=start))
    public = CogVideoXVideoToVideoPipeline(**public_parts(sampler, tmp_path))
    public.set_progress_bar_config(disable=True)
    theirs = public(
        video=[Image.fromarray(frame.numpy()) for frame in clip], strength=strength,
        generator=torch.Generator().manual_seed(7), **common(text, settings),
    ).frames[0]  # fmt: skip
    assert shown(ours).shape == theirs.shape
    assert (shown(ours) - theirs).abs().max() <= 1e-4
    from_noise = sampler.decode(sampler.latents(text, settings, noise=noise, draw=folded_noise(5)))
    assert (shown(from_noise) - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [1, 3, 20, 50])
@pytest.mark.parametrize("strength", [0.02, 0.29, 0.58, 0.8, 1.0])
def test_a_strength_selects_the_timesteps_that_the_public_pipeline_selects(steps: int, strength: float) -> None:
    scheduler = CogVideoXDDIMScheduler.from_config(scheduler_config(SCHEDULE.config, "ddim"))
    scheduler.set_timesteps(steps)
    public = CogVideoXVideoToVideoPipeline.__new__(CogVideoXVideoToVideoPipeline)
    public.register_modules(scheduler=scheduler)
    theirs, _ = public.get_timesteps(steps, scheduler.timesteps, strength, "cpu")
    if not len(theirs):
        with pytest.raises(ValueError, match=f"leaves none of {steps} steps to do; use at least"):
            first_step(steps, strength=strength)
    else:
        assert SCHEDULE.sampling_timesteps(steps)[first_step(steps, strength=strength) :] == theirs.tolist()


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01])
def test_a_strength_that_means_nothing_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
        first_step(50, strength=strength)


def test_at_full_strength_nothing_of_the_video_is_left() -> None:
    """The first timestep has no signal (zero terminal SNR)."""
    name = "cogvideox1.5-5b"
    sampler, settings = sampler_of(name), settings_of(name)
    noise = sampler.latents_of(text_of(name), settings, seed=5)
    full, half = (
        sampler.latents_of(text_of(name), settings, seed=5, edit=Edit(clip_of(*OTHER_SIZE), strength))
        for strength in (1.0, 0.5)
    )
    assert torch.equal(full, noise)
    assert (half - noise).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["cogvideox-5b", "cogvideox1.5-5b"])
def test_a_preview_shows_the_frames_of_the_video_and_at_last_the_video(name: str) -> None:
    seen: list[Tensor] = []
    sampler, settings = sampler_of(name), settings_of(name)
    latents = sampler.latents_of(text_of(name), settings, seed=5, preview=lambda _index, x0: seen.append(x0))
    assert [x0.shape for x0 in seen] == [latents.shape] * settings.steps
    assert torch.allclose(seen[-1], latents, atol=1e-5)
    still = sampler.still(seen[1])
    middle = (seen[1] / sampler.latent_scale)[3:4].transpose(0, 1)[None]
    assert torch.equal(still, sampler.vae.decode(middle, semantics="whole")[0])
    assert still.shape == (3, 1, *settings.size[1:])


def test_tiles_are_used_in_every_way_of_decoding() -> None:
    name = "cogvideox-5b"
    settings, sampler = settings_of(name, steps=1), sampler_of(name)
    sampler = replace(sampler, vae=small_tiles(sampler.vae))
    latents = sampler.latents_of(text_of(name), settings, seed=5)
    for semantics in ("whole", "chunked"):
        whole, tiles = (
            replace(sampler, vae_semantics=semantics, vae_tiling=tiling).decode(latents) for tiling in (False, True)
        )
        assert whole.shape == tiles.shape
        assert (whole - tiles).abs().max() > 1e-3


def small_tiles(vae: VAE) -> VAE:
    vae.config = replace(vae.config, sample_height=32, sample_width=64)
    return vae


def test_what_the_model_does_not_take_is_refused() -> None:
    for_text, for_images = sampler_of("cogvideox-5b"), sampler_of("cogvideox1.5-5b-i2v")
    settings, text = settings_of("cogvideox-5b"), text_of("cogvideox-5b")
    with pytest.raises(ValueError, match="makes videos of text alone and takes no image"):
        for_text.video(text, settings, seed=0, image=torch.zeros(3, 32, 64))
    with pytest.raises(ValueError, match="continues an image; give the first frame"):
        for_images.video(text, settings, seed=0)
    with pytest.raises(ValueError, match=r"must be \[3, 32, 64\], found \[3, 64, 32\]"):
        for_images.video(text, settings, seed=0, image=torch.zeros(3, 64, 32))
    with pytest.raises(ValueError, match=r"a video to start from must be \[25, 32, 64\], found \[9, 32, 64\]"):
        for_text.video(text, settings, seed=0, edit=Edit(clip_of(9, 32, 64), 0.5))
