"""The transformer block's three operations, each with its own backward that keeps the least.

Autograd would keep about 23 tensors of [n, hidden] per block; these keep 10: the block's input, q, k, v before their
norm, the attention's output, the middle of the block, and the feed-forward's four before GELU. Everything between is made
again in the backward, elementwise only. ``again`` lets a caller drop q, k, v or the feed-forward's four as well and have
them made again by their linear; attention itself is never computed twice.

Legend: n = tokens of the pack, r = rows of modulation, ``runs`` = consecutive tokens sharing a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideo_dist.pack.attention import Attended, attend, attend_backward
from cogvideo_dist.pack.layout import Group, Run

Again = Callable[[], Tensor]
aten = torch.ops.aten


def norm_affine(x: Tensor, weight: Tensor, bias: Tensor, *, runs: Sequence[Run], eps: float) -> Tensor:
    """LayerNorm of x [n, d], then ``* weight[row] + bias[row]`` with weight, bias [r, d]. No gradient."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    return _affine(y, weight, bias, runs=runs, out=y)


def _affine(x: Tensor, weight: Tensor, bias: Tensor, *, runs: Sequence[Run], out: Tensor) -> Tensor:
    for start, stop, row in runs:
        torch.addcmul(bias[row], x[start:stop], weight[row], out=out[start:stop])
    return out


class NormAffineLinear(torch.autograd.Function):
    """y = (LayerNorm(x) * weight[row] + bias[row]) @ w.T + b, keeping x alone.

    The affine of the norm and AdaLN's (1 + scale), shift are one weight and one bias per row, so the caller folds them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor, runs: Sequence[Run], eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, w)
        ctx.runs, ctx.eps = runs, eps
        return F.linear(norm_affine(x, weight, bias, runs=runs, eps=eps), w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, w = ctx.saved_tensors
        need_x, need_weight, need_bias, need_w, need_b = ctx.needs_input_grad[:5]
        normed, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], None, None, ctx.eps)
        scratch = torch.empty_like(normed)
        d_w = grad.t() @ _affine(normed, weight, bias, runs=ctx.runs, out=scratch) if need_w else None
        d_b = grad.sum(0) if need_b else None
        if not (need_x or need_weight or need_bias):
            return None, None, None, d_w, d_b, None, None
        d_affine = torch.mm(grad, w, out=scratch)
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for start, stop, row in ctx.runs:
            piece = d_affine[start:stop]
            d_bias[row] = piece.sum(0)
            d_weight[row] = normed[start:stop].mul_(piece).sum(0)
            piece.mul_(weight[row])
        wanted = [True, False, False]
        d_x, _, _ = aten.native_layer_norm_backward(d_affine, x, x.shape[-1:], mean, rstd, None, None, wanted)
        return d_x, d_weight, d_bias, d_w, d_b, None, None


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x [n, heads, dim] by rope [n, dim/2] (complex); in place unless x has 16 bits."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(rope[:, None])
    return wide.to(x.dtype)


def normed_heads(qkv: Tensor, norms: Sequence[Tensor], rope: Tensor | None, eps: float) -> tuple[list[Tensor], list]:
    """Queries and keys after norm and rotation, and what the norms' backward wants: (input, mean, rstd) of each."""
    heads, inputs = [], []
    for index in range(2):
        weight, bias = norms[2 * index : 2 * index + 2]
        x = qkv[:, index].contiguous()  # here, or the norm's forward and its backward each copy it
        y, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        heads.append(y if rope is None else rotate(y, rope))
        inputs.append((x, mean, rstd))
    return heads, inputs


