"""One line for every sample that is not used as it is: what is dropped, cut, cropped, scaled, padded, and captions at fault.

Decided for columns of the index, some ten thousand rows at a time; no sample is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.data.decode import TICK
from cogvideo_dist.data.index import KIND_NAMES, Member, Record
from cogvideo_dist.data.loader import RATE_SLACK
from cogvideo_dist.data.sizes import LARGE
from cogvideo_dist.evaluation.media import replacing
from data_tools.inspect_clips import Captions
from data_tools.inspect_set import LATENT, Bools, Inspected

LINT = "lint.jsonl"
CHUNK = 2**15

REMARKS = {
    "dropped": "it has no size, or cannot be read",
    "cut in time": "seconds at its end that no visit at data.fps shows at once",
    "cropped": "share of its pixels that the crop leaves out",
    "scaled down": "factor of height and width",
    "frames left out": "its frames per second are above data.fps",
    "frames repeated": "its frames per second are below data.fps",
    "padded": "latent frames that are put before it to make whole patches",
    "caption too long": "its tokens, more than the text encoder takes",
    "caption empty": "",
    "caption duplicated": "samples that have the same caption, byte by byte",
}
"""What is remarked, and what the number beside it is."""

Seen = Callable[[int], None]


class Lint:
    """The remarks on all samples but those ``left_out`` by their score. ``captions``: those whose tokens are known."""

    def __init__(self, found: Inspected, *, captions: Captions | None, left_out: Bools | None) -> None:
        self.found, self.left_out = found, left_out
        self.long = np.zeros(len(found.catalog), np.int32)
        if captions is not None:
            for place in captions.cut:
                self.long[place] = captions.tokens[place]
        self.alike = duplicates(found)
        self.reasons: dict[tuple[Any, ...], str] = {}
        self.counts: Counter[str] = Counter()
        self.samples = 0

    def write(self, folder: Path, seen: Seen) -> None:
        """``lint.jsonl``: a line per sample with remarks. ``seen`` is told how many samples were looked at."""
        with replacing(folder / LINT) as temporary, temporary.open("w", encoding="utf-8") as file:
            for begin in range(0, len(self.found.catalog), CHUNK):
                places = np.arange(begin, min(begin + CHUNK, len(self.found.catalog)))
                file.writelines(self._lines(places))
                seen(len(places))

    def _lines(self, places: NDArray[np.int64]) -> Iterator[str]:
        remarks: dict[int, list[str]] = {}
        for name, chosen, values in self._remarks(places):
            self.counts[name] += len(chosen)
            label = "reason" if name == "dropped" else "value"
            for place, value in zip(chosen.tolist(), values):
                text = f'{{"remark": "{name}", "{label}": {json.dumps(value)}}}'
                remarks.setdefault(place, []).append(text)
        self.samples += len(remarks)
        order = sorted(remarks)
        for place, key, source in zip(order, *(texts(self.found, order, column=name) for name in ("key", "source"))):
            yield f'{{"key": {json.dumps(key)}, "source": {json.dumps(source)}, "remarks": [{", ".join(remarks[place])}]}}\n'

    def _remarks(self, places: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64], Sequence[Any]]]:
        """(remark, places, a value each)."""
        found, data = self.found, self.found.data
        if self.left_out is not None:
            places = places[~self.left_out[places]]
        empty = found.columns["caption_length"][places] == 0
        refused = empty & (data.source == "pixels" and not data.empty_captions)
        sized = found.found[places] >= 0
        without, unread = places[~sized], places[sized & refused]
        yield "dropped", without, self._reasons(without)
        yield "dropped", unread, ["caption empty: data.empty_captions is off"] * len(unread)
        yield "caption empty", places[empty & ~refused], [0] * int((empty & ~refused).sum())
        places = places[sized & ~refused]
        fate = found.fates(places)
        ratio = np.nan_to_num(fate.fps / data.fps, nan=1.0)
        padding = np.array([found.padded_frames(size) for size in data.sizes])[found.found[places]]
        for name, wrong, values in (
            ("cut in time", fate.lost > TICK, fate.lost.round(3)),
            ("cropped", fate.kept < 1, (1 - fate.kept).round(4)),
            ("scaled down", fate.scale < 1, fate.scale.round(4)),
            ("frames left out", ratio > 1 + RATE_SLACK, fate.fps.round(3)),
            ("frames repeated", ratio < 1 - RATE_SLACK, fate.fps.round(3)),
            ("padded", padding > 0, padding),
            ("caption too long", self.long[places] > 0, self.long[places]),
            ("caption duplicated", self.alike[places] > 1, self.alike[places]),
        ):
            yield name, places[wrong], values[wrong].tolist()

    def _reasons(self, places: NDArray[np.int64]) -> list[str]:
        """Why samples have no size; alike ones are asked for once."""
        found, names = self.found, ("kind", "frames", "fps", "height", "width")
        columns = [found.columns[name][places].tolist() for name in names]
        numbers, sizes = found.found[places].tolist(), map(tuple, found.catalog.sizes[places].tolist())
        reasons = []
        for place, number, *facts in zip(places.tolist(), numbers, sizes, *columns):
            # a sample larger than a pack is refused in the words of its size alone
            key = (number, int(found.free[place])) if number == LARGE else (number, *facts)
            if key not in self.reasons:
                if len(self.reasons) > CHUNK:
                    self.reasons.clear()
                self.reasons[key] = found.sizing.reason(_record(*facts), number)
            reasons.append(self.reasons[key])
        return reasons


def _record(size: Any, kind: int, *facts: Any) -> Record:
    """A sample of which nothing else is known: its frames, fps, height and width."""
    frames, fps, height, width = facts
    return Record(
        "any", "", "any.tar", KIND_NAMES[kind], {"any": Member(0, 0, "0" * 32)}, frames, fps, height, width,
        caption_length=0, size=size if kind == LATENT else None,
    )  # fmt: skip


def texts(found: Inspected, places: Sequence[int], *, column: str) -> Iterator[str]:
    """A column of text at ascending places."""
    starts = found.catalog.starts
    wanted = np.array(places, np.int64)
    for index, first, last in zip(found.catalog.indexes, starts, starts[1:]):
        mine = wanted[(wanted >= first) & (wanted < last)] - first
        if len(mine):
            yield from index.table.column(column).take(mine).to_pylist()


def duplicates(found: Inspected) -> NDArray[np.int64]:
    """Of every sample how many have its caption, itself among them; 1 where the index does not tell, or it is empty."""
    known = np.flatnonzero(found.members.known & (found.columns["caption_length"] > 0))
    sums = found.members.captions[known]
    order = np.lexsort((sums[:, 0], sums[:, 1]))
    fresh = np.append(True, (np.diff(sums[order], axis=0) != 0).any(1))[: len(order)]
    group = np.cumsum(fresh) - 1
    alike = np.ones(len(found.catalog), np.int64)
    alike[known[order]] = np.bincount(group)[group] if len(order) else 1
    return alike


def judged(found: Inspected, captions: Captions | None) -> str:
    """How far remarks on captions reach."""
    unknown = int((~found.members.known).sum())
    notes = [f"{unknown} captions, which lie among other facts, were not compared"] if unknown else []
    if found.data.source == "pixels" and not isinstance(found.config, VAERun):
        counted = len(captions.tokens) if captions is not None else 0
        notes.insert(0, f"tokens of {counted} captions were counted (--captions all: of every one)")
    return "; ".join(notes)
