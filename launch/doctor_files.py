"""Where a run writes and reads, for launch/doctor.py: its folder, the file system under it, the shards of its data."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cogvideo_dist.config.schema import Data
from cogvideo_dist.data.loader import open_sources
from cogvideo_dist.data.remote import is_remote, without_secrets
from cogvideo_dist.data.storage import Store
from cogvideo_dist.engine.files import write_text
from cogvideo_dist.engine.saving import SPARE
from launch.doctor_board import Board
from launch.doctor_check import Finding, Status, amount, examined, judged, ranks_of, rate, told, within

WRITTEN, RENAMED = 100e6, 50.0
"""Bytes a second that are synced, and files a second that are renamed: below, a run waits for its checkpoints."""

READ = 20e6
"""Bytes a second of shards: a rank's packs of encoded clips take a few."""

TELLING = 8 << 20
"""Bytes of a shard, below which the time to open it is all that is measured."""

SMALL = 100
"""Files that are renamed."""

BLOCK = 4 << 20

VISIBLE_S, LATE_S = 10.0, 2.0
"""How long another node's rename is waited for, and when it is late."""

LIMIT_S = 30.0
"""For any one thing that is asked of a file system."""


def place_of(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: where it would be made."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


@contextmanager
def corner(folder: Path) -> Iterator[Path]:
    """A folder of our own in ``place_of(folder)``, which leaves nothing behind."""
    place = place_of(folder)
    try:
        made = Path(tempfile.mkdtemp(prefix=".doctor-", dir=place))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: nothing can be written into {place}") from None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def writable(folder: Path) -> list[Finding]:
    """Whether the run's folder is there or can be made."""
    check, expected = "files: run folder", "there, or can be made"
    remedy = "name another run.dir, mount its file system for writing, or have it given to this user"
    if folder.exists() and not folder.is_dir():
        return [Finding(check, "fail", f"{folder} is a file", expected, remedy)]
    try:
        with corner(folder) as made:
            write_text(made / "word", "here")
    except OSError as error:
        return [Finding(check, "fail", told(error), expected, remedy)]
    return [Finding(check, "pass", f"{folder}{'' if folder.is_dir() else ' can be made'}", expected)]


def room(folder: Path, checkpoint: float | None, *, keep: int = 1) -> list[Finding]:
    """Free space against a checkpoint's bytes, ``keep`` of which stay while another one is written."""
    check, free = "files: space", shutil.disk_usage(place_of(folder)).free
    found = f"{amount(free)} free"
    if checkpoint is None:
        return [Finding(check, "pass", found, "reported only: no configuration given", figures={"free_bytes": free})]
    all_of_them = (keep + 1) * checkpoint + SPARE
    status: Status = "fail" if free < checkpoint + SPARE else "warn" if free < all_of_them else "pass"
    expected = f"{amount(all_of_them)}: checkpoints of {amount(checkpoint)}, {keep} kept and one being written"
    remedy = "make room, lower checkpoint.keep, or name another run.dir" if status != "pass" else ""
    return [Finding(check, status, found, expected, remedy, {"free_bytes": free})]


def written(folder: Path, size: int) -> list[Finding]:
    """``size`` bytes, synced, as checkpoints are."""
    block, check = os.urandom(min(BLOCK, size)), "files: writing"
    with corner(folder) as made:
        begun = time.perf_counter()
        with (made / "bytes").open("wb") as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = max(1, size // len(block)) * len(block) / (time.perf_counter() - begun)
    status: Status = "pass" if speed >= WRITTEN else "warn"
    remedy = (
        "" if status == "pass" else "name a run.dir on a faster file system; checkpoint.asynchronous hides what it can"
    )
    figures = {"written_bytes_per_s": speed}
    return [Finding(check, status, f"{rate(speed)}, synced", f"{rate(WRITTEN)}", remedy, figures)]


def renamed(folder: Path) -> list[Finding]:
    """Small files written beside their names and renamed."""
    with corner(folder) as made:
        begun = time.perf_counter()
        for number in range(SMALL):
            aside = made / f"{number}.partial"
            aside.write_bytes(b"here")
            aside.rename(made / str(number))
        speed = SMALL / (time.perf_counter() - begun)
    status: Status = "pass" if speed >= RENAMED else "warn"
    remedy = "" if status == "pass" else "name a run.dir on a file system with faster metadata"
    return [
        Finding(
            "files: renaming",
            status,
            f"{speed:,.0f} small files/s",
            f"{RENAMED:.0f}",
            remedy,
            {"renamed_in_a_second": speed},
        )
    ]


def locked(folder: Path) -> list[Finding]:
    """Whether a lock that one has keeps another out, as the lease on a run's folder needs it."""
    check, expected = "files: locks", "flock keeps a second one out"
    with corner(folder) as made, (made / "lock").open("a") as first, (made / "lock").open("a") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return [Finding(check, "warn", f"flock: {error.strerror}", expected, LOCKS)]
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return [Finding(check, "pass", "flock works", expected)]
    return [Finding(check, "warn", "flock lets two have one file", expected, LOCKS)]


LOCKS = "mount with locks (Lustre: -o flock; NFS: not nolock); else two jobs that start at once may both take a run"


def shards(data: Data, size: int) -> list[Finding]:
    """The data's index and shards, and how fast about ``size`` bytes of them are read."""
    check = "files: shards"
    catalog, stores = open_sources(data)
    speeds = {}
    for index, store in zip(catalog.indexes, stores):
        name, end = max(index.ends().items(), key=lambda item: item[1])
        speeds[_shown(store)] = _speed(store, name, min(end, size))
    slowest = min(speeds, key=lambda name: speeds[name])
    enough = max(end for index in catalog.indexes for end in index.ends().values()) >= TELLING
    status = judged(speeds[slowest], warn=READ if enough else 0.0, fail=0.0)
    said = f"{len(catalog):,} samples; {rate(speeds[slowest])} from {slowest}"
    remedy = (
        ""
        if status == "pass"
        else "copy the shards to a faster file system, or set data.remote.whole_shards and its cache"
    )
    return [Finding(check, status, said, f"readable, {rate(READ)}", remedy, {"read_bytes_per_s": speeds[slowest]})]


def _shown(store: Store) -> str:
    return without_secrets(store.root) if is_remote(store.root) else store.root


def _speed(store: Store, name: str, size: int) -> float:
    """Bytes a second of a shard's first ``size`` bytes, not from this machine's memory where that can be had."""
    if not is_remote(store.root):
        _forget(Path(store.root) / name)
    block = memoryview(bytearray(min(BLOCK, size)))
    begun, done = time.perf_counter(), 0
    while done < size:
        piece = block[: min(len(block), size - done)]
        if not store.read_into(name, done, out=piece):
            raise OSError(f"{name} of {_shown(store)} ends at {done} bytes")
        done += len(piece)
    return done / (time.perf_counter() - begun)


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Marker:
    """What the first rank leaves in the run's folder for one rank of every other node to find."""

    folder: Path
    name: str
    board: Board
    first: bool
    looks: bool
    wait_s: float = LIMIT_S

    @property
    def path(self) -> Path:
        return place_of(self.folder) / self.name


def shared(marker: Marker) -> list[Finding]:
    """Whether what one node renames is there for the others, and what it locks is locked for them. All ranks take part."""
    check = "files: shared"
    # A file system may remember that a name was not there, so it is asked for before.
    wrong = _in_turn(marker, "absent", marker.looks, lambda: marker.path.exists())
    wrong = wrong or _in_turn(marker, "renamed", marker.first, partial(_leave, marker))
    if wrong:
        return [_unseen(check, wrong)]
    try:
        found = examined(check, partial(_look, marker, check), limit_s=VISIBLE_S + LIMIT_S) if marker.looks else []
        marker.board.meet("marker: seen", within_s=marker.wait_s + VISIBLE_S)
        return found + _locks_of_others(marker, asks=bool(found) and found[0].status != "fail")
    finally:
        if marker.first:
            within(LIMIT_S, lambda: marker.path.unlink(missing_ok=True))


def _in_turn(marker: Marker, step: str, mine: bool, work: Callable[[], object]) -> str:
    """Have those do ``work`` whose turn it is; all wait for it. What went wrong for the first rank, the same on all ranks:
    errors of others are found again by what they do next."""
    said = ""
    if mine:
        try:
            within(LIMIT_S, work)
        except Exception as error:  # hung, or refused
            said = told(error)
    if marker.first:
        marker.board.put(f"marker: {step}", said)
    if missing := marker.board.meet(f"marker: {step}", within_s=marker.wait_s + LIMIT_S):
        return f"{ranks_of(missing)} did not come to {step}"
    return str(marker.board.get(f"marker: {step}", within_s=marker.wait_s) or "")


def _leave(marker: Marker) -> None:
    aside = marker.path.with_name(f"{marker.name}.partial")
    try:
        write_text(aside, marker.name)
        aside.rename(marker.path)
    finally:
        aside.unlink(missing_ok=True)


def _look(marker: Marker, check: str) -> list[Finding]:
    begun = time.monotonic()
    while time.monotonic() - begun < VISIBLE_S:
        try:
            if marker.path.read_text() == marker.name:
                break
        except FileNotFoundError:
            time.sleep(0.02)
    else:
        return [_unseen(check, f"{marker.path.parent} did not show the first rank's file in {VISIBLE_S:g} s")]
    late = time.monotonic() - begun
    status: Status = "pass" if late < LATE_S else "warn"
    remedy = "" if status == "pass" else "mount with a shorter memory of names (NFS: lookupcache=positive, actimeo=3)"
    return [Finding(check, status, f"a rename was there after {late:.2f} s", f"at once, at most {LATE_S:g} s", remedy)]


def _unseen(check: str, said: str) -> Finding:
    remedy = "all nodes must see one run.dir: name a folder on a shared file system that is mounted on each"
    return Finding(check, "fail", said, "a rename on one node is there for the others", remedy)


def _locks_of_others(marker: Marker, *, asks: bool) -> list[Finding]:
    """The first rank holds a lock while those who have seen its file ask for it."""
    check, expected = "files: locks of other nodes", "flock keeps other nodes out"
    with _held(marker):
        marker.board.meet("marker: locked", within_s=marker.wait_s + LIMIT_S)
        found = examined(check, partial(_try_lock, marker, check, expected), limit_s=LIMIT_S) if asks else []
        marker.board.meet("marker: tried", within_s=marker.wait_s + LIMIT_S)
    return found


@contextmanager
def _held(marker: Marker) -> Iterator[None]:
    if not marker.first:
        yield
        return
    file = within(LIMIT_S, lambda: marker.path.open("a"))
    with file:
        with suppress(Exception):  # without locks the others find it free, which is what they report
            within(LIMIT_S, lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
        yield


def _try_lock(marker: Marker, check: str, expected: str) -> list[Finding]:
    with marker.path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return [Finding(check, "pass", "flock of one node holds for the others", expected)]
        except OSError as error:
            return [Finding(check, "warn", f"flock: {error.strerror}", expected, LOCKS)]
    return [Finding(check, "warn", "flock of one node does not hold for the others", expected, LOCKS)]
