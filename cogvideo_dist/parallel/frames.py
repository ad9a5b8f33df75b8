"""Where the frames left of a causal convolution come from, and whose frames a group norm's statistics cover.

A model over time asks its ``TimeContext`` instead of assuming that the whole clip is in its hands. ``Whole`` and ``Stream``
answer on one process; a split of the clip over ranks answers the same questions with communication.

Legend: B batch, C channels, T frames held here, H and W height and width, G groups.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import Pending, even, everyone, given_back, left_of, shift


class Line:
    """The pieces of a clip that are in hand at the same time, in order, on the ranks of an axis.

    What passes between neighbours is on its way while its sender works on. These are halves of autograd functions: forward
    frames go right, backward their gradients go left.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.shared = axis.size > 1
        self.lends = axis.rank < axis.size - 1

    def lend(self, tail: Tensor, *, first: Tensor) -> Pending:
        """The frames left of this piece: the last ones, ``tail``, of the piece before; ``first`` where there is none."""
        return left_of(first, tail, self.axis)

    def give_back(self, grad: Tensor) -> Pending:
        """The gradient of what this piece lent (zero if it ``lends`` nothing), for that of what it borrowed."""
        return given_back(grad, self.axis)


ALONE = Line(Axis("cp"))


class TimeContext(Protocol):
    """What a model needs to know about the frames it does not hold."""

    @property
    def first(self) -> bool:
        """Whether this piece holds frame 0 of the clip, left of which it lies repeated."""

    @property
    def line(self) -> Line:
        """The pieces beside this one."""

    def recall(self, asker: nn.Module, padded: Tensor, *, width: int) -> Tensor:
        """``padded`` [B, C, width+T, H, W] with the past from an earlier piece on its left, if there is one; differentiable.

        ``asker`` is the module that convolves it or makes it for a convolution; each asks once per piece.
        """

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        """Merge a group norm's local statistics with those of the other pieces of the clip.

        ``mean`` and ``m2`` (the sum of squared deviations from that mean) are [B, G] over ``count`` local elements.
        Returns mean and biased variance, each [B, G]; differentiable.
        """


class Whole:
    """The whole clip is here."""

    first = True
    line = ALONE

    def recall(self, asker: nn.Module, padded: Tensor, *, width: int) -> Tensor:
        return padded

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        return mean, m2 / count


class Stream:
    """The clip comes chunk after chunk, each with the last frames of the one before on its left.

    The caller owns the stream, runs the model once per chunk and calls ``next`` in between. Gradients flow back through the
    remembered frames, but a chunk cannot be computed again later (activation checkpointing), because the memory has moved on.
    Statistics are those of each chunk alone, as in the chunked mode of the released models.
    """

    line = ALONE

    def __init__(self) -> None:
        self.first = True
        self._tails: dict[nn.Module, Tensor] = {}

    def recall(self, asker: nn.Module, padded: Tensor, *, width: int) -> Tensor:
        if not self.first:
            padded[:, :, :width] = self._tails[asker]
        # A copy, because a view would keep the whole activation alive until the next chunk.
        self._tails[asker] = padded[:, :, -width:].clone()
        return padded

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        return mean, m2 / count

    def next(self) -> None:
        """The chunk is done; the following frames continue it."""
        self.first = False


class Shards:
    """The clip's frames are split over the ranks of an axis, in order (``latent_shares``, ``frames_of``).

    The frames on the left are the previous rank's last ones, and their gradient goes back there. Statistics are those of the
    whole clip. Every rank runs the same model on its piece.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.line = Line(axis)
        self.first = axis.rank == 0

    def recall(self, asker: nn.Module, padded: Tensor, *, width: int) -> Tensor:
        return padded

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        """Chan, Golub, LeVeque 1983: counts weigh the means, and their spread joins the squared deviations."""
        counts, means, m2s = everyone(torch.stack([torch.full_like(mean, count), mean, m2]), self.axis).unbind(1)
        total = counts.sum(0)
        merged = (counts * means).sum(0) / total
        return merged, (m2s + counts * (means - merged).square()).sum(0) / total


class Rounds:
    """The clip comes in chunks as in a ``Stream``, with the same result, one chunk on each rank of an axis at a time.

    In every convolution a chunk waits for the last frames of the one before, which its rank has at the same time; the first
    rank's come from the last rank's chunk of the round before. The caller owns it, runs the model once per round on every rank
    (what comes of a chunk behind the clip's last is of no use to anyone) and calls ``next`` in between. Without a gradient.
    """

    line = ALONE

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.first = axis.rank == 0
        self._tails: dict[nn.Module, Tensor] = {}

    def recall(self, asker: nn.Module, padded: Tensor, *, width: int) -> Tensor:
        past = shift(padded[:, :, -width:], self.axis, rows=len(padded)).wait()
        if self.axis.rank == 0:  # of this round's last chunk, which the next round continues
            past, self._tails[asker] = self._tails.get(asker, padded[:, :, :width]), past
        padded[:, :, :width] = past
        return padded

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        return mean, m2 / count

    def next(self) -> None:
        """The round is done; the following chunks continue it."""
        self.first = False


LENT = 2
"""Frames that a causal convolution of three sees left of its own, at every level of the autoencoder."""


def most_ranks(latents: int) -> int:
    """Over which a clip's latent frames split: all but the last must hold what they lend to the next."""
    return (latents - 1) // LENT + 1


def latent_shares(latents: int, ranks: int) -> tuple[int, ...]:
    """Latent frames of every rank: even shares, the first ranks taking the rest.

    Raises ``ValueError`` where a rank would have to lend more frames to the next than it holds.
    """
    if ranks > most_ranks(latents):
        raise ValueError(
            f"{latents} latent frames do not split over {ranks} ranks: all but the last must hold {LENT} to lend them to the "
            f"next; the most ranks that serve are {most_ranks(latents)}"
        )
    return even(latents, ranks)


def frames_of(shares: tuple[int, ...], rank: int, *, compression: int) -> range:
    """The frames of the clip that become a rank's latent frames: the first latent frame is frame 0 alone, and each of the
    others stands for ``compression`` frames."""
    ends = [1 + compression * (latents - 1) for latents in accumulate(shares)]
    return range(ends[rank - 1] if rank else 0, ends[rank])
