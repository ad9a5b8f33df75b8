"""Samplers as pure steps over a grid of timesteps, and the one loop that runs them.

Legend: a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) at the current point of the grid; a', s' at the next one, which is
(1, 0) after the last step. Every sampler moves to x' = mean(x, x0, previous x0) + noise_scale * noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cogvideo_dist.diffusion.schedule import Schedule
from cogvideo_dist.rng import fold

SamplerName = Literal["ddim", "dpmpp_2m_sde"]

# (index, shape) -> standard normal noise of that shape for that step.
Draw = Callable[[int, torch.Size], Tensor]
# (index, x0): what the sample looks like after that step.
Preview = Callable[[int, Tensor], None]


class Denoise(Protocol):
    """The guided network: velocity [...] of ``x`` [...] at a training timestep; ``index`` counts the sampling steps."""

    def __call__(self, x: Tensor, timestep: int, *, index: int) -> Tensor: ...


class Grid:
    """``steps`` trailing timesteps of a schedule, with a and s as Python floats at each point and at the clean end."""

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self.schedule = schedule
        self.timesteps = schedule.sampling_timesteps(steps)
        a, s = schedule.coefficients(torch.tensor(self.timesteps))
        self.a: list[float] = [*a.tolist(), 1.0]
        self.s: list[float] = [*s.tolist(), 0.0]


class Sampler(Protocol):
    """A rule for one step; holds its grid and no state."""

    @property
    def grid(self) -> Grid: ...

    def mean(self, x: Tensor, x0: Tensor, *, index: int, previous_x0: Tensor | None) -> Tensor:
        """x' before noise; ``previous_x0`` is the prediction of the step before, None at the first step."""
        ...

    def noise_scale(self, index: int) -> float:
        """The standard deviation of the noise that step ``index`` adds; 0 where it draws none."""
        ...


class DDIM:
    """DDIM with eta 0 (arXiv 2010.02502, equation 12): x' = a' x0 + s' noise with the noise that x and x0 imply."""

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self.grid = Grid(schedule, steps)

    def mean(self, x: Tensor, x0: Tensor, *, index: int, previous_x0: Tensor | None) -> Tensor:
        a, s = self.grid.a, self.grid.s
        keep = s[index + 1] / s[index]
        return keep * x + (a[index + 1] - a[index] * keep) * x0

    def noise_scale(self, index: int) -> float:
        return 0.0


class DPMpp2MSDE:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), the second-order multistep solver of the released models.

    With h the growth of log(a / s) over the step and q = e^-h = a s' / (s a'):

        x' = (s' / s) q x + a' (1 - q^2) D + s' sqrt(1 - q^2) noise
        D = x0 + h / (2 h_previous) (x0 - previous x0)

    Written in q, nothing is infinite at zero SNR (q = 0 at the first step) or at the clean end (q = 0 at the last).
    The first and the last step are first order, D = x0; the last returns x0.
    """

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self.grid = Grid(schedule, steps)

    def mean(self, x: Tensor, x0: Tensor, *, index: int, previous_x0: Tensor | None) -> Tensor:
        s, q = self.grid.s, self._shrinkage(index)
        estimate = x0
        if previous_x0 is not None and index < len(self.grid.timesteps) - 1:
            estimate = x0 + self._extrapolation(index) * (x0 - previous_x0)
        return (s[index + 1] / s[index] * q) * x + self.grid.a[index + 1] * (1 - q * q) * estimate

    def noise_scale(self, index: int) -> float:
        return self.grid.s[index + 1] * math.sqrt(1 - self._shrinkage(index) ** 2)

    def _shrinkage(self, index: int) -> float:
        a, s = self.grid.a, self.grid.s
        return a[index] * s[index + 1] / (s[index] * a[index + 1])

    def _extrapolation(self, index: int) -> float:
        """h / (2 h_previous), which is 0 after a step from zero SNR, where h_previous is infinite."""
        previous = self._shrinkage(index - 1)
        return math.log(self._shrinkage(index)) / (2 * math.log(previous)) if previous > 0 else 0.0


SAMPLERS: dict[SamplerName, Callable[[Schedule, int], Sampler]] = {"ddim": DDIM, "dpmpp_2m_sde": DPMpp2MSDE}


@dataclass(frozen=True)
class State:
    """After step ``index``: the sample ``x`` and the clean sample ``x0`` predicted at that step."""

    index: int
    x: Tensor
    x0: Tensor


def folded_noise(seed: int) -> Draw:
    """Float32 CPU noise from (seed, step), whatever the device and whatever was drawn before."""
    return lambda index, shape: torch.randn(shape, generator=fold(seed, "sampler", index))


def first_step(steps: int, *, strength: float) -> int:
    """The index in a grid of ``steps`` at which a given clip is taken up (SDEdit, arXiv 2108.01073): of the grid, its last
    ``steps * strength`` steps, rounded down, are done, as the public pipeline counts them.

    Raises ValueError unless ``strength`` is in (0, 1] and leaves a step to do.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, found {strength:g}")
    done = int(steps * strength)
    if not done:
        raise ValueError(f"strength {strength:g} leaves none of {steps} steps to do; use at least {1 / steps:.3g}")
    return steps - done


@torch.no_grad()
def trajectory(denoise: Denoise, x: Tensor, *, sampler: Sampler, draw: Draw, first: int = 0) -> Iterator[State]:
    """Yields the state after every step, from ``x`` of pure standard normal noise; leave the loop to stop early.

    ``first``: the index of the first step, where ``x`` is a clip with the noise of that point of the grid. Computes in float32,
    or in float64 if ``x`` is. Noise is asked of ``draw`` only at the steps that add some.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    grid, previous_x0 = sampler.grid, None
    for index in range(first, len(grid.timesteps)):
        timestep = grid.timesteps[index]
        velocity = denoise(x, timestep, index=index).to(x.dtype)
        x0 = grid.schedule.x0_from_velocity(x, velocity, timestep=torch.tensor(timestep))
        x = sampler.mean(x, x0, index=index, previous_x0=previous_x0)
        scale = sampler.noise_scale(index)
        if scale > 0:
            x = x + scale * draw(index, x.shape).to(x)
        previous_x0 = x0
        yield State(index, x, x0)


def sample(
    denoise: Denoise, x: Tensor, *, sampler: Sampler, draw: Draw, first: int = 0, preview: Preview | None = None
) -> Tensor:
    """The clean sample at the end of ``trajectory``, of the shape of ``x``; ``preview`` sees every predicted x0."""
    for state in trajectory(denoise, x, sampler=sampler, draw=draw, first=first):
        x = state.x
        if preview is not None:
            preview(state.index, state.x0)
    return x
