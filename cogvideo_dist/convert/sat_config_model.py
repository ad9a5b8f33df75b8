"""The ``model`` section of SAT: which released transformer it is, what differs, schedule, conditions, adapters, sampling."""

from __future__ import annotations

from typing import Any

from cogvideo_dist.convert.sat_config_keys import Keys, shown
from cogvideo_dist.convert.sat_config_rules import (
    DISCRETIZATIONS,
    NETWORK,
    SAMPLER,
    SIGMA,
    STAGE1,
    TEXT,
    UNKNOWN_CLASS,
)
from cogvideo_dist.models.presets import LATENT_SCALE, RELEASED, DiTConfig

POSITIONS = f"{NETWORK}.modules.pos_embed_config"
LORA = f"{NETWORK}.modules.lora_config"
GUIDER = f"{SAMPLER}.guider_config"

POSITION_CLASSES = {
    "dit_video_concat.Basic3DPositionEmbeddingMixin": "sincos",
    "dit_video_concat.Rotary3DPositionEmbeddingMixin": "rope",
}
LORA_CLASSES = ("sat.model.finetune.lora2.LoraMixin",)
SAMPLER_CLASSES = {
    "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler": "dpmpp_2m_sde",
    "sgm.modules.diffusionmodules.sampling.VideoDDIMSampler": "ddim",
    "sgm.modules.diffusionmodules.sampling.Image2VideoDDIMSampler": "ddim",
}
GUIDER_CLASSES = {
    "sgm.modules.diffusionmodules.guiders.DynamicCFG": "dynamic",
    "sgm.modules.diffusionmodules.guiders.VanillaCFG": "constant",
    "sgm.modules.diffusionmodules.guiders.IdentityGuider": "constant",
}

PUBLISHED = {
    "cogvideox-2b": "CogVideoX-2b",
    "cogvideox-5b": "CogVideoX-5b",
    "cogvideox-5b-i2v": "CogVideoX-5b-I2V",
    "cogvideox1.5-5b": "CogVideoX1.5-5B",
    "cogvideox1.5-5b-i2v": "CogVideoX1.5-5B-I2V",
}
"""Names of the releases in diffusers' format."""


def folder_of(preset: str) -> str:
    """Where the release is expected until the user says otherwise, as in the shipped configurations."""
    return f"models/{PUBLISHED[preset]}"


def translate_model(keys: Keys) -> DiTConfig:
    """Everything under ``model``; returns the transformer. Raises ``ConfigError`` where no preset is of its kind."""
    preset = _preset(keys)
    config = _sizes(keys, preset)
    _schedule(keys)
    _text(keys, preset)
    _autoencoder(keys, preset)
    _trained(keys)
    if config.image_channels:
        _image(keys)
    _sampling(keys)
    return config


def _patch(keys: Keys) -> tuple[int, int, int]:
    path = f"{NETWORK}.patch_size"
    if len(keys.items(path)) == 1:
        size = keys.whole(path)
        return 1, size, size
    t, h, w = (int(number) for number in keys.numbers(path, count=3))
    return t, h, w


def _preset(keys: Keys) -> str:
    """The released model of the same kind: how it marks positions, its patches, its conditions."""
    for name in ("num_layers", "hidden_size", "num_attention_heads", "in_channels", "out_channels", "patch_size"):
        if not keys.has(f"{NETWORK}.{name}"):
            raise keys.error(f"{NETWORK}.{name}", "is missing; give the model's file, too, as SAT's --base has it")
    learned, ofs = f"{POSITIONS}.params.learnable_pos_embed", f"{NETWORK}.ofs_embed_dim"
    kind: dict[str, Any] = {
        "in_channels": keys.whole(f"{NETWORK}.in_channels"),
        "out_channels": keys.whole(f"{NETWORK}.out_channels"),
        "patch": _patch(keys),
        "learned_positions": keys.flag(learned),
        "ofs": keys.leaves.get(ofs) not in (None, "None"),
    }
    target = keys.leaves.get(f"{POSITIONS}.target")
    if isinstance(target, str) and target in POSITION_CLASSES:
        kind["positions"] = POSITION_CLASSES[target]
    fitting = [name for name, own in RELEASED.items() if all(getattr(own, key) == kind[key] for key in kind)]
    if not fitting:
        found = ", ".join(f"{key} {shown(value)}" for key, value in kind.items())
        raise keys.error(
            f"{NETWORK}.in_channels", f"no released model has {found}; model.preset offers {', '.join(RELEASED)}"
        )
    hidden = keys.whole(f"{NETWORK}.hidden_size")
    preset = min(fitting, key=lambda name: abs(RELEASED[name].hidden - hidden))
    for name in ("in_channels", "out_channels", "patch_size"):
        keys.give(f"{NETWORK}.{name}", "model.preset", value=preset)
    if "positions" in kind:
        keys.give(f"{POSITIONS}.target", "model.preset", value=preset, text=f"positions: {kind['positions']}")
    elif keys.has(f"{POSITIONS}.target"):
        keys.lack(f"{POSITIONS}.target", UNKNOWN_CLASS)
    for path in (learned, ofs, "model.noised_image_input"):
        if keys.has(path):
            _tell_kind(keys, path, preset)
    return preset


