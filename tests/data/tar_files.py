"""Tars as bytes: whole ones of any format, single headers with any field set, and what is found in them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping

from cogvideo_dist.data.index import Member, Record
from cogvideo_dist.data.indexing import Layout, Rejected, scan_shard
from cogvideo_dist.data.probing import Prober
from cogvideo_dist.data.tars import Entry, TarReader

END = bytes(1024)


def tar_of(members: Iterable[tuple[str, bytes]], *, form: int = tarfile.PAX_FORMAT) -> bytes:
    """As tarfile writes it, padding of the end included."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def member(name: str, data: bytes = b"", *, fields: Mapping[int, bytes] | None = None) -> bytes:
    """One member in ustar; ``fields``: bytes of its header by their place, whose checksum is made to fit."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    for place, value in (fields or {}).items():
        header[place : place + len(value)] = value
    return with_checksum(bytes(header)) + data + bytes(-len(data) % 512)


def with_checksum(header: bytes) -> bytes:
    """A header whose checksum fits its other bytes."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def kind(flag: bytes) -> dict[int, bytes]:
    return {156: flag}


def pax(records: bytes) -> bytes:
    """A header of pax records for the next member."""
    return member("pax", records, fields=kind(b"x"))


def pax_record(key: bytes, value: bytes) -> bytes:
    for length in range(len(key + value), len(key + value) + 30):
        record = b"%d %s=%s\n" % (length, key, value)
        if len(record) == length:
            return record
    raise AssertionError


def pieces(data: bytes, length: int = 10_000) -> list[bytes]:
    return [data[start : start + length] for start in range(0, len(data), length)]


def read_all(data: bytes, length: int = 10_000) -> list[tuple[Entry, bytes]]:
    """Every member and its bytes."""
    tar = TarReader(pieces(data, length))
    return [(entry, b"".join(map(bytes, tar.content()))) for entry in tar]


def found_in(
    data: bytes, prober: Prober, *, layout: Layout | None = None, shard: str = "a.tar"
) -> tuple[list[Record], list[Rejected]]:
    """What the index of a shard would list, and what it would reject."""

    def again(member: Member) -> bytes:
        return data[member.offset : member.offset + member.size]

    samples = scan_shard(shard, pieces(data), again=again, layout=layout or Layout(), prober=prober).samples
    return [s for s in samples if isinstance(s, Record)], [s for s in samples if isinstance(s, Rejected)]
