"""Every layout of ranks computes what one process computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cogvideo_dist.models.presets import tiny
from cogvideo_dist.parallel.mesh import Layout
from tests.parallel.layouts import errors
from tests.ranks import run_ranks

BOUND = 1e-12
LAYOUTS = (
    Layout(dp=2), Layout(tp=2), Layout(tp=4), Layout(ulysses=2), Layout(ulysses=4), Layout(ring=2), Layout(ring=3),
    Layout(ring=4), Layout(ulysses=2, ring=2), Layout(ulysses=2, ring=4), Layout(dp=2, ulysses=2, tp=2),
    Layout(dp=2, ring=2, tp=2),
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_outputs_and_every_gradient_equal_one_process(layout: Layout) -> None:
    config = replace(tiny("cogvideox-5b"), heads=4)
    for found in run_ranks(errors, layout.world, layout, config, "none"):
        assert max(found.values()) <= BOUND, max(found, key=lambda name: found[name])
