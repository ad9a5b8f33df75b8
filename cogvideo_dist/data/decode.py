"""Bytes of a clip or an image -> pixels of a legal size, on the clip's own timeline.

Frames are chosen by time, not by count: frame i is the one that shows at ``t0 + i / fps``. So the motion has its true
speed for any source rate, and for variable ones. All pixels are uint8 [T, H, W, 3] RGB, as displayed (turned upright).
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]

TICK = COVER_TICK = 1e-3
"""Seconds by which a stored timestamp may be off: Matroska rounds to whole milliseconds."""

MAX_PIXELS = 2**24
"""Largest frame or image that is decoded; above it a file is refused by its header."""

DEMUXERS = "mov,matroska"
"""The only containers that are opened: a playlist under a video's name could make the library fetch other files."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""Orientations in which height and width change places."""


class DecodeError(ValueError):
    """Bytes that do not hold what was asked of them; the same for everyone who reads them. ``code``: of which kind the defect
    is."""

    def __init__(self, reason: str, code: str = "undecodable") -> None:
        super().__init__(reason)
        self.code = code


class Place(NamedTuple):
    """Where a cut begins in time, from the top and from the left, each a share in [0, 1) of the room that there is."""

    start: float
    top: float
    left: float


CENTER = Place(0.0, 0.5, 0.5)
"""A clip's beginning, and the middle of its frames."""


class Probe(NamedTuple):
    """What decoding found. ``height`` and ``width`` as displayed; ``frames / fps`` is the duration; an image has fps 0.

    ``rotation``: degrees counterclockwise that the container or EXIF asks for, already applied here.
    """

    frames: int
    fps: float
    height: int
    width: int
    rotation: int


class Moment(NamedTuple):
    """When a frame begins to show, and for how long by its container (0: unknown), in seconds."""

    start: float
    length: float


def covers(duration: float, *, frames: int, fps: float) -> bool:
    """Whether a clip of ``duration`` seconds still shows at the last of ``frames`` moments 1 / fps apart."""
    return (frames - 1) / fps <= duration - TICK


def probe(data: bytes) -> Probe:
    """Decode a whole clip and say what is in it; raises ``DecodeError`` where any of it cannot be decoded."""
    moments: list[Moment] = []
    with _opened(data) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        height, width, rotation = 0, 0, 0
        for frame in _frames(_packets(container, stream)):
            if not moments:
                height, width, rotation = _displayed(frame)
            elif _displayed(frame) != (height, width, rotation):
                raise DecodeError(f"the picture changes its size at frame {len(moments)}")
            moments.append(_moment(frame))
        if not moments:
            raise DecodeError("no frame of the video can be decoded")
        duration = _duration(moments, stream.average_rate)
    return Probe(len(moments), len(moments) / duration, height, width, rotation)


def probe_packets(data: bytes | memoryview) -> Probe:
    """As ``probe``, but only the first frame is decoded, and the others are known by the container's timestamps.

    Equal to ``probe`` for a clip all of whose packets can be decoded to one frame each; damage behind the first frame goes
    unseen.
    """
    with _opened(data) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = list(_packets(container, stream))
        first = next(_frames(packets), None)
        if first is None:
            raise DecodeError("no frame of the video can be decoded")
        begin = _moment(first).start
        moments = [moment for moment in map(_moment, packets) if moment.start >= begin]
        duration = _duration(moments, stream.average_rate)
    return Probe(len(moments), len(moments) / duration, *_displayed(first))


