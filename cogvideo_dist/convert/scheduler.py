"""``scheduler_config.json`` of a diffusers pipeline, to and from our noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogvideo_dist.diffusion.samplers import SamplerName
from cogvideo_dist.diffusion.schedule import ScheduleConfig

_CLASSES: dict[SamplerName, str] = {"ddim": "CogVideoXDDIMScheduler", "dpmpp_2m_sde": "CogVideoXDPMScheduler"}

# What each field of ScheduleConfig is called there.
_FIELDS = {
    "num_train_timesteps": "timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "snr_shift_scale": "snr_shift",
}

# The model holds with these values only, and the defaults of the classes are others (epsilon, leading, no rescale).
_FIXED: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
}

# Without effect while clip_sample is False; written because a saved configuration is complete.
_UNUSED = {"clip_sample_range": 1.0, "sample_max_value": 1.0}


def scheduler_config(config: ScheduleConfig, kind: SamplerName) -> dict[str, Any]:
    """The complete content of ``scheduler_config.json``, no field left to the defaults of the diffusers class."""
    # diffusers 0.30.0 is the first release with these classes.
    header = {"_class_name": _CLASSES[kind], "_diffusers_version": "0.30.0"}
    return header | {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()} | _FIXED | _UNUSED


def schedule_from_diffusers(config: Mapping[str, Any]) -> ScheduleConfig:
    """The schedule of a loaded ``scheduler_config.json``; ValueError if it describes any other kind of diffusion."""
    if config.get("_class_name") not in _CLASSES.values():
        found, known = config.get("_class_name"), sorted(_CLASSES.values())
        raise ValueError(f"scheduler_config.json is of class {found!r}; give one of {known}")
    given = {name for name in config if not name.startswith("_")}
    if missing := sorted((_FIELDS.keys() | _FIXED.keys()) - given):
        raise ValueError(f"scheduler_config.json lacks {missing}; write them out, the defaults of its class are wrong")
    if unknown := sorted(given - _FIELDS.keys() - _FIXED.keys() - _UNUSED.keys()):
        raise ValueError(f"scheduler_config.json has unknown fields {unknown}; remove them")
    for name, value in _FIXED.items():
        if config[name] != value:
            raise ValueError(f"scheduler_config.json has {name} {config[name]!r}; only {value!r} is supported")
    return ScheduleConfig(**{ours: config[theirs] for theirs, ours in _FIELDS.items()})
