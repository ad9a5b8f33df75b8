"""How a tensor is divided over the ranks of an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import gather


@dataclass(frozen=True)
class Split:
    """Equal slices along ``dim``, of each of ``stacked`` parts that lie behind one another (queries, keys, values)."""

    dim: int
    stacked: int = 1

    def slice(self, whole: Tensor, axis: Axis) -> Tensor:
        """This rank's slice."""
        parts = whole.unflatten(self.dim, (self.stacked, axis.size, -1))
        return parts.select(self.dim + 1, axis.rank).flatten(self.dim, self.dim + 1)

    def shape(self, own: Sequence[int], axis: Axis) -> tuple[int, ...]:
        """Of the whole, given that of a slice."""
        return tuple(size * axis.size if dim == self.dim else size for dim, size in enumerate(own))

    def join(self, own: Tensor, axis: Axis) -> Tensor:
        """The whole, from every rank's slice, on every rank. Collective; no gradient."""
        if axis.size == 1:
            return own
        slices = gather(own[None], axis, counts=(1,) * axis.size).wait().unbind(0)
        parts = [each.unflatten(self.dim, (self.stacked, -1)) for each in slices]
        return torch.cat(parts, dim=self.dim + 1).flatten(self.dim, self.dim + 1)


def split_of(model: nn.Module, name: str) -> tuple[Split, Axis] | None:
    """How ``model`` holds a parameter: None where it is whole, else its division and the axis. A model that slices parameters
    has a method ``split(name)`` and an attribute ``tp``."""
    split = model.split(name) if hasattr(model, "split") else None  # type: ignore[operator]
    return (split, model.tp) if split else None  # type: ignore[return-value]


def full_shape(model: nn.Module, name: str, own: Sequence[int]) -> tuple[int, ...]:
    """Of a whole parameter, given that of what this rank holds."""
    found = split_of(model, name)
    return found[0].shape(own, found[1]) if found else tuple(own)


def own_slice(model: nn.Module, name: str, whole: Tensor) -> Tensor:
    """What this rank holds of a whole parameter (or of its gradient, its moments)."""
    found = split_of(model, name)
    return found[0].slice(whole, found[1]) if found else whole


def joined_whole(model: nn.Module, name: str, own: Tensor) -> Tensor:
    """The whole parameter from what every rank holds. Collective over tp."""
    found = split_of(model, name)
    return found[0].join(own, found[1]) if found else own
