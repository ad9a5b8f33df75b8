"""--replay STEP names the module whose numbers are not finite, or says that they are this time; the run stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.parallel.mesh import ParallelMesh, Place, build_mesh
from launch import train_dit
from launch.training import Start
from tests.engine.test_numbers import incidents
from tests.launch.world import World, outcome, try_train
from tests.ranks import run_ranks

DIVERGES = ("train.learning_rate=1.0e+19", "train.warmup_steps=0", "train.clip_norm=null", "checkpoint.every=1")
"""A rate at which weights leave float32's range within a few steps."""


def replayed(mesh: ParallelMesh, file: Path, overrides: list[str], step: int) -> tuple[int, str, str]:
    """What ``train_dit.py --replay STEP`` comes to on these ranks."""

    def main() -> None:
        config = load_config(DiTRun, [file], overrides=overrides)
        rank, ranks = mesh.world.rank, mesh.world.size
        layout = train_dit.layout_of(config, Place(rank, ranks, rank, node=ranks))
        own = build_mesh(layout, rank=rank)
        train_dit.train(config, own, device=torch.device("cpu"), start=Start(replay=step))

    return outcome("train_dit", main)


def tree(folder: Path) -> dict[str, Any]:
    """Every file with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def diverged(world: World) -> tuple[Path, int]:
    """A run that ended at a step that was not finite, and that step."""
    run = world.root / "diverged"
    ends = run_ranks(try_train, 2, world.file, world.overrides(run, *DIVERGES))
    assert [code for code, _, _ in ends] == [70, 70], ends[0][2]
    (incident,) = incidents(run)
    return run, incident["step"]


@pytest.mark.parametrize(("ranks", "changes"), [(1, ("train.zero_stage=3",)), (2, ("parallel.sp=2",))])
def test_a_step_is_looked_at_again_on_any_ranks(
    world: World, diverged: tuple[Path, int], ranks: int, changes: tuple[str, ...]
) -> None:
    run, step = diverged
    before, overrides = tree(run), world.overrides(run, *DIVERGES, *changes)
    code, out, err = run_ranks(replayed, ranks, world.file, overrides, step)[0]
    assert code == 70, err
    assert tree(run) == before
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["rank", "host", "what"]
    heads = [line.split() for line in lines[1:] if line[:4].strip().isdigit()]
    assert {int(words[0]) for words in heads} == set(range(ranks))
    (incident,) = incidents(run)
    known = {fault["module"] for account in incident["accounts"] for fault in account["faults"]}
    assert {words[-1] for words in heads} & known
    assert any(line.strip().startswith("in: float32 [") and line.endswith("% finite") for line in lines)
    last = err.splitlines()[-1]
    assert last.startswith(f"train_dit: error: step {step}: the ")
    assert any(sample["key"] in last for account in incident["accounts"] for sample in account["samples"])


def test_a_step_that_is_finite_this_time_points_at_the_hardware(world: World, diverged: tuple[Path, int]) -> None:
    run, _ = diverged
    before = tree(run)
    (code, out, _) = run_ranks(replayed, 1, world.file, world.overrides(run, *DIVERGES), 1)[0]
    assert code == 0
    assert out.splitlines()[-1].startswith("step 1 is finite on every rank this time: ")
    assert "suspect the hardware" in out
    assert tree(run) == before


def test_a_step_that_no_run_has_is_refused(world: World, diverged: tuple[Path, int]) -> None:
    run, _ = diverged
    code, _, err = run_ranks(replayed, 1, world.file, world.overrides(run, *DIVERGES), 99)[0]
    assert (code, "the run's steps are 1 to 10 (train.steps)" in err) == (78, True)
    nowhere = world.root / "nowhere"
    code, _, err = run_ranks(replayed, 1, world.file, world.overrides(nowhere), 3)[0]
    assert (code, f"run.dir {nowhere} is no run yet" in err) == (78, True)
    assert not nowhere.exists()
