"""The one way to the disk for what must survive a crash: bytes that are synced and hashed as they are written.

A file's digest is a tree: SHA-256 over the SHA-256s of its blocks, so that a part of a file is verified by reading that part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 4 << 20
"""Bytes that are hashed at a time."""


@dataclass(frozen=True)
class Written:
    """Facts of a file: ``size`` in bytes and the SHA-256 of each block of ``BLOCK`` bytes, in hexadecimal."""

    size: int
    blocks: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return tree(self.blocks)


def tree(digests: Sequence[str]) -> str:
    """One SHA-256 over several."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def block_digests(data: memoryview) -> Iterator[tuple[memoryview, str]]:
    """Blocks of ``data`` [bytes] and their SHA-256."""
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        yield block, hashlib.sha256(block).hexdigest()


def write_tensors(path: Path, names: Mapping[str, int], values: Tensor) -> Written:
    """A safetensors file of 1-D float32 tensors ``names`` (name -> elements), which lie behind one another in ``values``.

    Our own writer, because the library's takes a second copy of all bytes and does not hash; the bytes are the same.
    """
    header: dict[str, Any] = {}
    place = 0
    for name, count in names.items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [place, place + 4 * count]}
        place += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    data = values.view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
    first = min(len(data), -len(head) % BLOCK)  # blocks are counted from the file's first byte
    digests = []
    with _opened(path, "wb") as file:
        for block, digest in block_digests(memoryview(head + bytes(data[:first]))):
            file.write(block)
            digests.append(digest)
        for block, digest in block_digests(data[first:]):
            file.write(block)
            digests.append(digest)
        _flush(file)
    return Written(len(head) + len(data), tuple(digests))


def write_text(path: Path, text: str) -> None:
    """A small file, synced."""
    with _opened(path, "wb") as file:
        file.write(text.encode())
        _flush(file)


def replace_text(path: Path, text: str) -> None:
    """A small file that is there as it was or as it is to be, whatever happens."""
    aside = path.with_name(f".tmp-{path.name}")
    write_text(aside, text)
    rename(aside, path)
    sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """One line more, synced."""
    with _opened(path, "ab") as file:
        file.write(line.encode() + b"\n")
        _flush(file)


def rename(old: Path, new: Path) -> None:
    old.rename(new)


def sync(folder: Path) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with _naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def keep_folder(path: Path) -> None:
    """Make it, if need be, with a name that is durable, as are those of the folders that it lies in."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        sync(each.parent)


def remove_folder(path: Path) -> None:
    shutil.rmtree(path)


def remove_file(path: Path) -> None:
    path.unlink()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as other programs give it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[Any]:
    with (
        _naming(path),
        path.open(mode) as file,
    ):  # buffered: a raw file may write less than it is given without an error
        yield file


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of writing and syncing do not say of what."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
