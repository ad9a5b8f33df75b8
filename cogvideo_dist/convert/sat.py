"""The VAE's file of the SAT releases, ``3d-vae.pt`` <-> our VAE: every tensor accounted for, no code of the file executed.

The file is a pickle, the one format here that is: it is read by ``torch.load(weights_only=True)`` alone, which builds tensors
and plain containers and refuses everything else.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from pickle import UnpicklingError  # the name of the error alone
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.convert.diffusers import vae_rows
from cogvideo_dist.convert.names import from_foreign, to_foreign
from cogvideo_dist.models.vae import VAE, VAEConfig

WRAPPER = "state_dict"

LEFT_OUT = ("loss",)
"""First parts of names in the file that are no part of the autoencoder: its critic and perceptual network."""


class SatVAE(NamedTuple):
    """The VAE of a file, and how many of the file's tensors were left out under each name of ``LEFT_OUT``."""

    vae: VAE
    left_out: dict[str, int]


def load_vae(path: str | Path, config: VAEConfig) -> SatVAE:
    """The autoencoder of a ``3d-vae.pt``, in the dtype it is stored in.

    The file holds tensors only, so ``config`` says the rest: for the releases ``VAEConfig(scaling_factor=...)`` with 1.15258426
    for the 2B and 0.7 for all others.

    Raises ``ValueError`` naming the file and what is wrong with it: damaged, holding more than tensors, or the tensor that is
    missing, unknown or of another shape.
    """
    tensors = _read(Path(path))
    left_out = Counter(first for first in (name.partition(".")[0] for name in tensors) if first in LEFT_OUT)
    kept = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in LEFT_OUT}
    with torch.device("meta"):
        vae = VAE(config)
    shapes = {name: p.shape for name, p in vae.named_parameters()}
    state = from_foreign(kept, vae_rows(config), column="sat", shapes=shapes, source=str(path))
    vae.load_state_dict(state, strict=True, assign=True)
    return SatVAE(vae, dict(left_out))


def save_vae(vae: VAE, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the weights under SAT's names, wrapped as in the releases; ``dtype`` None keeps each tensor's own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to("cpu", dtype) for name, p in vae.named_parameters()}
    tensors = to_foreign(state, vae_rows(vae.config), "sat")
    torch.save({WRAPPER: {name: tensor.contiguous() for name, tensor in tensors.items()}}, path)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a 3d-vae.pt of a SAT release")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: refused, as it is damaged or holds more than tensors; none of it was run: {reason}"
        ) from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"{path}: damaged or no file of torch: {reason}") from None
    tensors: Any = found.get(WRAPPER) if isinstance(found, dict) else None
    if not isinstance(tensors, dict):
        raise ValueError(f'{path}: holds no dictionary "{WRAPPER}", in which a 3d-vae.pt has its tensors')
    for name, tensor in tensors.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_floating_point()
        if not dense or not isinstance(name, str):
            raise ValueError(f"{path}: {WRAPPER}[{name!r}] is no dense tensor of real numbers under a name")
    return tensors
