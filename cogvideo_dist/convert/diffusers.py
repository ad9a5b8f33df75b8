"""Folders of the public diffusers library <-> our models: safetensors and JSON only, every tensor accounted for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in a file; more are divided over several, as the public library does by itself."""

PIPELINE = ("model_index.json", "transformer", "vae", "scheduler", "text_encoder", "tokenizer")
"""What a pipeline's folder holds."""


class Storage(NamedTuple):
    """How weights are written: in which dtype (None: each tensor in its own), in files of at most how many bytes."""

    dtype: torch.dtype | None = None
    shard_size: int = SHARD_SIZE


class Elsewhere(NamedTuple):
    """A text encoder and its tokenizer that are not copied: the hub's id or the folder where they are."""

    source: str


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


def save_transformer(model: DiT, folder: str | Path, *, storage: Storage | None = None) -> None:
    """Write ``config.json`` and the weights under diffusers' names.

    Raises ``ValueError`` naming a tensor with values that are not finite, or that its dtype cannot hold.
    """
    rows, fields = dit_rows(model.config), dit_config_to_diffusers(model.config)
    _save(model, Path(folder), rows=rows, fields=fields, storage=storage or Storage())


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


def save_vae(model: VAE, folder: str | Path, *, storage: Storage | None = None, inverted: bool = False) -> None:
    """Like ``save_transformer``. ``inverted``: of a pipeline that divides an image's latent by the scaling factor."""
    fields = config_to_diffusers(model.config) | {"invert_scale_latents": inverted}
    _save(model, Path(folder), rows=vae_rows(model.config), fields=fields, storage=storage or Storage())


def save_pipeline(
    folder: str | Path, *, transformer: DiT, vae: VAE, scheduler: Mapping[str, Any], text: str | Path | Elsewhere,
    storage: Storage | None = None, inverted: bool = False,
) -> None:  # fmt: skip
    """A folder that ``CogVideoXPipeline.from_pretrained`` loads or, of an image-to-video model, that of
    CogVideoXImageToVideoPipeline. ``inverted``: the image's latent is divided by the VAE's factor.

    T5 and its tokenizer are copied from the folder ``text``; where they are ``Elsewhere``, the index says that this folder has
    none, so that the public library asks for both.

    ``scheduler``: what ``scheduler_config`` gives."""
    folder, here = Path(folder), not isinstance(text, Elsewhere)
    save_transformer(transformer, folder / "transformer", storage=storage)
    save_vae(vae, folder / "vae", storage=storage, inverted=inverted)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": pipeline_class(transformer),
        "_diffusers_version": scheduler["_diffusers_version"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"] if here else [None, None],
        "tokenizer": ["transformers", "T5Tokenizer"] if here else [None, None],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    if isinstance(text, Elsewhere):
        index["_text_from"] = text.source
    else:
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(Path(text) / part, folder / part, dirs_exist_ok=True)
    write_json(folder / "model_index.json", index)


def written_tensors(model: DiT | VAE, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the public form by name, as ``save_transformer`` and ``save_vae`` write it."""
    rows = dit_rows(model.config) if isinstance(model, DiT) else vae_rows(model.config)
    state = {name: p.detach() for name, p in model.named_parameters()}
    for row in rows:
        for part in row.diffusers:
            yield part.name, _foreign(state, row, part, dtype)


def pipeline_class(transformer: DiT) -> str:
    """The public pipeline that samples with it."""
    return "CogVideoXImageToVideoPipeline" if transformer.config.image_channels else "CogVideoXPipeline"


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
    model: nn.Module, folder: Path, *, rows: list[Row], fields: Mapping[str, Any], storage: Storage
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{Path(WEIGHTS).stem}*"):  # or an index of another time would be read
        old.unlink()
    write_json(folder / "config.json", fields)
    state = {name: p.detach() for name, p in model.named_parameters()}
    files = _divided(state, rows, storage)
    names = [WEIGHTS]
    if len(files) > 1:
        stem = Path(WEIGHTS).stem
        names = [f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    total, places = 0, dict[str, str]()
    for name, parts in zip(names, files):
        tensors = {part.name: _foreign(state, row, part, storage.dtype) for row, part in parts}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        places |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / f"{WEIGHTS}.index.json", index)


def _divided(state: Mapping[str, Tensor], rows: list[Row], storage: Storage) -> list[list[tuple[Row, Part]]]:
    """The foreign tensors of each file, in the table's order; one that is larger than a file may be has its own."""
    files: list[list[tuple[Row, Part]]] = [[]]
    filled = 0
    for row in rows:
        ours = state[row.ours]
        for part in row.diffusers:
            size = ours.numel() // row.pieces * len(part.take) * (storage.dtype or ours.dtype).itemsize
            if files[-1] and filled + size > storage.shard_size:
                files.append([])
                filled = 0
            files[-1].append((row, part))
            filled += size
    return files


def _foreign(state: Mapping[str, Tensor], row: Row, part: Part, dtype: torch.dtype | None) -> Tensor:
    """One tensor as it is written."""
    ours = state[row.ours].to("cpu")
    foreign = to_foreign({row.ours: ours.to("cpu", dtype)}, [replace(row, diffusers=(part,))], "diffusers")[part.name]
    if not foreign.isfinite().all():
        kind = str(foreign.dtype).removeprefix("torch.")
        reason = f"beyond what {kind} holds; write bf16 or fp32" if ours.isfinite().all() else "NaN or infinite"
        raise ValueError(f"{part.name} has values that are {reason}")
    return foreign.contiguous()
