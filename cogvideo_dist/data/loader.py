"""Reads what the plan says, one pack at a time, in worker processes that know nothing but what they are asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Data
from cogvideo_dist.data.decode import Crop, DecodeError, decode_image, decode_video
from cogvideo_dist.data.plan import HELD_OUT, Plan
from cogvideo_dist.data.shards import KINDS, DataError, Record, ShardReader, caption_of
from cogvideo_dist.pack.layout import PackLayout
from cogvideo_dist.protocols import Batch, Defect, Geometry, Sample, Slot, StepPlan
from cogvideo_dist.rng import fold

TIMEOUT = 120
"""Seconds after which a worker that delivers nothing is given up, and the run with it."""

RATE_SLACK = 0.01
"""Of a source's frame rate: 23.976 frames per second pass for 24."""

Read = tuple[tuple[Sample, ...], tuple[Defect, ...]]


def read_sample(reader: ShardReader, record: Record, *, slot: Slot, seed: int, fps: float, crop: Crop) -> Sample:
    """One clip at the slot's size; raises ``DataError`` if its bytes do not hold that.

    Start and crop are drawn from (seed, slot's epoch and index), so a substitute is cut as the clip would have been.
    """
    try:
        if record.kind == "latent":
            return _latent_sample(reader, record, slot)
        caption = read_caption(reader, record)
        pixels = read_pixels(reader, record, slot=slot, seed=seed, fps=fps, crop=crop)
        return Sample(slot, record.key, record.source, caption, pixels=pixels)
    except (DecodeError, SafetensorError) as error:
        raise DataError(record.key, record.source, str(error)) from None


def read_caption(reader: ShardReader, record: Record) -> str:
    """Raises ``DecodeError`` for bytes that are no caption, ``DataError`` for bytes that are damaged."""
    return caption_of(reader.read(record, "txt"))


def media_extension(record: Record) -> str:
    """Which of the members is the video or image."""
    return next((ext for ext in record.members if KINDS.get(ext) == record.kind), record.kind)


def read_pixels(reader: ShardReader, record: Record, *, slot: Slot, seed: int, fps: float, crop: Crop) -> Tensor:
    """The clip's pixels at the slot's size, uint8 [T, H, W, 3]; errors as in ``read_caption``."""
    data = reader.read(record, media_extension(record))
    generator = fold(seed, "crop", slot.epoch, slot.index)
    frames, height, width = slot.size
    if record.kind == "image":
        return decode_image(data, size=(height, width), generator=generator, crop=crop)
    return decode_video(data, fps=fps, frames=frames, size=(height, width), generator=generator, crop=crop)


