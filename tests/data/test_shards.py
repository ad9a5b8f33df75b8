from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save

from cogvideo_dist.data.index import ABOUT, INDEX, Index, IndexWriter, Member, Record, checksum
from cogvideo_dist.data.shards import DataError, ShardReader
from cogvideo_dist.data.writing import write_shards
from cogvideo_dist.protocols import Defect
from tests.data.clips import make_clip, make_image, make_shards

NAMES = {
    "videos/a b.c.mp4": make_clip(9, 8),
    "videos/\u65e5\u672c\u8a9e/\u00e9t\u00e9 'quoted' \"twice\".mkv": make_clip(12, 24, container="matroska"),
    "videos/new\nline.MP4": make_clip(10, 30),
    "images/# ? ; :: {}.png": make_image(),
    "images/deep/er/photo.jpeg": make_image(kind="JPEG"),
}
VIDEO = {"source": "v", "kind": "video", "frames": 9, "fps": 8.0, "height": 4, "width": 4, "caption_length": 3}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return make_shards(tmp_path_factory.mktemp("shards"), NAMES.items())


def member_of(record: Record) -> str:
    return next(ext for ext in record.members if ext not in ("txt", "json"))


def write_one(folder: Path) -> Path:
    write_shards(
        folder, [("a", {"mp4": b"video", "txt": b"cap"}, VIDEO), ("b", {"mp4": b"other", "txt": b"cap"}, VIDEO)]
    )
    return folder


def test_every_byte_comes_back_under_any_name(reader: ShardReader) -> None:
    assert {record.source: reader.read(record, member_of(record)) for record in reader.records} == NAMES
    for record in reader.records:
        assert reader.read(record, "txt").decode() == f"This is {record.source}."
        assert record.caption_length == len(f"This is {record.source}.")
        assert json.loads(reader.read(record, "json"))["source"] == record.source


