from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideo_dist.data.decode import CENTER, DecodeError, Pixels, Place, decode_image, decode_video, probe, probe_image
from cogvideo_dist.data.sizes import covered
from cogvideo_dist.rng import fold
from tests.data.clips import indices, make_clip, make_image, make_sound


def decode(
    data: bytes, *, frames: int, fps: float = 8, size: tuple[int, int] = (48, 64), seed: int | None = None
) -> Tensor:
    pixels = np.empty((frames, *size, 3), np.uint8)
    decode_video(data, pixels, fps=fps, place=CENTER if seed is None else drawn(seed))
    return torch.from_numpy(pixels)


def drawn(seed: int) -> Place:
    return Place(*torch.rand(3, generator=fold(seed), dtype=torch.float64).tolist())


def image(data: bytes, place: Place = CENTER, *, size: tuple[int, int] = (48, 64)) -> Tensor:
    pixels: Pixels = np.empty((1, *size, 3), np.uint8)
    decode_image(data, pixels, place=place)
    return torch.from_numpy(pixels)


def shown_at(starts: list[float], times: list[float]) -> list[int]:
    """The plain definition: the last frame that began by then."""
    return [max(i for i, start in enumerate(starts) if start <= time + 1e-9) for time in times]


@pytest.mark.parametrize("rate", [8, 12, 24, 30])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_are_those_that_show_at_the_wanted_rate(rate: int, container: str) -> None:
    wanted = shown_at([i / rate for i in range(40)], [i / 8 for i in range(9)])
    assert indices(decode(make_clip(40, rate, container=container), frames=9)) == wanted


def test_a_rate_of_thirty_gives_the_known_frames() -> None:
    assert indices(decode(make_clip(40, 30), frames=9)) == [0, 3, 7, 11, 15, 18, 22, 26, 30]


def test_rounded_timestamps_do_not_shift_a_frame() -> None:
    clip = make_clip(40, 30, container="matroska")
    assert indices(decode(clip, fps=15, frames=17)) == list(range(0, 34, 2))


def test_a_slower_source_repeats_only_what_its_rate_demands() -> None:
    assert indices(decode(make_clip(12, 4), frames=9)) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_rate_follows_the_timestamps(container: str) -> None:
    milliseconds = [0, 40, 80, 120, 500, 540, 600, 900, 1100, 1600]
    clip = make_clip(10, 25, milliseconds=milliseconds, container=container)
    wanted = shown_at([ms / 1000 for ms in milliseconds], [i / 8 for i in range(13)])
    assert indices(decode(clip, frames=13)) == wanted


@pytest.mark.parametrize("seed", range(4))
def test_a_random_start_moves_the_whole_timeline(seed: int) -> None:
    clip = make_clip(40, 30)
    start = torch.rand(3, generator=fold(seed), dtype=torch.float64)[0].item() * (40 / 30 - 4 / 8 - 1e-3)
    wanted = shown_at([i / 30 for i in range(40)], [start + 1e-3 + i / 8 for i in range(5)])
    assert indices(decode(clip, frames=5, seed=seed)) == wanted
    assert start > 0


def test_every_start_that_fits_is_used() -> None:
    clip = make_clip(8, 8)
    starts = {indices(decode(clip, frames=5, seed=seed))[0] for seed in range(40)}
    assert starts == {0, 1, 2, 3}


def test_the_last_frame_counts_for_its_whole_length() -> None:
    assert indices(decode(make_clip(9, 8), frames=9, seed=1)) == list(range(9))
    with pytest.raises(DecodeError, match=r"lasts 1.000 s, too short for 9 frames at 8 per second"):
        decode(make_clip(8, 8), frames=9)


@pytest.mark.parametrize("rate", [8, 12, 23, 30])
def test_the_planner_and_the_decoder_agree_on_what_fits(rate: int) -> None:
    for frames in range(10, 14):
        clip = make_clip(frames, rate, container="matroska")
        found = probe(clip)
        for needed in (1, 2, 5, 9, 13):
            if covered(np.array([found.frames / found.fps]), frames=needed, fps=8)[0]:
                assert len(decode(clip, frames=needed, seed=needed)) == needed
            else:
                with pytest.raises(DecodeError, match="too short"):
                    decode(clip, frames=needed)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("mov", "libx264"), ("webm", "libvpx-vp9"), ("matroska", "ffv1")]
)
def test_probe_counts_frames_and_their_rate(container: str, codec: str) -> None:
    assert probe(make_clip(25, 24, container=container, codec=codec)) == (25, 24.0, 48, 64, 0)


