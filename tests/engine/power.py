"""What a disk may hold after the power has failed in the middle of a save.

Ranks note what they do to the files of a folder, in the order in which they do it. A crash after any number of these
operations leaves of every file that was not synced since it was written any part, of every folder that was not synced any of
the names that were changed in it, each rename whole or not at all; what was synced is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = tuple[str, ...]
Disk = dict[str, bytes | None]
"""Path below the folder -> a file's bytes; None: a folder."""


def record(folder: Path, notes: Path) -> None:
    """From now on, let this process note what it does to files and folders below ``folder``; it must end before others do so.

    The interpreter's own events tell of it, so that nothing goes unnoticed; contents are kept when they are synced.
    """
    notes.mkdir(parents=True, exist_ok=True)
    root, journal = str(folder), os.open(notes / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    fsync = os.fsync

    def note(*entry: str) -> None:
        os.write(journal, json.dumps(entry).encode() + b"\n")

    def below(path: Any, at: int = -1) -> str | None:
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        if text is not None and at >= 0:
            text = f"{Path(f'/proc/self/fd/{at}').readlink()}/{text}"
        return text[len(root) :].lstrip("/") if text is not None and text.startswith(root) else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int):
            flags = arguments[2]
            name = below(arguments[0]) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
            if name is not None:
                note("append" if flags & os.O_APPEND else "create", name)
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            name = below(arguments[0], arguments[-1])
            if name is not None:
                note({"os.mkdir": "mkdir"}.get(event, "remove"), name)
        elif event == "os.rename":
            names = below(arguments[0]), below(arguments[1])
            if names[0] is not None and names[1] is not None:
                note("rename", *names)
        elif event in ("os.truncate", "os.link", "os.symlink") and below(arguments[0]) is not None:
            raise AssertionError(f"{event} of {arguments[0]} is none of the operations that are replayed")

    def noted_sync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        name = below(path)
        if name is None:
            return
        if path.is_dir():
            note("sync", name)
            return
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if not (notes / digest).exists():
            (notes / digest).write_bytes(content)
        note("content", name, digest)
        note("flush", name)

    os.fsync = noted_sync
    sys.addaudithook(hook)


def journal_of(notes: Path) -> list[Entry]:
    return [tuple(json.loads(line)) for line in (notes / "journal").read_text().splitlines()]


def disk_of(folder: Path) -> Disk:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass(eq=False)
class File:
    safe: bytes = b""
    content: bytes = b""
    synced: bool = False


@dataclass(eq=False)
class Folder:
    """``entries`` as the program sees them; ``safe``: those on disk; ``changes``: since then, (old name, new name, what)."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    safe: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[tuple[str | None, str | None, File | Folder]] = field(default_factory=list)

    def change(self, old: str | None, new: str | None, what: File | Folder) -> None:
        self.changes.append((old, new, what))
        _apply(self.entries, old, new, what)


def _apply(entries: dict[str, Any], old: str | None, new: str | None, what: File | Folder) -> None:
    if old is not None and entries.get(old) is what:
        del entries[old]
    if new is not None:
        entries[new] = what


class Machine:
    """A folder on a disk under a journal's operations."""

    def __init__(self, before: Disk, contents: Path) -> None:
        self.root, self.contents = Folder(), contents
        for path, data in before.items():  # all of it is synced
            parent, name = self._parent(path)
            node = Folder() if data is None else File(data, data, synced=True)
            parent.entries[name] = parent.safe[name] = node

    def _parent(self, path: str) -> tuple[Folder, str]:
        *folders, name = path.split("/")
        node = self.root
        for each in folders:
            node = node.entries[each]  # type: ignore[assignment]
        return node, name

    def do(self, entry: Entry) -> None:
        action, path = entry[:2]
        parent, name = self._parent(path) if path else (self.root, "")
        node: Any = parent.entries.get(name) if path else self.root
        if action in ("create", "append", "mkdir"):
            if node is None:
                parent.change(None, name, Folder() if action == "mkdir" else File())
            elif action == "create":
                node.content, node.synced = b"", False
        elif action == "content":
            node.content, node.synced = (self.contents / entry[2]).read_bytes(), False
        elif action == "flush":
            node.safe, node.synced = node.content, True
        elif action == "sync":
            node.safe, node.changes = dict(node.entries), []
        elif action == "remove":
            parent.change(name, None, node)
        elif action == "rename":
            target, new = self._parent(entry[2])
            assert target is parent, "renames are within a folder"
            if new in parent.entries and isinstance(node, Folder):
                raise AssertionError(f"{entry[2]} is there")
            parent.change(name, new, node)

    def _nodes(self) -> Iterator[File | Folder]:
        """All that may be seen after a crash."""
        waiting, seen = [self.root], set[int]()
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            if isinstance(node, Folder):
                waiting += [*node.safe.values(), *(what for _, _, what in node.changes)]  # type: ignore[list-item]

    def crashes(self, dice: random.Random, most: int) -> Iterator[Disk]:
        """What may be left: all choices if they are not more than ``most``; else those that leave out everything, nothing, one
        thing or all but one, and ``most`` by chance."""
        folders = [node for node in self._nodes() if isinstance(node, Folder) and node.changes]
        places = [(folder, number) for folder in folders for number in range(len(folder.changes))]
        torn = [node for node in self._nodes() if isinstance(node, File) and not node.synced]
        total = 2 ** len(places) * PARTS ** len(torn)
        if total <= most:
            numbers: Sequence[int] = range(total)
        else:
            bits = [1 << number for number in range(len(places))]
            every = 2 ** len(places) - 1
            kept = [0, every, *bits, *(every ^ bit for bit in bits)]
            whole = [0, 1, PARTS ** len(torn) - 1]
            numbers = [names + 2 ** len(places) * parts for names in kept for parts in whole]
            numbers += [dice.randrange(total) for _ in range(most)]
        for number in numbers:
            parts, names = divmod(number, 2 ** len(places))
            chosen = {(id(folder), place) for bit, (folder, place) in enumerate(places) if names >> bit & 1}
            files = {id(node): parts // PARTS**index % PARTS for index, node in enumerate(torn)}
            yield dict(self._left(self.root, "", chosen, files))

    def _left(
        self, folder: Folder, path: str, chosen: set[tuple[int, int]], parts: dict[int, int]
    ) -> Iterator[tuple[str, bytes | None]]:
        entries = dict(folder.safe)
        for place, change in enumerate(folder.changes):
            if (id(folder), place) in chosen:
                _apply(entries, *change)
        for name, node in entries.items():
            if isinstance(node, Folder):
                yield path + name, None
                yield from self._left(node, f"{path}{name}/", chosen, parts)
            else:
                yield path + name, node.safe if node.synced else part_of(node, parts.get(id(node), 0))


PARTS = 4


def part_of(file: File, which: int) -> bytes:
    """Of a file that was not synced: what was safe before, all, a part, or zeros in the place of a part."""
    half = len(file.content) // 2
    return (file.safe, file.content, file.content[:half], bytes(half) + file.content[half:])[which]


def lay(disk: Disk, folder: Path, *, before: Disk) -> None:
    """Make a folder hold it that holds ``before``; what they have in common stays."""
    for path in sorted(before.keys() - disk.keys(), reverse=True):
        (folder / path).rmdir() if before[path] is None else (folder / path).unlink()
    for path, data in sorted(disk.items()):
        if path in before and before[path] == data:
            continue
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


def key_of(disk: Disk) -> int:
    return hash(frozenset(disk.items()))
