"""One sample's bytes -> arrays, in memory that somebody else owns. Needs no torch, so that a worker starts at once.

What is random about a sample (where the cut begins) is decided by who asks for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Size
from cogvideo_dist.data.decode import CENTER, DecodeError, Place, decode_image, decode_video
from cogvideo_dist.data.index import Record
from cogvideo_dist.data.shards import DataError, caption_in, find_member, read_member_into
from cogvideo_dist.data.storage import Store

ALIGN = 64
MAX_MEMBER = 512 * 2**20
"""Bytes of a member above which it is refused, whatever it holds."""

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
"""What latents, text features and pixels (``U8``) may be stored in, and bytes of a number."""

LARGEST = {"mean": 1e3, "logvar": 1e3, "text": 1e5}
"""Magnitudes of what encoders give that are far beyond any. A posterior's logarithm of the variance is cut to [-30, 20] in use,
and T5's features are below a hundred."""


class Array(NamedTuple):
    """An array in an arena: its kind (one of ``DTYPES``), shape and first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class ArenaFull(Exception):
    """More bytes are needed than the arena has; ``needed``: at least how many in all."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class Arena:
    """Memory that is given out from its beginning on."""

    def __init__(self, memory: memoryview) -> None:
        self.memory, self.used = memory, 0

    def take(self, size: int) -> tuple[memoryview, int]:
        """``size`` bytes and where they begin."""
        begin = -(-self.used // ALIGN) * ALIGN
        if begin + size > len(self.memory):
            raise ArenaFull(begin + size)
        self.used = begin + size
        return self.memory[begin : self.used], begin


@dataclass(frozen=True)
class Content:
    """What a sample holds: arrays by name (``pixels``; or ``mean``, ``logvar`` and ``text``, and perhaps ``image``), and its
    caption."""

    caption: str
    arrays: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """What is wanted of a sample: its size, frames per second, and where the cut is. ``allow_empty``: a caption may be empty,
    or missing. ``captioned``: whether the caption is wanted at all."""

    size: Size
    fps: float
    place: Place = CENTER
    allow_empty: bool = False
    captioned: bool = True


def read_content(
    store: Store, record: Record, *, arena: Arena, cut: Cut, decoding: Callable[[], None] = lambda: None
) -> Content:
    """A sample, its arrays in ``arena``; ``decoding`` is called when its bytes have been read.

    Raises ``DataError`` if its bytes do not hold what is wanted, ``ArenaFull``, and ``OSError`` for what is wrong with the
    storage.
    """
    try:
        for extension, member in record.members.items():
            if member.size > MAX_MEMBER:
                raise DecodeError(
                    f"{extension}: {member.size} bytes are more than the {MAX_MEMBER} that are read", "too large"
                )
        if record.kind == "latent":
            return _latent(store, record, arena, size=cut.size)
        caption = read_caption(store, record, allow_empty=cut.allow_empty) if cut.captioned else ""
        return Content(caption, {"pixels": read_pixels(store, record, arena=arena, cut=cut, decoding=decoding)})
    except DecodeError as error:
        raise DataError(record.key, record.source, str(error), error.code) from None


def expected_bytes(record: Record, size: Size) -> int:
    """How much memory a sample takes at a size."""
    if record.kind == "latent":
        return sum(member.size + ALIGN for name, member in record.members.items() if name.endswith("safetensors"))
    return math.prod(size) * 3 + ALIGN


def caption_member(record: Record) -> str:
    """Which of the members holds the caption."""
    return record.caption.partition(":")[0]


def media_extension(record: Record) -> str:
    """Which of the members is the video or image."""
    others = ("txt", "json", caption_member(record))
    return next((extension for extension in record.members if extension not in others), record.kind)


def read_caption(store: Store, record: Record, *, allow_empty: bool = False) -> str:
    """Raises ``DecodeError`` for bytes that are no caption, ``DataError`` for bytes that are damaged."""
    extension = caption_member(record)
    if extension not in record.members and allow_empty:
        return ""
    return caption_in(bytes(_bytes(store, record, extension)), record.caption, allow_empty=allow_empty)


def _bytes(store: Store, record: Record, extension: str) -> bytearray:
    data = bytearray(find_member(record, extension))
    read_member_into(store, record, extension=extension, out=memoryview(data))
    return data


def read_pixels(
    store: Store, record: Record, *, arena: Arena, cut: Cut, decoding: Callable[[], None] = lambda: None
) -> Array:
    """A video's or an image's pixels, uint8 [T, H, W, 3]; errors as in ``read_caption``."""
    data = bytes(_bytes(store, record, media_extension(record)))
    decoding()
    shape = (*cut.size, 3)
    memory, offset = arena.take(math.prod(shape))
    pixels = np.frombuffer(memory, np.uint8).reshape(shape)
    if record.kind == "image":
        decode_image(data, pixels, place=cut.place)
    else:
        decode_video(data, pixels, fps=cut.fps, place=cut.place)
    return Array("U8", shape, offset)


def _latent(store: Store, record: Record, arena: Arena, *, size: Size) -> Content:
    arrays: dict[str, Array] = {}
    for extension in ("latent.safetensors", "text.safetensors"):
        memory, offset = arena.take(find_member(record, extension))
        read_member_into(store, record, extension=extension, out=memory)
        arrays |= tensors_in(memory, offset)
    check_latent({name: array.shape for name, array in arrays.items()}, size)
    for name, array in arrays.items():
        if (array.dtype == "U8") != (name == "image"):
            raise DecodeError(f"tensor {name} is stored as {array.dtype}", "wrong tensors")
        if name in LARGEST:
            check_values(arena.memory, array, name=f"{record.shard}:{record.key}: {name}", most=LARGEST[name])
    caption = caption_member(record)
    return Content(read_caption(store, record, allow_empty=True) if caption in record.members else "", arrays)


def check_values(memory: memoryview, array: Array, *, name: str, most: float) -> None:
    """Refuse numbers that are not finite, or are larger than ``most``: no autoencoder or text encoder makes such.

    Without the sign, the bits of floats are in the order of their values, infinities and NaN above all, so one look at integers
    of any width does.
    """
    width = DTYPES[array.dtype]
    bits = np.frombuffer(memory, f"u{width}", math.prod(array.shape), array.offset)
    largest = int((bits & np.array(2 ** (8 * width - 1) - 1, bits.dtype)).max(initial=0))
    infinite = _bits(math.inf, array.dtype)
    if largest <= min(_bits(most, array.dtype), infinite - 1):
        return
    what = "not finite" if largest >= infinite else f"larger than {most:g}"
    raise DecodeError(f"{name} holds numbers that are {what}; encode the clip again", "wrong values")


def _bits(value: float, dtype: str) -> int:
    """Of a positive number, as an integer; what is beyond a type's range is infinite in it."""
    if dtype == "BF16":
        return int(np.float32(value).view(np.uint32)) >> 16
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]
    with np.errstate(over="ignore"):
        return int(np.array(value, kind).view(f"u{DTYPES[dtype]}"))


