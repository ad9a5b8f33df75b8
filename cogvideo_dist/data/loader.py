"""Reads what the plan says, a sample at a time and packs ahead, and puts batches together."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cogvideo_dist.config.schema import Data
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.decode import CENTER, Place
from cogvideo_dist.data.index import Record
from cogvideo_dist.data.plan import HELD_OUT, Plan
from cogvideo_dist.data.pool import Loaded, Memory, Pool, Reads, Task
from cogvideo_dist.data.reading import Array, Cut
from cogvideo_dist.data.shards import DataError, ShardReader
from cogvideo_dist.data.storage import Store
from cogvideo_dist.pack.layout import PackLayout
from cogvideo_dist.protocols import Batch, Defect, Geometry, Sample, Slot, StepPlan, TooManyDefects
from cogvideo_dist.rng import fold

AHEAD = 4
"""Packs that are read ahead for every worker, as far as memory goes."""

RATE_SLACK = 0.01
"""Of a source's frame rate: 23.976 frames per second pass for 24."""

DTYPES = {
    "U8": (torch.uint8, np.uint8), "F64": (torch.float64, np.float64), "F32": (torch.float32, np.float32),
    "F16": (torch.float16, np.float16), "BF16": (torch.bfloat16, np.int16),
}  # fmt: skip
"""What arrays are stored in: torch's type, and numpy's of the same width."""


def open_sources(data: Data, *, check: bool = True) -> tuple[Catalog, list[Store]]:
    """The samples of all of a run's sources, and where the bytes of each are; one process's ``check`` of all shards will do."""
    readers = [ShardReader(source.shards, data.remote, check=check) for source in data.all_sources]
    return Catalog([reader.records for reader in readers]), [reader.store for reader in readers]


def readers(stores: Sequence[Store], data: Data) -> Reads | Pool:
    """Who reads from ``stores``: as many workers as ``data`` says, or this process itself."""
    if not data.workers:
        return Reads(stores)
    return Pool(stores, workers=data.workers, memory=int(data.memory_gb * 2**30))


def read_ahead(reads: Reads | Pool, tasks: Iterable[Task], *, ahead: int = AHEAD) -> Iterator[Loaded | DataError]:
    """What each task gives, in their order; the next ones are read meanwhile. Errors of the storage and of workers raise."""
    coming, asked = iter(tasks), deque[int]()
    while True:
        while len(asked) < ahead and (task := next(coming, None)) is not None:
            asked.append(reads.submit(task))
        if not asked:
            return
        try:
            yield reads.result(asked.popleft())
        except DataError as error:
            yield error


def to_sample(loaded: Loaded, record: Record, *, slot: Slot) -> Sample:
    """What was read, as tensors in the memory that it was read to."""
    tensors = {name: tensor_of(array, loaded.memory) for name, array in loaded.content.arrays.items()}
    return Sample(slot, record.key, record.source, loaded.content.caption, **tensors)


def tensor_of(array: Array, memory: Memory) -> Tensor:
    """A view of an array."""
    dtype, plain = DTYPES[array.dtype]
    size = math.prod(array.shape) * dtype.itemsize
    # shaped by numpy: torch's views let go of the interpreter's lock, and then wait for it
    found = torch.from_numpy(memory[array.offset : array.offset + size].view(plain).reshape(array.shape))
    return found if found.dtype == dtype else found.view(dtype)


def frame_rate(record: Record, slot: Slot, *, data: Data, seed: int) -> float:
    """Frames per second at which a slot's clip is read (``Data.other_fps``)."""
    rates = [data.fps, *(rate for rate in data.other_fps if rate <= record.fps * (1 + RATE_SLACK))]
    if slot.epoch == HELD_OUT or len(rates) == 1:
        return data.fps
    return rates[int(torch.randint(len(rates), (), generator=fold(seed, "fps", slot.epoch, slot.index)))]


def place_of(slot: Slot, *, data: Data, seed: int) -> Place:
    """Where a slot's clip is cut: drawn for every visit, or its beginning and middle.

    It is the slot's, so a substitute is cut as the clip would have been.
    """
    if slot.epoch == HELD_OUT or data.crop == "center":
        return CENTER
    return Place(*torch.rand(3, generator=fold(seed, "crop", slot.epoch, slot.index), dtype=torch.float64).tolist())


