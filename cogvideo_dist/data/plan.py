"""Which clips every step works on, at which sizes, in which packs: a pure function of index, configuration and seed.

Clips come in the order of ``data/order.py``, wait in a pool, and packs are composed of what waits (``data/packing.py``).
Nothing is dropped and nothing comes twice, and rank, world size and workers play no part. A step's plan depends on earlier
ones only through the pool; so that a run that goes on late need not plan all of them again, the pool is noted now and then.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from cogvideo_dist.config.schema import Data, Size, Source
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import checksum
from cogvideo_dist.data.order import Mixture, Shuffle
from cogvideo_dist.data.packing import LOOK_AHEAD, Classes, Ints, Pool, compose
from cogvideo_dist.data.sizes import Sizing
from cogvideo_dist.protocols import Defect, Geometry, Slot, StepPlan
from cogvideo_dist.rng import fold_seed

HELD_OUT = -1
"""The epoch of held-out slots, and the step of the plan that holds them."""

NEAR, FAR = 64, 1024
"""Steps between two states kept in memory, and between two that are noted in the run's folder."""

KEPT = 8
"""States in memory."""


class State(NamedTuple):
    """The stream before a step: draws made of each source, and the clips that were drawn and wait."""

    made: tuple[int, ...]
    pool: Pool


class Dropped(Sequence[Defect]):
    """The samples that cannot be used, each with its reason."""

    def __init__(self, catalog: Catalog, *, sizing: Sizing, found: NDArray[np.int16]) -> None:
        self.catalog, self.sizing, self.places, self.found = catalog, sizing, np.flatnonzero(found < 0), found

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Defect: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Defect]: ...
    def __getitem__(self, place: int | slice) -> Defect | Sequence[Defect]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = int(self.places[place])
        record = self.catalog[number]
        return Defect(record.key, record.source, self.sizing.reason(record, int(self.found[number])))

    def counts(self) -> Counter[str]:
        """How many there are for each reason, named by its first words."""
        counts: Counter[str] = Counter()
        for code, count in zip(*np.unique(self.found[self.places], return_counts=True)):
            first = self.catalog[int(np.flatnonzero(self.found == code)[0])]
            counts[self.sizing.reason(first, int(code)).split(":")[0]] += int(count)
        return counts


@dataclass(frozen=True)
class Notes:
    """Where the state of the stream is noted. ``writes``: only one process does."""

    folder: Path
    writes: bool


