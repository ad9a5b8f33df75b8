"""The same transformer in the public diffusers library, with the same weights, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_dist.convert.dit_config import dit_config_to_diffusers
from cogvideo_dist.convert.names import dit_rows, from_foreign, to_foreign
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.embed import rope_table
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import Clip, PackLayout

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Latents [B, T, C, H, W], text [B, L, text_dim], timestep [B] -> velocity [B, T, C, H, W]."""


def diffusers_installed() -> bool:
    return find_spec("diffusers") is not None


def set_recompute(model: DiT, level: Recompute) -> None:
    for part in (model, *model.blocks):
        part.recompute = level


def set_checkpointing(theirs: Any, on: bool) -> None:
    if on:
        theirs.enable_gradient_checkpointing()
    else:
        theirs.disable_gradient_checkpointing()


def parameters_of(model: DiT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def diffusers_transformer(model: DiT) -> nn.Module:
    """diffusers' transformer with the weights of ``model``, on its device and in its precision."""
    from diffusers import CogVideoXTransformer3DModel

    fields = {k: v for k, v in dit_config_to_diffusers(model.config).items() if k != "_class_name"}
    state = to_foreign(parameters_of(model), dit_rows(model.config), "diffusers")
    weight = model.embed.patch.weight
    with torch.device(weight.device):
        theirs = nn.Module.to(CogVideoXTransformer3DModel(**fields), weight.dtype)
    theirs.load_state_dict(state, strict=True)
    return theirs.train()


def gradients_by_our_names(theirs: nn.Module, model: DiT) -> dict[str, Tensor]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    return from_foreign(found, dit_rows(model.config), column="diffusers", shapes=shapes, source="diffusers' gradients")


def rotations_for_diffusers(config: DiTConfig, clip: Clip, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) [vision tokens, head_dim] of a clip; None for a model without rotary positions."""
    rope = rope_table(config, (clip,), spans=PackLayout((clip,)).spans(), device=device, dtype=torch.float32)
    if rope is None:
        return None
    vision = rope[clip.text :]
    return vision.real.repeat_interleave(2, dim=1), vision.imag.repeat_interleave(2, dim=1)


def predict_with_diffusers(theirs: nn.Module, config: DiTConfig, clip: Clip, device: torch.device) -> Predict:
    rotations = rotations_for_diffusers(config, clip, device)
    return lambda latents, text, timestep: theirs(latents, text, timestep, image_rotary_emb=rotations).sample
