from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import re
import tarfile
import zipfile

import pytest
import webdataset

from cogvideo_dist.data.tars import TarError, TarReader
from tests.data.tar_files import END, kind, member, pax, pax_record, pieces, read_all, tar_of

MEMBERS = [
    ("a.mp4", bytes(range(256)) * 5),
    ("folder/of/b.txt", b"A caption."),
    ("b.json", b""),
    ("long/" * 15 + "n" * 90 + ".txt", b"c"),
    ("n" * 140 + ".txt", b"d" * 512),
]
GOOD = member("a.mp4", b"video") + member("a.txt", b"cap")


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.tar", GOOD)
    return file.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int) -> None:
    members = MEMBERS if form != tarfile.USTAR_FORMAT else MEMBERS[:4]
    data = tar_of(members, form=form)
    found = read_all(data)
    assert [(entry.name, content) for entry, content in found] == members
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(e.offset, e.size) for e, _ in found] == [(info.offset_data, info.size) for info in tar]
    assert all(entry.refusal is None for entry, _ in found)


def test_members_are_those_that_webdataset_writes() -> None:
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False, compress=False) as writer:
        for name in ("x", "folder/\u00e9" + "y" * 120):
            writer.write({"__key__": name, "mp4": b"video", "txt": b"cap"})
    names = [(entry.name, content) for entry, content in read_all(file.getvalue())]
    assert names[:2] == [("x.mp4", b"video"), ("x.txt", b"cap")]
    assert names[2][0] == "folder/\u00e9" + "y" * 120 + ".mp4"


@pytest.mark.parametrize("length", [1, 7, 511, 512, 513, 10**6])
def test_pieces_of_any_length_give_the_same_members(length: int) -> None:
    data = tar_of(MEMBERS)
    assert read_all(data, length) == read_all(data)


def test_what_is_not_asked_for_is_passed_over() -> None:
    data = tar_of(MEMBERS)
    assert list(TarReader(pieces(data, 100))) == [entry for entry, _ in read_all(data)]


def test_sizes_of_pax_and_of_gnu_are_read() -> None:
    wide = {124: b"\x80" + (5).to_bytes(11, "big")}
    data = pax(pax_record(b"size", b"5")) + member("a.x", b"12345", fields={124: b"00000000000\0"})
    data += member("b.x", b"54321", fields=wide) + END
    assert [(entry.name, content) for entry, content in read_all(data)] == [("a.x", b"12345"), ("b.x", b"54321")]


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        (b"1", "a hard link"), (b"2", "a symbolic link"), (b"3", "a character device"), (b"4", "a block device"),
        (b"6", "a FIFO"), (b"7", "a contiguous file"), (b"S", "a sparse file"), (b"V", "of the unknown type 'V'"),
    ],
)  # fmt: skip
def test_what_is_no_regular_file_is_refused_and_the_rest_is_read(flag: bytes, reason: str) -> None:
    found = read_all(member("a.mp4", fields=kind(flag)) + member("b.mp4", b"video") + END)
    assert [entry.refusal for entry, _ in found] == [f"it is {reason}, not a regular file", None]
    assert found[1][1] == b"video"


def test_folders_are_no_members_and_sparse_files_are_refused() -> None:
    data = member("folder", fields=kind(b"5")) + pax(pax_record(b"GNU.sparse.major", b"1")) + GOOD + END
    first, second = [entry for entry, _ in read_all(data)]
    assert first.refusal == "it is a sparse file, not a regular file"
    assert second.refusal is None


def test_names_that_are_no_text_are_refused() -> None:
    found = read_all(member("a.mp4", fields={0: b"\xff\xfe"}) + pax(pax_record(b"path", b"\xc3.mp4")) + GOOD + END)
    assert [entry.refusal for entry, _ in found] == ["its name is not UTF-8", "its name is not UTF-8", None]


