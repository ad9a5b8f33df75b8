"""Which runs a run comes from: of every earlier stage its folder, its steps, the clips it has seen and the weights taken."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cogvideo_dist.engine.manifest import CheckpointError

FILE = "lineage.json"


@dataclass(frozen=True)
class Ancestor:
    """A stage that another was started from: ``step`` updates on ``samples`` clips of its own; ``weights``: which of its
    weights were taken, and the SHA-256 of the file that holds them."""

    run: str
    step: int
    samples: int
    weights: str
    sha256: str


@dataclass(frozen=True)
class Lineage:
    """All stages before a run, the first one first."""

    ancestors: tuple[Ancestor, ...] = ()

    @property
    def steps(self) -> int:
        """Updates before the run's own."""
        return sum(ancestor.step for ancestor in self.ancestors)

    @property
    def samples(self) -> int:
        """Clips seen before the run's own."""
        return sum(ancestor.samples for ancestor in self.ancestors)

    def plain(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(ancestor) for ancestor in self.ancestors]

    @classmethod
    def of(cls, plain: Iterable[Mapping[str, Any]], *, source: str) -> Lineage:
        """Of what ``plain`` gave; ``source`` is the file that held it."""
        types = {field.name: int if field.type == "int" else str for field in fields(Ancestor)}
        found = []
        for entry in plain:
            if not isinstance(entry, Mapping) or entry.keys() != types.keys():
                raise CheckpointError(f"{source}: an earlier stage has {entry!r} instead of {', '.join(types)}")
            if any(type(entry[name]) is not kind for name, kind in types.items()):
                raise CheckpointError(f"{source}: an earlier stage has values of other types: {entry!r}")
            found.append(Ancestor(**entry))
        return cls(tuple(found))


def read_lineage(folder: Path) -> Lineage | None:
    """Of a run's folder; none where it has not begun, or began before lineages were kept."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(plain, list):
        raise CheckpointError(f"{path}: expected a list of earlier stages")
    return Lineage.of(plain, source=str(path))
