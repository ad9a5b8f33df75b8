"""In which order clips come: a pure function of the seed and of how many came before.

A source's epoch is a permutation of its shards, and of the samples inside windows of several shards, so that what is read lies
close together and nothing has to be remembered of a shuffle. Epochs follow each other without a border. Several sources are
mixed by weight, each in epochs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.rng import fold_seed

Ints = NDArray[np.int64]


def scrambled(values: NDArray[np.integer], seed: int) -> NDArray[np.uint64]:
    """64 bits for every value that look random, a one-to-one map (SplitMix64: Steele, Lea and Flood 2014, fig. 19).

    In integers, so that an order is the same with every version of every library.
    """
    z = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))


class Draws(NamedTuple):
    """Clips in the order in which they come: which visit (epoch) of which clip."""

    epochs: Ints
    clips: Ints


class Shuffle:
    """The endless order of one source's ``clips`` (numbers, ascending), which lie in shards ``shard_of``.

    Every epoch has each clip once. ``window``: shards whose samples are permuted together.
    """

    def __init__(self, clips: Ints, shard_of: NDArray[np.integer], *, window: int, seed: int, name: str) -> None:
        order = np.argsort(shard_of, kind="stable")
        self.clips, self.window, self.seed, self.name = clips[order], window, seed, name
        self.shards, starts = np.unique(shard_of[order], return_index=True)
        self.bounds = np.append(starts, len(clips)).astype(np.int64)
        self._epoch, self._shards, self._ends = -1, np.empty(0, np.int64), np.empty(0, np.int64)
        self._window, self._order = (-1, -1), np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.clips)

    def take(self, start: int, count: int) -> Draws:
        """Draws ``start`` to ``start + count`` of the endless order."""
        epochs, clips, at = list[Ints](), list[Ints](), start
        while at < start + count:
            epoch, place = divmod(at, len(self))
            piece = self._from(epoch, place)[: start + count - at]
            clips.append(piece)
            epochs.append(np.full(len(piece), epoch))
            at += len(piece)
        return Draws(np.concatenate(epochs), np.concatenate(clips)) if clips else Draws(*(np.empty(0, np.int64),) * 2)

    def _from(self, epoch: int, place: int) -> Ints:
        """What is left from ``place`` on of the window that it lies in."""
        if self._epoch != epoch:
            self._epoch = epoch
            key = fold_seed(self.seed, "shards", self.name, epoch)
            self._shards = np.argsort(scrambled(self.shards, key), kind="stable")
            sizes = np.diff(self.bounds)[self._shards]
            cuts = np.arange(0, len(sizes), self.window)
            self._ends = np.add.reduceat(sizes, cuts).cumsum()
        window = int(np.searchsorted(self._ends, place, side="right"))
        if self._window != (epoch, window):
            mine = self._shards[window * self.window : (window + 1) * self.window]
            clips = np.concatenate([self.clips[self.bounds[shard] : self.bounds[shard + 1]] for shard in mine])
            key = fold_seed(self.seed, "samples", self.name, epoch)
            self._window, self._order = (epoch, window), clips[np.argsort(scrambled(clips, key), kind="stable")]
        return self._order[place - int(self._ends[window]) + len(self._order) :]


class Mixture:
    """Several sources' orders as one: of any run of draws each source has its share, to within one clip.

    ``skip``: draws of each source that an earlier run has made.
    """

    def __init__(self, sources: Sequence[Shuffle], weights: Sequence[float], *, skip: Sequence[int]) -> None:
        self.sources, self.skip = tuple(sources), tuple(skip)
        self.weights = np.array(weights, np.float64) / np.sum(weights)

    def __len__(self) -> int:
        """Clips of all sources."""
        return sum(map(len, self.sources))

    def start(self) -> tuple[int, ...]:
        """How many draws of each source were made before the first."""
        return (0,) * len(self.sources)

    def take(self, made: tuple[int, ...], count: int) -> tuple[Draws, tuple[int, ...]]:
        """The ``count`` draws after ``made`` of each source, and how many were made then.

        Source i's j-th draw has the time (j + 1/2) / weight i; draws come in the order of their times.
        """
        if len(self.sources) == 1:
            return self.sources[0].take(self.skip[0] + made[0], count), (made[0] + count,)
        ahead = [int(count * weight) + 2 for weight in self.weights]
        times = [(m + np.arange(n) + 0.5) / w for m, n, w in zip(made, ahead, self.weights)]
        whose = np.repeat(np.arange(len(ahead)), ahead)
        chosen = whose[np.lexsort((whose, np.concatenate(times)))[:count]]
        counts = np.bincount(chosen, minlength=len(ahead))
        epochs, clips = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, (source, skip, m) in enumerate(zip(self.sources, self.skip, made)):
            mine = chosen == number
            epochs[mine], clips[mine] = source.take(skip + m, int(counts[number]))
        return Draws(epochs, clips), tuple(int(m + c) for m, c in zip(made, counts))
