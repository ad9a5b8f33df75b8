"""Worker processes that are killed, stopped and misled: what is read stays the same, or the error says what happened."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data import pool as pool_module
from cogvideo_dist.data.decode import CENTER
from cogvideo_dist.data.index import Member, Record, checksum
from cogvideo_dist.data.pool import Limits, Loaded, Pool, Reads, Task, WorkerError
from cogvideo_dist.data.reading import Cut
from cogvideo_dist.data.shards import DataError, ShardReader
from cogvideo_dist.data.storage import Store
from tests.data.clips import make_clip, make_image, make_shards

CLIPS = {
    **{f"videos/{i}.mp4": make_clip(20 + i, 16, size=(48, 80)) for i in range(5)},
    **{f"images/still {i}.png": make_image(60 + i, 90) for i in range(4)},
}
REMOTE = Remote()
CUT = Cut((9, 48, 64), 8.0, CENTER)
STILL = Cut((1, 48, 64), 8.0, CENTER)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return make_shards(tmp_path_factory.mktemp("pool"), CLIPS.items())


def tasks(reader: ShardReader, times: int = 3) -> list[Task]:
    return [Task(0, r, CUT if r.kind == "video" else STILL) for _ in range(times) for r in reader.records]


def content(loaded: Loaded) -> tuple[str, bytes]:
    array = loaded.content.arrays["pixels"]
    return loaded.content.caption, loaded.memory[array.offset : array.offset + int(np.prod(array.shape))].tobytes()


def expected(reader: ShardReader, wanted: list[Task]) -> list[tuple[str, bytes]]:
    reads = Reads([reader.store])
    return [content(reads.result(reads.submit(task))) for task in wanted]


@pytest.fixture
def made() -> Iterator[list[Pool]]:
    pools: list[Pool] = []
    yield pools
    for pool in pools:
        pool.close()


def start(made: list[Pool], store: Store, *, workers: int = 2, memory: int = 2**26, **limits: float) -> Pool:
    made.append(Pool([store], workers=workers, memory=memory, limits=Limits(**limits)))  # type: ignore[arg-type]
    return made[-1]


def test_workers_know_nothing_of_torch() -> None:
    """They start in a fraction of a second and take a tenth of the memory."""
    code = "import sys; from cogvideo_dist.data import worker; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "False",
        "False",
    ]


def test_what_is_read_does_not_depend_on_workers(reader: ShardReader, made: list[Pool]) -> None:
    wanted = tasks(reader)
    alone = expected(reader, wanted)
    for workers in (1, 3):
        pool = start(made, reader.store, workers=workers)
        tickets = [pool.submit(task) for task in wanted]
        assert [content(pool.result(ticket)) for ticket in tickets] == alone


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_replaced_and_nothing_changes(
    reader: ShardReader, made: list[Pool], kill: signal.Signals
) -> None:
    wanted = tasks(reader, 6)
    alone = expected(reader, wanted)
    pool = start(made, reader.store)
    tickets, found = [pool.submit(task) for task in wanted], []
    for number, ticket in enumerate(tickets):
        if number % 7 == 3:
            os.kill(pool.processes[number % len(pool.processes)], kill)
        found.append(content(pool.result(ticket)))
    assert found == alone


def test_workers_that_die_in_a_row_end_the_run(
    reader: ShardReader, made: list[Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module.sys, "executable", "/bin/false")
    pool = start(made, reader.store)
    with pytest.raises(
        WorkerError, match="7 data workers in a row died without reading anything, the last with exit code 1"
    ):
        pool.result(pool.submit(tasks(reader)[0]))
    with pytest.raises(WorkerError, match="in a row"):
        pool.result(pool.submit(tasks(reader)[0]))


def pipe(folder: Path) -> tuple[Store, Record]:
    """A record whose shard is a FIFO that nobody writes to: whoever opens it waits."""
    os.mkfifo(folder / "a.tar")
    members = {"mp4": Member(0, 9, "0" * 32), "txt": Member(9, 9, "0" * 32)}
    record = Record(
        "slow", "slow.mp4", "a.tar", "video", members, frames=9, fps=8.0, height=48, width=64, caption_length=1
    )
    return Store(str(folder), REMOTE), record


def test_a_hung_worker_is_killed_and_in_the_end_the_run_ends(tmp_path: Path, made: list[Pool]) -> None:
    """Storage that never answers is no defect of the sample, so nothing takes its place."""
    store, record = pipe(tmp_path)
    pool = start(made, store, workers=1, silent_seconds=0.3, deaths=2)
    with pytest.raises(WorkerError, match="3 data workers in a row died .* SIGKILL at sample slow"):
        pool.result(pool.submit(Task(0, record, CUT)))


def test_a_stopped_worker_is_found(reader: ShardReader, made: list[Pool]) -> None:
    wanted = tasks(reader)
    alone = expected(reader, wanted)
    pool = start(made, reader.store, workers=1, silent_seconds=2.0)
    content(pool.result(pool.submit(wanted[0])))
    os.kill(pool.processes[0], signal.SIGSTOP)
    tickets = [pool.submit(task) for task in wanted]
    assert [content(pool.result(ticket)) for ticket in tickets] == alone


PROGRAM = """
import sys; sys.path[:] = {path!r}
from cogvideo_dist.data import decode, reading, worker
import os, signal
plain = reading.decode_image
def deadly(data, pixels, **options):
    if len(data) == {size}:
        {deed}
    plain(data, pixels, **options)
