"""The samples of a training configuration, in columns: what they are, and what is done to each to bring it to a legal size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import TEMPORAL, Data, DiTRun, Size
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import KIND_NAMES, Index
from cogvideo_dist.data.loader import open_sources
from cogvideo_dist.data.sizes import Sizing
from cogvideo_dist.data.storage import Store
from cogvideo_dist.protocols import Geometry
from launch.compose import LatentGeometry, TransformerGeometry

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

VIDEO, LATENT = KIND_NAMES.index("video"), KIND_NAMES.index("latent")


def load_run(files: Sequence[str], overrides: Sequence[str]) -> DiTRun | VAERun:
    """A configuration of either class; of one that is neither, the error of what it is nearer to."""
    try:
        return load_config(DiTRun, files, overrides=overrides)
    except ConfigError as error:
        try:
            return load_config(VAERun, files, overrides=overrides)
        except ConfigError as other:
            texts = [*overrides, *(Path(file).read_text(errors="replace") for file in files if Path(file).is_file())]
            raise (error if any("preset" in text for text in texts) else other) from None


class Fate(NamedTuple):
    """What becomes of each of some samples that have a size: seconds that are cut off, the share of pixels that the crop keeps,
    the scale of height and width, and frames per second before and after (NaN where there is no video)."""

    lost: Floats
    kept: Floats
    scale: Floats
    fps: Floats


class Members(NamedTuple):
    """Of every sample its bytes, the checksum of its caption as two numbers, and whether that is of the caption alone."""

    bytes: NDArray[np.int64]
    captions: NDArray[np.uint64]
    known: Bools


@dataclass(frozen=True)
class Inspected:
    """A configuration with its samples."""

    config: DiTRun | VAERun
    catalog: Catalog
    stores: Sequence[Store]

    @classmethod
    def open(cls, config: DiTRun | VAERun) -> Inspected:
        return cls(config, *open_sources(config.data))

    @property
    def data(self) -> Data:
        return self.config.data

    @cached_property
    def geometry(self) -> Geometry:
        if isinstance(self.config, VAERun):
            return LatentGeometry()
        return TransformerGeometry(self.config.model.transformer())

    @property
    def text_length(self) -> int | None:
        """Tokens to which captions are cut."""
        return None if isinstance(self.config, VAERun) else self.config.model.transformer().text_length

    @cached_property
    def sizing(self) -> Sizing:
        return Sizing(self.data, [self.geometry(size).tokens for size in self.data.sizes])

    @cached_property
    def found(self) -> NDArray[np.int16]:
        """Position of every sample's size, or a negative number that tells why it has none."""
        return self.sizing.assign(self.catalog)

    @cached_property
    def free(self) -> NDArray[np.int16]:
        """As ``found``, whatever a pack may hold."""
        return Sizing(self.data, [0] * len(self.data.sizes)).assign(self.catalog)

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Numbers of all samples by name."""
        names = ("kind", "frames", "fps", "height", "width", "caption_length")
        return {name: self.catalog.column(name) for name in names}

    @cached_property
    def members(self) -> Members:
        parts = [members_of(index) for index in self.catalog.indexes]
        return Members(*(np.concatenate(column) for column in zip(*parts)))

    @cached_property
    def durations(self) -> Floats:
        """Seconds of every sample, zero for what is no video; a latent of one frame is none."""
        frames, fps = self.columns["frames"], self.columns["fps"]
        return np.divide(frames, fps, out=np.zeros(len(frames)), where=(fps > 0) & (frames > 1))

    def padded_frames(self, size: Size) -> int:
        """Latent frames that are put before a clip to make whole patches."""
        if isinstance(self.config, VAERun):
            return 0
        frames = (size[0] - 1) // TEMPORAL + 1
        return -frames % self.config.model.transformer().patch[0]

    def fates(self, places: NDArray[np.integer]) -> Fate:
        """Of the samples at ``places``, which all have a size."""
        kind, frames, fps, height, width = (
            self.columns[name][places] for name in ("kind", "frames", "fps", "height", "width")
        )
        size = np.array(self.data.sizes)[self.found[places]]
        raw, video = kind != LATENT, kind == VIDEO
        scale = np.where(raw, np.maximum(size[:, 1] / height, size[:, 2] / width), 1.0)
        whole = size[:, 1].astype(np.int64) * width == size[:, 2].astype(np.int64) * height
        area = size[:, 1] * size[:, 2] / (scale**2 * height * width)
        lost = np.zeros(len(places))
        np.subtract(np.divide(frames, fps, out=lost, where=video), size[:, 0] / self.data.fps, out=lost, where=video)
        return Fate(
            np.maximum(lost, 0.0),
            np.where(whole | ~raw, 1.0, area),
            scale,
            np.where(video & (size[:, 0] > 1), fps, np.nan),
        )


def members_of(index: Index) -> Members:
    """Read off the index's table, whose rows hold lists of members."""
    import pyarrow.compute as pc

    column = index.table.column("members")
    lists = column.chunk(0) if column.num_chunks else column.combine_chunks()
    inner, count = lists.values, len(index)
    rows = np.repeat(np.arange(count), np.diff(lists.offsets.to_numpy(zero_copy_only=True)))
    sizes: Any = np.bincount(rows, weights=inner.field("size").to_numpy(zero_copy_only=True), minlength=count)
    names = json.loads(index.table.schema.metadata[b"extensions"])
    sums, known = np.zeros((count, 2), np.uint64), np.zeros(count, bool)
    if "txt" in names:
        texts = inner.field("extension").to_numpy(zero_copy_only=True) == names.index("txt")
        sums[rows[texts]] = np.frombuffer(inner.field("checksum").buffers()[1], np.uint64).reshape(-1, 2)[texts]
        alone = pc.equal(index.table.column("caption"), "txt").to_numpy()
        known[rows[texts]] = alone[rows[texts]]
    return Members(sizes.astype(np.int64), sums, known)


def evenly(places: NDArray[np.integer], count: int) -> NDArray[np.integer]:
    """At most ``count`` of them, the first and the last among these."""
    if len(places) <= count:
        return places
    return places[np.linspace(0, len(places) - 1, count).round().astype(np.int64)]


class Histogram(NamedTuple):
    """Counts between neighbouring edges."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: NDArray[Any], *, whole: bool = False) -> Histogram:
        """At most 40 columns whose width is 1, 2 or 5 times a power of ten; none for no values. ``whole``: of whole numbers."""
        if not len(values):
            return cls([], [])
        low, high = float(values.min()), float(values.max())
        rough = max((high - low) / 40, 1.0 if whole else 1e-3)
        power = 10.0 ** np.floor(np.log10(rough))
        width = float(next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9)))
        first = np.floor(low / width)
        edges = (first + np.arange(int(np.floor(high / width) - first) + 2)) * width
        return cls(edges.round(9).tolist(), np.histogram(values, edges)[0].tolist())