BAD = {
    "empty": (b"", "not a tar file: it is empty"),
    "zeros": (bytes(10240), "only zeros, an empty tar or a lost file"),
    "gzip": (gzip.compress(GOOD), "it is a gzip file"),
    "bzip2": (bz2.compress(GOOD), "it is a bzip2 file"),
    "xz": (lzma.compress(GOOD), "it is an xz file"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "it is a zstd file"),
    "zip": (zipped(), "it is a zip file"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "it is an HTML or XML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "noise": (random.Random(0).randbytes(4096), "its first 512 bytes are no header"),
    "checksum": (GOOD + b"X" + member("b.mp4")[1:] + END, "the header at 2048 is damaged"),
    "version": (member("a.x", fields={263: b"99"}) + END, "of another format than ustar"),
    "octal": (member("a.x", b"1", fields={124: b"0000000000x"}) + END, "its size b'0000000000x.*' is no octal number"),
    "no size": (member("a.x", fields={124: bytes(12)}) + END, "is no octal number"),
    "negative": (member("a.x", fields={124: b"\xff" * 12}) + END, "is no octal number"),
    "minus": (member("a.x", fields={124: b"-0000000010\0"}) + END, "is no octal number"),
    "huge": (member("a.x", fields={124: b"\x80" + b"\x7f" * 11}) + END, "cut short: it ends at 1536"),
    "link with bytes": (member("a.x", b"1", fields=kind(b"2")) + END, "gives 1 bytes to a symbolic link"),
    "folder with bytes": (member("a", b"1", fields=kind(b"5")) + END, "gives 1 bytes to a directory"),
    "no end": (GOOD, "cut short: it ends at 2048, without the two blocks"),
    "half an end": (GOOD + bytes(512), "cut short: it ends at 2560, without the two blocks"),
    "single zeros": (GOOD + bytes(512) + GOOD + END, "bytes at 2560 behind a single block of zeros"),
    "glued": (GOOD + END + GOOD + END, "bytes at 3072 behind the tar's end at 2048"),
    "junk behind": (GOOD + END + bytes(700) + b"x", "bytes at 3772 behind the tar's end at 2048"),
    "pax length": (pax(b"99 path=x\n") + GOOD + END, "the pax records before .* are damaged"),
    "pax text": (pax(b"path=x\n") + GOOD + END, "the pax records before .* are damaged"),
    "pax twice": (pax(pax_record(b"path", b"x") * 2) + GOOD + END, "the pax records before .* are damaged"),
    "pax size": (pax(pax_record(b"size", b"-5")) + GOOD + END, "no single size of digits"),
    "named twice": (pax(pax_record(b"path", b"x.x")) * 2 + GOOD + END, "name a member twice"),
    "global path": (member("g", pax_record(b"path", b"x"), fields=kind(b"g")) + GOOD + END, "the global header"),
    "nothing comes": (GOOD + pax(pax_record(b"path", b"x")) + END, "describes a member that does not come"),
    "long name": (member("L", bytes(2**20 + 1), fields=kind(b"L")) + GOOD + END, "bytes of names, more than"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_whole_tar_is_named(what: str) -> None:
    data, reason = BAD[what]
    with pytest.raises(TarError) as error:
        read_all(data)
    assert re.search(reason, str(error.value))


def test_zeros_behind_the_end_are_padding() -> None:
    assert [entry.name for entry, _ in read_all(GOOD + END + bytes(9999))] == ["a.mp4", "a.txt"]


def test_a_cut_anywhere_is_named_or_costs_nothing() -> None:
    data = tar_of(MEMBERS)
    whole, end = read_all(data), len(tar_of(MEMBERS).rstrip(b"\0"))
    places = {*range(0, len(data), 512), *random.Random(1).sample(range(len(data)), 200)}
    needed = -(-end // 512) * 512 + 1024
    for place in sorted(places):
        if place >= needed:
            assert read_all(data[:place]) == whole
        else:
            with pytest.raises(TarError, match="cut short|empty|no header"):
                read_all(data[:place])


def test_no_flip_in_a_header_changes_the_members_in_silence() -> None:
    data = tar_of(MEMBERS[:2])
    whole = read_all(data)
    headers = [at for entry, _ in whole for at in range(entry.header, entry.header + 512)]
    named = 0
    for place in random.Random(2).sample(headers, 200):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        try:
            assert read_all(bytes(broken)) == whole
        except TarError:
            named += 1
    assert named > 190
