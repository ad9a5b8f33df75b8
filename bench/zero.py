"""C6: optimizer steps under ZeRO 1, 2 and 3 on 2 ranks over gloo against plain data parallelism.

    python -m bench.zero        # about 12 s on two quiet cores

A small transformer, float32, another clip on every rank, no clipping: three steps through ``engine.zero.Engine``, and three of
a loop that sums gradients by hand and steps the same AdamW. The losses are to be the same to the bit.

Bytes are those a rank sends in the third step, in units of the parameters' bytes, counted from torch's collectives as the
bandwidth-optimal algorithm would send them. The formula is that of ZeRO (Rajbhandari et al. 2020, sec. 7): gradients are
reduce-scattered and parameters gathered once, under stage 3 twice, (N - 1) / N of the parameters each: in 16 bits 4 or 6
bytes for a parameter as N grows, here, in float32 on 2 ranks, 2 or 3 times (N - 1) / N.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.ranks import run_ranks
from bench.record import Row, smaller
from bench.traffic import traffic_of
from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.optim import make_optimizer
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import reduce_sum
from cogvideo_dist.rng import fold

CONFIG = DiTConfig(layers=4, heads=4, head_dim=32, time_embed_dim=64, text_dim=64, text_length=16)
STEPS, ITEM, NEGLIGIBLE = 3, 4, 0.001
LET_GO = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
VARIANTS: dict[str, tuple[int, dict[str, int]]] = {
    "plain": (0, {}), "ZeRO 1": (1, {}), "ZeRO 2": (2, {}), "ZeRO 3": (3, {}),
    "ZeRO 3, parameters let go after use": (3, LET_GO),
}  # fmt: skip
"""Name -> stage and DeepSpeed's options beside the engine's. By default stage 3 lets nothing go before 1e9 parameters are here,
so a small model is gathered once and not twice; the last variant does what it does with a large one."""


def formula(stage: int, ranks: int) -> float:
    """Bytes sent by a rank in a step, in units of the parameters' bytes."""
    return (3 if stage == 3 else 2) * (ranks - 1) / ranks


def train_config(stage: int) -> Train:
    stages: Any = stage  # mypy takes an int for none of a Literal's
    return Train(steps=STEPS, learning_rate=1e-3, zero_stage=stages, precision="fp32", clip_norm=None, ema_decay=None)


def model_of(config: DiTConfig) -> DiT:
    model = DiT(config)
    draw_parameters(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # opens the gates, so that every parameter has a gradient
    return model


def loss_of(forward: Callable[..., Tensor], config: DiTConfig, *, sample: int, ranks: int) -> Tensor:
    """This rank's share of a step's loss."""
    layout = PackLayout((Clip(config.text_length, (2, 4, 6)),))
    vision = torch.randn(layout.vision, config.patch_features_in, generator=fold(0, "vision", sample))
    text = torch.randn(config.text_length, config.text_dim, generator=fold(0, "text", sample))
    velocity = forward(vision, text, timestep=torch.tensor([500]), seq=SequenceShard(layout))
    return (velocity - vision).square().sum() / (ranks * vision.numel())


Step = Callable[[int], Tensor]


def plain(mesh: ParallelMesh, config: DiTConfig) -> Step:
    """Every rank keeps all; gradients are summed by hand."""
    model = model_of(config)
    optimizer = make_optimizer(model, train_config(0))

    def step(index: int) -> Tensor:
        sample = index * mesh.dp.size + mesh.dp.rank
        loss = loss_of(model, config, sample=sample, ranks=mesh.dp.size)
        loss.backward()
        parameters = list(model.parameters())
        total = reduce_sum(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), mesh.dp)
        for parameter, grad in zip(parameters, total.split([p.numel() for p in parameters])):
            parameter.grad = grad.view_as(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def zero(mesh: ParallelMesh, config: DiTConfig, stage: int, options: Mapping[str, int]) -> Step:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from cogvideo_dist.engine import zero as engines

    def configured(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = derived(*args, **kwargs)
        found["zero_optimization"] |= options
        return found

    train, derived = train_config(stage), engines.deepspeed_config
    with mock.patch.object(engines, "deepspeed_config", configured):
        engine = engines.Engine(model_of(config), train, mesh=mesh, micro_steps=1)

    def step(index: int) -> Tensor:
        sample = index * mesh.dp.size + mesh.dp.rank
        loss = loss_of(engine.forward, config, sample=sample, ranks=mesh.dp.size)
        engine.backward(loss)
        engine.step(train.learning_rate)
        return loss.detach()

    return step


def three_steps(mesh: ParallelMesh, step: Step) -> dict[str, Any]:
    """The losses, and the traffic and seconds of the last step."""
    losses: list[Tensor] = []
    for index in range(STEPS - 1):
        losses.append(step(index))
    start = time.perf_counter()
    traffic = traffic_of(lambda: losses.append(step(STEPS - 1)), mesh.world.size)
    seconds = time.perf_counter() - start
    return {"losses": [reduce_sum(x, mesh.world).item() for x in losses], "traffic": traffic, "seconds": seconds}


def bench_variant(mesh: ParallelMesh, config: DiTConfig, variant: str) -> dict[str, Any]:
    """C6 on every rank of the mesh."""
    stage, options = VARIANTS[variant]
    return three_steps(mesh, zero(mesh, config, stage, options) if stage else plain(mesh, config))


def bench_zero(*, ranks: int = 2, config: DiTConfig = CONFIG) -> dict[str, Any]:
    """Ready for JSON. Every variant runs in processes of its own, for DeepSpeed keeps its groups."""
    return {
        "ranks": ranks,
        "parameters": sum(parameter.numel() for parameter in DiT(config).parameters()),
        "variants": {name: run_ranks(bench_variant, ranks, config, name)[0] for name in VARIANTS},
    }


def rows(result: dict[str, Any]) -> list[Row]:
    ranks, size, found = result["ranks"], ITEM * result["parameters"], []
    expected = result["variants"]["plain"]["losses"]
    for name, variant in result["variants"].items():
        if name == "plain":
            continue
        apart = max(abs(a - b) / abs(b) for a, b in zip(variant["losses"], expected))
        found.append(Row("C6", f"{name}: relative difference of {STEPS} losses from plain data parallelism", "", apart,
                         at_most=0.0))  # fmt: skip
        sent = {kind: count / size for kind, count in variant["traffic"]["bytes"].items()}
        parts = ", ".join(f"{kind} {share:.2f}" for kind, share in sent.items() if share > NEGLIGIBLE)
        what = f"{name}: bytes a rank sends per step and byte of parameters, fp32 ({parts}) vs ZeRO's formula"
        bound = formula(VARIANTS[name][0], ranks)
        # The sums of norms and overflow flags come on top.
        goal = 1 + NEGLIGIBLE
        found.append(smaller("C6", what, unit="", ours=sum(sent.values()), peer=bound, at_most=goal))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="of the data parallelism (default 2)")
    args = parser.parse_args()
    print(json.dumps(bench_zero(ranks=args.ranks)))


if __name__ == "__main__":
    main()
