"""Full attention inside each clip of a pack, as a forward and backward pair of plain functions.

The pair exists so that a caller can keep what it likes between the two (queries and keys are cheaper to make again than
to keep). The log-sum-exp makes the backward exact without the attention matrix (Dao et al. 2022, sec. 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.pack.layout import Group

aten = torch.ops.aten
Triple = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor | None, ...]
"""What a kernel's backward wants besides q, k, v, out: the log-sum-exp, then the state of a dropout that is off."""


class Kernel(NamedTuple):
    """Fused attention over [clips, heads, length, dim], without a mask."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Saved]]
    backward: Callable[[Tensor, Triple, Tensor, Saved], Triple]


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, (lse,)


def _cpu_backward(grad: Tensor, qkv: Triple, out: Tensor, saved: Saved) -> Triple:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, *qkv, out, *saved, 0.0, False)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
    out, *saved = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, tuple(saved)


def _efficient_backward(grad: Tensor, qkv: Triple, out: Tensor, saved: Saved) -> Triple:
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(grad, *qkv, None, out, *saved, 0.0, wanted)[:3]


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
    # Without nested tensors there are no cumulative lengths (None) and the longest ones are q's and k's own.
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, (lse, seed, offset)


def _cudnn_backward(grad: Tensor, qkv: Triple, out: Tensor, saved: Saved) -> Triple:
    lengths = qkv[0].shape[2], qkv[1].shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, *qkv, out, *saved, None, None, None, *lengths, 0.0, False
    )


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
    out, lse, _, _, _, _, state, unused, _ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out, (lse, state, unused)


def _flash_backward(grad: Tensor, qkv: Triple, out: Tensor, saved: Saved) -> Triple:
    lse, state, unused = saved
    lengths = qkv[0].shape[2], qkv[1].shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        grad, *qkv, out, lse, None, None, *lengths, 0.0, False, state, unused
    )


KERNELS = {
    "cpu": Kernel(_cpu, _cpu_backward),
    "efficient": Kernel(_efficient, _efficient_backward),
    "cudnn": Kernel(_cudnn, _cudnn_backward),
    "flash": Kernel(_flash, _flash_backward),
}


def kernel_for(q: Tensor) -> Kernel:
    """The fastest for the device and precision of ``q``: 16 bits go to cuDNN from Hopper (9.0) on, else to flash."""
    if q.device.type == "cpu":
        return KERNELS["cpu"]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return KERNELS["efficient"]
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return KERNELS["cudnn" if hopper and torch.backends.cuda.cudnn_sdp_enabled() else "flash"]


class Attended(NamedTuple):
    """Output [n, heads, dim] and what each group's kernel saved."""

    out: Tensor
    saved: tuple[Saved, ...]


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
    forward = kernel_for(q).forward
    outs, saved = zip(*(forward(_segments(q, group), _segments(k, group), _segments(v, group)) for group in groups))
    return Attended(_joined(outs), saved)


def attend_backward(grad: Tensor, qkv: Triple, *, attended: Attended, groups: tuple[Group, ...]) -> Triple:
    """Gradients of q, k and v, given that of the output, all [n, heads, dim]."""
    backward = kernel_for(qkv[0]).backward
    parts = []
    for group, saved in zip(groups, attended.saved):
        q, k, v = (_segments(x, group) for x in qkv)
        parts.append(backward(_segments(grad, group), (q, k, v), _segments(attended.out, group), saved))
    d_q, d_k, d_v = (_joined(kind) for kind in zip(*parts))
    return d_q, d_k, d_v
