"""Which clips every step works on, at which sizes, in which packs: a pure function of records, configuration and seed.

Every epoch is a permutation of the training clips; epochs follow each other without a border, and packs are cut from
that stream. Nothing is dropped and nothing comes twice, and rank, world size and workers play no part.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cogvideo_dist.config.schema import Data, Size
from cogvideo_dist.data.decode import covers
from cogvideo_dist.data.shards import Record
from cogvideo_dist.pack.layout import Clip
from cogvideo_dist.protocols import Defect, Geometry, Slot, StepPlan
from cogvideo_dist.rng import fold, fold_seed

HELD_OUT = -1
"""The epoch of held-out slots, and the step of the plan that holds them."""

LOOK_AHEAD = 64
"""How many waiting clips a pack may choose from; the first of them is always taken."""

MARK = 64
"""Steps between two remembered states of the stream."""


class _State(NamedTuple):
    """The stream before a step: clips drawn but not packed, and the place of the next one to draw."""

    waiting: tuple[Slot, ...] = ()
    epoch: int = 0
    place: int = 0


def assign_size(record: Record, data: Data) -> Size | str:
    """The size at which a clip is used, or the reason why it cannot be.

    Of the listed sizes that need no enlarging and fit the clip's duration: nearest in aspect ratio, then most
    frames, then most pixels. An image takes sizes of one frame; a video longer ones, where any is listed. A latent has
    its size.
    """
    if (record.kind == "latent") != (data.source == "latents"):
        return f"wrong kind: a {record.kind} cannot be read with data.source: {data.source}"
    if record.size is not None:
        listed = record.size in data.sizes
        return record.size if listed else f"unlisted size: data.sizes does not list {list(record.size)}"
    still = record.kind == "image" or max(frames for frames, _, _ in data.sizes) == 1
    sizes = [size for size in data.sizes if (size[0] == 1) == still]
    if not sizes:
        return "no size for an image: data.sizes lists none of 1 frame"
    sizes = [size for size in sizes if size[1] <= record.height and size[2] <= record.width]
    if not sizes:
        return f"too small: {record.height} x {record.width} would have to be enlarged for every one of data.sizes"
    if record.kind == "video":
        shortest = min(frames for frames, _, _ in sizes)
        sizes = [size for size in sizes if covers(record.duration, frames=size[0], fps=data.fps)]
        if not sizes:
            return f"too short: {record.duration:.3f} s do not hold {shortest} frames at {data.fps:g} per second"

    def rank(size: Size) -> tuple[float, int, int]:
        frames, height, width = size
        return -abs(math.log((width * record.height) / (height * record.width))), frames, height * width

    return max(sizes, key=rank)


class Plan:
    """The order of training. ``records``' positions are the slots' indices.

    ``held_out``: slots of ``data.held_out`` clips chosen by a hash of seed and key, which no step trains on;
    ``held_out_plan``: the same in packs. ``dropped``: what cannot be used, and why. Raises ``ValueError`` if nothing is
    left.
    """

    def __init__(self, records: Sequence[Record], data: Data, *, seed: int, geometry: Geometry) -> None:
        self.records, self.seed, self.packs_per_step = records, seed, data.packs_per_step
        self.budget, self.clips = data.tokens_per_pack, dict[Size, Clip]()
        usable, dropped = dict[int, Size](), list[Defect]()
        for index, record in enumerate(records):
            size = self._size(record, data, geometry)
            if isinstance(size, str):
                dropped.append(Defect(record.key, record.source, size))
            else:
                usable[index] = size
        ranked = sorted(usable, key=lambda index: fold_seed(seed, "held out", records[index].key))
        held_out = sorted(ranked[: data.held_out])
        self.dropped = tuple(dropped)
        self.held_out = tuple(Slot(HELD_OUT, index, usable[index]) for index in held_out)
        self.training = {index: usable[index] for index in sorted(ranked[data.held_out :])}
        if not self.training:
            raise ValueError(self._nothing_left())
        self._pools: dict[tuple[bool, Size], list[int]] = {}
        for index, size in usable.items():
            self._pools.setdefault((index in self.training, size), []).append(index)
        self._marks, self._next, self._last_order = [_State()], (0, _State()), (-1, list[int]())
        packs, waiting = list[tuple[Slot, ...]](), list(self.held_out)
        while waiting:
            packs.append(self._cut(waiting))
        self.held_out_plan = self._describe(HELD_OUT, packs)

    def step(self, n: int) -> StepPlan:
        """The plan of step ``n`` >= 0, the same whatever was asked before."""
        if n < 0:
            raise ValueError(f"steps begin at 0, found {n}")
        mark = min(n // MARK, len(self._marks) - 1)
        begin, state = self._next if mark * MARK <= self._next[0] <= n else (mark * MARK, self._marks[mark])
        packs: list[tuple[Slot, ...]] = []
        for step in range(begin, n + 1):
            if step == MARK * len(self._marks):
                self._marks.append(state)
            packs, state = self._draw(state)
        self._next = (n + 1, state)
        return self._describe(n, packs)

    def substitutes(self, slot: Slot) -> list[int]:
        """What may take the place of a slot's clip: the others of its size, from the next on and round again."""
        pool = self._pools[slot.epoch != HELD_OUT, slot.size]
        place = bisect_right(pool, slot.index)
        return [*pool[place:], *pool[: place - 1]]

    def _size(self, record: Record, data: Data, geometry: Geometry) -> Size | str:
        size = assign_size(record, data)
        if isinstance(size, str):
            return size
        if size not in self.clips:
            self.clips[size] = geometry(size)
        tokens = self.clips[size].tokens
        if tokens > self.budget:
            return f"larger than a pack: {list(size)} takes {tokens} tokens, data.tokens_per_pack is {self.budget}"
        return size

    def _nothing_left(self) -> str:
        counts = Counter(defect.reason.split(":")[0] for defect in self.dropped)
        why = [f"{count} {reason}" for reason, count in counts.most_common()]
        why += [f"{len(self.held_out)} held out"] if self.held_out else []
        first = f"; first: {self.dropped[0].key}: {self.dropped[0].reason}" if self.dropped else ""
        return f"none of the {len(self.records)} samples is left to train on ({', '.join(why)}){first}"

    def _draw(self, state: _State) -> tuple[list[tuple[Slot, ...]], _State]:
        """One step's packs, and the state after them."""
        waiting, epoch, place = list(state.waiting), state.epoch, state.place
        packs: list[tuple[Slot, ...]] = []
        while len(packs) < self.packs_per_step:
            while len(waiting) < min(LOOK_AHEAD, len(self.training)):
                order = self._permutation(epoch)
                waiting += [Slot(epoch, index, self.training[index]) for index in order[place : place + LOOK_AHEAD]]
                place += LOOK_AHEAD
                if place >= len(order):
                    epoch, place = epoch + 1, 0
            packs.append(self._cut(waiting))
        return packs, _State(tuple(waiting), epoch, place)

    def _cut(self, waiting: list[Slot]) -> tuple[Slot, ...]:
        """Take a pack out of ``waiting``, from the first on whatever still fits; equal lengths lie side by side."""
        room, pack = self.budget, list[Slot]()
        for slot in list(waiting):
            if self.clips[slot.size].tokens <= room:
                room -= self.clips[slot.size].tokens
                pack.append(slot)
                waiting.remove(slot)
        return tuple(sorted(pack, key=lambda slot: (self.clips[slot.size].tokens, slot.size)))

    def _permutation(self, epoch: int) -> list[int]:
        if self._last_order[0] != epoch:
            indices = list(self.training)
            order = torch.randperm(len(indices), generator=fold(self.seed, "epoch", epoch)).tolist()
            self._last_order = epoch, [indices[i] for i in order]
        return self._last_order[1]

    def _describe(self, step: int, packs: Sequence[tuple[Slot, ...]]) -> StepPlan:
        sizes = [slot.size for pack in packs for slot in pack]
        return StepPlan(step, tuple(packs), len(sizes), sum(self.clips[size].vision for size in sizes))