def test_probe_of_a_variable_rate_gives_the_true_duration() -> None:
    found = probe(make_clip(4, 25, milliseconds=[0, 100, 150, 1000]))
    assert found.frames == 4
    assert found.frames / found.fps >= 1.0


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("container", ["mp4", "fmp4", "matroska"])
def test_a_clip_cut_short_is_never_read_as_a_whole_one(cut: float, container: str) -> None:
    clip = make_clip(40, 8, container=container)
    short = clip[: int(cut * len(clip))]
    with pytest.raises(DecodeError):
        decode(short, frames=37)
    with contextlib.suppress(DecodeError):
        assert probe(short).frames < 40


@pytest.mark.parametrize("data", [b"", b"<html></html>", bytes(4096), b"#EXTM3U\nfile:///etc/passwd\n", make_image()])
def test_what_is_no_clip_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a readable MP4"):
        probe(data)


def test_a_file_without_a_picture_is_refused() -> None:
    with pytest.raises(DecodeError, match="no video stream"):
        probe(make_sound())


def test_rotation_is_applied() -> None:
    frames = make_clip(9, 8, size=(64, 48), rotation=90)
    assert probe(frames) == (9, 8.0, 48, 64, 90)
    assert decode(frames, frames=9).shape == (9, 48, 64, 3)


def test_an_odd_resolution_is_cropped_to_the_legal_size() -> None:
    pixels = decode(make_clip(9, 8, size=(50, 102)), frames=9, size=(48, 64), seed=3)
    assert pixels.shape == (9, 48, 64, 3)
    assert indices(pixels) == list(range(9))


def test_nothing_is_enlarged() -> None:
    with pytest.raises(DecodeError, match="48 x 64 pixels would have to be enlarged to 64 x 64"):
        decode(make_clip(9, 8), frames=9, size=(64, 64))


def test_an_image_of_the_size_keeps_its_pixels() -> None:
    pixels = image(make_image(), drawn(0))
    assert pixels.shape == (1, 48, 64, 3)
    assert torch.equal(pixels[0, :, 0, 0], torch.arange(48, dtype=torch.uint8))
    assert torch.equal(pixels[0, 0, :, 1], torch.arange(64, dtype=torch.uint8))


def test_crops_move_in_whole_pixels_over_all_that_there_is() -> None:
    data = make_image(48, 70)
    lefts = set()
    for seed in range(60):
        row = image(data, drawn(seed))[0, 0, :, 1].int()
        assert torch.equal(row, torch.arange(64, dtype=torch.int32) + row[0])
        lefts.add(row[0].item())
    assert lefts == set(range(7))
    assert image(data)[0, 0, 0, 1] == 3


def test_scaling_down_is_antialiased() -> None:
    checks = np.indices((96, 128)).sum(0) % 2 * 255
    file = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    pixels = image(png(file)).int()
    assert (pixels[:, 4:-4, 4:-4] - 128).abs().max() <= 2


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_transparency_is_shown_on_white() -> None:
    pixels = image(png(Image.new("RGBA", (64, 48), (0, 0, 0, 0))))
    assert pixels.min() == 255


def test_an_image_is_turned_upright() -> None:
    data = make_image(64, 48, kind="JPEG", exif=6)
    assert probe_image(data) == (1, 0.0, 48, 64, -90)
    assert image(data).shape == (1, 48, 64, 3)


def test_damaged_images_are_refused() -> None:
    data = make_image(200, 300)
    tagged = make_image(exif=6).replace(b"MM\x00\x2a", b"MM\x00\x1f")
    for broken in (data[:-60], data[:40], b"", b"GIF89a", make_clip(2, 8), tagged):
        with pytest.raises(DecodeError):
            probe_image(broken)
    with pytest.raises(DecodeError, match="mode I;16"):
        probe_image(png(Image.fromarray(np.zeros((8, 8), np.uint16))))
