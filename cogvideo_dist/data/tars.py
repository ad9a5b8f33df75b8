"""Reads a tar file's members as they come, strictly: what is not as POSIX and GNU describe it is named, never skipped.

A header that a lenient reader takes for the end of the file costs the samples behind it in silence. Here a file ends with two
blocks of zeros and nothing but zeros after them, or it is damaged; and nothing is ever written under a member's name.
Formats: ustar (POSIX.1-1988), pax (POSIX.1-2001: path and size) and GNU's long names and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 512
END = bytes(BLOCK)
MAX_HEADER = 2**20
"""Bytes of a long name or of pax records, above which they are taken for damage."""

OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
PAX_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ")
DIRECTORY = b"5"
REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device", DIRECTORY: "a directory",
    b"6": "a FIFO", b"7": "a contiguous file", b"S": "a sparse file",
}  # fmt: skip
EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Types that have no bytes of their own."""

FOREIGN = {
    b"\x1f\x8b": "a gzip file", b"BZh": "a bzip2 file", b"\xfd7zXZ\0": "an xz file", b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\x03\x04": "a zip file", b"<": "an HTML or XML page", b"version https://git-lfs": "a pointer of Git LFS, not the file",
}  # fmt: skip
"""What files begin with that are given out as tars."""


class TarError(ValueError):
    """A file that is no whole tar: what is behind the damage cannot be told."""


class Entry(NamedTuple):
    """A member: its name as stored, where its header and its bytes begin, and how many they are.

    ``refusal``: why its bytes are not to be used, where it is no regular file or its name is no text.
    """

    name: str
    header: int
    offset: int
    size: int
    refusal: str | None = None


@dataclass
class _Extension:
    """What headers of GNU and pax say of the member behind them."""

    begin: int
    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


