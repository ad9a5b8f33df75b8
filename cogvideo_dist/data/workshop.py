"""Many workers make one encoded set, at the same time or one after the other, with nothing between them but a file system.

A worker may be killed at any instant and start again as any other worker of any number: the set that comes out has the same
bytes, and only what was in flight is made twice. ``OUT.partial`` beside ``OUT`` holds what there is so far:

    objects/ab/ab12...     items that lie in no shard yet, by address
    sets/cd34.../shards/   finished shards of one plan; this folder becomes OUT
    sets/cd34.../sealed/   000003.jsonl: shard 3 is finished, and these are its lines of the index
    aside/                 files being written
    old/                   the OUT that has been replaced

Files are written aside, synced and renamed, so they are whole or not there; and since an address has only one content, it
does not matter which of two workers comes first. There are no locks, so none is left behind.
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideo_dist.data.encoded import (
    Clip,
    Item,
    SetPlan,
    Stock,
    identity,
    is_made,
    pack,
    parse_lines,
    read_set,
    record_facts,
    rejected_line,
    unpack,
)
from cogvideo_dist.data.index import ABOUT, INDEX, REJECTED, IndexWriter
from cogvideo_dist.data.writing import ShardFile, json_line, record_line, shard_name, sync, sync_folder, with_facts

Make = Callable[[int, str], Item]
"""(clip's number, role) -> the item."""

Track = Callable[[Iterator[int], int], Iterable[int]]
"""Goes through steps, of which there will be about so many, and shows how far they are."""

DOOMED = r"\.[0-9a-f]{16}"
"""What the name of a working folder ends in when it is being deleted."""

FORGOTTEN = 24 * 3600.0
"""Seconds after which a file aside that nobody writes to is one that a killed worker left."""


class _Again(Exception):
    """The working folder is not what it was, mostly because another worker has finished the set: look at it afresh."""


class _Sealed(Exception):
    """Another worker has finished the shard and deleted its objects."""


@dataclass
class Outcome:
    """How a worker ended.

    ``unchanged``: the set was there already. ``missing``: what other workers still have to do; None if the set is complete.
    ``made`` counts items by role; ``reused`` and ``unusable`` count clips of the worker's own share.
    """

    unchanged: bool = False
    missing: str | None = None
    made: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    unusable: int = 0


def build(
    out: Path, plan: SetPlan, *, make: Make, say: Callable[[str], None], track: Track, worker: tuple[int, int] = (0, 1)
) -> Outcome:
    """Do the share of ``worker`` (number, count); whoever finds all shards finished puts the set in the place of ``out``.

    What ``out`` or an unfinished working folder holds already is taken over by its address. Raises ``ValueError`` if ``out``
    is something else than an encoded set, or if no clip can be used.
    """
    outcome = Outcome()
    while True:
        recover(out)
        before, stock = identity(out), Stock(plan.roles)
        found = read_set(out)
        lost = stock.add(found) if found is not None else []
        if found is not None and not lost and is_made(plan, found, stock=stock):
            mine = plan.clips[worker[0] :: worker[1]]
            outcome.unchanged, outcome.unusable = True, sum(bool(c.refusal or stock.refusal(c)) for c in mine)
            outcome.reused = len(mine) - outcome.unusable
            with suppress(FileNotFoundError):
                if not any(path.is_file() for path in working_folder(out).rglob("*")):
                    discard(working_folder(out))  # of a worker that was killed when it saw that it came too late
            return outcome
        for name in lost:
            say(f"{out / name} is missing or cut short; what it held is made again")
        workshop = Workshop(out, plan, stock=stock, make=make, say=say, outcome=outcome)
        with suppress(_Again):
            workshop.open(before)
            for _ in track(workshop.work(*worker), workshop.lacking(*worker)):
                pass
            return outcome


class Workshop:
    """The working folder as one worker sees it."""

    def __init__(
        self, out: Path, plan: SetPlan, *, stock: Stock, make: Make, say: Callable[[str], None], outcome: Outcome
    ) -> None:
        self.out, self.plan, self.stock, self.make, self.say, self.outcome = out, plan, stock, make, say, outcome
        self.folder = working_folder(out)
        self.objects, self.aside, self.sets = (self.folder / name for name in ("objects", "aside", "sets"))
        own = self.sets / plan.digest[:32]
        self.shards, self.seals = own / "shards", own / "sealed"
        self.present: set[str] = set()
        self.finished: set[int] = set()
        self.touched: set[int] = set()

    def open(self, before: tuple[int, int] | None) -> None:
        """Make the folders and look what is there; ``before``: the identity of ``out`` when it was read."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        first = _make_folder(self.folder)
        with self._unless_gone():
            for folder in (self.objects, self.aside, self.sets, self.shards.parent, self.shards, self.seals):
                _make_folder(folder)
        if identity(self.out) != before or (self.folder / "old").exists():
            # Another worker finished between the look at OUT and now, and nothing that it left is to be begun anew.
            if first:
                discard(self.folder)
            raise _Again
        with self._unless_gone():
            for path in self.aside.iterdir():
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > FORGOTTEN:
                        path.unlink()
            self.present = {path.name for folder in self.objects.iterdir() for path in folder.iterdir()}
            for folder in self.sets.iterdir():
                self._take_stock(folder)

    def _take_stock(self, folder: Path) -> None:
        """Learn what the finished shards of a plan hold."""
        for seal in sorted(folder.glob("sealed/*.jsonl")):
            with suppress(FileNotFoundError):  # another worker has found it damaged
                lines = read_seal(seal, folder / "shards")
                if lines is None:
                    self.say(f"{seal} or its shard is damaged; what they held is made again")
                    seal.unlink()
                    continue
                self.stock.add(parse_lines(folder / "shards", lines))
                if seal.parent == self.seals:
                    self.finished.add(int(seal.stem))

    def lacking(self, worker: int, workers: int) -> int:
        """How many clips of a worker's share lack something, as far as is known without a look at every object."""
        known = self.present | self.stock.places.keys()
        return sum(
            any(address not in known and self._is_mine(number, address) for address in self._needed(number))
            for shard in range(self.plan.shards)
            if shard not in self.finished
            for number in share(self.plan.clips_of(shard), worker, workers=workers)
        )

    def work(self, worker: int, workers: int) -> Iterator[int]:
        """Make what the worker's share lacks, yielding every clip that lacked something, and finish shards."""
        self.outcome.reused = self.outcome.unusable = 0
        for shard in range(self.plan.shards):
            for number in share(self.plan.clips_of(shard), worker, workers=workers):
                if self._attend(number):
                    yield number
            # Whoever made something of a shard looks after it, so the last one of these finds it complete; and one worker
            # looks after a shard that was complete before.
            if (shard in self.touched or shard % workers == worker) and not self.sealed(shard) and self.complete(shard):
                self.seal(shard)
        waiting = [shard for shard in range(self.plan.shards) if not self.sealed(shard)]
        if waiting:
            self.outcome.missing = self._missing(waiting)
        else:
            self.finish()

    def _attend(self, number: int) -> bool:
        """Make what a clip lacks; whether that was anything."""
        clip, shard, items = self.plan.clips[number], self.plan.shard_of(number), list[Item]()
        for role, address in clip.addresses.items():
            if self._reason(clip) is None and self._is_mine(number, address) and not self.has(address):
                # In this order: an object that is not there may have been deleted because the shard is finished.
                if self.sealed(shard):
                    break
                items.append(self._provide(number, role))
        bad = self._reason(clip) is not None or any(item.reason is not None for item in items)
        self.outcome.unusable += bad
        self.outcome.reused += not bad and not items
        return bool(items)

    def _provide(self, number: int, role: str) -> Item:
        """Make an item and keep it as an object."""
        item, address = self.make(number, role), self.plan.clips[number].addresses[role]
        with self._unless_gone(), self._beside() as path:
            with path.open("xb") as file:
                file.write(pack(item, address))
                sync(file)
            _make_folder(self._object(address).parent)
            path.rename(self._object(address))
        self.present.add(address)
        self.touched |= self.plan.shards_of(address, number)
        self.outcome.made[role] += item.reason is None
        return item

    def _is_mine(self, number: int, address: str) -> bool:
        """Of several clips with the same address the first of an unfinished shard is the one for which it is made."""
        users = self.plan.users.get(address)
        return users is None or number == next((u for u in users if not self.sealed(self.plan.shard_of(u))), None)

    def _reason(self, clip: Clip) -> str | None:
        """Why a clip cannot be used, if that is known without an object."""
        return clip.refusal or self.stock.refusal(clip)

    def _needed(self, number: int) -> Iterable[str]:
        clip = self.plan.clips[number]
        return clip.addresses.values() if self._reason(clip) is None else ()

    def _object(self, address: str) -> Path:
        return self.objects / address[:2] / address

    def _seal(self, shard: int) -> Path:
        return self.seals / f"{shard:06d}.jsonl"

    def has(self, address: str) -> bool:
        if address not in self.present and address not in self.stock.places:
            if not self._object(address).exists():
                return False
            self.present.add(address)
        return True

    def complete(self, shard: int) -> bool:
        """Whether everything that goes into a shard is there."""
        return all(self.has(address) for number in self.plan.clips_of(shard) for address in self._needed(number))

    def sealed(self, shard: int) -> bool:
        """Whether a shard is finished."""
        if shard not in self.finished:
            if not self._seal(shard).exists():
                if not self.shards.is_dir():
                    raise _Again
                return False
            self.finished.add(shard)
        return True

    def seal(self, shard: int) -> None:
        """Write a shard and its lines of the index, then delete its objects; any number of workers may be at it."""
        try:
            with self._unless_gone(), self._beside() as tar, self._beside() as lines:
                body = self._write(shard, tar)
                if tar.exists():
                    tar.rename(self.shards / shard_name(shard))
                    sync_folder(self.shards)
                with lines.open("xb") as file:
                    file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                    sync(file)
                lines.rename(self._seal(shard))
                sync_folder(self.seals)
        except _Sealed:
            return
        self.finished.add(shard)
        for number in self.plan.clips_of(shard):
            for address in self.plan.clips[number].addresses.values():
                if all(map(self.sealed, self.plan.shards_of(address, number))):
                    self._object(address).unlink(missing_ok=True)

    def _write(self, shard: int, path: Path) -> bytes:
        """Write the clips that can be used to ``path``; a shard's lines of the index, behind those of the others."""
        index = io.BytesIO()
        with ExitStack() as files:
            file: ShardFile | None = None
            for number in self.plan.clips_of(shard):
                clip, items = self.plan.clips[number], list[Item]()
                reason = self._reason(clip)
                for role in clip.addresses if reason is None else ():
                    items.append(self._item(number, role))
                bad = next((item for item in items if item.reason is not None), Item(reason=reason))
                if bad.reason is not None:
                    lasting = clip.refusal is None and bad.lasting
                    index.write(json_line(rejected_line(clip, bad.reason, addressed=lasting)))
                    continue
                if file is None:
                    file = ShardFile(path, name=shard_name(shard))
                    files.callback(file.close)
                facts = record_facts(clip, items)
                members = {name: data for item in items for name, data in item.members.items()}
                file.add(clip.key, with_facts(clip.key, members, facts=facts), facts=facts)
            if file is not None:
                index.writelines(map(record_line, file.finish()))
        return index.getvalue()

    def _item(self, number: int, role: str) -> Item:
        """An item from its object or from the stock; damaged or gone, or with a reason that may be gone, it is made again."""
        clip, address = self.plan.clips[number], self.plan.clips[number].addresses[role]
        path, item = self._object(address), None
        with suppress(FileNotFoundError):
            item = unpack(path.read_bytes(), address)
            if item is None:
                self.say(f"{path} is damaged; {role} of {clip.source} is made again")
        if item is None and address in self.stock.places:
            folder, record, _ = self.stock.places[address]
            item = self.stock.read(address)
            if item is None:
                self.say(f"{folder / record.shard} is damaged at {record.key}; {role} of {clip.source} is made again")
        if item is None or not item.lasting:
            if self.sealed(self.plan.shard_of(number)):
                raise _Sealed
            item = self._provide(number, role)
        return item

    def _missing(self, waiting: list[int]) -> str:
        for shard in waiting:
            for number in self.plan.clips_of(shard):
                if not all(map(self.has, self._needed(number))):
                    return (
                        f"{len(waiting)} of {self.plan.shards} shards wait for clips of other workers, the first for "
                        f"{self.plan.clips[number].source}"
                    )
        return f"other workers are finishing {len(waiting)} of {self.plan.shards} shards"

    def finish(self) -> None:
        """Write the index of the finished shards and put them in the place of ``out``."""
        records, first = IndexWriter(), dict[str, Any]()
        with self._unless_gone(), self._beside() as index, self._beside() as about, self._beside() as rejected:
            with rejected.open("xb") as refusals:
                for shard in range(self.plan.shards):
                    lines = read_seal(self._seal(shard), self.shards) if self._seal(shard).exists() else None
                    if lines is None:
                        raise _Again  # from the beginning, where it is found damaged
                    found = parse_lines(self.shards, lines)
                    for record in found.records:
                        records.add(record)
                    for line in found.rejected:
                        refusals.write(json_line(line))
                        first = first or dict(line)
                sync(refusals)
            if not len(records):
                raise ValueError(
                    f"no sample to write ({len(self.plan.clips)} rejected; the first, {first['source']}: "
                    f"{first['reason']}); {self.out} is left as it was"
                )
            records.write_files(index, about)
            rejected.rename(self.shards / REJECTED)
            about.rename(self.shards / ABOUT)
            index.rename(self.shards / INDEX)  # last: it is what ``recover`` looks for
            sync_folder(self.shards)
        swap(self.out, self.shards)

    @contextmanager
    def _beside(self) -> Iterator[Path]:
        """A path to write to before the file takes its place."""
        path = self.aside / secrets.token_hex(8)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """What is not there in the working folder any more has been taken by another worker; elsewhere that is an error."""
        try:
            yield
        except FileNotFoundError as error:
            if Path(str(error.filename)).is_relative_to(self.folder):
                raise _Again from None
            raise


def share(clips: range, worker: int, *, workers: int) -> range:
    """The numbers that leave ``worker`` when divided by ``workers``."""
    return clips[(worker - clips.start) % workers :: workers]


def working_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def read_seal(seal: Path, shards: Path) -> list[bytes] | None:
    """A finished shard's lines of the index; nothing if a byte of them is wrong, or the shard missing or cut short."""
    checksum, _, body = seal.read_bytes().partition(b"\n")
    if checksum.decode("latin-1") != hashlib.sha256(body).hexdigest():
        return None
    lines = body.splitlines(keepends=True)
    return None if Stock(()).add(parse_lines(shards, lines)) else lines


def recover(out: Path) -> None:
    """Take the steps that a worker did not come to which was killed while it put a set in the place of ``out``."""
    folder = working_folder(out)
    with suppress(FileNotFoundError):  # another worker takes them
        for index in sorted(folder.glob(f"sets/*/shards/{INDEX}")):
            swap(out, index.parent)
    if (folder / "old").exists():
        discard(folder)
    for stray in out.parent.iterdir() if out.parent.is_dir() else ():
        if re.fullmatch(re.escape(folder.name) + DOOMED, stray.name):
            _remove(stray)


def swap(out: Path, shards: Path) -> None:
    """``shards`` in the place of ``out``, then the working folder goes; any number of workers may be at it at once.

    ``old/`` is never empty before ``shards`` moves, or gone before the whole folder is. So a worker that is late moves
    nothing: neither can the new set be mistaken for the old one and renamed over ``old/``, nor ``shards`` be moved twice.
    """
    old = working_folder(out) / "old"
    with suppress(FileNotFoundError):  # another worker was faster
        if out.exists():
            try:
                out.rename(old)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        else:
            _make_folder(old)
            (old / "nothing").touch()
        shards.rename(out)
        sync_folder(out.parent)
    if old.exists():
        discard(working_folder(out))


def discard(folder: Path) -> None:
    """Rename a folder, which is one step, and delete it, which is many."""
    doomed = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        folder.rename(doomed)
        _remove(doomed)


def _remove(folder: Path) -> None:
    """Delete a folder that others may be deleting too, or on a network file system still hold a file of open."""

    def passable(_function: object, _path: str, info: Any) -> None:
        if info[1].errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise info[1]

    shutil.rmtree(folder, onerror=passable)


def _make_folder(folder: Path) -> bool:
    """Whether the folder was made here; its parent must be there."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