reading.decode_image = deadly
worker.main()
"""


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its decoder died twice (SIGSEGV, decoding)"),
        ("signal.pause()", "its decoder died twice (SIGKILL, silent while decoding)"),
        ("while True: pass", "its decoder died twice (SIG"),
        ("bytearray(8 * 2**30)", "decoding it takes more memory than a worker may use"),
        ("raise KeyError('x')", None),
    ],
)
def test_a_deadly_sample_is_a_defect_and_its_neighbours_are_read(
    reader: ShardReader,
    made: list[Pool],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    deed: str,
    reason: str | None,
) -> None:
    """The worker's own program, with a decoder that does its worst to one image."""
    bad = next(record for record in reader.records if record.kind == "image")
    program = tmp_path / "python"
    code = PROGRAM.format(path=sys.path, size=bad.members["png"].size, deed=deed)
    (tmp_path / "worker.py").write_text(code)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/worker.py "$3"\n')
    program.chmod(0o755)
    monkeypatch.setattr(pool_module.sys, "executable", str(program))
    pool = start(made, reader.store, decode_seconds=0.3)
    wanted = tasks(reader)
    tickets = [pool.submit(task) for task in wanted]
    alone = expected(reader, wanted)
    for task, ticket, whole in zip(wanted, tickets, alone, strict=True):
        if task.record is not bad and task.record.members.get("png", (0, 0))[1] != bad.members["png"].size:
            assert content(pool.result(ticket)) == whole
        elif reason is None:
            with pytest.raises(WorkerError, match=r"(?s)failed at sample .*KeyError: 'x'"):
                pool.result(ticket)
        else:
            with pytest.raises(DataError) as caught:
                pool.result(ticket)
            assert caught.value.reason.startswith(reason)
            assert caught.value.key == task.record.key


def test_memory_is_bounded_and_used_again(reader: ShardReader, made: list[Pool]) -> None:
    """What is ready and nobody has taken yet stays within the bound; what is let go of is used for what comes."""
    pool = start(made, reader.store, workers=1, memory=3 * 2**20)
    wanted = tasks(reader, 8)
    tickets = [pool.submit(task) for task in wanted]
    most = 0
    for ticket, whole in zip(tickets, expected(reader, wanted), strict=True):
        loaded = pool.result(ticket)
        most = max(most, pool._allotted())
        assert content(loaded) == whole
        del loaded
    assert most <= 4 * 2**20, "the bound, and what was waited for"
    assert pool._segments <= 4


def test_what_is_held_is_not_overwritten(reader: ShardReader, made: list[Pool]) -> None:
    """More is held than the bound allows: whoever waits gets it all the same, and every array keeps its bytes."""
    pool = start(made, reader.store, workers=2, memory=2**20)
    wanted = tasks(reader, 3)
    tickets = [pool.submit(task) for task in wanted]
    held = [pool.result(ticket) for ticket in tickets]
    views = [loaded.memory[:] for loaded in held]
    alone = expected(reader, wanted)
    assert [content(loaded) for loaded in held] == alone
    del held
    gc.collect()
    assert [content(pool.result(pool.submit(task))) for task in wanted[:5]] == alone[:5]
    assert len(views) == len(wanted)


def test_what_is_not_wanted_any_more_gives_its_memory_back(reader: ShardReader, made: list[Pool]) -> None:
    """A stream that is left in its middle: ready, being read, waiting."""
    pool = start(made, reader.store, workers=1)
    wanted = tasks(reader, 2)
    for _ in range(3):
        tickets = [pool.submit(task) for task in wanted]
        pool.result(tickets[2])
        pool.discard([*tickets[:2], *tickets[3:]])
    assert content(pool.result(pool.submit(wanted[0]))) == expected(reader, wanted[:1])[0]
    gc.collect()
    content(pool.result(pool.submit(wanted[0])))
    assert not pool._jobs
    assert pool._held <= 2**20, "what was read last"


def test_more_bytes_than_expected_are_given_room(made: list[Pool], tmp_path: Path) -> None:
    data = make_clip(12, 8, size=(48, 64))
    caption = b"words " * 300
    (tmp_path / "a.tar").write_bytes(data + caption)
    members = {"mp4": Member(0, len(data), checksum(data)), "txt": Member(len(data), len(caption), checksum(caption))}
    record = Record("a", "a.mp4", "a.tar", "video", members, frames=12, fps=8.0, height=48, width=64, caption_length=9)
    pool = start(made, Store(str(tmp_path), REMOTE))
    pool_module.expected_bytes, plain = (lambda record, size: 1), pool_module.expected_bytes
    try:
        large = replace(CUT, size=(9, 48, 64))
        assert content(pool.result(pool.submit(Task(0, record, large))))[0] == caption.decode().strip()
    finally:
        pool_module.expected_bytes = plain


def test_closing_ends_the_workers_and_whoever_waits(reader: ShardReader, made: list[Pool]) -> None:
    pool = start(made, reader.store)
    numbers = pool.processes
    pool.close()
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_workers_end_with_their_parent(reader: ShardReader, tmp_path: Path) -> None:
    code = (
        "import sys, time; from cogvideo_dist.data.pool import Pool; from cogvideo_dist.data.storage import Store\n"
        "from cogvideo_dist.config.schema import Remote\n"
        f"pool = Pool([Store({str(reader.folder)!r}, Remote())], workers=2, memory=2**20)\n"
        "print(*pool.processes, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        numbers = [int(word) for word in parent.stdout.readline().split()]
        assert len(numbers) == 2
        parent.kill()
    for _ in range(200):
        if not any(Path(f"/proc/{number}").exists() for number in numbers):
            break
        time.sleep(0.05)
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)