def check_latent(shapes: Mapping[str, Sequence[int]], size: Size) -> None:
    """Refuse shapes of tensors that are not those of an encoded clip of ``size``; its first frame may be among them."""
    frames, height, width = size
    if set(shapes) - {"image"} != {"mean", "logvar", "text"}:
        raise DecodeError(f"expected tensors mean, logvar and text, found {', '.join(sorted(shapes))}", "wrong tensors")
    mean, logvar, text = (tuple(shapes[name]) for name in ("mean", "logvar", "text"))
    if tuple(shapes.get("image", (height, width, 3))) != (height, width, 3):
        raise DecodeError(f"the first frame of {list(size)} has the shape {list(shapes['image'])}", "wrong tensors")
    expected = ((frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL)
    if len(mean) != 4 or mean[1:] != expected or logvar != mean or len(text) != 2:
        raise DecodeError(
            f"a clip of {list(size)} has mean and logvar of [C, {', '.join(map(str, expected))}] and text of [L, dim], found "
            f"{list(mean)}, {list(logvar)} and {list(text)}",
            "wrong tensors",
        )


def tensors_in(memory: memoryview, offset: int) -> dict[str, Array]:
    """Where the tensors of a safetensors file lie that was read to ``memory``, which begins at ``offset``.

    As safetensors specifies it: eight bytes of the header's length, the header in JSON, and the tensors' bytes.
    """
    try:
        length = int.from_bytes(memory[:8], "little")
        header = json.loads(bytes(memory[8 : 8 + length]))
        begin, found = 8 + length, dict[str, Array]()
        for name, about in header.items():
            if name != "__metadata__":
                found[name] = _tensor(about, begin=begin, room=len(memory) - begin, offset=offset)
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DecodeError(
            f"not a readable safetensors file ({type(error).__name__}: {error})", "wrong tensors"
        ) from None


def _tensor(about: Any, *, begin: int, room: int, offset: int) -> Array:
    first, last = about["data_offsets"]
    shape = tuple(about["shape"])
    if not all(type(n) is int and n >= 0 for n in (first, last, *shape)) or about["dtype"] not in DTYPES:
        raise ValueError(f"{about['dtype']} of {list(shape)}")
    if (
        last > room
        or last - first != math.prod(shape) * DTYPES[about["dtype"]]
        or (offset + begin + first) % DTYPES[about["dtype"]]
    ):
        raise ValueError(f"{list(shape)} at {first} to {last} of {room} bytes")
    return Array(about["dtype"], shape, offset + begin + first)
