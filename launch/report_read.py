"""What a run's folder tells, for a report. Nothing in it is trusted: what cannot be read is said and left out."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideo_dist.config.load import ConfigError, read_merged
from cogvideo_dist.data.shards import shown
from cogvideo_dist.engine.checkpoint import checkpoints
from cogvideo_dist.engine.lineage import Lineage, read_lineage
from cogvideo_dist.engine.manifest import CheckpointError, flat, read_manifest
from launch.report_curves import LARGEST, Curve, number

MOST_STEP = 1 << 53
MOST_NAMES, LONGEST_NAME, MOST_REASONS = 400, 200, 200
"""Figures of a run, characters of a figure's name, and kinds of defects that are told apart."""


@dataclass(frozen=True)
class Save:
    """A line of ``ckpt/ledger.jsonl``. ``stall``: seconds that the training stood still, of runs that note it."""

    step: int
    time: float
    bytes: float
    seconds: float
    stall: float | None
    kept: bool


@dataclass(frozen=True)
class Begun:
    """A line of ``starts.jsonl``."""

    step: int
    time: float
    lost: int
    host: str


@dataclass
class Reason:
    """A kind of defect: how many samples have it, how many of them others replaced, and the first as (key, source, reason)."""

    example: tuple[str, str, str]
    count: int = 0
    replaced: int = 0


@dataclass(frozen=True)
class Film:
    """An mp4 of ``samples/``."""

    step: int
    name: str
    caption: str
    path: Path


