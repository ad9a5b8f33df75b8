from __future__ import annotations

import math

import pytest
import torch

from cogvideo_dist.diffusion.guidance import GuidanceKind, guidance_scale, guide

GRID = range(999, 0, -20)


def scales(kind: GuidanceKind) -> list[float]:
    return [guidance_scale(kind, 6.0, step_index=i, timestep=t, steps=50) for i, t in enumerate(GRID)]


def test_dynamic_scale_equals_the_released_samplers() -> None:
    found = scales("dynamic")
    assert [round(value, 2) for value in found[:7]] == [2.29, 2.54, 6.97, 6.42, 2.79, 4.27, 1.04]
    assert sum(found) / 50 == pytest.approx(3.82, abs=0.005)
    # The expression of the diffusers pipeline.
    assert found == [1 + 6.0 * ((1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2) for t in GRID]


def test_ramp_rises_from_one_late() -> None:
    found = scales("ramp")
    assert found[0] == 1
    assert found == sorted(found)
    assert found[25] < 1.02
    assert 6.8 < found[-1] < 7


def test_constant_scale_is_constant() -> None:
    assert scales("constant") == [6.0] * 50


def test_guide_moves_from_unconditional_through_conditional() -> None:
    uncond, cond = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    assert torch.equal(guide(uncond, cond, scale=0), uncond)
    assert torch.equal(guide(uncond, cond, scale=1), cond)
    assert torch.equal(guide(uncond, cond, scale=6), torch.tensor([13.0, -4.0]))
