"""Folders of the public diffusers library <-> our models: safetensors and JSON only, every tensor accounted for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvideo_dist.convert.dit_config import dit_config_from_diffusers, dit_config_to_diffusers
from cogvideo_dist.convert.names import Part, Row, dit_rows, from_foreign, to_foreign
from cogvideo_dist.convert.vae_config import config_from_diffusers, config_to_diffusers
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.split import full_shape, own_slice, split_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_transformer(
    folder: str | Path,
    *,
    recompute: Recompute = "none",
    tp: Axis | None = None,
    changes: Mapping[str, Any] | None = None,
) -> DiT:
    """The transformer of a diffusers ``transformer/`` folder, any released variant, in the dtype it is stored in.

    Under ``tp`` this rank's slice of it. ``changes``: fields of the configuration that are to be other than the folder's.

    Raises ``ValueError`` naming the file and the tensor or field that is missing, unknown or of another shape.
    """
    folder = Path(folder)
    config = dit_config_from_diffusers(read_json(folder / "config.json"), str(folder / "config.json"))
    config = replace(config, **(changes or {}))
    with torch.device("meta"):
        model = DiT(config, recompute=recompute, tp=tp)
    return _filled(model, folder, dit_rows(config))


def save_transformer(model: DiT, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and the weights under diffusers' names; ``dtype`` None keeps each tensor's own."""
    _save(model, Path(folder), rows=dit_rows(model.config), fields=dit_config_to_diffusers(model.config), dtype=dtype)


def load_vae(folder: str | Path) -> VAE:
    """The autoencoder of a diffusers ``vae/`` folder; errors as for ``load_transformer``."""
    folder = Path(folder)
    try:
        config = config_from_diffusers(read_json(folder / "config.json"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    with torch.device("meta"):
        model = VAE(config)
    return _filled(model, folder, vae_rows(config))


def save_vae(model: VAE, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and the weights under diffusers' names."""
    _save(model, Path(folder), rows=vae_rows(model.config), fields=config_to_diffusers(model.config), dtype=dtype)


def save_pipeline(
    folder: str | Path, *, transformer: DiT, vae: VAE, scheduler: Mapping[str, Any], text: str | Path,
    dtype: torch.dtype | None = None, inverted: bool = False,
) -> None:  # fmt: skip
    """A folder that ``CogVideoXPipeline.from_pretrained`` loads or, of an image-to-video model, that of
    CogVideoXImageToVideoPipeline; T5 and its tokenizer are copied from the folder ``text``. ``inverted``: the image's latent is
    divided by the VAE's factor.

    ``scheduler``: what ``scheduler_config`` gives."""
    folder = Path(folder)
    save_transformer(transformer, folder / "transformer", dtype=dtype)
    save_vae(vae, folder / "vae", dtype=dtype)
    write_json(folder / "vae" / "config.json", config_to_diffusers(vae.config) | {"invert_scale_latents": inverted})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(Path(text) / part, folder / part, dirs_exist_ok=True)
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if transformer.config.image_channels else "CogVideoXPipeline",
        "_diffusers_version": scheduler["_diffusers_version"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    write_json(folder / "model_index.json", index)


def vae_rows(config: VAEConfig) -> list[Row]:
    """The autoencoder's table in the form of the transformer's: every tensor as it is, under three names."""
    return [Row(row.ours, 1, (Part(row.diffusers),), (Part(row.sat),)) for row in vae_names(config)]


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a folder of the diffusers layout") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's ``diffusion_pytorch_model``, one file or several with an index."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} points outside its folder: {name!r}")
        tensors |= read_file(folder / name)
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; weights are read from safetensors only") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or no safetensors file: {error}") from None


def _filled(model: nn.Module, folder: Path, rows: list[Row]) -> Any:
    """``model`` (on the meta device) with the folder's tensors as its parameters."""
    shapes = {name: torch.Size(full_shape(model, name, p.shape)) for name, p in model.named_parameters()}
    state = from_foreign(read_tensors(folder), rows, column="diffusers", shapes=shapes, source=str(folder))
    # A slice is copied, or it would keep the whole alive.
    own = {
        name: own_slice(model, name, tensor).clone() if split_of(model, name) else tensor
        for name, tensor in state.items()
    }
    model.load_state_dict(own, strict=True, assign=True)
    return model


def _save(
    model: nn.Module, folder: Path, *, rows: list[Row], fields: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    state = {name: p.detach().to("cpu", dtype) for name, p in model.named_parameters()}
    foreign = {name: tensor.contiguous() for name, tensor in to_foreign(state, rows, "diffusers").items()}
    save_file(foreign, folder / WEIGHTS, metadata={"format": "pt"})
