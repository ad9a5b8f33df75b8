from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig

SHIFTS = [1.0, 3.0]
# sqrt(alpha_bar) of the released training code at these timesteps, to six digits.
RELEASED = {
    1.0: {0: 0.999575, 100: 0.941680, 250: 0.807748, 500: 0.490937, 749: 0.182130, 979: 0.009262, 999: 0.0},
    3.0: {0: 0.998726, 100: 0.853371, 250: 0.623742, 500: 0.308752, 749: 0.104718, 979: 0.005215, 999: 0.0},
}


def make(shift: float) -> tuple[Schedule, Any]:
    config = ScheduleConfig(snr_shift=shift)
    return Schedule(config), CogVideoXDDIMScheduler.from_config(scheduler_config(config, "ddim"))


@pytest.mark.parametrize("shift", SHIFTS)
def test_tables_equal_diffusers(shift: float) -> None:
    ours, theirs = make(shift)
    assert ours.sqrt_alpha_bar.dtype == torch.float64
    torch.testing.assert_close(ours.sqrt_alpha_bar, theirs.alphas_cumprod.sqrt(), rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.sqrt_one_minus_alpha_bar, (1 - theirs.alphas_cumprod).sqrt(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shift", SHIFTS)
def test_tables_equal_the_released_training_code(shift: float) -> None:
    table = Schedule(ScheduleConfig(snr_shift=shift)).sqrt_alpha_bar
    # Half a unit of the sixth digit, and the float32 in which that code rescales.
    for timestep, value in RELEASED[shift].items():
        assert table[timestep].item() == pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize("shift", SHIFTS)
def test_noise_ascends_to_exactly_zero_snr(shift: float) -> None:
    schedule = Schedule(ScheduleConfig(snr_shift=shift))
    assert (schedule.sqrt_alpha_bar.diff() < 0).all()
    assert schedule.sqrt_alpha_bar[-1] == 0
    assert schedule.sqrt_one_minus_alpha_bar[-1] == 1
    assert schedule.sqrt_one_minus_alpha_bar[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", SHIFTS)
def test_noise_and_velocity_equal_diffusers(shift: float, dtype: torch.dtype) -> None:
    ours, theirs = make(shift)
    x0, noise = torch.randn(2, 7, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    timestep = torch.tensor([0, 1, 19, 500, 979, 998, 999])
    # diffusers takes the square roots in the dtype of the samples; at t = 0 that leaves 1 - alpha_bar four digits.
    bound = 1e-12 if dtype == torch.float64 else 4e-5
    for a, b in [
        (ours.add_noise(x0, noise, timestep=timestep), theirs.add_noise(x0, noise, timestep)),
        (ours.velocity(x0, noise, timestep=timestep), theirs.get_velocity(x0, noise, timestep)),
    ]:
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


def test_conversions_invert_each_other_at_every_timestep() -> None:
    schedule = Schedule(ScheduleConfig(snr_shift=3.0))
    x0, noise = torch.randn(2, 1000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.arange(1000)
    x_t = schedule.add_noise(x0, noise, timestep=every)
    velocity = schedule.velocity(x0, noise, timestep=every)
    torch.testing.assert_close(schedule.x0_from_velocity(x_t, velocity, timestep=every), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.noise_from_velocity(x_t, velocity, timestep=every), noise, rtol=0, atol=1e-14)


def test_packed_tokens_equal_clip_after_clip() -> None:
    schedule = Schedule(ScheduleConfig())
    x0, noise = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths, timestep = torch.tensor([2, 3, 4]), torch.tensor([999, 3, 500])
    packed = schedule.add_noise(x0, noise, timestep=timestep.repeat_interleave(lengths))
    clips = zip(x0.split([2, 3, 4]), noise.split([2, 3, 4]), timestep, strict=True)
    alone = [schedule.add_noise(a, b, timestep=t) for a, b, t in clips]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=0)


def test_half_precision_is_mixed_in_float32() -> None:
    schedule = Schedule(ScheduleConfig())
    x0, noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    mixed = schedule.add_noise(x0, noise, timestep=torch.tensor(0))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, schedule.add_noise(x0.float(), noise.float(), timestep=torch.tensor(0)))


def test_trailing_grid_equals_diffusers() -> None:
    ours, theirs = make(1.0)
    assert ours.sampling_timesteps(50) == list(range(999, 0, -20))
    assert ours.sampling_timesteps(1) == [999]
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        found, expected = ours.sampling_timesteps(steps), theirs.timesteps.tolist()
        # Where 1000 / steps is no exact float, theirs accumulates its error: it rounds exact halves either way and for
        # a few step counts appends a point below the grid.
        for index, (a, b) in enumerate(zip(found, expected[:steps], strict=True)):
            assert a == b or (2000 * (steps - index) % (2 * steps) == steps and abs(a - b) == 1), (steps, index)
        assert found == expected or 1000 % steps != 0


@pytest.mark.parametrize(
    "fields",
    [{"timesteps": 1}, {"beta_start": 0.0}, {"beta_start": 0.02}, {"beta_end": 1.0}, {"snr_shift": 0.0}]
    + [{name: float("nan")} for name in ("beta_start", "beta_end", "snr_shift")],
)
def test_impossible_configuration_is_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ScheduleConfig(**fields)


def test_impossible_timesteps_are_rejected() -> None:
    schedule = Schedule(ScheduleConfig())
    for timestep in (torch.tensor([0, -1]), torch.tensor([1000])):
        with pytest.raises(ValueError, match=r"outside 0\.\.999"):
            schedule.coefficients(timestep)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        schedule.coefficients(torch.tensor([0.5]))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="sampling steps"):
            schedule.sampling_timesteps(steps)
