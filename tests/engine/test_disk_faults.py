"""A disk that takes no more, or nothing, from one of two ranks: all agree, the run goes on, and saves when it can."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from cogvideo_dist.engine import files, saving
from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.engine.toys import Case, Watched, committed, readable, trainer, witness
from tests.ranks import run_ranks

Fault = Callable[[ParallelMesh, Path], Callable[[], None]]
"""Does it to a rank of a run in a folder; what it returns undoes it."""

CASE = Case(2, 1, steps=10, keep=9)
FULL = (3, 7)
"""Nothing can be written between these steps: saves of steps 4 and 6 fail."""


def between(patch: Callable[[], Callable[[], None]], span: tuple[int, int]) -> None:
    """Do ``patch`` after one step and undo it after another, on every rank, while nothing is being written."""
    report, undo = Watched._report, list[Callable[[], None]]()

    def watched(trainer: Watched, done: int) -> None:
        report(trainer, done)
        if done in span:
            trainer.saver.finish()
        if done == span[0]:
            undo.append(patch())
        if done == span[1]:
            undo.pop()()

    Watched._report = watched  # type: ignore[method-assign]


def run(mesh: ParallelMesh, case: Case, folder: str, fault: str, span: tuple[int, int] = FULL) -> tuple[str, list[str]]:
    """The error that ended it, if any, and what was said."""
    said: list[str] = []
    saving.SPARE = 0  # so that a full disk is met in the middle, and not by looking before
    RunLog.say = lambda log, text: said.append(text)  # type: ignore[method-assign, assignment]
    if fault:
        between(lambda: FAULTS[fault](mesh, Path(folder)), span)
    try:
        trainer(mesh, case, Path(folder)).run()
    except ValueError as error:
        return f"{type(error).__name__}: {error}", said
    finally:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "", said


def small_limit(mesh: ParallelMesh, folder: Path) -> Callable[[], None]:
    """Rank 1 may not write files as large as its shards: nobody has to be root for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(number: int, function: str, *, rank: int) -> Fault:
    """A function of ``engine.files`` raises an error of the operating system on one rank."""

    def fault(mesh: ParallelMesh, folder: Path) -> Callable[[], None]:
        original = getattr(files, function)

        def broken(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number), str(arguments[0]))

        if mesh.world.rank == rank:
            setattr(files, function, broken)
        return lambda: setattr(files, function, original)

    return fault


def ballast(mesh: ParallelMesh, folder: Path) -> Callable[[], None]:
    """The first rank fills the disk but for less than a checkpoint."""
    disk = os.statvfs(folder / "ckpt")
    if mesh.is_first:
        (folder / "ckpt" / "ballast").write_bytes(bytes((disk.f_bavail - 3) * disk.f_frsize))
    return lambda: (folder / "ckpt" / "ballast").unlink(missing_ok=True)


FAULTS: dict[str, Fault] = {
    "a rank's file limit": small_limit,
    "EIO of a shard": failing(errno.EIO, "write_tensors", rank=1),
    "EDQUOT of a shard of the first rank": failing(errno.EDQUOT, "write_tensors", rank=0),
    "ENOSPC of the manifest": failing(errno.ENOSPC, "write_text", rank=0),
    "EROFS of the folder": failing(errno.EROFS, "make_folder", rank=0),
    "EIO of the rename": failing(errno.EIO, "rename", rank=0),
    "full disk": ballast,
}
REASONS = {
    "a rank's file limit": "rank 1: [Errno 27] File too large",
    "EIO of a shard": "rank 1: [Errno 5] Input/output error: ",
    "EDQUOT of a shard of the first rank": "rank 0: [Errno 122] Disk quota exceeded: ",
    "ENOSPC of the manifest": "rank 0: [Errno 28] No space left on device: ",
    "EROFS of the folder": "[Errno 30] Read-only file system: ",
    "EIO of the rename": "rank 0: [Errno 5] Input/output error: ",
    "full disk": "No space left on device",
}


