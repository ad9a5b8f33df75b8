"""DeepSpeed over every kind of layout: AdamW steps with clipping, accumulation and EMA equal those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import DiTConfig, tiny
from cogvideo_dist.pack.layout import TEXT, VISION, Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import gather_objects, reduce_sum
from cogvideo_dist.parallel.split import full_shape, own_slice, split_of
from tests.parallel.layouts import whole_parameter
from tests.ranks import run_ranks

STEPS, PACKS = 3, 4
LAYOUT = PackLayout((Clip(5, (3, 3, 4)), Clip(6, (1, 2, 2)), Clip(0, (1, 1, 1))))
MIXED = (
    Layout(ulysses=2, ring=2), Layout(ulysses=2, tp=2), Layout(ring=2, tp=2),
)  # fmt: skip
PLAIN = [
    pytest.param(layout, marks=pytest.mark.long)
    for layout in (
        Layout(dp=2, tp=2),
        Layout(tp=4),
        Layout(ulysses=4),
        Layout(dp=2, ring=2),
        Layout(ring=4),
        Layout(dp=2, ulysses=2),
    )
]
Result = dict[str, Any]


def train_config(stage: int, precision: str) -> Train:
    return Train(steps=STEPS, learning_rate=1e-3, zero_stage=stage, precision=precision, clip_norm=0.5, ema_decay=0.9)


def config() -> DiTConfig:
    return replace(tiny("cogvideox-5b"), heads=4)


def steps(mesh: ParallelMesh, layout: Layout, stages: tuple[int, ...], precision: str = "fp32") -> dict[int, Result]:
    mesh = build_mesh(layout, rank=mesh.world.rank)
    return {stage: three_steps(mesh, train_config(stage, precision)) for stage in stages}


def three_steps(mesh: ParallelMesh, train: Train) -> Result:
    """Losses, gradient norms, the whole state, and whether what tp ranks hold alike is still bitwise alike."""
    model = DiT(config(), tp=mesh.tp)
    with torch.no_grad():  # every parameter random, so that no gradient vanishes
        for name, parameter in model.named_parameters():
            whole = whole_parameter(name, full_shape(model, name, parameter.shape))
            parameter.copy_(own_slice(model, name, whole))
    engine = Engine(model, train, mesh=mesh, micro_steps=PACKS // mesh.dp.size)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(engine.micro_steps):
            loss = pack_loss(engine, mesh, seed=step * PACKS + micro * mesh.dp.size + mesh.dp.rank)
            engine.backward(loss)
            engine.step(1e-3 * (step + 1) / STEPS)
            total += loss.detach()
        losses.append(reduce_sum(total, mesh.world).item())
        norms.append(float(engine.grad_norm or 0))
    return {"losses": losses, "norms": norms, "state": engine.full_state(step=STEPS), "drift": drift(engine, mesh)}


def pack_loss(engine: Engine, mesh: ParallelMesh, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = config().patch_features_in
    vision = torch.randn(LAYOUT.vision, features, generator=generator)
    text = torch.randn(sum(clip.text for clip in LAYOUT.clips), config().text_dim, generator=generator)
    seq = SequenceShard(LAYOUT, mesh)
    mine, dtype = seq.mine(vision, VISION), next(engine.model.parameters()).dtype
    velocity = engine.forward(
        mine.to(dtype), seq.mine(text, TEXT).to(dtype), timestep=torch.tensor([100, 900, 400]), seq=seq
    )
    return (velocity.float() - mine).square().sum() / (PACKS * vision.numel())


def drift(engine: Engine, mesh: ParallelMesh) -> list[str]:
    """Parameters that tp ranks hold alike and that differ between them."""
    own = {
        name: engine._read(p, "weights").detach().flatten().tolist()
        for name, p in engine.names.items()
        if not split_of(engine.model, name)
    }
    everyone = gather_objects(own, mesh.tp)
    return [name for name in own if any(other[name] != own[name] for other in everyone)]


@pytest.fixture(scope="module")
def single() -> Result:
    return run_ranks(steps, 1, Layout(), (0,))[0][0]


@pytest.mark.parametrize("layout", [*MIXED, *PLAIN], ids=lambda layout: layout.name)
def test_weights_after_three_steps_are_those_of_one_process(single: Result, layout: Layout) -> None:
    stages = (0, 1, 2, 3)
    for rank, results in enumerate(run_ranks(steps, layout.world, layout, stages)):
        for stage, found in results.items():
            assert found["losses"] == pytest.approx(single["losses"], rel=1e-6), stage
            assert found["norms"] == pytest.approx(single["norms"], rel=1e-5), stage
            assert found["drift"] == [], stage
            for kind, tensors in single["state"].items() if rank == 0 else ():
                for name, expected in tensors.items():
                    error = (found["state"][kind][name] - expected).abs().max() / expected.abs().max()
                    assert error <= 1e-6 or kind.startswith("exp"), (stage, kind, name, float(error))


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=pytest.mark.long) for layout in (Layout(ulysses=2, tp=2), Layout(ring=2, tp=2))],
    ids=lambda layout: layout.name,
)
def test_half_precision_under_a_layout_is_near_and_does_not_drift(layout: Layout) -> None:
    single = run_ranks(steps, 1, Layout(), (1,), "bf16")[0][1]
    for results in run_ranks(steps, layout.world, layout, (1, 2, 3), "bf16"):
        for stage, found in results.items():
            assert found["losses"] == pytest.approx(single["losses"], rel=2e-3), stage
            assert found["norms"] == pytest.approx(single["norms"], rel=1e-2), stage
            assert found["drift"] == [], stage
