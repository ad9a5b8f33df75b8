"""Copies of checkpoints in a folder and in an S3 store: whole if there is a manifest, gone on with after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest

from cogvideo_dist.config.schema import Checkpoint
from cogvideo_dist.engine import upload as module
from cogvideo_dist.engine.checkpoint import Stored, checkpoints
from cogvideo_dist.engine.manifest import NAME
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.engine.upload import ATTEMPTS, upload
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.data.servers import s3_server
from tests.engine.saved_states import Tensors, save, saved, state
from tests.killing import tree

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
STEP = "step-000005"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
        )
        client.create_bucket(Bucket="copies")
        yield url


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL under which nothing lies."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    if request.param == "folder":
        yield (tmp_path / "store").as_uri()
        return
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": request.getfixturevalue("s3")}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield f"s3://copies/{tmp_path.name}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "ckpt", 5)
    return tmp_path / "ckpt" / STEP


class Calls:
    """What is done to a store, in order; ``errors`` are raised first."""

    def __init__(self, url: str, patch: pytest.MonkeyPatch) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.done: list[tuple[str, str]] = []
        self.errors: list[Exception] = []
        for name in ("put_file", "pipe_file", "rm", "rm_file"):
            patch.setattr(self.fs, name, self._noted(name, getattr(self.fs, name)), raising=False)

    def _noted(self, name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.errors and name == "put_file":
                raise self.errors.pop(0)
            path = arguments[1] if name == "put_file" else arguments[0]
            self.done.append((name, str(path).rsplit("/", 1)[-1]))
            return function(*arguments, **options)

        return call

    def sent(self) -> list[str]:
        return [name for action, name in self.done if action == "put_file"]

    def fetch(self, into: Path, name: str = STEP) -> Stored:
        """The copy, read again by its hashes."""
        self.fs.invalidate_cache()
        self.fs.get(f"{self.root}/{name}/", f"{into}/", recursive=True)
        stored = Stored.open(into)
        stored.verify()
        return stored


def shards(checkpoint: Path) -> set[str]:
    return {path.name for path in checkpoint.glob("*.safetensors")}


def test_the_manifest_comes_last(place: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(place, monkeypatch)
    upload(checkpoint, calls.fs, calls.root)
    actions = [call for call in calls.done if call[0] != "rm_file"]
    assert actions[0] == ("pipe_file", f"{NAME}.partial")
    assert set(calls.sent()) == shards(checkpoint)
    assert actions[-1] == ("pipe_file", NAME)
    stored = calls.fetch(tmp_path / "fetched")
    assert tree(stored.path) == tree(checkpoint)
    calls.done.clear()
    upload(checkpoint, calls.fs, calls.root)
    assert calls.done == [], "what is there is not sent again"


KILLED = """
import os, signal, sys
from pathlib import Path
import fsspec
from cogvideo_dist.engine.upload import upload
checkpoint, url, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
fs, root = fsspec.core.url_to_fs(url)
put, sent = fs.put_file, []
def half(source, target, **options):
    sent.append(target)
    if len(sent) == last:
        if url.startswith("file:"):
            Path(target).write_bytes(Path(source).read_bytes()[:50])
        os.kill(os.getpid(), signal.SIGKILL)
    put(source, target, **options)
fs.put_file = half
upload(checkpoint, fs, root)
"""


def kill_upload(checkpoint: Path, url: str, *, last: int) -> None:
    """Of file ``last`` (from 1), which is there in part where the store lets parts be seen."""
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint), url, str(last)], capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.long)], indirect=True)
def test_what_was_sent_before_a_kill_is_not_sent_again(
    place: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_upload(checkpoint, place, last=3)
    calls = Calls(place, monkeypatch)
    assert not calls.fs.exists(f"{calls.root}/{STEP}/{NAME}"), "nobody takes it for whole"
    upload(checkpoint, calls.fs, calls.root)
    assert len(calls.sent()) == len(shards(checkpoint)) - 2
    calls.fetch(tmp_path / "fetched")


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.long)])
def test_what_lies_there_of_another_run_is_replaced(
    place: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Of the same step, and so with files of the same names and sizes; its manifest goes first."""
    save(tmp_path / "other", 5, value=77.0)
    if whole:
        fs, root = fsspec.core.url_to_fs(place)
        upload(tmp_path / "other" / STEP, fs, root)
        fs.pipe_file(f"{root}/{STEP}/more.safetensors", b"of a larger world")
    else:
        kill_upload(tmp_path / "other" / STEP, place, last=3)
    calls = Calls(place, monkeypatch)
    upload(checkpoint, calls.fs, calls.root)
    assert set(calls.sent()) == shards(checkpoint)
    if whole:
        assert calls.done[0] == ("rm_file", NAME), "or a kill would leave a manifest without its files"
    stored = calls.fetch(tmp_path / "fetched")
    assert stored.whole("weights", "0.bias")[0] == 5
    assert {path.name for path in stored.path.iterdir()} == {*shards(checkpoint), NAME}


def test_errors_are_tried_again(place: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(place, monkeypatch)
    calls.errors = [OSError("the connection was lost"), TimeoutError(), RuntimeError("a library's own")]
    upload(checkpoint, calls.fs, calls.root)
    assert calls.errors == []
    calls.fetch(tmp_path / "fetched")


def test_one_that_fails_for_good_is_said_and_does_no_harm(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    calls = Calls(place, monkeypatch)
    calls.errors = [OSError("the store is closed")] * ATTEMPTS
    saver = Saver(tmp_path / "ckpt", Checkpoint(1, upload=place), mesh=ParallelMesh(), say=said.append)
    for step in (5, 6):
        saver.save(saved(step), [Tensors(state(step))])
        saver.finish()
    saver.close()
    assert said == [f"warning: {tmp_path / 'ckpt' / STEP} could not be uploaded: the store is closed"]
    assert [path.name for path in checkpoints(tmp_path / "ckpt")] == [STEP, "step-000006"]
    calls.fetch(tmp_path / "fetched", "step-000006")
    again = Saver(tmp_path / "ckpt", Checkpoint(1, upload=place), mesh=ParallelMesh(), say=said.append)
    again.close()
    calls.fetch(tmp_path / "fetched again")
    assert len(said) == 1, "the next start has copied it"


def test_what_waits_to_be_copied_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, gate, begun = (tmp_path / "store").as_uri(), threading.Event(), threading.Event()
    copy = module.upload

    def late(*arguments: Any) -> None:
        begun.set()
        gate.wait()
        copy(*arguments)

    monkeypatch.setattr(module, "upload", late)
    saver = Saver(tmp_path / "ckpt", Checkpoint(1, keep=1, upload=url), mesh=ParallelMesh(), say=print)
    for step in (1, 2, 3):
        saver.save(saved(step), [Tensors(state(step))])
        saver.finish()
    begun.wait()
    names = ["step-000001", "step-000002", "step-000003"]
    assert [path.name for path in checkpoints(tmp_path / "ckpt")] == names
    gate.set()
    saver.close()
    assert [path.name for path in checkpoints(tmp_path / "store")] == names
    for path in checkpoints(tmp_path / "store"):
        Stored.open(path).verify()
    following = Saver(tmp_path / "ckpt", Checkpoint(1, keep=1), mesh=ParallelMesh(), say=print)
    following.save(saved(4), [Tensors(state(4))])
    following.finish()
    following.close()
    assert [path.name for path in checkpoints(tmp_path / "ckpt")] == ["step-000004"]
