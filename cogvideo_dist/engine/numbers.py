"""What is done about a step whose numbers are not finite: no rank makes its update, all know whose fault it was, and the run
stops, leaves the update out, or goes back to its newest checkpoint (``train.non_finite``).

    incidents.jsonl   everything that was wrong with a run's numbers, a line each, and what was done about it
    left_out.jsonl    steps whose updates are left out: a later start leaves out the same ones
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine import files
from cogvideo_dist.engine.checksum import difference
from cogvideo_dist.engine.ending import Rewind
from cogvideo_dist.engine.player import Player
from cogvideo_dist.engine.probing import Account
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object, gather_objects

INCIDENTS, LEFT_OUT = "incidents.jsonl", "left_out.jsonl"

SHARE = 1e-3
"""Of all steps so far whose updates may be left out, if that is more than may be in a row."""

OVERFLOWS = 10
"""Steps in a row that overflow at fp16's least loss scale and end the run."""


def update(players: Sequence[Player], step: int, *, world: Axis) -> bool:
    """End the last micro-step of ``step`` by updating all models or, where anything of one of them is not finite on any rank,
    none; then it is still to be ended, by ``Engine.discard``. Whether they were. Collective.

    Raises ``FloatingPointError`` where fp16's loss scale cannot become smaller and is too great all the same.
    """
    if not _updatable([player.engine for player in players], world):
        return False
    for player in players:
        player.engine.step(player.rate(step))
    for player in players:
        _check_scale(player, step + 1)
    return True


def _updatable(engines: Sequence[Engine], world: Axis) -> bool:
    """Whether all models' gradients are finite on all ranks; under fp16 whether all losses are, since gradients that overflow
    are the loss scale's affair. Waits for the device once."""
    norms = torch.stack([engine.pending_norm() for engine in engines])
    if bool(norms.isfinite().all()):
        return True
    if any(engine.scaler for engine in engines):
        return all(gather_objects(all(engine.loss_is_finite for engine in engines), world))
    return False


def _check_scale(player: Player, done: int) -> None:
    """Every rank comes to the same verdict."""
    engine = player.engine
    if engine.overflows >= OVERFLOWS:
        raise FloatingPointError(
            f"step {done}: the gradients{_whose(player.learner.name)} overflow fp16 for the {engine.overflows}th step in a "
            f"row at the least loss scale, {engine.scaler['cur_scale']:g}: they are too large or not finite, which no "
            "scale changes; lower train.learning_rate, or set train.precision: bf16; the last checkpoint stands"
        )


