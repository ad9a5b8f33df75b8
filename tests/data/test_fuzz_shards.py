"""Damaged and hostile shards and indexes: what is wrong is named, nothing is lost in silence, nothing is executed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cogvideo_dist.data.index import ABOUT, INDEX, Index, file_checksum
from cogvideo_dist.data.probing import Prober
from cogvideo_dist.data.shards import DataError, ShardReader
from data_tools.index_shards import main
from tests.data.clips import make_clip, make_image, make_shards
from tests.data.tar_files import found_in, tar_of, with_checksum

NAMES = [
    ("videos/a.mp4", make_clip(3, 8)),
    ("videos/b.mkv", make_clip(5, 8, container="matroska")),
    ("images/c.png", make_image()),
]
HUNDREDS = [3] + [pytest.param(n, marks=pytest.mark.long) for n in range(10, 107)]
"""Seeds of 100 mutants each; the first stands for three of them, so that about 10 000 are tried by make test-long."""


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    prober = Prober()
    yield prober
    prober.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return make_shards(tmp_path_factory.mktemp("intact"), NAMES)


def shard_of(reader: ShardReader) -> bytes:
    return (reader.folder / reader.records[0].shard).read_bytes()


def needed(data: bytes) -> int:
    """Bytes up to the two blocks of zeros that end a tar."""
    return -(-len(data.rstrip(b"\0")) // 512) * 512 + 1024


def mutant(data: bytes, dice: random.Random, what: str) -> bytes:
    """``data`` with one thing wrong."""
    broken, at, length = bytearray(data), dice.randrange(len(data)), dice.choice((1, 7, 512, 3000))
    block = at // 512 * 512
    if what == "flip":
        broken[at] ^= 1 << dice.randrange(8)
    elif what == "cut":
        del broken[at:]
    elif what == "lose":
        del broken[at : at + length]
    elif what == "insert":
        broken[at:at] = dice.randbytes(length)
    elif what == "zeros":
        broken[at : at + length] = bytes(len(broken[at : at + length]))
    elif what == "noise":
        broken[at : at + length] = dice.randbytes(len(broken[at : at + length]))
    elif what == "repeat":
        broken[block:block] = broken[block : block + length]
    else:  # a field of a header, whose checksum is made to fit
        block = dice.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"])
        broken[block + dice.choice((0, 1, 9, 124, 130, 156, 257, 345))] = dice.choice(
            (0, 32, 46, 47, 53, 120, 128, 255)
        )
        broken[block : block + 512] = with_checksum(bytes(broken[block : block + 512]))
    return bytes(broken)


def mutants(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    kinds = ("flip", "cut", "lose", "insert", "zeros", "noise", "repeat", "field")
    dice = random.Random(seed)
    return (mutant(data, dice, kinds[number % len(kinds)]) for number in range(count))


def check_mutant(broken: bytes, *, intact: ShardReader, folder: Path, prober: Prober) -> bool:
    """No sample is missing without a line, and none gives other bytes; whether anything was found to be wrong."""
    records, rejected = found_in(broken, prober, shard=intact.records[0].shard)
    expected = {record.key: record for record in intact.records}
    assert len(records) >= len(expected) or rejected
    assert all(item.reason and item.code for item in rejected)
    for record in records:
        for extension, (offset, size, _) in record.members.items():
            assert len(broken[offset : offset + size]) == size, (record.key, extension)
    changed = {record.key: record for record in records} != expected
    (folder / intact.records[0].shard).write_bytes(broken)
    try:
        found = ShardReader(folder)
    except ValueError as error:
        assert intact.records[0].shard in str(error)
        return True
    damages = 0
    for record in intact.records:
        for extension in record.members:
            try:
                assert found.read(record, extension) == intact.read(record, extension)
            except DataError as error:
                assert intact.records[0].shard in str(error)
                damages += 1
    assert changed or rejected or not damages
    return bool(changed or rejected or damages)


def copied(reader: ShardReader, folder: Path) -> Path:
    """A folder with the intact index, for other shards."""
    for name in (INDEX, ABOUT):
        (folder / name).write_bytes((reader.folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("seed", HUNDREDS)
def test_no_damage_changes_a_sample_in_silence(seed: int, reader: ShardReader, tmp_path: Path, prober: Prober) -> None:
    folder, named = copied(reader, tmp_path), 0
    count = 300 if seed == HUNDREDS[0] else 100
    for broken in mutants(shard_of(reader)[: needed(shard_of(reader))], seed, count):
        named += check_mutant(broken, intact=reader, folder=folder, prober=prober)
    assert named > count * 0.8


def test_a_cut_at_any_block_is_named_or_costs_nothing(reader: ShardReader, tmp_path: Path, prober: Prober) -> None:
    data, folder = shard_of(reader), copied(reader, tmp_path)
    dice = random.Random(4)
    for place in sorted({*range(0, len(data), 512), *dice.sample(range(len(data)), 200)}):
        records, rejected = found_in(data[:place], prober, shard=reader.records[0].shard)
        if place >= needed(data):
            assert (records, rejected) == (list(reader.records), [])
        else:
            assert records == []
            assert [item.code for item in rejected] == ["damaged shard"]
            assert rejected[0].reason.startswith(f"{reader.records[0].shard}: ")
        (folder / reader.records[0].shard).write_bytes(data[:place])
        if place < max(reader.records.ends().values()):
            with pytest.raises(ValueError, match="has .* bytes, its index needs"):
                ShardReader(folder)


def test_four_hundred_flips_give_equal_bytes_or_a_name(reader: ShardReader, tmp_path: Path, prober: Prober) -> None:
    data, folder = shard_of(reader), copied(reader, tmp_path)
    dice = random.Random(5)
    named = sum(
        check_mutant(mutant(data[: needed(data)], dice, "flip"), intact=reader, folder=folder, prober=prober)
        for _ in range(400)
    )
    assert named > 200


HARMFUL = (
    "pyd pkl pickle pth pt py npy npz joblib dill ckpt bin h5 yaml yml sh so cls index ten mp4 mkv mov webm png jpg jpeg webp "
    "txt json latent.safetensors text.safetensors"
)
BAD_NAMES = (
    "../../x.mp4", "/etc/x.mp4", "a/../../x.mp4", "pipe:COMMAND.mp4", "http://127.0.0.1:1/x.mp4", "x.mp4|touch y",
    "$(touch y).mp4", "`touch y`.mp4", "-rf.mp4", "x;touch y.mp4", "a\nb.mp4", "\u202egpj.mp4", "con\x7f.mp4",
    "~/.bashrc.mp4", "file:///etc/passwd.mp4", "a\\..\\x.mp4", "..", ".", "a b.mp4", "x\0y.mp4",
)  # fmt: skip


def payloads(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Members that run a command, fetch or read another file where somebody unpickles, opens or plays them."""
    command = f"touch {canary}"
    pickled = f"cos\nsystem\n(S'{command}'\ntR.".encode()
    code = f"import pathlib; pathlib.Path({str(canary)!r}).touch()".encode()
    concat = f"ffconcat version 1.0\nfile 'pipe:{command}'\nfile {canary}\n".encode()
    playlist = f"#EXTM3U\n#EXTINF:1,\npipe:{command}\n#EXTINF:1,\nhttp://127.0.0.1:1/x.mp4\n".encode()
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{canary}"/></svg>'.encode()
    for number, extension in enumerate(HARMFUL.split()):
        yield f"pickle{number}.{extension}", pickled
        yield f"code{number}.{extension}", code
    for number, extension in enumerate(("mp4", "mov", "mkv", "webm", "png", "jpg", "m3u8")):
        for name, text in (("concat", concat), ("playlist", playlist), ("drawing", drawing)):
            yield f"{name}{number}.{extension}", text
    for name in BAD_NAMES:
        yield name.replace("COMMAND", command), NAMES[0][1]