class TarReader:
    """The members of a tar that comes in ``pieces`` of any length; iterate once.

    While a member is at hand, ``content`` gives its bytes in pieces; what is not asked for is passed over. Raises ``TarError``
    with the offset where the file is no whole tar. Holds one piece at a time.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")
        self.at = 0
        self._left = 0

    def __iter__(self) -> Iterator[Entry]:
        extension: _Extension | None = None
        found = False
        while (block := self._header(found)) is not None:
            found, at, kind = True, self.at - BLOCK, block[156:157]
            size = _number(block[124:136], "size", at)
            if kind in (b"L", b"K", b"x", b"g"):
                extension = self._extend(extension or _Extension(at), kind, self._text(size, at))
                continue
            if extension is not None and extension.size is not None:
                size = extension.size
            entry = _entry(block, at, size, extension)
            extension, self._left = None, size
            if kind != DIRECTORY or size:
                yield entry
            for _ in self.content():
                pass
            self._skip(-size % BLOCK, f"of the member whose header is at {at}")
        if extension is not None:
            raise TarError(f"the header at {extension.begin} describes a member that does not come")
        if not found:
            raise TarError("no members: only zeros, an empty tar or a lost file")

    def content(self) -> Iterator[memoryview]:
        """The rest of the bytes of the member at hand."""
        while self._left:
            piece = self._some(self._left)
            if not piece:
                raise TarError(f"cut short: it ends at {self.at}, {self._left} bytes before its last member does")
            self._left -= len(piece)
            yield piece

    def _header(self, found: bool) -> bytes | None:
        """The next header, checked; nothing at the end of the file, behind which there are only zeros."""
        at, block = self.at, self._exactly(BLOCK)
        if len(block) < BLOCK or block == END:
            self._end(at, block, found=found)
            return None
        stored = _number(block[148:156], "checksum", at) if found or block[257:262] == b"ustar" else None
        if stored is None or stored != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise TarError(f"the header at {at} is damaged" if found else f"not a tar file: {_kind_of(block)}")
        if block[257:265] not in (b"ustar\x0000", b"ustar  \0"):
            raise TarError(f"the header at {at} is of another format than ustar, pax or GNU")
        return block

    def _end(self, at: int, block: bytes, *, found: bool) -> None:
        if not found and len(block) < BLOCK:
            raise TarError(f"not a tar file: {_kind_of(block)}")
        if len(block) < BLOCK or len(second := self._exactly(BLOCK)) < BLOCK:
            raise TarError(f"cut short: it ends at {self.at}, without the two blocks of zeros that end a tar")
        if second != END:
            raise TarError(f"bytes at {at + BLOCK} behind a single block of zeros, which two would have to be")
        while piece := self._some(2**62):
            if bytes(piece).strip(b"\0"):
                begin = self.at - len(bytes(piece).lstrip(b"\0"))
                raise TarError(f"bytes at {begin} behind the tar's end at {at} (are several files glued together?)")

    def _extend(self, extension: _Extension, kind: bytes, text: bytes) -> _Extension:
        """Take in the header before a member; two that say the same are ambiguous."""
        at = self.at
        if kind == b"K":  # a link's target, and links are refused
            return extension
        if kind == b"L":
            records: Mapping[bytes, bytes] = {b"path": text.removesuffix(b"\0")}
        else:
            records = _pax_records(text, at)
        if kind == b"g" and {b"path", b"size"} & set(records):
            raise TarError(f"the global header before {at} gives all members the same name or size")
        if kind == b"g":
            return extension
        if b"path" in records:
            if extension.name is not None:
                raise TarError(f"the headers before {at} name a member twice")
            extension.name = records[b"path"]
        if b"size" in records:
            if not records[b"size"].isdigit() or len(records[b"size"]) > 19 or extension.size is not None:
                raise TarError(f"the headers before {at} give no single size of digits")
            extension.size = int(records[b"size"])
        extension.sparse |= any(key.startswith(b"GNU.sparse") for key in records)
        return extension

    def _text(self, size: int, at: int) -> bytes:
        if size > MAX_HEADER:
            raise TarError(f"the header at {at} announces {size} bytes of names, more than {MAX_HEADER}")
        text = self._exactly(size)
        if len(text) < size:
            raise TarError(f"cut short: it ends at {self.at}, in the names that begin at {at + BLOCK}")
        self._skip(-size % BLOCK, f"of the names that begin at {at + BLOCK}")
        return text

    def _skip(self, count: int, what: str) -> None:
        if len(self._exactly(count)) < count:
            raise TarError(f"cut short: it ends at {self.at}, in the last block {what}")

    def _exactly(self, count: int) -> bytes:
        """The next bytes; fewer only at the end."""
        parts = []
        while count and (piece := self._some(count)):
            parts.append(bytes(piece))
            count -= len(piece)
        return b"".join(parts)

    def _some(self, most: int) -> memoryview:
        """At least one of the next bytes, none at the end."""
        while not self._piece:
            fresh = next(self._pieces, None)
            if fresh is None:
                return memoryview(b"")
            self._piece = memoryview(fresh)
        taken, self._piece = self._piece[:most], self._piece[most:]
        self.at += len(taken)
        return taken


def _entry(block: bytes, at: int, size: int, extension: _Extension | None) -> Entry:
    kind, begin = block[156:157], at + BLOCK
    name = extension.name if extension is not None else None
    if name is None:
        name = block[:100].rstrip(b"\0")
        prefix = block[345:500].rstrip(b"\0") if block[257:263] == b"ustar\0" else b""
        name = prefix + b"/" + name if prefix else name
    header = extension.begin if extension is not None else at
    refusal = REFUSED.get(kind)
    if kind in EMPTY and size:
        raise TarError(f"the header at {at} gives {size} bytes to {refusal}, which has none")
    if extension is not None and extension.sparse:
        refusal = REFUSED[b"S"]
    if refusal is None and kind not in (b"0", b"\0"):
        refusal = f"of the unknown type {kind.decode('latin-1')!r}"
    if refusal is not None:
        refusal = f"it is {refusal}, not a regular file"
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text, refusal = name.decode("utf-8", "backslashreplace"), refusal or "its name is not UTF-8"
    return Entry(text, header, begin, size, refusal)


def _number(field: bytes, what: str, at: int) -> int:
    """A number in octal digits, or as GNU writes those above 8 GiB: 0x80, then the number from its highest byte on."""
    if match := OCTAL.fullmatch(field):
        return int(match[1], 8)
    if what == "size" and field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    raise TarError(f"the header at {at} is damaged: its {what} {field!r} is no octal number")


def _pax_records(text: bytes, at: int) -> dict[bytes, bytes]:
    """Records ``<length> <key>=<value>\\n``, whose length counts all of them."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(text):
        match = PAX_RECORD.match(text, place)
        record = text[match.end() : place + int(match[1])] if match else b""
        key, equals, value = record[:-1].partition(b"=")
        if match is None or place + int(match[1]) > len(text) or record[-1:] != b"\n" or not equals or key in records:
            raise TarError(f"the pax records before {at} are damaged")
        records[key] = value
        place += int(match[1])
    return records


def _kind_of(block: bytes) -> str:
    if not block:
        return "it is empty"
    start = block.lstrip()
    known = next((kind for magic, kind in FOREIGN.items() if block.startswith(magic) or start.startswith(magic)), None)
    return f"it is {known}" if known else "its first 512 bytes are no header of one"
