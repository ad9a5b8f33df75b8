from __future__ import annotations

import io
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont, ImageSequence
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from cogvideo_dist.evaluation.media import (
    contact_sheet,
    gif_bytes,
    replacing,
    thumbnails,
    to_uint8,
    wrap,
    write_contact_sheet,
    write_mp4,
    write_png,
)
from cogvideo_dist.rng import fold


def smooth_frames(frames: int, height: int, width: int) -> Tensor:
    """Light and dark areas, weakly coloured (yuv420p halves the resolution of colours)."""
    generator = fold(0, frames, height, width)
    light, colour = (torch.rand(1, channels, frames, 3, 4, generator=generator) * 2 - 1 for channels in (1, 3))
    coarse = 0.8 * light + 0.2 * colour
    return to_uint8(F.interpolate(coarse, size=(frames, height, width), mode="trilinear", align_corners=True)[0])


def read_mp4(path: Path) -> tuple[Tensor, float]:
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        return torch.stack(frames), float(container.streams.video[0].average_rate or 0)


def test_to_uint8_maps_the_range_and_clips() -> None:
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 5, 1, 1).expand(3, 5, 2, 4).requires_grad_()
    frames = to_uint8(video)
    assert frames.shape == (5, 2, 4, 3) and frames.dtype == torch.uint8
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(3, -1, 1, 1)
    assert torch.equal(to_uint8(every.double() / 127.5 - 1).permute(3, 0, 1, 2), every)


@pytest.mark.parametrize("shape", [(1, 16, 16), (13, 96, 128), (30, 50, 34)])
def test_mp4_decodes_to_the_same_frames(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    frames = smooth_frames(*shape)
    write_mp4(tmp_path / "new" / "a.mp4", frames, 12)
    found, fps = read_mp4(tmp_path / "new" / "a.mp4")
    assert found.shape == frames.shape and fps == 12
    assert (found.float() - frames.float()).abs().mean() < 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_mp4_is_plain_h264_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_mp4(tmp_path / name, smooth_frames(9, 32, 48), 23.976)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with av.open(str(tmp_path / "a")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(23.976, rel=1e-5)


def test_png_is_lossless(tmp_path: Path) -> None:
    image = smooth_frames(1, 17, 23)[0]
    write_png(tmp_path / "a.png", image)
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "a.png")).permute(1, 2, 0), image)


def test_gif_keeps_frames_colours_and_pace() -> None:
    frames = smooth_frames(6, 32, 48)
    with Image.open(io.BytesIO(gif_bytes(frames, 8))) as gif:
        found = torch.stack([pil_to_tensor(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)])
        assert gif.info["duration"] == 120 and gif.info["loop"] == 0
    assert found.shape == (6, 3, 32, 48)
    assert (found.permute(0, 2, 3, 1).float() - frames.float()).abs().mean() < 8
    assert Image.open(io.BytesIO(gif_bytes(frames[:1], 8))).size == (48, 32)


def test_thumbnails_are_evenly_spaced_from_first_to_last() -> None:
    levels = torch.arange(0, 90, 10, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 8, 16, 3)
    shown = thumbnails(levels, 5, 32)
    assert [int(pil_to_tensor(picture).max()) for picture in shown] == [0, 20, 40, 60, 80]
    assert {picture.size for picture in shown} == {(32, 16)}
    assert len(thumbnails(levels, 20, 32)) == 9 and len(thumbnails(levels, 1, 32)) == 1


def test_contact_sheet_holds_every_row(tmp_path: Path) -> None:
    rows = [("A wide clip pans right.", smooth_frames(20, 32, 64)), ("", smooth_frames(1, 64, 32))]
    sheet = contact_sheet(rows, columns=4, cell=64)
    assert sheet.size == (2 * 16 + 4 * 64 + 3 * 4, 16 + (18 + 4 + 32 + 16) + (18 + 4 + 64 + 16))
    pixels = pil_to_tensor(sheet).permute(1, 2, 0)
    last = thumbnails(rows[0][1], 4, 64)[3]
    assert torch.equal(pixels[38 : 38 + 32, 16 + 3 * 68 : 16 + 3 * 68 + 64], pil_to_tensor(last).permute(1, 2, 0))
    assert pixels[16:34].min() < 100, "the label is drawn"
    assert pixels[:16].min() == 255 and pixels[:, :16].min() == 255 and pixels[:, -16:].min() == 255
    write_contact_sheet(tmp_path / "sheet.png", rows)
    assert Image.open(tmp_path / "sheet.png").width == 2 * 16 + 8 * 160 + 7 * 4


def test_long_labels_are_wrapped_inside_the_sheet() -> None:
    font = ImageFont.load_default(size=14)
    label = "The camera slowly pans right over a red coffee cup on a wooden table. " * 4
    lines = wrap(label, font, width=300)
    assert len(lines) > 1 and all(font.getlength(line) <= 300 for line in lines)
    assert " ".join(lines).split() == label.split()
    assert wrap("", font, width=300) == [""]
    frames = smooth_frames(1, 64, 64)
    tall, short = (contact_sheet([(text, frames)], columns=2, cell=64).height for text in (label, "A cup."))
    assert tall > short + 5 * 18


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_unusual_inputs_are_refused_in_plain_words(tmp_path: Path) -> None:
    frames = smooth_frames(2, 16, 16)
    with pytest.raises(ValueError, match=r"must be \[3, T, H, W\], found \[4, 3, 8, 8\]"):
        to_uint8(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((3, 1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="even height and width, found 15 x 16"):
        write_mp4(tmp_path / "a.mp4", frames[:, :15], 8)
    with pytest.raises(ValueError, match="fps must be above 0, found 0"):
        write_mp4(tmp_path / "a.mp4", frames, 0)
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\] and not empty, found torch.float32"):
        gif_bytes(frames.float(), 8)
    with pytest.raises(ValueError, match=r"not empty, found torch.uint8 \[0, 16, 16, 3\]"):
        write_mp4(tmp_path / "a.mp4", frames[:0], 8)
    with pytest.raises(ValueError, match=r"an image must be \[H, W, 3\]"):
        write_png(tmp_path / "a.png", frames)
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns and cell of at least 1"):
        contact_sheet([("a", frames)], columns=0)
    assert not list(tmp_path.iterdir())
