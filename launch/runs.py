"""Finished or running trainings as something to sample from or to release."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun, ImageCondition
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.scheduler import schedule_from_diffusers
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig
from cogvideo_dist.models.text import TextEncoder
from cogvideo_dist.tasks.sampling import Sampler
from launch.beginning import trained_transformer
from launch.compose import load_text, load_vae

Weights = Literal["ema", "raw"]

PIPELINES = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline")
"""Classes of public pipelines whose folders can be sampled; what they hold, not the class, decides what is sampled."""


@dataclass(frozen=True)
class Pipeline:
    """All that a prompt needs to become a video; ``text_folder`` is where the text encoder came from."""

    sampler: Sampler
    text: TextEncoder
    text_folder: Path
    step: int | None = None


def open_pipeline(folder: str, weights: Weights, *, device: torch.device) -> Pipeline:
    """A run's folder (newest whole checkpoint) or a diffusers pipeline folder."""
    path = Path(folder)
    if (path / "model_index.json").exists():
        return _released(path, device)
    if (path / "config.yaml").exists():
        return _trained(path, weights, device=device)
    raise ConfigError(
        f"{folder} is neither a run (it has no config.yaml) nor a diffusers pipeline (no model_index.json)"
    )


def _released(path: Path, device: torch.device) -> Pipeline:
    if (name := hf.read_json(path / "model_index.json").get("_class_name")) not in PIPELINES:
        raise ConfigError(f"{path / 'model_index.json'}: a {name} cannot be sampled, only {', '.join(PIPELINES)}")
    model = hf.load_transformer(path / "transformer").to(device).eval()
    vae = load_vae(str(path / "vae"), device)
    schedule = Schedule(schedule_from_diffusers(hf.read_json(path / "scheduler" / "scheduler_config.json")))
    text = load_text(str(path), model.config, device=device)
    inverted = hf.read_json(path / "vae" / "config.json").get("invert_scale_latents", False)
    image = ImageCondition(latent_scale="inverse" if inverted else "scale")
    return Pipeline(Sampler(model, vae, schedule, vae.config.scaling_factor, "chunked", image=image), text, path)


def _trained(path: Path, weights: Weights, *, device: torch.device) -> Pipeline:
    config = load_config(DiTRun, [path / "config.yaml"])
    if not (config.frozen.vae and config.frozen.text):
        raise ConfigError(f"{path / 'config.yaml'} names no frozen.vae and frozen.text, which sampling needs")
    model, step = trained_transformer(path, config, weights=weights)
    vae = load_vae(config.frozen.vae, device)
    text = load_text(config.frozen.text, model.config, device=device)
    schedule = Schedule(ScheduleConfig(snr_shift=config.diffusion.snr_shift))
    sampler = Sampler(
        model.to(device).eval(), vae, schedule, vae.config.scaling_factor, config.frozen.vae_semantics,
        config.frozen.vae_tiling, config.diffusion.image,
    )  # fmt: skip
    return Pipeline(sampler, text, Path(config.frozen.text), step)
