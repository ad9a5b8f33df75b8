"""Reported figures that leap out of what they were lately. They are told and change nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import broadcast_object, gather_objects

KEPT, FEWEST = 64, 16
"""Reports that are remembered of a figure, and how many there must be to judge by."""

NORMAL = 1.4826
"""The standard deviation of a normal distribution, in median absolute deviations."""

LEAST = 0.02
"""Of the median: smaller deviations count as that, or a figure that hardly moves would leap at every turn."""


NAMED, SHOWN = 1000, 6
"""Samples that an incident lists, and that a warning does."""


def shown(samples: Sequence[tuple[int, str]]) -> str:
    """(step, key) of what was trained on, in a few words."""
    if not samples:
        return "samples unknown"
    steps = f"step {samples[0][0]}" if samples[0][0] == samples[-1][0] else f"steps {samples[0][0]} to {samples[-1][0]}"
    more = ", ..." if len(samples) > SHOWN else ""
    return f"{len(samples)} samples of {steps}: {', '.join(key for _, key in samples[:SHOWN])}{more}"


class Spike(NamedTuple):
    """``deviations`` above the ``median`` of the last ``reports``."""

    figure: str
    value: float
    median: float
    deviations: float
    reports: int

    def __str__(self) -> str:
        return (
            f"the {self.figure.replace('_', ' ')} of {self.value:.4g} is {self.deviations:.1f} deviations above "
            f"{self.median:.4g}, the median of the last {self.reports}"
        )


class Spikes:
    """Figures that exceed their median by more than ``bound`` deviations (0: none does). Leaps do not move a median, so they
    are judged and remembered like any other. ``fed``: step and key of what this rank has to tell of, since the last report."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.seen: dict[str, list[float]] = {}
        self.fed: list[tuple[int, str]] = []

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint."""
        return {name: list(values) for name, values in self.seen.items()}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        self.seen = {name: list(values) for name, values in state.items()}

    def judge(self, done: int, figures: Mapping[str, float], *, world: Axis) -> list[tuple[str, dict[str, Any]]]:
        """Of a report after step ``done``: what is to be said of each figure that leaps, and to be noted. Collective."""
        found = self.look(figures)
        fed, self.fed = self.fed, []
        if not broadcast_object(bool(found), world):
            return []
        every = sorted((step, key) for mine in gather_objects(fed, world) for step, key in mine)
        told = []
        for spike in found:
            # a loss is of all steps since the last report, a norm of its step alone
            samples = every if spike.figure.endswith("loss") else [each for each in every if each[0] == done]
            entry = {"kind": "spike", **spike._asdict(), "samples": samples[:NAMED], "action": "none"}
            told.append((f"{spike}, {shown(samples)}", entry))
        return told

    def look(self, figures: Mapping[str, float]) -> list[Spike]:
        """Those of ``figures`` that leap; all are remembered."""
        found = []
        for name, value in figures.items():
            before = self.seen.setdefault(name, [])
            if self.bound and len(before) >= FEWEST and math.isfinite(value):
                middle = median(before)
                deviation = max(NORMAL * median(abs(each - middle) for each in before), LEAST * abs(middle))
                if value - middle > self.bound * deviation:
                    deviations = (value - middle) / deviation if deviation else math.inf
                    found.append(Spike(name, value, middle, deviations, len(before)))
            if math.isfinite(value):
                self.seen[name] = [*before, value][-KEPT:]
        return found
