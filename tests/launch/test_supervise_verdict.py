"""Whom the first supervisor names, from what the others report; and to whom it listens."""

from __future__ import annotations

import json
import selectors
import socket
import time
from pathlib import Path
from typing import Any

from launch.heartbeat import Beat, Heartbeat
from launch.supervise_hub import Failure, Hub, meeting_file
from launch.supervise_verdict import first_cause, verdict

WAITS = ["distributed_c10d.py:3111 all_reduce", "ops.py:125 reduce_sum"]
WORKS = ["dit.py:88 forward", "trainer.py:200 _step"]


def calls(label: str, *operations: str, done: int) -> dict[str, Any]:
    """A group in which ``operations`` were begun, of which ``done`` are over."""
    found = {
        f"c{number}": {"op": operation, "sizes": [[8]], "dtypes": ["Float"], "done": number <= done}
        for number, operation in enumerate(operations, 1)
    }
    return {"label": label, "begun": len(operations), "calls": found}


def at(
    phase: str, collectives: dict[str, Any], *, stack: list[str] | None = WAITS, age: float = 30.0, state: str = "S"
) -> dict[str, Any]:
    return {
        "phase": phase, "step": 7, "age": age, "state": state, "collectives": collectives, "stack": stack,
        "host": "h", "pid": 1,
    }  # fmt: skip


def named(standing: dict[int, dict[str, Any]], world: int | None = None) -> tuple[int, str]:
    return verdict(standing, world=world or len(standing), found="hangs: backward takes longer than 3 s")


def test_the_rank_that_is_behind_and_ahead_of_none_is_named_and_not_those_that_wait_for_it() -> None:
    """Of tp pairs (0, 1) and (2, 3) and dp pairs (0, 2) and (1, 3): 3 hangs, 2 waits for it in tp, others for them in dp."""
    tp_over, tp_open, tp_behind = (
        calls("tp", "all_reduce", "all_gather", done=2), calls("tp", "all_reduce", "all_gather", done=1),
        calls("tp", "all_reduce", done=1),
    )  # fmt: skip
    dp_open, dp_before = calls("dp", "reduce_scatter", done=0), calls("dp", done=0)
    rank, text = named({
        0: at("update", {"tp a": tp_over, "dp a": dp_open}), 1: at("update", {"tp a": tp_over, "dp b": dp_open}),
        2: at("backward", {"tp b": tp_open, "dp a": dp_before}),
        3: at("backward", {"tp b": tp_behind, "dp b": dp_before}, stack=WORKS),
    })  # fmt: skip
    assert rank == 3
    assert "in backward of step 7 for 30 s" in text
    assert "dit.py:88 forward" in text
    assert "waits in" in text


def test_a_stopped_rank_and_one_that_does_not_answer_come_first() -> None:
    waiting = at("forward", {"a": calls("world", "all_reduce", done=0)})
    behind = at("forward", {"a": calls("world", done=0)})
    assert named({0: waiting, 1: behind, 2: at("data", {}, stack=None, state="T")})[0] == 2
    rank, text = named({0: waiting, 1: waiting, 2: at("forward", {}, stack=None)})
    assert rank == 2
    assert "does not answer" in text and "waits in all_reduce of Float [8] of group world (number 1)" in text


def test_ranks_that_are_in_different_collectives_are_both_named() -> None:
    rank, text = named({
        0: at("update", {"a": calls("world", "all_reduce", "all_reduce", done=1)}),
        1: at("update", {"a": calls("world", "all_reduce", "broadcast", done=1)}),
    })  # fmt: skip
    assert rank == 1
    assert "rank 0 disagree on collective 2 of group world" in text
    assert "all_reduce of Float [8]" in text and "broadcast of Float [8]" in text


def test_a_rank_that_never_came_is_named() -> None:
    rank, text = named({0: at("init", {}), 2: at("init", {})}, world=4)
    assert rank == 1
    assert "has not been heard of and 1 more" in text


def test_without_records_the_one_that_does_not_wait_is_named() -> None:
    """As under torch that does not record, or before the first collective."""
    rank, text = named({0: at("init", {}, age=9), 1: at("init", {}, stack=WORKS, age=1), 2: at("init", {}, age=8)})
    assert rank == 1
    assert "while others wait in all_reduce" in text
    assert named({0: at("forward", {}), 1: at("data", {}), 2: at("forward", {})})[0] == 1, "it is at something else"


def test_what_others_say_when_a_rank_is_gone_is_not_the_cause() -> None:
    lost = Failure(0, "ended", "error: another rank is gone: Connection closed by peer", 76)
    aborted = Failure(1, "died", "was killed by SIGABRT in backward", 76)
    died = Failure(2, "died", "was killed by SIGKILL in backward", 76)
    error = Failure(3, "ended", "error: the input is bad", 1)
    hang = Failure(4, "hang", "hangs", 76)
    assert first_cause([lost, hang, aborted, died]) is died
    assert first_cause([hang, lost, error]) is error
    assert first_cause([lost, aborted]) is aborted
    assert first_cause([hang, lost]) is lost


def test_whoever_does_not_know_the_word_is_not_heard(tmp_path: Path) -> None:
    place = {"folder": str(tmp_path), "meeting": "m", "world": 2, "node": 2, "address": "127.0.0.1:1", "rank": 0}
    with selectors.DefaultSelector() as selector:
        hub = Hub("train", place, selector=selector)
        file = meeting_file(place)
        assert file.stat().st_mode & 0o077 == 0
        where = json.loads(file.read_text())
        assert where["host"] == "127.0.0.1" == hub.listener.getsockname()[0]
        hello = {"rank": 1, "host": "h", "pid": 1}
        fail = {"fail": {"kind": "died", "text": "t", "code": 1, "trace": ""}}
        for word, known in (("", 0), ("x" * 32, 0), (where["word"], 1)):
            with socket.create_connection((where["host"], where["port"])) as connection:
                lines = [{"hello": {**hello, "word": word}}, fail]
                connection.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                end = time.monotonic() + 20
                while len(hub.known) < known or hub.strangers or selector.select(0.2):
                    for key, _ in selector.select(0):
                        key.data()
                    hub.turn()
                    assert time.monotonic() < end
                    if known and hub.known:
                        break
            assert (len(hub.known), len(hub.failures)) == (known, known)
        hub.close()
    assert not file.exists()


def test_a_beat_is_read_whole_and_time_out_of_the_job_does_not_count() -> None:
    heartbeat = Heartbeat.make()
    reader = Heartbeat(heartbeat.descriptor)
    assert reader.read() == Beat()
    for step in range(1, 50):
        heartbeat.beat("backward", step=step, limit_s=3.0)
        beat = reader.read()
        assert (beat.phase, beat.step, beat.limit_s) == ("backward", step, 3.0)
    now = beat.since + 10
    assert beat.overdue(now) and not beat.overdue(now, since=now - 2)
    assert not Beat("data", 1, 0.0, 0.0).overdue(1e9)