class Plan:
    """The order of training. A sample's number in ``catalog`` is its slots' index.

    ``held_out``: slots of ``data.held_out`` clips chosen by a hash of seed and key, which no step trains on;
    ``held_out_plan``: the same in packs. ``dropped``: what cannot be used, and why. Raises ``ValueError`` if nothing is left.
    """

    def __init__(
        self, catalog: Catalog, data: Data, *, seed: int, geometry: Geometry, notes: Notes | None = None
    ) -> None:
        self.catalog, self.data, self.seed, self.notes = catalog, data, seed, notes
        self.packs_per_step = data.packs_per_step
        clips = [geometry(size) for size in data.sizes]
        self.vision = [clip.vision for clip in clips]
        sizing = Sizing(data, [clip.tokens for clip in clips])
        costs = [geometry.cost(clip) for clip in clips]
        self.classes = Classes.of([clip.tokens for clip in clips], costs, budget=data.tokens_per_pack)
        self.found = sizing.assign(catalog)
        self.dropped = Dropped(catalog, sizing=sizing, found=self.found)
        usable = np.flatnonzero(self.found >= 0)
        usable = usable[_chosen(catalog, data.all_sources, usable)]
        held_out = self._held_out(usable)
        self.held_out = tuple(Slot(HELD_OUT, clip, self._size(clip)) for clip in held_out.tolist())
        self.training = np.setdiff1d(usable, held_out, assume_unique=True)
        if not len(self.training):
            raise ValueError(self._nothing_left())
        self.mixture = self._mixture()
        self._mean = max(1, int(self.classes.tokens[self.found[self.training]].mean()))
        self._digest = checksum(self.found.tobytes() + repr((catalog.digest, data.planned(), seed, costs)).encode())[
            :12
        ]
        self._states = {0: State(self.mixture.start(), Pool())}
        self._next = (0, self._states[0])
        packs, waiting = list[tuple[Slot, ...]](), list(self.held_out)
        while waiting:
            packs.append(self._cut(waiting))
        self.held_out_plan = self._described(HELD_OUT, packs)

    def step(self, n: int) -> StepPlan:
        """The plan of step ``n`` >= 0, the same whatever was asked before."""
        if n < 0:
            raise ValueError(f"steps begin at 0, found {n}")
        begin, state = self._before(n)
        packs: list[Ints] = []
        pool = state.pool
        for step in range(begin, n + 1):
            if step % NEAR == 0:
                self._keep(step, state)
            made, pool = self._filled(state, step)
            packs = compose(pool, self.classes, mode=self.data.mode, packs=self.packs_per_step, step=step)
            state = State(made, pool.without(np.concatenate(packs)))
        self._next = (n + 1, state)
        return self._described(n, [self._slots(pool, pack) for pack in packs])

    def substitutes(self, slot: Slot) -> Iterator[int]:
        """What may take the place of a slot's clip: the others of its source and size, from the next on and round again."""
        source, _ = self.catalog.find(slot.index)
        if slot.epoch == HELD_OUT:
            pool = np.array([other.index for other in self.held_out if other.size == slot.size])
        else:
            first, last = np.searchsorted(self.training, self.catalog.starts[source : source + 2])
            pool = self.training[first:last]
        place = int(np.searchsorted(pool, slot.index, side="right"))
        number = self.found[slot.index]
        return (
            int(clip)
            for part in (pool[place:], pool[: max(place - 1, 0)])
            for clip in part
            if self.found[clip] == number
        )

    def seen(self, n: int) -> tuple[int, ...]:
        """Draws of each source before step ``n``, those that still wait among them; see ``Source.skip``."""
        if n == 0:
            return self.mixture.start()
        self.step(n - 1)
        return self._next[1].made

    def _before(self, n: int) -> tuple[int, State]:
        """The nearest known state that comes before step ``n``, or at it."""
        known = [*self._states.items(), self._next]
        begin, state = max((pair for pair in known if pair[0] <= n), key=lambda pair: pair[0])
        if n - begin > NEAR and self.notes is not None:
            return max([(begin, state), *self._noted(self.notes, n)], key=lambda pair: pair[0])
        return begin, state

    def _keep(self, step: int, state: State) -> None:
        self._states[step] = state
        later = sorted(self._states)[1:]
        for old in later[:-KEPT]:
            del self._states[old]
        if self.notes is not None and self.notes.writes and step and step % FAR == 0:
            self._note(self.notes, step, state)

    def _note(self, notes: Notes, step: int, state: State) -> None:
        from safetensors.numpy import save

        notes.folder.mkdir(parents=True, exist_ok=True)
        path = notes.folder / f"{self._digest}-{step:09d}.safetensors"
        aside = path.with_suffix(".partial")
        aside.write_bytes(save(vars(state.pool), metadata={"made": json.dumps(state.made)}))
        aside.rename(path)
        for old in sorted(notes.folder.glob(f"{self._digest}-*.safetensors"))[:-KEPT]:
            old.unlink(missing_ok=True)

    def _noted(self, notes: Notes, n: int) -> Iterator[tuple[int, State]]:
        """The last state noted before step ``n``, or at it; one that cannot be read is no loss."""
        from safetensors import SafetensorError, safe_open

        for path in sorted(notes.folder.glob(f"{self._digest}-*.safetensors"), reverse=True):
            step = int(path.stem.rpartition("-")[2])
            if step > n:
                continue
            try:
                with safe_open(path, "numpy") as file:
                    made = json.loads(file.metadata()["made"])
                    yield step, State(tuple(made), Pool(**{name: file.get_tensor(name) for name in vars(Pool())}))
                return
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                continue

    def _filled(self, state: State, step: int) -> tuple[tuple[int, ...], Pool]:
        """The stream once enough clips wait: several steps' worth, of a small set one epoch, in any case one step's."""
        made, pool = state
        budget, packs = self.classes.budget, self.packs_per_step
        ahead = {"pack": LOOK_AHEAD * packs, "bucket": packs + len(self.classes.tokens), "pad": packs + 1}[
            self.data.mode
        ]
        held = int(self.classes.tokens[pool.classes].sum())
        while held < packs * budget or len(pool) < packs or (held < ahead * budget and len(pool) < len(self.training)):
            lacking = (ahead if len(pool) < len(self.training) else packs) * budget - held
            count = max(lacking // self._mean + 1, packs - len(pool))
            if len(pool) < len(self.training):
                count = min(count, len(self.training) - len(pool))
            draws, made = self.mixture.take(made, count)
            pool = pool.joined(draws, self.found[draws.clips].astype(np.int64), step=step)
            held = int(self.classes.tokens[pool.classes].sum())
        return made, pool

    def _slots(self, pool: Pool, pack: Ints) -> tuple[Slot, ...]:
        """A pack's clips; equal lengths lie side by side."""
        order = np.lexsort(
            (pool.clips[pack], pool.epochs[pack], pool.classes[pack], self.classes.tokens[pool.classes[pack]])
        )
        epochs, clips, classes = (column[pack[order]].tolist() for column in (pool.epochs, pool.clips, pool.classes))
        sizes = self.data.sizes
        return tuple(Slot(epoch, clip, sizes[number]) for epoch, clip, number in zip(epochs, clips, classes))

    def _described(self, step: int, packs: Sequence[tuple[Slot, ...]]) -> StepPlan:
        numbers = [[self.found[slot.index] for slot in pack] for pack in packs]
        costs = tuple(sum(int(self.classes.costs[number]) for number in pack) for pack in numbers)
        elements = sum(self.vision[number] for pack in numbers for number in pack)
        return StepPlan(step, tuple(packs), sum(map(len, numbers)), elements, costs)

    def _size(self, clip: int) -> Size:
        return self.data.sizes[self.found[clip]]

    def _cut(self, waiting: list[Slot]) -> tuple[Slot, ...]:
        """Take a pack out of the held-out clips that wait, from the first on whatever still fits."""
        room, pack = self.classes.budget, list[Slot]()
        for slot in list(waiting):
            tokens = int(self.classes.tokens[self.found[slot.index]])
            if tokens <= room:
                room -= tokens
                pack.append(slot)
                waiting.remove(slot)
        return tuple(sorted(pack, key=lambda slot: (self.classes.tokens[self.found[slot.index]], slot.size)))

    def _held_out(self, usable: Ints) -> Ints:
        if not self.data.held_out:
            return np.empty(0, np.int64)
        salt = fold_seed(self.seed, "held out")
        ranked = ((xxhash.xxh64_intdigest(self.catalog.key(clip).encode(), salt), clip) for clip in usable.tolist())
        return np.sort(np.array([clip for _, clip in heapq.nsmallest(self.data.held_out, ranked)], np.int64))

    def _mixture(self) -> Mixture:
        sources, shards = list[Shuffle](), self.catalog.column("shard")
        given = self.data.all_sources
        for number, source in enumerate(given):
            first, last = np.searchsorted(self.training, self.catalog.starts[number : number + 2])
            clips = self.training[first:last]
            if not len(clips):
                raise ValueError(f"none of the samples of {source.shards} is left to train on; {self._nothing_left()}")
            name = "" if len(given) == 1 else source.shards
            sources.append(Shuffle(clips, shards[clips], window=self.data.window, seed=self.seed, name=name))
        return Mixture(sources, [source.weight for source in given], skip=[source.skip for source in given])

    def _nothing_left(self) -> str:
        why = [f"{count} {reason}" for reason, count in self.dropped.counts().most_common()]
        why += [f"{len(self.held_out)} held out"] if self.held_out else []
        first = f"; first: {self.dropped[0].key}: {self.dropped[0].reason}" if self.dropped else ""
        return f"none of the {len(self.catalog)} samples is left to train on ({', '.join(why)}){first}"


def _chosen(catalog: Catalog, sources: Sequence[Source], usable: Ints) -> NDArray[np.bool_]:
    """Which usable samples their source's choice by score keeps."""
    kept = np.ones(len(usable), bool)
    for number, source in enumerate(sources):
        if source.score is None:
            continue
        first, last = np.searchsorted(usable, catalog.starts[number : number + 2])
        scores = catalog.indexes[number].scores(source.score)[usable[first:last] - catalog.starts[number]]
        known = np.flatnonzero(~np.isnan(scores))
        best = known[np.argsort(-scores[known], kind="stable")[: math.ceil(source.top_share * len(scores))]]
        kept[first:last] = False
        kept[first + best] = True
    return kept