def check(folder: Path, fault: str, results: list[tuple[str, list[str]]], *, oracle: list[dict[str, Any]]) -> None:
    """Saves of steps 4 and 6 failed and were said to; everything else is as it is without a fault."""
    assert [error for error, _ in results] == ["", ""], "all ranks come to the end"
    warnings = [text for text in results[0][1] if text.startswith("warning")]
    assert len(warnings) == 2, warnings
    for warning in warnings:
        assert REASONS[fault] in warning
        assert str(folder / "ckpt") in warning
        assert "tries again when the next one is due" in warning
    assert committed(folder) == [2, 8, 10]
    assert all(readable(path) for path in sorted((folder / "ckpt").glob("step-*")))
    assert not list((folder / "ckpt").glob(".*"))
    assert witness(folder) == oracle


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("oracle")
    run_ranks(run, 2, CASE, str(folder), "")
    return witness(folder)


CASES = [(fault, late) for fault in REASONS if fault != "full disk" for late in (False, True)]
SHORT = (("a rank's file limit", False), ("ENOSPC of the manifest", True))


@pytest.mark.parametrize(
    ("fault", "late"), [pytest.param(*case, marks=() if case in SHORT else pytest.mark.long) for case in CASES]
)
def test_the_run_goes_on_and_saves_again(tmp_path: Path, oracle: list[dict[str, Any]], fault: str, late: bool) -> None:
    results = run_ranks(run, 2, replace(CASE, asynchronous=late), str(tmp_path), fault)
    check(tmp_path, fault, results, oracle=oracle)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own of ``size``, in memory; skips where this process may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs, so a disk that is really full is not tested: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_disk_that_is_full(tmp_path: Path, oracle: list[dict[str, Any]]) -> None:
    (tmp_path / "run").mkdir()
    with small_disk(tmp_path / "run" / "ckpt", "1m"):
        results = run_ranks(run, 2, CASE, str(tmp_path / "run"), "full disk")
        check(tmp_path / "run", "full disk", results, oracle=oracle)


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.long)])
def test_three_in_a_row_end_the_run_on_every_rank(tmp_path: Path, late: bool) -> None:
    results = run_ranks(run, 2, replace(CASE, asynchronous=late), str(tmp_path), "EIO of a shard", (3, 99))
    for error, _ in results:
        assert error.startswith("SaveError: 3 checkpoints in a row could not be written, the last because of rank 1: ")
        assert f"the last committed one in {tmp_path / 'ckpt'} stands" in error
    assert committed(tmp_path) == [2]
    assert witness(tmp_path)[-1]["step"] in range(8, 11), "at the latest when the next save begins"


def test_the_last_checkpoint_must_be_written(tmp_path: Path) -> None:
    """Else a run whose result is nowhere would end as if all were well."""
    results = run_ranks(run, 2, replace(CASE, asynchronous=True), str(tmp_path), "a rank's file limit", (9, 99))
    for error, _ in results:
        assert error.startswith("SaveError: the run is at its end, but its last checkpoint could not be written")
    assert committed(tmp_path)[-1] == 8
    assert run_ranks(run, 2, CASE, str(tmp_path), "")[0][0] == ""
    assert committed(tmp_path)[-1] == 10


def finish_slowly(mesh: ParallelMesh, case: Case, folder: str) -> None:
    """The save of step 8 is not done before somebody waits for it."""
    waited_for, write, finish = Event(), files.write_tensors, Saver.finish

    def slow(path: Path, *arguments: Any) -> Any:
        if "000008" in str(path):
            waited_for.wait()
        return write(path, *arguments)

    def noted(saver: Saver) -> None:
        if saver.flying and saver.flying.saved.step == 8:
            waited_for.set()
        finish(saver)

    between(lambda: lambda: None, (8, 99))
    files.write_tensors, Saver.finish = slow, noted  # type: ignore[method-assign, assignment]
    trainer(mesh, case, Path(folder)).run()


def test_the_last_checkpoint_is_not_skipped(tmp_path: Path) -> None:
    case = replace(CASE, asynchronous=True, policy={"while_busy": "skip"})
    run_ranks(finish_slowly, 2, case, str(tmp_path))
    assert committed(tmp_path)[-2:] == [8, 10]
