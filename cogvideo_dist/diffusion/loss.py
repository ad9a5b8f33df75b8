"""The training loss of the diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor


def velocity_loss(prediction: Tensor, target: Tensor, *, weight: Tensor) -> Tensor:
    """sum_i weight_i * |prediction_i - target_i|^2 over packed tokens, a scalar in float32 (float64 if an operand is).

    ``prediction`` and ``target`` are [n, d], ``weight`` is [n]. The weights contain one over the denominator of the
    whole step and are zero on padding, so the sum of this loss over all ranks and micro-steps is the step's loss. On
    the velocity this plain squared error is the x0 error weighted by 1 / (1 - alpha_bar).
    """
    if prediction.shape != target.shape or weight.shape != prediction.shape[:1]:
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and weight {tuple(weight.shape)} "
            "do not match; give [n, d], [n, d] and [n]"
        )
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    # Subtract after the cast: in bf16 the difference of two close values keeps no digit.
    error = prediction.to(dtype) - target.to(dtype)
    return (error.square().sum(1) * weight).sum()
