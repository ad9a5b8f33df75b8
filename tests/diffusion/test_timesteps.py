from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from math import floor

import pytest

from cogvideo_dist.diffusion.timesteps import (
    TIMESTEP_SAMPLING,
    TimestepSampling,
    stratified_timesteps,
    uniform_timesteps,
)


@pytest.mark.parametrize("clips", [1, 3, 7, 40, 96])
def test_exactly_one_clip_per_stratum(clips: int) -> None:
    for step in range(20):
        drawn = sorted(stratified_timesteps(0, step, clips=clips))
        for j, timestep in enumerate(drawn):
            # A timestep t covers [t, t + 1) / 1000 and belongs to every stratum it overlaps.
            assert floor(Fraction(1000 * j, clips)) <= timestep < Fraction(1000 * (j + 1), clips)


@pytest.mark.parametrize("mode", ["stratified", "uniform"])
@pytest.mark.parametrize("clips", [7, 64])
def test_every_timestep_is_equally_likely(mode: TimestepSampling, clips: int) -> None:
    draws = 70_000
    steps = draws // clips
    counts = Counter(t for step in range(steps) for t in TIMESTEP_SAMPLING[mode](1, step, clips=clips))
    assert set(counts) == set(range(1000))
    expected = steps * clips / 1000
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    # 999 degrees of freedom: mean 999, standard deviation 45; stratification can only lower the variance of a count.
    assert chi_square < 999 + 4 * 45


def test_a_clip_is_not_tied_to_a_stratum() -> None:
    first = [stratified_timesteps(2, step, clips=8)[0] for step in range(400)]
    counts = Counter(t // 125 for t in first)
    assert sum((counts[j] - 50) ** 2 / 50 for j in range(8)) < 7 + 4 * 14**0.5


def test_stratified_steps_have_less_spread_than_uniform_steps() -> None:
    def variance(mode: TimestepSampling) -> float:
        means = [sum(TIMESTEP_SAMPLING[mode](3, step, clips=16)) / 16 for step in range(300)]
        centre = sum(means) / len(means)
        return sum((m - centre) ** 2 for m in means) / len(means)

    # In theory by clips^2 = 256.
    assert variance("stratified") < variance("uniform") / 150


@pytest.mark.parametrize("timesteps", [stratified_timesteps, uniform_timesteps])
def test_timesteps_depend_on_seed_and_step_alone(timesteps: Callable[..., list[int]]) -> None:
    assert timesteps(0, 5, clips=10) == timesteps(0, 5, clips=10)
    assert timesteps(0, 5, clips=10) != timesteps(0, 6, clips=10)
    assert timesteps(0, 5, clips=10) != timesteps(1, 5, clips=10)


def test_fewer_timesteps_than_clips_are_shared_evenly() -> None:
    assert Counter(stratified_timesteps(0, 0, clips=30, timesteps=10)) == dict.fromkeys(range(10), 3)


def test_no_clips_is_rejected() -> None:
    for draw in TIMESTEP_SAMPLING.values():
        with pytest.raises(ValueError, match="0 clips"):
            draw(0, 0, clips=0)