class NormRotateAttend(torch.autograd.Function):
    """Attention inside each clip with per-head LayerNorm of q and k and rotary positions.

    qkv [n, 3, heads, dim]; the norms' (weight, bias) for q then k, each [dim]; rope [n, dim/2] complex, 1 for text
    tokens (which are not rotated), or None. Keeps qkv (not even that if ``again`` is given), the output and the
    log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor,
        rope: Tensor | None, groups: tuple[Group, ...], eps: float, again: Again | None,
    ) -> Tensor:  # fmt: skip
        (q, k), _ = normed_heads(qkv, (wq, bq, wk, bk), rope, eps)
        out, saved = attend(q, k, qkv[:, 2], groups=groups)
        ctx.save_for_backward(None if again else qkv, wq, bq, wk, bk, rope, out, *chain.from_iterable(saved))
        ctx.groups, ctx.eps, ctx.again = groups, eps, again
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, wq, bq, wk, bk, rope, out, *rest = ctx.saved_tensors
        qkv = qkv if ctx.again is None else ctx.again()
        ctx.again = None
        each = len(rest) // len(ctx.groups)
        saved = tuple(tuple(rest[i : i + each]) for i in range(0, len(rest), each))
        (q, k), inputs = normed_heads(qkv, (wq, bq, wk, bk), rope, ctx.eps)
        *d_heads, d_v = attend_backward(grad, (q, k, qkv[:, 2]), attended=Attended(out, saved), groups=ctx.groups)
        d_qkv = torch.empty_like(qkv)
        d_qkv[:, 2] = d_v
        d_norms: list[Tensor] = []
        for index, (d, (x, mean, rstd), weight, bias) in enumerate(zip(d_heads, inputs, (wq, wk), (bq, bk))):
            d = d if rope is None else rotate(d, rope.conj())
            d_qkv[:, index], *d_norm = aten.native_layer_norm_backward(
                d, x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
            )
            d_norms += d_norm
        return d_qkv, *d_norms, None, None, None, None


class LinearGateResidual(torch.autograd.Function):
    """y = residual + gate[row] * (f(x) @ w.T + b), f = GELU (tanh form) or identity, keeping x alone.

    The linear's output, which the gradient of the gate seems to want, is not kept: see ``_gate_gradients``.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, w: Tensor, b: Tensor, gate: Tensor,
        runs: Sequence[Run], gelu: bool, again: Again | None,
    ) -> Tensor:  # fmt: skip
        y = F.linear(F.gelu(x, approximate="tanh") if gelu else x, w, b)
        for start, stop, row in runs:
            torch.addcmul(residual[start:stop], y[start:stop], gate[row], out=y[start:stop])
        ctx.save_for_backward(None if again else x, w, b, gate)
        ctx.runs, ctx.gelu, ctx.again = runs, gelu, again
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, gate = ctx.saved_tensors
        x = x if ctx.again is None else ctx.again()
        ctx.again = None
        active = F.gelu(x, approximate="tanh") if ctx.gelu else x
        gated = torch.empty_like(grad)
        for start, stop, row in ctx.runs:
            torch.mul(grad[start:stop], gate[row], out=gated[start:stop])
        d_w = d_b = d_gate = None
        if any(ctx.needs_input_grad[2:5]):
            short = len(grad) < SHORT_RUN * len(ctx.runs)
            gradients = _gradients_by_output if short else _gradients_by_products
            d_w, d_b, d_gate = gradients(grad, gated, active=active, linear=(w, b), gate=gate, runs=ctx.runs)
        d_x = torch.mm(gated, w, out=active if ctx.gelu else None)  # the widest tensor of the block: one less of it
        if ctx.gelu:
            aten.gelu_backward(d_x, x, approximate="tanh", grad_input=d_x)
        return grad, d_x, d_w, d_b, d_gate, None, None, None


SHORT_RUN = 512
"""Mean tokens of a run below which a product of the weight's size per run costs more than the linear once more."""


def _gradients_by_products(
    grad: Tensor, gated: Tensor, *, active: Tensor, linear: tuple[Tensor, Tensor], gate: Tensor, runs: Sequence[Run]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of w, b and gate. The gate is constant over a run, so with G = grad.T @ active of that run: d_w += gate * G and
    d_gate = rowsum(w * G) + b * sum(grad), which makes no output of the linear and costs no product more."""
    w, b = linear
    d_w, d_gate, outer = torch.zeros_like(w), torch.zeros_like(gate), torch.empty_like(w)
    for start, stop, row in runs:
        piece = grad[start:stop]
        torch.mm(piece.t(), active[start:stop], out=outer)
        d_w.addcmul_(outer, gate[row][:, None])
        d_gate[row] = outer.mul_(w).sum(1) + b * piece.sum(0)
    return d_w, gated.sum(0), d_gate


def _gradients_by_output(
    grad: Tensor, gated: Tensor, *, active: Tensor, linear: tuple[Tensor, Tensor], gate: Tensor, runs: Sequence[Run]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of w, b and gate, with the linear's output made again."""
    share, d_gate = F.linear(active, *linear).mul_(grad), torch.zeros_like(gate)
    for start, stop, row in runs:
        d_gate[row] = share[start:stop].sum(0)
    return gated.t() @ active, gated.sum(0), d_gate
