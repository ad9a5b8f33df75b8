"""A checkpoint in the pieces of another layout, without the model and without a process group.

No run needs it, since every layout reads every checkpoint; it is for those who copy parts of one to several machines, or want
one file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogvideo_dist.engine import files
from cogvideo_dist.engine.checkpoint import ASIDE, Stored
from cogvideo_dist.engine.manifest import CheckpointError
from cogvideo_dist.engine.pieces import Piece
from cogvideo_dist.engine.saving import commit, file_facts


def reshape(stored: Stored, folder: Path, *, tp: int, replicas: int) -> Path:
    """Write ``folder/step-N`` as ``tp`` x ``replicas`` ranks would; one file is in memory at a time.

    Raises ``CheckpointError`` if it is there already or the model does not divide into ``tp`` slices.
    """
    final = folder / stored.path.name
    if final.exists():
        raise CheckpointError(f"{final} is there already; remove it or give another folder")
    aside = folder / f"{ASIDE}{final.name}"
    if aside.exists():  # of a reshape that was cut off
        files.remove_folder(aside)
    models = list(stored.manifest["tensors"])
    writers = [{model: _pieces(stored, model, rank=rank, tp=tp, replicas=replicas) for model in models}
               for rank in range(tp * replicas)]  # fmt: skip
    files.make_folder(aside)
    found: dict[str, Any] = {}
    jobs = [
        (rank, model, kind) for rank in range(len(writers)) for model in models for kind in sorted(stored.kinds(model))
    ]
    for rank, model, kind in tqdm(jobs, unit="file"):
        pieces = writers[rank][model]
        if pieces:
            name = f"{model}.{kind}-{rank:05d}.safetensors" if model else f"{kind}-{rank:05d}.safetensors"
            values = torch.cat([_read(stored, model, kind, name=key, piece=piece) for key, piece in pieces.items()])
            written = files.write_tensors(aside / name, {key: piece.count for key, piece in pieces.items()}, values)
            found[name] = {"model": model, "kind": kind, "writer": rank, **file_facts(written)}
    said = [
        {
            "slice": [rank % tp, tp],
            "pieces": {model: list(_numbered(stored, model, pieces)) for model, pieces in each.items()},
        }
        for rank, each in enumerate(writers)
    ]
    content = {**stored.saved.plain(), "tensors": stored.manifest["tensors"], "writers": said, "files": found}
    commit(content, aside=aside, final=final)
    return final


def _pieces(stored: Stored, model: str, *, rank: int, tp: int, replicas: int) -> dict[str, Piece]:
    """What a rank would own: tensors' slices in even runs over replicas, what is not sliced dealt over tp."""
    place, part = divmod(rank, tp)
    found = {}
    for number, (name, cut) in enumerate(stored.cuts(model).items()):
        try:
            whole = cut.slice(part, tp)
        except ValueError as error:
            raise CheckpointError(f"{stored.path}: {name}: {error}") from None
        share = -(-whole.count // replicas)
        piece = replace(whole, start=min(whole.count, place * share), stop=min(whole.count, (place + 1) * share))
        if piece.count and (piece.parts > 1 or number % tp == part):
            found[name] = piece
    return found


def _read(stored: Stored, model: str, kind: str, *, name: str, piece: Piece) -> torch.Tensor:
    return stored.read(kind, name, piece=piece, cut=stored.cuts(model)[name], model=model)


def _numbered(stored: Stored, model: str, pieces: dict[str, Piece]) -> Iterator[list[int]]:
    numbers = {name: number for number, name in enumerate(stored.cuts(model))}
    for name, piece in pieces.items():
        yield [numbers[name], piece.start, piece.stop]
