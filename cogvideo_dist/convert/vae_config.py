"""The VAE's ``config.json`` of diffusers <-> ``VAEConfig``, strict in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cogvideo_dist.models.vae import VAEConfig

CLASS = "AutoencoderKLCogVideoX"

FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "norm_num_groups": "norm_groups",
    "temporal_compression_ratio": "temporal_compression",
    "sample_height": "sample_height",
    "sample_width": "sample_width",
    "scaling_factor": "scaling_factor",
}
"""Diffusers' fields and ours of the same meaning."""

REAL = ("scaling_factor",)

FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "norm_eps": 1e-6,
    "shift_factor": None,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
"""Fields that every released model has alike; diffusers' decoder has 1e-6 in its norms whatever ``norm_eps`` says."""

PIPELINE: dict[str, Any] = {"force_upcast": True, "invert_scale_latents": False}
"""Advice to pipelines, of no effect on the VAE itself: any boolean is taken in, these are written."""


def config_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """All fields that diffusers writes, with lists where JSON has them.

    Raises ValueError if ``norm_eps`` is one that diffusers cannot express.
    """
    if config.norm_eps != FIXED["norm_eps"]:
        raise ValueError(
            f"the VAE's norm_eps is {config.norm_eps}; diffusers' decoder always has {FIXED['norm_eps']}, so set it to that"
        )
    levels = len(config.block_out_channels)
    return {
        "_class_name": CLASS,
        **FIXED,
        **PIPELINE,
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
    }


DEFAULTS = config_to_diffusers(VAEConfig(scaling_factor=1.15258426))
"""What diffusers takes where ``config.json`` leaves a field out; its scaling factor is the 2B's."""


def config_from_diffusers(fields: Mapping[str, Any]) -> VAEConfig:
    """Ours for diffusers' ``fields``.

    Raises ValueError, naming the field, for another class, an unknown field, or a value that this VAE does not compute.
    """
    if fields.get("_class_name", CLASS) != CLASS:
        raise ValueError(f"_class_name is {fields['_class_name']!r}; expected {CLASS!r}")
    given = {name: value for name, value in fields.items() if not name.startswith("_")}
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r} of {CLASS}; the known ones are {sorted(DEFAULTS.keys() - {'_class_name'})}"
        )
    full = DEFAULTS | given
    for name, expected in FIXED.items():
        if full[name] != expected:
            raise ValueError(f"{CLASS} field {name!r} is {full[name]!r}; only {expected!r} is supported")
    for name in PIPELINE:
        if full[name] not in (True, False):
            raise ValueError(f"{CLASS} field {name!r} is {full[name]!r}; expected true or false")
    values = {ours: _number(theirs, full[theirs]) for theirs, ours in FIELDS.items() if theirs != "block_out_channels"}
    if not isinstance(full["block_out_channels"], (list, tuple)):
        raise ValueError(
            f"{CLASS} field 'block_out_channels' is {full['block_out_channels']!r}; expected a list of numbers"
        )
    channels = tuple(_number("block_out_channels", value) for value in full["block_out_channels"])
    for name, block in (("down_block_types", "CogVideoXDownBlock3D"), ("up_block_types", "CogVideoXUpBlock3D")):
        if full[name] not in ([block] * len(channels), (block,) * len(channels)):
            raise ValueError(f"{CLASS} field {name!r} is {full[name]!r}; expected {len(channels)} times {block!r}")
    return VAEConfig(block_out_channels=channels, **values)


def _number(name: str, value: Any) -> Any:
    """A number from JSON, whole unless the field is a real one; diffusers' own default for a ratio is 4 typed as float."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{CLASS} field {name!r} is {value!r}; expected a number")
    if name in REAL:
        return float(value)
    if value != int(value):
        raise ValueError(f"{CLASS} field {name!r} is {value!r}; expected a whole number")
    return int(value)
