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
from cogvideo_dist.engine.ending import Rewind
from cogvideo_dist.engine.replay import Account
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object, gather_objects

INCIDENTS, LEFT_OUT = "incidents.jsonl", "left_out.jsonl"

SHARE = 1e-3
"""Of all steps so far whose updates may be left out, if that is more than may be in a row."""

OVERFLOWS = 10
"""Steps in a row that overflow at fp16's least loss scale and end the run."""


def updatable(engines: Sequence[Engine], world: Axis) -> bool:
    """Whether all models' gradients are finite on all ranks; under fp16 whether all losses are, since gradients that overflow
    are the loss scale's affair. Collective; waits for the device once."""
    norms = torch.stack([engine.pending_norm() for engine in engines])
    if bool(norms.isfinite().all()):
        return True
    if any(engine.scaler for engine in engines):
        return all(gather_objects(all(engine.loss_is_finite for engine in engines), world))
    return False


def check_scales(engines: Mapping[str, Engine], done: int) -> None:
    """Raise ``FloatingPointError`` where fp16's loss scale cannot become smaller and is too great all the same. Every rank
    comes to the same verdict."""
    for name, engine in engines.items():
        if engine.overflows >= OVERFLOWS:
            raise FloatingPointError(
                f"step {done}: the gradients{_whose(name)} overflow fp16 for the {engine.overflows}th step in a row at the "
                f"least loss scale, {engine.scaler['cur_scale']:g}: they are too large or not finite, which no scale changes; "
                "lower train.learning_rate, or set train.precision: bf16; the last checkpoint stands"
            )


class Numbers:
    """Which updates of a run are left out, and the notes of what was wrong. Every rank has the same."""

    def __init__(self, folder: Path, train: Train, *, mesh: ParallelMesh) -> None:
        self.folder, self.train, self.mesh = folder, train, mesh
        self.left_out: set[int] = set(broadcast_object(_read(folder) if mesh.is_first else None, mesh.world))
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
        policy, limit = self.train.non_finite, ""
        if self.in_a_row + 1 > self.train.non_finite_in_a_row:
            limit = f"the {self.in_a_row + 1}th in a row, more than train.non_finite_in_a_row {self.train.non_finite_in_a_row}"
        elif self.total + 1 > max(self.train.non_finite_in_a_row, int(SHARE * done)):
            limit = f"the {self.total + 1}th of {done} steps, more than {SHARE:.1%} of them"
        action = "stop" if limit else policy
        if action == "rewind" and not can_go_back:
            action = "skip"  # the same: without a checkpoint the state is what the beginning leads to
        faulty = [account for account in accounts if account["faults"]]
        entry = {"kind": "not finite", "ranks": [each["rank"] for each in faulty], "reproduced": bool(faulty)}
        self.note(done, {**entry, "accounts": faulty or list(accounts), "action": action})
        if action == "stop":
            raise FloatingPointError(f"step {done}: {told(accounts, done)}{_and(limit)}")
        self._leave_out(done)
        if action == "rewind":
            raise Rewind(f"step {done}: {told(accounts, done)}")

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


def told(accounts: Sequence[Account], done: int) -> str:
    """In one line: whose fault it was, and how to look at it."""
    kept = "no rank has made the update, and the last checkpoint stands"
    faulty = [account for account in accounts if account["faults"]]
    if not faulty:
        lost = [f"rank {each['rank']} ({each['host']})" for each in accounts if not each.get("loss_was_finite", True)]
        whose = f"the loss of {', '.join(lost)}" if lost else "a gradient"
        again = "but all is finite when computed again: suspect the hardware, and run launch/doctor.py"
        return f"{whose} was not finite, {again}; {kept}"
    first, others = faulty[0], len(faulty) - 1
    fault = first["faults"][0]
    if fault["what"] == "loss":
        what = f"the loss{_whose(fault['model'])} is {fault['value']}"
    else:
        what = f"the gradient{_whose(fault['model'])} of {fault['parameters'][0]} is not finite"
    where = f" (first in {fault['module']})" if fault["module"] else ""
    keys = ", ".join(sample["key"] for sample in first["samples"][:4]) + (", ..." if len(first["samples"]) > 4 else "")
    more = f" and on {others} more" if others else ""
    return f"{what} on rank {first['rank']}{more}{where}, samples {keys}; {kept}; look at it with --replay {done}"


def _whose(model: str) -> str:
    return f" of the {model}" if model else ""


def _and(limit: str) -> str:
    return f"; it is {limit}" if limit else ""


def _read(folder: Path) -> list[int]:
    """Steps of ``LEFT_OUT``; a torn last line is of one whose end was not waited for."""
    path, found = folder / LEFT_OUT, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
