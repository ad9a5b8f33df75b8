"""C4: one transformer block under tensor and sequence parallelism on 2 ranks of one thread each, over gloo.

    python -m bench.parallel_block [--tokens 2048] [--repeats 5]        # about 20 s on two quiet cores

Forward and backward of ``models.dit.Block``, hidden 512, 8 heads, float32, against torch's DTensor: a plain block of the same
mathematics under ColwiseParallel, RowwiseParallel and SequenceParallel. The peer has no clips or kinds of tokens, so the
pack is one clip without text, whose modulation the peer has as the affine of its norms and as two gates; the linear that
makes the modulation of the time embedding is left out of it and stays in ours, as do the sums of its gradients over ranks.

Bytes: ours by the ledger, the peer's from torch's collectives (``bench.traffic``). The formula, 10 (N - 1) / N X with X bytes
of one activation of all tokens, gathers the two inputs again in the backward for their weights' gradients, instead of
keeping them gathered as the peer does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from bench.measure import worst_error
from bench.ranks import Timing, interleaved_ranks, run_ranks, timed
from bench.record import Row, faster, smaller
from bench.traffic import traffic_of
from cogvideo_dist.models.dit import SPLITS, Block
from cogvideo_dist.models.embed import rope_table
from cogvideo_dist.models.init import normal
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import VISION, Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import gather_objects
from cogvideo_dist.rng import fold

CONFIG = DiTConfig(layers=1, heads=8, time_embed_dim=64)
ITEM, HEIGHT = 4, 8


class Gate(nn.Module):
    """x [n, d] * weight [d]"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class PlainBlock(nn.Module):
    """The block for one kind of tokens of one clip, as one would write it. Heads are outermost in ``qkv``, so that DTensor
    can divide them."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d, dim = config.hidden, config.head_dim
        self.dim = dim
        self.norm1, self.qkv = nn.LayerNorm(d, config.norm_eps), nn.Linear(d, 3 * d)
        self.norm_q, self.norm_k = (nn.LayerNorm(dim, config.head_norm_eps) for _ in range(2))
        self.out, self.gate1 = nn.Linear(d, d), Gate(d)
        self.norm2, self.ff1 = nn.LayerNorm(d, config.norm_eps), nn.Linear(d, 4 * d)
        self.ff2, self.gate2 = nn.Linear(4 * d, d), Gate(d)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x [n, d], rope [tokens, dim / 2] -> [n, d]"""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.dim)).unbind(2)
        q, k = rotated(self.norm_q(q), rope), rotated(self.norm_k(k), rope)
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v)[0]
        x = x + self.gate1(self.out(heads.transpose(0, 1).flatten(1)))
        return x + self.gate2(self.ff2(F.gelu(self.ff1(self.norm2(x)), approximate="tanh")))


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2)


def plan() -> dict[str, Any]:
    """How DTensor divides the plain block: rows between the linears, heads and features within."""
    rows = {name: SequenceParallel(sequence_dim=0) for name in ("norm1", "norm2")}
    heads = {name: SequenceParallel(sequence_dim=1, use_local_output=True) for name in ("norm_q", "norm_k")}
    gates = {name: SequenceParallel(sequence_dim=0, use_local_output=True) for name in ("gate1", "gate2")}
    spread = {name: ColwiseParallel(input_layouts=Shard(0)) for name in ("qkv", "ff1")}
    joined = {name: RowwiseParallel(output_layouts=Shard(0)) for name in ("out", "ff2")}
    return rows | heads | gates | spread | joined


def whole_block(config: DiTConfig) -> Block:
    """With every parameter random."""
    block = Block(config, "none", Axis("tp"))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            center = 1.0 if name.startswith("norm") and name.endswith("weight") else 0.0
            parameter.copy_(center + normal(0.05)(parameter.shape, fold(0, "parameter", name)))
    return block


def sliced_block(whole: Block, tp: Axis) -> Block:
    """This rank's part of it."""
    block = Block(whole.config, "none", tp)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(own_slice(name, whole.get_parameter(name), tp))
    return block