def test_a_hundred_hostile_members_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, canary = tmp_path / "shards", tmp_path / "canary"
    folder.mkdir()
    hostile = list(payloads(canary))
    named = [name for name, _ in hostile if name[0].isalpha() and not name.endswith(".txt") and ":" not in name]
    captions = dict.fromkeys(
        (name.partition(".")[0] + ".txt", b"c") for name in named if "/" not in name and "\0" not in name
    )
    good = [("good.mp4", NAMES[0][1]), ("good.txt", b"cap")]
    data = tar_of([*good, *hostile, *captions])
    for name in ("a.tar", f"pipe:touch {canary.name}.tar"):
        (folder / name).write_bytes(data)
    before = set(tmp_path.rglob("*"))
    assert len(hostile) >= 100
    assert main([str(folder), "--decode"]) == 2
    assert set(tmp_path.rglob("*")) == before
    (folder / f"pipe:touch {canary.name}.tar").unlink()
    assert main([str(folder), "--allow-rejects", "--workers", "2"]) == 0
    capsys.readouterr()
    assert not canary.exists()
    assert [record.key for record in Index.read(folder)] == ["good"]
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert sum(line["code"] == "bad name" for line in lines) >= len(BAD_NAMES)
    keys = {line["key"] for line in lines}
    assert all(
        name.partition(".")[0] in keys
        for name, _ in hostile
        if name[-1].isalnum() and name[:4] in ("pick", "code", "conc")
    )


@pytest.mark.parametrize("seed", [3, *[pytest.param(n, marks=pytest.mark.long) for n in range(10, 20)]])
def test_a_damaged_index_is_refused(seed: int, reader: ShardReader, tmp_path: Path) -> None:
    dice, expected = random.Random(seed), list(reader.records)
    folder = copied(reader, tmp_path)
    for number in range(200):
        name = (INDEX, ABOUT)[number % 2]
        data = (folder / name).read_bytes()
        kind = ("flip", "cut", "lose", "insert", "zeros", "noise")[number // 2 % 6]
        (folder / name).write_bytes(mutant(data, dice, kind))
        try:
            assert list(Index.read(folder)) == expected
        except ValueError as error:
            assert str(folder / name) in str(error) or str(folder / INDEX) in str(error)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("seed", [3, *[pytest.param(n, marks=pytest.mark.long) for n in range(10, 20)]])
def test_an_index_made_to_harm_is_refused_or_read(seed: int, reader: ShardReader, tmp_path: Path) -> None:
    """Its checksum fits: what cannot be true of it is refused, and nothing crashes."""
    dice, folder = random.Random(seed), copied(reader, tmp_path)
    data, about = (folder / INDEX).read_bytes(), json.loads((folder / ABOUT).read_bytes())
    for number in range(200):
        (folder / INDEX).write_bytes(mutant(data, dice, ("flip", "noise", "zeros", "cut")[number % 4]))
        (folder / ABOUT).write_text(json.dumps({**about, "digest": file_checksum(folder / INDEX)}))
        try:
            index = Index.read(folder)
        except ValueError as error:
            assert str(folder / INDEX) in str(error)
        else:
            with suppress(ValueError):  # of a row; it is read when asked for
                assert all(record.frames > 0 for record in index)
