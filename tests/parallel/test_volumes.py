"""The formulas of a layer's traffic are what the ledger counts of a real block, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cogvideo_dist.models.dit import Block
from cogvideo_dist.models.embed import rope_table
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.volumes import Recompute, layer_bytes, layer_rounding, modulation_bytes
from tests.ranks import run_ranks

CONFIG = replace(tiny("cogvideox-5b"), heads=4, layers=1)
LAYOUTS = (
    Layout(ulysses=2), Layout(ring=2), Layout(tp=2), Layout(ulysses=4), Layout(ring=4), Layout(tp=4),
    Layout(ulysses=2, ring=2), Layout(ulysses=2, tp=2), Layout(ring=2, tp=2), Layout(ulysses=3), Layout(ring=3),
)  # fmt: skip
EVEN = PackLayout((Clip(8, (2, 4, 4)), Clip(8, (1, 4, 4)), Clip(8, (1, 4, 6))))
"""Clips of 40, 24 and 32 tokens, 96 in all: they divide over every layout of 2, 3 and 4 ranks."""
UNEVEN = PackLayout((Clip(7, (2, 3, 5)), Clip(3, (1, 1, 1)), Clip(0, (1, 3, 6))))
RECOMPUTES: tuple[Recompute, ...] = ("none", "feed_forward", "all_but_attention", "full")
Case = tuple[Layout, PackLayout, Recompute, str]


class Scaled(torch.nn.Module):
    """A block under the names that a whole model gives its parameters."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def initial(self, name: str) -> object:
        return lambda shape, generator: torch.randn(list(shape), generator=generator) * 0.1


def sent(mesh: ParallelMesh, cases: list[Case]) -> list[dict[str, int]]:
    return [sent_by_block(mesh.world.rank, case) for case in cases]


def sent_by_block(rank: int, case: Case) -> dict[str, int]:
    """Bytes of one block's forward and backward, by "axis operation"."""
    layout, pack, recompute, dtype_name = case
    dtype = getattr(torch, dtype_name)
    mesh = build_mesh(layout, rank=rank)
    block = Block(CONFIG, recompute, mesh.tp)
    draw_parameters(Scaled(block), 0)
    block.to(dtype)
    seq = SequenceShard(pack, mesh)
    tokens = sum(span.tokens for span in seq.spans)
    x = torch.randn(tokens, CONFIG.hidden, dtype=dtype, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    condition = F.silu(torch.ones(len(pack.clips), CONFIG.time_embed_dim, dtype=dtype)).requires_grad_()
    rope = rope_table(CONFIG, pack.clips, spans=seq.heard, device=x.device, dtype=dtype)
    if recompute == "full":
        y = checkpoint(block, x, condition, rope, seq, use_reentrant=False)
    else:
        y = block(x, condition, rope, seq)
    y.sum().backward()
    return {f"{axis} {operation}": traffic.bytes for (axis, operation), traffic in mesh.ledger.take().items()}


@cache
def means(world: int) -> dict[Case, dict[str, float]]:
    """Of all ranks, for every case of a world: run at once, since a world takes longer to start than a case to run."""
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    cases: list[Case] = [
        (layout, pack, recompute, "float32")
        for layout in layouts
        for pack in (EVEN, UNEVEN)
        for recompute in RECOMPUTES
    ]
    cases += [(layout, EVEN, "none", dtype) for layout in layouts for dtype in ("float64", "bfloat16")]
    ranks = run_ranks(sent, world, cases)
    return {
        case: {key: sum(rank[at][key] for rank in ranks) / world for key in ranks[0][at]}
        for at, case in enumerate(cases)
    }


def expected(case: Case) -> dict[str, float]:
    layout, pack, recompute, dtype = case
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]
    shape = {"hidden": CONFIG.hidden, "heads": CONFIG.heads, "element_size": size}
    volumes = layer_bytes(layout, tokens=pack.tokens, recompute=recompute, **shape)
    if layout.tp > 1:
        volumes["tp", "sum"] = modulation_bytes(layout, clips=len(pack.clips), **shape)
    return {" ".join(key): value for key, value in volumes.items()}


@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_formulas_are_exact_where_tokens_divide(layout: Layout, recompute: Recompute) -> None:
    case = (layout, EVEN, recompute, "float32")
    assert means(layout.world)[case] == pytest.approx(expected(case), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_sums_travel_in_at_least_32_bits(layout: Layout, dtype: str) -> None:
    case: Case = (layout, EVEN, "none", dtype)
    assert means(layout.world)[case] == pytest.approx(expected(case), rel=1e-12)


@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_other_lengths_differ_by_the_stated_rounding_at_most(layout: Layout, recompute: Recompute) -> None:
    case = (layout, UNEVEN, recompute, "float32")
    found, formula = means(layout.world)[case], expected(case)
    rounding = layer_rounding(
        layout, hidden=CONFIG.hidden, heads=CONFIG.heads, element_size=4, recompute=recompute
    )  # fmt: skip
    assert found.keys() == formula.keys()
    for key, value in formula.items():
        axis, operation = key.split()
        assert abs(found[key] - value) <= rounding.get((axis, operation), 0.0) + 1e-9 * value, key


def test_a_single_process_sends_nothing() -> None:
    assert layer_bytes(Layout(dp=8), tokens=100, hidden=64, heads=4, element_size=4) == {}


def test_the_volumes_of_the_released_5b_are_the_published_ones() -> None:
    """X = S h e = 109.2 MB for 17 776 tokens in 16 bits: 8 (N-1)/N^2 X, 8 (N-1)/N X, 10 (N-1)/N X."""
    shape = {"tokens": 17776, "hidden": 3072, "heads": 48, "element_size": 2}
    x = 17776 * 3072 * 2
    ulysses = layer_bytes(Layout(ulysses=8), **shape)["ulysses", "all_to_all"]
    assert ulysses == pytest.approx(8 * 7 / 64 * x + 7 / 64 * 17776 * 48 * 4)
    assert layer_bytes(Layout(ring=4), **shape) == {("ring", "shift"): pytest.approx(8 * 3 / 4 * x)}
    assert sum(layer_bytes(Layout(tp=4), **shape).values()) == pytest.approx(10 * 3 / 4 * x)
