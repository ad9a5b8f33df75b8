"""Where every token of a packed sequence is; plain integers, decided on the host before any tensor exists.

A pack is one sequence [text_0; vision_0; text_1; vision_1; ...]. Each clip with its text is one attention segment; an image is
a clip of one frame. A token's role is data: ``2 * clip + kind`` is the row of its modulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

TEXT, VISION = 0, 1


@dataclass(frozen=True)
class Clip:
    """One clip of a pack: ``text`` tokens and a ``grid`` (t, h, w) of vision tokens, counted in patches."""

    text: int
    grid: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.text < 0 or min(self.grid) < 1:
            raise ValueError(
                f"a clip needs text >= 0 and a grid of at least 1x1x1, found text={self.text} grid={self.grid}"
            )

    @property
    def vision(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        return self.text + self.vision


class Run(NamedTuple):
    """Consecutive tokens [start, stop) that share the modulation ``row``."""

    start: int
    stop: int
    row: int


class Group(NamedTuple):
    """``clips`` consecutive segments of equal ``length`` beginning at token ``start``: one batched attention call."""

    start: int
    clips: int
    length: int


@dataclass(frozen=True)
class PackLayout:
    """The clips of one packed sequence, in order."""

    clips: tuple[Clip, ...]

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError("a pack needs at least one clip")

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(clip.tokens for clip in self.clips)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def vision(self) -> int:
        return sum(clip.vision for clip in self.clips)

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Segment boundaries, [clips + 1]."""
        return (0, *accumulate(self.lengths))

    def runs(self) -> tuple[Run, ...]:
        """Runs of the whole sequence; empty runs are left out."""
        runs, start = [], 0
        for index, clip in enumerate(self.clips):
            for kind, count in ((TEXT, clip.text), (VISION, clip.vision)):
                if count:
                    runs.append(Run(start, start + count, 2 * index + kind))
                start += count
        return tuple(runs)

    def runs_of(self, kind: int) -> tuple[Run, ...]:
        """Runs of the sequence that keeps only tokens of one kind, the row being the clip's index."""
        runs, start = [], 0
        for run in self.runs():
            if run.row % 2 == kind:
                runs.append(Run(start, start + run.stop - run.start, run.row // 2))
                start += run.stop - run.start
        return tuple(runs)

    def groups(self) -> tuple[Group, ...]:
        """Attention calls: neighbours of equal length share one."""
        groups: list[Group] = []
        for start, length in zip(self.cu_seqlens, self.lengths):
            if groups and groups[-1].length == length:
                groups[-1] = groups[-1]._replace(clips=groups[-1].clips + 1)
            else:
                groups.append(Group(start, 1, length))
        return tuple(groups)
