from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator

import av
import numpy as np
import pytest

from cogvideo_dist.data.decode import DecodeError, Probe, probe, probe_image, probe_packets
from cogvideo_dist.data.probing import Limits, Prober
from tests.data.clips import make_clip, make_image, make_sound

CLIP = make_clip(9, 8)
TALL = (64, 48)


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    prober = Prober()
    yield prober
    prober.close()


def with_b_frames() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24, options={"bf": "3", "g": "12"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        noise = np.random.default_rng(0)
        for _ in range(30):
            pixels = noise.integers(0, 255, (48, 64, 3), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def cut_by_an_edit(skip: int) -> bytes:
    """A copy of the packets whose first ``skip`` lie before time zero, so that an edit list leaves them out."""
    file = io.BytesIO()
    with av.open(io.BytesIO(with_b_frames()), "r") as source, av.open(file, "w", format="mp4") as output:
        old = source.streams.video[0]
        new = output.add_stream_from_template(old)
        for packet in source.demux(old):
            if packet.pts is not None and packet.dts is not None and packet.duration:
                packet.pts, packet.dts = packet.pts - skip * packet.duration, packet.dts - skip * packet.duration
                packet.stream = new
                output.mux(packet)
    return file.getvalue()


CLIPS = {
    "mp4": CLIP,
    "mkv": make_clip(40, 30, container="matroska"),
    "fragments": make_clip(40, 30, container="fmp4"),
    "vp9": make_clip(25, 24, container="webm", codec="libvpx-vp9"),
    "vp8": make_clip(25, 24, container="webm", codec="libvpx"),
    "turned": make_clip(9, 8, size=TALL, rotation=90),
    "upside down": make_clip(9, 8, rotation=180, container="mov"),
    "variable": make_clip(4, 25, milliseconds=[0, 100, 150, 1000]),
    "variable mkv": make_clip(5, 25, milliseconds=[0, 40, 500, 600, 1600], container="matroska"),
    "b frames": with_b_frames(),
    "edit": cut_by_an_edit(5),
    "one frame": make_clip(1, 8),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_packets_tell_what_decoding_finds(name: str) -> None:
    assert probe_packets(CLIPS[name]) == probe(CLIPS[name])


def test_an_edit_leaves_frames_out() -> None:
    assert probe(CLIPS["edit"]).frames < 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [None, 1, 3, 5, 6, 8])
def test_an_images_header_tells_what_decoding_finds(kind: str, exif: int | None) -> None:
    data = make_image(*TALL, kind=kind, exif=exif)
    assert probe_image(data, header=True) == probe_image(data)


@pytest.mark.parametrize(
    "data", [b"", b"<html></html>", make_sound(), CLIP[:300], b"ffconcat version 1.0\nfile a.mp4\n"]
)
def test_packets_of_what_is_no_clip_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        probe_packets(data)


def test_one_child_serves_many_looks(prober: Prober) -> None:
    expected = Probe(9, 8.0, 48, 64, 0)
    assert prober.probe(CLIP, kind="video") == expected
    child = prober.child
    assert prober.probe(CLIP, kind="video", decode=True) == expected
    assert prober.probe(make_image(), kind="image") == Probe(1, 0.0, 48, 64, 0)
    with pytest.raises(DecodeError, match="not a readable PNG") as error:
        prober.probe(CLIP, kind="image")
    assert error.value.code == "undecodable"
    assert prober.child is child


def test_a_child_that_dies_is_replaced(prober: Prober) -> None:
    prober.probe(CLIP, kind="video")
    assert prober.child is not None
    os.kill(prober.child.pid, signal.SIGSEGV)
    assert prober.probe(CLIP, kind="video").frames == 9


def test_what_takes_too_long_is_refused_after_two_children() -> None:
    prober = Prober(Limits(waiting=1e-3))
    with pytest.raises(DecodeError, match="ended the process twice .no answer in 0.001 s") as error:
        prober.probe(CLIP, kind="video")
    assert error.value.code == "kills the decoder"
    assert prober.child is None


def test_what_needs_too_much_memory_is_refused() -> None:
    prober = Prober(Limits(memory=2**24))
    with pytest.raises(DecodeError):
        prober.probe(make_clip(2, 8, size=(2048, 2048)), kind="video", decode=True)
    prober.close()


def test_a_child_starts_without_torch() -> None:
    code = "import sys, cogvideo_dist.data.probing as p, cogvideo_dist.data.indexing; sys.exit('torch' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
