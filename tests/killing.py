"""Forked processes that are killed at a counted operation on a file, so that no clock decides where, and what they did."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from cogvideo_dist.data.encoded import Item
from cogvideo_dist.data.workshop import Workshop

KEPT = "kept"
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.utime")


def fork(function: Callable[[], object], *, root: Path, last: int | None = None, count_to: Path | None = None) -> int:
    """The id of a process that runs ``function`` and is killed before operation ``last`` (from 0) on a file below ``root``.

    If it lives, the number of its operations is written to ``count_to``.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        done = _count_operations(str(root), last)
        function()
        if count_to is not None:
            count_to.write_text(str(done[0]))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_operations(root: str, last: int | None) -> list[int]:
    done = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in OPERATIONS and arguments:
            path = arguments[0]
            # While a folder is deleted its files are named relative to it.
            if isinstance(path, (str, os.PathLike)) and (os.fspath(path).startswith(root) or event == "os.remove"):
                if done[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                done[0] += 1

    sys.addaudithook(hook)
    return done


def ended(process: int) -> bool:
    """Wait for a process; whether it lived to its end. One that failed is an error."""
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"process {process} ended with {code}; its traceback is above"
    return code == 0


def note(log: Path, text: str) -> None:
    """Add a line, with the process's id in front."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{os.getpid()} {text}\n".encode())
    os.close(descriptor)


def note_what_is_kept(log: Path, patch: pytest.MonkeyPatch) -> None:
    """A line for every item that an encoded set's worker has put where it stays."""
    provide = Workshop._provide

    def noted(self: Workshop, number: int, role: str) -> Item:
        item = provide(self, number, role)
        note(log, KEPT)
        return item

    patch.setattr(Workshop, "_provide", noted)


def begun_twice(log: Path, killed: Collection[int]) -> list[str]:
    """What was noted more than once, not counting what one of the ``killed`` had begun and not kept."""
    begun, last = Counter[str](), dict[int, str]()
    for line in log.read_text().splitlines():
        process, text = line.split(" ", 1)
        begun[text] += text != KEPT
        last[int(process)] = text
    in_flight = Counter(text for process, text in last.items() if process in killed)
    return [text for text, count in (begun - in_flight).items() if count > 1]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
