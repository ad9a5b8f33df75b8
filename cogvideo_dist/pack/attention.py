"""Full attention inside each clip of a pack, as a forward and backward pair of plain functions.

The pair exists so that a caller can keep what it likes between the two (queries and keys are cheaper to make again than to
keep). The log-sum-exp makes the backward exact without the attention matrix (Dao et al. 2022, sec. 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.pack.layout import Group

aten = torch.ops.aten
Triple = tuple[Tensor, Tensor, Tensor]


class Attended(NamedTuple):
    """Output [n, heads, dim] and, for each group, what else its kernel's backward wants."""

    out: Tensor
    rest: tuple[tuple[Any, ...], ...]


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Fused attention over [clips, heads, length, dim]: (out, log-sum-exp, ...)."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.dtype in (torch.float32, torch.float64):
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    if _cudnn_serves(q):
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:8]
    return aten._scaled_dot_product_flash_attention(q, k, v)[:8]


def _cudnn_serves(q: Tensor) -> bool:
    """cuDNN's fused attention is the fastest for 16 bits on Hopper and later (compute capability 9)."""
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _kernel_backward(grad: Tensor, qkv: Triple, saved: tuple[Any, ...]) -> Triple:
    q, k, v = qkv
    out, lse = saved[:2]
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    if q.dtype in (torch.float32, torch.float64):
        wanted = [True, True, True, False]
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, saved[2], saved[3], 0.0, wanted
        )[:3]
    cu_q, cu_k, max_q, max_k, seed, offset = saved[2:]
    if _cudnn_serves(q):
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, False
        )
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, False, seed, offset
    )


def _segments(x: Tensor, group: Group) -> Tensor:
    """The group's tokens of [n, heads, dim] as [clips, heads, length, dim], without a copy."""
    part = x[group.start : group.start + group.clips * group.length]
    return part.unflatten(0, (group.clips, group.length)).transpose(1, 2)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts [clips, heads, length, dim] -> [n, heads, dim]; a view if there is one and its layout allows it."""
    tokens = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def attend(q: Tensor, k: Tensor, v: Tensor, *, groups: tuple[Group, ...]) -> Attended:
    """Attention of each segment with itself; q, k, v [n, heads, dim] -> out [n, heads, dim]."""
    results = [_kernel(*(_segments(x, group) for x in (q, k, v))) for group in groups]
    return Attended(_joined([result[0] for result in results]), tuple(tuple(result[1:]) for result in results))


def attend_backward(grad: Tensor, qkv: Triple, *, attended: Attended, groups: tuple[Group, ...]) -> Triple:
    """Gradients of q, k and v, given that of the output, all [n, heads, dim]."""
    parts = []
    for group, rest in zip(groups, attended.rest):
        q, k, v = (_segments(x, group) for x in qkv)
        parts.append(_kernel_backward(_segments(grad, group), (q, k, v), (_segments(attended.out, group), *rest)))
    d_q, d_k, d_v = (_joined(kind) for kind in zip(*parts))
    return d_q, d_k, d_v
