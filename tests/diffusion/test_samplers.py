from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.samplers import SAMPLERS, Draw, SamplerName, folded_noise, sample, trajectory
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig

NAMES: list[SamplerName] = ["ddim", "dpmpp_2m_sde"]
SHAPE = (2, 4, 3, 5, 6)
# Ours and diffusers hold their tables in float64 and multiply tensors in the dtype of x; only the order of operations
# differs, so the bounds are rounding in that dtype: 2e-14 and 3e-7 measured at 1000 steps.
BOUND = {torch.float64: 1e-13, torch.float32: 1e-6}


def start(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def fake_velocity(x: Tensor, timestep: int, *, index: int) -> Tensor:
    """Smooth, nonlinear, mixes positions and depends on the time."""
    t = timestep / 1000
    return torch.tanh(1.3 * x + t) * (0.4 + t) - 0.5 * torch.sin(x.roll(1, -1) - 2 * t)


def diffusers_trajectory(
    name: SamplerName, schedule: Schedule, x: Tensor, *, steps: int
) -> list[tuple[Tensor, Tensor]]:
    """(x, x0) after every step, as the diffusers pipeline runs its scheduler."""
    config, states = scheduler_config(schedule.config, name), []
    if name == "ddim":
        ddim = CogVideoXDDIMScheduler.from_config(config)
        ddim.set_timesteps(steps)
        for t in ddim.timesteps:
            x, x0 = ddim.step(fake_velocity(x, t.item(), index=0), t, x, return_dict=False)
            states.append((x, x0))
        return states
    dpm, x0, generator = CogVideoXDPMScheduler.from_config(config), None, torch.Generator().manual_seed(1)
    dpm.set_timesteps(steps)
    for i, t in enumerate(dpm.timesteps):
        back, velocity = dpm.timesteps[i - 1] if i > 0 else None, fake_velocity(x, t.item(), index=i)
        x, x0 = dpm.step(velocity, x0, t, back, x, generator=generator)
        states.append((x, x0))
    return states


def replay(dtype: torch.dtype) -> Draw:
    """The draws that the diffusers scheduler uses: after the first step it draws twice and drops the first."""
    generator = torch.Generator().manual_seed(1)

    def draw(index: int, shape: torch.Size) -> Tensor:
        if index > 0:
            torch.randn(shape, generator=generator, dtype=dtype)
        return torch.randn(shape, generator=generator, dtype=dtype)

    return draw


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_step_equals_diffusers(dtype: torch.dtype, name: SamplerName, shift: float, steps: int) -> None:
    schedule = Schedule(ScheduleConfig(snr_shift=shift))
    expected = diffusers_trajectory(name, schedule, start(dtype), steps=steps)
    sampler = SAMPLERS[name](schedule, steps)
    found = list(trajectory(fake_velocity, start(dtype), sampler=sampler, draw=replay(dtype)))
    assert len(found) == len(expected) == steps
    for state, (x, x0) in zip(found, expected, strict=True):
        assert state.x.dtype == state.x0.dtype == dtype
        assert torch.isfinite(state.x).all()
        assert (state.x - x).norm() <= BOUND[dtype] * x.norm(), state.index
        assert (state.x0 - x0).norm() <= BOUND[dtype] * x0.norm(), state.index


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_the_last_step_returns_the_predicted_x0(name: SamplerName, steps: int) -> None:
    sampler = SAMPLERS[name](Schedule(ScheduleConfig()), steps)
    last = list(trajectory(fake_velocity, start(), sampler=sampler, draw=folded_noise(0)))[-1]
    assert torch.equal(last.x, last.x0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_exact_velocity_of_a_gaussian_samples_that_gaussian(name: SamplerName, shift: float) -> None:
    mean, std = 0.7, 0.5
    schedule = Schedule(ScheduleConfig(snr_shift=shift))

    def velocity(x: Tensor, timestep: int, *, index: int) -> Tensor:
        a, s = (c.item() for c in schedule.coefficients(torch.tensor(timestep)))
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        return a * (x - a * x0) / s - s * x0

    half = start(shape=(50_000,))
    noise = torch.cat([half, -half])  # Exactly zero mean.

    def std_error(steps: int) -> float:
        result = sample(velocity, noise, sampler=SAMPLERS[name](schedule, steps), draw=folded_noise(3))
        # Both rules keep the mean exactly; the SDE's draws move it with a standard error of 0.0016.
        assert abs(result.mean().item() - mean) < (1e-12 if name == "ddim" else 0.005)
        return abs(result.std().item() - std)

    coarse, middle, fine = std_error(10), std_error(50), std_error(250)
    # First order at least, down to the sampling error of a standard deviation, 0.001.
    assert middle < coarse / 3
    assert fine < middle / 3
    assert fine < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_noise_depends_on_seed_and_step_alone(name: SamplerName) -> None:
    sampler = SAMPLERS[name](Schedule(ScheduleConfig()), 5)
    runs = [sample(fake_velocity, start(), sampler=sampler, draw=folded_noise(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (name == "ddim")


def test_ddim_draws_no_noise_and_the_sde_none_at_the_end() -> None:
    drawn: list[int] = []

    def draw(index: int, shape: torch.Size) -> Tensor:
        drawn.append(index)
        return torch.zeros(shape)

    for name in NAMES:
        sample(fake_velocity, start(), sampler=SAMPLERS[name](Schedule(ScheduleConfig()), 4), draw=draw)
    assert drawn == [0, 1, 2]


def test_previews_see_every_x0_and_leaving_the_loop_stops() -> None:
    sampler = SAMPLERS["dpmpp_2m_sde"](Schedule(ScheduleConfig()), 6)
    seen: list[tuple[int, Tensor]] = []
    result = sample(
        fake_velocity, start(), sampler=sampler, draw=folded_noise(0), preview=lambda i, x0: seen.append((i, x0))
    )
    assert [index for index, _ in seen] == list(range(6))
    assert torch.equal(seen[-1][1], result)
    calls: list[int] = []

    def counted(x: Tensor, timestep: int, *, index: int) -> Tensor:
        calls.append(timestep)
        return fake_velocity(x, timestep, index=index)

    for state in trajectory(counted, start(), sampler=sampler, draw=folded_noise(0)):
        assert torch.is_grad_enabled()
        if state.index == 2:
            assert torch.equal(state.x0, seen[2][1])
            break
    assert calls == sampler.grid.timesteps[:3]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_velocities_are_integrated_in_float32(name: SamplerName) -> None:
    sampler = SAMPLERS[name](Schedule(ScheduleConfig()), 3)
    result = sample(
        lambda x, timestep, index: fake_velocity(x, timestep, index=index).bfloat16(),
        start(torch.bfloat16),
        sampler=sampler,
        draw=folded_noise(0),
    )
    assert result.dtype == torch.float32
