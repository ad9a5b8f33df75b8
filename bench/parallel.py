"""C1, C2, C3, C5: attention over a sharded sequence on 2 and 4 ranks of one thread each, over gloo.

    python -m bench.parallel [--tokens 2048] [--repeats 7]        # about 45 s on two quiet cores

Forward and backward of attention alone, float32, on the part of one clip that a rank holds.

C1  Ulysses on 2 ranks against DeepSpeed's DistributedAttention: the time above that of attention over all tokens with half of
    the heads, which is the work of a rank without any exchange.
C2  The ring on 2 and on 4 ranks against a ring that makes the scores of a block as matrices, as teaching code does
    (``MatrixRing``, written here; it exchanges by the same operations and overlaps them alike).
C3  Ulysses x ring, 2 x 2, against one process; bytes against the formulas. float32 keys' gradients travel as float32.
C5  30 heads over 4 Ulysses ranks against one process; against DeepSpeed's exchange of uneven heads.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bench.measure import worst_error
from bench.ranks import Timing, interleaved_ranks, peak_bytes, run_ranks, timed
from bench.record import Row, faster, smaller
from bench.traffic import traffic_of
from cogvideo_dist.models.fused import move_to_heads
from cogvideo_dist.pack.attention import Attended
from cogvideo_dist.pack.layout import VISION, Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import even, gather_objects, shift
from cogvideo_dist.rng import fold

ITEM = 4  # bytes of a float32
Attend = Callable[[Tensor], Tensor]
"""q, k, v of this rank's tokens [n, 3, heads, dim] -> [n, heads, dim]."""


@dataclass(frozen=True)
class Work:
    """Attention inside one clip."""

    tokens: int = 2048
    heads: int = 8
    dim: int = 64

    @property
    def activation(self) -> int:
        """Bytes of one activation of all tokens, X in the formulas."""
        return self.tokens * self.heads * self.dim * ITEM


def ulysses_bytes(work: Work, *, ulysses: int, ranks: int) -> float:
    """q, k, v and the output to heads and back, and their gradients: 8 (N_u - 1) / N_u / N X sent by a rank."""
    return 8 * (ulysses - 1) / ulysses / ranks * work.activation


def share_bytes(work: Work, *, ulysses: int, ranks: int) -> float:
    """rowsum(grad * out) in the backward, one number for each token and head, which stands in for the output."""
    return (ulysses - 1) / ulysses / ranks * work.tokens * work.heads * ITEM


def ring_bytes(work: Work, *, ring: int, ulysses: int) -> float:
    """Keys and values in the forward, again in the backward, and their gradients: 6 (N_r - 1) / N_r X / N_u."""
    return 6 * (ring - 1) / ring * work.activation / ulysses


