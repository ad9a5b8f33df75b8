"""A run's state on disk: global tensors by name, in pieces, without a layout and without a pickle.

``ckpt/step-000020/`` holds a safetensors file per writer and kind of state, and ``manifest.json``, which says where every
element of every tensor is and what each file's blocks hash to. The folder's existence is the commit (``saving.py``); whoever
reads takes the pieces that it needs, whatever the layout they were written by, and hashes what it reads.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cogvideo_dist.engine import files
from cogvideo_dist.engine.manifest import CheckpointError, FileFacts, Manifest, OtherRun, Saved, read_manifest, saved_of
from cogvideo_dist.engine.pieces import Cut, Piece, cut_of, overlaps
from cogvideo_dist.parallel.split import Split

PREFIX, ASIDE, DYING = "step-", ".tmp-", ".del-"


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first by their step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def step_of(checkpoint: Path) -> int:
    """As its name says."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest(folder: Path, *, kinds: Sequence[str] | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files (those of some ``kinds`` of the task's own model, or all) are whole, and what was wrong
    with the ones after it.

    Raises ``CheckpointError`` if there are checkpoints and none is whole: a run never starts over in silence.
    """
    problems = []
    for path in reversed(checkpoints(folder)):
        try:
            Stored.open(path).verify(kinds)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return path, problems
    if problems:
        raise CheckpointError(f"no checkpoint of {folder} can be used: {'; '.join(problems)}")
    return None, []


@dataclass
class Stored:
    """A committed checkpoint to be read. Its manifest has been checked, its tensors are hashed as they are read."""

    path: Path
    manifest: Manifest
    _open: dict[str, StoredFile] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Stored:
        """Raises ``CheckpointError`` where the manifest is damaged or a file is missing or of another size."""
        manifest = read_manifest(path)
        for name, facts in manifest["files"].items():
            try:
                size = (path / name).stat().st_size
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                raise CheckpointError(f"{path / name} {'is missing' if gone else f'cannot be read: {error}'}") from None
            if size != facts["size"]:
                raise CheckpointError(f"{path / name} has {size} bytes, its manifest says {facts['size']}")
        return cls(path, manifest)

    @property
    def saved(self) -> Saved:
        return saved_of(self.manifest)

    def kinds(self, model: str = "") -> set[str]:
        """Of the state that it holds of a model."""
        return {facts["kind"] for facts in self.manifest["files"].values() if facts["model"] == model}

    def digest(self, kind: str, model: str = "") -> str:
        """Of all that it holds of one kind: whoever has the same digest has the same files."""
        found = {name: facts["sha256"] for name, facts in self._files(model, kind)}
        if not found:
            raise KeyError(kind)
        return next(iter(found.values())) if len(found) == 1 else files.tree([found[name] for name in sorted(found)])

    def verify(self, kinds: Sequence[str] | None = None) -> None:
        """Hash every byte of some kinds of the task's own model, or of everything."""
        for name, facts in self.manifest["files"].items():
            if kinds is None or (facts["model"] == "" and facts["kind"] in kinds):
                self._file(name).check(0, facts["size"])

    def cuts(self, model: str = "") -> dict[str, Cut]:
        """Every tensor of a model: its whole shape and how slices of it were cut when it was written."""
        tensors = self.manifest["tensors"].get(model, {})
        return {name: Cut(tuple(shape), Split(*split) if split else None) for name, (shape, split) in tensors.items()}

    def read(self, kind: str, name: str, *, piece: Piece, cut: Cut, model: str = "") -> Tensor:
        """The elements of ``piece`` of a tensor that the reader cuts by ``cut``, float32 [piece.count].

        Raises ``CheckpointError`` naming the file that is damaged, or the tensor of which something is missing.
        """
        found, filled = torch.empty(piece.count), 0
        for file, source in self._sources(kind, model).get(name, ()):
            for shared in overlaps(cut, source=source, target=piece):
                shared.copy(self._file(file).read(name, span=shared.source), found)
                filled += shared.rows * (shared.source_columns[1] - shared.source_columns[0])
        if filled != piece.count:
            raise CheckpointError(f"{self.path} has {filled} of {piece.count} elements of {kind} of {name}")
        return found

    def whole(self, kind: str, name: str, *, model: str = "") -> Tensor:
        """A whole tensor."""
        cut = self.cuts(model)[name]
        return self.read(kind, name, piece=Piece(0, 1, 0, cut.count), cut=cut, model=model).view(cut.shape)

    def _files(self, model: str, kind: str) -> Iterator[tuple[str, FileFacts]]:
        for name, facts in self.manifest["files"].items():
            if facts["model"] == model and facts["kind"] == kind:
                yield name, facts

    def _sources(self, kind: str, model: str) -> Mapping[str, list[tuple[str, Piece]]]:
        """Tensor -> the files that have pieces of it."""
        key = (kind, model)
        if key not in self._places:
            names, cuts = list(self.manifest["tensors"].get(model, {})), self.cuts(model)
            places: dict[str, list[tuple[str, Piece]]] = {}
            for file, facts in self._files(model, kind):
                writer = self.manifest["writers"][facts["writer"]]
                for number, start, stop in writer["pieces"][model]:
                    whole = cuts[names[number]].slice(*writer["slice"])
                    piece = Piece(whole.part, whole.parts, start, stop)
                    places.setdefault(names[number], []).append((file, piece))
            self._places[key] = places
        return self._places[key]

    @cached_property
    def _places(self) -> dict[tuple[str, str], dict[str, list[tuple[str, Piece]]]]:
        return {}

    def _file(self, name: str) -> StoredFile:
        if name not in self._open:
            self._open[name] = StoredFile(self.path / name, self.manifest["files"][name])
        return self._open[name]


