"""Writes the shards that ``data/shards.py`` describes: the same samples give the same bytes, and a folder appears whole."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cogvideo_dist.data.index import INDEX, REJECTED, IndexWriter, Member, Record, checksum
from cogvideo_dist.protocols import Defect

Entry = tuple[str, Mapping[str, bytes], Mapping[str, Any]] | Defect
"""What is written: (key, members by extension, the record's other fields); or a sample that could not be used."""

EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.]{0,31}")


@dataclass
class Written:
    """What ``write_shards`` wrote: samples by kind, shards, bytes of members; and how many samples were rejected."""

    kinds: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    rejected: int = 0

    @property
    def samples(self) -> int:
        return sum(self.kinds.values())


def write_shards(
    folder: str | Path, entries: Iterable[Entry], *, max_shard_size: int = 10**9, overwrite: bool = False
) -> Written:
    """Write ``entries`` as shards of about ``max_shard_size`` bytes with their index; all or nothing.

    The same entries give the same bytes. Members ``json`` (the record's facts) are added here. ``folder`` must not
    exist, or be a folder of shards and ``overwrite`` be set; it appears when complete. Raises ``ValueError`` if there
    is no sample.
    """
    with _fresh(Path(folder), overwrite=overwrite) as temporary, ExitStack() as files:
        writer = _Writer(temporary, max_shard_size, files)
        files.callback(writer.close)
        for entry in entries:
            if isinstance(entry, Defect):
                writer.reject(entry)
            else:
                writer.add(*entry)
        if not writer.written.samples:
            raise ValueError(f"no sample to write ({writer.written.rejected} rejected); {folder} is left as it was")
        writer.finish()
    return writer.written


class _Writer:
    """The files of a folder in the making."""

    def __init__(self, folder: Path, max_shard_size: int, files: ExitStack) -> None:
        self.folder, self.max_shard_size, self.written = folder, max_shard_size, Written()
        self.index = IndexWriter()
        self.rejected = files.enter_context((folder / REJECTED).open("xb"))
        self.keys: set[str] = set()
        self.shard: ShardFile | None = None

    def reject(self, defect: Defect) -> None:
        self.written.rejected += 1
        self.rejected.write(json_line(rejection(defect)))

    def add(self, key: str, members: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        if key in self.keys:
            raise ValueError(f"key {key!r} is given twice")
        self.keys.add(key)
        members = with_facts(key, members, facts=facts)
        size = sum(map(len, members.values()))
        if self.shard is not None and self.shard.bytes + size > self.max_shard_size:
            self._finish_shard(self.shard)
            self.shard = None
        if self.shard is None:
            name = shard_name(self.written.shards)
            self.shard = ShardFile(self.folder / name, name=name)
            self.written.shards += 1
        self.shard.add(key, members, facts=facts)
        self.written.kinds[facts["kind"]] = self.written.kinds.get(facts["kind"], 0) + 1
        self.written.bytes += size

    def finish(self) -> None:
        if self.shard is not None:
            self._finish_shard(self.shard)
        sync(self.rejected)
        self.index.write(self.folder)

    def _finish_shard(self, shard: ShardFile) -> None:
        for record in shard.finish():
            self.index.add(record)

    def close(self) -> None:
        if self.shard is not None:
            self.shard.close()


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def with_facts(key: str, members: Mapping[str, bytes], *, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """A sample's members and the record's facts as one more, ``json``."""
    return {**members, "json": json_line({"key": key, **facts})}


def rejection(defect: Defect) -> dict[str, str]:
    """What ``rejected.jsonl`` says of a sample that could not be used."""
    return {"key": defect.key, "source": defect.source, "reason": defect.reason}


class ShardFile:
    """One tar file in the making at ``path``; ``name`` is what it will be called."""

    def __init__(self, path: Path, *, name: str) -> None:
        from webdataset import TarWriter  # reading needs no webdataset

        self.path, self.name, self.bytes = path, name, 0
        self.file = path.open("xb")
        self.tar = TarWriter(self.file, user="", group="", compress=False, encoder=False, mtime=0)
        self.waiting: list[tuple[str, dict[str, str], Mapping[str, Any]]] = []

    def add(self, key: str, members: Mapping[str, bytes], *, facts: Mapping[str, Any]) -> None:
        for extension in members:
            if not EXTENSION.fullmatch(extension):
                raise ValueError(f"sample {key}: {extension!r} is not an extension of lower-case letters and digits")
        self.tar.write({"__key__": key, **members})
        self.bytes += sum(map(len, members.values()))
        digests = {extension: checksum(members[extension]) for extension in sorted(members)}
        self.waiting.append((key, digests, facts))

    def finish(self) -> list[Record]:
        """Complete the tar; its samples, whose offsets are read back from the file itself."""
        self.tar.close()
        sync(self.file)
        self.close()
        with tarfile.open(self.path, "r:") as tar:
            places = {info.name: (info.offset_data, info.size) for info in tar}
        records = []
        for key, digests, facts in self.waiting:
            members = {ext: Member(*places[f"{key}.{ext}"], digest) for ext, digest in digests.items()}
            records.append(Record(key=key, shard=self.name, members=members, **facts))
        return records

    def close(self) -> None:
        self.tar.close()
        self.file.close()


def record_line(record: Record) -> bytes:
    """A record as a line of JSON, without what it does not say."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    return json_line({name: value for name, value in values.items() if value is not None and value != {}})


def json_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextmanager
def _fresh(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` if the block succeeds, and vanishes if it does not."""
    folder = folder.resolve()
    if folder.exists():
        if not overwrite:
            raise ValueError(f"{folder} already exists; choose another folder, or overwrite it (--overwrite)")
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} is not a folder of shards (it has no {INDEX}), so it is not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    temporary, old = (folder.with_name(f".{folder.name}.{role}-{mark}") for role in ("partial", "old"))
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync_folder(folder.parent)
        if old.exists():
            shutil.rmtree(old)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def sync(file: BinaryIO) -> None:
    """Have a file's bytes on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
