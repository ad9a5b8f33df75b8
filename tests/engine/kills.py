"""Runs whose ranks are killed (signal 9) as they enter or leave a function or are half through it, or at any instant.

A rank that dies takes all others with it, as a launcher sees to; then the same run is started again, and killed again, until
it is left alone. What every start computed is held against a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from cogvideo_dist.engine import files
from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.engine.optim import AdamWithEma
from cogvideo_dist.engine.player import Player
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.parallel.mesh import ParallelMesh, Place
from tests.engine.controls import BROKEN
from tests.engine.toys import EVERY, Case, Noisy, Watched, committed, digest_of, readable, trainer, witness
from tests.ranks import _context, _rank, free_port

LIFE_S = 120.0


@dataclass(frozen=True)
class Phase:
    """Where a rank dies: as it enters or leaves a function, or half through it. ``what``: part of a path that it is called
    with; ``first``: only the first rank comes by; ``times``: a start that goes on long enough does so at least as often."""

    owner: Any
    name: str
    when: Literal["enter", "leave", "half"]
    what: str = ""
    first: bool = False
    times: int = 2


PHASES = {
    "forward begun": Phase(Noisy, "loss", "enter", times=12),
    "forward done": Phase(Noisy, "loss", "leave", times=12),
    "backward begun": Phase(Engine, "backward", "enter", times=12),
    "backward done": Phase(Engine, "backward", "leave", times=12),
    "update begun": Phase(AdamWithEma, "step", "enter", times=4),
    "update done": Phase(AdamWithEma, "step", "leave", times=4),
    "report begun": Phase(Watched, "_report", "enter", times=4),
    "report done": Phase(Watched, "_report", "leave", times=4),
    "log written": Phase(RunLog, "scalars", "leave", first=True, times=4),
    "save begun": Phase(Saver, "save", "enter"),
    "folder made": Phase(files, "make_folder", "leave", first=True),
    "room agreed on": Phase(Saver, "_begin", "leave"),
    "copy begun": Phase(Engine, "copy", "enter", times=8),
    "copy done": Phase(Saver, "_snapshot", "leave"),
    "shard begun": Phase(files, "write_tensors", "enter", times=8),
    "shard half written": Phase(files, "write_tensors", "half", times=8),
    "shard not synced": Phase(os, "fsync", "enter", times=8),
    "shard done": Phase(files, "write_tensors", "leave", times=8),
    "before the gather": Phase(Saver, "_next", "enter", times=4),
    "after the gather": Phase(Saver, "_next", "leave", times=4),
    "manifest begun": Phase(files, "write_text", "enter", "manifest.json", first=True),
    "manifest half written": Phase(files, "write_text", "half", "manifest.json", first=True),
    "manifest done": Phase(files, "write_text", "leave", "manifest.json", first=True),
    "before the rename": Phase(files, "rename", "enter", ".tmp-step", first=True),
    "after the rename": Phase(files, "rename", "leave", ".tmp-step", first=True),
    "names synced": Phase(files, "sync", "leave", first=True, times=6),
    "latest begun": Phase(files, "replace_text", "enter", "latest", first=True),
    "latest half written": Phase(files, "write_text", "half", "latest", first=True),
    "latest done": Phase(files, "replace_text", "leave", "latest", first=True),
    "ledger begun": Phase(files, "append_line", "enter", first=True),
    "ledger done": Phase(files, "append_line", "leave", first=True),
    "prune: before the rename": Phase(files, "rename", "enter", ".del-step", first=True),
    "prune: after the rename": Phase(files, "rename", "leave", ".del-step", first=True),
    "prune: half deleted": Phase(files, "remove_folder", "half", ".del-step", first=True),
    "prune: done": Phase(files, "remove_folder", "leave", ".del-step", first=True),
    "restore begun": Phase(Player, "restore", "enter", times=1),
    "restore in the middle": Phase(Stored, "read", "leave", times=9),
    "restore done": Phase(Player, "restore", "leave", times=1),
}
ANYWHERE = "any instant"


@dataclass(frozen=True)
class Kill:
    """Rank ``rank`` dies in the ``nth`` (from 0) call of a phase, with ``everyone`` all ranks at once; the others live on for
    ``linger`` seconds, in which they may notice. At any instant: after ``after`` seconds."""

    phase: str
    rank: int
    nth: int = 0
    everyone: bool = False
    linger: float = 0.0
    after: float = 0.0


def draw_kill(phase: str, ranks: int, dice: random.Random) -> Kill:
    found = PHASES.get(phase)
    rank = 0 if found and found.first else dice.randrange(ranks)
    nth = dice.randrange(found.times) if found else 0
    linger = dice.choice((0.0, 0.0, 0.1))
    return Kill(phase, rank, nth, dice.random() < 0.25, linger, dice.uniform(0.05, 1.0))


def arm(kill: Kill, die: Callable[[], None]) -> None:
    """Let this process, which is the victim's own, call ``die`` at the place."""
    phase, calls = PHASES[kill.phase], count()
    original = getattr(phase.owner, phase.name)

    def call(*args: Any, **options: Any) -> Any:
        hit = any(phase.what in str(arg) for arg in args) if phase.what else True
        if not hit or next(calls) != kill.nth:
            return original(*args, **options)
        if phase.when == "enter":
            die()
        if phase.when == "half":
            _halve(die)
        result = original(*args, **options)
        die()
        return result

    setattr(phase.owner, phase.name, call)


