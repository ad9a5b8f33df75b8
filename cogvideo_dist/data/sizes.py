"""At which of the listed sizes every sample is used, or why it cannot be: decided for whole columns of an index at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.config.schema import Data, Size
from cogvideo_dist.data.decode import COVER_TICK
from cogvideo_dist.data.index import KIND_NAMES, Index, Kind, Record

CHUNK = 2**16

WRONG_KIND, UNLISTED, NO_STILL, SMALL, SHORT, LARGE = range(-6, 0)
"""Why a sample has no size; of several reasons, over the listed sizes, the last of these counts."""


class Columns(Protocol):
    """What decides a sample's size."""

    def column(self, name: str) -> NDArray[Any]: ...
    @property
    def sizes(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Sizing:
    """The rule. ``tokens``: of a clip of every one of ``data.sizes``.

    Of the listed sizes that need no enlarging and fit the clip's duration: nearest in aspect ratio, then most frames, then most
    pixels. An image takes sizes of one frame; a video longer ones, where any is listed. A latent has its size.
    """

    data: Data
    tokens: Sequence[int]

    def assign(self, samples: Columns) -> NDArray[np.int16]:
        """Of every sample the position of its size in ``data.sizes``, or a negative number that tells why it has none."""
        names = ("kind", "frames", "fps", "height", "width")
        columns = {name: samples.column(name) for name in names} | {"size": samples.sizes}
        count = len(columns["kind"])
        pieces = [
            self._assigned({name: column[at : at + CHUNK] for name, column in columns.items()})
            for at in range(0, count, CHUNK)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int16)

    def _assigned(self, columns: dict[str, NDArray[Any]]) -> NDArray[np.int16]:
        kind, height, width = (columns[name].astype(np.int64) for name in ("kind", "height", "width"))
        with np.errstate(divide="ignore", invalid="ignore"):
            duration = columns["frames"] / columns["fps"]
        video, latent = kind == _number("video"), kind == _number("latent")
        longest = max(frames for frames, _, _ in self.data.sizes)
        still = (kind == _number("image")) | (longest == 1)
        found = np.full(len(kind), NO_STILL, np.int16)
        best = np.full((3, len(kind)), -np.inf)
        for number, (frames, tall, wide) in enumerate(self.data.sizes):
            of_kind = still == (frames == 1)
            large = of_kind & (tall <= height) & (wide <= width)
            fits = large & (~video | (covered(duration, frames=frames, fps=self.data.fps)))
            found = np.maximum(
                found,
                np.select([large, of_kind], [SHORT, SMALL], NO_STILL).astype(np.int16),
                where=found < 0,
                out=found,
            )
            across, along = wide * height, tall * width
            rank = (-np.maximum(across, along) / np.minimum(across, along), float(frames), float(tall * wide))
            better = fits & _above(rank, best)
            found[better] = number
            for row, value in zip(best, rank):
                row[better] = value[better] if isinstance(value, np.ndarray) else value
        wanted = np.array(self.data.sizes)
        listed = (columns["size"][:, None, :] == wanted[None]).all(-1)
        found = np.where(latent, np.where(listed.any(1), listed.argmax(1), UNLISTED), found).astype(np.int16)
        found[latent != (self.data.source == "latents")] = WRONG_KIND
        over = np.array([*(tokens > self.data.tokens_per_pack for tokens in self.tokens)])
        found[(found >= 0) & over[np.maximum(found, 0)]] = LARGE
        return found

    def of(self, record: Record) -> Size | str:
        """The size of one sample, or the reason why it has none."""
        index = Index.of([record])
        found = int(self.assign(index)[0])
        return self.data.sizes[found] if found >= 0 else self.reason(record, found)

    def reason(self, record: Record, number: int) -> str:
        """In words, why a sample has no size."""
        return _REASONS[number](record, self)

    def larger_than_pack(self, record: Record) -> str:
        free = Sizing(self.data, [0] * len(self.tokens))
        number = int(free.assign(Index.of([record]))[0])
        return (
            f"larger than a pack: {list(self.data.sizes[number])} takes {self.tokens[number]} tokens, data.tokens_per_pack is "
            f"{self.data.tokens_per_pack}"
        )

    def too_short(self, record: Record) -> str:
        still = max(frames for frames, _, _ in self.data.sizes) == 1
        fits = [f for f, h, w in self.data.sizes if (f == 1) == still and h <= record.height and w <= record.width]
        return f"too short: {record.duration:.3f} s do not hold {min(fits)} frames at {self.data.fps:g} per second"


def covered(duration: NDArray[np.float64], *, frames: int, fps: float) -> NDArray[np.bool_]:
    """Whether clips of ``duration`` seconds still show at the last of ``frames`` moments 1 / fps apart."""
    return (frames - 1) / fps <= duration - COVER_TICK


def _above(rank: tuple[Any, ...], best: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether one rank comes before another, element by element."""
    above = np.zeros(best.shape[1], bool)
    equal = np.ones(best.shape[1], bool)
    for value, other in zip(rank, best):
        above |= equal & (value > other)
        equal &= value == other
    return above


def _number(kind: Kind) -> int:
    return KIND_NAMES.index(kind)


_REASONS: dict[int, Callable[[Record, Sizing], str]] = {
    WRONG_KIND: lambda r, s: f"wrong kind: a {r.kind} cannot be read with data.source: {s.data.source}",
    UNLISTED: lambda r, s: f"unlisted size: data.sizes does not list {list(r.size or ())}",
    NO_STILL: lambda r, s: "no size for an image: data.sizes lists none of 1 frame",
    SMALL: lambda r, s: f"too small: {r.height} x {r.width} would have to be enlarged for every one of data.sizes",
    SHORT: lambda r, s: s.too_short(r),
    LARGE: lambda r, s: s.larger_than_pack(r),
}


def assign_size(record: Record, data: Data) -> Size | str:
    """The size at which a clip is used, or the reason why it cannot be, whatever a pack may hold."""
    return Sizing(data, [0] * len(data.sizes)).of(record)
