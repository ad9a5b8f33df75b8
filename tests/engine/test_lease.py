"""One job at a time works in a run's folder: who is refused, who is waited for, and who may take it over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cogvideo_dist.engine import lease as module
from cogvideo_dist.engine.lease import FILE, Lease
from cogvideo_dist.engine.manifest import CheckpointError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    monkeypatch.setattr(module, "SILENCE_S", 0.4)


@pytest.fixture
def alive() -> Iterator[int]:
    """A process that lives as long as the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def hold(folder: Path, **other: Any) -> dict[str, Any]:
    """What another job left in the folder."""
    holder = {"host": socket.gethostname(), "pid": 1, "job": "", "token": "x", "started": 0.0, **other}
    (folder / FILE).write_text(json.dumps(holder))
    return holder


def take(folder: Path, said: list[str] | None = None) -> Lease:
    return Lease(folder, say=(said if said is not None else []).append, job="7")


def holder(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != FILE]


def test_a_job_that_lives_here_is_named_and_nothing_is_changed(tmp_path: Path, alive: int) -> None:
    before = hold(tmp_path, pid=alive, job="4711")
    with pytest.raises(CheckpointError) as caught:
        take(tmp_path)
    said = f"{tmp_path} is in use by process {alive} on {socket.gethostname()}, job 4711; stop that, or use another run.dir"
    assert str(caught.value) == said
    assert holder(tmp_path) == before
    assert leftovers(tmp_path) == []


def test_a_job_that_died_here_is_followed_at_once(tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 1e6)
    hold(tmp_path, pid=dead)
    said: list[str] = []
    lease = take(tmp_path, said)
    assert holder(tmp_path) == lease.me
    assert said == []
    lease.release()
    assert leftovers(tmp_path) == []
    assert not (tmp_path / FILE).exists()


def test_a_silent_job_elsewhere_is_waited_for_and_followed(tmp_path: Path) -> None:
    hold(tmp_path, host="elsewhere", pid=5, job="3")
    said: list[str] = []
    begun = time.monotonic()
    lease = take(tmp_path, said)
    assert time.monotonic() - begun >= 0.4
    taken = f"{tmp_path} is in use by process 5 on elsewhere, job 3; stop that, or use another run.dir"
    assert said == [f"{taken}; it has 0 s for a sign of life"]
    assert holder(tmp_path) == lease.me
    lease.release()


def test_a_job_elsewhere_that_shows_life_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 30.0)
    before = hold(tmp_path, host="elsewhere", pid=5)
    beat = threading.Timer(0.2, lambda: os.utime(tmp_path / FILE))
    beat.start()
    with pytest.raises(CheckpointError, match="in use by process 5 on elsewhere; stop that"):
        take(tmp_path)
    beat.join()
    assert holder(tmp_path) == before


def test_a_job_elsewhere_that_ends_while_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 30.0)
    hold(tmp_path, host="elsewhere", pid=5)
    end = threading.Timer(0.2, (tmp_path / FILE).unlink)
    end.start()
    take(tmp_path).release()
    end.join()


def test_its_own_beats_are_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a starter on another machine, as whom this one sees itself."""
    first = take(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(module, "SILENCE_S", 30.0)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "):
        take(tmp_path)
    first.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 3}', "\x00" * 40])
def test_a_lease_that_was_torn_by_a_power_loss_holds_nobody_off(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    lease = take(tmp_path)
    assert holder(tmp_path) == lease.me
    lease.release()
    assert leftovers(tmp_path) == []


def test_what_another_has_taken_over_is_left_alone_at_the_end(tmp_path: Path) -> None:
    lease = take(tmp_path)
    after = hold(tmp_path, host="elsewhere", pid=9)
    lease.release()
    assert holder(tmp_path) == after


STARTERS = """
import os, sys
from pathlib import Path
from cogvideo_dist.engine.lease import Lease
from cogvideo_dist.engine.manifest import CheckpointError

def starter(run, begin, decided, end):
    os.read(begin[0], 1)
    try:
        held = Lease(run, say=print)
    except CheckpointError:
        os.write(decided[1], b"r")
        return
    os.write(decided[1], b"w")
    os.read(end[0], 1)
    held.release()

folder, tries, starters = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(tries):
    begin, decided, end = os.pipe(), os.pipe(), os.pipe()
    for _ in range(starters):
        if os.fork() == 0:
            os.close(begin[1])
            os.close(end[1])
            try:
                starter(folder / str(number), begin, decided, end)
            except BaseException as error:
                os.write(decided[1], b"e")
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(0)
    os.close(begin[1])
    found = b""
    while len(found) < starters:
        found += os.read(decided[0], 1)
    os.close(end[1])
    for _ in range(starters):
        os.wait()
    for each in (begin[0], end[0], *decided):
        os.close(each)
    print("".join(sorted(found.decode())), flush=True)
"""


def race(folder: Path, tries: int, starters: int) -> list[str]:
    """What ``starters`` processes that started at once came to, in each of the tries: won, refused, error."""
    done = subprocess.run(
        [sys.executable, "-c", STARTERS, str(folder), str(tries), str(starters)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("before", ["nothing", "a dead job", "a torn lease"])
@pytest.mark.parametrize(("tries", "starters"), [(15, 2), pytest.param(300, 5, marks=pytest.mark.long)])
def test_of_several_that_start_at_once_one_wins(
    tmp_path: Path, dead: int, before: str, tries: int, starters: int
) -> None:
    for number in range(tries):
        (tmp_path / str(number)).mkdir()
        if before == "a dead job":
            hold(tmp_path / str(number), pid=dead)
        elif before == "a torn lease":
            (tmp_path / str(number) / FILE).touch()
    found = race(tmp_path, tries, starters)
    assert len(found) == tries
    assert set(found) == {"r" * (starters - 1) + "w"}
    for number in range(tries):
        assert list((tmp_path / str(number)).iterdir()) == []
