"""Tiny real clips whose frames carry their index as brightness, and folders of shards made of them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cogvideo_dist.config.schema import Data, Size
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.data.sources import find_sources, take_in
from cogvideo_dist.data.writing import write_shards
from cogvideo_dist.pack.layout import Clip

STEP = 6
"""Brightness between neighbouring frames."""


def make_clip(
    frames: int = 24,
    fps: float = 8,
    *,
    size: tuple[int, int] = (48, 64),
    container: str = "mp4",
    codec: str = "libx264",
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
) -> bytes:
    """Frame i has brightness ``STEP * i``; ``milliseconds``: every frame's own time; "fmp4": an MP4 in fragments."""
    file = io.BytesIO()
    fragments = {"movflags": "frag_keyframe+empty_moov"} if container == "fmp4" else {}
    with av.open(file, "w", format=container.removeprefix("f"), options=fragments) as output:
        stream = cast(av.VideoStream, output.add_stream(codec, rate=Fraction(fps)))
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.thread_count = *size, "yuv420p", 1
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), STEP * index, np.uint8), format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def make_sound() -> bytes:
    """An MP4 file without a video stream."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def make_image(height: int = 48, width: int = 64, *, kind: str = "PNG", exif: int | None = None) -> bytes:
    """Red falls from top to bottom, green from left to right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(height)[:, None], np.arange(width)[None]
    file, tags = io.BytesIO(), Image.Exif()
    if exif is not None:
        tags[0x0112] = exif
    Image.fromarray(pixels).save(file, kind, exif=tags)
    return file.getvalue()


def indices(pixels: Tensor | NDArray[np.uint8]) -> list[int]:
    """The index that every frame of [T, H, W, 3] carries."""
    return [round(brightness / STEP) for brightness in np.asarray(pixels).mean((1, 2, 3)).tolist()]


def add(folder: Path, name: str, content: bytes, caption: str | bytes | None = "A caption.") -> None:
    """Put videos/... or images/... and its label into ``folder``."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        label = (folder / "labels" / Path(name).relative_to(Path(name).parts[0])).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def make_shards(folder: Path, contents: Iterable[tuple[str, bytes]]) -> ShardReader:
    """A reader of shards, in ``folder``/shards, of files given as (name, bytes)."""
    for name, content in contents:
        add(folder / "source", name, content, f"This is {name}.")
    write_shards(folder / "shards", take_in(find_sources(folder / "source")), max_shard_size=20_000)
    return ShardReader(folder / "shards")


class _Geometry:
    """4 text tokens, and 16 x 16 pixels to a patch."""

    def __call__(self, size: Size) -> Clip:
        frames, height, width = size
        return Clip(4, ((frames - 1) // 4 + 1, height // 16, width // 16))

    def cost(self, clip: Clip) -> float:
        return clip.tokens + clip.tokens**2 / 50


geometry = _Geometry()


def settings(**changes: object) -> Data:
    values = {
        "shards": "shards", "source": "pixels", "sizes": ((5, 32, 48), (9, 48, 64), (1, 48, 64)), "fps": 8.0,
        "tokens_per_pack": 100, "packs_per_step": 4, "workers": 0,
    }  # fmt: skip
    return Data(**{**values, **changes})  # type: ignore[arg-type]
