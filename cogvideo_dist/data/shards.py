"""WebDataset shards with a sidecar index: plain tar files that anyone can stream, and random access with checksums.

A folder holds shards (``shard-000000.tar`` ... where this package wrote them), their index (``data/index.py``) and
``rejected.jsonl`` (one line per sample that could not be used). A sample's members are ``<key>.<extension>`` of one shard, for
example ``.mp4`` and ``.txt``. The file's own name is in the record's ``source``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data.decode import DecodeError
from cogvideo_dist.data.index import Index, Kind, Record, checksum
from cogvideo_dist.data.storage import Store, is_remote

MAX_CAPTION = 16 * 1024
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("mp4", "webm", "mov", "mkv"), "video"),
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), "image"),
}
"""What a file is, by its extension."""


class DataError(ValueError):
    """A sample that cannot be used, now or ever: its bytes are at fault, not the machine that reads them. ``code`` names the
    kind of defect in one or two words."""

    def __init__(self, key: str, source: str, reason: str, code: str = "") -> None:
        super().__init__(key, source, reason, code)
        self.key, self.source, self.reason, self.code = key, source, reason, code

    def __str__(self) -> str:
        return f"sample {self.key} ({shown(self.source)}): {self.reason}"


def shown(name: str) -> str:
    """A file's name as one line: characters that are not printable are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def caption_of(data: bytes, *, allow_empty: bool = False) -> str:
    """A caption's text without control characters, stripped; raises ``DecodeError`` if it is no caption."""
    if len(data) > MAX_CAPTION:
        raise DecodeError(f"the caption has {len(data)} bytes, more than {MAX_CAPTION}", "caption too long")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError(f"the caption is not UTF-8 (byte {error.start})", "caption encoding") from None
    caption = "".join(
        c if c.isprintable() else " " for c in text.replace("\r\n", "\n") if c == "\n" or c >= " "
    ).strip()
    if not caption and not allow_empty:
        raise DecodeError("the caption is empty", "caption empty")
    return caption


def caption_in(data: bytes, place: str, *, allow_empty: bool = False) -> str:
    """The caption in a member's bytes: all of them, or a field of a JSON object (``Record.caption``); errors as above."""
    _, _, field = place.partition(":")
    if not field:
        return caption_of(data, allow_empty=allow_empty)
    try:
        about = json.loads(data)
        text = about[field].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecodeError(
            f"no text {field!r} in the JSON beside it ({type(error).__name__})", "caption missing"
        ) from None
    return caption_of(text, allow_empty=allow_empty)


class ShardReader:
    """Random access to the samples of ``folder``, a path or a URL; ``records`` is its index.

    Keeps no state but open files, so any process may have its own. Raises ``ValueError`` at once if a shard on this machine is
    missing or shorter than its index says, unless another process has made that ``check``.
    """

    def __init__(self, folder: str | Path, remote: Remote | None = None, *, check: bool = True) -> None:
        self.records = Index.read(Store(str(folder), remote or Remote()).local_index())
        self.folder = Path(folder)
        self.store = Store(self.records.root if not is_remote(str(folder)) else str(folder), remote or Remote())
        if check and not is_remote(self.store.root):
            check_shards(self.records, self.store)

    def read(self, record: Record, extension: str) -> bytes:
        """One member's bytes, checked; raises ``DataError`` if they are not the bytes that were written."""
        return read_member(self.store, record, extension=extension)


def check_shards(index: Index, store: Store) -> None:
    """Refuse a set on this machine that lacks a shard or a part of one."""
    for shard, end in index.ends().items():
        path = Path(store.root) / shard
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: no such shard, but the index of {index.folder} lists it") from None
        if size < end:
            raise ValueError(f"{path}: has {size} bytes, its index needs {end}; copy the shard again")


def read_member(store: Store, record: Record, *, extension: str) -> bytes:
    """As ``ShardReader.read``, for a record of a set that may have lost shards."""
    data = bytearray(find_member(record, extension))
    read_member_into(store, record, extension=extension, out=memoryview(data))
    return bytes(data)


def find_member(record: Record, extension: str) -> int:
    """A member's size; raises ``DataError`` if the sample has none of that extension."""
    member = record.members.get(extension)
    if member is None:
        reason = f"has no member {extension!r}, only {', '.join(record.members)}"
        raise DataError(record.key, record.source, reason, "missing member")
    return member.size


def read_member_into(store: Store, record: Record, *, extension: str, out: memoryview) -> None:
    """Fill ``out``, which is as long as the member, with its bytes; checked as in ``read_member``.

    What a remote store delivers is asked for once more before it is called damaged.
    """
    member = record.members[extension]
    for attempt in range(2 if is_remote(store.root) else 1):
        whole = store.read_into(record.shard, member.offset, out=out, afresh=attempt > 0)
        if whole and checksum(out) == member.checksum:
            return
    raise DataError(
        record.key,
        record.source,
        f"{record.shard}: the {member.size} bytes of {record.key}.{extension} at {member.offset} are damaged "
        f"({'their checksum is not the index' if whole else 'the shard ends before'}{chr(39) + 's' if whole else ''})",
        "damaged bytes",
    )
