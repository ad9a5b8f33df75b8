"""Which rank the others wait for.

Ranks that meet in every step all take the same time for it; what differs is how much of that each waits. So a rank's own time
is that of its phases less what its host was blocked in collectives. On a GPU, whose collectives do not block the host, they are
timed on the device: there a phase without collectives shows a slow one (the forward under ZeRO 0 to 2, ranks that share no
sample), one with collectives shows the slowest rank's time on all.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import gather_objects
from cogvideo_dist.parallel.waiting import Waits

PHASES = ("data", "forward", "backward", "update")

SLOW, WEIGHTY, LEAST_S, REPORTS = 0.7, 0.1, 0.05, 2
"""A rank is slow in a phase that the median of the others takes less than ``SLOW`` of its time for, if that time makes up
``WEIGHTY`` of its steps and ``LEAST_S`` of a report, in so many reports in a row."""


class Laps:
    """Own seconds by phase since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self.waits, self.device = Waits(), device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "", 0.0
        self._event: torch.cuda.Event | None = None
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def mark(self, phase: str) -> None:
        """From now on this rank is in ``phase``; others than those of a step are not timed."""
        now, event = time.monotonic() - self.waits.seconds, None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        if self._phase in PHASES:
            # for its data it is the host that waits
            if event is None or self._event is None or self._phase == "data":
                self.seconds[self._phase] += now - self._since
            else:
                self._pending.append((self._phase, self._event, event))
        self._phase, self._since, self._event = phase, now, event

    def take(self) -> dict[str, float]:
        """They begin anew. Waits for the device."""
        for phase, begun, ended in self._pending:
            ended.synchronize()
            self.seconds[phase] += begun.elapsed_time(ended) / 1000
        self._pending = []
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken


class Straggler(NamedTuple):
    """A rank that takes ``own_s`` for a phase, of ``score`` of which the others' median is."""

    rank: int
    host: str
    phase: str
    score: float
    own_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow in {self.phase}: {self.own_s:.3g} s since the last report, the others "
            f"{self.score:.0%} of that; all wait for it (launch/doctor.py checks its machine)"
        )


class Stragglers:
    """Judges every report's laps. All ranks come to the same verdict."""

    def __init__(self, world: Axis) -> None:
        self.world, self.host = world, socket.gethostname()
        self.rows: dict[tuple[int, str], int] = {}  # in how many reports in a row a rank was slow in a phase

    def judge(self, laps: Mapping[str, float]) -> tuple[dict[str, float], list[Straggler]]:
        """Figures for the log, and those who have become stragglers by now. Collective."""
        if self.world.size == 1:
            return {}, []
        gathered = gather_objects((dict(laps), self.host), self.world)
        laps_of = [each for each, _ in gathered]
        totals = [sum(each.values()) for each in laps_of]
        slowest = max(range(len(totals)), key=totals.__getitem__)
        others = median(totals[:slowest] + totals[slowest + 1 :])
        skew = totals[slowest] / others - 1 if others else 0.0
        slow = {(each.rank, each.phase): each for each in slow_ranks(laps_of, [host for _, host in gathered])}
        self.rows = {key: self.rows.get(key, 0) + 1 for key in slow}
        found = [slow[key] for key, count in self.rows.items() if count == REPORTS]
        return {"time/skew": skew, "time/slowest_rank": float(slowest)}, found


def slow_ranks(laps: Sequence[Mapping[str, float]], hosts: Sequence[str]) -> list[Straggler]:
    """By rank, each in the phases in which it is slow."""
    found = []
    for rank, mine in enumerate(laps):
        for phase, own in mine.items():
            usual = median(each[phase] for other, each in enumerate(laps) if other != rank)
            if own > max(LEAST_S, WEIGHTY * sum(mine.values())) and usual < SLOW * own:
                found.append(Straggler(rank, hosts[rank], phase, usual / own, own))
    return found
