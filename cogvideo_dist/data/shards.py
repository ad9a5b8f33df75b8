"""WebDataset shards with a sidecar index: plain tar files that anyone can stream, and random access with checksums.

A folder holds ``shard-000000.tar`` ..., ``index.jsonl`` (one JSON object per sample, see ``Record``) and
``rejected.jsonl`` (one per sample that could not be used). A sample's members lie side by side in one shard:
``<key>.mp4``, ``<key>.txt``, ``<key>.json``. Keys are plain; the file's own name is in ``source``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError, with_config

from cogvideo_dist.config.schema import Size
from cogvideo_dist.data.decode import DecodeError

Kind = Literal["video", "image", "latent"]

INDEX, REJECTED = "index.jsonl", "rejected.jsonl"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.tar")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_CAPTION = 16 * 1024
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("mp4", "webm", "mov", "mkv"), "video"),
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), "image"),
}
"""What a file is, by its extension."""


class DataError(ValueError):
    """A sample that cannot be used, now or ever: its bytes are at fault, not the machine that reads them."""

    def __init__(self, key: str, source: str, reason: str) -> None:
        super().__init__(key, source, reason)
        self.key, self.source, self.reason = key, source, reason

    def __str__(self) -> str:
        return f"sample {self.key} ({shown(self.source)}): {self.reason}"


class Member(NamedTuple):
    """Where a member's bytes lie in its shard, and their SHA-256."""

    offset: int
    size: int
    sha256: str


@with_config(extra="forbid", allow_inf_nan=False)
@dataclass(frozen=True)
class Record:
    """One sample of the index.

    ``frames``, ``fps``, ``height``, ``width``: the clip as decoded and displayed; an image has one frame and fps 0.
    ``caption_length`` in characters. ``rotation``: degrees counterclockwise that the container asks for (already
    applied in height and width). A latent sample has the ``size`` in pixels that it stands for and its ``origin`` (what
    encoded it).
    """

    key: str
    source: str
    shard: str
    kind: Kind
    members: Mapping[str, Member]
    frames: int
    fps: float
    height: int
    width: int
    caption_length: int
    rotation: int = 0
    size: Size | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key):
            raise ValueError(f"key {self.key!r} must be 1 to 64 letters, digits, - or _")
        if not SHARD.fullmatch(self.shard):
            raise ValueError(f"shard {self.shard!r} must be the plain name of a .tar file")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r} must be one of {', '.join(get_args(Kind))}")
        if min(self.frames, self.height, self.width) < 1 or self.caption_length < 0 or self.fps < 0:
            raise ValueError("frames, height and width must be at least 1, fps and caption_length at least 0")
        if self.kind == "video" and self.fps == 0:
            raise ValueError("a video's fps must be above 0")
        if (self.kind == "latent") != (self.size is not None):
            raise ValueError("a latent sample has a size, and no other does")
        if not self.members:
            raise ValueError("members must list at least one")
        for extension, member in self.members.items():
            if min(member.offset, member.size) < 0 or not DIGEST.fullmatch(member.sha256):
                raise ValueError(f"member {extension!r} must be [offset, size, SHA-256 in hex]")

    @property
    def duration(self) -> float:
        """Seconds; only a video has one."""
        return self.frames / self.fps


def shown(name: str) -> str:
    """A file's name as one line: characters that are not printable are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def caption_of(data: bytes) -> str:
    """A caption file's text, stripped; raises ``DecodeError`` if it is no caption."""
    if len(data) > MAX_CAPTION:
        raise DecodeError(f"the caption has {len(data)} bytes, more than {MAX_CAPTION}")
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DecodeError(f"the caption is not UTF-8 (byte {error.start})") from None
    if not caption:
        raise DecodeError("the caption is empty")
    return caption


def read_index(folder: str | Path) -> list[Record]:
    """The samples of a folder of shards, in the order written; ``ValueError`` names the file and line that is wrong."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a folder of shards is made by data_tools/make_shards.py")
    reader = TypeAdapter(Record)
    records: list[Record] = []
    keys: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = reader.validate_json(line, strict=True)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                place = ".".join(str(part) for part in problem["loc"])
                raise ValueError(f"{path}:{number}: {place + ': ' if place else ''}{problem['msg']}") from None
            if record.key in keys:
                raise ValueError(f"{path}:{number}: key {record.key} is listed twice")
            keys.add(record.key)
            records.append(record)
    if not records:
        raise ValueError(f"{path}: lists no samples")
    return records


class ShardReader:
    """Random access to the samples of ``folder``; ``records`` is its index.

    Opens a shard for every read and keeps nothing, so it may be forked, pickled and shared. Raises ``ValueError`` at
    once if a shard is missing or shorter than its index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.records = read_index(folder)
        ends: dict[str, int] = {}
        for record in self.records:
            ends[record.shard] = max(ends.get(record.shard, 0), *(m.offset + m.size for m in record.members.values()))
        for shard, end in ends.items():
            path = self.folder / shard
            if not path.is_file():
                raise ValueError(f"{path}: no such shard, but {self.folder / INDEX} lists it")
            if path.stat().st_size < end:
                found = path.stat().st_size
                raise ValueError(f"{path}: has {found} bytes, its index needs {end}; copy the shard again")

    def read(self, record: Record, extension: str) -> bytes:
        """One member's bytes, checked; raises ``DataError`` if they are not the bytes that were written."""
        return read_member(self.folder, record, extension=extension)


def read_member(folder: Path, record: Record, *, extension: str) -> bytes:
    """As ``ShardReader.read``, for a record of a set that may have lost shards."""
    member = record.members.get(extension)
    if member is None:
        raise DataError(record.key, record.source, f"has no member {extension!r}, only {', '.join(record.members)}")
    with (folder / record.shard).open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
        raise DataError(
            record.key,
            record.source,
            f"{record.shard}: the {member.size} bytes of {record.key}.{extension} at {member.offset} are damaged "
            "(their SHA-256 is not the index's)",
        )
    return data
