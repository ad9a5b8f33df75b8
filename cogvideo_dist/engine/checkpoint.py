"""A run's state on disk: global tensors by name, no layout, no pickle.

``ckpt/step-000020/`` holds one safetensors file per kind of state and ``manifest.json`` with the size and SHA-256 of each. A
checkpoint is written beside its name, hashed, synced and renamed: the folder's existence is the commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvideo_dist.parallel.split import full_shape

FullState = dict[str, dict[str, Tensor]]
"""Kind (``weights``, ``exp_avg``, ``exp_avg_sq``, ``ema``; ``critic.weights`` ... of the model named critic that learns beside
the task's own) -> parameter name -> the whole tensor in float32."""

FORMAT = 1
PREFIX, ASIDE, DYING = "step-", ".tmp-", ".del-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside tensors: ``step`` updates were made on ``samples`` clips; ``about`` tells of which run and
    model, ``lineage`` of the stages before it."""

    step: int
    seed: int
    about: Mapping[str, Any]
    scaler: Mapping[str, float]
    samples: int = 0
    lineage: Sequence[Mapping[str, Any]] = ()


def save(folder: Path, state: FullState, *, saved: Saved, keep: int) -> Path:
    """Write ``folder/step-N`` (one process alone) and delete all but the newest ``keep`` checkpoints."""
    final = folder / f"{PREFIX}{saved.step:06d}"
    aside = folder / f"{ASIDE}{final.name}"
    for leftover in [*folder.glob(f"{ASIDE}*"), *folder.glob(f"{DYING}*")]:
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    files = {}
    for kind, tensors in state.items():
        path = aside / f"{kind}.safetensors"
        save_file(tensors, path)
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_hash(path)}
    manifest = {
        "format": FORMAT, "step": saved.step, "seed": saved.seed, "about": dict(saved.about),
        "scaler": dict(saved.scaler), "samples": saved.samples, "lineage": list(saved.lineage),
        "torch": torch.__version__, "files": files,
    }  # fmt: skip
    path = aside / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(path)
    _sync(aside)
    if final.exists():  # a run that fell back to an older checkpoint comes by here again
        final.rename(folder / f"{DYING}{final.name}")
    aside.rename(final)
    _sync(folder)
    _prune(folder, keep)
    return final


def _prune(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[:-keep]:
        old.rename(folder / f"{DYING}{old.name}")
    for dying in folder.glob(f"{DYING}*"):
        shutil.rmtree(dying)


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first by their step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole, and what was wrong with the ones after it.

    Raises ``CheckpointError`` if there are checkpoints and none is whole: a run never starts over in silence.
    """
    problems = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return path, problems
    if problems:
        raise CheckpointError(f"no checkpoint of {folder} can be used: {'; '.join(problems)}")
    return None, []


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once every file has its size and hash."""
    manifest = read_manifest(path)
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != facts["size"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {facts['size']}")
        found = file_hash(file)
        if found != facts["sha256"]:
            raise CheckpointError(
                f"{file} is damaged: SHA-256 {found[:12]}..., its manifest says {facts['sha256'][:12]}..."
            )
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error or type(error).__name__}") from None
    if version != FORMAT:
        raise CheckpointError(f"{file} has format {version}; this version of cogvideo_dist reads format {FORMAT}")
    missing = [key for key in ("step", "seed", "about", "scaler", "files") if key not in manifest]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}")
    return manifest


def load(
    path: Path, model: nn.Module, *, name: str = "", kinds: Sequence[str] | None = None
) -> tuple[FullState, Saved]:
    """The state of a verified checkpoint for ``model``, by kind, or only some ``kinds`` of it; ``name`` is that of a model
    beside the task's own.

    A checkpoint of another model is refused by the first difference.
    """
    manifest = read_manifest(path)
    expected = {name: full_shape(model, name, p.shape) for name, p in model.named_parameters() if p.requires_grad}
    state: FullState = {}
    for file in manifest["files"]:
        owner, _, kind = file.removesuffix(".safetensors").rpartition(".")
        if owner == name and (kinds is None or kind in kinds):
            tensors = load_file(path / file)
            check_shapes(expected, {key: tuple(t.shape) for key, t in tensors.items()}, source=str(path / file))
            state[kind] = tensors
    # checkpoints made before lineages were kept lack both
    came = manifest.get("samples", 0), tuple(manifest.get("lineage", ()))
    return state, Saved(manifest["step"], manifest["seed"], manifest["about"], manifest["scaler"], *came)


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Refuse tensors that are not those of the model, naming the first that differs."""
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{source} is of another model: it lacks {name}")
        if found[name] != shape:
            raise CheckpointError(f"{source} is of another model: {name} has shape {found[name]}, expected {shape}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise CheckpointError(f"{source} is of another model: it has the unknown tensor {extra[0]}")


def check_about(expected: Mapping[str, Any], found: Mapping[str, Any], *, source: str) -> None:
    """Refuse a checkpoint whose tensors fit but whose run or model computed something else, naming the first difference."""
    for key, value in flat(json.loads(json.dumps(expected))).items():
        before = flat(found).get(key, value)
        if before != value:
            raise CheckpointError(
                f"{source} is of another run: it was made with {key}={before!r}, this run has {value!r}"
            )


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        found |= flat(value, inner) if isinstance(value, Mapping) else {inner: value}
    return found


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(file.read())
        )


def _hash(data: bytes) -> str:  # Python 3.10
    return hashlib.sha256(data).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
