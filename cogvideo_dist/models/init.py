"""Initial weights, a pure function of (seed, parameter name), drawn on the full shape on the CPU in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cogvideo_dist.parallel.split import full_shape, own_slice
from cogvideo_dist.rng import fold

Initial = Callable[[Sequence[int], torch.Generator], Tensor]


class Drawable(Protocol):
    """A model that says how each of its parameters starts."""

    def initial(self, name: str) -> Initial: ...


def normal(std: float) -> Initial:
    """Gaussian with standard deviation ``std``."""
    return lambda shape, generator: torch.randn(list(shape), generator=generator) * std


def constant(value: float) -> Initial:
    """Every element ``value``."""
    return lambda shape, generator: torch.full(list(shape), value)


def xavier() -> Initial:
    """Glorot uniform over the matrix [out, everything else] (Glorot and Bengio 2010, eq. 16)."""

    def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
        return (torch.rand(list(shape), generator=generator) * 2 - 1) * bound

    return draw


def fan_in_uniform(fan_in: int) -> Initial:
    """Uniform in +-1/sqrt(fan_in), the usual start of convolutions and their biases."""
    bound = 1 / math.sqrt(fan_in)
    return lambda shape, generator: (torch.rand(list(shape), generator=generator) * 2 - 1) * bound


@torch.no_grad()
def draw_parameters(model: nn.Module, seed: int, *, only: Callable[[str], bool] = lambda name: True) -> None:
    """Set the parameters of ``model`` (a ``Drawable``) whose names pass ``only`` from ``fold(seed, name)``, whatever its
    device, dtype and layout."""
    for name, parameter in model.named_parameters():
        if not only(name):
            continue
        rule = model.initial(name)  # type: ignore[operator]
        whole = rule(full_shape(model, name, parameter.shape), fold(seed, "parameter", name))
        parameter.copy_(own_slice(model, name, whole))