class Numbers:
    """Which updates of a run are left out, and the notes of what was wrong. Every rank has the same."""

    def __init__(self, folder: Path, train: Train, *, mesh: ParallelMesh) -> None:
        self.folder, self.train, self.mesh = folder, train, mesh
        self.left_out = left_out_steps(folder, mesh)
        self.total = self.in_a_row = 0

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"left_out": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.total, self.in_a_row = state.get("left_out", 0), state.get("in_a_row", 0)

    def taken(self, done: int) -> None:
        """Step ``done`` is over."""
        left_out = done in self.left_out
        self.total += left_out
        self.in_a_row = self.in_a_row + 1 if left_out else 0

    def wrong(self, done: int, accounts: Sequence[Account], *, can_go_back: bool) -> None:
        """Step ``done`` had no update, and this is what ``accounts`` say of it. Returns if the run goes on without that update;
        raises ``Rewind``, or ``FloatingPointError`` where it ends. ``can_go_back``: there is a checkpoint."""
        limit = self._limit(done)
        action = "stop" if limit else self.train.non_finite
        if action == "rewind" and not can_go_back:
            action = "skip"  # the same: without a checkpoint the state is what the beginning leads to
        faulty = [account for account in accounts if account["faults"]]
        entry = {"kind": "not finite", "ranks": [each["rank"] for each in faulty], "reproduced": bool(faulty)}
        self.note(done, {**entry, "accounts": faulty or list(accounts), "action": action})
        if action == "stop":
            kept = "no rank has made the update, and the last checkpoint stands"
            raise FloatingPointError(f"step {done}: {told(accounts)}{limit}; {kept}; look at it with --replay {done}")
        self._leave_out(done)
        if action == "rewind":
            raise Rewind(f"step {done}: {told(accounts)}")

    def _limit(self, done: int) -> str:
        """Which limit it is beyond that one more update is left out; none if it is not."""
        most = self.train.non_finite_in_a_row
        if self.in_a_row + 1 > most:
            return f"; it is the {self.in_a_row + 1}th in a row, more than train.non_finite_in_a_row {most}"
        if self.total + 1 > max(most, int(SHARE * done)):
            return f"; it is the {self.total + 1}th of {done} steps, more than {SHARE:.1%} of them"
        return ""

    def check_alike(self, players: Sequence[Player], done: int) -> None:
        """Where it is due, raise ``FloatingPointError`` if ranks hold other weights than each other. Collective."""
        every = self.train.checksum_every
        found = difference(players, self.mesh) if every and done % every == 0 else None
        if found is None:
            return
        self.note(done, {"kind": "not alike", **found._asdict(), "action": "stop"})
        ranks = ", ".join(f"rank {rank} ({host})" for rank, host in zip(found.ranks, found.hosts))
        raise FloatingPointError(
            f"step {done}: {found.parameter}{_whose(found.model)} of {ranks} is not what ranks should hold alike: suspect the "
            f"hardware, and run launch/doctor.py; the weights were alike after step {max(0, done - every)}: go on from a "
            "checkpoint up to it (--checkpoint)"
        )

    def note(self, done: int, entry: Mapping[str, Any]) -> None:
        """A line of the run's incidents. A disk that is full does not hide what is about to be said of it."""
        if self.mesh.is_first:
            line = json.dumps({"step": done, "time": time.time(), **entry}, ensure_ascii=False)
            try:
                files.append_line(self.folder / INCIDENTS, line)
            except OSError:
                return

    def _leave_out(self, done: int) -> None:
        """Durably, before anything follows from it. An error of the first rank's disk is that of all."""
        problem = ""
        if self.mesh.is_first:
            try:
                files.append_line(self.folder / LEFT_OUT, json.dumps({"step": done}))
            except OSError as error:
                problem = str(error)
        if problem := broadcast_object(problem, self.mesh.world):
            raise OSError(problem)
        self.left_out.add(done)


def told(accounts: Sequence[Account]) -> str:
    """In one line, whose fault it was."""
    faulty = [account for account in accounts if account["faults"]]
    if not faulty:
        lost = [f"rank {each['rank']} ({each['host']})" for each in accounts if not each.get("loss_was_finite", True)]
        whose = f"the loss of {', '.join(lost)}" if lost else "a gradient"
        again = "but all is finite when computed again: suspect the hardware, and run launch/doctor.py"
        return f"{whose} was not finite, {again}"
    first, others = faulty[0], len(faulty) - 1
    fault = first["faults"][0]
    if fault["what"] == "loss":
        what = f"the loss{_whose(fault['model'])} is {fault['value']}"
    else:
        what = f"the gradient{_whose(fault['model'])} of {fault['parameters'][0]} is not finite"
    where = f" (first in {fault['module']})" if fault["module"] else ""
    keys = ", ".join(sample["key"] for sample in first["samples"][:4]) + (", ..." if len(first["samples"]) > 4 else "")
    more = f" and on {others} more" if others else ""
    return f"{what} on rank {first['rank']}{more}{where}, samples {keys}"


def _whose(model: str) -> str:
    return f" of the {model}" if model else ""


def left_out_steps(folder: Path, mesh: ParallelMesh) -> set[int]:
    """Those of a run's folder, as the first rank reads it."""
    return set(broadcast_object(_read(folder) if mesh.is_first else None, mesh.world))


def _read(folder: Path) -> list[int]:
    """Steps of ``LEFT_OUT``; a torn last line is of one whose end was not waited for."""
    path, found = folder / LEFT_OUT, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
