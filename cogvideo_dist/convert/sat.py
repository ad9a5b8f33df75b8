"""The VAE in files of SAT <-> ours: every tensor accounted for, no code of the file executed.

Released: ``3d-vae.pt``, whose ``state_dict`` holds the VAE and its losses. Fine-tuned: ``mp_rank_00_model_states.pt`` of
``<iteration>/`` or, averaged, of ``<iteration>-ema/``; its ``module`` holds the VAE under ``first_stage_model.`` beside the
transformer and the text encoder.

These are pickles, the one format here that is: they are read by ``torch.load(weights_only=True)`` alone, which builds tensors
and plain containers and refuses everything else.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError  # the name of the error alone
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.convert.diffusers import vae_rows
from cogvideo_dist.convert.names import Part, Row, from_foreign, to_foreign
from cogvideo_dist.convert.vae_config import config_from_diffusers, config_to_diffusers
from cogvideo_dist.models.vae import VAE, VAEConfig

WRAPPERS = ("state_dict", "module")
"""Under one of which a file has its tensors."""

CONFIG = "vae_config"
"""Under which our files say the configuration, diffusers' in JSON; SAT's have nothing there and do not mind it."""

LEFT_OUT = ("loss",)
"""First parts of names in a VAE that are no part of the autoencoder: its critic and perceptual network."""

MARKS = ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight")
"""What every VAE has and no other model; what stands before it is the VAE's prefix."""


class SatVAE(NamedTuple):
    """The VAE of a file, where in the file it is, and how many of the file's tensors were left out under each name."""

    vae: VAE
    prefix: str
    left_out: dict[str, int]


def load_vae(path: str | Path, config: VAEConfig | None = None, *, prefix: str | None = None) -> SatVAE:
    """The autoencoder of a file of SAT, in the dtype it is stored in.

    SAT's files hold tensors only, so ``config`` says the rest: for the releases ``VAEConfig(scaling_factor=...)`` with
    1.15258426 for the 2B and 0.7 for all others. Files of ``save_vae`` say it themselves. ``prefix`` is what stands before
    ``encoder.`` in the VAE's names; left out, it is found.

    Raises ``ValueError`` naming the file and what is wrong with it: damaged, holding more than tensors, no VAE or several, or
    the tensor that is missing, unknown or of another shape.
    """
    path = Path(path)
    content = _read(path)
    tensors = _wrapped(content, path)
    config = _configuration(content.get(CONFIG), config, path)
    prefixes = sorted({name.removesuffix(mark) for name in tensors for mark in MARKS if _ends(name, mark)})
    prefix = _chosen(prefixes, prefix, f"{path} ({_summary(tensors)})")
    nested = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(nested) and _first(name.removeprefix(prefix)) not in LEFT_OUT
    }
    left_out = Counter(_owner(name, prefix) for name in tensors if name not in kept)
    rows = [Row(row.ours, 1, row.diffusers, (Part(prefix + row.sat[0].name),)) for row in vae_rows(config)]
    return SatVAE(_filled(config, _dense(kept, path), rows, path), prefix, dict(left_out))


def save_vae(vae: VAE, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the weights under SAT's names, wrapped as in the releases; ``dtype`` None keeps each tensor's own.

    The configuration, and with it the scaling factor, is written beside them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to("cpu", dtype) for name, p in vae.named_parameters()}
    tensors = to_foreign(state, vae_rows(vae.config), "sat")
    wrapped = {name: tensor.contiguous() for name, tensor in tensors.items()}
    torch.save({WRAPPERS[0]: wrapped, CONFIG: json.dumps(config_to_diffusers(vae.config))}, path)


class _Foreign:
    """Stands for what a pickle wants of numpy: the state of a random generator beside the weights. It is thrown away."""

    NAMES = (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
    )

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a 3d-vae.pt or a mp_rank_00_model_states.pt of SAT")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and (damaged := zipfile.ZipFile(path).testzip()):  # torch does not look at checksums
            raise ValueError(f"{damaged} differs from its checksum")
        # A fine-tuned file also holds the transformer and the text encoder: mapped, they never come into memory.
        with torch.serialization.safe_globals([(_Foreign, name) for name in _Foreign.NAMES]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the bytes of a damaged file may mislead its reader in any way
        asked = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, UnpicklingError) else None
        if asked:
            raise ValueError(
                f"{path}: refused, as it holds more than tensors: {asked[1]}, of which nothing was run; save its tensors alone"
            ) from None
        reason = type(error).__name__ if isinstance(error, UnpicklingError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: damaged, or no file of torch ({' '.join(reason.split()).partition('. ')[0]}); get it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, expected a dictionary with {' or '.join(WRAPPERS)}"
        )
    return content