def _latent_sample(reader: ShardReader, record: Record, slot: Slot) -> Sample:
    moments, features = load(reader.read(record, "latent.safetensors")), load(reader.read(record, "text.safetensors"))
    frames, height, width = slot.size
    expected = ((frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL)
    if set(moments) != {"mean", "logvar"} or set(features) != {"text"}:
        raise DecodeError(f"expected tensors mean, logvar and text, found {', '.join([*moments, *features])}")
    mean, logvar, text = moments["mean"], moments["logvar"], features["text"]
    if mean.dim() != 4 or tuple(mean.shape[1:]) != expected or logvar.shape != mean.shape or text.dim() != 2:
        raise DecodeError(
            f"a clip of {list(slot.size)} has mean and logvar of [C, {', '.join(map(str, expected))}] and text of "
            f"[L, dim], found {list(mean.shape)}, {list(logvar.shape)} and {list(text.shape)}"
        )
    caption = caption_of(reader.read(record, "txt")) if "txt" in record.members else ""
    return Sample(slot, record.key, record.source, caption, mean=mean, logvar=logvar, text=text)


class _Packs(Dataset[Read]):
    """The slots of a pack -> its samples: a function without state, so any worker may evaluate it."""

    def __init__(self, plan: Plan, reader: ShardReader, data: Data) -> None:
        self.plan, self.reader, self.data = plan, reader, data

    def __getitem__(self, slots: tuple[Slot, ...]) -> Read:
        samples, defects = zip(*map(self._read, slots))
        return samples, sum(defects, ())

    def _read(self, slot: Slot) -> tuple[Sample, tuple[Defect, ...]]:
        """The slot's clip or, if its bytes are at fault, the first of its substitutes whose bytes are not."""
        crop: Crop = "center" if slot.epoch == HELD_OUT else self.data.crop
        failed: list[DataError] = []
        for index in (slot.index, *self.plan.substitutes(slot)):
            record = self.plan.records[index]
            try:
                fps = frame_rate(record, slot, data=self.data, seed=self.plan.seed)
                sample = read_sample(self.reader, record, slot=slot, seed=self.plan.seed, fps=fps, crop=crop)
            except DataError as error:
                failed.append(error)
            else:
                return sample, tuple(Defect(e.key, e.source, e.reason, replaced_by=sample.key) for e in failed)
        raise ValueError(
            f"none of the {len(failed)} clips of size {list(slot.size)} can be read; the first: {failed[0]}"
        )


def frame_rate(record: Record, slot: Slot, *, data: Data, seed: int) -> float:
    """Frames per second at which a slot's clip is read (``Data.other_fps``)."""
    rates = [data.fps, *(rate for rate in data.other_fps if rate <= record.fps * (1 + RATE_SLACK))]
    if slot.epoch == HELD_OUT or len(rates) == 1:
        return data.fps
    return rates[int(torch.randint(len(rates), (), generator=fold(seed, "fps", slot.epoch, slot.index)))]


def check_ranks(packs_per_step: int, dp_size: int) -> None:
    """Refuse a number of data-parallel ranks over which a step's packs do not divide."""
    if packs_per_step % dp_size:
        sizes = ", ".join(str(size) for size in range(1, packs_per_step + 1) if packs_per_step % size == 0)
        raise ValueError(
            f"data.packs_per_step {packs_per_step} does not divide over {dp_size} data-parallel ranks; "
            f"numbers of ranks that do: {sizes}"
        )


class Loader:
    """The batches of data-parallel rank ``dp_rank`` of ``dp_size``: pack ``micro * dp_size + dp_rank`` of every step.

    A clip whose bytes are damaged is replaced and listed in its batch's ``defects``. Errors of the storage, a worker
    that dies and one that delivers nothing for ``TIMEOUT`` seconds raise.
    """

    def __init__(
        self, plan: Plan, reader: ShardReader, *, data: Data, geometry: Geometry, dp_rank: int, dp_size: int
    ) -> None:
        check_ranks(data.packs_per_step, dp_size)
        self.plan, self.geometry, self.workers = plan, geometry, data.workers
        self.packs = _Packs(plan, reader, data)
        self.dp_rank, self.dp_size = dp_rank, dp_size

    @property
    def micro_steps(self) -> int:
        """Batches of a step on every rank."""
        return self.plan.packs_per_step // self.dp_size

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """Batches without end: all micro-steps of ``first_step``, then those of the next."""
        return self._batches(
            (plan, pack) for plan in map(self.plan.step, count(first_step)) for pack in self._mine(plan)
        )

    @property
    def held_out_count(self) -> int:
        """Batches that ``held_out_batches`` yields on this rank; ranks may differ by one."""
        return len(self._mine(self.plan.held_out_plan))

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

    def _mine(self, plan: StepPlan) -> range:
        return range(self.dp_rank, len(plan.packs), self.dp_size)

    def _batches(self, wanted: Iterable[tuple[StepPlan, int]]) -> Iterator[Batch]:
        asked: deque[tuple[StepPlan, int]] = deque()

        def keys() -> Iterator[tuple[Slot, ...]]:
            for plan, pack in wanted:
                asked.append((plan, pack))
                yield plan.packs[pack]

        results: DataLoader[Read] = DataLoader(
            self.packs,
            sampler=keys(),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            timeout=TIMEOUT if self.workers else 0,
            worker_init_fn=_one_thread,
            collate_fn=_as_it_is,
            generator=fold(self.plan.seed, "workers"),  # or the global generator would be drawn from
        )
        for samples, defects in _delivered(results):
            plan, pack = asked.popleft()
            layout = PackLayout(tuple(self.geometry(slot.size) for slot in plan.packs[pack]))
            yield Batch(plan, pack, sum(map(len, plan.packs[:pack])), layout, samples, defects)


def _delivered(results: Iterable[Read]) -> Iterator[Read]:
    """``results``; a worker that died while it handed one over is an error like any other dead worker."""
    try:
        yield from results
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"a data worker exited unexpectedly while it handed over a pack ({error!r})") from error


def _as_it_is(read: Any) -> Any:
    """The default would turn tuples into lists."""
    return read


def _one_thread(worker: int) -> None:
    """Workers share the cores among themselves already."""
    torch.set_num_threads(1)
