from __future__ import annotations

import pytest
import torch

from cogvideo_dist.diffusion.loss import squared_errors
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_velocity_error_is_the_x0_error_weighted_by_the_inverse_noise_variance(shift: float) -> None:
    schedule = Schedule(ScheduleConfig(snr_shift=shift))
    x0, noise, predicted = randn(3, 1000, 6)
    every = torch.arange(1000)
    x_t = schedule.add_noise(x0, noise, timestep=every)
    x0_error = schedule.x0_from_velocity(x_t, predicted, timestep=every) - x0
    on_x0 = (x0_error.square().sum(1) / (1 - schedule.sqrt_alpha_bar**2)).sum() / x0.numel()
    errors = squared_errors(predicted, schedule.velocity(x0, noise, timestep=every), lengths=[300, 700])
    on_velocity = errors.sum() / x0.numel()
    torch.testing.assert_close(on_velocity, on_x0, rtol=1e-12, atol=0)


def test_parts_sum_to_the_mean_over_the_whole_step() -> None:
    prediction, target = randn(2, 9, 5)
    prediction.requires_grad_()
    parts = zip(prediction.split([2, 0, 7]), target.split([2, 0, 7]), [[1, 1], [], [3, 4]], strict=True)
    total = sum(squared_errors(p, t, lengths=lengths).sum() / (9 * 5) for p, t, lengths in parts if lengths)
    whole = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(total, whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(total, prediction), torch.autograd.grad(whole, prediction), rtol=1e-14, atol=0
    )


def test_half_precision_accumulates_in_float32() -> None:
    prediction, target = torch.full((4096, 8), 1.0).bfloat16(), torch.zeros(4096, 8)
    errors = squared_errors(prediction, target.bfloat16(), lengths=[4096])
    assert errors.dtype == torch.float32
    assert errors.item() == 8 * 4096


def test_shapes_that_would_broadcast_are_rejected() -> None:
    x = torch.zeros(4, 3)
    for prediction, target, lengths in [(x, x[:1], [4]), (x, x, [3]), (x, x, [4, 1])]:
        with pytest.raises(ValueError, match="do not match"):
            squared_errors(prediction, target, lengths=lengths)
