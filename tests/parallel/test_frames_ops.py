"""The operations behind a clip that is split in time: values, and the adjoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import everyone, gather_objects, given_back, left_of
from tests.models.drawing import drawn
from tests.ranks import run_ranks


def products(inputs: list[Tensor], out: Tensor, *, seed: int) -> tuple[float, float]:
    """This rank's <A x, y> and <x, A* y>."""
    y = drawn(*out.shape, seed=seed)
    adjoint = torch.autograd.grad(out, inputs, y)
    return (out * y).sum().item(), sum((x * a).sum().item() for x, a in zip(inputs, adjoint))


def checked(mesh: ParallelMesh) -> dict[str, object]:
    axis = mesh.world
    last = axis.rank == axis.size - 1
    first, tail = drawn(2, 3, seed=axis.rank), drawn(1 if last else 2, 3, seed=100 + axis.rank)
    left, y = left_of(first, tail, axis).wait(), drawn(2, 3, seed=300 + axis.rank)
    expected = first if axis.rank == 0 else drawn(2, 3, seed=100 + axis.rank - 1)
    back = given_back(y, axis).wait()
    owed = torch.zeros(2, 3) if last else drawn(2, 3, seed=300 + axis.rank + 1)
    x = drawn(4, seed=200 + axis.rank).requires_grad_()
    stacked = everyone(x, axis)
    whole = torch.stack([drawn(4, seed=200 + rank) for rank in range(axis.size)])
    lent = (first * y).sum().item() * (axis.rank == 0) + (0.0 if last else (tail * back).sum().item())
    return {
        "values": torch.equal(left, expected) and torch.equal(back, owed.to(back)) and torch.equal(stacked, whole),
        "left_of": ((left * y).sum().item(), lent),
        "everyone": products([x], stacked, seed=400 + axis.rank),
        "sent": gather_objects({op: tuple(sent) for (_, op), sent in axis.ledger.take().items()}, axis),
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_frames_and_statistics_come_from_their_ranks_and_gradients_go_back(ranks: int) -> None:
    results = run_ranks(checked, ranks)
    assert all(found["values"] for found in results)
    for name in ("left_of", "everyone"):
        left, right = (sum(found[name][side] for found in results) for side in range(2))
        assert left == pytest.approx(right, rel=1e-13, abs=1e-13), name
    forward = 2 * 3 * 8
    for rank, sent in enumerate(results[0]["sent"]):
        lends, owes = rank < ranks - 1, rank > 0
        assert sent["left_of"] == (lends + owes, (lends + owes) * forward)
        assert sent["gather"] == (1, (ranks - 1) * 4 * 8) and sent["scatter_sum"] == (1, (ranks - 1) * 4 * 8)


def test_alone_there_is_nothing_to_ask_for() -> None:
    axis, x = Axis("cp"), drawn(2, 3, seed=0)
    assert left_of(x, x[:1], axis).wait() is x
    assert torch.equal(given_back(x, axis).wait(), torch.zeros_like(x))
    assert torch.equal(everyone(x, axis), x[None])