class ShardedAttention(torch.autograd.Function):
    """Attention as the transformer computes it (``models.fused.NormRotateAttend``) without norms and rotation."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, seq: SequenceShard) -> Tensor:
        heads = qkv.shape[-2]
        qkv = seq.to_heads(qkv).wait()
        q, k, v = qkv.unbind(1)
        attended = seq.attend(q, k, v)
        out = seq.to_tokens(attended.out, heads=heads).wait()
        ctx.save_for_backward(qkv, out, *attended.saved)
        ctx.seq, ctx.heads = seq, heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, *saved = ctx.saved_tensors
        q, k, v = qkv.unbind(1)
        grad, out = move_to_heads(grad, out, seq=ctx.seq)()
        d_heads = ctx.seq.attend_backward(grad, Attended(out, tuple(saved)), qkv=(q, k, v))
        return ctx.seq.to_tokens(torch.stack(d_heads, dim=1), heads=ctx.heads).wait(), None


def ours(seq: SequenceShard) -> Attend:
    return lambda qkv: ShardedAttention.apply(qkv, seq)


def local(qkv: Tensor) -> Tensor:
    """Attention of tokens that are all here."""
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def deepspeed_ulysses(axis: Axis) -> Callable[..., Tensor]:
    """DeepSpeed's layer around the same kernel: q, k, v [1, n, heads, dim] -> [1, n, heads, dim]."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes minutes
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    # As deepspeed.initialize does with mesh_param; the exchange of uneven heads asks it for the rank.
    groups.mesh_device = deepspeed.comm.initialize_mesh_device((1, axis.size), ("data_parallel", "sequence_parallel"))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    layer = DistributedAttention(attention, axis.group, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: layer(q, k, v, 0)


class MatrixRing(torch.autograd.Function):
    """A ring of attention whose every block makes its scores, [heads, n, n], as matrices in forward and backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, ring: Axis) -> Tensor:
        q, kv = qkv[:, 0].transpose(0, 1), qkv[:, 1:].contiguous()
        out, lse = torch.zeros_like(q), q.new_full((*q.shape[:2], 1), -torch.inf)
        for step in range(ring.size):
            coming = shift(kv, ring, rows=len(kv)) if step < ring.size - 1 else None
            k, v = kv.transpose(0, 2).unbind(1)
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            part_lse = scores.logsumexp(-1, keepdim=True)
            part = (scores - part_lse).exp() @ v
            total = torch.logaddexp(lse, part_lse)
            out, lse = out * (lse - total).exp() + part * (part_lse - total).exp(), total
            kv = coming.wait() if coming else kv
        ctx.save_for_backward(qkv, out, lse)
        ctx.ring = ring
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        ring, scale = ctx.ring, qkv.shape[-1] ** -0.5
        q, kv, grad = qkv[:, 0].transpose(0, 1), qkv[:, 1:].contiguous(), grad.transpose(0, 1)
        share = (grad * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(q)
        travelling: Any = None
        for step in range(ring.size):
            coming = shift(kv, ring, rows=len(kv)) if step < ring.size - 1 else None
            k, v = kv.transpose(0, 2).unbind(1)
            weights = (q @ k.transpose(1, 2) * scale - lse).exp()
            d_v = weights.transpose(1, 2) @ grad
            d_scores = weights * (grad @ v.transpose(1, 2) - share) * scale
            d_q += d_scores @ k
            d_kv = torch.stack([d_scores.transpose(1, 2) @ q, d_v], dim=1).transpose(0, 2)
            d_kv = d_kv if travelling is None else d_kv + travelling.wait()
            travelling = shift(d_kv, ring, rows=len(kv))
            kv = coming.wait() if coming else kv
        return torch.cat([d_q.transpose(0, 1)[:, None], travelling.wait()], dim=1), None


def inputs(work: Work) -> tuple[Tensor, Tensor]:
    """q, k, v [tokens, 3, heads, dim] and the gradient of the output [tokens, heads, dim]."""
    shape = (work.heads, work.dim)
    return (
        torch.randn(work.tokens, 3, *shape, generator=fold(0, "qkv")),
        torch.randn(work.tokens, *shape, generator=fold(0, "gradient")),
    )


def step(attend: Attend, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the output and the gradient of q, k, v."""
    leaf = qkv.detach().requires_grad_()
    out = attend(leaf)
    (d_qkv,) = torch.autograd.grad(out, leaf, grad)
    return out.detach(), d_qkv


def separate_step(attend: Callable[..., Tensor], qkv: list[Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same of q, k, v that are separate tensors [1, n, heads, dim]."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves)
    found = torch.autograd.grad(out, leaves, grad)
    return out.detach()[0], torch.stack([x[0] for x in found], dim=1)


class Scene:
    """One rank's part of the work on a layout, and what one process makes of the whole."""

    def __init__(self, work: Work, layout: Layout, mesh: ParallelMesh) -> None:
        self.work, self.mesh = work, build_mesh(layout, rank=mesh.world.rank)
        self.seq = SequenceShard(PackLayout((Clip(0, (1, 1, work.tokens)),)), self.mesh)
        self.qkv, self.grad = (self.mine(x).contiguous() for x in inputs(work))
        self.ours: Callable[[], tuple[Tensor, Tensor]] = partial(step, ours(self.seq), self.qkv, self.grad)

    def mine(self, whole: Tensor) -> Tensor:
        return self.seq.mine(whole, VISION)

    def theirs(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """DeepSpeed's Ulysses on the same tokens."""
        apart = [x.contiguous()[None] for x in self.qkv.unbind(1)]
        return partial(separate_step, deepspeed_ulysses(self.mesh.ulysses), apart, self.grad[None])

    def error(self, found: tuple[Tensor, Tensor]) -> float:
        """The largest difference of the output and of the gradients from those of one process, relative to their largest
        elements; on the worst rank."""
        expected = dict(zip(("out", "d_qkv"), step(local, *inputs(self.work))))
        scale = {name: x.abs().max().item() for name, x in expected.items()}
        apart = {n: (x - self.mine(expected[n])).abs().max().item() / scale[n] for n, x in zip(expected, found)}
        return max(gather_objects(max(apart.values()), self.mesh.world))


def difference(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], world: Axis) -> float:
    """The largest of two sides' outputs and gradients, on the worst rank."""
    pairs = [dict(zip(("out", "d_qkv"), side)) for side in (found, expected)]
    return max(gather_objects(worst_error(*pairs)[1], world))


def bench_ulysses(mesh: ParallelMesh, work: Work, timing: Timing) -> dict[str, Any]:
    """C1 on every rank of the mesh."""
    scene = Scene(work, Layout(ulysses=mesh.world.size), mesh)
    theirs = scene.theirs()
    # A rank's work without exchanges: all tokens with its share of the heads.
    share = even(work.heads, mesh.world.size)[0]
    qkv, grad = inputs(Work(work.tokens, share, work.dim))
    sides: dict[str, Callable[[], object]] = {"ours": scene.ours, "deepspeed": theirs}
    sides["local"] = partial(step, local, qkv, grad)
    agreement = difference(scene.ours(), theirs(), mesh.world)
    error = scene.error(scene.ours())
    times, undisturbed = interleaved_ranks(sides, mesh, timing)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    sent = {name: traffic_of(side, mesh.world.size) for name, side in (("ours", scene.ours), ("deepspeed", theirs))}
    return {
        "seconds": times,
        "median_seconds": medians,
        "traffic": sent,
        "overhead": {name: medians[name] / medians["local"] - 1 for name in ("ours", "deepspeed")},
        "undisturbed": undisturbed,
        "difference": agreement,
        "error": error,
    }


def ring_sides(mesh: ParallelMesh, work: Work) -> tuple[Scene, dict[str, Callable[[], tuple[Tensor, Tensor]]]]:
    scene = Scene(work, Layout(ring=mesh.world.size), mesh)

    def naive(qkv: Tensor) -> Tensor:
        return MatrixRing.apply(qkv, scene.mesh.ring)

    return scene, {"ours": scene.ours, "matrices": partial(step, naive, scene.qkv, scene.grad)}


def bench_ring(mesh: ParallelMesh, work: Work, timing: Timing) -> dict[str, Any]:
    """C2 on every rank of the mesh: times and errors."""
    scene, sides = ring_sides(mesh, work)
    errors = {name: scene.error(side()) for name, side in sides.items()}
    times, undisturbed = interleaved_ranks(sides, mesh, timing)
    return {
        **timed(times, undisturbed),
        "error": errors,
    }


def ring_peaks(mesh: ParallelMesh, work: Work) -> dict[str, int]:
    """C2: peak memory of forward and backward above the inputs, on the worst rank."""
    _, sides = ring_sides(mesh, work)
    return {name: peak_bytes(side, mesh.world) for name, side in sides.items()}


def bench_usp(mesh: ParallelMesh, work: Work) -> dict[str, Any]:
    """C3 on every rank of the mesh: the error, and bytes sent by a rank beside the formulas'."""
    ulysses, ring, ranks = 2, mesh.world.size // 2, mesh.world.size
    scene = Scene(work, Layout(ring=ring, ulysses=ulysses), mesh)
    scene.mesh.ledger.take()
    found = scene.ours()
    sent = {f"{axis} {operation}": traffic.bytes for (axis, operation), traffic in scene.mesh.ledger.take().items()}
    return {
        "error": scene.error(found),
        "bytes": sent,
        "formula": {
            "ulysses all_to_all": ulysses_bytes(work, ulysses=ulysses, ranks=ranks),
            "ring shift": ring_bytes(work, ring=ring, ulysses=ulysses),
        },
        "share_bytes": share_bytes(work, ulysses=ulysses, ranks=ranks),
    }


def bench_uneven(mesh: ParallelMesh, work: Work, timing: Timing) -> dict[str, Any]:
    """C5 on every rank of the mesh."""
    scene = Scene(work, Layout(ulysses=mesh.world.size), mesh)
    theirs = scene.theirs()
    agreement, error = difference(scene.ours(), theirs(), mesh.world), scene.error(scene.ours())
    sides = {"ours": scene.ours, "deepspeed": theirs}
    times, undisturbed = interleaved_ranks(sides, mesh, timing)
    return {
        "heads": gather_objects(scene.seq.to_heads(scene.qkv).wait().shape[-2], mesh.world),
        "error": error,
        "difference": agreement,
        **timed(times, undisturbed),
    }


def bench_parallel(*, tokens: int, timing: Timing, run: Callable[..., list[Any]] = run_ranks) -> dict[str, Any]:
    """All of them, ready for JSON; ``run`` starts the ranks."""
    work, uneven = Work(tokens), Work(tokens // 4, heads=30)
    result: dict[str, Any] = {"work": asdict(work), "uneven_work": asdict(uneven)}
    result["ulysses"] = run(bench_ulysses, 2, work, timing)[0]
    for ranks in (2, 4):
        result[f"ring {ranks}"] = run(bench_ring, ranks, work, timing)[0]
        result[f"ring {ranks}"]["peak_bytes"] = run(ring_peaks, ranks, work)[0]
    result["usp"] = run(bench_usp, 4, work)[0]
    result["uneven"] = run(bench_uneven, 4, uneven, timing)[0]
    result["undisturbed"] = all(found.get("undisturbed", True) for found in result.values() if isinstance(found, dict))
    return result


def rows(result: dict[str, Any]) -> list[Row]:
    found = [*ulysses_rows(result["ulysses"])]
    for ranks in (2, 4):
        found += ring_rows(result[f"ring {ranks}"], ranks)
    return found + usp_rows(result["usp"]) + uneven_rows(result["uneven"])


def judged(goal: float, found: dict[str, Any]) -> float | None:
    """A goal of times that other processes disturbed is not one."""
    return goal if found["undisturbed"] else None


def ulysses_rows(found: dict[str, Any]) -> list[Row]:
    what, peer = "Ulysses attention, forward and backward, 2 ranks", "DeepSpeed's DistributedAttention"
    overhead, seconds = found["overhead"], found["median_seconds"]
    calls = {name: sum(sent["calls"].values()) for name, sent in found["traffic"].items()}
    sent = {name: sum(sent["bytes"].values()) / 1e6 for name, sent in found["traffic"].items()}
    return [
        smaller("C1", f"{what}: time above the same attention without exchange vs {peer}", unit="%",
                ours=100 * overhead["ours"], peer=100 * overhead["deepspeed"], at_most=judged(0.6, found)),
        faster("C1", f"{what} vs {peer}", ours=seconds["ours"], peer=seconds["deepspeed"]),
        smaller("C1", f"{what}: exchanges vs {peer}", unit="", ours=calls["ours"], peer=calls["deepspeed"]),
        smaller("C1", f"{what}: bytes sent by a rank vs {peer}", unit="MB", ours=sent["ours"], peer=sent["deepspeed"]),
        Row("C1", f"{what}: largest relative difference from {peer}", "", found["difference"], at_most=1e-5),
        Row("C1", f"{what}: largest relative error against one process", "", found["error"], at_most=1e-5),
    ]  # fmt: skip


def ring_rows(found: dict[str, Any], ranks: int) -> list[Row]:
    what, peer = f"ring attention, forward and backward, {ranks} ranks", "a ring that makes the scores as matrices"
    seconds, peaks = found["median_seconds"], found["peak_bytes"]
    return [
        faster("C2", f"{what} vs {peer}", ours=seconds["ours"], peer=seconds["matrices"],
               at_least=judged(1.5, found)),
        smaller("C2", f"{what}: peak resident memory vs {peer}", unit="MB", ours=peaks["ours"] / 1e6,
                peer=peaks["matrices"] / 1e6, at_most=0.3),
        Row("C2", f"{what}: largest relative error against one process", "", found["error"]["ours"], at_most=1e-6),
    ]  # fmt: skip


def usp_rows(found: dict[str, Any]) -> list[Row]:
    what, bound = "Ulysses 2 x ring 2", {"at_least": 0.99, "at_most": 1.01}
    formulas = {"ulysses all_to_all": "8 (N_u - 1) / N_u / N X", "ring shift": "6 (N_r - 1) / N_r X / N_u"}
    return [
        Row("C3", f"{what}: largest relative error against one process", "", found["error"], at_most=1e-6),
        *(
            Row("C3", f"{what}: {name}, bytes sent by a rank vs {formula}", "MB", found["bytes"][name] / 1e6,
                found["formula"][name] / 1e6, found["bytes"][name] / found["formula"][name], **bound)
            for name, formula in formulas.items()
        ),
        Row("C3", f"{what}: of these, rowsum(grad * out) of the backward", "MB", found["share_bytes"] / 1e6),
    ]  # fmt: skip


def uneven_rows(found: dict[str, Any]) -> list[Row]:
    heads, seconds = found["heads"], found["median_seconds"]
    what, dealt = "Ulysses, 30 heads over 4 ranks", ", ".join(map(str, heads))
    return [
        Row("C5", f"{what}: largest relative error against one process", "", found["error"], at_most=1e-6),
        Row("C5", f"{what}: heads of the busiest rank over the mean ({dealt})", "",
            max(heads) * len(heads) / sum(heads), at_most=8 / 7.5),
        faster("C5", f"{what} vs DeepSpeed's uneven exchange", ours=seconds["ours"], peer=seconds["deepspeed"]),
        Row("C5", f"{what}: largest relative difference from DeepSpeed's", "", found["difference"]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the clip; C5 takes a quarter (default 2048)")
    parser.add_argument("--repeats", type=int, default=7, help="undisturbed runs of every side (default 7)")
    parser.add_argument("--limit", type=float, default=8.0, help="seconds to wait for them (default 8)")
    args = parser.parse_args()
    print(json.dumps(bench_parallel(tokens=args.tokens, timing=Timing(args.repeats, args.limit))))


if __name__ == "__main__":
    main()
