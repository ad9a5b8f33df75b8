"""The benchmarks of parallelism at toy size: their sides agree, and what is sent is what the formulas say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench import parallel, parallel_block, zero
from bench.parallel import Work, ring_bytes, share_bytes, ulysses_bytes
from bench.ranks import Timing
from bench.record import ROOT, Row
from bench.traffic import traffic_of
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import even, reduce_sum, to_heads
from tests.ranks import run_ranks

ONCE = Timing(repeats=1, limit=0.0)
WORK = Work(tokens=32, heads=4, dim=16)
BLOCK = DiTConfig(layers=1, heads=2, head_dim=16, time_embed_dim=8)
TINY = DiTConfig(layers=1, heads=2, head_dim=16, time_embed_dim=8, text_dim=12, text_length=5)


def attention_sides(mesh: ParallelMesh) -> dict[str, Any]:
    """Errors of our ring, the peer's ring and of uneven heads, and what Ulysses x ring sends; on four ranks."""
    scene, sides = parallel.ring_sides(mesh, WORK)
    uneven = parallel.Scene(Work(24, heads=6, dim=16), Layout(ulysses=4), mesh)
    theirs = uneven.theirs()
    return {
        "ring": {name: scene.error(side()) for name, side in sides.items()},
        "uneven": {name: uneven.error(side()) for name, side in (("ours", uneven.ours), ("deepspeed", theirs))},
        "usp": parallel.bench_usp(mesh, WORK),
    }


def test_every_side_computes_attention_and_sends_what_the_formulas_say() -> None:
    found = run_ranks(attention_sides, 4)[0]
    for name, error in (*found["ring"].items(), *found["uneven"].items(), ("usp", found["usp"]["error"])):
        assert error < 1e-6, name
    sent = found["usp"]["bytes"]
    assert sent["ulysses all_to_all"] == ulysses_bytes(WORK, ulysses=2, ranks=4) + share_bytes(WORK, ulysses=2, ranks=4)
    assert sent["ring shift"] == ring_bytes(WORK, ring=2, ulysses=2)


def ulysses(mesh: ParallelMesh) -> dict[str, Any]:
    found = parallel.bench_ulysses(mesh, WORK, ONCE)
    return {"traffic": found["traffic"], "difference": found["difference"], "error": found["error"]}


def test_ulysses_is_deepspeeds_in_fewer_exchanges() -> None:
    found = run_ranks(ulysses, 2)[0]
    assert found["difference"] < 1e-6 and found["error"] < 1e-6
    ours, theirs = found["traffic"]["ours"], found["traffic"]["deepspeed"]
    assert ours["calls"] == {"message": 5} and theirs["calls"] == {"all_to_all": 8}
    assert theirs["bytes"]["all_to_all"] == ulysses_bytes(WORK, ulysses=2, ranks=2)
    assert ours["bytes"]["message"] == theirs["bytes"]["all_to_all"] + share_bytes(WORK, ulysses=2, ranks=2)


def block(mesh: ParallelMesh) -> dict[str, Any]:
    return parallel_block.bench_block(mesh, BLOCK, 16, ONCE)


def test_the_block_is_dtensors_and_sends_what_the_formula_says() -> None:
    found = run_ranks(block, 2)[0]
    for side, (name, error) in found["error"].items():
        assert error < 1e-5, (side, name)
    assert found["bytes"]["gather"] + found["bytes"]["scatter_sum"] == found["formula"]
    assert sum(found["peer_bytes"].values()) == found["formula"] * 8 / 10


def test_zero_steps_are_plain_ones_and_its_bytes_have_a_row() -> None:
    found = {name: run_ranks(zero.bench_variant, 2, TINY, name)[0] for name in zero.VARIANTS}
    for name, variant in found.items():
        assert variant["losses"] == found["plain"]["losses"], name
    parameters = sum(parameter.numel() for parameter in zero.model_of(TINY).parameters())
    rows = zero.rows({"ranks": 2, "parameters": parameters, "variants": found})
    assert len(rows) == 2 * (len(zero.VARIANTS) - 1)
    assert {row.peer for row in rows if row.peer is not None} == {1.0, 1.5}
    sent = {name: sum(v["traffic"]["bytes"].values()) / (4 * parameters) for name, v in found.items()}
    assert sent["plain"] == pytest.approx(1.0)
    assert sent["ZeRO 3, parameters let go after use"] == pytest.approx(zero.formula(3, 2), rel=0.01)


def both_counts(mesh: ParallelMesh) -> dict[str, Any]:
    """The same collectives by torch's count and by the ledger's."""
    mesh = build_mesh(Layout(ulysses=2), rank=mesh.world.rank)
    axis, x = mesh.ulysses, torch.randn(6, 4, 8)

    def run() -> None:
        reduce_sum(x, axis)
        to_heads(x, axis, counts=even(12, 2)).wait()

    mesh.ledger.take()
    counted = traffic_of(run, 2)
    return {"counted": counted["bytes"], "ledger": mesh.ledger.bytes_of("ulysses")}


def test_bytes_counted_from_torch_are_those_of_the_ledger() -> None:
    found = run_ranks(both_counts, 2)[0]
    assert set(found["counted"]) == {"all_reduce", "message"}
    assert sum(found["counted"].values()) == found["ledger"]


def test_a_time_that_others_disturbed_meets_no_goal() -> None:
    found = {"overhead": {"ours": 0.1, "deepspeed": 0.2}, "median_seconds": {"ours": 1.0, "deepspeed": 1.0},
             "traffic": {side: {"calls": {}, "bytes": {"all_to_all": 1}} for side in ("ours", "deepspeed")},
             "difference": 0.0, "error": 0.0}  # fmt: skip
    verdicts: list[Row] = [parallel.ulysses_rows(found | {"undisturbed": quiet})[0] for quiet in (True, False)]
    assert [row.met for row in verdicts] == [True, None]


def test_every_benchmark_of_attention_has_rows() -> None:
    rows = parallel.rows(parallel.bench_parallel(tokens=64, timing=ONCE, run=run_ranks))
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    assert {row.id for row in rows} == {"C1", "C2", "C3", "C5"}
    assert all(row.met for row in rows if row.id in ("C3", "C5") and row.at_most is not None and row.unit == "")


@pytest.mark.long
def test_it_runs_alone_and_prints_nothing_but_json() -> None:
    command = [sys.executable, "-m", "bench.parallel_block", "--tokens", "64", "--repeats", "1", "--limit", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = parallel_block.rows(json.loads(done.stdout))
    assert {row.id for row in rows} == {"C4"}