def decode_video(data: bytes | memoryview, pixels: Pixels, *, fps: float, place: Place = CENTER) -> None:
    """Fill ``pixels``, uint8 [frames, height, width, 3], with frames 1 / fps apart.

    A frame shows until the next begins, so a source slower than ``fps`` repeats frames, and no other does. Raises
    ``DecodeError`` for damage, for a clip that is too short, and where a frame would have to be enlarged.
    """
    frames = len(pixels)
    with _opened(data) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = list(_packets(container, stream))
        previous, times, end, done = None, [math.inf] * frames, math.inf, 0
        for frame in _frames(packets):
            moment = _moment(frame)
            if previous is None:
                moments = [m for m in map(_moment, packets) if m.start >= moment.start]
                length = _duration(moments, stream.average_rate)
                times = _times(moment.start, length, frames=frames, fps=fps, start=place.start)
                end = moment.start + length
            else:
                done = _show(previous, pixels, done=done, upto=moment.start, times=times, place=place)
            previous = frame
            if done == frames:
                return
        if previous is not None:
            done = _show(previous, pixels, done=done, upto=end + TICK, times=times, place=place)
        if done < frames:
            raise DecodeError(f"only {done} of the {frames} frames that are needed can be decoded", "too few frames")


def probe_image(data: bytes | memoryview, *, header: bool = False) -> Probe:
    """Decode an image and say what is in it: one frame. ``header``: its pixels are not looked at."""
    image, orientation = _image(data, load=not header)
    sideways = header and orientation in SIDEWAYS
    height, width = (image.width, image.height) if sideways else (image.height, image.width)
    return Probe(1, 0.0, height, width, {3: 180, 6: -90, 8: 90}.get(orientation, 0))


def decode_image(data: bytes | memoryview, pixels: Pixels, *, place: Place = CENTER) -> None:
    """Fill ``pixels``, uint8 [1, height, width, 3]; transparency is shown on white. Errors and place as for a clip."""
    image, _ = _image(data)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    height, width = pixels.shape[1:3]
    box = _box((image.height, image.width), (height, width), place)
    pixels[0] = _scaled(image.convert("RGB"), (height, width), box)


