"""A folder of checkpoints of SAT or of DeepSpeed -> the tensors that each model-parallel rank has in it.

``latest`` names a folder with ``mp_rank_00_model_states.pt`` and so on, one file a rank. Where DeepSpeed also saved its
optimizer (SAT does not), ``*_optim_states.pt`` hold the trained parameters in float32, divided over the data-parallel ranks;
these masters are then taken. Stage 3 divides the models' files alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.convert.pickles import Odd, Stored, TorchFile, open_file, read_tensors, weights_of

LATEST = "latest"
TAG = re.compile(r"[A-Za-z0-9._-]+")
MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
PARTS = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt")

WRAPPER, STATE = "module", "optimizer_state_dict"

Shape = tuple[int, ...]
Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class RankTensors:
    """Of one model-parallel rank: the file that is named in errors, shape and dtype of every tensor by name, and how to read
    some of them. What is read comes into memory when it is asked for."""

    source: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[Collection[str]], Get]


class Checkpoint(NamedTuple):
    """The ranks of a folder in order, and what is to be said of it."""

    folder: Path
    ranks: list[RankTensors]
    notes: list[str]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of SAT or DeepSpeed: it has ranks' files, or ``latest`` beside folders with such."""
    files = [*path.glob("*.pt"), *(path.glob("*/*.pt") if (path / LATEST).is_file() else ())]
    return any(_is_states(file.name) for file in files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Of a folder with ``latest``, of an iteration's folder in it, or of one rank's file.

    Raises ``ValueError`` naming the file that is missing, damaged, hostile or of another layout.
    """
    path = Path(path)
    if path.is_file():
        return Checkpoint(path.parent, [_plain(open_file(path))], [])
    folder = iteration_folder(path)
    names = sorted(file.name for file in folder.iterdir() if _is_states(file.name))
    plain = {int(found[1]): name for name in names if (found := MODEL.fullmatch(name))}
    parts: dict[tuple[str, int, int], str] = {}
    for name in names:
        if found := PARTS.fullmatch(name):
            parts[found[3], int(found[2]), int(found[1])] = name
    numbers = {*plain, *(rank for _, rank, _ in parts)}
    ranks: list[RankTensors] = []
    notes: list[str] = []
    for rank in range(max(numbers) + 1):
        optim, model = _of(parts, "optim", rank), _of(parts, "model", rank)
        if rank not in plain and not model:
            raise ValueError(f"{folder} lacks mp_rank_{rank:02d}_model_states.pt, one rank of {max(numbers) + 1}")
        if optim:
            files = [folder / plain[rank]] if rank in plain else _complete(folder, model)
            ranks.append(_with_masters([open_file(file) for file in files], _complete(folder, optim)))
        elif rank in plain:
            file = open_file(folder / plain[rank])
            ranks.append(_plain(file))
            if "param_shapes" in file.content and not notes:  # then it is DeepSpeed that has written it, in training
                notes.append(
                    f"{folder} has no float32 masters (*_optim_states.pt): its weights are those of the forward"
                )
        else:
            raise ValueError(
                f"{folder}: DeepSpeed's stage 3 keeps no weights in {model[0]}; the *_optim_states.pt with them are missing"
            )
    return Checkpoint(folder, ranks, notes)


def iteration_folder(path: Path) -> Path:
    """The folder that ``latest`` names; ``path`` itself if it has ranks' files."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; expected a folder of checkpoints of SAT")
    latest = path / LATEST
    if latest.is_file():
        tag = latest.read_bytes()[:200].decode(errors="replace").strip()
        if not TAG.fullmatch(tag) or not tag.strip("."):
            raise ValueError(
                f"{latest}: holds {tag!r}, which names no folder beside it; write the iteration, such as 1000"
            )
        path = path / tag
        if not path.is_dir():
            raise ValueError(f"{latest} names {tag}, but there is no {path}; write the iteration that is there")
    if not any(_is_states(file.name) for file in path.iterdir()):
        raise ValueError(f"{path}: holds neither {LATEST} nor a mp_rank_00_model_states.pt, as folders of SAT do")
    return path


def _is_states(name: str) -> bool:
    return bool(MODEL.fullmatch(name) or PARTS.fullmatch(name))


def _of(parts: Mapping[tuple[str, int, int], str], kind: str, rank: int) -> dict[int, str]:
    """The files of one kind and model-parallel rank by data-parallel rank."""
    return {number: name for (each, mp, number), name in sorted(parts.items()) if (each, mp) == (kind, rank)}


def _complete(folder: Path, files: Mapping[int, str]) -> list[Path]:
    """In order; an error if one is missing between them."""
    for number in range(max(files) + 1):
        if number not in files:
            example = re.sub(r"pp_rank_\d+", f"pp_rank_{number}", next(iter(files.values())))
            raise ValueError(f"{folder} lacks {example}, one of {max(files) + 1} or more")
    return [folder / files[number] for number in sorted(files)]


def _plain(file: TorchFile) -> RankTensors:
    """A file that holds all of its rank's tensors."""
    found = module_of(file)
    tensors = {name: value for name, value in found.items() if isinstance(value, Stored)}

    def read(names: Collection[str]) -> Get:
        wanted = {name: found[name] for name in names}
        return read_tensors(file, weights_of(wanted, file.path)).__getitem__

    return RankTensors(file.path, *_about(tensors), read)


def module_of(file: TorchFile) -> dict[str, Any]:
    """What a rank's file has under ``module``, by name."""
    found = file.content.get(WRAPPER) if isinstance(file.content, dict) else None
    if not isinstance(found, dict):
        raise ValueError(
            f'{file.path}: holds no dictionary "{WRAPPER}", in which SAT and DeepSpeed have a model\'s tensors'
        )
    for name in found:
        if not (isinstance(name, str) and name.isprintable()):
            raise ValueError(f"{file.path}: holds something under {name!r}, which is no name; expected tensors by name")
    return found


def _about(tensors: Mapping[str, Stored]) -> tuple[dict[str, Shape], dict[str, torch.dtype]]:
    return (
        {name: stored.shape for name, stored in tensors.items()},
        {name: getattr(torch, stored.dtype) for name, stored in tensors.items()},
    )


class _Masters(NamedTuple):
    """The float32 parameters of one model-parallel rank: the flat groups in every data-parallel rank's file, in order, and of
    every parameter its shape and where it begins. ``stage3``: every file has a piece of every parameter; below, a group's
    pieces in all files are one flat tensor."""

    files: list[TorchFile]
    groups: list[list[Stored]]
    shapes: dict[str, Shape]
    starts: dict[str, tuple[int, int]]
    stage3: bool

    def read(self, names: Collection[str]) -> Get:
        flats = [
            read_tensors(file, {str(number): group for number, group in enumerate(groups)} if names else {})
            for file, groups in zip(self.files, self.groups)
        ]

        def get(name: str) -> Tensor:
            group, start = self.starts[name]
            shape = self.shapes[name]
            if self.stage3:
                size = -(-prod(shape) // len(self.files))
                pieces = [piece for flat in flats for piece in _between(list(flat.values()), start, start + size)]
            else:
                pieces = _between([flat[str(group)] for flat in flats], start, start + prod(shape))
            return torch.cat(pieces)[: prod(shape)].view(shape)

        return get


def _between(flats: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """The elements [start, stop) of flat tensors that follow one another."""
    pieces = []
    for flat in flats:
        if start < len(flat) and stop > 0:
            pieces.append(flat[max(start, 0) : stop])
        start, stop = start - len(flat), stop - len(flat)
    return pieces


def _with_masters(models: list[TorchFile], paths: list[Path]) -> RankTensors:
    """A rank whose trained parameters are taken from DeepSpeed's optimizer, and all others from the model's files."""
    masters = _masters(models[0], [open_file(path) for path in paths])
    if masters.stage3 and len(models) < len(paths):
        missing = re.sub(r"pp_rank_\d+", f"pp_rank_{len(models)}", models[0].path.name)
        raise ValueError(f"{models[0].path.parent} lacks {missing}, one of {len(paths)}")
    frozen = _frozen(models) if masters.stage3 else {}
    held: dict[str, Any] = module_of(models[0])
    if masters.stage3:
        buffers = models[0].content.get("buffer_names")
        held = {name: held[name] for name in buffers or () if name in held}
    rest = {name: value for name, value in held.items() if isinstance(value, Stored) and name not in masters.shapes}
    shapes, dtypes = _about(rest)
    shapes |= masters.shapes | {name: shape for name, (shape, _) in frozen.items()}
    dtypes |= dict.fromkeys(masters.shapes, torch.float32)
    dtypes |= {name: getattr(torch, pieces[0].dtype) for name, (_, pieces) in frozen.items()}

    def read(names: Collection[str]) -> Get:
        plain = read_tensors(
            models[0], weights_of({name: rest[name] for name in names if name in rest}, models[0].path)
        )
        master = masters.read([name for name in names if name in masters.shapes])
        pieces = [
            read_tensors(file, {name: frozen[name][1][number] for name in names if name in frozen})
            for number, file in enumerate(models)
        ]

        def get(name: str) -> Tensor:
            if name in plain:
                return plain[name]
            if name in masters.shapes:
                return master(name)
            shape = frozen[name][0]
            return torch.cat([piece[name].reshape(-1) for piece in pieces])[: prod(shape)].view(shape)

        return get

    return RankTensors(models[0].path, shapes, dtypes, read)


def _masters(model: TorchFile, files: list[TorchFile]) -> _Masters:
    states = [_state(file) for file in files]
    stage, world = _number(states[0].get("zero_stage")), states[0].get("partition_count")
    world = max(world) if isinstance(world, list) and world else world
    if stage not in (0, 1, 2, 3) or not isinstance(world, int):
        raise ValueError(
            f"{files[0].path}: says neither its ZeRO stage nor the number of its parts; expected 1, 2 or 3"
        )
    if world != len(files):
        missing = re.sub(r"pp_rank_\d+", f"pp_rank_{len(files)}", files[0].path.name)
        raise ValueError(f"{files[0].path.parent} lacks {missing}: its weights are divided over {world} files")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = [_flat(state.get(key), file.path, key) for state, file in zip(states, files)]
    if len({len(each) for each in groups}) > 1:
        raise ValueError(
            f"{files[0].path.parent}: the *_optim_states.pt have different numbers of groups; they are of several runs"
        )
    shapes = _param_shapes(model, stage=stage, groups=len(groups[0]))
    build = _stage3_starts if stage == 3 else _flat_starts
    starts = build(shapes, groups, states[0].get("param_alignment_paddings"), files[0].path)
    return _Masters(files, groups, {n: s for group in shapes for n, s in group.items()}, starts, stage == 3)


def _state(file: TorchFile) -> dict[str, Any]:
    found = file.content.get(STATE) if isinstance(file.content, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f'{file.path}: holds no dictionary "{STATE}", as files of DeepSpeed\'s optimizer do')
    return found


def _number(value: Any) -> Any:
    """Of a stage, which is a number or an enumeration's member."""
    return value.arguments[0] if isinstance(value, Odd) and value.arguments else value


def _flat(value: Any, path: Path, key: str) -> list[Stored]:
    """The flat groups of one file."""
    if not isinstance(value, list) or not all(isinstance(e, Stored) and len(e.shape) == 1 for e in value):
        raise ValueError(f"{path}: {STATE}.{key} is no list of flat tensors")
    return list(weights_of({f"{STATE}.{key}.{n}": each for n, each in enumerate(value)}, path).values())


def _param_shapes(model: TorchFile, *, stage: int, groups: int) -> list[dict[str, Shape]]:
    """Of the trained parameters, by group, in the order in which they lie in the flat tensors."""
    found = model.content.get("param_shapes")
    good = isinstance(found, list) and all(
        isinstance(group, dict) and all(map(_is_shape, group.values())) for group in found
    )
    if not good or (stage < 3 and len(found) != groups):
        raise ValueError(f"{model.path}: param_shapes does not say which parameters the *_optim_states.pt hold")
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in found]


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)


def _flat_starts(
    shapes: list[dict[str, Shape]], groups: list[list[Stored]], paddings: Any, path: Path
) -> dict[str, tuple[int, int]]:
    """(group, first element) of every parameter in the groups, each of which is one flat tensor over all files."""
    starts, align = {}, 2 * len(groups)
    if paddings is not None and not (
        isinstance(paddings, list)
        and len(paddings) == len(shapes)
        and all(_is_shape(gaps) and len(gaps) == len(group) for gaps, group in zip(paddings, shapes))
    ):
        raise ValueError(f"{path}: param_alignment_paddings does not say what lies between which parameters")
    for number, group in enumerate(shapes):
        at = 0
        gaps = paddings[number] if paddings is not None else [0] * len(group)
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            starts[name] = number, at
            at += prod(shape) + gap
        have = sum(file[number].shape[0] for file in groups)
        if not at <= have < at + align + sum(gaps) + 1:
            raise ValueError(f"{path}: group {number} has {have} elements in all files, but its parameters have {at}")
    return starts


def _stage3_starts(
    shapes: list[dict[str, Shape]], groups: list[list[Stored]], paddings: Any, path: Path
) -> dict[str, tuple[int, int]]:
    """(0, first element) of every parameter's piece in each file, whose groups follow one another."""
    starts, at = {}, 0
    for group in shapes:
        for name, shape in group.items():
            starts[name] = 0, at
            at += -(-prod(shape) // len(groups))
    for file in groups:
        have = sum(each.shape[0] for each in file)
        if have != at:
            raise ValueError(f"{path}: a file has {have} elements, but its pieces of the parameters have {at}")
    return starts


def _frozen(models: list[TorchFile]) -> dict[str, tuple[Shape, list[Stored]]]:
    """Parameters that are not trained and that stage 3 divides over the models' files."""
    shapes = models[0].content.get("frozen_param_shapes") or {}
    found = {}
    for name, shape in shapes.items():
        pieces = [(file.content.get("frozen_param_fragments") or {}).get(name) for file in models]
        whole = all(isinstance(piece, Stored) for piece in pieces) and _is_shape(shape)
        if not whole or sum(prod(piece.shape) for piece in pieces if piece) < prod(shape):
            raise ValueError(f"{models[0].path}: frozen_param_fragments lacks {name} in one of the {len(models)} files")
        found[name] = tuple(shape), list(weights_of(dict(enumerate(pieces)), models[0].path).values())  # type: ignore[arg-type]
    return found
