"""Videos and images for people: mp4, png, gif and contact sheets.

Frames are uint8 [T, H, W, 3], images uint8 [H, W, 3]. A file appears whole or not at all.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image, ImageFont

X264 = {"crf": "18", "x264-params": "cpu-independent=1"}
MARGIN, GAP, LINE = 16, 4, 18
"""Contact sheet: around the sheet and between rows, between frames, and the height of a line of text; pixels."""
INK, PAPER = (30, 30, 30), (255, 255, 255)


def to_uint8(video: Tensor) -> Tensor:
    """Video [3, T, H, W] in [-1, 1] -> frames uint8 [T, H, W, 3] on the CPU; values outside are clipped."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"a video must be [3, T, H, W], found {list(video.shape)}")
    if not video.isfinite().all():
        raise ValueError("the video holds NaN or infinite values; the model that made it has diverged")
    frames = (video.detach().float().clamp(-1, 1) + 1) * 127.5
    return frames.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def write_mp4(path: str | Path, frames: Tensor, fps: float) -> None:
    """Write H.264 (yuv420p, crf 18), which every browser plays; frames uint8 [T, H, W, 3] of even height and width."""
    import av

    _check_frames(frames)
    _check_fps(fps)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"{path}: H.264 in yuv420p needs an even height and width, found {height} x {width}; crop by one pixel"
        )
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=dict(X264))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1  # and cpu-independent: the same frames give the same bytes anywhere
        for frame in frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_png(path: str | Path, image: Tensor) -> None:
    """Write one image, uint8 [H, W, 3]."""
    if image.ndim != 3:
        raise ValueError(f"an image must be [H, W, 3], found {list(image.shape)}")
    _save_png(path, _pictures(image[None])[0])


def write_contact_sheet(
    path: str | Path, rows: Sequence[tuple[str, Tensor]], *, columns: int = 8, cell: int = 160
) -> None:
    """Write a ``contact_sheet`` as a png."""
    _save_png(path, contact_sheet(rows, columns=columns, cell=cell))


def contact_sheet(rows: Sequence[tuple[str, Tensor]], *, columns: int = 8, cell: int = 160) -> Image.Image:
    """One image of several clips: for each (label, frames) its label, then at most ``columns`` evenly spaced frames.

    Frames are scaled so that their longer side is ``cell`` pixels; the first and the last frame are always shown.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    if columns < 1 or cell < 1:
        raise ValueError(f"a contact sheet needs columns and cell of at least 1, found {columns} and {cell}")
    font = ImageFont.load_default(size=LINE - 4)
    width = 2 * MARGIN + columns * (cell + GAP) - GAP
    prepared = [
        (wrap(label, font, width=width - 2 * MARGIN), thumbnails(frames, columns, cell)) for label, frames in rows
    ]
    heights = [LINE * len(lines) + GAP + shown[0].height + MARGIN for lines, shown in prepared]
    sheet = Image.new("RGB", (width, MARGIN + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for (lines, shown), height in zip(prepared, heights):
        for index, line in enumerate(lines):
            draw.text((MARGIN, top + index * LINE), line, fill=INK, font=font)
        for index, picture in enumerate(shown):
            sheet.paste(picture, (MARGIN + index * (picture.width + GAP), top + len(lines) * LINE + GAP))
        top += height
    return sheet


def gif_bytes(frames: Tensor, fps: float) -> bytes:
    """An endless animated gif of frames uint8 [T, H, W, 3], each with its own palette, for image summaries.

    A gif counts time in 1/100 s and viewers slow down what is faster than 50 frames/s, so ``fps`` is met nearly.
    """
    from PIL import Image

    _check_fps(fps)
    pictures = [picture.quantize(256, method=Image.Quantize.MEDIANCUT) for picture in _pictures(frames)]
    milliseconds = 10 * max(2, round(100 / fps))
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=False
    )
    return buffer.getvalue()


def thumbnails(frames: Tensor, count: int, size: int) -> list[Image.Image]:
    """At most ``count`` evenly spaced frames, scaled to a longer side of ``size`` pixels."""
    from PIL import Image

    _check_frames(frames)
    total, height, width = frames.shape[:3]
    chosen = torch.linspace(0, total - 1, min(count, total)).round().long()
    scale = size / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    return [picture.resize(shape, Image.Resampling.BICUBIC) for picture in _pictures(frames[chosen])]


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, width: int) -> list[str]:
    """The lines of ``text`` broken between words so that each fits ``width`` pixels."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(joined) > width:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` (whose folder is made), which takes its place if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_png(path: str | Path, picture: Image.Image) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def _pictures(frames: Tensor) -> list[Image.Image]:
    from PIL import Image

    _check_frames(frames)
    return [Image.fromarray(frame.cpu().numpy()) for frame in frames]


def _check_frames(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] and not empty, found {frames.dtype} {list(frames.shape)}; "
            "to_uint8 makes them"
        )


def _check_fps(fps: float) -> None:
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps must be above 0, found {fps}")
