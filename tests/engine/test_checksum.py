"""Weights that ranks hold alike are seen to be alike, in every layout, and one bit that is not is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideo_dist.engine import checksum as module
from cogvideo_dist.engine.checksum import checksum, difference
from cogvideo_dist.engine.inputs import DataLimits
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.protocols import Batch, Loss
from tests.engine.test_elastic import Way, losses, player_of
from tests.engine.test_numbers import incidents
from tests.engine.toys import PACKS, Case, Dealt, Noisy, Watched, committed
from tests.ranks import run_ranks


def flip(x: Tensor, bit: int) -> None:
    """One bit of its bytes, in place."""
    raw = x.detach().view(-1).view(torch.uint8)
    raw[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("count", [1, 3, 8, 1000, 1001])
def test_every_bit_counts(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ON_HOST", 16)  # so that there are several parts
    x = torch.randint(0, 255, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = 8 * x.numel() * x.element_size()
    whole, seen = int(checksum(x)), set()
    for bit in range(0, bits, max(1, bits // 200)):
        flip(x, bit)
        seen.add(int(checksum(x)))
        flip(x, bit)
    assert whole not in seen
    assert int(checksum(x)) == whole


def test_it_is_of_the_values_wherever_they_lie() -> None:
    x = torch.randn(3, 7, 5)
    assert int(checksum(x[1:].clone())) == int(checksum(x[1:])), "not where a word of 8 bytes begins"
    assert int(checksum(x.transpose(0, 1))) == int(checksum(x.transpose(0, 1).contiguous()))
    assert int(checksum(x)) != int(checksum(x.flip(0))), "places count"
    assert int(checksum(torch.zeros(9))) != int(checksum(torch.zeros(9).neg())), "-0.0 is another number"
    assert int(checksum(x)) != int(checksum(x.neg())), "signs do not cancel"


def watched(mesh: ParallelMesh, way: Way, names: list[str]) -> list[Any]:
    """Nothing after each of three updates; then, for each of some parameters, what is found when the last rank's is changed."""
    mesh = build_mesh(way.layout, rank=mesh.world.rank)
    player, found = player_of(mesh, way), []
    for step in range(3):
        losses(player, mesh, range(step, step + 1))
        found.append(difference([player], mesh))
    parameters = dict(player.engine.model.named_parameters())
    for name in names:
        held = player.engine.working(parameters[name])
        if mesh.world.rank == mesh.world.size - 1:
            flip(held, 17)
        different = difference([player], mesh)
        found.append(different and [list(different.ranks), different.parameter])
        if mesh.world.rank == mesh.world.size - 1:
            flip(held, 17)
    return found


SPLIT, WHOLE = "blocks.0.qkv.weight", "embed.patch.weight"
QUIET = [Way(Layout(dp=2), stage) for stage in (0, 1, 2, 3)]
QUIET += [Way(Layout(ulysses=2), 2), Way(Layout(tp=2), 2), Way(Layout(tp=2), 3), Way(Layout(dp=2), 1, "bf16")]


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.long) for way in QUIET], ids=lambda way: way.name)
def test_two_ranks_are_alike_until_a_bit_is_not(way: Way) -> None:
    check(way, run_ranks(watched, way.layout.world, way, [SPLIT, WHOLE]))


def test_of_four_ranks_the_pair_is_named(tmp_path: Path) -> None:
    """Replicas have their own partners, tp ranks theirs."""
    way = Way(Layout(dp=2, tp=2), 2)
    check(way, run_ranks(watched, 4, way, [SPLIT, WHOLE]))


def check(way: Way, found: list[list[Any]]) -> None:
    assert all(each == found[0] for each in found), "ranks agree"
    assert found[0][:3] == [None] * 3
    copies = way.stage < 3 and way.layout.dp * way.layout.ulysses > 1
    last = way.layout.world - 1
    partner = last - way.layout.tp if copies else last - 1
    split, whole = found[0][3:]
    assert split == ([[partner, last], SPLIT] if copies else None)
    assert whole == ([[partner, last], WHOLE] if copies or way.layout.tp > 1 else None)


class Flipping(Noisy):
    """After the update of step 4, a bit of one rank's weights is another."""

    def __init__(self, rank: int, victim: int) -> None:
        super().__init__()
        self.flips = rank == victim

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if self.flips and batch.plan.step == 4:
            flip(self.model[2].bias, 3)
            self.flips = False
        return super().loss(model, batch)


def flipped(mesh: ParallelMesh, folder: Path, every: int) -> str:
    case = Case(mesh.world.size, 0, keep=9, training={"checksum_every": every})
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    task = Flipping(mesh.world.rank, 2)
    try:
        Watched(case.settings(folder), task, batches=Dealt(mesh), mesh=mesh, data_limits=limits).run()
    except FloatingPointError as error:
        return str(error)
    return ""


def test_a_run_whose_ranks_have_drifted_ends_and_names_the_rank(tmp_path: Path) -> None:
    assert run_ranks(flipped, 4, tmp_path / "unwatched", 0) == [""] * 4, "nothing else notices"
    messages = run_ranks(flipped, 4, tmp_path / "watched", 3)
    assert len(set(messages)) == 1
    assert messages[0].startswith("step 6: ")
    assert "of rank 2 (" in messages[0]
    assert "alike after step 3" in messages[0]
    (incident,) = incidents(tmp_path / "watched")
    assert (incident["kind"], incident["ranks"], incident["step"]) == ("not alike", [2], 6)
    assert incident["parameter"] in messages[0]
    assert committed(tmp_path / "watched")[-1] == 4
