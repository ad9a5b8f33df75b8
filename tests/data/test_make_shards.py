from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogvideo_dist.data.index import Index
from cogvideo_dist.data.shards import ShardReader
from data_tools.make_shards import byte_count, main
from tests.data.clips import add, make_clip, make_image, make_sound

CLIP = make_clip(9, 8)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr without the progress bar)."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return (
        code,
        out.splitlines(),
        [line for line in err.replace("\r", "\n").splitlines() if line.startswith("make_shards")],
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_clips_and_images_become_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "src", "videos/sub/a.mp4", make_clip(12, 24), "A cat.")
    add(tmp_path / "src", "images/b.png", make_image(), "\u4e00\u53ea\u732b\u3002\n")
    add(tmp_path / "src", "videos/.DS_Store", b"junk")
    code, out, err = run(capsys, tmp_path / "src", tmp_path / "dst")
    assert (code, err) == (0, [])
    assert len(out) == 1
    assert "wrote 1 image, 1 video" in out[0]
    image, video = Index.read(tmp_path / "dst")
    assert (image.source, image.kind, image.frames, image.fps, image.caption_length) == (
        "images/b.png",
        "image",
        1,
        0.0,
        4,
    )
    assert (video.source, video.kind, video.frames, video.fps) == ("videos/sub/a.mp4", "video", 12, 24.0)
    assert (video.height, video.width) == (48, 64)
    assert sorted(files(tmp_path / "dst")) == ["index.arrow", "index.json", "rejected.jsonl", "shard-000000.tar"]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "cab":
        add(tmp_path / "src", f"videos/{name}.mp4", CLIP, name)
    for name, options in {"1": (), "2": (), "3": ("--seed", 1), "4": ("--seed", 1)}.items():
        assert run(capsys, tmp_path / "src", tmp_path / name, *options)[0] == 0
        for path in (tmp_path / "src").rglob("*"):
            os.utime(path, (1, 1))
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert files(tmp_path / "3") == files(tmp_path / "4") != files(tmp_path / "1")


