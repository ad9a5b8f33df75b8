"""What a checkpoint says of itself: ``manifest.json``.

    format, step, seed, samples, bad, scaler       the run's place; ``samples`` clips were seen, ``bad`` of them replaced
    meter                                          name -> [sum, weight] of what is not reported yet
    numbers                                        updates made, by model, and what else watching the numbers remembers
    about, lineage                                 of which model and run, and the stages before it
    facts                                          configuration and its digest, versions, layout, data, held-out losses
    tensors   model -> name -> [shape, split]      whole shapes; split: [dimension, stacked parts] or null
    writers   [{slice: [i, n], pieces: model -> [[tensor, start, stop], ...]}, ...]
    files     name -> model, kind, writer, size, sha256, blocks
    sha256                                         of all the rest

``model`` is empty for the task's own; ``tensor`` counts the model's tensors. A writer has slice i of n of every tensor that is
split, and of it (or of the whole tensor) elements start to stop. All values are float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from typing_extensions import NotRequired, TypedDict

FORMAT = 2
NAME = "manifest.json"


class FileFacts(TypedDict):
    """What is said of a file. ``blocks``: one digest for each block of it; without, ``sha256`` is that of its bytes."""

    model: str
    kind: str
    writer: NonNegativeInt
    size: NonNegativeInt
    sha256: str
    blocks: NotRequired[list[str]]


class Writer(TypedDict):
    """Who wrote which pieces."""

    slice: tuple[NonNegativeInt, NonNegativeInt]
    pieces: dict[str, list[tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]]]


class Manifest(TypedDict):
    """See above."""

    step: NonNegativeInt
    seed: int
    samples: NonNegativeInt
    bad: NonNegativeInt
    about: dict[str, Any]
    scaler: dict[str, float]
    lineage: list[dict[str, Any]]
    meter: dict[str, tuple[float, float]]
    numbers: NotRequired[dict[str, Any]]
    facts: dict[str, Any]
    tensors: dict[str, dict[str, tuple[list[NonNegativeInt], tuple[NonNegativeInt, NonNegativeInt] | None]]]
    writers: list[Writer]
    files: dict[str, FileFacts]


_MANIFEST = TypeAdapter(Manifest)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


class SaveError(ValueError):
    """Checkpoints cannot be written; the last one that was committed stands."""


class OtherRun(CheckpointError):
    """A checkpoint that is whole, but of another model or run: an older one would not do either."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside tensors: ``step`` updates were made on ``samples`` clips, of which ``bad`` took the place
    of others; ``about`` tells of which run and model, ``lineage`` of the stages before it, ``meter`` is what was
    measured since the last report, ``numbers`` what is remembered of steps that went wrong, ``facts`` what else is worth
    knowing."""

    step: int
    seed: int
    about: Mapping[str, Any]
    scaler: Mapping[str, float]
    samples: int = 0
    bad: int = 0
    lineage: Sequence[Mapping[str, Any]] = ()
    meter: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"lineage": list(self.lineage)}


def saved_of(manifest: Manifest) -> Saved:
    plain: dict[str, Any] = {"numbers": {}, **manifest, "lineage": tuple(manifest["lineage"])}
    return Saved(**{each.name: plain[each.name] for each in fields(Saved)})


def manifest_text(content: Mapping[str, Any]) -> str:
    """The file, with its own digest."""
    whole = {"format": FORMAT, **content}
    return json.dumps(whole | {"sha256": _digest(whole)}, separators=(",", ":"))


def read_manifest(path: Path) -> Manifest:
    """That of a checkpoint, of any format that we know, as of the newest.

    Raises ``CheckpointError`` where it is damaged, lacks something, or is of a format that this version does not know.
    """
    file = path / NAME
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error or type(error).__name__}") from None
    if version == 1:
        return migrated(path, manifest)
    if version != FORMAT:
        raise CheckpointError(
            f"{file} has format {version}; this version of cogvideo_dist reads formats 1 and {FORMAT}: "
            f"{'take a newer one' if isinstance(version, int) and version > FORMAT else 'it is none of ours'}"
        )
    said = manifest.pop("sha256", None)
    if _digest(manifest) != said:
        raise CheckpointError(f"{file} is damaged: it does not have the SHA-256 that it says")
    del manifest["format"]
    return _checked(file, manifest)


def _checked(file: Path, manifest: Any) -> Manifest:
    try:
        found: Manifest = _MANIFEST.validate_python(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for name, facts in found["files"].items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{file} names a file outside its folder: {name!r}")
        if facts["writer"] >= len(found["writers"]):
            raise CheckpointError(f"{file}: files.{name}.writer: there is no writer {facts['writer']}")
    for number, writer in enumerate(found["writers"]):
        for model, pieces in writer["pieces"].items():
            counts = [math.prod(shape) for shape, _ in found["tensors"].get(model, {}).values()]
            if any(tensor >= len(counts) or not start <= stop <= counts[tensor] for tensor, start, stop in pieces):
                raise CheckpointError(f"{file}: writers.{number}.pieces.{model}: a piece lies outside its tensor")
    return found


def migrated(path: Path, old: dict[str, Any]) -> Manifest:
    """A manifest of format 1, whose files hold whole tensors of one writer, as one of the present format."""
    missing = [key for key in ("step", "seed", "about", "scaler", "files") if key not in old]
    if missing:
        raise CheckpointError(f"{path / NAME} lacks {', '.join(missing)}")
    tensors: dict[str, dict[str, Any]] = {}
    found = {}
    for name, facts in old["files"].items():
        model, _, kind = name.removesuffix(".safetensors").rpartition(".")
        found[name] = {**facts, "model": model, "kind": kind, "writer": 0}
        if model not in tensors:
            tensors[model] = {key: [shape, None] for key, shape in _shapes(path / name).items()}
    pieces = {
        model: [[number, 0, math.prod(shape)] for number, (shape, _) in enumerate(shapes.values())]
        for model, shapes in tensors.items()
    }
    kept = {key: old[key] for key in ("step", "seed", "about", "scaler")}
    # those that were made before lineages were kept lack both
    later = {"samples": old.get("samples", 0), "lineage": old.get("lineage", []), "bad": 0, "facts": {}, "meter": {}}
    writers = [{"slice": [0, 1], "pieces": pieces}]
    return _checked(path / NAME, {**kept, **later, "tensors": tensors, "writers": writers, "files": found})


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: no safetensors file ({error})") from None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_about(expected: Mapping[str, Any], found: Mapping[str, Any], *, source: str) -> None:
    """Refuse a checkpoint whose tensors fit but whose run or model computed something else, naming the first difference."""
    for key, value in flat(json.loads(json.dumps(expected))).items():
        before = flat(found).get(key, value)
        if before != value:
            raise OtherRun(f"{source} is of another run: it was made with {key}={before!r}, this run has {value!r}")


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        found |= flat(value, inner) if isinstance(value, Mapping) else {inner: value}
    return found
