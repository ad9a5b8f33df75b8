"""Full attention inside each clip of a pack, behind one name for every back end, as a pair of plain functions.

The pair (forward, backward) exists so that a caller can keep what it likes between the two (queries and keys are cheaper to
make again than to keep). The log-sum-exp makes the backward exact without the attention matrix (Dao et al. 2022, sec. 3.1).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from cogvideo_dist.pack.layout import Group

aten = torch.ops.aten
Triple = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor | None, ...]
"""What a kernel's backward wants besides q, k, v, out: the log-sum-exp, then the state of a dropout that is off."""


class Kernel(NamedTuple):
    """Fused attention over [clips, heads, length, dim], without a mask.

    ``wrap`` gives a log-sum-exp [clips, heads, length] the shape in which the kernel saves it.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Saved]]
    backward: Callable[[Tensor, Triple, Tensor, Saved], Triple]
    wrap: Callable[[Tensor], Tensor] = lambda lse: lse


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
    "efficient": Kernel(
        _efficient, _efficient_backward, wrap=lambda lse: pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    ),
    "cudnn": Kernel(_cudnn, _cudnn_backward, wrap=lambda lse: lse[..., None]),
    "flash": Kernel(_flash, _flash_backward),
}


class Attended(NamedTuple):
    """Output [n, heads, dim] and what the backward wants besides: tensors, or the graph of a function that autograd sees."""

    out: Tensor
    saved: Saved
    graph: tuple[tuple[Tensor, ...], Tensor] | None = None


class Backend(Protocol):
    """Attention between the queries and keys of each group; all tensors [n, heads, dim]."""

    def attend(self, qkv: Triple, groups: tuple[Group, ...]) -> Attended: ...

    def attend_backward(
        self, grad: Tensor, attended: Attended, *, qkv: Triple, groups: tuple[Group, ...]
    ) -> Triple: ...


class Clipwise:
    """One call of a fused kernel for each group of clips."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def attend(self, qkv: Triple, groups: tuple[Group, ...]) -> Attended:
        if not groups:
            return Attended(torch.empty_like(qkv[0]), ())
        outs, saved = zip(*(self.kernel.forward(*segments(qkv, group)) for group in groups))
        return Attended(_joined(outs), tuple(tensor for each in saved for tensor in each))

    def attend_backward(self, grad: Tensor, attended: Attended, *, qkv: Triple, groups: tuple[Group, ...]) -> Triple:
        if not groups:
            return grad, grad, grad
        each = len(attended.saved) // len(groups)
        parts = []
        for index, group in enumerate(groups):
            saved = attended.saved[index * each : (index + 1) * each]
            rows = queries(grad, group), queries(attended.out, group)
            parts.append(self.kernel.backward(rows[0], segments(qkv, group), rows[1], saved))
        d_q, d_k, d_v = (_joined(kind) for kind in zip(*parts))
        return d_q, d_k, d_v


class PackAttention(Protocol):
    """A differentiable function of q, k, v [n, heads, dim] and the segments' lengths."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...]) -> Tensor: ...


class Packwise:
    """One call for the whole pack of a function that autograd differentiates; it keeps what it likes, queries and keys too."""

    def __init__(self, function: PackAttention) -> None:
        self.function = function

    def attend(self, qkv: Triple, groups: tuple[Group, ...]) -> Attended:
        lengths = tuple(group.length for group in groups for _ in range(group.clips))
        if not lengths:
            return Attended(torch.empty_like(qkv[0]), ())
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in qkv)
            out = self.function(*leaves, lengths=lengths)
        return Attended(out.detach(), (), (leaves, out))

    def attend_backward(self, grad: Tensor, attended: Attended, *, qkv: Triple, groups: tuple[Group, ...]) -> Triple:
        if attended.graph is None:
            return grad, grad, grad
        leaves, out = attended.graph
        d_q, d_k, d_v = torch.autograd.grad(out, leaves, grad)
        return d_q, d_k, d_v


def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not in every torch that the other back ends run on

    ends = _boundaries(lengths, q.device)
    out = varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths))
    return out if isinstance(out, Tensor) else out[0]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    ends = _boundaries(lengths, q.device)
    out: Tensor = flash_attn_varlen_func(q, k, v, ends, ends, max(lengths), max(lengths))
    return out


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # uncompiled it makes the whole matrix


def _flex(q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    clip = torch.repeat_interleave(torch.tensor(lengths, device=q.device))
    mask = create_block_mask(lambda b, h, i, j: clip[i] == clip[j], None, None, len(q), len(q), device=str(q.device))
    out = _compiled_flex()(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)
    return out[0].transpose(0, 1)


PACKWISE: dict[str, PackAttention] = {"varlen": _varlen, "flex": _flex, "flash_attn": _flash_attn}
SIXTEEN = (torch.bfloat16, torch.float16)


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """The back end that ``auto`` stands for: 16 bits go to cuDNN from Hopper (9.0) on, else to flash."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "cpu"
    if dtype not in SIXTEEN:
        return "efficient"
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    return "cudnn" if hopper and torch.backends.cuda.cudnn_sdp_enabled() else "flash"


@lru_cache(maxsize=64)
def backend_for(name: str, *, device: torch.device, dtype: torch.dtype, ring: int = 1) -> Backend:
    """The back end of a name; raises ``ValueError`` where it cannot serve the device, the precision or a ring."""
    name = choose_backend(name, device=device, dtype=dtype)
    if reason := _refusal(name, device=device, dtype=dtype, ring=ring):
        fitting = [
            other for other in (*KERNELS, *PACKWISE) if not _refusal(other, device=device, dtype=dtype, ring=ring)
        ]
        instead = f"use auto or one of {', '.join(fitting)}" if fitting else "no other back end does"
        raise ValueError(f"parallel.attention {name} {reason}; {instead}")
    return Clipwise(KERNELS[name]) if name in KERNELS else Packwise(PACKWISE[name])


def _refusal(name: str, *, device: torch.device, dtype: torch.dtype, ring: int) -> str | None:
    """Why a back end cannot serve."""
    if (name == "cpu") != (device.type == "cpu"):
        return f"does not run on {device.type}"
    if name not in ("cpu", "efficient", "flex") and dtype not in SIXTEEN:
        return f"needs 16 bits, found {dtype}"
    if dtype == torch.float64 and name != "cpu":
        return f"does not compute in {dtype}, which runs on CPUs alone"
    if name == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"is not in torch {torch.__version__}"
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return "is not installed (package flash-attn)"
    if name in PACKWISE and ring > 1:
        return f"has no backward for parts of a clip, which parallel.ring {ring} needs"
    return None


def queries(x: Tensor, group: Group) -> Tensor:
    """The group's queries of [n, heads, dim] as [clips, heads, length, dim], without a copy."""
    part = x[group.start : group.start + group.clips * group.length]
    return part.unflatten(0, (group.clips, group.length)).transpose(1, 2)


def _keys(x: Tensor, group: Group) -> Tensor:
    part = x[group.k_start : group.k_start + group.clips * group.k_length]
    return part.unflatten(0, (group.clips, group.k_length)).transpose(1, 2)


def segments(qkv: Triple, group: Group) -> Triple:
    """Queries, and keys and values, of a group, each as ``queries`` gives them."""
    q, k, v = qkv
    return queries(q, group), _keys(k, group), _keys(v, group)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts [clips, heads, length, dim] -> [n, heads, dim]; a view if there is one and its layout allows it."""
    tokens = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)
