"""Adversarial training of an autoencoder: what critic and decoder lose, as sums, and how much of it the decoder hears.

Losses are sums over what this rank holds; who calls divides them by the step's totals, so that shares of ranks add up.
Whatever holds a clip's frames on several ranks gives the axis they lie on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideo_dist.models.vae_blocks import CausalConv3d
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import reduce_sum

ALONE = Axis("cp")
LIMIT = 1e4


def critic_hinge(real: Tensor, made: Tensor) -> Tensor:
    """sum max(0, 1 - real) + sum max(0, 1 + made) over logits of any shape (Lim and Ye 2017, arXiv 1705.02894)."""
    return _sum(F.relu(1 - real)) + _sum(F.relu(1 + made))


def decoder_hinge(made: Tensor) -> Tensor:
    """-sum made: what the decoder loses to the critic's logits of any shape (Lim and Ye 2017, arXiv 1705.02894)."""
    return -_sum(made)


def gradient_penalty(logits: Tensor, video: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, arXiv 1801.04406, eq. 9, without its gamma/2): the squared norm of d sum(logits) / d video.

    ``logits`` are the critic's of ``video`` [B, 3, T, H, W], real clips that require a gradient. Divided by the number of
    pixels it does not depend on a clip's size.
    """
    # Nodes of a graph run in the order of numbers that each thread counts for itself. Those made here join the critic's and
    # communicate too, so they must be counted with them: only then is the order alike on all ranks.
    with torch.autograd.set_multithreading_enabled(False):
        (slope,) = torch.autograd.grad(_sum(logits), video, create_graph=True)
    return _sum(slope.square())


class LastConvolution:
    """What a decoder's last convolution is given while this context lasts, forward by forward: enough to have its weight's
    gradient without entering the decoder's graph, whose outputs an engine may have tied to its own backward."""

    def __init__(self, conv: CausalConv3d) -> None:
        self.conv = conv
        self.inputs: list[Tensor] = []

    def __enter__(self) -> LastConvolution:
        self._handle = self.conv.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0].detach()))
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def norms(self, slopes: Sequence[Sequence[Tensor]], axis: Axis) -> list[Tensor]:
        """Of the weight's gradients, summed over ``axis``, for each of several lists of gradients at what it made."""
        made = [self.conv(x) for x in self.inputs]
        found = []
        for each in slopes:
            (grad,) = torch.autograd.grad(made, self.conv.weight, each, retain_graph=True)
            found.append(reduce_sum(grad.to(torch.promote_types(grad.dtype, torch.float32)), axis).norm())
        return found


def balanced(
    outputs: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    reconstruction: Tensor,
    adversarial: Tensor,
    last: LastConvolution,
    strength: float = 1.0,
    axis: Axis = ALONE,
) -> tuple[Tensor, Tensor]:
    """``reconstruction`` + ``strength`` lambda ``adversarial`` (Esser et al. 2021, arXiv 2012.09841, eq. 6 and 7), and lambda.

    lambda = |d reconstruction / d weight| / |d adversarial / d weight|, at most ``LIMIT``, is a constant to the gradient.
    The weight is that of ``last``. ``outputs`` are what the decoder made of one pack, a tensor for each size of clip; both
    losses are this rank's shares, computed from ``copies`` of them that require a gradient of their own. The gradients of
    the weight are summed over ``axis``, so lambda belongs to the whole pack however it is split, and it does not depend on
    other packs. Both losses' graphs are spent here: a critic gets no gradient, and nothing of it is held while the decoder
    goes backward.
    """
    slopes = [torch.autograd.grad(loss, copies) for loss in (reconstruction, adversarial)]
    norms = last.norms(slopes, axis)
    factor = adaptive_weight(norms[0], norms[1], limit=LIMIT)
    total = reconstruction.detach() + strength * factor * adversarial.detach()
    joint = [a + strength * factor.to(b.dtype) * b for a, b in zip(*slopes)]
    return _Known.apply(total, len(joint), *outputs, *joint), factor


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, *, limit: float) -> Tensor:
    """The quotient of two gradients' norms, at most ``limit``.

    The paper adds a small number to the denominator. Here ``limit`` alone keeps it from zero: gradients of shares are as
    small as a step is large, and a number added to them would make lambda depend on it.
    """
    least = torch.finfo(adversarial.dtype).tiny
    return reconstruction / torch.maximum(adversarial, reconstruction / limit).clamp_min(least)


class _Known(torch.autograd.Function):
    """A value whose gradients at ``outputs`` are known: tensors are the outputs, then the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        return None, None, *(grad.to(slope.dtype) * slope for slope in known), *(None for _ in known)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
