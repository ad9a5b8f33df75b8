"""A folder of what was fetched, which all of a user's processes on a machine share without one of them in charge.

Who fetches a file holds the lock that belongs to it; a lock ends with its process, however that ends. A file appears under its
name when it is whole. What was not used for longest is deleted first; who has it open still reads it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

SUFFIX, ASIDE = ".tar", ".partial"
LOCK_DIGITS = 3
"""Hex digits of a file's key that choose its lock: a folder of locks that does not grow."""


class OpenFile:
    """An open file that closes when nobody holds it any more, so that no thread reads from another's closed one."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def read_into(self, offset: int, out: memoryview) -> bool:
        """Fill ``out`` from ``offset`` on; false if the file ends before."""
        at = 0
        while at < len(out):
            count = os.preadv(self.number, [out[at:]], offset + at)
            if not count:
                return False
            at += count
        return True

    def write(self, offset: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            count = os.pwrite(self.number, left, offset)
            left, offset = left[count:], offset + count

    def size(self) -> int:
        return os.fstat(self.number).st_size

    def is_deleted(self) -> bool:
        return os.fstat(self.number).st_nlink == 0

    def touch(self) -> None:
        """Note that it was used just now."""
        now = time.time_ns()
        os.utime(self.number, ns=(now, now))

    def is_at(self, path: Path) -> bool:
        """Whether it is the file of that name."""
        return path.exists() and os.path.samestat(os.fstat(self.number), path.stat())


class Entry(NamedTuple):
    """A file's key and its version's, in hex."""

    key: str
    version: str


class Cache:
    """Files in ``folder``, at most ``limit`` bytes of them and what is being fetched just now."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def open(
        self, entry: Entry, pieces: Callable[[], Iterable[bytes]], *, size: int | None, bad: OpenFile | None = None
    ) -> OpenFile:
        """A file, fetched if it is not there or is the ``bad`` one.

        Raises ``OSError`` if ``pieces`` are not ``size`` bytes, ``ValueError`` if they are more than the cache may hold."""
        path = self.folder / f"{entry.key}-{entry.version}{SUFFIX}"
        if bad is None and (found := _opened(path)):
            return found
        with self.locked(entry.key):
            if (found := _opened(path)) and not (bad and bad.is_at(path)):
                return found  # another process was faster
            path.unlink(missing_ok=True)
            return self._fetched(path, pieces, size=size)

    def find(self, entry: Entry) -> OpenFile | None:
        return _opened(self.folder / f"{entry.key}-{entry.version}{SUFFIX}")

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Nobody else of this machine is inside with the same key."""
        with _lock(self._lock_of(key), fcntl.LOCK_EX):
            yield

    def _lock_of(self, key: str) -> Path:
        return self.folder / "locks" / key[:LOCK_DIGITS]

    def _fetched(self, path: Path, pieces: Callable[[], Iterable[bytes]], *, size: int | None) -> OpenFile:
        aside = path.with_name(path.name + ASIDE)
        try:
            file = OpenFile(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._reserve(file, size or 0)
            at = 0
            for piece in pieces():
                if at + len(piece) > (self.limit if size is None else size):
                    self._refuse(at + len(piece), size)
                file.write(at, piece)
                at += len(piece)
            if size is not None and at != size:
                self._refuse(at, size)
            if size is None:
                self._reserve(file, at)
            aside.rename(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return file

    def _refuse(self, found: int, size: int | None) -> None:
        if size is None:
            raise ValueError(self._too_large(found))
        raise OSError(f"{found} bytes came where there are {size}")

    def _too_large(self, size: int) -> str:
        return f"data.remote.gigabytes is {self.limit / 1e9:g}, less than a shard of {size / 1e9:g} GB; set it higher"

    def _reserve(self, file: OpenFile, size: int) -> None:
        """Delete what was not used for longest until ``size`` bytes have room, and take that room."""
        if size > self.limit:
            raise ValueError(self._too_large(size))
        with _lock(self.folder / "locks" / "room", fcntl.LOCK_EX):
            os.truncate(file.number, size)
            held, old = 0, list[tuple[int, int, Path]]()
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    about = path.stat()
                    if path.suffix == SUFFIX:
                        old.append((about.st_mtime_ns, about.st_size, path))
                    if path.suffix == SUFFIX or (path.suffix == ASIDE and not self._delete_abandoned(path)):
                        held += about.st_size
            for _, count, path in sorted(old):
                if held <= self.limit:
                    return
                path.unlink(missing_ok=True)
                held -= count

    def _delete_abandoned(self, aside: Path) -> bool:
        """Delete a file that nobody is fetching any more, because who began it was killed; whether it was one."""
        try:
            with _lock(self._lock_of(aside.name), fcntl.LOCK_EX | fcntl.LOCK_NB):
                aside.unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False


def _opened(path: Path) -> OpenFile | None:
    try:
        return OpenFile(path)
    except FileNotFoundError:
        return None


@contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(number, how)
        try:
            yield
        finally:
            fcntl.flock(number, fcntl.LOCK_UN)  # also for a child that was forked meanwhile and holds it open
    finally:
        os.close(number)
