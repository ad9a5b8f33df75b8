"""Weights in a folder under our own names, with our configuration: safetensors and JSON, for whoever uses our models."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from cogvideo_dist.convert.diffusers import read_file, read_json, write_json
from cogvideo_dist.convert.names import check_names
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.models.vae import VAE, VAEConfig

WEIGHTS, FIELDS = "weights.safetensors", "model.json"
KINDS: dict[str, tuple[type[DiT] | type[VAE], Any]] = {"DiT": (DiT, DiTConfig), "VAE": (VAE, VAEConfig)}


def save(model: DiT | VAE, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write both files; ``dtype`` None keeps each tensor's own."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    save_file(state, folder / WEIGHTS)
    write_json(folder / FIELDS, {"class": type(model).__name__, **asdict(model.config)})


def load(folder: Path) -> DiT | VAE:
    """The model of a folder that ``save`` wrote, in the dtype it is stored in.

    Raises ``ValueError`` naming the file and the tensor or field that is missing, unknown or of another shape or type.
    """
    path = folder / FIELDS
    found = read_json(path)
    kind = found.pop("class", None)
    if kind not in KINDS:
        raise ValueError(f"{path}: class is {kind!r}; expected one of {', '.join(KINDS)}")
    build, config_type = KINDS[kind]
    names = {field.name for field in fields(config_type)}
    if odd := sorted(found.keys() ^ names):
        raise ValueError(
            f"{path}: {'unknown' if odd[0] in found else 'missing'} field {odd[0]} of a {kind}'s configuration"
        )
    try:
        config = TypeAdapter(config_type).validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    with torch.device("meta"):
        model = build(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    state = read_file(folder / WEIGHTS)
    check_names(state.keys(), shapes.keys(), source=str(folder / WEIGHTS))
    for name, tensor in state.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{folder / WEIGHTS}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])}"
            )
    model.load_state_dict(state, strict=True, assign=True)
    return model
