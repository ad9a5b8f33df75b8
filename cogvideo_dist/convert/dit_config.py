"""The transformer's ``config.json`` of diffusers <-> ``DiTConfig``, strict in both directions."""

from __future__ import annotations

from typing import Any

from cogvideo_dist.models.presets import DiTConfig

CLASS = "CogVideoXTransformer3DModel"
TEMPORAL_COMPRESSION = 4

FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "patch_bias": True,
    "temporal_compression_ratio": TEMPORAL_COMPRESSION,
    "timestep_activation_fn": "silu",
}
"""Fields that every released model has alike; ``patch_bias`` may also be False, which has no effect with patch_size_t."""


def dit_config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """All fields that diffusers writes."""
    if config.norm_eps != config.out_norm_eps:
        raise ValueError(
            f"diffusers has one norm_eps; this model has norm_eps={config.norm_eps} and out_norm_eps={config.out_norm_eps}. "
            "Set out_norm_eps to norm_eps (the difference is about 4e-6 of the output)"
        )
    frames = (config.sample_frames - 1) * TEMPORAL_COMPRESSION + 1
    return {
        "_class_name": CLASS,
        **FIXED,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "max_text_seq_length": config.text_length,
        "norm_eps": config.norm_eps,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "ofs_embed_dim": config.time_embed_dim if config.ofs else None,
        "out_channels": config.out_channels,
        "patch_size": config.patch[1],
        "patch_size_t": config.patch[0] if config.patch[0] > 1 else None,
        "sample_frames": frames,
        "sample_height": config.sample_height,
        "sample_width": config.sample_width,
        "spatial_interpolation_scale": config.spatial_interpolation,
        "temporal_interpolation_scale": config.temporal_interpolation,
        "text_embed_dim": config.text_dim,
        "time_embed_dim": config.time_embed_dim,
        "use_learned_positional_embeddings": config.learned_positions,
        "use_rotary_positional_embeddings": config.positions == "rope",
    }


DEFAULTS: dict[str, Any] = dit_config_to_diffusers(DiTConfig(layers=30, heads=30, positions="sincos"))
"""What diffusers takes where ``config.json`` leaves a field out: its class defaults are the 2B's."""


def dit_config_from_diffusers(fields: dict[str, Any], source: str) -> DiTConfig:
    """Strict: a field that this implementation does not know, or a value it does not compute, is an error."""
    given = {name: value for name, value in fields.items() if not name.startswith("_")}
    if fields.get("_class_name", CLASS) != CLASS:
        raise ValueError(f"{source} describes a {fields['_class_name']}, expected a {CLASS}")
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(f"{source} has the unknown field {unknown[0]!r}")
    full = DEFAULTS | given
    for name, value in FIXED.items():
        harmless = name == "patch_bias" and full["patch_size_t"] is not None
        if full[name] != value and not harmless:
            raise ValueError(f"{source}: {name} is {full[name]!r}; only {value!r} is supported")
    if full["ofs_embed_dim"] not in (None, full["time_embed_dim"]):
        raise ValueError(
            f"{source}: ofs_embed_dim {full['ofs_embed_dim']} cannot be added to time_embed_dim {full['time_embed_dim']}"
        )
    frames = full["sample_frames"]
    return DiTConfig(
        layers=full["num_layers"],
        heads=full["num_attention_heads"],
        head_dim=full["attention_head_dim"],
        in_channels=full["in_channels"],
        out_channels=full["out_channels"],
        patch=(full["patch_size_t"] or 1, full["patch_size"], full["patch_size"]),
        positions="rope" if full["use_rotary_positional_embeddings"] else "sincos",
        rope_grid="extrapolate" if full["patch_size_t"] else "fit_base",
        learned_positions=full["use_learned_positional_embeddings"],
        ofs=full["ofs_embed_dim"] is not None,
        time_embed_dim=full["time_embed_dim"],
        text_dim=full["text_embed_dim"],
        text_length=full["max_text_seq_length"],
        sample_frames=(frames - 1) // TEMPORAL_COMPRESSION + 1,
        sample_height=full["sample_height"],
        sample_width=full["sample_width"],
        spatial_interpolation=full["spatial_interpolation_scale"],
        temporal_interpolation=full["temporal_interpolation_scale"],
        norm_eps=full["norm_eps"],
        out_norm_eps=full["norm_eps"],
    )
