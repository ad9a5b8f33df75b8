"""Collectives on values that carry no gradient."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from cogvideo_dist.parallel.mesh import Axis


def reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis, in a new tensor."""
    total = x.clone()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
    return total


def broadcast_object(value: Any, axis: Axis) -> Any:
    """The first rank's plain value (text, numbers, lists), on every rank."""
    if axis.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group)
    return box[0]


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Every rank's plain value, in the order of ranks, on every rank."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    """Wait for every rank of the axis."""
    if axis.size > 1:
        dist.barrier(group=axis.group)
