"""Whatever happens to a rank: all ranks end, nothing is left behind, and one line says which was the first and why."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideo_dist.engine.checkpoint import newest
from tests.launch.supervised import QUICK, Fault, Outcome, Scene, alive, play, status

PHASES = ("init", "build", "forward", "backward", "update", "save")


def assert_over(outcome: Outcome, code: int, rank: int) -> str:
    """All ranks have ended with ``code``, and one line, which is given back, names ``rank``."""
    assert outcome.codes == [code] * len(outcome.codes), outcome.said
    assert alive(outcome) == []
    assert len(outcome.lines) == 1, outcome.said
    assert f"rank {rank}" in outcome.lines[0]
    assert len(outcome.lines[0]) <= 500
    return outcome.lines[0]


def test_an_undisturbed_run_says_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    outcome = play(scene)
    assert outcome.codes == [0, 0]
    assert outcome.lines == []
    assert alive(outcome) == []
    assert status(scene)["code"] == 0
    assert not list(tmp_path.glob(".meeting-*"))


@pytest.mark.parametrize(
    ("rank", "phase"),
    [(0, "forward"), (1, "save"), (1, "init")]
    + [
        pytest.param(rank, phase, marks=pytest.mark.long)
        for rank in (0, 1)
        for phase in PHASES
        if (rank, phase) not in ((0, "forward"), (1, "save"), (1, "init"))
    ],
)
def test_a_rank_that_is_killed_takes_all_with_it_and_is_named(tmp_path: Path, rank: int, phase: str) -> None:
    step = 4 if phase == "save" else 3
    scene = Scene(tmp_path, fault=Fault("kill", rank, phase, step))
    outcome = play(scene)
    line = assert_over(outcome, 76, rank)
    assert "SIGKILL" in line
    assert phase in line
    assert outcome.seconds < 5, "everything is gone within five seconds"
    assert (status(scene)["code"], status(scene)["rank"]) == (76, rank)
    path, _ = newest(tmp_path / "ckpt")
    expected = 2 if phase not in ("init", "build") else 0
    assert int(path.name.rpartition("-")[2] if path else 0) == expected
    again = play(replace(scene, fault=Fault("none", -1)))
    assert again.codes == [0, 0]


@pytest.mark.parametrize(
    ("action", "word"),
    [("crash", "SIGSEGV"), pytest.param("leave", "before its end", marks=pytest.mark.long)],
)
def test_a_rank_that_crashes_or_leaves_without_a_word_is_named(tmp_path: Path, action: str, word: str) -> None:
    scene = Scene(tmp_path, fault=Fault(action, 1))
    line = assert_over(play(scene), 76, 1)
    assert word in line
    assert "forward of step 3" in line
    if action == "crash":
        assert "in crash" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_an_error_of_one_rank_is_told_once_with_its_traceback(tmp_path: Path) -> None:
    outcome = play(Scene(tmp_path, fault=Fault("fault_of_ours", 1)))
    line = assert_over(outcome, 1, 1)
    assert "an error that nobody foresaw" in line
    assert outcome.said.count("Traceback") == 1
    assert "rank 0 stopped: rank 1 failed first" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert "fault_of_ours" in (tmp_path / "logs" / "rank-1.log").read_text()


@pytest.mark.long
def test_bad_input_of_one_rank_is_one_line(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fault=Fault("bad_input", 1))
    outcome = play(scene)
    assert assert_over(outcome, 1, 1) == "train: rank 1: error: the input is bad in two lines"
    assert "Traceback" not in outcome.said
    assert status(scene)["reason"].endswith("the input is bad in two lines")


HANGS = [
    Fault(action, rank, phase, 4 if phase == "save" else 3)
    for action in ("stop", "sleep", "loop", "hold")
    for rank in (0, 1)
    for phase in ("data", "forward", "backward", "update", "save")
]
SOON = {("stop", 1, "backward"), ("hold", 0, "update")}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault, id=f"{fault.action}-{fault.rank}-{fault.phase}",
            marks=() if (fault.action, fault.rank, fault.phase) in SOON else pytest.mark.long,
        )
        for fault in HANGS
    ],
)  # fmt: skip
def test_a_hanging_rank_is_named_with_its_phase_and_the_collective(tmp_path: Path, fault: Fault) -> None:
    outcome = play(Scene(tmp_path, fault=fault))
    line = assert_over(outcome, 76, fault.rank)
    assert f"in {fault.phase} of step {fault.step}" in line
    assert "waits in all_reduce" in line or "waits in all_gather" in line or "waits in broadcast" in line, line
    assert outcome.seconds < QUICK.step_s + 15
    assert (tmp_path / "logs" / "hang.json").exists()
    if fault.action != "stop":
        assert "tests/launch/supervised.py" in (tmp_path / "logs" / f"rank-{fault.rank}.log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("action", ["another_order", "another_collective"])
def test_ranks_that_call_different_collectives_are_named(tmp_path: Path, action: str, rank: int) -> None:
    outcome = play(Scene(tmp_path, fault=Fault(action, rank)))
    assert set(outcome.codes) <= {1, 76}
    assert alive(outcome) == []
    assert len(outcome.lines) == 1


@pytest.mark.long
def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    outcome = play(Scene(tmp_path, fault=Fault("sleep", 1, "init"), limits=replace(QUICK, init_s=4)))
    line = assert_over(outcome, 76, 1)
    assert "init" in line


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_dies_with_its_supervisor_and_so_do_the_others(tmp_path: Path, rank: int) -> None:
    def kill(scene: Scene) -> None:
        _until(lambda: (scene.folder / "fault").exists())
        (pid,) = [
            int(p.read_text()) for p in scene.folder.glob(f"pid-{rank}-*") if _parent_is_supervisor(int(p.read_text()))
        ]
        os.kill(_parent(pid), signal.SIGKILL)

    patient = replace(QUICK, step_s=60, first_step_s=60)
    outcome = play(Scene(tmp_path, fault=Fault("sleep", rank), limits=patient), meanwhile=kill)
    assert outcome.codes[1 - rank] == 76
    _until(lambda: alive(outcome) == [])


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _parent_is_supervisor(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] != b"sleep"


def test_a_full_host_is_named(tmp_path: Path) -> None:
    line = assert_over(play(Scene(tmp_path, fault=Fault("allocate", 1))), 76, 1)
    assert "the host's memory is full" in line and "GiB at most" in line


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        outcome = play(Scene(tmp_path, address=f"127.0.0.1:{other.getsockname()[1]}"))
    assert outcome.codes == [76, 76], outcome.said
    assert len(outcome.lines) == 1
    assert "is taken" in outcome.lines[0]


def test_ranks_whose_configuration_differs_are_refused(tmp_path: Path) -> None:
    outcome = play(Scene(tmp_path, fault=Fault("other_rate", 1, "init")))
    assert outcome.codes == [78, 78], outcome.said
    assert len(outcome.lines) == 1
    assert "train.learning_rate: 0.1 on rank 0, 0.2 on rank 1" in outcome.lines[0]
    assert status(Scene(tmp_path))["code"] == 78


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.long)])
def test_a_job_that_is_asked_to_stop_at_any_instant_loses_no_step(tmp_path: Path, count: int) -> None:
    """SIGTERM to one rank or to all, at random: nothing that was computed is computed again."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"instants of seed {seed}")
    draw = random.Random(seed)
    whole, broken = (Scene(tmp_path / name, steps=60, pace_s=0.01) for name in ("whole", "broken"))
    assert play(whole).codes == [0, 0]
    stopped = runs = 0
    while stopped < count:
        ranks = draw.choice([[0], [1], [0, 1]])
        wait = draw.uniform(0.0, 0.8)

        def ask(scene: Scene, ranks: list[int] = ranks, wait: float = wait) -> None:
            _until(lambda: len(list(scene.folder.glob("running-*"))) == scene.ranks)
            time.sleep(wait)
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(int((scene.folder / f"supervisor-{rank}").read_text()), signal.SIGTERM)

        outcome = play(broken, meanwhile=ask)
        assert outcome.codes in ([75, 75], [0, 0]), outcome.said
        assert alive(outcome) == []
        stopped, runs = stopped + (outcome.codes[0] == 75), runs + 1
        if outcome.codes[0] == 0:
            assert logged(broken) == logged(whole)
            assert all(start["lost"] == 0 for start in starts(broken)), "no step is made again"
            shutil.rmtree(broken.folder)
    print(f"{stopped} stops in {runs} starts")
    if broken.folder.exists():
        assert play(broken).codes == [0, 0]
        assert logged(broken) == logged(whole)
        assert all(start["lost"] == 0 for start in starts(broken))


def logged(scene: Scene) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (scene.folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


def starts(scene: Scene) -> list[dict[str, float]]:
    return [json.loads(line) for line in (scene.folder / "starts.jsonl").read_text().splitlines()]