@dataclass
class RunFacts:
    """All of a run. ``problems``: what could not be read, in words."""

    label: str
    folder: Path
    config: Mapping[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    last_step: int = -1
    saves: list[Save] = field(default_factory=list)
    starts: list[Begun] = field(default_factory=list)
    reasons: dict[str, Reason] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    data: list[Mapping[str, str]] = field(default_factory=list)
    made_with: Mapping[str, str] = field(default_factory=dict)
    films: list[Film] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        """How many the run is to make."""
        steps = flat(self.config).get("train.steps")
        return steps if type(steps) is int else None


def read_run(folder: Path, *, label: str) -> RunFacts:
    """Raises ``ConfigError`` where ``folder`` is no run, or one that has logged nothing."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    found = RunFacts(label, folder, read_merged([folder / "config.yaml"])[0])
    _read_log(found)
    if found.last_step < 0:
        raise ConfigError(f"{folder} has logged nothing yet: log.jsonl is missing or has no line of figures")
    _read_saves(found)
    _read_starts(found)
    _read_defects(found)
    _read_origin(found)
    _read_films(found)
    return found


def _lines(found: RunFacts, path: Path) -> Iterator[dict[str, Any]]:
    """Its mappings. A last line that is torn is that of a run that is writing; other lines that are none are counted."""
    if not path.exists():
        return
    wrong: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for count, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                yield entry
            elif line.endswith("\n"):
                wrong.append(count)
    if wrong:
        found.problems.append(
            f"{path}: lines that cannot be read and are left out: {len(wrong)}, the first is {wrong[0]}"
        )


def _step_of(entry: Mapping[str, Any]) -> int | None:
    step = entry.get("step")
    return step if type(step) is int and 0 <= step < MOST_STEP else None


def _read_log(found: RunFacts) -> None:
    path, stray, more = found.folder / "log.jsonl", 0, set()
    for entry in _lines(found, path):
        step = _step_of(entry)
        if step is None:
            stray += 1
            continue
        for name, value in entry.items():
            figure = value if type(value) is float else number(value)  # most are, and there are millions
            if figure is None or name == "step":
                continue
            curve = found.curves.get(name)
            if curve is None:
                if len(found.curves) == MOST_NAMES or len(name) > LONGEST_NAME:
                    more.add(name)
                    continue
                curve = found.curves[name] = Curve()
            curve.add(step, figure)
    if stray:
        found.problems.append(f"{path}: lines without a step, which are left out: {stray}")
    if more:
        found.problems.append(
            f"{path}: figures beyond the first {MOST_NAMES}, or with too long a name, which are left out: {len(more)}"
        )
    odd = {name: curve.odd for name, curve in found.curves.items() if curve.odd}
    found.last_step = max((curve.last[0] for curve in found.curves.values()), default=-1)
    if odd:
        named = ", ".join(f"{name} {count}" for name, count in odd.items())
        found.problems.append(f"{path}: values that are not finite, or above {LARGEST:.0e}, and are not drawn: {named}")


def _read_saves(found: RunFacts) -> None:
    kept = {path.name for path in checkpoints(found.folder / "ckpt")}
    for entry in _lines(found, found.folder / "ckpt" / "ledger.jsonl"):
        step = _step_of(entry)
        figures = [number(entry.get(name)) for name in ("time", "bytes", "seconds")]
        if step is None or None in figures:
            continue
        when, size, seconds = (math.nan if figure is None else figure for figure in figures)
        found.saves.append(Save(step, when, size, seconds, number(entry.get("stall")), entry.get("name") in kept))


def _read_starts(found: RunFacts) -> None:
    for entry in _lines(found, found.folder / "starts.jsonl"):
        step, when, lost = _step_of(entry), number(entry.get("time")), number(entry.get("lost"))
        if step is not None and when is not None and lost is not None and math.isfinite(lost):
            found.starts.append(Begun(step, when, int(lost), _words(entry.get("host"))))


def _read_defects(found: RunFacts) -> None:
    for entry in _lines(found, found.folder / "data_report.jsonl"):
        key, source, reason, code = (_words(entry.get(name)) for name in ("key", "source", "reason", "code"))
        # one kind of defect has many numbers: "caption of 80 tokens is cut to 64"
        kind = code or re.sub(r"\d+([.,]\d+)*", "n", reason.split(":")[0])
        if kind not in found.reasons and len(found.reasons) >= MOST_REASONS:
            kind = "others"
        known = found.reasons.setdefault(kind, Reason((key, source, reason)))
        known.count += 1
        known.replaced += entry.get("replaced_by") is not None


def _words(value: Any) -> str:
    """A word or a number; what is nested is neither."""
    return str(value) if isinstance(value, (str, int, float)) else ""


def _read_origin(found: RunFacts) -> None:
    """Lineage, data, and what the newest checkpoint says of versions and layout."""
    try:
        found.lineage = read_lineage(found.folder) or Lineage()
    except CheckpointError as error:
        found.problems.append(str(error))
    data = _json(found, found.folder / "data.json")
    sources = [source for source in data if isinstance(source, dict)] if isinstance(data, list) else []
    found.data = [{name: _words(value) for name, value in source.items()} for source in sources]
    for path in reversed(checkpoints(found.folder / "ckpt")):
        try:
            facts = read_manifest(path)["facts"]
        except CheckpointError as error:
            found.problems.append(str(error))
            continue
        parts = [facts.get(name) for name in ("versions", "layout")]
        found.made_with = {key: _words(v) for part in parts if isinstance(part, dict) for key, v in part.items()}
        return


def _json(found: RunFacts, path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found.problems.append(f"{path} cannot be read: {error}")
        return None


def _read_films(found: RunFacts) -> None:
    for folder in sorted((found.folder / "samples").glob("step-*")):
        digits = folder.name.removeprefix("step-")
        films = sorted(path for path in folder.glob("*.mp4") if path.is_file())
        if not (digits.isascii() and digits.isdigit() and len(digits) < 16 and films):
            continue
        captions = _json(found, folder / "captions.json")
        said = captions if isinstance(captions, dict) else {}
        found.films += [
            Film(int(digits), path.stem, _words(said.get(path.stem)), path) for path in films
        ]  # fmt: skip


def labels(folders: Sequence[str]) -> list[str]:
    """Short names that tell runs apart: of a folder its last part, where that is nobody else's."""
    names = [Path(folder).resolve().name for folder in folders]
    often = Counter(names)
    return [shown(name if often[name] == 1 else folder) for name, folder in zip(names, folders)]