def _halve(die: Callable[[], None]) -> None:
    """The next write stops in the middle, the next deletion after one file."""
    opened = files._opened

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> None:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            die()

    def remove(path: Path) -> None:
        next(iter(sorted(path.iterdir()))).unlink()
        die()

    @contextmanager
    def half(path: Path, mode: str) -> Iterator[Half]:
        with opened(path, mode) as file:
            yield Half(file)

    files._opened = half
    files.shutil.rmtree = remove  # type: ignore[assignment]


def live(mesh: ParallelMesh, case: Case, folder: str) -> None:
    """One start of a run, to its end."""
    if case.broken:
        BROKEN[case.broken]()
    trainer(mesh, case, Path(folder)).run()


def _born(case: Case, folder: str, place: Place, scratch: str, kill: Kill | None) -> None:
    """A rank's process."""
    pids = Path(scratch) / "pids"
    (pids / str(place.rank)).write_text(str(os.getpid()))

    def die() -> None:
        (Path(scratch) / "killed").touch()
        if kill and kill.everyone:
            others = [int(path.read_text()) for path in pids.iterdir() if path.name != str(place.rank)]
            for other in others:
                os.kill(other, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if kill and kill.phase in PHASES and kill.rank == place.rank:
        arm(kill, die)
    _rank(live, place, scratch, (case, folder))


def start(case: Case, folder: Path, kill: Kill | None = None) -> bool:
    """One start of a run; whether somebody was killed in it. An error of a rank that nobody killed is raised."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "pids").mkdir()
        address = f"127.0.0.1:{free_port()}"
        places = [Place(rank, case.ranks, rank, address) for rank in range(case.ranks)]
        ranks = [
            _context.Process(target=_born, args=(case, str(folder), place, scratch, kill), daemon=True)
            for place in places
        ]
        for process in ranks:
            process.start()
        try:
            return _watch(ranks, Path(scratch), kill)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _watch(ranks: Sequence[Any], scratch: Path, kill: Kill | None) -> bool:
    begun = time.monotonic()
    while any(process.is_alive() for process in ranks):
        now = time.monotonic() - begun
        if (scratch / "killed").exists():
            time.sleep(kill.linger if kill else 0.0)
            return True
        if kill and kill.phase == ANYWHERE and now > kill.after:
            ranks[kill.rank].kill()
            time.sleep(kill.linger)
            return True
        errors = sorted(scratch.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors and not (scratch / "killed").exists():
            raise AssertionError(f"rank {errors[0].stem} failed first:\n{errors[0].read_text()}")
        assert now < LIFE_S, f"ranks {[i for i, p in enumerate(ranks) if p.is_alive()]} did not end"
        time.sleep(0.005)
    if (scratch / "killed").exists():
        return True
    for rank, process in enumerate(ranks):
        error = scratch / f"{rank}.error"
        assert process.exitcode == 0, error.read_text() if error.exists() else f"rank {rank}: {process.exitcode}"
    return False


@dataclass
class Figures:
    """What was seen: ``lost``: the most steps that a kill cost; ``problems``: all that should not have been."""

    kills: int = 0
    lines: int = 0
    redone: int = 0
    lost: int = 0
    phases: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        self.kills += other.kills
        self.lines += other.lines
        self.redone += other.redone
        self.lost = max(self.lost, other.lost)
        self.phases |= other.phases
        self.problems += other.problems

    def __str__(self) -> str:
        return (
            f"{self.kills} kills in {len(self.phases)} phases, {self.lines} logged steps ({self.redone} of them done "
            f"again), at most {self.lost} steps lost, {len(self.problems)} problems"
        )


WITH_A_CHECKPOINT = Kill("log written", 0, nth=2 * EVERY)
"""Leaves a run whose first checkpoint is written, since the second has been begun."""


def bound(case: Case) -> int:
    """Steps that a kill may cost: those since the last save; while that is still being written, those since the one before,
    which is waited for before another begins."""
    return (2 if case.asynchronous else 1) * EVERY


class History:
    """A run's starts, held against an undisturbed run in ``oracle``."""

    def __init__(self, case: Case, folder: Path, oracle: Path) -> None:
        self.case, self.folder, self.oracle = case, folder, oracle
        self.expected = {line["step"]: line for line in witness(oracle)}
        self.seen = 0
        self.figures = Figures()

    def start(self, kill: Kill | None = None) -> bool:
        """Start it once; whether somebody was killed."""
        before = committed(self.folder)
        try:
            killed = start(self.case, self.folder, kill)
        except AssertionError as error:
            self.figures.problems.append(f"{kill}: {error}")
            return False
        lines = witness(self.folder)[self.seen :]
        old = {line["step"] for line in witness(self.folder)[: self.seen]}
        self.seen += len(lines)
        self.figures.lines += len(lines)
        self.figures.redone += sum(line["step"] in old for line in lines)
        for line in lines:
            if line != self.expected[line["step"]]:
                differing = [key for key, value in line.items() if value != self.expected[line["step"]][key]]
                self._problem(kill, f"step {line['step']} differs in {', '.join(differing)}")
        first = max(before, default=0) + 1
        if lines and lines[0]["step"] != first:
            self._problem(kill, f"it went on with step {lines[0]['step']} instead of {first}")
        self._look(kill, done=lines[-1]["step"] if lines else first - 1)
        if killed and kill:
            self.figures.kills += 1
            self.figures.phases.add(kill.phase)
        return killed

    def _look(self, kill: Kill | None, *, done: int) -> None:
        """At the checkpoints that are there."""
        steps = committed(self.folder)
        for step in steps:
            if not readable(self.folder / "ckpt" / f"step-{step:06d}"):
                self._problem(kill, f"the checkpoint of step {step} is not whole")
        lost = done - max(steps, default=0)
        self.figures.lost = max(self.figures.lost, lost)
        if lost > bound(self.case):
            self._problem(kill, f"{lost} steps are lost")

    def finish(self) -> None:
        """Leave the run alone until its end, which must be the oracle's to the bit."""
        self.start()
        last = f"ckpt/step-{self.case.steps:06d}"
        for found in (self.folder, self.oracle):
            if committed(found)[-1:] != [self.case.steps]:
                self._problem(None, f"{found.name} has no checkpoint of its last step")
                return
        if digest_of(Stored.open(self.folder / last)) != digest_of(Stored.open(self.oracle / last)):
            self._problem(None, "the last checkpoint differs")
        if (left := [path.name for path in (self.folder / "ckpt").glob(".*")]) != []:
            self._problem(None, f"{', '.join(left)} left behind")

    def _problem(self, kill: Kill | None, what: str) -> None:
        self.figures.problems.append(f"{self.folder.name}, {kill}: {what}")


def histories(case: Case, root: Path, kills: Sequence[Kill]) -> Figures:
    """All ``kills``, one start after the other; a run that ends before its next kill is followed by a new one."""
    figures, oracle = Figures(), root / "oracle"
    start(case, oracle)
    waiting = list(kills)
    for number in count():
        history = History(case, root / f"run-{number}", oracle)
        begun = len(waiting)
        if waiting and waiting[0].phase.startswith("restore"):
            history.start(WITH_A_CHECKPOINT)
        while waiting and history.start(waiting[0]):
            waiting.pop(0)
        if waiting and len(waiting) == begun:  # it never comes by that place
            history.figures.problems.append(f"{waiting.pop(0)} killed nobody")
        history.finish()
        figures.add(history.figures)
        if not waiting or figures.problems:
            return figures
    raise AssertionError("unreachable")
