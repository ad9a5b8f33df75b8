"""The files of a set of shards, read from their beginnings to their ends; and whether they still hold what their index says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data.index import Index, Member, Record
from cogvideo_dist.data.shards import shown
from cogvideo_dist.data.storage import Store, is_remote

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".zip")
"""Endings of archives that are no plain tars."""

Seen = Callable[[int], None]
"""Is told how many bytes more have been read; from any thread."""


def unseen(count: int) -> None:
    """Nobody looks on."""


class ShardFiles:
    """The shards below ``root``, a folder or a URL, and ``packed``: archives that would have to be unpacked first."""

    def __init__(self, root: str, remote: Remote | None = None) -> None:
        self.store = Store(root, remote or Remote())
        if not is_remote(root) and not Path(root).is_dir():
            raise ValueError(f"{root}: no such folder")
        self.names = [name for name in self.store.list() if not is_hidden(name)]
        self.packed = [] if is_remote(root) else list(packed_in(Path(root)))
        if not self.names and not self.packed:
            raise ValueError(f"{root}: no .tar files")

    def pieces(self, shard: str, seen: Seen = unseen) -> Iterator[bytes]:
        """A shard's bytes."""
        for piece in self.store.stream(shard):
            seen(len(piece))
            yield piece

    def again(self, shard: str, member: Member) -> bytes:
        """A member's bytes once more."""
        data = bytearray(member.size)
        if not self.store.read_into(shard, member.offset, out=memoryview(data)):
            raise ValueError(f"{shard}: became shorter while it was read")
        return bytes(data)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, begins with a dot, as what some systems and tools leave behind does."""
    return any(part.startswith(".") for part in name.split("/"))


def packed_in(folder: Path) -> Iterator[str]:
    """Archives of a folder that are no plain tars."""
    names = (
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.name.lower().endswith(PACKED)
    )
    return (name for name in names if not is_hidden(name))


def check_set(index: Index, files: ShardFiles, *, workers: int = 1, seen: Seen = unseen) -> Iterator[str]:
    """A line for every damage: shards that are missing or cut short, and members whose bytes are not those of the index."""
    rows = index.column("shard")
    order = np.argsort(rows, kind="stable")
    places = dict(zip(index.shards, np.split(order, np.searchsorted(rows[order], np.arange(1, len(index.shards))))))
    whole = []
    for shard, end in index.ends().items():
        if shard not in files.names:
            yield f"{shown(shard)}: no such shard, but the index lists it"
        elif (size := files.store.size(shard)) < end:
            yield f"{shown(shard)}: has {size} bytes, its index needs {end}"
        else:
            whole.append(shard)

    def check(shard: str) -> list[str]:
        return list(_damages(shard, [index[int(row)] for row in places[shard]], files.pieces(shard, seen)))

    executor = ThreadPoolExecutor(workers)
    try:
        for lines in executor.map(check, whole):
            yield from lines
    finally:
        executor.shutdown(cancel_futures=True)


def _damages(shard: str, records: list[Record], pieces: Iterator[bytes]) -> Iterator[str]:
    """The members that are not as in the index; the shard is read once, and one piece of it held at a time."""
    members = sorted(
        (member.offset, member, f"{record.key}.{extension}")
        for record in records
        for extension, member in record.members.items()
    )
    reader = _Forward(pieces)
    for offset, member, name in members:
        reader.pass_over(offset - reader.at)
        if reader.digest(member.size) != member.checksum:
            yield f"{shown(shard)}: the {member.size} bytes of {name} at {offset} are not those of the index"


class _Forward:
    """Bytes that come in pieces, taken in any portions."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.piece, self.at = pieces, memoryview(b""), 0

    def pass_over(self, count: int) -> None:
        for _ in self._portions(count):
            pass

    def digest(self, count: int) -> str:
        digest = xxhash.xxh3_128()
        for portion in self._portions(count):
            digest.update(portion)
        return digest.hexdigest()

    def _portions(self, count: int) -> Iterator[memoryview]:
        while count > 0:
            if not self.piece:
                self.piece = memoryview(next(self.pieces, b""))
                if not self.piece:
                    return
            portion, self.piece = self.piece[:count], self.piece[count:]
            self.at += len(portion)
            count -= len(portion)
            yield portion