def _opened(data: bytes | memoryview) -> av.container.InputContainer:
    try:
        container = av.open(
            io.BytesIO(data), mode="r", metadata_errors="replace", options={"format_whitelist": DEMUXERS}
        )
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(f"not a readable MP4, MOV, MKV or WebM file ({_plain(error)})") from None
    if not container.streams.video:
        container.close()
        raise DecodeError("no video stream, or the part of the file that describes it is cut off")
    context = container.streams.video[0].codec_context
    if context is None:
        container.close()
        raise DecodeError("the video's codec is unknown")
    _check_pixels(context.width, context.height)
    return container


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are decoded", "too large")


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets that hold data, then the empty one that flushes the decoder."""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise DecodeError("the file is cut short or damaged")
            yield packet
    except av.error.FFmpegError as error:
        raise DecodeError(f"the file is damaged ({_plain(error)})") from None


def _frames(packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    try:
        for packet in packets:
            for frame in packet.decode():
                if not isinstance(frame, av.VideoFrame) or frame.is_corrupt:
                    raise DecodeError("a frame is damaged")
                if frame.pts is None:
                    raise DecodeError("a frame has no timestamp")
                yield frame
    except av.error.FFmpegError as error:
        raise DecodeError(f"the video stream cannot be decoded ({_plain(error)})") from None


def _plain(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _moment(item: av.VideoFrame | av.Packet) -> Moment:
    """Packets that show nothing (the flush, those before an edit's beginning) are before every frame."""
    if item.pts is None or item.time_base is None or (isinstance(item, av.Packet) and item.is_discard):
        return Moment(-math.inf, 0.0)
    # a product of fractions costs five times as much
    ticks, second = item.time_base.numerator, item.time_base.denominator
    return Moment(item.pts * ticks / second, (item.duration or 0) * ticks / second)


def _duration(moments: Sequence[Moment], rate: Fraction | None) -> float:
    """Seconds from the first frame's beginning to the last one's end.

    Where the stated rate agrees with the timestamps, it tells the last frame's length better than a rounded timestamp.
    """
    first, last = min(moments), max(moments)
    span = last.start - first.start
    if rate and abs(span - float((len(moments) - 1) / rate)) <= TICK:
        return float(len(moments) / rate)
    length = last.length or (span / (len(moments) - 1) if len(moments) > 1 else 0.0)
    if span + length <= 0:
        raise DecodeError("the video has no duration")
    return span + length


def _times(origin: float, duration: float, *, frames: int, fps: float, start: float) -> list[float]:
    room = duration - TICK - (frames - 1) / fps
    if room < -1e-6:  # rounding of frames / fps
        raise DecodeError(f"lasts {duration:.3f} s, too short for {frames} frames at {fps:g} per second", "too short")
    return [origin + start * max(room, 0.0) + i / fps for i in range(frames)]


def _show(frame: av.VideoFrame, pixels: Pixels, *, done: int, upto: float, times: Sequence[float], place: Place) -> int:
    """Write ``frame`` at every moment from ``done`` on that lies before ``upto``; the number written so far."""
    stop = done
    while stop < len(times) and times[stop] + TICK < upto:
        stop += 1
    if stop > done:
        picture = np.rot90(_colours(frame), _displayed(frame)[2] // 90)
        height, width = pixels.shape[1:3]
        box = _box((picture.shape[0], picture.shape[1]), (height, width), place)
        if (box.tall, box.wide) == (height, width):  # nothing to scale: straight from the decoder's memory
            pixels[done:stop] = picture[box.top : box.top + height, box.left : box.left + width]
        else:
            pixels[done:stop] = _scaled(Image.fromarray(np.ascontiguousarray(picture)), (height, width), box)
    return stop


def _colours(frame: av.VideoFrame) -> Pixels:
    """RGB [height, width, 3] in memory of the library, whose lines may be longer than the picture is wide."""
    plane = frame.reformat(format="rgb24", threads=1).planes[0]
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return lines[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def _displayed(frame: av.VideoFrame) -> tuple[int, int, int]:
    """(height, width, rotation) of a frame as shown."""
    if frame.rotation % 90:
        raise DecodeError(f"asks to be rotated by {frame.rotation} degrees; only quarter turns can be shown")
    turned = frame.rotation % 180 != 0
    return (frame.width, frame.height, frame.rotation) if turned else (frame.height, frame.width, frame.rotation)


def _image(data: bytes | memoryview, *, load: bool = True) -> tuple[Image.Image, int]:
    """An image as shown, or as stored where it is not to ``load``; and the orientation that its EXIF data gives it."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        _check_image(image)
        if load:
            image.load()
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        return (ImageOps.exif_transpose(image) if load else image), orientation
    except UnidentifiedImageError:
        raise DecodeError("not a readable PNG, JPEG or WebP file") from None
    except DecodeError:
        raise
    # what Pillow raises for bytes that it cannot make sense of, in pixels or in EXIF data
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error, Image.DecompressionBombError) as error:
        raise DecodeError(f"the image is damaged ({error})") from None


def _check_image(image: Image.Image) -> None:
    _check_pixels(*image.size)
    # a phone's JPEG may carry previews as further frames (MPO); its first is the picture
    if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:
        raise DecodeError("an animation, not an image; store it as a video")
    if image.mode[0] in "IF":
        raise DecodeError(f"pixels of mode {image.mode}; convert it to 8 bits per channel")


class _Box(NamedTuple):
    """What of a picture is used, in its pixels."""

    top: int
    left: int
    tall: float
    wide: float


def _box(found: tuple[int, int], size: tuple[int, int], place: Place) -> _Box:
    """The largest part of a picture of (height, width) ``found`` that has the shape of ``size``."""
    (height, width), (_, top, left) = size, place
    scale = max(height / found[0], width / found[1])
    if scale > 1:
        raise DecodeError(
            f"{found[0]} x {found[1]} pixels would have to be enlarged to {height} x {width}", "too small"
        )
    tall, wide = min(height / scale, found[0]), min(width / scale, found[1])
    # whole source pixels, so that a crop without scaling copies pixels
    return _Box(int(top * (int(found[0] - tall) + 1)), int(left * (int(found[1] - wide) + 1)), tall, wide)


def _scaled(image: Image.Image, size: tuple[int, int], box: _Box) -> Pixels:
    """A part of an image scaled down (antialiased bicubic), in one resampling -> uint8 [height, width, 3]."""
    edges = (box.left, box.top, box.left + box.wide, box.top + box.tall)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=edges))