def own_slice(name: str, value: Tensor, tp: Axis) -> Tensor:
    leaf, _, kind = name.rpartition(".")
    split = SPLITS.get((leaf, kind))
    return split.slice(value, tp) if split else value


def heads_outermost(qkv: Tensor, config: DiTConfig) -> Tensor:
    """Rows of q, k, v, each of all heads -> q, k, v of each head; weight [3 * d, d] or bias [3 * d]."""
    return qkv.unflatten(0, (3, config.heads, config.head_dim)).transpose(0, 1).flatten(0, 2)


def plain_of(whole: Block, condition: Tensor) -> PlainBlock:
    """The same function of vision tokens as a plain block."""
    plain = PlainBlock(whole.config)
    (weight1, bias1, gate1, weight2, bias2, gate2), *_ = whole._entered(condition)
    state = {name: value for name, value in whole.state_dict().items() if name in plain.state_dict()}
    state |= {
        f"qkv.{kind}": heads_outermost(whole.qkv.get_parameter(kind), whole.config) for kind in ("weight", "bias")
    }
    modulation = {
        "norm1.weight": weight1, "norm1.bias": bias1, "gate1.weight": gate1,
        "norm2.weight": weight2, "norm2.bias": bias2, "gate2.weight": gate2,
    }  # fmt: skip
    plain.load_state_dict(state | {name: rows[VISION].detach() for name, rows in modulation.items()})
    return plain


COMPARED = ("qkv.weight", "qkv.bias", "norm_q.weight", "norm_k.bias", "out.weight", "out.bias", "ff1.weight",
            "ff1.bias", "ff2.weight", "ff2.bias")  # fmt: skip
"""Parameters whose gradients both sides have, by name; those of the modulation come together in ``x``."""


