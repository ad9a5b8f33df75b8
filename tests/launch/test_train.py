"""One configuration is one run: under every launcher, on any ranks, at any ZeRO stage, and however often it is interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from cogvideo_dist.engine.checkpoint import newest
from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.engine.saved_states import whole_states
from tests.launch.commands import FREQUENT, ROOT, finish, last_step, start
from tests.launch.world import World, read_log, steps_of, train
from tests.ranks import run_ranks

STEPS = 10
CALLS = 9  # that tests/launch/ending.py counts in a step: 4 micro-steps of 2, and a line of the log
EXACT = ("loss", "gradient_norm", "learning_rate", "loss/quartile1", "loss/quartile4")


def losses(run: Path) -> list[float]:
    found = steps_of(run, "loss")
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return [loss for _, loss in found]


def assert_same_losses(run: Path, expected: Path) -> None:
    assert losses(run) == pytest.approx(losses(expected), rel=1e-5, abs=0)
    held_out = [
        [entry["held_out/loss"] for entry in read_log(path) if "held_out/loss" in entry] for path in (run, expected)
    ]
    assert len(held_out[0]) == 2
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5, abs=0)


def assert_bitwise(run: Path, expected: Path) -> None:
    assert steps_of(run, *EXACT) == steps_of(expected, *EXACT)
    (path, _), (other, _) = newest(run / "ckpt"), newest(expected / "ckpt")
    assert path is not None
    assert other is not None
    assert path.name == other.name == f"step-{STEPS:06d}"
    ours, theirs = whole_states(path), whole_states(other)
    assert ours.keys() == theirs.keys()
    for kind, tensors in theirs.items():
        assert all(torch.equal(ours[kind][key], tensor) for key, tensor in tensors.items()), kind


@pytest.mark.parametrize(
    "launcher", ["deepspeed", *(pytest.param(each, marks=pytest.mark.long) for each in ("torchrun", "python"))]
)
def test_every_launcher_computes_the_run(world: World, whole: Path, launcher: str) -> None:
    run = world.root / launcher
    code, _, stderr = finish(start(launcher, [str(world.file), *world.overrides(run, "data.workers=1")]))
    assert code == 0, stderr
    assert_same_losses(run, whole)


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(0, 1), (2, 2), (3, 2)]
    + [
        pytest.param(s, r, marks=pytest.mark.long)
        for s in range(4)
        for r in (1, 2)
        if (s, r) not in ((0, 1), (2, 2), (3, 2))
    ],
)
def test_every_zero_stage_on_any_ranks_computes_the_run(world: World, whole: Path, stage: int, ranks: int) -> None:
    run = world.root / f"stage-{stage}-{ranks}"
    run_ranks(train, ranks, world.file, world.overrides(run, f"train.zero_stage={stage}"))
    assert_same_losses(run, whole)


@pytest.mark.long
def test_an_interrupted_and_a_killed_run_continue_bitwise(world: World, commanded: Path) -> None:
    """The same command three times: ended by Ctrl-C, by SIGKILL, and by itself."""
    seed = random.SystemRandom().randrange(1000)
    print(f"random calls of seed {seed}")
    draw = random.Random(seed)
    run = world.root / "interrupted"
    arguments = [str(world.file), *world.overrides(run, *FREQUENT)]

    code, _, stderr = finish(start("python", arguments, script=ending(draw.randrange(1, 6 * CALLS), "SIGINT")))
    assert code == 130
    assert "Traceback" not in stderr
    assert (
        stderr.splitlines()[-1]
        == "train_dit: interrupted; start the same command again to go on from the last checkpoint"
    )

    before = saved_lines(run)
    reached = int(newest(run / "ckpt")[0].name.removeprefix("step-")) if before else 0
    call = draw.randrange(1 + CALLS * max(1, 4 - reached), CALLS * (STEPS - reached))
    assert finish(start("python", arguments, script=ending(call, "SIGKILL")))[0] == -signal.SIGKILL
    assert (run / "log.jsonl").read_text().startswith(before)

    before = saved_lines(run)
    assert before, "a checkpoint was reached before the kill"
    code, _, stderr = finish(start("python", arguments))
    assert code == 0, stderr
    assert (run / "log.jsonl").read_text().startswith(before), "steps before the checkpoint are not taken again"
    assert_bitwise(run, commanded)


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_bitwise(
    world: World, commanded: Path, name: str
) -> None:
    """In the middle of an interval: nothing is lost, and what was not reported yet is reported as in the whole run."""
    run = world.root / f"asked-{name}"
    arguments = [str(world.file), *world.overrides(run, *FREQUENT)]
    code, _, stderr = finish(start("python", arguments, script=ending(CALLS + 1, name)))
    assert code == 75
    line = stderr.splitlines()[-1]
    assert line.startswith("train_dit: stopped after step ")
    assert line.endswith(f", which is saved: {name}; the same command goes on from there")
    status = json.loads((run / "exit_status.json").read_text())
    assert (status["code"], name in status["reason"]) == (75, True)
    path, _ = newest(run / "ckpt")
    assert path is not None
    assert path.name.removeprefix("step-").lstrip("0") == line.split()[4].rstrip(",")
    code, _, stderr = finish(start("python", arguments))
    assert code == 0, stderr
    assert json.loads((run / "exit_status.json").read_text())["code"] == 0
    assert_bitwise(run, commanded)


def ending(call: int, by: str) -> tuple[str, ...]:
    return (str(ROOT / "tests" / "launch" / "ending.py"), str(call), by)


def saved_lines(run: Path) -> str:
    """The log up to the newest checkpoint."""
    path, _ = newest(run / "ckpt")
    step = int(path.name.removeprefix("step-")) if path else 0
    kept = [line for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return "".join(line for line in kept if step and int(line.split(",")[0].split()[1]) <= step)


def killed(mesh: ParallelMesh, file: Path, overrides: list[str], step: int) -> None:
    """``train``, in which the first rank dies as soon as it has logged ``step``."""
    scalars = RunLog.scalars

    def die(log: RunLog, done: int, values: dict[str, float]) -> None:
        scalars(log, done, values)
        if mesh.is_first and done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.scalars = die  # type: ignore[method-assign]  # the process is this rank's own
    train(mesh, file, overrides)


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_run_of_two_ranks_continues_bitwise(world: World, stage: int) -> None:
    straight, broken = (world.root / f"{name}-{stage}" for name in ("straight", "broken"))
    changes = (f"train.zero_stage={stage}", "checkpoint.every=3", "checkpoint.asynchronous=false")
    run_ranks(train, 2, world.file, world.overrides(straight, *changes))
    with pytest.raises(AssertionError, match=r"rank 0 ended with -9|rank 1 failed first"):
        run_ranks(killed, 2, world.file, world.overrides(broken, *changes), 4)
    assert last_step(broken) < STEPS
    assert saved_lines(broken)
    run_ranks(train, 2, world.file, world.overrides(broken, *changes))
    assert_bitwise(broken, straight)
