"""Random tensors and weights for tests of models, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module) -> None:
    """Every parameter random, also those that start at zero or one, so that no gradient vanishes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