def test_another_webdataset_reader_sees_the_same_samples(reader: ShardReader) -> None:
    shards = sorted(str(path) for path in reader.folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [record.key for record in reader.records]
    for record, sample in zip(reader.records, samples, strict=True):
        assert {name for name in sample if not name.startswith("__")} == set(record.members)
        assert all(sample[extension] == reader.read(record, extension) for extension in record.members)


def test_offsets_and_digests_are_those_of_the_tar(reader: ShardReader) -> None:
    for record in reader.records:
        data = (reader.folder / record.shard).read_bytes()
        with tarfile.open(reader.folder / record.shard) as tar:
            for extension, member in record.members.items():
                info = tar.getmember(f"{record.key}.{extension}")
                assert (info.offset_data, info.size) == (member.offset, member.size)
                content = data[member.offset : member.offset + member.size]
                assert checksum(content) == member.checksum


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    entries = [(str(i), {"mp4": bytes(1000), "txt": b"cap"}, VIDEO) for i in range(10)]
    written = write_shards(tmp_path / "d", entries, max_shard_size=4000)
    assert [record.shard for record in Index.read(tmp_path / "d")] == [f"shard-{i // 3:06d}.tar" for i in range(10)]
    assert (written.shards, written.samples) == (4, 10)


def test_latents_are_written_and_described(tmp_path: Path) -> None:
    members = {"latent.safetensors": save({"mean": torch.ones(2)}), "text.safetensors": save({"text": torch.zeros(1)})}
    facts = {**VIDEO, "kind": "latent", "size": (9, 48, 64), "origin": {"vae": "ab12", "semantics": "whole"}}
    write_shards(tmp_path / "d", [("a", members, facts)])
    reader = ShardReader(tmp_path / "d")
    (record,) = reader.records
    assert (record.size, record.origin) == ((9, 48, 64), {"vae": "ab12", "semantics": "whole"})
    assert reader.read(record, "latent.safetensors") == members["latent.safetensors"]


def test_rejected_samples_are_listed(tmp_path: Path) -> None:
    written = write_shards(tmp_path / "d", [Defect("0", "x.mp4", "broken"), ("1", {"mp4": b"v"}, VIDEO)])
    assert json.loads((tmp_path / "d" / "rejected.jsonl").read_text()) == {
        "key": "0",
        "source": "x.mp4",
        "reason": "broken",
    }
    assert (written.samples, written.rejected) == (1, 1)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    old = write_one(tmp_path / "d").joinpath(INDEX).read_bytes()

    def failing():  # type: ignore[no-untyped-def]
        yield "a", {"mp4": b"new"}, VIDEO
        raise RuntimeError("power cut")

    for folder in ("d", "e"):
        with pytest.raises(RuntimeError, match="power cut"):
            write_shards(tmp_path / folder, failing(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d" / INDEX).read_bytes() == old


def test_only_a_folder_of_shards_is_overwritten(tmp_path: Path) -> None:
    write_one(tmp_path / "d")
    with pytest.raises(ValueError, match="already exists"):
        write_one(tmp_path / "d")
    write_shards(tmp_path / "d", [("z", {"mp4": b"new"}, VIDEO)], overwrite=True)
    assert [record.key for record in Index.read(tmp_path / "d")] == ["z"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a folder of shards"):
        write_shards(tmp_path / "home", [("z", {"mp4": b"new"}, VIDEO)], overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "home"]


@pytest.mark.parametrize(
    ("key", "members"), [("../a", {"mp4": b""}), ("a.b", {"mp4": b""}), ("", {"mp4": b""}), ("a", {"../x": b""})]
)
def test_unsafe_names_are_not_written(tmp_path: Path, key: str, members: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"key|extension"):
        write_shards(tmp_path / "d", [(key, members, VIDEO)])
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    reader = ShardReader(write_one(tmp_path / "d"))
    record = reader.records[0]
    path, offset = reader.folder / record.shard, record.members["mp4"].offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"sample a \(v\): shard-000000.tar: the 5 bytes of a.mp4 at \d+ are damaged"
    ) as caught:
        reader.read(record, "mp4")
    assert (caught.value.key, caught.value.source) == ("a", "v")
    assert reader.read(record, "txt") == b"cap"


def test_a_missing_or_short_shard_is_found_at_once(tmp_path: Path) -> None:
    path = write_one(tmp_path / "d") / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"shard-000000.tar: has 600 bytes, its index needs \d+"):
        ShardReader(tmp_path / "d")
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-000000.tar: no such shard"):
        ShardReader(tmp_path / "d")


def rows(folder: Path) -> list[Record]:
    return list(Index.read(write_one(folder / "given")))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("fps", math.nan, "an impossible caption or fps"),
        ("fps", 1e400, "an impossible caption or fps"),
        ("fps", -1.0, "an impossible caption or fps"),
        ("fps", 0.0, "a video without frames per second"),
        ("frames", 0, "frames, height or width below 1"),
        ("kind", 9, "an unknown kind"),
        ("shard", 7, "an unknown shard"),
        ("key", "../a", "a key of other characters"),
        ("key", "b", "key 'b' is listed twice"),
    ],
)
def test_a_wrong_index_is_refused_with_its_row(tmp_path: Path, column: str, value: object, message: str) -> None:
    """The table of two samples, written with a wrong value in the first."""
    writer = IndexWriter()
    for record in rows(tmp_path):
        writer.add(record)
    (writer.key if column == "key" else writer.plain[column])[0] = value  # type: ignore[call-overload]
    writer.write(tmp_path)
    with pytest.raises(ValueError, match=r"index.arrow cannot be read as an index: ") as caught:
        Index.read(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": "../../etc/passwd"}, "shard"),
        ({"shard": "/etc/a.tar"}, "shard"),
        ({"key": "a.b"}, "key 'a.b'"),
        ({"fps": math.inf}, "fps and caption_length"),
        ({"kind": "song"}, "kind 'song'"),
        ({"members": {}}, "at least one"),
        ({"members": {"mp4": Member(0, 1, "xyz")}}, "checksum"),
    ],
)
def test_an_impossible_record_cannot_be_made(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(rows(tmp_path)[0], **change)


def test_a_record_comes_back_whole(tmp_path: Path) -> None:
    first, second = rows(tmp_path)
    origins = (
        {"vae": "ab", "addresses": {"text": "1"}},
        {"vae": "ab", "addresses": {"text": "2"}, "caption_tokens": 300},
    )
    given = [
        dataclasses.replace(first, origin=origins[0], scores={"aesthetic": 5.5}, caption="json:text", rotation=-90),
        dataclasses.replace(second, kind="latent", size=(9, 48, 64), origin=origins[1], shard="deep/er/x y.tar"),
    ]
    writer = IndexWriter()
    for record in given:
        writer.add(record)
    writer.write(tmp_path, root="s3://bucket/set")
    index = Index.read(tmp_path)
    assert list(index) == given
    assert (index.root, index.common, index[-1]) == ("s3://bucket/set", {"vae": "ab"}, given[1])
    assert index.column("frames").tolist() == [9, 9]
    assert index.scores("aesthetic")[0] == 5.5
    assert np.isnan(index.scores("aesthetic")[1])
    assert index.origin_numbers("caption_tokens")[1] == 300
    with pytest.raises(ValueError, match="has no score 'motion', only aesthetic"):
        index.scores("motion")


def test_any_changed_byte_of_an_index_is_found(tmp_path: Path) -> None:
    folder = write_one(tmp_path / "d")
    for name in (INDEX, ABOUT):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), 7):
            (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with contextlib.suppress(ValueError):
                assert [record.key for record in Index.read(folder)] == ["a", "b"]
                assert name == ABOUT  # what nobody reads of it, such as its spaces
        (folder / name).write_bytes(whole[:-1])
        with contextlib.suppress(ValueError):
            Index.read(folder)
            assert name == ABOUT
        (folder / name).write_bytes(whole)


def test_no_index_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index.json: no such file; .*make_shards.*index_shards"):
        Index.read(tmp_path)
    IndexWriter().write(tmp_path)
    with pytest.raises(ValueError, match="lists no samples"):
        Index.read(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=r"index.arrow: no such file"):
        Index.read(tmp_path)
