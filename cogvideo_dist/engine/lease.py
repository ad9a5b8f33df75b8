"""One job at a time writes into a run's folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, TextIO

from cogvideo_dist.engine.manifest import CheckpointError

FILE = ".lease.json"

BEAT_S = 20.0
"""Between two signs of life."""

SILENCE_S = 120.0
"""Without a sign of life, after which a job on another machine is taken to be dead."""


class Lease:
    """A file in the run's folder that says who works there, touched every ``BEAT_S`` seconds; deleted at the end.

    Raises ``CheckpointError`` naming the holder if another job lives there. One that has fallen silent is waited for, since it
    cannot be seen from another machine whether it is dead; one on this machine that is dead is not.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None], job: str = "") -> None:
        self.path, self.stopped = folder / FILE, Event()
        folder.mkdir(parents=True, exist_ok=True)
        self.me: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "job": job, "token": uuid.uuid4().hex, "started": time.time(),
        }  # fmt: skip
        self._take(self._dead_holder(say))
        self.thread = Thread(target=self._live, name="lease", daemon=True)
        self.thread.start()

    def release(self) -> None:
        self.stopped.set()
        self.thread.join()
        with self._locked():
            if self._holder() == self.me:
                self.path.unlink()

    def _holder(self) -> dict[str, Any] | None:
        return _read(self.path)

    def _dead_holder(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Who held it and does not live, if anybody; an error if one does."""
        holder, sign, said = self._holder(), self._sign(), False
        end = time.monotonic() + SILENCE_S
        while holder is not None and not self._dead_here(holder) and time.monotonic() < end:
            if holder["host"] == self.me["host"]:
                raise CheckpointError(self._taken(holder))
            if not said:
                say(f"{self._taken(holder)}; it has {SILENCE_S:.0f} s for a sign of life")
                said = True
            time.sleep(min(1.0, SILENCE_S / 10))
            if self._sign() not in (sign, None):
                raise CheckpointError(self._taken(holder))
            holder = self._holder()
        return holder

    def _dead_here(self, holder: dict[str, Any]) -> bool:
        if holder["host"] != self.me["host"] or not isinstance(holder["pid"], int):
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return holder["pid"] == os.getpid()  # this very process, at an earlier run

    def _taken(self, holder: dict[str, Any]) -> str:
        job = f", job {holder['job']}" if holder["job"] else ""
        return (
            f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']}{job}; stop that, or use another "
            "run.dir"
        )

    def _sign(self) -> int | None:
        """When the holder last touched its file, on the file system's clock."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None

    def _take(self, dead: dict[str, Any] | None) -> None:
        """Whoever of several that start at once is the first to lock the file is the holder, the others find him in it."""
        with self._locked() as file:
            holder = self._holder()
            if holder != dead:
                raise CheckpointError(self._taken(holder or self.me))
            file.truncate(0)
            file.write(json.dumps(self.me))

    @contextmanager
    def _locked(self) -> Iterator[TextIO]:
        """The file, which nobody else writes meanwhile; the lock ends with this process at the latest."""
        while True:
            with self.path.open("a", encoding="utf-8") as file:
                with suppress(
                    OSError
                ):  # of file systems without locks; then only starts in the same moment are not told apart
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self.path.exists() and self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    yield file
                    return

    def _live(self) -> None:
        while not self.stopped.wait(BEAT_S):
            try:
                os.utime(self.path)
            except OSError:  # a full or absent disk says so where checkpoints are written
                continue


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or one that was killed as it began
        return None
    return found if isinstance(found, dict) and {"host", "pid", "job", "token"} <= found.keys() else None
