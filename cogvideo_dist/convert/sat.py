"""The VAE in files of SAT <-> ours: every tensor accounted for, no code of the file executed.

Released: ``3d-vae.pt``, whose ``state_dict`` holds the VAE and its losses. Fine-tuned: ``mp_rank_00_model_states.pt`` of
``<iteration>/`` or, averaged, of ``<iteration>-ema/``; its ``module`` holds the VAE under ``first_stage_model.`` beside the
transformer and the text encoder.

These are pickles; ``convert/pickles.py`` reads them, in a process of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.convert.diffusers import vae_rows
from cogvideo_dist.convert.names import Part, Row, from_foreign, to_foreign
from cogvideo_dist.convert.pickles import Odd, TorchFile, open_file, read_tensors, weights_of
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
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a 3d-vae.pt or a mp_rank_00_model_states.pt of SAT")
    file = open_file(path)
    tensors = wrapped(file)
    config = _configuration(file.content.get(CONFIG), config, path)
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
    return SatVAE(_filled(config, read_tensors(file, weights_of(kept, path)), rows, path), prefix, dict(left_out))


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


def wrapped(file: TorchFile) -> dict[str, Any]:
    """What a file has in its wrapper, by name."""
    content, path = file.content, file.path
    if not isinstance(content, dict):
        kind = content.name if isinstance(content, Odd) else type(content).__name__
        raise ValueError(f"{path}: holds a {kind}, expected a dictionary with {' or '.join(WRAPPERS)}")
    found = [content[name] for name in WRAPPERS if isinstance(content.get(name), dict)]
    if len(found) != 1:
        raise ValueError(
            f'{path}: holds {"both" if found else "no"} dictionary "{WRAPPERS[0]}" (as a 3d-vae.pt) '
            f'{"and" if found else "or"} "{WRAPPERS[1]}" (as a fine-tuned checkpoint); expected one with the tensors'
        )
    for name in found[0]:
        if not (isinstance(name, str) and name.isprintable()):
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
            f"{source}: no VAE in it, as no name ends in {MARKS[0]}; give a 3d-vae.pt, or a checkpoint of a fine-tuned model "
            "(a transformer is read from its folder)"
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
