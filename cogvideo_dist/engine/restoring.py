"""Which checkpoint a run goes on from: all ranks take the same, and where one of them cannot read it, all take an older one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogvideo_dist.engine import files
from cogvideo_dist.engine.checkpoint import Stored, checkpoints, step_of
from cogvideo_dist.engine.manifest import NAME, CheckpointError, OtherRun
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object, gather_objects

PATIENCE_S = 30.0
"""For a network's file system to show on every machine what one has written."""


def restore_newest(
    folder: Path,
    mesh: ParallelMesh,
    *,
    restore: Callable[[Stored], None],
    wanted: str | None = None,
    until: int | None = None,
) -> tuple[Stored | None, list[str]]:
    """The checkpoint that ``restore`` succeeded with on every rank, and what was wrong with newer ones; none if there is none.

    ``wanted`` (step-000020): that one and no other; newer ones are set aside, or a later start would go on from them.
    ``until``: none after that step, and nothing is set aside.

    Raises ``CheckpointError`` if there are checkpoints and none can be used, ``OtherRun`` at once if one is of another run.
    """
    names = broadcast_object(_names(folder, wanted, until) if mesh.is_first else None, mesh.world)
    problems: list[str] = []
    for name in names:
        stored, problem, other = _attempt(folder / name, mesh, restore)
        if not problem:
            if wanted and mesh.is_first:
                _set_aside(folder, than=name)
            return stored, problems
        if other:
            raise OtherRun(problem)
        problems.append(problem)
    if wanted:
        raise CheckpointError(problems[0] if problems else f"{folder} has no checkpoint {wanted}")
    if problems:
        raise CheckpointError(f"no checkpoint of {folder} can be used: {'; '.join(problems)}")
    return None, []


def _names(folder: Path, wanted: str | None, until: int | None) -> list[str]:
    """Newest first, by their step."""
    known = reversed(checkpoints(folder))
    found = [path.name for path in known if until is None or step_of(path) <= until]
    return [name for name in found if wanted in (None, name)]


def _attempt(path: Path, mesh: ParallelMesh, restore: Callable[[Stored], None]) -> tuple[Stored | None, str, bool]:
    """The checkpoint, or what the first rank that failed found wrong with it, and whether it is of another run."""
    digest = broadcast_object(_digest(path) if mesh.is_first else None, mesh.world)
    stored, problem, other = None, "", False
    try:
        stored = Stored.open(path) if mesh.is_first else _as_seen(path, digest)
    except CheckpointError as error:
        problem = str(error)
    problems = gather_objects(problem, mesh.world)
    if not any(problems) and stored:
        try:
            restore(stored)
        except CheckpointError as error:
            problem, other = str(error), isinstance(error, OtherRun)
        problems = gather_objects(problem, mesh.world)
    others: Sequence[Any] = gather_objects(other, mesh.world)
    return stored, next((text for text in problems if text), ""), any(others)


def _digest(path: Path) -> str:
    try:
        return files.file_hash(path / NAME)
    except OSError:
        return ""  # what is wrong is said when it is opened


def _as_seen(path: Path, digest: str) -> Stored:
    """The checkpoint that the first rank sees, once this machine sees it, too."""
    end = time.monotonic() + (PATIENCE_S if digest else 0.0)
    while True:
        try:
            stored = Stored.open(path)
            if _digest(path) == digest:
                return stored
            problem = CheckpointError(f"{path / NAME} is another file here than on the first rank")
        except CheckpointError as error:
            problem = error
        if time.monotonic() >= end or _digest(path) == digest:
            raise problem
        time.sleep(0.5)


def _set_aside(folder: Path, *, than: str) -> None:
    """Rename checkpoints that are newer than the one that the run goes on from: they stay, and are no checkpoints any more."""
    for path in checkpoints(folder):
        if step_of(path) > step_of(folder / than):
            number = sum(1 for _ in folder.glob(f"set-aside-*{path.name}"))
            files.rename(path, folder / f"set-aside-{number}-{path.name}")
    files.sync(folder)