class Scene:
    """Both sides on this rank, and the whole block on one."""

    def __init__(self, mesh: ParallelMesh, config: DiTConfig, tokens: int) -> None:
        self.config, self.tokens = config, tokens
        self.mesh = build_mesh(Layout(tp=mesh.world.size), rank=mesh.world.rank)
        self.layout = PackLayout((Clip(0, (1, HEIGHT, tokens // HEIGHT)),))
        self.seq = SequenceShard(self.layout, self.mesh)
        self.x, self.grad = (torch.randn(tokens, config.hidden, generator=fold(0, name)) for name in ("x", "grad"))
        self.condition = torch.randn(1, config.time_embed_dim, generator=fold(0, "condition"))
        self.rope = rope_table(
            config, self.layout.clips, spans=self.seq.heard, device=self.x.device, dtype=self.x.dtype
        )
        self.whole = whole_block(config)
        self.block = sliced_block(self.whole, self.mesh.tp)
        peer = plain_of(self.whole, self.condition)
        self.peer = parallelize_module(peer, init_device_mesh("cpu", (mesh.world.size,)), plan())
        self.own = self.mine(self.x).contiguous()
        self.own_grad = self.mine(self.grad).contiguous()

    def mine(self, whole: Tensor) -> Tensor:
        return self.seq.mine(whole, VISION)

    def ours(self) -> dict[str, Tensor]:
        return step(self.block, self.own, self.own_grad, (self.condition, self.rope, self.seq))

    def theirs(self) -> dict[str, Tensor]:
        return step(self.peer, self.own, self.own_grad, (self.rope,))

    def single(self) -> dict[str, Tensor]:
        """The whole block in one process; what of it belongs to this rank."""
        found = step(self.whole, self.x, self.grad, (self.condition, self.rope, SequenceShard(self.layout)))
        rows = {name: self.mine(found[name]) for name in ("y", "d_x")}
        return {name: own_slice(name, value, self.mesh.tp) for name, value in found.items()} | rows

    def peer_gradients(self, found: dict[str, Any]) -> dict[str, Tensor]:
        """The peer's results by our names and in our order."""
        whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}
        heads = (self.config.heads, 3, self.config.head_dim)
        for name in ("qkv.weight", "qkv.bias"):
            whole[name] = whole[name].unflatten(0, heads).transpose(0, 1).flatten(0, 2)
        return {name: own_slice(name, value, self.mesh.tp) for name, value in whole.items()}

    def error(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
        """The worst of output and gradients, on the worst rank."""
        names = ("y", "d_x", *COMPARED)
        worst = worst_error({n: found[n] for n in names}, {n: expected[n] for n in names})
        return max(gather_objects(worst, self.mesh.world), key=lambda item: item[1])


def step(module: nn.Module, x: Tensor, grad: Tensor, rest: tuple[Any, ...]) -> dict[str, Any]:
    """Forward and backward with fresh gradients: output, gradient of x and of every parameter."""
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    y = module(leaf, *rest)
    y.backward(grad)
    return {"y": y.detach(), "d_x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}


def formula_bytes(config: DiTConfig, *, tokens: int, ranks: int) -> float:
    """Megatron's sequence parallelism: 10 (N - 1) / N X sent by a rank."""
    return 10 * (ranks - 1) / ranks * tokens * config.hidden * ITEM


def bench_block(mesh: ParallelMesh, config: DiTConfig, tokens: int, timing: Timing) -> dict[str, Any]:
    """C4 on every rank of the mesh."""
    scene = Scene(mesh, config, tokens)
    expected = scene.single()
    errors = {
        "ours": scene.error(scene.ours(), expected),
        "dtensor": scene.error(scene.peer_gradients(scene.theirs()), expected),
    }
    scene.mesh.ledger.take()
    scene.ours()
    sent = {operation: traffic.bytes for (_, operation), traffic in scene.mesh.ledger.take().items()}
    peer_sent = traffic_of(scene.theirs, mesh.world.size)["bytes"]
    sides: dict[str, Callable[[], object]] = {"ours": scene.ours, "dtensor": scene.theirs}
    times, undisturbed = interleaved_ranks(sides, mesh, timing)
    return {
        **timed(times, undisturbed),
        "error": errors,
        "bytes": sent,
        "peer_bytes": peer_sent,
        "formula": formula_bytes(config, tokens=tokens, ranks=mesh.world.size),
    }


def rows(result: dict[str, Any]) -> list[Row]:
    seconds, sent, peer_sent = result["median_seconds"], result["bytes"], result["peer_bytes"]
    activations = (sent["gather"] + sent["scatter_sum"]) / 1e6
    what = "transformer block under tensor and sequence parallelism (one kind of tokens), 2 ranks"
    judged = 1.0 if result["undisturbed"] else None
    return [
        faster("C4", f"{what} vs DTensor", ours=seconds["ours"], peer=seconds["dtensor"], at_least=judged),
        smaller("C4", f"{what}: rows sent by a rank vs 10 (N - 1) / N X", unit="MB", ours=activations,
                peer=result["formula"] / 1e6, at_most=1.0),
        smaller("C4", f"{what}: all that a rank sends vs DTensor, which keeps the gathered rows", unit="MB",
                ours=sum(sent.values()) / 1e6, peer=sum(peer_sent.values()) / 1e6),
        Row("C4", f"{what}: worst relative error ({result['error']['ours'][0]}) against one process", "",
            result["error"]["ours"][1], at_most=1e-5),
        Row("C4", f"the same of DTensor ({result['error']['dtensor'][0]})", "", result["error"]["dtensor"][1]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help=f"of the clip, a multiple of {HEIGHT} (default 2048)")
    parser.add_argument("--repeats", type=int, default=5, help="undisturbed runs of every side (default 5)")
    parser.add_argument("--limit", type=float, default=8.0, help="seconds to wait for them (default 8)")
    args = parser.parse_args()
    print(json.dumps(run_ranks(bench_block, 2, CONFIG, args.tokens, Timing(args.repeats, args.limit))[0]))


if __name__ == "__main__":
    main()
