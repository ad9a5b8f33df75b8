"""Collectives, each with its mathematics; all of them do nothing on an axis of size 1.

Legend: x_r is what rank r of an axis of N ranks holds. Tensors are split along their first dimension into rows; ranks may
hold different numbers of rows, ``counts``, which every rank knows. ``enter`` and ``everyone`` are differentiable; the others
are called by operations with a backward of their own, and each names the collective that is its adjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideo_dist.parallel.mesh import Axis


class Pending:
    """A tensor on its way. ``kept`` is what is sent, which must live until it has arrived."""

    def __init__(
        self, works: Sequence[dist.Work | None], finish: Callable[[], Tensor], *, kept: Sequence[Tensor] = ()
    ) -> None:
        self._works, self._finish, self._kept = works, finish, kept

    def wait(self) -> Tensor:
        for work in self._works:
            if work is not None:
                work.wait()
        self._kept = ()
        return self._finish()


def here(x: Tensor) -> Pending:
    """``x``, which need not travel."""
    return Pending((), lambda: x)


def even(total: int, parts: int) -> tuple[int, ...]:
    """``total`` rows over ``parts`` ranks, the first ones taking the rest."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def gather(x: Tensor, axis: Axis, *, counts: Sequence[int]) -> Pending:
    """y_r = [x_0; x_1; ...] on every rank. Adjoint: ``scatter_sum``."""
    if axis.size == 1:
        return here(x)
    most = max(counts)
    mine = _padded(x, most)
    everyone = x.new_empty(axis.size * most, *x.shape[1:])
    work = dist.all_gather_into_tensor(everyone, mine, group=axis.group, async_op=True)
    axis.ledger.add(axis.name, "gather", sent=(axis.size - 1) * _bytes(mine))

    def finish() -> Tensor:
        if min(counts) == most:
            return everyone
        return torch.cat([everyone[i * most : i * most + count] for i, count in enumerate(counts)])

    return Pending((work,), finish, kept=(mine,))


def scatter_sum(x: Tensor, axis: Axis, *, counts: Sequence[int]) -> Pending:
    """y_r = the rows of rank r in sum_s x_s. Adjoint: ``gather``."""
    if axis.size == 1:
        return here(x)
    most = max(counts)
    even_counts = min(counts) == most
    everyone = x.contiguous() if even_counts else torch.cat([_padded(part, most) for part in x.split(list(counts))])
    mine = x.new_empty(most, *x.shape[1:])
    work = dist.reduce_scatter_tensor(mine, everyone, group=axis.group, async_op=True)
    axis.ledger.add(axis.name, "scatter_sum", sent=(axis.size - 1) * _bytes(mine))
    return Pending((work,), lambda: mine[: counts[axis.rank]], kept=(everyone,))


def to_heads(x: Tensor, axis: Axis, *, counts: Sequence[int]) -> Pending:
    """From this rank's tokens with all heads, [counts[r], ..., heads, dim], to all tokens with this rank's heads,
    [sum(counts), ..., heads_r, dim]. Heads are dealt evenly, the first ranks taking the rest. Adjoint: ``to_tokens``."""
    if axis.size == 1:
        return here(x)
    *lead, heads, _ = x.shape
    parts = x.split(list(even(heads, axis.size)), dim=-2)
    mine = parts[axis.rank]
    whole = x.new_empty(sum(counts), *lead[1:], *mine.shape[-2:])
    rows = whole.split(list(counts))
    sent = [mine if peer == axis.rank else part.contiguous() for peer, part in enumerate(parts)]
    works = _exchange(sent, rows, axis)
    rows[axis.rank].copy_(mine)  # what stays here is copied while the rest travels
    return Pending(works, lambda: whole, kept=sent)


def to_tokens(x: Tensor, axis: Axis, *, counts: Sequence[int], heads: int) -> Pending:
    """From all tokens with this rank's share of ``heads``, [sum(counts), ..., heads_r, dim], to this rank's tokens with all
    heads, [counts[r], ..., heads, dim]. Adjoint: ``to_heads``."""
    if axis.size == 1:
        return here(x)
    _, *middle, _, dim = x.shape
    whole = x.new_empty(counts[axis.rank], *middle, heads, dim)
    parts = whole.split(list(even(heads, axis.size)), dim=-2)
    sent = x.contiguous().split(list(counts))
    taken = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
    works = _exchange(sent, taken, axis)
    parts[axis.rank].copy_(sent[axis.rank])

    def finish() -> Tensor:
        for peer, part in enumerate(parts):
            if peer != axis.rank:
                part.copy_(taken[peer])
        return whole

    return Pending(works, finish, kept=sent)


