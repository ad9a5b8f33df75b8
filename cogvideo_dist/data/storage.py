"""Where the bytes of shards are: a folder of this machine, or a URL that fsspec knows (s3://, gs://, https:// ...).

What may pass (a connection cut, a time-out, an overloaded server, a file handle gone stale) is tried again, and is a
``StorageError`` if it does not pass; fewer bytes than were asked for never go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data.cache import Cache, Entry, OpenFile
from cogvideo_dist.data.index import ABOUT, CHECKSUM, INDEX, file_checksum
from cogvideo_dist.data.remote import PIECE, STALL, Facts, Server, is_lasting, is_remote, is_wrong_use, without_secrets

__all__ = ["StorageError", "Store", "is_remote"]

OPEN_FILES = 64
"""Shards that stay open for the next read."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try and, at most, before any. Each process adds a part of its own, so that not all come at once."""

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)


class StorageError(OSError):
    """Bytes that could not be had: which, from where, after how many tries and why. ``missing``: there is no such file."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class Store:
    """The files below ``root``, a path or a URL. Blocking; for any number of threads, and for children of this process too.

    ``sleep`` waits between tries; ``stall``: seconds after which a server that sends nothing has failed.
    """

    def __init__(
        self, root: str, remote: Remote, *, sleep: Callable[[float], None] = time.sleep, stall: float = STALL
    ) -> None:
        self.root, self.remote = root, remote
        tries = _Tries(without_secrets(root).rstrip("/") if is_remote(root) else root, remote.retries, sleep)
        self._place: _Folder | _Site = _Folder(root, tries)
        if is_remote(root):
            self._place = _Site(root, remote, tries=tries, stall=stall)

    def local_index(self) -> Path:
        """A folder of this machine with the set's index: ``root``, or a copy of the index that is there now.

        Raises ``ValueError`` if a remote set has none, or one that does not fit together.
        """
        return self._place.local_index()

    def read_into(self, shard: str, offset: int, *, out: memoryview, afresh: bool = False) -> bool:
        """Fill ``out`` with a shard's bytes from ``offset`` on; false if it ends before.

        ``afresh``: what was read before is in doubt. Of a shard that was fetched whole the copy is thrown away then and fetched
        again: once by a process, for if it stays in doubt the server's is the damaged one.
        """
        return self._place.read_into(shard, offset, out=out, afresh=afresh)

    def size(self, shard: str) -> int:
        """Bytes of a shard, asked for anew."""
        return self._place.size(shard)

    def stream(self, shard: str) -> Iterator[bytes]:
        """A shard's bytes from its beginning to its end, without keeping them."""
        return self._place.stream(shard)

    def list(self) -> list[str]:
        """The names of all .tar files, those in folders below too, in order."""
        return sorted(name for name in self._place.names() if name.endswith(".tar"))


@dataclass(frozen=True)
class _Tries:
    """Tries again what failed in a way that may pass. ``place`` is a set's, as it may be shown."""

    place: str
    retries: int
    sleep: Callable[[float], None]

    def __call__(self, what: Callable[[], Result], doing: str, shard: str) -> Result:
        attempt = 0
        while True:
            try:
                return what()
            except Exception as error:
                self.failed(error, doing, shard, attempt)
            attempt += 1

    def failed(self, error: Exception, doing: str, shard: str, attempt: int) -> None:
        """Wait for the next try, or raise: ``StorageError``, or what was no fault of the storage. ``attempt`` counts from 0."""
        if isinstance(error, StorageError) or is_wrong_use(error):
            raise error
        cause = without_secrets(f"{type(error).__name__}: {error}".rstrip(": "))
        lasting = is_lasting(error)
        told = f"{self.place}/{shard}: {doing} failed, try {attempt + 1} of {self.retries + 1}; {cause}"
        if lasting or attempt == self.retries:
            raise StorageError(told, missing=lasting and isinstance(error, FileNotFoundError)) from None
        pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * (1 + os.getpid() % 64 / 128)
        _LOG.warning("%s; again in %.1f s", told, pause)
        self.sleep(pause)


