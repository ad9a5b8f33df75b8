"""A run's figures over its steps, in bounded memory however long its log is."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 2000
"""Points of a curve on a page."""
PENDING = 1 << 14
"""Values that wait to be merged."""
WINDOW, FEWEST = 20, 60
"""A running mean is taken over this part of a curve's points, and of curves with no fewer points than these."""

LARGEST = 1e100
"""Figures are drawn up to here, so that no sum of them overflows; what is smaller than its inverse is zero."""

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """A curve as drawn: [n] each. ``span``: steps that one point may stand for; with 1, all values are there."""

    steps: Rows
    mean: Rows
    low: Rows
    high: Rows
    count: Rows
    span: int

    @property
    def thinned(self) -> bool:
        return self.span > 1

    def running_mean(self) -> Rows | None:
        """Over the values of a window around each point; none of short curves. At the beginning, which is steep, the window
        is as short on either side; at the end it lacks what has not come yet."""
        n = len(self.steps)
        if n < FEWEST:
            return None
        half = max(1, n // (2 * WINDOW))
        places = np.arange(n)
        reach = np.minimum(places, half)
        left, right = places - reach, np.minimum(places + reach + 1, n)
        sums = np.concatenate([[0.0], np.cumsum(self.mean * self.count)])
        counts = np.concatenate([[0.0], np.cumsum(self.count)])
        return (sums[right] - sums[left]) / (counts[right] - counts[left])


class Curve:
    """Values by step. Where there are more than a page has points, neighbours become one that keeps the least, the greatest
    and the mean of its values."""

    def __init__(self) -> None:
        self.span = 1
        self._odd, self._last = 0, (-1, math.nan)
        self._steps, self._values = array("d"), array("d")
        self._rows: Rows = np.zeros((0, 6))  # first step, last step, least, greatest, sum, count

    def add(self, step: int, value: float) -> None:
        self._steps.append(step)
        self._values.append(value)
        if len(self._steps) == PENDING:
            self._merge()

    @property
    def odd(self) -> int:
        """Values that were no finite number below ``LARGEST``."""
        self._merge()
        return self._odd

    @property
    def last(self) -> tuple[int, float]:
        """The greatest step and its value; -1 where there is none."""
        self._merge()
        return self._last

    def points(self) -> Points:
        """All so far, in the order of steps."""
        self._merge()
        first, last, low, high, total, count = self._rows.T
        return Points((first + last) / 2, total / count, low, high, count, self.span)

    def _merge(self) -> None:
        if not self._steps:
            return
        steps, values = np.array(self._steps), np.array(self._values)
        self._steps, self._values = array("d"), array("d")
        fine = np.abs(values) < LARGEST
        self._odd += int((~fine).sum())
        steps, values = steps[fine], np.where(np.abs(values[fine]) < 1 / LARGEST, 0.0, values[fine])
        if len(steps) and steps.max() >= self._last[0]:
            newest = len(steps) - 1 - int(np.argmax(steps[::-1]))
            self._last = int(steps[newest]), float(values[newest])
        new = np.stack([steps, steps, values, values, values, np.ones_like(steps)], axis=1)
        self._rows = _merged(np.concatenate([self._rows, new]), self.span)
        while len(self._rows) > MOST:
            self.span *= 2
            self._rows = _merged(self._rows, self.span)


def _merged(rows: Rows, span: int) -> Rows:
    """One row for every ``span`` steps that have any."""
    if not len(rows):
        return rows
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    ids = rows[:, 0] // span
    at = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    reduced = (
        np.minimum.reduceat(rows[:, 0], at), np.maximum.reduceat(rows[:, 1], at), np.minimum.reduceat(rows[:, 2], at),
        np.maximum.reduceat(rows[:, 3], at), np.add.reduceat(rows[:, 4], at), np.add.reduceat(rows[:, 5], at),
    )  # fmt: skip
    return np.stack(reduced, axis=1)


def number(value: Any) -> float | None:
    """A number that came from outside; NaN for one beyond ``LARGEST``, none for what is no number."""
    if type(value) not in (int, float):
        return None
    return float(value) if abs(value) < LARGEST else math.nan