def _wrapped(content: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """What the file has in its wrapper, by name."""
    found = [content[name] for name in WRAPPERS if isinstance(content.get(name), dict)]
    if len(found) != 1:
        raise ValueError(
            f'{path}: holds {"both" if found else "no"} dictionary "{WRAPPERS[0]}" (as a 3d-vae.pt) '
            f'{"and" if found else "or"} "{WRAPPERS[1]}" (as a fine-tuned checkpoint); expected one with the tensors'
        )
    for name in found[0]:
        if not isinstance(name, str):
            raise ValueError(f"{path}: holds something under {name!r}, which is no name; expected tensors by name")
    return found[0]


def _configuration(stored: Any, given: VAEConfig | None, path: Path) -> VAEConfig:
    """The one that the file says, or the one that is given for it."""
    if stored is None:
        if given is None:
            raise ValueError(
                f"{path} holds tensors alone; give the scaling factor of its release (--scaling-factor), or the VAE's "
                "configuration (--vae-config)"
            )
        return given
    try:
        values = json.loads(stored) if isinstance(stored, str) else None
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object, the fields of a config.json of diffusers")
        found = config_from_diffusers(values)
    except ValueError as error:
        raise ValueError(f"{path}: {CONFIG}: {error}") from None
    for field in fields(VAEConfig):
        value, wanted = getattr(found, field.name), getattr(given or found, field.name)
        if value != wanted:
            raise ValueError(
                f"{path} says itself that {field.name} is {value}, not {wanted}; give no configuration for it"
            )
    return found


def _ends(name: str, mark: str) -> bool:
    return name == mark or name.endswith(f".{mark}")


def _first(name: str) -> str:
    return name.partition(".")[0]


def _owner(name: str, prefix: str) -> str:
    """What a tensor that is left out is listed under."""
    inside = name.startswith(prefix) and _first(name.removeprefix(prefix)) in LEFT_OUT
    return prefix + _first(name.removeprefix(prefix)) if inside else _first(name)


def _chosen(prefixes: list[str], wanted: str | None, source: str) -> str:
    if not prefixes:
        raise ValueError(
            f"{source}: no VAE in it, as no name ends in {MARKS[0]}; give a 3d-vae.pt, or a checkpoint of a fine-tuned model"
        )
    shown = " and ".join(f'"{prefix}"' for prefix in prefixes)
    if wanted is None and len(prefixes) > 1:
        raise ValueError(f"{source}: {len(prefixes)} VAEs in it, under the prefixes {shown}; choose one with --prefix")
    if wanted is not None and wanted not in prefixes:
        raise ValueError(f'{source}: no VAE under the prefix "{wanted}"; it is under {shown}')
    return prefixes[0] if wanted is None else wanted


def _summary(tensors: Mapping[str, Any]) -> str:
    """How many tensors there are under each first part of a name."""
    counts = Counter(map(_first, tensors))
    return ", ".join(f"{count} under {name}.*" for name, count in counts.most_common(5)) or "empty"


def _dense(tensors: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    for name, tensor in tensors.items():
        if not (isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_floating_point()):
            raise ValueError(f"{path}: {name} is no dense tensor of real numbers; save its values as such a tensor")
    return tensors


def _filled(config: VAEConfig, tensors: Mapping[str, Tensor], rows: list[Row], path: Path) -> VAE:
    with torch.device("meta"):
        vae = VAE(config)
    shapes = {name: p.shape for name, p in vae.named_parameters()}
    try:
        state = from_foreign(tensors, rows, column="sat", shapes=shapes, source=str(path))
    except ValueError as error:
        raise ValueError(f"{error}; give the whole file, and the configuration that its VAE has") from None
    vae.load_state_dict(state, strict=True, assign=True)
    return vae
