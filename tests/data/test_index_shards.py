from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import save

from cogvideo_dist.data.index import Index, Record, checksum
from cogvideo_dist.data.indexing import Layout
from cogvideo_dist.data.probing import Prober
from cogvideo_dist.data.reading import media_extension
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.data.writing import write_shards
from data_tools.index_shards import main
from tests.data.clips import make_clip, make_image, make_shards
from tests.data.tar_files import END, found_in, kind, member, pax, pax_record, tar_of

CLIP, OTHER, IMAGE = make_clip(9, 8), make_clip(12, 24), make_image()
FACTS = {"source": "v/a.mp4", "kind": "video", "frames": 9, "fps": 8.0, "height": 48, "width": 64, "caption_length": 3}


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    prober = Prober()
    yield prober
    prober.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr without the progress bar)."""
    again = [] if "--check" in arguments else ["--overwrite"]
    code = main([*map(str, arguments), *again])
    out, err = capsys.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    return code, out.splitlines(), [line for line in lines if line.startswith("index_shards")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tar" and path.is_file()}


def rejected(folder: Path) -> dict[str, str]:
    """Code by key."""
    lines = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    return {line["key"] or line["source"]: line["code"] for line in lines}


def put(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members))
    return path


@pytest.mark.parametrize("options", [(), ("--workers", 3), ("--decode",)])
def test_of_our_own_shards_the_same_index_comes_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...]
) -> None:
    names = [(f"videos/sub/{i}.mp4", make_clip(9 + i, 8 + i)) for i in range(5)]
    names += [
        ("videos/t.mov", make_clip(9, 8, size=(64, 48), rotation=90)),
        ("images/\u65e5.jpeg", make_image(kind="JPEG", exif=6)),
    ]
    records = list(make_shards(tmp_path, names * 2).records)
    before = files(tmp_path / "shards")
    for name in ("index.arrow", "index.json"):
        (tmp_path / "shards" / name).unlink()
    code, out, err = run(capsys, tmp_path / "shards", *options)
    assert (code, err) == (0, [])
    assert "indexed 1 image, 6 videos" in out[0]
    assert list(Index.read(tmp_path / "shards")) == records
    assert files(tmp_path / "shards") == before


def latent(shape: tuple[int, ...] = (16, 3, 6, 8)) -> dict[str, bytes]:
    moments = {"mean": torch.zeros(shape), "logvar": torch.zeros(shape)}
    return {"latent.safetensors": save(moments), "text.safetensors": save({"text": torch.zeros(4, 8)}), "txt": b"cap"}


def test_of_encoded_shards_the_same_index_comes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        **FACTS,
        "kind": "latent",
        "size": (9, 48, 64),
        "origin": {"vae": "ab", "addresses": {"text": "cd"}, "n": 1.5},
    }
    scores = {"scores": {"aesthetic": 5.25}, "rotation": 90}
    wordless = {name: data for name, data in latent().items() if name != "txt"}
    write_shards(tmp_path / "d", [("a/b", latent(), {**facts, **scores}), ("c", wordless, facts)])
    before = files(tmp_path / "d")
    assert run(capsys, tmp_path / "d")[0] == 0
    assert files(tmp_path / "d") == before


def own(key: str = "a", **changes: object) -> bytes:
    return json.dumps({"key": key, **FACTS, **changes}).encode()


@pytest.mark.parametrize(
    ("text", "reason", "code"),
    [
        (own(frames=8), "json: frames is 8, the video's is 9", "wrong facts"),
        (own(fps=24.0), "json: fps is 24.0, the video's is 8.0", "wrong facts"),
        (own(fps=0), "json: fps is 0, the video's is 8.0", "wrong facts"),
        (own(height=-48), "json: height is -48, the video's is 48", "wrong facts"),
        (own(kind="image"), "json: kind is 'image', the sample is a video", "wrong facts"),
        (own(rotation=90), "json: rotation is 90, the video's is 0", "wrong facts"),
        (own(caption_length=4), "json: caption_length is 4, the caption's is 3", "wrong facts"),
        (own(source=5), "source: Input should be a valid string", "wrong facts"),
        (own(frames="9"), "json: frames is 9, the video's is 9", "wrong facts"),
        (own(scores={"s": float("nan")}), "json.scores.s is nan, not a usable number", "wrong json"),
        (own().replace(b"8.0", b"1e400"), "json.fps is inf, not a usable number", "wrong json"),
        (own(frames=2**40), "json.frames is 1099511627776, not a usable number", "wrong json"),
        (own(source="\ud800"), "json.source is text with half a character", "wrong json"),
        (own(lengths=3), "json: unknown field 'lengths'", "wrong json"),
        (own(scores=5), "json: scores is no object", "wrong json"),
        (own(scores={"s": "5"}), "scores.s: Input should be a valid number", "wrong facts"),
        (own(origin=[]), "origin: Input should be", "wrong facts"),
        (own(caption=5), "no caption: no member 5", "no caption"),
        (own(origin={"a": 0}).replace(b"0}", b'{"a":' * 5000 + b"0" + b"}" * 5001), "json: ", "wrong json"),
        (b"{oops", "json: not valid JSON", "wrong json"),
        (b"[" * 10**5, "json: not valid JSON", "wrong json"),
        (b" " * (2**20 + 1), "more than the", "too large"),
    ],
)
def test_facts_that_are_wrong_are_named(text: bytes, reason: str, code: str, prober: Prober) -> None:
    data = tar_of([("a.mp4", CLIP), ("a.txt", b"cap"), ("a.json", text), ("b.mp4", CLIP), ("b.txt", b"cap")])
    records, (wrong,) = found_in(data, prober)
    assert [record.key for record in records] == ["b"]
    assert reason in wrong.reason
    assert (wrong.key, wrong.source, wrong.code) == ("a", "a.tar/a", code)


@pytest.mark.parametrize(
    ("change", "members", "reason"),
    [
        ({"size": [9, 48, 128]}, latent(), "a clip of [9, 48, 128] has mean and logvar of [C, 3, 6, 16]"),
        ({"size": [9, 48, -1]}, latent(), "json: size is [9, 48, -1], not three numbers above 0"),
        ({"size": "9"}, latent(), "json: size is 9, not three numbers"),
        ({}, {**latent(), "latent.safetensors": b"\xff" * 64}, "not a readable safetensors file"),
        ({}, {"latent.safetensors": b""}, "latent.safetensors without text.safetensors"),
        ({}, {**latent(), "mp4": CLIP}, "has latent.safetensors, mp4; a sample is one video, image or latent"),
        ({"key": "other"}, latent(), "latent.safetensors without a member json that tells its size"),
    ],
)
def test_latents_are_compared_with_their_facts(
    change: dict[str, object], members: dict[str, bytes], reason: str, prober: Prober
) -> None:
    about = json.loads(own(kind="latent", size=[9, 48, 64])) | change
    items = [(f"a.{name}", data) for name, data in {**members, "json": json.dumps(about).encode()}.items()]
    records, (wrong,) = found_in(tar_of(items), prober)
    assert not records
    assert reason in wrong.reason


def test_shards_of_webdataset_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with webdataset.TarWriter(str(tmp_path / "part 01;x.tar"), encoder=False) as writer:
        for i in range(3):
            about = {"caption": f"Clip {i}.", "score": i / 2, "fps": "?"}
            writer.write({"__key__": f"set/{i}", "mp4": CLIP, "json": json.dumps(about).encode(), "cls": b"7"})
    options = ("--caption", "json:caption", "--score", "s=json:score", "--workers", 2)
    code, out, _ = run(capsys, tmp_path, *options, "--out", tmp_path / "index")
    assert code == 0
    assert out[0].endswith("rejected none; passed over 3 .cls")
    index = Index.read(tmp_path / "index")
    assert index.root == str(tmp_path)
    assert [record.key for record in index] == ["set/0", "set/1", "set/2"]
    assert index.scores("s").tolist() == [0, 0.5, 1]
    record = index[1]
    assert (record.caption, record.caption_length, record.source) == ("json:caption", 7, "part 01;x.tar/set/1.mp4")
    assert (record.frames, record.fps, record.height, record.width) == (9, 8.0, 48, 64)
    assert ShardReader(tmp_path / "index").read(record, media_extension(record)) == CLIP


def test_members_need_not_be_neighbours(prober: Prober) -> None:
    data = tar_of(
        [
            ("./f/a.TXT", b"a"),
            ("b.txt", b"b b"),
            ("./f/a.MP4", CLIP),
            ("b.jpg", make_image(kind="JPEG")),
            ("c.b.mp4", CLIP),
        ]
    )
    records, (wrong,) = found_in(data, prober)
    assert [(r.key, r.kind, sorted(r.members), r.caption_length) for r in records] == [
        ("f/a", "video", ["mp4", "txt"], 1), ("b", "image", ["jpg", "txt"], 3),
    ]  # fmt: skip
    assert (wrong.key, wrong.reason) == ("c", "has no known media, only b.mp4; a sample is one video, image or latent")


def test_other_extensions_are_media_where_they_are_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = [
        ("a.clip.mp4", CLIP),
        ("a.thumb.jpg", IMAGE),
        ("a.txt", b"A."),
        ("b.avi", OTHER),
        ("b.txt", b"B."),
        ("c.im", IMAGE),
    ]
    put(tmp_path / "s.tar", shard)
    code, out, _ = run(capsys, tmp_path, "--video", "clip.mp4", ".AVI", "--image", "im", "--allow-empty-captions")
    assert (code, "passed over 1 .thumb.jpg" in out[0]) == (0, True)
    reader = ShardReader(tmp_path)
    assert [reader.read(record, media_extension(record)) for record in reader.records] == [CLIP, OTHER, IMAGE]
    assert [record.caption_length for record in reader.records] == [2, 2, 0]


REFUSED = {
    "link": (member("x.mp4", fields=kind(b"2")) + member("x.txt", b"c"), "bad member", "at 0: it is a symbolic link"),
    "twice": (member("x.mp4", CLIP) + member("x.MP4", CLIP) + member("x.txt", b"c"), "duplicate", "already"),
    "up": (member("../../x.mp4", CLIP), "bad name", "member '../../x.mp4' at 0: its name is not a key"),
    "absolute": (member("/etc/x.mp4", CLIP), "bad name", "member '/etc/x.mp4' at 0"),
    "space": (member("a b.mp4", CLIP), "bad name", "member 'a b.mp4' at 0"),
    "NUL": (member("x", CLIP, fields={0: b"x\0y.mp4"}), "bad name", r"member 'x\\x00y.mp4' at 0"),
    "no extension": (member("README", b"text"), "bad name", "member 'README' at 0"),
    "hidden": (member("f/._x.mp4", CLIP), "bad name", "member 'f/._x.mp4' at 0"),
    "long": (
        pax(pax_record(b"path", b"x" * 65_536 + b".mp4")) + member("x", CLIP),
        "bad name",
        "at 0: its name is not a key",
    ),
    "two": (member("x.mp4", CLIP) + member("x.png", IMAGE) + member("x.txt", b"c"), "several media", "has mp4, png;"),
    "code only": (member("x.pyd", b"c") + member("x.txt", b"c"), "no media", "no known media, only pyd, txt"),
    "no caption": (member("x.mp4", CLIP), "no caption", "no caption: no member txt"),
    "empty caption": (member("x.mp4", CLIP) + member("x.txt", b" \n"), "caption empty", "the caption is empty"),
    "bytes": (member("x.mp4", CLIP) + member("x.txt", b"caf\xe9"), "caption encoding", "not UTF-8"),
    "long caption": (member("x.mp4", CLIP) + member("x.txt", b"c" * 20_000), "too large", "20000 bytes are more than"),
    "no clip": (member("x.mp4", b"#EXTM3U") + member("x.txt", b"c"), "undecodable", "not a readable MP4"),
    "half a clip": (member("x.mp4", CLIP[:900]) + member("x.txt", b"c"), "undecodable", ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_named_and_the_rest_is_kept(what: str, prober: Prober) -> None:
    begin, code, reason = REFUSED[what]
    records, wrong = found_in(begin + tar_of([("g.mp4", CLIP), ("g.txt", b"cap")]), prober)
    assert [record.key for record in records] == ["g"]
    assert [item.code for item in wrong] == [code]
    assert reason in wrong[0].reason
    assert wrong[0].source.startswith("a.tar/")


@pytest.mark.parametrize("value", ["NaN", "1e400", "true", '"5"', "null", "[1]", "-Infinity"])
def test_scores_are_numbers(value: str, prober: Prober) -> None:
    data = tar_of([("a.mp4", CLIP), ("a.txt", b"c"), ("a.json", f'{{"s": {value}, "t": NaN}}'.encode())])
    records, (wrong,) = found_in(data, prober, layout=Layout(scores={"good": "s"}))
    assert (records, wrong.code) == ([], "wrong json")
    assert "field 's'" in wrong.reason
    assert len(found_in(data, prober, layout=Layout(scores={"good": "u"}))[0]) == 1


@pytest.mark.parametrize("value", ["null", "5", '" "', '"\\ud800"', None])
def test_a_caption_in_json_is_text(value: str | None, prober: Prober) -> None:
    about = f'{{"c": {value}}}' if value else "{}"
    data = tar_of([("a.mp4", CLIP), ("a.json", about.encode())])
    records, (wrong,) = found_in(data, prober, layout=Layout(caption="json:c"))
    assert not records
    assert wrong.code.startswith("caption")


def test_a_key_in_two_shards_is_rejected_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.tar", [("x.mp4", CLIP), ("x.txt", b"c"), ("y.mp4", CLIP)])
    put(tmp_path / "b.tar", [("x.mp4", CLIP), ("x.txt", b"c"), ("y.txt", b"c"), ("z.mp4", CLIP), ("z.txt", b"c")])
    code, _, err = run(capsys, tmp_path)
    assert code == 1
    assert err[0] == "index_shards: rejected a.tar/x: a.tar: key 'x' is also in b.tar"
    assert [record.key for record in Index.read(tmp_path)] == ["z"]
    assert rejected(tmp_path) == {"x": "key in two shards", "y": "key in two shards"}
    assert run(capsys, tmp_path, "--allow-rejects")[0] == 0


def test_bytes_do_not_depend_on_the_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("c/2", "a/1", "b"):
        put(
            tmp_path / f"{name}.tar",
            [(f"{name}-{i}.{ext}", data) for i in (3, 1) for ext, data in (("mp4", CLIP), ("txt", b"c"))],
        )
    put(tmp_path / "broken.tar", [("x.mp4", CLIP)]).write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "x.tar.gz").write_bytes(b"")
    found = []
    for workers in (1, 2, 5):
        assert run(capsys, tmp_path, "--workers", workers)[0] == 1
        found.append(files(tmp_path))
    assert found[0] == found[1] == found[2]
    index = Index.read(tmp_path)
    assert [record.key for record in index] == ["a/1-3", "a/1-1", "b-3", "b-1", "c/2-3", "c/2-1"]
    assert index.shards == ["a/1.tar", "b.tar", "c/2.tar"]
    assert rejected(tmp_path) == {"broken.tar": "damaged shard", "x.tar.gz": "damaged shard"}


def test_checking_names_every_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = make_shards(tmp_path, [(f"videos/{i}.mp4", CLIP) for i in range(30)]).records
    folder = tmp_path / "shards"
    code, out, _ = run(capsys, folder, "--check", "--workers", 2)
    assert (code, out[-1]) == (0, "index_shards: checked 30 samples of shards: 3; damages: 0")
    first, last = records[0], records[29]
    flip(folder / first.shard, first, "mp4")
    flip(folder / first.shard, first, "json")
    with (folder / last.shard).open("r+b") as file:
        file.truncate(5000)
    code, out, _ = run(capsys, folder, "--check")
    assert code == 1
    assert out[0] == f"index_shards: {last.shard}: has 5000 bytes, its index needs {records.ends()[last.shard]}"
    places = {ext: first.members[ext] for ext in ("mp4", "json")}
    assert sorted(out[1:3]) == sorted(
        f"index_shards: {first.shard}: the {m.size} bytes of {first.key}.{ext} at {m.offset} are not those of the index"
        for ext, m in places.items()
    )
    (folder / last.shard).unlink()
    assert f"{last.shard}: no such shard, but the index lists it" in run(capsys, folder, "--check")[1][0]


def flip(path: Path, record: Record, extension: str) -> None:
    data = bytearray(path.read_bytes())
    data[record.members[extension].offset + 5] ^= 1
    path.write_bytes(data)


def test_the_checksums_are_of_the_members(prober: Prober) -> None:
    data = tar_of([("a.mp4", CLIP), ("a.txt", b"cap")])
    ((record,), _) = found_in(data, prober)
    for extension, content in (("mp4", CLIP), ("txt", b"cap")):
        offset, size, digest = record.members[extension]
        assert data[offset : offset + size] == content
        assert digest == checksum(content)


def test_errors_of_the_user_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "bad" / "a.tar", [("x.mp4", b"")])
    put(tmp_path / "good" / "a.tar", [("x.mp4", CLIP), ("x.txt", b"c")])
    for arguments, message in {
        (tmp_path / "gone",): "gone: no such folder",
        (tmp_path / "empty",): "empty: no .tar files",
        (tmp_path / "bad",): "no sample to index (1 rejected; the first: not a readable MP4",
        (tmp_path / "good", "--check"): "index.json: no such file",
        (tmp_path / "good", "--video", "txt"): "extension txt cannot be a video or image and something else",
        (tmp_path / "good", "--score", "a=json:b", "a=json:c"): "--score gives one name twice",
        ("s3://bucket/shards",): "say with --out where its index is to go",
    }.items():
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, [])
        assert err[-1].startswith("index_shards: error: ")
        assert message in err[-1]
    assert not files(tmp_path / "bad")
    for wrong in (("--caption", "json"), ("--score", "a"), ("--workers", "0"), ("--video", "a b")):
        with pytest.raises(SystemExit) as end:
            main(["shards", *wrong])
        assert end.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"index_shards: error: argument {wrong[0]}")


def test_an_index_is_replaced_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.tar", [("x.mp4", CLIP), ("x.txt", b"c")])
    assert run(capsys, tmp_path)[0] == 0
    before = files(tmp_path)
    shutil.copy(tmp_path / "a.tar", tmp_path / "old")
    (tmp_path / "a.tar").write_bytes(member("y.mp4") + END)
    assert run(capsys, tmp_path)[0] == 2
    (tmp_path / "old").replace(tmp_path / "a.tar")
    assert files(tmp_path) == before
    assert len(before) == 3


def test_an_index_is_only_replaced_when_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_shards(tmp_path, [("videos/a.mp4", make_clip(9, 8))]).folder
    before = files(folder)
    assert main([str(folder)]) == 2
    assert "has an index already; --check it, or replace it (--overwrite)" in capsys.readouterr().err
    assert files(folder) == before