def shift(x: Tensor, axis: Axis, *, rows: int, back: bool = False) -> Pending:
    """y_r = x_{r-1}, around the ring; ``back``: y_r = x_{r+1}. ``rows`` is how many the sender has. Adjoint: the other way."""
    if axis.size == 1:
        return here(x)
    step = -1 if back else 1
    following, before = (axis.ranks[(axis.rank + sign * step) % axis.size] for sign in (1, -1))
    x = x.contiguous()
    taken = x.new_empty(rows, *x.shape[1:])
    messages = []
    if x.numel():
        messages.append(dist.P2POp(dist.isend, x, following, axis.group))
        axis.ledger.add(axis.name, "shift", sent=_bytes(x))
    if taken.numel():
        messages.append(dist.P2POp(dist.irecv, taken, before, axis.group))
    works = dist.batch_isend_irecv(messages) if messages else []
    return Pending(works, lambda: taken, kept=(x,))


def reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """y_r = sum_s x_s, in a new tensor. Its own adjoint."""
    total = x.clone()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
        axis.ledger.add(axis.name, "sum", sent=2 * (axis.size - 1) * _bytes(x) // axis.size)
    return total


def reduce_max(x: Tensor, axis: Axis) -> Tensor:
    """y_r = max_s x_s, in a new tensor."""
    most = x.clone()
    if axis.size > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=axis.group)
        axis.ledger.add(axis.name, "max", sent=2 * (axis.size - 1) * _bytes(x) // axis.size)
    return most


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = reduce_sum(torch.cat([grad.flatten() for grad in grads]), ctx.axis)
        return None, *_views(total, [grad.shape for grad in grads])


def enter(values: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """What all ranks hold alike goes into work that each does on rows or features of its own.

    y_r = x; backward: dx = sum_r dy_r, one message for all values. Differentiable.
    """
    return tuple(values) if axis.size == 1 else _Enter.apply(axis, *values)


class _Everyone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather(x[None], axis, counts=(1,) * axis.size).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(grad, ctx.axis, counts=(1,) * ctx.axis.size).wait()[0], None


def everyone(x: Tensor, axis: Axis) -> Tensor:
    """y_r = [x_0, x_1, ...] stacked, on every rank; backward: dx_r = sum_s dy_s[r]. Differentiable."""
    return x[None] if axis.size == 1 else _Everyone.apply(x, axis)


def left_of(first: Tensor, tail: Tensor, axis: Axis) -> Pending:
    """What lies left of a rank's piece: y_0 = first_0, y_r = tail_{r-1}; [B, C, ...] of one shape, the last tail apart, which
    goes nowhere. Adjoint: dfirst_0 = dy_0, dtail = ``given_back(dy)``."""
    return _pass_on(tail, axis, step=1, end=first)


def given_back(x: Tensor, axis: Axis) -> Pending:
    """y_r = x_{r+1}; what was lent to nobody, by the last rank, gets zero."""
    return _pass_on(x, axis, step=-1, end=x.new_zeros(()).expand_as(x))


def _pass_on(x: Tensor, axis: Axis, *, step: int, end: Tensor) -> Pending:
    """To the neighbour ``step`` away, and what the one on the other side passes: ``end`` where there is none."""
    if axis.size == 1:
        return here(end)
    # Channels travel last: so they lie in what convolutions make, and frames of a single clip need no copy.
    x, taken = x.movedim(1, -1).contiguous(), x.new_empty(end.movedim(1, -1).shape)
    messages, following, before = [], axis.rank + step, axis.rank - step
    if 0 <= following < axis.size:
        messages.append(dist.P2POp(dist.isend, x, axis.ranks[following], axis.group))
        axis.ledger.add(axis.name, "left_of", sent=_bytes(x))
    comes = 0 <= before < axis.size
    if comes:
        messages.append(dist.P2POp(dist.irecv, taken, axis.ranks[before], axis.group))
    works = dist.batch_isend_irecv(messages)
    return Pending(works, lambda: taken.movedim(-1, 1) if comes else end, kept=(x,))


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


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros at its end, up to ``rows``."""
    return x.contiguous() if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Consecutive pieces of a flat tensor in the given shapes."""
    ends = list(accumulate(map(prod, shapes)))
    return [flat[end - prod(shape) : end].view(*shape) for shape, end in zip(shapes, ends)]


def _exchange(sent: Sequence[Tensor], taken: Sequence[Tensor], axis: Axis) -> list[dist.Work]:
    """A tensor to and from every other rank. As messages between pairs, so that they may land where they belong."""
    messages, total = [], 0
    for peer, (out, into) in enumerate(zip(sent, taken)):
        if peer != axis.rank and out.numel():
            messages.append(dist.P2POp(dist.isend, out, axis.ranks[peer], axis.group))
            total += _bytes(out)
        if peer != axis.rank and into.numel():
            messages.append(dist.P2POp(dist.irecv, into, axis.ranks[peer], axis.group))
    axis.ledger.add(axis.name, "all_to_all", sent=total)
    return dist.batch_isend_irecv(messages) if messages else []