@pytest.mark.parametrize(
    ("name", "content", "caption", "reason"),
    [
        ("videos/x.mp4", CLIP, None, "no caption: "),
        ("videos/x.mp4", CLIP, " \n", "the caption is empty"),
        ("videos/x.mp4", CLIP, b"caf\xe9", "the caption is not UTF-8 (byte 3)"),
        ("videos/x.mp4", CLIP, "a" * 20_000, "the caption has 20000 bytes, more than 16384"),
        ("videos/x.mp4", b"", "A.", "the file is empty (0 bytes)"),
        ("videos/x.mp4", b"<html>404</html>", "A.", "not a readable MP4, MOV, MKV or WebM file"),
        ("videos/x.mp4", CLIP[: len(CLIP) // 2], "A.", "no video stream, or the part"),
        ("videos/x.mp4", CLIP[: len(CLIP) // 4], "A.", "not a readable MP4"),
        ("videos/x.mp4", make_clip(9, 8, container="fmp4")[:-203], "A.", "the file is cut short or damaged"),
        ("videos/x.mp4", make_sound(), "A.", "no video stream"),
        ("videos/x.avi", CLIP, "A.", "not one of mp4, webm, mov, mkv, png"),
        ("images/x.png", make_image()[:60], "A.", "the image is damaged"),
        ("videos/x\ny\u732b.mp4", b"", "A.", "the file is empty (0 bytes)"),
    ],
)
def test_each_bad_file_has_its_line_and_the_others_are_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    caption: str | bytes | None,
    reason: str,
) -> None:
    add(tmp_path / "src", name, content, caption)
    add(tmp_path / "src", "videos/good.mp4", CLIP)
    code, out, err = run(capsys, tmp_path / "src", tmp_path / "dst")
    assert code == 1
    assert len(err) == 1
    shown = name.replace("\n", "\\n")
    assert err[0].startswith(f"make_shards: rejected {shown}: {reason}")
    rejected = json.loads((tmp_path / "dst" / "rejected.jsonl").read_text())
    assert rejected["source"] == name
    assert rejected["reason"].startswith(reason)
    assert [record.source for record in Index.read(tmp_path / "dst")] == ["videos/good.mp4"]
    assert "rejected 1" in out[-1]
    assert run(capsys, tmp_path / "src", tmp_path / "dst2", "--allow-rejects")[0] == 0


def test_two_files_never_share_a_caption_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("videos/a.mp4", "images/a.png", "videos/b.mp4"):
        add(tmp_path / "src", name, make_image() if name.endswith("png") else CLIP)
    code, _, err = run(capsys, tmp_path / "src", tmp_path / "dst")
    assert code == 1
    assert err == [
        f"make_shards: rejected {name}: its caption a.txt is also that of {other}; rename one, or use a manifest"
        for name, other in (("images/a.png", "videos/a.mp4"), ("videos/a.mp4", "images/a.png"))
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_manifest_names_files_and_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    add(tmp_path, "clips/a, b.mp4", CLIP, None)
    rows = [("clips/a, b.mp4", 'Says "hi",\nthen leaves.'), ("clips/gone.mp4", "B."), ("../clip.mp4", "C.")]
    quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    manifest = tmp_path / f"list.{kind}"
    if kind == "csv":
        manifest.write_text("\n".join(["path,caption", *quoted]), encoding="utf-8-sig")
    else:
        manifest.write_text("\n".join(json.dumps({"path": path, "caption": caption}) for path, caption in rows))
    code, _, err = run(capsys, tmp_path, tmp_path / "dst", "--manifest", manifest)
    assert code == 1
    assert err == [
        "make_shards: rejected clips/gone.mp4: No such file or directory",
        "make_shards: rejected ../clip.mp4: its path leads out of the folder",
    ]
    reader = ShardReader(tmp_path / "dst")
    assert reader.read(reader.records[0], "txt").decode() == rows[0][1]


def test_errors_of_the_user_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "src", "videos/a.mp4", CLIP)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("file,text\na.mp4,A.\n")
    (tmp_path / "bad.jsonl").write_text('{"path": "videos/a.mp4", "caption": "A."}\n{oops\n')
    add(tmp_path / "all_bad", "videos/a.mp4", b"")
    for arguments, message in {
        (tmp_path / "gone", tmp_path / "dst"): "gone: no such folder",
        (tmp_path / "empty", tmp_path / "dst"): "no files in",
        (tmp_path / "src", tmp_path / "empty"): "already exists; choose another folder",
        (tmp_path / "src", tmp_path / "empty", "--overwrite"): "is not a folder of shards",
        (tmp_path / "src", tmp_path / "dst", "--manifest", tmp_path / "gone.csv"): "gone.csv: cannot be read",
        (
            tmp_path / "src",
            tmp_path / "dst",
            "--manifest",
            tmp_path / "bad.csv",
        ): "bad.csv:2: expected path and caption",
        (tmp_path / "src", tmp_path / "dst", "--manifest", tmp_path / "bad.jsonl"): "bad.jsonl:2: not valid JSON",
        (tmp_path / "src", tmp_path / "dst", "--manifest", tmp_path / "src"): "must end in .csv or .jsonl",
        (tmp_path / "all_bad", tmp_path / "dst"): "no sample to write (1 rejected)",
    }.items():
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, [])
        assert err[-1].startswith("make_shards: error: ")
        assert message in err[-1]
        assert not (tmp_path / "dst").exists()


def test_sizes_of_shards_are_read_in_units() -> None:
    assert [byte_count(text) for text in ("1GB", "500MB", "1.5 kb", "1GiB", "42")] == [
        10**9,
        5 * 10**8,
        1500,
        2**30,
        42,
    ]


def test_the_command_itself_explains_and_refuses(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "data_tools" / "make_shards.py")]
    done = subprocess.run(
        [*command, "a", "b", "--max-shard-size", "big"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("make_shards: error: argument --max-shard-size")
    assert "Traceback" not in done.stderr