class _OpenFiles:
    """Files that stay open, those used last. Its steps are single ones of the dictionary, so that threads need no lock."""

    def __init__(self) -> None:
        self.files: OrderedDict[str, OpenFile] = OrderedDict()

    def use(self, name: str, opening: Callable[[], OpenFile], what: Callable[[OpenFile], Result]) -> Result:
        """Do something with a file, which is opened again after an error."""
        file = self.files.get(name) or opening()
        try:
            result = what(file)
        except OSError:
            self.files.pop(name, None)
            raise
        self.files.pop(name, None)
        self.files[name] = file
        while len(self.files) > OPEN_FILES:
            self.files.popitem(last=False)
        return result

    def drop_deleted(self) -> None:
        """Free the room on disk of files that somebody has deleted."""
        for name, file in list(self.files.items()):
            if file.is_deleted():
                self.files.pop(name, None)


class _Folder:
    """A folder of this machine."""

    def __init__(self, root: str, tries: _Tries) -> None:
        self.root, self.tries, self.open = Path(root), tries, _OpenFiles()

    def local_index(self) -> Path:
        return self.root

    def read_into(self, shard: str, offset: int, *, out: memoryview, afresh: bool) -> bool:
        return self._tried(shard, lambda file: file.read_into(offset, out), f"reading {len(out)} bytes at {offset}")

    def size(self, shard: str) -> int:
        return self._tried(shard, OpenFile.size, "asking for its size")

    def stream(self, shard: str) -> Iterator[bytes]:
        size = self.size(shard)
        for at in range(0, size, PIECE):
            piece = bytearray(min(PIECE, size - at))
            if not self.read_into(shard, at, out=memoryview(piece), afresh=False):
                raise StorageError(f"{self.root / shard}: had {size} bytes, and now ends before {at + len(piece)}")
            yield bytes(piece)

    def names(self) -> Iterable[str]:
        return (path.relative_to(self.root).as_posix() for path in self.root.rglob("*.tar") if path.is_file())

    def _tried(self, shard: str, what: Callable[[OpenFile], Result], doing: str) -> Result:
        def once() -> Result:
            return self.open.use(shard, lambda: OpenFile(self.root / shard), what)

        return self.tries(once, doing, shard)


