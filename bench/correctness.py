"""Whether the fast block and the attention kernels are right on this device: outputs and every gradient against float64.

The reference is the same mathematics written plainly under autograd. In bfloat16 no fixed bound would mean much, so the
plain code run in bfloat16 is the yardstick: ours may be at most ``SLACK`` times as wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Setting
from bench.record import Row
from cogvideo_dist.models.dit import Block, Recompute
from cogvideo_dist.models.embed import rope_table
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.attention import KERNELS, Attended, backend_for, segments
from cogvideo_dist.pack.layout import Clip, PackLayout, Run, groups_of
from cogvideo_dist.pack.ring import add_block, block_gradients, merge
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import even

SLACK = 1.5
NOISE = 1.02
FLOAT32_BOUND = 1e-4
PACKS = {
    "short clips": (Clip(37, (3, 9, 11)), Clip(37, (3, 9, 11)), Clip(5, (1, 7, 6))),  # two share a call of attention
    "one long clip": (Clip(226, (5, 14, 15)),),  # its gates' gradients come about in another way
}
Grads = dict[str, Tensor]


def relative(found: Tensor, expected: Tensor) -> float:
    """|a - b| / |b|, both as one long vector."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., length, dim], the scores written out."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_block(block: Block, x: Tensor, condition: Tensor, rope: Tensor, seq: SequenceShard) -> Tensor:
    """``Block.forward`` as the paper has it, one clip and one kind of token at a time."""
    config, runs = block.config, seq.rows.runs
    modulation = block.modulation(condition).view(2 * len(condition), 6, 1, -1)

    def adapted(norm: Any, x: Tensor, run: Run, first: int) -> Tensor:
        shift, scale = modulation[run.row, first], modulation[run.row, first + 1]
        return (
            F.layer_norm(x[run.start : run.stop], norm.normalized_shape, norm.weight, norm.bias, norm.eps) * (1 + scale)
            + shift
        )

    def gated(x: Tensor, y: Tensor, gate: int) -> Tensor:
        return x + torch.cat([y[r.start : r.stop] * modulation[r.row, gate] for r in runs])

    qkv = block.qkv(torch.cat([adapted(block.norm1, x, run, 0) for run in runs]))
    q, k, v = qkv.unflatten(-1, (3, config.heads, config.head_dim)).unbind(1)
    q, k = (
        torch.view_as_real(torch.view_as_complex(norm(y).to(rope.real.dtype).unflatten(-1, (-1, 2))) * rope[:, None])
        .flatten(-2)
        .to(x.dtype)
        for norm, y in ((block.norm_q, q), (block.norm_k, k))
    )
    ends = seq.layout.cu_seqlens
    attended = [
        plain_attention(*(part[start:stop].transpose(0, 1) for part in (q, k, v))).transpose(0, 1).flatten(1)
        for start, stop in itertools.pairwise(ends)
    ]
    x = gated(x, block.out(torch.cat(attended)), 2)
    wide = block.ff1(torch.cat([adapted(block.norm2, x, run, 3) for run in runs]))
    return gated(x, block.ff2(F.gelu(wide, approximate="tanh")), 5)


