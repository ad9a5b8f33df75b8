"""The transformer block's three operations, each with its own backward that keeps the least.

Under tensor parallelism a token's row is normed, gated and kept by one rank (Megatron sequence parallelism, Korthikanti et
al. 2022, sec. 4.2): rows are gathered before the linears whose outputs are split, and the partial sums of those whose inputs
are split are scattered over rows. Under Ulysses, tokens are exchanged for heads around attention (Jacobs et al. 2023).

Autograd would keep about 23 tensors of [n, hidden] per block; these keep 10: the block's input, q, k, v before their
norm, the attention's output, the middle of the block, and the feed-forward's four before GELU. Everything between is made
again in the backward, elementwise only. ``again`` lets a caller drop q, k, v or the feed-forward's four as well and have
them made again by their linear; attention itself is never computed twice.

Legend: n = tokens of this rank, w = tokens of its tp ranks together, m = tokens of its Ulysses ranks together, r = rows of
modulation, ``runs`` = consecutive tokens sharing a row. Without parallelism n = w = m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideo_dist.pack.attention import Attended
from cogvideo_dist.pack.layout import Run
from cogvideo_dist.pack.shard import Rows, SequenceShard

Again = Callable[[], Tensor]
Drop = Callable[[Tensor], Tensor]
"""Leaves out elements in place, the same ones each time."""

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
    """y = gather(LayerNorm(x) * weight[row] + bias[row]) @ w.T + b, x [n, d] -> [w, features of this rank], keeping x alone.

    ``drop`` leaves out elements of what is gathered. The affine of the norm and AdaLN's (1 + scale), shift are one weight and
    one bias per row, so the caller folds them. Their gradients are those of this rank's rows; w and b are this rank's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None, rows: Rows, eps: float,
        drop: Drop | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, w)
        ctx.rows, ctx.eps, ctx.drop = rows, eps, drop
        affine = norm_affine(x, weight, bias, runs=rows.runs, eps=eps)
        return F.linear(rows.gather(affine if drop is None else drop(affine)).wait(), w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, w = ctx.saved_tensors
        rows: Rows = ctx.rows
        need_x, need_weight, need_bias, need_w, need_b = ctx.needs_input_grad[:5]
        normed, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], None, None, ctx.eps)
        d_w = d_b = coming = None
        if need_w:  # the rows are on their way while their gradient is computed, and that while the weight's is
            affine = _affine(normed, weight, bias, runs=rows.runs, out=torch.empty_like(normed))
            coming = rows.gather(affine if ctx.drop is None else ctx.drop(affine))
        if need_b:
            d_b = grad.sum(0)
        needed = need_x or need_weight or need_bias
        going = rows.scatter_sum(torch.mm(grad, w)) if needed else None
        if coming is not None:
            d_w = grad.t() @ coming.wait()
        if going is None:
            return None, None, None, d_w, d_b, None, None, None
        d_affine = going.wait()
        if ctx.drop is not None:
            ctx.drop(d_affine)
        d_weight, d_bias = (
            torch.zeros_like(t) if need else None for t, need in ((weight, need_weight), (bias, need_bias))
        )
        for start, stop, row in rows.runs:
            piece = d_affine[start:stop]
            if d_bias is not None:
                d_bias[row] = piece.sum(0)
            if d_weight is not None:
                d_weight[row] = normed[start:stop].mul_(piece).sum(0)
            piece.mul_(weight[row])
        d_x = None
        if need_x:
            wanted = [True, False, False]
            d_x, _, _ = aten.native_layer_norm_backward(d_affine, x, x.shape[-1:], mean, rstd, None, None, wanted)
        return d_x, d_weight, d_bias, d_w, d_b, None, None, None


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

    qkv [w, 3, heads, dim] -> [w, heads, dim]; the norms' (weight, bias) for q then k, each [dim]; rope [m, dim/2] complex, 1
    for text tokens (which are not rotated), or None. Keeps q, k, v as they come to this rank (not even these if ``again`` is
    given), the output as it leaves, and the log-sum-exp. The norms' gradients are those of this rank's heads and tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor,
        rope: Tensor | None, seq: SequenceShard, eps: float, again: Again | None,
    ) -> Tensor:  # fmt: skip
        heads = qkv.shape[-2]
        qkv = seq.to_heads(qkv).wait()
        (q, k), _ = normed_heads(qkv, (wq, bq, wk, bk), rope, eps)
        attended = seq.attend(q, k, qkv[:, 2])
        out = seq.to_tokens(attended.out, heads=heads).wait()
        ctx.save_for_backward(None if again else qkv, wq, bq, wk, bk, rope, out, *attended.saved)
        ctx.seq, ctx.eps, ctx.again, ctx.graph, ctx.heads = seq, eps, again, attended.graph, heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, wq, bq, wk, bk, rope, out, *saved = ctx.saved_tensors
        seq: SequenceShard = ctx.seq
        moving = move_to_heads(grad, out, seq=seq)
        qkv = qkv if ctx.again is None else seq.to_heads(ctx.again()).wait()
        ctx.again = None
        (q, k), inputs = normed_heads(qkv, (wq, bq, wk, bk), rope, ctx.eps)
        grad, out = moving()
        *d_heads, d_v = seq.attend_backward(grad, Attended(out, tuple(saved), ctx.graph), qkv=(q, k, qkv[:, 2]))
        ctx.graph = None
        d_qkv = torch.empty_like(qkv)
        d_qkv[:, 2] = d_v
        d_norms: list[Tensor] = []
        for index, (d, (x, mean, rstd), weight, bias) in enumerate(zip(d_heads, inputs, (wq, wk), (bq, bk))):
            d = d if rope is None else rotate(d, rope.conj())
            d_qkv[:, index], *d_norm = aten.native_layer_norm_backward(
                d, x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
            )
            d_norms += d_norm
        return seq.to_tokens(d_qkv, heads=ctx.heads).wait(), *d_norms, None, None, None, None