class _Site:
    """A folder of a server."""

    def __init__(self, root: str, remote: Remote, *, tries: _Tries, stall: float) -> None:
        self.root, self.whole_shards, self.tries, self.open = root.rstrip("/"), remote.whole_shards, tries, _OpenFiles()
        self.server = Server(root, stall=stall)
        self.cache = Cache(Path(remote.cache).expanduser(), limit=int(remote.gigabytes * 1e9))
        self.sizes: dict[str, int | None] = {}
        self.ranged: bool | None = None
        self.fetched_again: set[Entry] = set()

    def local_index(self) -> Path:
        try:
            about = b"".join(self.stream(ABOUT))
            digest = self._digest_in(about)
            folder = self.cache.folder / "indexes" / f"{_hashed(self.root)}-{digest}"
            with self.cache.locked(_hashed(self.root)):
                self._keep_index(folder, about, digest)
        except StorageError as error:
            if not error.missing:
                raise
            raise ValueError(
                f"{self.tries.place} has no index ({ABOUT} and {INDEX}); make it with data_tools/index_shards.py"
            ) from None
        return folder

    def read_into(self, shard: str, offset: int, *, out: memoryview, afresh: bool) -> bool:
        doing = f"reading {len(out)} bytes at {offset}"
        size = None if self.whole_shards else self._ranged_size(shard, afresh=afresh)
        if size is None:
            return self._read_kept(shard, lambda file: file.read_into(offset, out), doing, afresh)
        if offset + len(out) > size:
            return False
        for at in range(0, len(out), PIECE):
            out[at : at + PIECE] = self._piece(shard, offset + at, min(PIECE, len(out) - at))
        return True

    def size(self, shard: str) -> int:
        size = self._facts(shard).size
        return self._read_kept(shard, OpenFile.size, "asking for its size", False) if size is None else size

    def stream(self, shard: str) -> Iterator[bytes]:
        size = self._ranged_size(shard, afresh=True)
        if size is None:
            return self._stream_whole(shard)
        return (self._piece(shard, at, min(PIECE, size - at)) for at in range(0, size, PIECE))

    def names(self) -> Iterable[str]:
        return self.tries(self.server.names, "listing", "")

    def _piece(self, shard: str, start: int, size: int) -> bytes:
        return self.tries(lambda: self.server.piece(shard, start, size=size), f"reading {size} bytes at {start}", shard)

    def _facts(self, shard: str) -> Facts:
        return self.tries(lambda: self.server.facts(shard), "asking for its size", shard)

    def _ranged_size(self, shard: str, *, afresh: bool) -> int | None:
        """A shard's bytes; none if parts of it cannot be asked for."""
        if self.ranged is None:
            self.ranged = self.tries(lambda: self.server.has_ranges(shard), "asking for a part", shard)
            if not self.ranged:
                _LOG.warning(
                    "%s: this server sends no parts of files; every shard that is read is fetched whole, and kept in %s",
                    self.tries.place,
                    self.cache.folder,
                )
        if not self.ranged:
            return None
        if afresh or shard not in self.sizes:
            self.sizes[shard] = self._facts(shard).size
        return self.sizes[shard]

    def _stream_whole(self, shard: str) -> Iterator[bytes]:
        """In one request, or as many as it takes: each begins at the beginning."""
        size, told = self._facts(shard).size, 0
        for attempt in count():
            begin = 0
            try:
                for piece in self.server.stream(shard):
                    begin += len(piece)
                    if begin > told:
                        yield piece[told - begin :]
                        told = begin
                if size is not None and begin != size:
                    raise OSError(f"{begin} bytes came where there are {size}")
                return
            except Exception as error:
                self.tries.failed(error, f"reading on at {told} of {size} bytes", shard, attempt)

    def _read_kept(self, shard: str, what: Callable[[OpenFile], Result], doing: str, afresh: bool) -> Result:
        """Do something with the copy of a shard that is kept."""

        def once() -> Result:
            return self.open.use(shard, lambda: self._fetched(shard), used)

        def used(file: OpenFile) -> Result:
            file.touch()
            return what(file)

        if afresh:
            self.open.files.pop(shard, None)
            self.open.files[shard] = self.tries(lambda: self._fetched(shard, again=True), "fetching it again", shard)
        return self.tries(once, doing, shard)

    def _fetched(self, shard: str, *, again: bool = False) -> OpenFile:
        """The copy that is kept of the shard as the server has it now."""
        facts = self._facts(shard)
        entry = Entry(_hashed(self.root, shard), _hashed(str(facts.size), facts.tag))
        bad = self.cache.find(entry) if again and entry not in self.fetched_again else None
        file = self.cache.open(entry, lambda: self.stream(shard), size=facts.size, bad=bad)
        if again:
            self.fetched_again.add(entry)
        self.open.drop_deleted()
        return file

    def _keep_index(self, folder: Path, about: bytes, digest: str) -> None:
        """Bring the index to ``folder``, which is named by its digest: what lies there never becomes another."""
        folder.mkdir(parents=True, exist_ok=True)
        index, aside = folder / INDEX, folder / f"{INDEX}.partial"
        if not index.is_file() or file_checksum(index) != digest:
            with aside.open("wb") as file:
                for piece in self.stream(INDEX):
                    file.write(piece)
            if file_checksum(aside) != digest:
                raise ValueError(
                    f"{self.tries.place}/{INDEX} is not what {ABOUT} beside it describes; upload both again, or make them "
                    "again with data_tools/index_shards.py"
                )
            aside.rename(index)
        aside.write_bytes(about)
        aside.rename(folder / ABOUT)

    def _digest_in(self, about: bytes) -> str:
        try:
            digest = json.loads(about)["digest"]
        except (ValueError, KeyError, TypeError, RecursionError):
            digest = None
        if not isinstance(digest, str) or not CHECKSUM.fullmatch(digest):
            raise ValueError(
                f"{self.tries.place}/{ABOUT} is no index of this package; make it with data_tools/index_shards.py"
            )
        return digest


def _hashed(*words: str) -> str:
    """A name for a file; a root's password cannot be told from it."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
