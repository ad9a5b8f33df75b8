"""Restarts of one job that get nowhere are told from those that do, and from starts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogvideo_dist.engine.ending import NoProgress
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from launch.attempts import FILE, STATUS, note_attempt
from launch.environment import NO_PROGRESS, NON_FINITE, code_of, ending_of
from launch.exhausted import explained
from tests.launch.world import World


def ended(folder: Path, code: int, reason: str) -> None:
    (folder / STATUS).write_text(json.dumps({"code": code, "reason": reason}))


def committed(folder: Path, step: int) -> None:
    (folder / "ckpt" / f"step-{step:06d}").mkdir(parents=True)


def test_three_restarts_without_a_new_checkpoint_end_the_job(tmp_path: Path) -> None:
    committed(tmp_path, 40)
    for restart in range(3):
        note_attempt(tmp_path, job="7", restart=restart)
        ended(tmp_path, 76, f"rank {restart} died")
    with pytest.raises(NoProgress) as raised:
        note_attempt(tmp_path, job="7", restart=3)
    text = str(raised.value)
    assert "3 starts of job 7" in text and "step 40" in text
    assert all(f"rank {restart} died" in text for restart in range(3))
    assert code_of(raised.value) == NO_PROGRESS == 93
    note_attempt(tmp_path, job="8", restart=0)  # submitted anew
    assert len((tmp_path / FILE).read_text().splitlines()) == 5


def test_restarts_that_get_on_are_as_many_as_they_are(tmp_path: Path) -> None:
    for restart in range(9):
        if restart % 2:
            committed(tmp_path, restart)
        note_attempt(tmp_path, job="7", restart=restart)
        ended(tmp_path, 76, "a rank died")


def test_starts_by_hand_and_of_other_jobs_do_not_count(tmp_path: Path) -> None:
    for _ in range(5):
        note_attempt(tmp_path, job="", restart=0)
    for restart, job in enumerate(("1", "2", "3", "4", "5")):
        note_attempt(tmp_path, job=job, restart=restart)


def test_a_full_device_is_told_with_what_would_fit(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path, "train.precision=bf16")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    mesh = ParallelMesh(world=Axis("world", rank=1, size=2, ranks=(0, 1)))
    told = explained(error, config, mesh=mesh, total=80 * 10**9)
    text = ending_of(told)
    assert "rank 1 is out of device memory (80 GB): CUDA out of memory. Tried to allocate 2.00 GiB." in text
    assert "by the cost model it peaks at" in text and "ZeRO" in text
    assert code_of(told) == NON_FINITE
    assert "Tried to allocate" in (tmp_path / "logs" / "rank-1.memory.txt").read_text()
    assert "nothing fits" in ending_of(explained(error, config, mesh=mesh, total=1000))
    assert len(text) < 500, text