def _tell_kind(keys: Keys, path: str, preset: str) -> None:
    """A key that says what the preset says already, or the contrary."""
    own = RELEASED[preset]
    if path == "model.noised_image_input" and keys.flag(path) != bool(own.image_channels):
        keys.lack(path, f"in_channels and out_channels say the contrary, and they decide: model.preset {preset}")
    elif path == f"{NETWORK}.ofs_embed_dim" and own.ofs and keys.whole(path) != own.time_embed_dim:
        keys.lack(path, f"only {own.time_embed_dim}, the width of the timestep's embedding, is computed here")
    else:
        keys.give(path, "model.preset", value=preset)


def _sizes(keys: Keys, preset: str) -> DiTConfig:
    """``model.preset`` and what differs from it."""
    own = RELEASED[preset]
    heads, hidden = keys.whole(f"{NETWORK}.num_attention_heads"), keys.whole(f"{NETWORK}.hidden_size")
    if heads < 1 or hidden % heads:
        raise keys.error(f"{NETWORK}.hidden_size", f"{hidden} does not divide over {heads} heads")
    _size(keys, f"{NETWORK}.num_layers", "layers", value=keys.whole(f"{NETWORK}.num_layers"), own=own)
    _size(keys, f"{NETWORK}.num_attention_heads", "heads", value=heads, own=own)
    _size(keys, f"{NETWORK}.hidden_size", "head_dim", value=hidden // heads, own=own)
    if keys.has(path := f"{POSITIONS}.params.hidden_size_head"):
        if keys.whole(path) != hidden // heads:
            raise keys.error(path, f"{keys.whole(path)} is not hidden_size / num_attention_heads, {hidden // heads}")
        _size(keys, path, "head_dim", value=hidden // heads, own=own)
    time = keys.whole(f"{NETWORK}.time_embed_dim", hidden)
    _size(keys, f"{NETWORK}.time_embed_dim", "time_embed_dim", value=time, own=own)
    if keys.has(path := f"{NETWORK}.modules.patch_embed_config.params.text_hidden_size"):
        _size(keys, path, "text_dim", value=keys.whole(path), own=own)
    for path in (f"{TEXT}.params.max_length", f"{POSITIONS}.params.text_length"):
        if keys.has(path):  # always, for the published configuration of 1.5 has 226 tokens, not the 224 of its training
            keys.give(path, "model.text_length", value=keys.whole(path))
    _base_sample(keys, own)
    _interpolation(keys, own)
    changes = {name.removeprefix("model."): value for name, value in keys.ours.items() if name.startswith("model.")}
    changes.pop("preset")
    try:
        return DiTConfig(**{**vars(own), **changes})
    except ValueError as error:
        raise keys.error(NETWORK, str(error)) from None


def _size(keys: Keys, path: str, name: str, *, value: int | float, own: DiTConfig) -> None:
    """``model.<name>`` where the value is not the preset's."""
    keys.agree(path, f"model.{name}", value=value)
    if value != getattr(own, name):
        keys.settle(path, f"model.{name}", value=value, otherwise="SAT's own default")
    elif keys.has(path):
        keys.elsewhere(path, f"as model.preset has it: {name} {value:g}")


def _base_sample(keys: Keys, own: DiTConfig) -> None:
    frames = f"{NETWORK}.num_frames"
    paths = {f"{NETWORK}.latent_height": "sample_height", f"{NETWORK}.latent_width": "sample_width"}
    for path, name in {frames: "sample_frames", **paths}.items():
        if not keys.has(path):
            continue
        value = (keys.whole(path) - 1) // 4 + 1 if path == frames else keys.whole(path)
        if own.rope_grid == "extrapolate":
            keys.drop(path, "the size of SAT's table of positions; here positions are counted, so any size works")
        else:
            _size(keys, path, name, value=value, own=own)


def _interpolation(keys: Keys, own: DiTConfig) -> None:
    """Of sin-cos positions alone: SAT hands these to its rotary ones, which do not read them."""
    found = False
    for section in (NETWORK, f"{POSITIONS}.params"):
        for name in ("height_interpolation", "width_interpolation"):
            if not keys.has(path := f"{section}.{name}"):
                continue
            if own.positions == "sincos":
                _size(keys, path, "spatial_interpolation", value=keys.number(path), own=own)
                found = True
            else:
                keys.drop(path, "SAT's rotary positions do not read it")
    if own.positions == "sincos" and not found:
        keys.assume("model.spatial_interpolation", 1.0, text="SAT's own default")


def _schedule(keys: Keys) -> None:
    found = {}
    for section in DISCRETIZATIONS:
        path = f"{section}.params.shift_scale"
        if keys.under(section):
            found[path] = keys.number(path, 1.0)
    if len(set(found.values())) > 1:
        raise keys.error(
            next(path for path in found if keys.has(path)),
            f"training, denoiser and sampler have the SNR shifts {', '.join(f'{value:g}' for value in found.values())} "
            "(1 where none is given); one schedule serves all three, so make them equal",
        )
    for path, value in found.items():
        if keys.has(path):
            keys.give(path, "diffusion.snr_shift", value=value)
    if "diffusion.snr_shift" not in keys.ours:
        keys.assume("diffusion.snr_shift", 1.0, text="SAT's own default")
    path = f"{SIGMA}.uniform_sampling"
    keys.settle(
        path, "diffusion.timesteps", value="stratified" if keys.flag(path) else "uniform", otherwise="SAT's own default",
        text="the clips of a step share the timesteps out, on any number of GPUs; SAT gives ranks strata, from 9 ranks on"
        if keys.flag(path) else "",
    )  # fmt: skip


def _text(keys: Keys, preset: str) -> None:
    keys.settle(
        f"{TEXT}.ucg_rate", "diffusion.text_dropout", value=keys.number(f"{TEXT}.ucg_rate"), otherwise="SAT's own default",
        text="drawn for each clip, the condition then being zeros, as in SAT",
    )  # fmt: skip
    keys.settle(
        f"{TEXT}.params.model_dir", "frozen.text", value=folder_of(preset), otherwise="captions are encoded in the loop",
        text="a folder with text_encoder/ and tokenizer/ (safetensors), as the release in diffusers' format has them",
    )  # fmt: skip


def _autoencoder(keys: Keys, preset: str) -> None:
    released = LATENT_SCALE[preset]
    folder = f"{folder_of(preset)}/vae"
    path = "model.scale_factor"
    scale = keys.number(path, released)
    if keys.has(path) and scale == released:
        keys.elsewhere(path, f"scaling_factor in the config.json of frozen.vae, {released} in {folder}")
    elif keys.has(path):
        keys.lack(
            path, f"the autoencoder of {PUBLISHED[preset]} has {released}; for another: python launch/convert.py diffusers "
            f"3d-vae.pt my-vae --scaling-factor {shown(scale)}, and frozen.vae: my-vae",
        )  # fmt: skip
    keys.settle(
        f"{STAGE1}.ckpt_path", "frozen.vae", value=folder, otherwise="clips are encoded in the loop",
        text="the released autoencoder; for a 3d-vae.pt of your own: python launch/convert.py diffusers 3d-vae.pt my-vae "
        f"--scaling-factor {shown(scale)}",
    )  # fmt: skip


def _trained(keys: Keys) -> None:
    """What is frozen, and adapters: alpha is 1 where SAT's file has none, so their scale is 1 / r."""
    lora = keys.leaves.get(f"{LORA}.target")
    adapters = isinstance(lora, str) and lora in LORA_CLASSES
    path = "model.not_trainable_prefixes"
    prefixes = keys.items(path)
    others = [prefix for prefix in prefixes if prefix not in ("all", "first_stage_model", "conditioner")]
    if others:
        keys.lack(
            path, f"parts of the transformer cannot be frozen one by one: {shown(others)}; adapters (lora) train little"
        )
    elif "all" in prefixes and not adapters:
        keys.lack(path, "it freezes everything, and there are no adapters; here the whole transformer is trained")
    elif "all" in prefixes:
        keys.elsewhere(path, "where lora is given, adapters alone are trained")
    elif prefixes:
        keys.drop(path, "the autoencoder and the text encoder are always frozen")
    if not adapters:
        return
    if "all" in prefixes:
        keys.elsewhere(f"{LORA}.target", "lora, on the same linears: q, k, v and out of every block")
    else:
        keys.lack(
            f"{LORA}.target", "SAT trains the whole transformer beside the adapters; here lora trains adapters alone"
        )
    params = f"{LORA}.params"
    rank = keys.whole(f"{params}.r")
    if rank < 1:
        raise keys.error(f"{params}.r", f"adapters need a rank of at least 1, found {rank}")
    keys.give(f"{params}.r", "lora.rank", value=rank)
    keys.settle(
        f"{params}.lora_alpha", "lora.alpha", value=keys.number(f"{params}.lora_alpha", 1.0),
        otherwise="SAT's own default; adapters are multiplied by alpha / rank",
    )  # fmt: skip
    keys.settle(
        f"{params}.lora_dropout",
        "lora.dropout",
        value=keys.number(f"{params}.lora_dropout"),
        otherwise="SAT's own default",
    )


def _image(keys: Keys) -> None:
    keys.settle(
        "model.noised_image_dropout", "diffusion.image.dropout", value=keys.number("model.noised_image_dropout"),
        otherwise="SAT's own default", text="drawn for each clip; SAT draws once for the whole batch",
    )  # fmt: skip
    everywhere = keys.flag("model.noised_image_all_concat")
    keys.settle(
        "model.noised_image_all_concat", "diffusion.image.rest", value="repeat" if everywhere else "zeros",
        otherwise="SAT's own default",
    )  # fmt: skip
    keys.assume("diffusion.image.latent_scale", "scale", text="as SAT trains; it samples with none")


def _sampling(keys: Keys) -> None:
    if not keys.under("model.sampler_config"):
        return
    target = keys.leaves.get("model.sampler_config.target")
    if isinstance(target, str) and target in SAMPLER_CLASSES:
        keys.give("model.sampler_config.target", "validation.sampling.sampler", value=SAMPLER_CLASSES[target])
    elif isinstance(target, str) and target.startswith("sgm.modules.diffusionmodules.sampling."):
        keys.lack(
            "model.sampler_config.target",
            f"validation.sampling.sampler offers {', '.join(sorted(set(SAMPLER_CLASSES.values())))}",
        )
    steps = keys.whole(f"{SAMPLER}.num_steps", 50)
    keys.settle(
        f"{SAMPLER}.num_steps", "validation.sampling.steps", value=steps, otherwise="as the released files have it"
    )
    guider = keys.leaves.get(f"{GUIDER}.target")
    if not isinstance(guider, str) or guider not in GUIDER_CLASSES:
        return
    keys.give(f"{GUIDER}.target", "validation.sampling.guidance_kind", value=GUIDER_CLASSES[guider])
    if guider.endswith("IdentityGuider"):
        keys.assume("validation.sampling.guidance", 1.0, text="the IdentityGuider's: no guidance")
    elif keys.has(path := f"{GUIDER}.params.scale"):
        keys.give(path, "validation.sampling.guidance", value=keys.number(path))
    if keys.has(path := f"{GUIDER}.params.num_steps"):
        if keys.whole(path) == steps:
            keys.elsewhere(path, "validation.sampling.steps, which dynamic guidance counts by")
        else:
            keys.lack(path, f"dynamic guidance counts by validation.sampling.steps, {steps}")
