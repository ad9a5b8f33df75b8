"""What a run hears from outside and tells there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Stop(Protocol):
    """Why this rank is to stop, empty if it is not; ``pace_s``: seconds that a step and a save take."""

    def __call__(self, *, pace_s: float) -> str: ...


class Mark(Protocol):
    """What this rank is at from now on, for whoever watches it: load, data, forward, backward, update, save, judge or end;
    ``step``: of making which step, counted from 1."""

    def __call__(self, phase: str, step: int = 0) -> None: ...


def never(*, pace_s: float) -> str:
    return ""


def unwatched(phase: str, step: int = 0) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Outside:
    """How a run hears of the world and the world of it. ``grace_s``: between a scheduler's request to stop and its kill, as far
    as one knows; Slurm's KillWait is 30 s unless it is configured."""

    stop: Stop = never
    mark: Mark = unwatched
    grace_s: float = 30.0
