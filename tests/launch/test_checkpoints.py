"""How the training command ends where checkpoints cannot be written or taken up, or the folder is another job's."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from pathlib import Path

import pytest
import torch

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.checkpoint import checkpoints
from cogvideo_dist.engine.lease import FILE
from cogvideo_dist.parallel.mesh import ParallelMesh as Mesh
from cogvideo_dist.parallel.mesh import Place, build_mesh
from launch import train_dit
from launch.training import Start
from tests.engine.test_checkpoint import flip
from tests.launch.world import World, outcome, read_log
from tests.ranks import run_ranks

STEPS = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=9")
Ending = tuple[int, str, str]


def train(mesh: Mesh, file: Path, overrides: list[str], checkpoint: str | None, limit: int | None) -> Ending:
    """The end of a start; rank 1 may not write files of more than ``limit`` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if limit is not None and mesh.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    config = load_config(DiTRun, [file], overrides=overrides)
    rank, ranks = mesh.world.rank, mesh.world.size
    layout = train_dit.layout_of(config, Place(rank, ranks, rank, node=ranks))
    own = build_mesh(layout, rank=rank)
    ended = outcome(
        "train_dit",
        lambda: train_dit.train(config, own, device=torch.device("cpu"), start=Start(checkpoint=checkpoint)),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return ended


def start(
    world: World, run: Path, *changes: str, checkpoint: str | None = None, limit: int | None = None
) -> tuple[list[int], list[str]]:
    """Exit codes of two ranks and the errors that they ended with."""
    endings = run_ranks(train, 2, world.file, world.overrides(run, *STEPS, *changes), checkpoint, limit)
    said = [line for _, _, stderr in endings for line in stderr.replace("\r", "\n").splitlines()]
    return [code for code, _, _ in endings], [line for line in said if line.startswith("train_dit: error: ")]


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """A run with checkpoints of steps 1 to 4."""
    run = world.root / "four checkpoints"
    assert start(world, run) == ([0, 0], [])
    assert not (run / FILE).exists(), "the folder is free again"
    return run


def test_three_checkpoints_in_a_row_that_cannot_be_written_end_the_run_with_74(world: World, tmp_path: Path) -> None:
    codes, errors = start(world, tmp_path / "run", limit=5000)
    assert codes == [74, 74]
    for error in errors:
        assert (
            "3 checkpoints in a row could not be written, the last because of rank 1: [Errno 27] File too large: "
            in error
        )
        assert str(tmp_path / "run" / "ckpt") in error
    assert [entry["step"] for entry in read_log(tmp_path / "run") if "loss" in entry] in ([1, 2, 3], [1, 2, 3, 4])
    assert not (tmp_path / "run" / FILE).exists()
    assert list((tmp_path / "run" / "ckpt").glob("*step*")) == []


@pytest.mark.long
def test_a_damaged_checkpoint_that_was_asked_for_is_refused_with_78(
    world: World, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / "ckpt" / "step-000003" / "ema-00001.safetensors")
    codes, errors = start(world, run, checkpoint="step-000003")
    assert codes == [78, 78]
    for error in errors:
        assert f"{run}/ckpt/step-000003/ema-00001.safetensors is damaged: SHA-256" in error
    assert len(checkpoints(run / "ckpt")) == 4
    assert not (run / FILE).exists()


@pytest.mark.long
def test_a_good_one_that_was_asked_for_is_gone_on_from(world: World, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / "ckpt" / "step-000004" / "ema-00001.safetensors")
    assert start(world, run, checkpoint="step-000002") == ([0, 0], [])
    assert sorted(path.name for path in (run / "ckpt").glob("set-aside-*")) == [
        "set-aside-0-step-000003", "set-aside-0-step-000004",
    ]  # fmt: skip
    names = ("step", "loss", "gradient_norm", "learning_rate")
    logged = [
        [[entry[name] for name in names] for entry in read_log(each) if "loss" in entry] for each in (run, finished)
    ]
    assert logged[0] == logged[1]


def test_a_folder_that_another_job_works_in_is_refused_with_78(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": "17", "token": "t", "started": 0.0}
    (run / FILE).write_text(json.dumps(holder))
    codes, errors = start(world, run)
    assert codes == [78, 78]
    for error in errors:
        assert f"{run} is in use by process {os.getpid()} on {socket.gethostname()}, job 17; stop that" in error
    assert json.loads((run / FILE).read_text()) == holder
    assert [path.name for path in run.iterdir()] == [FILE]


@pytest.mark.long
def test_a_folder_that_cannot_be_written_is_refused_by_every_rank(world: World) -> None:
    codes, errors = start(world, Path("/proc/run"))
    assert codes == [78, 78]
    for error in errors:
        assert "/proc/run" in error