class StoredFile:
    """One safetensors file. Blocks are hashed once, when they are first read."""

    def __init__(self, path: Path, facts: FileFacts) -> None:
        self.path, self.facts = path, facts
        # files of the first format have one digest for the whole
        self.block: int = files.BLOCK if "blocks" in facts else max(1, facts["size"])
        self.digests: Sequence[str] = facts.get("blocks", [facts["sha256"]])
        self.known: set[int] = set()
        self._check_tree()
        try:
            with path.open("rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def _check_tree(self) -> None:
        expected = -(-self.facts["size"] // self.block)
        if len(self.digests) != expected or (
            "blocks" in self.facts and files.tree(self.digests) != self.facts["sha256"]
        ):
            raise CheckpointError(f"the manifest of {self.path.parent} contradicts itself about {self.path.name}")

    def check(self, start: int, stop: int) -> None:
        """Raise ``CheckpointError`` unless bytes [start, stop) are those that were written."""
        for number in range(start // self.block, -(-stop // self.block)):
            if number in self.known:
                continue
            with memoryview(self.bytes) as view, view[number * self.block : (number + 1) * self.block] as block:
                found = hashlib.sha256(block).hexdigest()
            if found != self.digests[number]:
                raise CheckpointError(
                    f"{self.path} is damaged: SHA-256 {found[:12]}... of its bytes from {number * self.block}, its manifest "
                    f"says {self.digests[number][:12]}..."
                )
            self.known.add(number)

    def read(self, name: str, *, span: tuple[int, int]) -> Tensor:
        """Elements [start, stop) of a tensor, flat."""
        (first, shape), (start, stop) = self._offsets[name], span
        self.check(first + 4 * start, first + 4 * stop)
        tensor = self._reader.get_slice(name)
        return tensor[start:stop] if len(shape) == 1 else self._reader.get_tensor(name).flatten()[start:stop]

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, list[int]]]:
        """Name -> the first byte of a tensor in the file, and its shape."""
        self.check(0, 8)
        length = struct.unpack("<Q", self.bytes[:8])[0]
        self.check(8, min(8 + length, len(self.bytes)))
        header = json.loads(self.bytes[8 : 8 + length])
        return {
            name: (8 + length + facts["data_offsets"][0], facts["shape"])
            for name, facts in header.items()
            if name != "__metadata__"
        }

    @cached_property
    def _reader(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} is no safetensors file: {error}") from None


def read_parameters(
    stored: Stored, model: nn.Module, *, kind: str, name: str = ""
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What is trained of ``model`` with its values of one ``kind`` in a checkpoint, this rank's slice in its shape; ``name`` is
    that of a model beside the task's own.

    Raises ``CheckpointError`` naming the first difference if the checkpoint is of another model.
    """
    check_model(stored, model, name=name)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            cut = cut_of(model, key, own=tuple(parameter.shape))
            piece = cut.slice(*own_part(model))
            yield parameter, stored.read(kind, key, piece=piece, cut=cut, model=name).view(parameter.shape)


def own_part(model: nn.Module) -> tuple[int, int]:
    """Which slice of how many this rank has of every parameter that is sliced."""
    return (model.tp.rank, model.tp.size) if hasattr(model, "tp") else (0, 1)  # type: ignore[union-attr, return-value]


def check_model(stored: Stored, model: nn.Module, *, name: str = "") -> None:
    """Refuse a checkpoint of another model, naming the first differences of its shapes."""
    expected = {
        key: cut_of(model, key, own=tuple(p.shape)).shape for key, p in model.named_parameters() if p.requires_grad
    }
    check_shapes(expected, {key: cut.shape for key, cut in stored.cuts(name).items()}, source=str(stored.path))


SHOWN = 3
"""How many differences between two models are listed."""


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Refuse tensors that are not those of the model, naming the first that differ."""
    odd = [f"it lacks {name}" for name in expected if name not in found]
    odd += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    odd += [f"it has the unknown tensor {name}" for name in sorted(found.keys() - expected.keys())]
    if odd:
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        raise OtherRun(f"{source} is of another model: {'; '.join(odd[:SHOWN])}{more}")
