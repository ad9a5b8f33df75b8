"""Every layout of ranks computes what one process computes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from cogvideo_dist.config.adaptation import LINEARS, LoRA, Target
from cogvideo_dist.models.dit import Recompute
from cogvideo_dist.models.presets import RELEASED, DiTConfig, tiny
from cogvideo_dist.parallel.mesh import Layout
from tests.parallel.layouts import Case, denoised, errors
from tests.ranks import run_ranks

BOUND = 1e-12
LAYOUTS = (
    Layout(dp=2), Layout(tp=2), Layout(tp=4), Layout(ulysses=2), Layout(ulysses=4), Layout(ring=2), Layout(ring=3),
    Layout(ring=4), Layout(ulysses=2, ring=2), Layout(ulysses=2, ring=4), Layout(dp=2, ulysses=2, tp=2),
    Layout(dp=2, ring=2, tp=2), Layout(ulysses=3), Layout(ulysses=2, ring=2, tp=2),
)  # fmt: skip


def small(name: str) -> DiTConfig:
    return replace(tiny(name), heads=4, layers=2)


def assert_equal(layout: Layout, cases: dict[str, Case]) -> None:
    for found in run_ranks(errors, layout.world, layout, cases):
        assert max(found.values()) <= BOUND, max(found, key=lambda name: found[name])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_outputs_and_every_gradient_equal_one_process(layout: Layout) -> None:
    """Whatever the backward makes again. Four heads over three ranks are an uneven share."""
    assert_equal(layout, {level: (small("cogvideox-5b"), level) for level in get_args(Recompute)})


@pytest.mark.parametrize("layout", [Layout(ulysses=2, tp=2), Layout(ring=2, tp=2)], ids=lambda layout: layout.name)
def test_every_variant_of_the_model_is_the_same_under_a_layout(layout: Layout) -> None:
    """Sines, rotations, learned positions, image conditions, temporal patches."""
    assert_equal(layout, {name: (small(name), "none") for name in RELEASED})


@pytest.mark.parametrize(
    "layout", [Layout(ulysses=2, ring=4), Layout(ulysses=4), Layout(ulysses=8)], ids=lambda layout: layout.name
)
def test_thirty_heads_run_on_four_and_eight_ranks(layout: Layout) -> None:
    """8, 8, 7 and 7 heads, or 15 each and a ring."""
    assert_equal(layout, {"2b": (replace(tiny("cogvideox-2b"), heads=30, layers=1), "none")})


ADAPTERS = LoRA(
    rank=3,
    alpha=2.0,
    targets=(*LINEARS, "modulation", "patch", "text", "time1", "time2", "head_modulation", "proj"),
    special=(
        Target("k", rank=2, dropout=0.4),
        Target("out", dropout=0.3),
        Target("ff1", dropout=0.2),
        Target("ff2", dropout=0.5),
    ),
)


@pytest.mark.parametrize(
    "layout",
    [Layout(ring=2, tp=2), Layout(dp=2, ring=2)]
    + [
        pytest.param(layout, marks=pytest.mark.long)
        for layout in (Layout(ulysses=2, tp=2), Layout(tp=2), Layout(ulysses=4))
    ],
    ids=lambda layout: layout.name,
)
def test_adapters_of_every_linear_equal_one_process(layout: Layout) -> None:
    """With inputs dropped, whatever the backward makes again."""
    assert_equal(layout, {level: (small("cogvideox-5b"), level, ADAPTERS) for level in get_args(Recompute)})


def test_every_tensor_parallel_rank_gets_the_whole_velocity() -> None:
    config = small("cogvideox-5b")
    expected = run_ranks(denoised, 1, config)[0]
    for found in run_ranks(denoised, 4, config):
        assert (found - expected).abs().max() <= BOUND * expected.abs().max()
