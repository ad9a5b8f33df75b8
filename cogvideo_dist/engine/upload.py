"""Committed checkpoints, copied to an object store beside the training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import fsspec

from cogvideo_dist.engine.checkpoint import checkpoints
from cogvideo_dist.engine.manifest import NAME

Result = TypeVar("Result")

PARTIAL = f"{NAME}.partial"
"""Lies in a folder whose upload is not finished, with the manifest: whose upload it is."""

ATTEMPTS = 5
PATIENCE_S = 2.0
"""Before the second attempt; twice as long before each further one."""


class Uploader:
    """Copies checkpoints to ``url/step-N``, one after another, the manifest last: a folder with a manifest is whole.

    An upload that was cut off is gone on with, file by file; one that fails for good is said, and tried again when the run is
    started again.
    """

    def __init__(self, folder: Path, url: str, *, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.waiting: set[str] = set()
        self.queue: SimpleQueue[Path | None] = SimpleQueue()
        for earlier in checkpoints(folder):
            self.add(earlier)
        self.thread = Thread(target=self._work, name="upload", daemon=True)
        self.thread.start()

    def add(self, checkpoint: Path) -> None:
        self.waiting.add(checkpoint.name)
        self.queue.put(checkpoint)

    def wants(self, checkpoint: Path) -> bool:
        """Whether it must not be deleted yet."""
        return checkpoint.name in self.waiting

    def close(self, *, wait: bool) -> None:
        """``wait`` for what is left to copy."""
        self.queue.put(None)
        if wait:
            self.thread.join()

    def _work(self) -> None:
        while checkpoint := self.queue.get():
            try:
                upload(checkpoint, self.fs, self.root)
            except Exception as error:  # whatever a store's library raises
                reason = " ".join(str(error).split()) or type(error).__name__
                self.say(f"warning: {checkpoint} could not be uploaded: {reason}")
            finally:
                self.waiting.discard(checkpoint.name)


def upload(checkpoint: Path, fs: Any, root: str) -> None:
    """Copy a committed checkpoint to ``root/step-N`` of a file system of fsspec. What lies there already is not sent again."""
    target = f"{root.rstrip('/')}/{checkpoint.name}"
    manifest = (checkpoint / NAME).read_bytes()
    if _insist(lambda: _content(fs, f"{target}/{NAME}")) == manifest:
        return
    _insist(lambda: _claim(fs, target, manifest))
    for name, facts in json.loads(manifest)["files"].items():
        _insist(partial(_send, fs, checkpoint / name, f"{target}/{name}", size=facts["size"]))
    _insist(lambda: fs.pipe_file(f"{target}/{NAME}", manifest))
    _insist(lambda: fs.rm_file(f"{target}/{PARTIAL}"))


def _claim(fs: Any, target: str, manifest: bytes) -> None:
    """Make ``target`` the place of this checkpoint; what lies there of another is deleted."""
    if _content(fs, f"{target}/{PARTIAL}") == manifest:
        return
    if fs.exists(target):  # of another run, or of this one before it went back to an older step
        if fs.exists(f"{target}/{NAME}"):
            fs.rm_file(f"{target}/{NAME}")  # first, since it says that all the others are there
        fs.rm(target, recursive=True)
    fs.makedirs(target, exist_ok=True)
    fs.pipe_file(f"{target}/{PARTIAL}", manifest)


def _send(fs: Any, source: Path, target: str, *, size: int) -> None:
    if _size(fs, target) == size:
        return
    fs.put_file(str(source), target)
    if (found := _size(fs, target)) != size:
        raise OSError(f"{target} has arrived with {found} of {size} bytes")


def _size(fs: Any, path: str) -> int | None:
    fs.invalidate_cache()
    try:
        return int(fs.size(path))
    except FileNotFoundError:
        return None


def _content(fs: Any, path: str) -> bytes | None:
    fs.invalidate_cache()
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return None


def _insist(action: Callable[[], Result]) -> Result:
    """Several attempts at what a network may spoil."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception:  # whatever a store's library raises
            if attempt == ATTEMPTS:
                raise
            time.sleep(PATIENCE_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable")
