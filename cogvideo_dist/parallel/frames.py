"""Where the frames left of a causal convolution come from, and whose frames a group norm's statistics cover.

A model over time asks its ``TimeContext`` instead of assuming that the whole clip is in its hands. ``Whole`` and ``Stream``
answer on one process; a split of the clip over ranks answers the same questions with communication.

Legend: B batch, C channels, T frames held here, H and W height and width, G groups.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class TimeContext(Protocol):
    """What a model needs to know about the frames it does not hold."""

    @property
    def first(self) -> bool:
        """Whether this piece holds frame 0 of the clip."""

    def left(self, asker: nn.Module, x: Tensor, *, width: int) -> Tensor:
        """The ``width`` frames [B, C, width, H, W] left of ``x`` [B, C, T, H, W]; differentiable.

        ``asker`` is the module that convolves ``x`` or makes it for a convolution; each asks once per piece.
        """

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        """Merge a group norm's local statistics with those of the other pieces of the clip.

        ``mean`` and ``m2`` (the sum of squared deviations from that mean) are [B, G] over ``count`` local elements.
        Returns mean and biased variance, each [B, G]; differentiable.
        """


class Whole:
    """The whole clip is here: left of frame 0 lies frame 0, repeated."""

    first = True

    def left(self, asker: nn.Module, x: Tensor, *, width: int) -> Tensor:
        return _repeat_first(x, width)

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        return mean, m2 / count


class Stream:
    """The clip comes chunk after chunk, each with the last frames of the one before on its left.

    The caller owns the stream, runs the model once per chunk and calls ``next`` in between. Gradients flow back through the
    remembered frames, but a chunk cannot be computed again later (activation checkpointing), because the memory has moved on.
    Statistics are those of each chunk alone, as in the chunked mode of the released models.
    """

    def __init__(self) -> None:
        self.first = True
        self._tails: dict[nn.Module, Tensor] = {}

    def left(self, asker: nn.Module, x: Tensor, *, width: int) -> Tensor:
        left = _repeat_first(x, width) if self.first else self._tails[asker]
        # A copy, because a view would keep the whole activation alive until the next chunk.
        tail = torch.cat([left, x], dim=2) if x.shape[2] < width else x
        self._tails[asker] = tail[:, :, -width:].clone()
        return left

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        return mean, m2 / count

    def next(self) -> None:
        """The chunk is done; the following frames continue it."""
        self.first = False


def _repeat_first(x: Tensor, width: int) -> Tensor:
    return x[:, :, :1].expand(-1, -1, width, -1, -1)
