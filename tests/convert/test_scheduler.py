from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from cogvideo_dist.convert.scheduler import schedule_from_diffusers, scheduler_config
from cogvideo_dist.diffusion.samplers import SamplerName
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig

CLASSES: dict[SamplerName, Any] = {"ddim": CogVideoXDDIMScheduler, "dpmpp_2m_sde": CogVideoXDPMScheduler}
OTHER = ScheduleConfig(timesteps=500, beta_start=0.001, beta_end=0.01, snr_shift=3.0)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(snr_shift=3.0), OTHER])
def test_diffusers_loads_the_same_schedule(tmp_path: Path, config: ScheduleConfig, kind: SamplerName) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler_config(config, kind)))
    scheduler, unused = CLASSES[kind].from_pretrained(tmp_path, return_unused_kwargs=True)
    assert all(name.startswith("_") for name in unused)
    torch.testing.assert_close(scheduler.alphas_cumprod.sqrt(), Schedule(config).sqrt_alpha_bar, rtol=0, atol=1e-14)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == Schedule(config).sampling_timesteps(50)


@pytest.mark.parametrize("kind", CLASSES)
def test_no_field_is_left_to_the_defaults_of_the_class(kind: SamplerName) -> None:
    fields = {name for name in scheduler_config(ScheduleConfig(), kind) if not name.startswith("_")}
    assert fields == set(inspect.signature(CLASSES[kind].__init__).parameters) - {"self"}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("config", [ScheduleConfig(snr_shift=3.0), OTHER])
def test_round_trip_through_diffusers(tmp_path: Path, config: ScheduleConfig, kind: SamplerName) -> None:
    CLASSES[kind].from_config(scheduler_config(config, kind)).save_pretrained(tmp_path)
    assert schedule_from_diffusers(json.loads((tmp_path / "scheduler_config.json").read_text())) == config


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("prediction_type", "epsilon", "prediction_type "),
        ("timestep_spacing", "leading", "timestep_spacing "),
        ("rescale_betas_zero_snr", False, "rescale_betas_zero_snr "),
        ("beta_schedule", "linear", "beta_schedule "),
        ("set_alpha_to_one", False, "set_alpha_to_one "),
        ("clip_sample", True, "clip_sample "),
        ("trained_betas", [0.1], "trained_betas "),
        ("snr_shift_scale", -1.0, "snr_shift is -1"),
        ("_class_name", "DDIMScheduler", "class 'DDIMScheduler'"),
        ("surprise", 1, "unknown fields"),
    ],
)
def test_another_kind_of_diffusion_is_rejected(field: str, value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schedule_from_diffusers(scheduler_config(ScheduleConfig(), "ddim") | {field: value})


def test_a_missing_field_is_rejected() -> None:
    config = scheduler_config(ScheduleConfig(), "ddim")
    del config["prediction_type"]
    with pytest.raises(ValueError, match=r"lacks.*prediction_type"):
        schedule_from_diffusers(config)
