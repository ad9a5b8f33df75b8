"""Where every token of a packed sequence is; plain integers, decided on the host before any tensor exists.

A pack is one sequence [text_0; vision_0; text_1; vision_1; ...]. Each clip with its text is one attention segment; an image is
a clip of one frame. A token's role is data: ``2 * clip + kind`` is the row of its modulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from cogvideo_dist.parallel.ops import even

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


class Span(NamedTuple):
    """Consecutive tokens [start, stop) of one kind of one clip, counted within the clip's tokens of that kind."""

    clip: int
    kind: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


class Run(NamedTuple):
    """Consecutive tokens [start, stop) that share the modulation ``row``."""

    start: int
    stop: int
    row: int


class Group(NamedTuple):
    """``clips`` neighbours of equal lengths, queries from token ``start`` and keys from ``k_start``: one attention call."""

    start: int
    k_start: int
    clips: int
    length: int
    k_length: int


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

    def spans(self) -> tuple[Span, ...]:
        """The whole sequence; empty spans are left out."""
        pairs = [
            span
            for index, clip in enumerate(self.clips)
            for span in (Span(index, TEXT, 0, clip.text), Span(index, VISION, 0, clip.vision))
        ]
        return tuple(span for span in pairs if span.tokens)


def cut(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    """Tokens [start, stop) of a sequence of spans."""
    found, at = [], 0
    for span in spans:
        first, last = max(start - at, 0), min(stop - at, span.tokens)
        if first < last:
            found.append(span._replace(start=span.start + first, stop=span.start + last))
        at += span.tokens
    return tuple(found)


def tokens_of(spans: Sequence[Span]) -> int:
    return sum(span.tokens for span in spans)


def part(spans: Sequence[Span], parts: int, *, index: int) -> tuple[Span, ...]:
    """One of ``parts`` even pieces of a sequence of spans."""
    counts = even(tokens_of(spans), parts)
    start = sum(counts[:index])
    return cut(spans, start, start + counts[index])


def runs_of(spans: Sequence[Span]) -> tuple[Run, ...]:
    """The runs of a sequence of spans; the row is 2 * clip + kind."""
    runs, at = [], 0
    for span in spans:
        runs.append(Run(at, at + span.tokens, 2 * span.clip + span.kind))
        at += span.tokens
    return tuple(runs)


def vision_runs_of(spans: Sequence[Span]) -> tuple[Run, ...]:
    """The runs of the sequence that keeps only vision tokens; the row is the clip."""
    return tuple(run._replace(row=run.row // 2) for run in runs_of([span for span in spans if span.kind == VISION]))


def groups_of(lengths: Sequence[int], k_lengths: Sequence[int]) -> tuple[Group, ...]:
    """Attention calls between the tokens of each clip: neighbours of equal lengths share one, empty ones are left out."""
    groups: list[Group] = []
    start = k_start = 0
    for length, k_length in zip(lengths, k_lengths):
        if length and k_length:
            last = groups[-1] if groups else None
            joins = last is not None and (last.length, last.k_length) == (length, k_length)
            if last and joins and (last.start + last.clips * length, last.k_start + last.clips * k_length) == (
                start, k_start,
            ):  # fmt: skip
                groups[-1] = last._replace(clips=last.clips + 1)
            else:
                groups.append(Group(start, k_start, 1, length, k_length))
        start, k_start = start + length, k_start + k_length
    return tuple(groups)


def ring_shares(lengths: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """[rank][clip] tokens of every clip on every rank of a ring: even shares of each clip, and of all of them together.

    A clip's odd tokens go to the ranks after those that took the last ones, so ranks differ by one token at most.
    """
    columns, at = [], 0
    for length in lengths:
        share, odd = divmod(length, ranks)
        columns.append([share + ((rank - at) % ranks < odd) for rank in range(ranks)])
        at = (at + odd) % ranks
    return tuple(zip(*columns))