def gradients(block: Block, forward: Callable[..., Tensor], x: Tensor, *rest: Any) -> Grads:
    """The output and the gradients of the input and of every parameter, by name."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    out = forward(x, *rest)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out).sin()
    out.backward(weights.to(out.dtype))
    found: Mapping[str, Tensor | None] = {n: p.grad for n, p in block.named_parameters()} | {"input": x.grad}
    return {"output": out.detach(), **{name: grad.clone() for name, grad in found.items() if grad is not None}}


def block_errors(
    setting: Setting, dtype: torch.dtype, *, recompute: Recompute, clips: tuple[Clip, ...]
) -> dict[str, tuple[float, float]]:
    """Per tensor: the error of our block and that of the plain code in the same precision."""
    config = DiTConfig(layers=1, heads=2 if setting.toy else 8, head_dim=64)
    seq = SequenceShard(PackLayout(clips))
    with torch.device(setting.device):
        block = Block(config, recompute, Axis("tp")).to(dtype)
    generator = torch.Generator(setting.device).manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=setting.device) * 0.05)
    x = setting.randn(seq.layout.tokens, config.hidden, dtype=dtype)
    condition = setting.randn(len(clips), config.time_embed_dim, dtype=dtype)
    rope = rope_table(config, clips, spans=seq.heard, device=setting.device, dtype=dtype)
    wide = rope_table(config, clips, spans=seq.heard, device=setting.device, dtype=torch.float64)
    ours = gradients(block, block, x, condition, rope, seq)
    plain = gradients(block, lambda *inputs: plain_block(block, *inputs), x, condition, rope, seq)
    block = block.double()
    exact = gradients(block, lambda *inputs: plain_block(block, *inputs), x.double(), condition.double(), wide, seq)
    return {name: (relative(ours[name], exact[name]), relative(plain[name], exact[name])) for name in exact}


def block_gate(setting: Setting) -> list[Row]:
    """The worst tensor of our block: in float32 its error, in bfloat16 its error over that of plain code."""
    rows = []
    levels: tuple[Recompute, ...] = ("none", "all_but_attention")
    for recompute, (pack, clips) in itertools.product(levels, PACKS.items()):
        errors = block_errors(setting, torch.float32, recompute=recompute, clips=clips)
        name = max(errors, key=lambda name: errors[name][0])
        what = f"block, {pack}, float32, recompute {recompute}: error ({name})"
        rows.append(Row("gate", what, "", *errors[name], at_most=FLOAT32_BOUND))
        if setting.device.type == "cuda":
            errors = block_errors(setting, torch.bfloat16, recompute=recompute, clips=clips)
            name = max(errors, key=lambda name: errors[name][0] / errors[name][1])
            found, plain = errors[name]
            what = f"block, {pack}, bfloat16, recompute {recompute}: error ({name})"
            rows.append(Row("gate", what, "", found, plain, found / plain, at_most=SLACK))
    return rows


LENGTHS = (333, 333, 90)  # two share a call


def by_segment(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention of each clip, whatever kernel it takes; [n, heads, dim]."""
    parts = zip(*(x.transpose(0, 1)[None].split(LENGTHS, dim=2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)[0].transpose(0, 1)


def back_end_errors(setting: Setting, name: str, dtype: torch.dtype) -> tuple[float, float]:
    """The worst of output, dq, dk, dv of a back end on a pack, and of torch's own attention in the same precision."""
    qkv = setting.randn(sum(LENGTHS), 3, 4, 64, dtype=dtype)
    q, k, v = qkv[:, 0].contiguous(), qkv[:, 1].contiguous(), qkv[:, 2]  # as a block has them
    grad, groups = setting.randn(sum(LENGTHS), 4, 64, dtype=dtype), groups_of(LENGTHS, LENGTHS)
    served = backend_for(name, device=setting.device, dtype=dtype)
    attended = served.attend((q, k, v), groups)
    ours = (attended.out, *served.attend_backward(grad, attended, qkv=(q, k, v), groups=groups))

    return worst_errors(ours, (q, k, v), grad)


def ring_errors(setting: Setting, name: str, dtype: torch.dtype) -> tuple[float, float]:
    """As ``back_end_errors``, with the keys of every clip in two parts that are merged, as a ring of two ranks does."""
    kernel, wide = KERNELS[name], torch.float32
    qkv = setting.randn(sum(LENGTHS), 3, 4, 64, dtype=dtype)
    q, k, v = (qkv[:, i].contiguous() for i in range(3))
    grad = setting.randn(sum(LENGTHS), 4, 64, dtype=dtype)
    out, lse = torch.zeros_like(q, dtype=wide), torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
    parts = [even(length, 2) for length in LENGTHS]
    clip_parts = torch.tensor([half for part in parts for half, count in enumerate(part) for _ in range(count)])
    halves = [(clip_parts == half).nonzero()[:, 0].to(q.device) for half in range(2)]
    state: tuple[Tensor | None, ...] = ()
    for half, rows in enumerate(halves):
        for group in groups_of(LENGTHS, [part[half] for part in parts]):
            piece, saved = kernel.forward(*segments((q, k[rows], v[rows]), group))
            merge(out, lse, parts=piece, part_lse=saved[0], group=group)
            state = saved[1:]
    attended = Attended(out.to(dtype), (lse, *state))
    d_q, d_kv = torch.zeros_like(q, dtype=wide), torch.zeros(len(q), 2, 4, 64, dtype=wide, device=q.device)
    for half, rows in enumerate(halves):
        into = torch.zeros(len(rows), 2, 4, 64, dtype=wide, device=q.device)
        for group in groups_of(LENGTHS, [part[half] for part in parts]):
            found = block_gradients(kernel, (grad, attended), qkv=(q, k[rows], v[rows]), group=group)
            add_block(d_q, into, parts=found, group=group)
        d_kv[rows] = into
    return worst_errors((attended.out, d_q, d_kv[:, 0], d_kv[:, 1]), (q, k, v), grad)


def worst_errors(ours: Sequence[Tensor], qkv: Sequence[Tensor], grad: Tensor) -> tuple[float, float]:
    """Of output, dq, dk, dv against float64: ours, and torch's own attention in the precision of ``qkv``."""

    def plainly(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = tuple(part.to(dtype).detach().requires_grad_() for part in qkv)
        out = by_segment(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad.to(dtype))

    exact = plainly(torch.float64)
    worst = [max(relative(a, b) for a, b in zip(side, exact)) for side in (ours, plainly(qkv[0].dtype))]
    return worst[0], worst[1]


def back_end_gate(setting: Setting, *, name: str) -> list[Row]:
    """One back end in the precision that it is used in; in 16 bits it may be no more wrong than torch's own attention."""
    single = name in ("cpu", "efficient")
    dtype = torch.float32 if single else torch.bfloat16
    cases = {"a pack": back_end_errors} | ({"keys in two parts": ring_errors} if name in KERNELS else {})
    rows = []
    for case, errors in cases.items():
        found, plain = errors(setting, name, dtype)
        what = f"attention {name}, {case}, {str(dtype).removeprefix('torch.')}: error"
        if single:
            rows.append(Row("gate", what, "", found, plain, at_most=FLOAT32_BOUND))
        else:
            rows.append(Row("gate", what, "", found, plain, found / plain, at_most=NOISE))
    return rows
