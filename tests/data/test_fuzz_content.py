"""Bytes that are what the index says and make no sense: the sample is a defect with a reason, or it decodes; nobody crashes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data.decode import CENTER
from cogvideo_dist.data.index import Kind, Member, Record, checksum
from cogvideo_dist.data.pool import Limits, Pool, Task
from cogvideo_dist.data.reading import Cut
from cogvideo_dist.data.shards import MAX_CAPTION, DataError
from cogvideo_dist.data.storage import Store
from tests.data.clips import make_clip, make_image

MEDIA: list[tuple[Kind, str, bytes]] = [
    ("video", "mp4", make_clip(12, 8)),
    ("video", "mkv", make_clip(12, 8, container="matroska")),
    ("video", "webm", make_clip(12, 8, container="webm", codec="libvpx-vp9")),
    ("video", "mp4", make_clip(12, 8, container="fmp4")),
    ("image", "png", make_image()),
    ("image", "jpg", make_image(kind="JPEG")),
    ("image", "webp", make_image(kind="WEBP")),
]
CAPTIONS = (
    b"A caption.", b"", b" \n\t ", b"\xff\xfe", b"a\x00b", b"\xed\xa0\x80", b"x" * (MAX_CAPTION + 1), b"\xef\xbb\xbfbom",
    "\u202e right to left \u0007".encode(), b"<script>alert(1)</script>", b"line\r\nline",
)  # fmt: skip
CUT = {"video": Cut((9, 48, 64), 8.0, CENTER), "image": Cut((1, 48, 64), 8.0, CENTER)}


def mutant(data: bytes, dice: random.Random) -> bytes:
    """Cut, flipped, overwritten, repeated or shuffled, where it hurts: mostly in the first bytes."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8, 40])):
        at = dice.randrange(min(len(changed), dice.choice([64, 800, len(changed)]))) if changed else 0
        deed = dice.randrange(6)
        if deed == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif deed == 1:
            changed[at : at + 4] = dice.choice(
                [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"moov", b"mdat"]
            )
        elif deed == 2:
            changed = changed[: max(at, 1)]
        elif deed == 3:
            changed[at:at] = changed[at : at + dice.randrange(1, 300)]
        elif deed == 4:
            changed[at : at + 30] = dice.randbytes(30)
        else:
            del changed[at : at + dice.randrange(1, 60)]
        if not changed:
            return b"\0"
    return bytes(changed)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 40))])
def test_mutants_with_a_right_checksum_decode_or_are_named(tmp_path: Path, seed: int) -> None:
    dice, tasks, whole = random.Random(seed), list[Task](), bytearray()
    for number in range(250):
        kind, extension, data = dice.choice(MEDIA)
        caption = mutant(dice.choice(CAPTIONS) or b"\0", dice) if dice.random() < 0.3 else dice.choice(CAPTIONS)
        contents = {extension: mutant(data, dice), "txt": caption}
        members = {}
        for name, content in contents.items():
            members[name] = Member(len(whole), len(content), checksum(content))
            whole += content
        record = Record(
            f"{number}", "s", "a.tar", kind, members, frames=12 if kind == "video" else 1,
            fps=8.0 if kind == "video" else 0.0, height=48, width=64, caption_length=1,
        )  # fmt: skip
        tasks.append(Task(0, record, CUT[kind]))
    (tmp_path / "a.tar").write_bytes(whole)
    pool = Pool([Store(str(tmp_path), Remote())], workers=2, memory=2**26, limits=Limits(decode_seconds=10.0))
    named = decoded = 0
    try:
        for task, ticket in [(task, pool.submit(task)) for task in tasks]:
            try:
                loaded = pool.result(ticket)
            except DataError as error:
                assert error.reason, task.record
                assert error.code, error.reason
                assert "\n" not in error.reason
                named += 1
            else:
                assert loaded.content.arrays["pixels"].shape == (*task.cut.size, 3)
                assert loaded.content.caption.strip()
                decoded += 1
    finally:
        pool.close()
    assert named + decoded == len(tasks)
    assert min(named, decoded) > 10, "some of both kinds, or the test proves little"
