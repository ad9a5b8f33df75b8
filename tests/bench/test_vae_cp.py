"""The benchmark of the autoencoder over ranks at toy size: its schemes agree, its bytes are those of the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import vae_cp
from bench.ranks import Timing
from bench.vae_cp import Alone, Released, Work, line_of, model_of
from cogvideo_dist.models.vae_blocks import NormSiLU
from cogvideo_dist.parallel.frames import Shards, Whole
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from tests.ranks import run_ranks

TOY = (1, 17, 16, 16)


def outputs(axis: Axis) -> dict[str, float]:
    """Differences of the reconstruction from one process's on this rank's frames, by scheme."""
    whole, vae = Work.of(TOY, torch.float64), model_of(torch.float64)
    mine, own = whole.piece(axis), slice(0, 9) if axis.rank == 0 else slice(9, None)
    with torch.no_grad():
        expected = vae(whole.video, whole.noise, time=Whole())[0][:, :, own]
        times = {"ours": Shards(axis), "alone": Alone(axis), "released": Released(axis, vae)}
        found = {name: vae(mine.video, mine.noise, time=time)[0] for name, time in times.items()}
    return {name: (x - expected).abs().max().item() for name, x in found.items()}


def toys(mesh: ParallelMesh) -> dict[str, Any]:
    return {
        "outputs": outputs(line_of(mesh)),
        "gradients": vae_cp.bench_gradients(mesh, TOY),
        "bytes": vae_cp.bench_bytes(mesh, TOY),
        "times": vae_cp.bench_times(mesh, TOY, Timing(repeats=1, limit=0.0)),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """On each of two ranks."""
    return run_ranks(toys, 2)


@pytest.mark.long
def test_both_schemes_are_exact_forward_and_a_piece_alone_is_not(found: list[dict[str, Any]]) -> None:
    for rank in found:
        differences = rank["outputs"]
        assert differences["ours"] < 1e-10 and differences["released"] < 1e-10 and differences["alone"] > 1e-3


@pytest.mark.long
def test_ours_has_the_gradient_of_one_process_and_the_released_scheme_has_not(found: list[dict[str, Any]]) -> None:
    errors = found[0]["gradients"]
    assert errors["ours in float64"]["whole"] < 1e-12 and errors["ours"]["whole"] < 1e-4
    assert errors["released"]["whole"] > 0.1


@pytest.mark.long
def test_the_schemes_send_what_the_formulas_say(found: list[dict[str, Any]]) -> None:
    sent = found[0]["bytes"]
    assert sent["released"] == sent["formula"]
    norms = sum(isinstance(module, NormSiLU) for module in model_of(torch.float32).modules())
    assert sent["ours"]["gather"] == norms * 3 * vae_cp.CONFIG.norm_groups * 4


def test_pieces_make_up_the_clip() -> None:
    whole = Work.of(TOY, torch.float32)
    pieces = [whole.piece(Axis("cp", rank, 2, (0, 1))) for rank in range(2)]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in pieces], dim=2)

    assert torch.equal(joined("video"), whole.video) and torch.equal(joined("noise"), whole.noise)
    assert [piece.noise.shape[2] for piece in pieces] == [3, 2]


@pytest.mark.long
def test_every_goal_has_rows_and_a_disturbed_time_meets_none(found: list[dict[str, Any]]) -> None:
    toy = found[0]
    measured = {name: dict.fromkeys(("2", "4"), toy[name]) for name in ("gradients", "bytes")}
    for quiet, goal in ((True, 2.0), (False, None)):
        rows = vae_cp.rows(measured | {"times": toy["times"], "undisturbed": quiet})
        assert [row.id for row in rows] == sorted(row.id for row in rows)
        assert {row.id for row in rows} == {"B5", "B6", "B7"}
        assert [row.at_most for row in rows if row.id == "B7"] == [goal, goal]
