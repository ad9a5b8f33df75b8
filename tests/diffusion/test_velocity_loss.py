from __future__ import annotations

import pytest
import torch

from cogvideo_dist.diffusion.loss import velocity_loss
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
    weight = torch.full((1000,), 1 / x0.numel(), dtype=torch.float64)
    on_velocity = velocity_loss(predicted, schedule.velocity(x0, noise, timestep=every), weight=weight)
    torch.testing.assert_close(on_velocity, on_x0, rtol=1e-12, atol=0)


def test_parts_sum_to_the_mean_over_the_whole_step() -> None:
    prediction, target = randn(2, 12, 5)
    prediction.requires_grad_()
    weight = torch.full((12,), 1 / (9 * 5), dtype=torch.float64)
    weight[9:] = 0  # padding
    parts = zip(prediction.split([2, 0, 7, 3]), target.split([2, 0, 7, 3]), weight.split([2, 0, 7, 3]), strict=True)
    total = torch.stack([velocity_loss(p, t, weight=w) for p, t, w in parts]).sum()
    whole = torch.nn.functional.mse_loss(prediction[:9], target[:9])
    torch.testing.assert_close(total, whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(total, prediction), torch.autograd.grad(whole, prediction), rtol=1e-14, atol=0
    )


def test_half_precision_accumulates_in_float32() -> None:
    prediction, target = torch.full((4096, 8), 1.0).bfloat16(), torch.zeros(4096, 8)
    loss = velocity_loss(prediction, target.bfloat16(), weight=torch.full((4096,), 1 / 4096))
    assert loss.dtype == torch.float32
    assert loss.item() == 8


def test_shapes_that_would_broadcast_are_rejected() -> None:
    x = torch.zeros(4, 3)
    for prediction, target, weight in [(x, x[:1], x[:, 0]), (x, x, x[:, :1]), (x, x, x[:1, 0])]:
        with pytest.raises(ValueError, match="do not match"):
            velocity_loss(prediction, target, weight=weight)