def dealt(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The packs of every rank: in each micro-step packs of like cost, and over all of them like sums."""
    order = sorted(range(len(costs)), key=lambda pack: -costs[pack])
    totals, mine = [0] * ranks, [list[int]() for _ in range(ranks)]
    for begin in range(0, len(order), ranks):
        least = sorted(range(ranks), key=totals.__getitem__)
        for pack, rank in zip(order[begin : begin + ranks], least):
            mine[rank].append(pack)
            totals[rank] += costs[pack]
    return mine


def check_ranks(packs_per_step: int, dp_size: int) -> None:
    """Refuse a number of data-parallel ranks over which a step's packs do not divide."""
    if packs_per_step % dp_size:
        sizes = ", ".join(str(size) for size in range(1, packs_per_step + 1) if packs_per_step % size == 0)
        raise ValueError(
            f"data.packs_per_step {packs_per_step} does not divide over {dp_size} data-parallel ranks; "
            f"numbers of ranks that do: {sizes}"
        )


class _Read(NamedTuple):
    """A sample that is being read, and the ticket for it."""

    record: Record
    ticket: int


class _Asked(NamedTuple):
    """A pack that is being read."""

    plan: StepPlan
    pack: int
    reads: list[_Read]


class Loader:
    """The batches of data-parallel rank ``dp_rank`` of ``dp_size``: of every step those packs that ``dealt`` gives it.

    A clip whose bytes are damaged is replaced and listed in its batch's ``defects``. Errors of the storage and of the workers
    raise. ``stores``: of the plan's sources.
    """

    def __init__(
        self, plan: Plan, stores: Sequence[Store], *, data: Data, geometry: Geometry, dp_rank: int, dp_size: int
    ) -> None:
        check_ranks(data.packs_per_step, dp_size)
        self.plan, self.stores, self.data, self.geometry = plan, stores, data, geometry
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._reads: Reads | Pool | None = None

    @property
    def reads(self) -> Reads | Pool:
        """Who reads, from the first time that something is asked for."""
        if self._reads is None:
            self._reads = readers(self.stores, self.data)
            weakref.finalize(self, self._reads.close)
        return self._reads

    def close(self) -> None:
        """End the workers."""
        if self._reads is not None:
            self._reads.close()
            self._reads = None

    @property
    def micro_steps(self) -> int:
        """Batches of a step on every rank."""
        return self.plan.packs_per_step // self.dp_size

    def iterate(self, first_step: int, *, steps: int | None = None) -> Iterator[Batch]:
        """All micro-steps of ``first_step``, then those of the next, for so many ``steps`` or without end."""
        numbers = count(first_step) if steps is None else range(first_step, first_step + steps)
        return self._batches(
            (plan, pack)
            for plan in map(self.plan.step, numbers)
            for pack in dealt(plan.costs, self.dp_size)[self.dp_rank]
        )

    @property
    def held_out_count(self) -> int:
        """Batches that ``held_out_batches`` yields on this rank; ranks may differ by one."""
        return len(range(self.dp_rank, len(self.plan.held_out_plan.packs), self.dp_size))

    @property
    def held_out_rounds(self) -> int:
        """The largest ``held_out_count`` of all ranks."""
        return -(-len(self.plan.held_out_plan.packs) // self.dp_size)

    def held_out_batches(self) -> Iterator[Batch]:
        """This rank's packs of the held-out clips: every ``dp_size``-th, beginning and middle of each clip."""
        return self.held_out_batches_of(self.dp_rank)

    def held_out_batches_of(self, dp_rank: int) -> Iterator[Batch]:
        """What ``held_out_batches`` yields on another rank."""
        plan = self.plan.held_out_plan
        return self._batches((plan, pack) for pack in range(dp_rank, len(plan.packs), self.dp_size))

    def _batches(self, wanted: Iterable[tuple[StepPlan, int]]) -> Iterator[Batch]:
        coming, asked = iter(wanted), deque[_Asked]()
        ahead = 1 + AHEAD * self.data.workers
        try:
            while True:
                while len(asked) < ahead and (following := next(coming, None)) is not None:
                    plan, pack = following
                    asked.append(_Asked(plan, pack, self._ask([(slot, slot.index) for slot in plan.packs[pack]])))
                if not asked:
                    return
                yield self._batch(asked.popleft())
        finally:
            if self._reads is not None:
                self._reads.discard(read.ticket for pack in asked for read in pack.reads)

    def _ask(self, wanted: Sequence[tuple[Slot, int]]) -> list[_Read]:
        """Have slots' clips read, or others in their place."""
        tasks = []
        for slot, index in wanted:
            record, (source, _) = self.plan.catalog[index], self.plan.catalog.find(index)
            fps = frame_rate(record, slot, data=self.data, seed=self.plan.seed)
            place = place_of(slot, data=self.data, seed=self.plan.seed)
            tasks.append(Task(source, record, Cut(slot.size, fps, place, self.data.empty_captions)))
        return [_Read(task.record, ticket) for task, ticket in zip(tasks, self.reads.submit_all(tasks))]

    def _batch(self, asked: _Asked) -> Batch:
        slots, samples, defects = asked.plan.packs[asked.pack], list[Sample](), list[Defect]()
        for slot, read in zip(slots, asked.reads):
            sample, failed = self._sample(slot, read)
            samples.append(sample)
            defects += (Defect(e.key, e.source, e.reason, sample.key, e.code) for e in failed)
        layout = PackLayout(tuple(self.geometry(slot.size) for slot in slots))
        first = sum(map(len, asked.plan.packs[: asked.pack]))
        return Batch(asked.plan, asked.pack, first, layout, tuple(samples), tuple(defects))

    def _sample(self, slot: Slot, read: _Read) -> tuple[Sample, list[DataError]]:
        """The slot's clip or, if its bytes are at fault, the first of its substitutes whose bytes are not."""
        failed = list[DataError]()
        others: Iterator[int] | None = None
        while True:
            try:
                return to_sample(self.reads.result(read.ticket), read.record, slot=slot), failed
            except DataError as error:
                failed.append(error)
            others = others or self.plan.substitutes(slot)
            other = next(others, None)
            if other is None:
                raise TooManyDefects(
                    f"none of the {len(failed)} clips of size {list(slot.size)} can be read; the first: {failed[0]}"
                )
            (read,) = self._ask([(slot, other)])
