"""A rank that the others wait for is named, with its phase, whatever the ZeRO stage."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, mode
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvideo_dist.engine.inputs import DataLimits
from cogvideo_dist.engine.numbers import INCIDENTS
from cogvideo_dist.engine.stragglers import PHASES, Laps, slow_ranks
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.waiting import Waits, counting
from cogvideo_dist.protocols import Batch, Loss
from tests.engine.toys import PACKS, Case, Dealt, Noisy, Watched
from tests.ranks import run_ranks

NAP_S, STEPS = 0.3, 6


class Slow(Noisy):
    """Sleeps before its forward or in its backward, in every micro-step of one rank."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        if phase == "backward":
            self.model[2].weight.register_hook(self._nap)
        self.phase = phase

    def _nap(self, gradient: Tensor) -> Tensor:
        time.sleep(NAP_S)
        return gradient

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if self.phase == "forward":
            time.sleep(NAP_S)
        return super().loss(model, batch)


class LateData(Dealt):
    """Waits for every batch."""

    def iterate(self, first_step: int) -> Iterator[Batch]:
        for batch in super().iterate(first_step):
            time.sleep(NAP_S)
            yield batch


def timed(mesh: ParallelMesh, folder: Path, stage: int, phase: str, every: int) -> None:
    case = Case(mesh.world.size, stage, steps=STEPS * every, keep=2, log_every=every)
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    slow = mesh.world.rank == 1
    task = Slow(phase) if slow else Noisy()
    batches = LateData(mesh) if slow and phase == "data" else Dealt(mesh)
    wait = dist.Work.wait
    Watched(case.settings(folder), task, batches=batches, mesh=mesh, data_limits=limits).run()
    assert dist.Work.wait is wait, "as it was"


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


CASES = [
    (2, 3, "backward"), (4, 0, "data"),
    *(
        pytest.param(ranks, stage, phase, marks=pytest.mark.long)
        for ranks in (2, 4) for stage in (0, 1, 2, 3) for phase in ("data", "forward", "backward")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "stage", "phase"), CASES)
def test_the_rank_and_the_phase_are_named_once_it_lasts(tmp_path: Path, ranks: int, stage: int, phase: str) -> None:
    run_ranks(timed, ranks, tmp_path, stage, phase, 1)
    told = [json.loads(line) for line in (tmp_path / INCIDENTS).read_text().splitlines()]
    (entry,) = [entry for entry in told if (entry["kind"], entry["rank"], entry["phase"]) == ("straggler", 1, phase)]
    assert entry["step"] < STEPS, "once, although it goes on"
    assert entry["host"]
    assert entry["score"] < 0.7
    assert entry["own_s"] >= NAP_S * PACKS // ranks
    lines = log(tmp_path)
    assert mode(line["time/slowest_rank"] for line in lines) == 1
    assert median(line["time/skew"] for line in lines) > 0.5


def test_a_single_rank_waits_for_nobody(tmp_path: Path) -> None:
    run_ranks(timed, 1, tmp_path, 2, "", 3)
    assert len(log(tmp_path)) >= STEPS
    assert not any("time/skew" in line for line in log(tmp_path))


def laps(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | seconds


def test_slowness_is_judged_by_phase() -> None:
    """Where collectives make all ranks take the same time in all, the phase without them shows the slow one."""
    usual, slow = laps(forward=1.0, backward=3.0), laps(forward=2.0, backward=2.0)
    (found,) = slow_ranks([usual, usual, slow, usual], list("abcd"))
    assert (found.rank, found.host, found.phase, found.score) == (2, "c", "forward", 0.5)
    assert slow_ranks([laps(forward=1.0), laps(forward=1.4)], ["a", "b"]) == [], "not by much"
    assert slow_ranks([laps(forward=9.0), laps(forward=9.0, data=0.2)], ["a", "b"]) == [], "hardly of any weight"
    assert slow_ranks([laps(data=0.001), laps(data=0.02)], ["a", "b"]) == [], "hardly any time"


def test_time_in_collectives_is_not_own_time() -> None:
    found, begun = Laps(torch.device("cpu")), time.monotonic()
    found.mark("forward")
    time.sleep(0.05)
    found.waits.seconds += 0.04
    found.mark("rest")
    elapsed = time.monotonic() - begun
    time.sleep(0.05)
    found.mark("data")
    taken = found.take()
    assert 0 < taken["forward"] <= elapsed - 0.04
    assert taken["backward"] == taken["data"] == 0.0
    assert found.take() == laps()


def waited(mesh: ParallelMesh) -> list[float]:
    """Seconds that are counted in a collective that the last rank comes late to, one after the other, of several kinds."""
    x, found = torch.ones(mesh.world.size), []
    for collective in (
        lambda: dist.all_reduce(x),
        lambda: dist.all_reduce(x, async_op=True).wait(),
        lambda: dist.all_gather_into_tensor(x.new_empty(len(x) ** 2), x),
        lambda: dist.reduce_scatter_tensor(x.new_empty(1), x),
        lambda: dist.reduce(x, 0),
        lambda: dist.broadcast(x, mesh.world.size - 1),
        lambda: dist.barrier(),
        lambda: dist.all_gather_object([None] * mesh.world.size, 1),
    ):
        dist.barrier()
        waits = Waits()
        with counting(waits):
            if mesh.world.rank == mesh.world.size - 1:
                time.sleep(NAP_S)
            collective()
        found.append(waits.seconds)
    return found


def test_every_collective_counts() -> None:
    early, late = run_ranks(waited, 2)
    assert all(each > 0.1 * NAP_S for each in early), early
    assert sum(late) < sum(early)
