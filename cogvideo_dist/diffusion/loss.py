"""The training loss of the diffusion model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_errors(prediction: Tensor, target: Tensor, *, lengths: Sequence[int]) -> Tensor:
    """Each clip's sum of |prediction - target|^2, [clips], in float32 (float64 if an operand is).

    ``prediction`` and ``target`` are [n, d], packed clip after clip of ``lengths`` tokens. Weighted by one over the denominator
    of the whole step, the sum over all ranks and micro-steps is the step's loss. On the velocity this plain squared error is
    the x0 error weighted by 1 / (1 - alpha_bar).
    """
    if prediction.shape != target.shape or sum(lengths) != len(prediction):
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and lengths {list(lengths)} do not match; "
            "give [n, d], [n, d] and lengths that add up to n"
        )
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    # Subtract after the cast: in bf16 the difference of two close values keeps no digit.
    squares = (prediction.to(dtype) - target.to(dtype)).square().sum(1)
    return torch.stack([part.sum() for part in squares.split(list(lengths))])
