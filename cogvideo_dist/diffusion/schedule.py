"""The noise schedule of CogVideoX: scaled-linear betas, SNR shift, zero terminal SNR, velocity prediction.

A timestep ascends with the noise: 0 is nearly clean, the last one is pure noise. With a = sqrt(alpha_bar) and
s = sqrt(1 - alpha_bar):

    x_t = a x0 + s noise        v = a noise - s x0        x0 = a x_t - s v        noise = s x_t + a v
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScheduleConfig:
    """``snr_shift`` divides the signal-to-noise ratio at every timestep: 3.0 in CogVideoX-2B, 1.0 in all the others.

    ``beta_start`` and ``beta_end`` are the first and last beta; their square roots are spaced evenly in between.
    """

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ValueError(
                f"timesteps is {self.timesteps}; a schedule needs at least 2, the released models use 1000"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end is {self.beta_end}; "
                "choose 0 < beta_start <= beta_end < 1, the released models use 0.00085 and 0.012"
            )
        if not 0 < self.snr_shift < math.inf:
            raise ValueError(
                f"snr_shift is {self.snr_shift}; choose a positive number, 1.0 leaves the schedule as it is"
            )


class Schedule:
    """Float64 CPU tables of a ``ScheduleConfig`` and the four conversions between x0, noise, x_t and velocity.

    ``sqrt_alpha_bar`` and ``sqrt_one_minus_alpha_bar`` are [timesteps]; the last entries are exactly 0 and 1.

    A ``timestep`` is an int64 CPU tensor (timesteps are planned on the host) and belongs to the leading dims of the
    tensors it is used with: [] for all of x, [batch] for [batch, ...], [n] for packed tokens [n, d] (each clip's
    timestep repeated over its tokens). Results are float32, or float64 if an operand is: mixing signal and noise in
    half precision would lose the clean end of the schedule, where s is 0.03.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
        alpha_bar = (1 - roots**2).cumprod(0)
        # SNR / snr_shift (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2). Before the rescale: the released order.
        alpha_bar = alpha_bar / (config.snr_shift + (1 - config.snr_shift) * alpha_bar)
        # Zero terminal SNR (arXiv 2305.08891, algorithm 1): linear in sqrt(alpha_bar), first entry kept, last to 0.
        first, last = alpha_bar[0].sqrt(), alpha_bar[-1].sqrt()
        self.sqrt_alpha_bar = (alpha_bar.sqrt() - last) * (first / (first - last))
        self.sqrt_one_minus_alpha_bar = (1 - self.sqrt_alpha_bar**2).sqrt()

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) in float64 on the CPU, each of the shape of ``timestep``."""
        if timestep.dtype != torch.int64:
            raise ValueError(f"timestep is {timestep.dtype}; give integer timesteps as torch.int64")
        outside = (timestep < 0) | (timestep >= self.config.timesteps)
        if outside.any():
            raise ValueError(f"timestep {timestep[outside][0].item()} is outside 0..{self.config.timesteps - 1}")
        return self.sqrt_alpha_bar[timestep], self.sqrt_one_minus_alpha_bar[timestep]

    def add_noise(self, x0: Tensor, noise: Tensor, *, timestep: Tensor) -> Tensor:
        """x_t, the input of the network."""
        a, s = self._spread(timestep, x0, other=noise)
        return a * x0 + s * noise

    def velocity(self, x0: Tensor, noise: Tensor, *, timestep: Tensor) -> Tensor:
        """v, the target of the network (arXiv 2202.00512, appendix D)."""
        a, s = self._spread(timestep, x0, other=noise)
        return a * noise - s * x0

    def x0_from_velocity(self, x_t: Tensor, velocity: Tensor, *, timestep: Tensor) -> Tensor:
        """The clean sample that a predicted velocity stands for."""
        a, s = self._spread(timestep, x_t, other=velocity)
        return a * x_t - s * velocity

    def noise_from_velocity(self, x_t: Tensor, velocity: Tensor, *, timestep: Tensor) -> Tensor:
        """The noise that a predicted velocity stands for; finite at zero SNR, where it is x_t itself."""
        a, s = self._spread(timestep, x_t, other=velocity)
        return s * x_t + a * velocity

    def sampling_timesteps(self, steps: int) -> list[int]:
        """The trailing grid of arXiv 2305.08891, table 2, from pure noise down: 999, 979, ..., 19 for 50 of 1000."""
        total = self.config.timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"{steps} sampling steps; choose 1 to {total}, the number of training timesteps")
        return [round(total * (steps - index) / steps) - 1 for index in range(steps)]

    def _spread(self, timestep: Tensor, x: Tensor, *, other: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients on the device of ``x``, in at least float32, shaped to broadcast over its trailing dims."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, other.dtype), torch.float32)
        shape = (*timestep.shape, *(1,) * (x.dim() - timestep.dim()))
        a, s = self.coefficients(timestep)
        return a.to(x.device, dtype).view(shape), s.to(x.device, dtype).view(shape)
