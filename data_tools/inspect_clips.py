"""What only the bytes of samples tell: captions with their tokens, and pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.data.decode import DecodeError, Place
from cogvideo_dist.data.loader import tensor_of
from cogvideo_dist.data.pool import Pool, Reads, Task
from cogvideo_dist.data.reading import Cut, read_caption
from cogvideo_dist.data.shards import DataError
from cogvideo_dist.models.text import check_tokenizer
from cogvideo_dist.protocols import Defect
from data_tools.inspect_set import Inspected, evenly

PICTURES, SIDE = 48, 160
"""Samples on the contact sheet, and the longer side of a picture in pixels."""

BATCH = 256
MIDDLE = Place(0.5, 0.5, 0.5)

Track = Callable[[Sequence[int], str], Iterable[int]]
"""(places, what is done) -> the same places, shown as progress."""


@dataclass(frozen=True)
class Captions:
    """Tokens of captions by the sample's place, and the longest that is not cut.

    ``read``: captions that were read; ``defects``: those that cannot be; ``note``: why there are no tokens.
    """

    tokens: dict[int, int]
    limit: int | None
    read: int
    defects: tuple[Defect, ...]
    note: str = ""

    @property
    def cut(self) -> list[int]:
        """Places of those that are cut."""
        return [] if self.limit is None else [place for place, count in self.tokens.items() if count > self.limit]


@dataclass(frozen=True)
class Picture:
    """A sample to look at; ``jpeg``: its centre frame, none where it cannot be decoded."""

    place: int
    key: str
    source: str
    caption: str
    size: tuple[int, int, int]
    jpeg: bytes
    defect: str = ""


def stored_tokens(found: Inspected, places: NDArray[np.integer]) -> dict[int, int]:
    """Of encoded samples, which carry them in their origins."""
    columns = [index.origin_numbers("caption_tokens") for index in found.catalog.indexes]
    tokens = np.concatenate(columns)[places]
    known = ~np.isnan(tokens)
    return dict(zip(places[known].tolist(), tokens[known].astype(int).tolist()))


def read_captions(found: Inspected, places: NDArray[np.integer], *, most: int | None, track: Track) -> Captions:
    """Of at most ``most`` samples evenly spaced among ``places`` (None: of all)."""
    limit = found.text_length
    if found.data.source == "latents":
        return Captions(stored_tokens(found, places), limit, 0, ())
    tokenizer, note = _tokenizer(found)
    chosen = evenly(places, len(places) if most is None else most).tolist()
    tokens, defects = dict[int, int](), list[Defect]()
    coming = iter(track(chosen, "captions"))
    while batch := list(islice(coming, BATCH)):
        texts: dict[int, str] = {}
        for place in batch:
            record, store = found.catalog[place], found.stores[found.catalog.find(place)[0]]
            try:
                texts[place] = read_caption(store, record, allow_empty=found.data.empty_captions)
            except DecodeError as error:
                defects.append(Defect(record.key, record.source, str(error), code=error.code))
            except DataError as error:
                defects.append(Defect(error.key, error.source, error.reason, code=error.code))
        if tokenizer is not None and texts:
            tokens |= zip(texts, map(len, tokenizer(list(texts.values()), verbose=False).input_ids))
    return Captions(tokens, limit, len(chosen), tuple(defects), note)


def pictures(found: Inspected, places: NDArray[np.integer], *, track: Track) -> list[Picture]:
    """Of samples evenly spaced among ``places``; latents have none."""
    if found.data.source == "latents":
        return []
    chosen = evenly(places, PICTURES).tolist()
    reads: Reads | Pool = Reads(found.stores)
    if found.data.workers:
        memory = int(found.data.memory_gb * 2**30)
        reads = Pool(found.stores, workers=found.data.workers, memory=memory)
    try:
        tickets = [reads.submit(_task(found, place)) for place in chosen]
        return [_picture(found, place, reads, ticket) for place, ticket in zip(track(chosen, "pictures"), tickets)]
    finally:
        reads.close()


def _tokenizer(found: Inspected) -> tuple[Any, str]:
    """That of frozen.text, or none and the reason."""
    if isinstance(found.config, VAERun) or found.config.frozen.text is None:
        return None, "no text encoder"
    words = Path(found.config.frozen.text) / "tokenizer"
    try:
        check_tokenizer(words)
    except ValueError as error:
        return None, f"tokens were not counted: {error}"
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(words, local_files_only=True), ""


def _task(found: Inspected, place: int) -> Task:
    """The whole picture in the middle of a sample, as small as it is shown."""
    record = found.catalog[place]
    scale = min(1.0, SIDE / max(record.height, record.width))
    height, width = (max(1, round(side * scale)) for side in (record.height, record.width))
    return Task(found.catalog.find(place)[0], record, Cut((1, height, width), found.data.fps, MIDDLE, True))


def _picture(found: Inspected, place: int, reads: Reads | Pool, ticket: int) -> Picture:
    record = found.catalog[place]
    about = (place, record.key, record.source)
    size = (record.frames, record.height, record.width)
    try:
        loaded = reads.result(ticket)
    except DataError as error:
        return Picture(*about, "", size, b"", error.reason)
    file = io.BytesIO()
    frame = tensor_of(loaded.content.arrays["pixels"], loaded.memory)[0].numpy()
    Image.fromarray(frame).save(file, "JPEG", quality=82)
    return Picture(*about, loaded.content.caption, size, file.getvalue())
