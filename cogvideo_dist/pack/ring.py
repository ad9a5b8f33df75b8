"""Attention over a ring of ranks, each with an even share of every clip (Liu, Zaharia, Abbeel 2023, arXiv 2310.01889).

Keys and values travel around the ring while each rank attends with the part it has; the parts' outputs are merged by their
log-sum-exp. In the backward a part's gradient needs only the merged output and log-sum-exp, so keys and values travel once
more, and their gradients behind them: they start at the owner's neighbour and come home after one round less a step. What is
sent next is on its way while the part at hand is computed.

Legend: m = tokens of this rank, h = heads; ``shares`` [rank][clip] = tokens of a clip on a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvideo_dist.pack.attention import SIXTEEN, Attended, Kernel, Saved, Triple, queries, segments
from cogvideo_dist.pack.layout import Group, groups_of
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import Pending, shift

Shares = tuple[tuple[int, ...], ...]


def ring_attend(kernel: Kernel, qkv: Triple, *, ring: Axis, shares: Shares) -> Attended:
    """q, k, v [m, heads, dim] -> out [m, heads, dim]; saves the log-sum-exp [m, heads] and a kernel's state."""
    q, k, v = qkv
    wide = _wide(q)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
    state: Saved = ()
    kv = torch.stack([k, v], dim=1)
    for step in range(ring.size):
        owner, coming = _owners(ring, step)
        following = shift(kv, ring, rows=sum(shares[coming])) if step < ring.size - 1 else None
        for group in groups_of(shares[ring.rank], shares[owner]):
            parts, saved = kernel.forward(*segments((q, kv[:, 0], kv[:, 1]), group))
            merge(out, lse, parts=parts, part_lse=saved[0], group=group)
            state = saved[1:]
        if following is not None:
            kv = following.wait()
    return Attended(out.to(q.dtype), (lse, *state))


def _owners(ring: Axis, step: int) -> tuple[int, int]:
    """Whose keys are here at a step, and whose come next."""
    return (ring.rank - step) % ring.size, (ring.rank - step - 1) % ring.size


def _wide(x: Tensor) -> torch.dtype:
    """Of sums over the ring: 16 bits would lose a digit with every part."""
    return torch.float32 if x.dtype in SIXTEEN else x.dtype


def merge(out: Tensor, lse: Tensor, *, parts: Tensor, part_lse: Tensor | None, group: Group) -> None:
    """Add a part's output [clips, h, length, dim] and log-sum-exp b to those of the group's rows, a: with L = log(e^a + e^b)
    the sum e^(a-L) out + e^(b-L) part is a step from one to the other, of weight e^(b-L) = sigmoid(b - a)."""
    if part_lse is None:
        raise ValueError("this attention kernel saves no log-sum-exp")
    rows = slice(group.start, group.start + group.clips * group.length)
    shaped = part_lse.reshape(group.clips, parts.shape[1], -1)[..., : group.length]
    new = shaped.transpose(1, 2).flatten(0, 1)
    out[rows].lerp_(parts.transpose(1, 2).flatten(0, 1).to(out.dtype), torch.sigmoid(new - lse[rows])[..., None])
    lse[rows] = torch.logaddexp(lse[rows], new)


def ring_attend_backward(
    kernel: Kernel, grad: Tensor, attended: Attended, *, qkv: Triple, ring: Axis, shares: Shares
) -> Triple:
    """Gradients of q, k, v, given that of the output, all [m, heads, dim]."""
    q, k, v = qkv
    d_q = torch.zeros(q.shape, dtype=_wide(q), device=q.device)
    kv = torch.stack([k, v], dim=1)
    own = torch.zeros(kv.shape, dtype=_wide(q), device=q.device)
    travelling: Pending | None = None
    for step in range(ring.size):
        owner, coming = _owners(ring, step)
        following = shift(kv, ring, rows=sum(shares[coming])) if step < ring.size - 1 else None
        groups = groups_of(shares[ring.rank], shares[owner])
        blocks = [block_gradients(kernel, (grad, attended), qkv=(q, kv[:, 0], kv[:, 1]), group=g) for g in groups]
        d_kv = own if step == 0 else torch.zeros_like(kv, dtype=own.dtype) if travelling is None else travelling.wait()
        for group, parts in zip(groups, blocks):
            add_block(d_q, d_kv, parts=parts, group=group)
        if step > 0:
            travelling = shift(d_kv, ring, rows=sum(shares[coming]))
        if following is not None:
            kv = following.wait()
    if travelling is not None:
        own += travelling.wait()
    return d_q.to(q.dtype), own[:, 0].to(q.dtype), own[:, 1].to(q.dtype)


def block_gradients(kernel: Kernel, given: tuple[Tensor, Attended], *, qkv: Triple, group: Group) -> Triple:
    """Of a group's queries and of the keys and values that are here, [clips, h, length, dim], given the gradient of the merged
    output."""
    grad, attended = given
    lse, *state = attended.saved
    if lse is None:
        raise ValueError("a ring keeps the log-sum-exp")
    rows = slice(group.start, group.start + group.clips * group.length)
    merged = lse[rows].unflatten(0, (group.clips, group.length)).transpose(1, 2).contiguous()
    return kernel.backward(
        queries(grad, group), segments(qkv, group), queries(attended.out, group), (kernel.wrap(merged), *state)
    )


def add_block(d_q: Tensor, d_kv: Tensor, *, parts: Triple, group: Group) -> None:
    """Add a group's gradients to those of all rows."""
    part_q, part_k, part_v = (part.transpose(1, 2).flatten(0, 1) for part in parts)
    keys = slice(group.k_start, group.k_start + group.clips * group.k_length)
    d_q[group.start : group.start + group.clips * group.length] += part_q
    d_kv[keys, 0] += part_k
    d_kv[keys, 1] += part_v
