"""An exported folder renders, in the public pipeline, the video that our own sampler renders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from cogvideo_dist.config.schema import Sampling
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.tasks.sampling import Sampler


@pytest.mark.parametrize("guidance_kind", ["constant", "dynamic"])
@pytest.mark.parametrize("size", [(9, 96, 128), (17, 64, 80)])  # the base size and another
@pytest.mark.parametrize(("name", "shift"), [("cogvideox-2b", 3.0), ("cogvideox-5b", 1.0), ("cogvideox1.5-5b", 1.0)])
def test_the_public_pipeline_renders_the_same_video(
    name: str, shift: float, size: tuple[int, int, int], guidance_kind: str, tmp_path: Path
) -> None:
    model = DiT(tiny(name))
    vae = VAE(VAEConfig(block_out_channels=(4, 4, 8, 8), norm_groups=2, layers_per_block=1, latent_channels=4))
    draw_parameters(model, 0)
    draw_parameters(vae, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    hf.save_transformer(model, tmp_path / "transformer")
    hf.save_vae(vae, tmp_path / "vae")
    schedule = Schedule(ScheduleConfig(snr_shift=shift))
    settings = Sampling(
        steps=5,
        sampler="ddim",
        guidance=3.0,
        guidance_kind=guidance_kind,
        size=size,
        fps=8,  # type: ignore[arg-type]
    )
    sampler = Sampler(model, vae, schedule, vae.config.scaling_factor, "chunked")
    text = torch.randn(model.config.text_length, model.config.text_dim, generator=torch.Generator().manual_seed(3))
    ours = sampler.video(text, settings, seed=4)

    public = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer"),
        vae=AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae"),
        scheduler=CogVideoXDDIMScheduler.from_config(scheduler_config(schedule.config, "ddim")),
    )
    public.set_progress_bar_config(disable=True)
    theirs = public(
        prompt_embeds=text[None],
        negative_prompt_embeds=torch.zeros_like(text)[None],
        num_frames=size[0],
        height=size[1],
        width=size[2],
        num_inference_steps=5,
        guidance_scale=3.0,
        use_dynamic_cfg=guidance_kind == "dynamic",
        latents=sampler.initial_noise(settings, seed=4)[None],
        output_type="pt",
        max_sequence_length=model.config.text_length,
    ).frames[0]
    mine = (ours / 2 + 0.5).clamp(0, 1).transpose(0, 1)
    assert mine.shape == theirs.shape == (size[0], 3, *size[1:])
    assert (mine - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.01  # a flat picture would agree whatever the transformer did