def move_to_heads(grad: Tensor, out: Tensor, *, seq: SequenceShard) -> Callable[[], tuple[Tensor, Tensor]]:
    """Send the output's gradient [w, heads, dim] to where attention was done; what is returned waits for it and gives the
    gradient and the output there, [m, heads of this rank, dim].

    Attention's backward reads the output only through D = rowsum(grad * out) (Dao et al. 2022, sec. 3.1). So under Ulysses D
    travels, one number for each token and head, and the output's component along the gradient, grad * D / |grad|^2, stands in
    for the output, which would otherwise be kept on both sides of the exchange or travel again. Its length is at most the
    output's, so in 16 bits it rounds no worse.
    """
    if seq.mesh.ulysses.size == 1:
        return lambda: (grad, out)
    wide = torch.promote_types(grad.dtype, torch.float32)
    going = seq.to_heads(grad)
    shares = seq.to_heads((grad.to(wide) * out).sum(-1, keepdim=True))

    def arrived() -> tuple[Tensor, Tensor]:
        here = going.wait()
        # float64: the square of a small gradient would vanish
        square = torch.linalg.vector_norm(here, dim=-1, keepdim=True, dtype=torch.float64).square_()
        scale = (shares.wait() / square.clamp_min_(torch.finfo(torch.float64).tiny)).to(wide)
        return here, (here * scale).to(here.dtype)

    return arrived


class LinearGateResidual(torch.autograd.Function):
    """y = residual + gate[row] * (scatter_sum(f(x) @ w.T) + b), f = GELU (tanh form) or identity, keeping x alone.

    x [w, features of this rank], residual and y [n, d]. The linear's output, which the gradient of the gate seems to want, is
    not kept: see ``_gradients_by_products``. The gate's gradient is that of this rank's features; that of b is whole.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, w: Tensor, b: Tensor, gate: Tensor,
        rows: Rows, gelu: bool, again: Again | None,
    ) -> Tensor:  # fmt: skip
        active = F.gelu(x, approximate="tanh") if gelu else x
        y = rows.scatter_sum(F.linear(active, w, b if rows.axis.rank == 0 else None)).wait()
        for start, stop, row in rows.runs:
            torch.addcmul(residual[start:stop], y[start:stop], gate[row], out=y[start:stop])
        ctx.save_for_backward(None if again else x, w, b, gate)
        ctx.rows, ctx.gelu, ctx.again = rows, gelu, again
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, gate = ctx.saved_tensors
        rows: Rows = ctx.rows
        coming = rows.gather(grad)
        x = x if ctx.again is None else ctx.again()
        ctx.again = None
        active = F.gelu(x, approximate="tanh") if ctx.gelu else x
        wide = coming.wait()
        gated = torch.empty_like(wide)
        for start, stop, row in rows.wide:
            torch.mul(wide[start:stop], gate[row], out=gated[start:stop])
        d_w = d_b = d_gate = None
        if any(ctx.needs_input_grad[2:5]):
            short = len(wide) < SHORT_RUN * len(rows.wide)
            gradients = _gradients_by_output if short else _gradients_by_products
            own_bias = b if rows.axis.rank == 0 else None
            d_w, d_gate = gradients(wide, gated, active=active, linear=(w, own_bias), gate=gate, runs=rows.wide)
            d_b = gated.sum(0)
        d_x = torch.mm(gated, w, out=active if ctx.gelu else None)  # the widest tensor of the block: one less of it
        if ctx.gelu:
            aten.gelu_backward(d_x, x, approximate="tanh", grad_input=d_x)
        return grad, d_x, d_w, d_b, d_gate, None, None, None


SHORT_RUN = 512
"""Mean tokens of a run below which a product of the weight's size per run costs more than the linear once more."""


Linear = tuple[Tensor, Tensor | None]
"""A linear's weight, and its bias on the rank that adds it."""


def _gradients_by_products(
    grad: Tensor, gated: Tensor, *, active: Tensor, linear: Linear, gate: Tensor, runs: Sequence[Run]
) -> tuple[Tensor, Tensor]:
    """Of w and gate. The gate is constant over a run, so with G = grad.T @ active of that run: d_w += gate * G and
    d_gate = rowsum(w * G) + b * sum(grad), which makes no output of the linear and costs no product more."""
    w, b = linear
    d_w, d_gate, outer = torch.zeros_like(w), torch.zeros_like(gate), torch.empty_like(w)
    for start, stop, row in runs:
        piece = grad[start:stop]
        torch.mm(piece.t(), active[start:stop], out=outer)
        d_w.addcmul_(outer, gate[row][:, None])
        d_gate[row] = outer.mul_(w).sum(1)
        if b is not None:
            d_gate[row] += b * piece.sum(0)
    return d_w, d_gate


def _gradients_by_output(
    grad: Tensor, gated: Tensor, *, active: Tensor, linear: Linear, gate: Tensor, runs: Sequence[Run]
) -> tuple[Tensor, Tensor]:
    """Of w and gate, with the linear's output made again."""
    share, d_gate = F.linear(active, *linear).mul_(grad), torch.zeros_like(gate)
    for start, stop, row in runs:
        d_gate[row] = share[start:stop].sum(0)
    return gated.t() @ active, d_gate
