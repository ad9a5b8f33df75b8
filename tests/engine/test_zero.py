"""Every ZeRO stage, world size and recomputation computes the same run, and its state moves between them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import reduce_sum
from tests.engine.state import reader
from tests.ranks import run_ranks

PACKS, STEPS, SAVED = 4, 6, 3
Result = dict[str, Any]


def train_config(stage: int, recompute: str = "none", precision: str = "fp32") -> Train:
    return Train(
        steps=STEPS, learning_rate=1e-3, zero_stage=stage, precision=precision, clip_norm=0.5, ema_decay=0.9,
        recompute=recompute,
    )  # fmt: skip


def job(mesh: ParallelMesh, train: Train, resume: Result | None) -> Result:
    """Six steps of four packs (two clips each) on a tiny transformer; the state after three; losses and gradient norms."""
    config = tiny("cogvideox-5b")
    model = DiT(config, recompute=train.recompute)
    draw_parameters(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)  # opens the gates, so that every parameter has a gradient
    engine = Engine(model, train, mesh=mesh, micro_steps=PACKS // mesh.dp.size)
    if resume:
        engine.restore(reader(engine, resume), kinds=tuple(resume), step=SAVED)
    losses, norms, saved = [], [], {}
    for step in range(SAVED if resume else 0, STEPS):
        total = torch.zeros(())
        for micro in range(engine.micro_steps):
            loss = pack_loss(engine, config, step * PACKS + micro * mesh.dp.size + mesh.dp.rank)
            engine.backward(loss)
            engine.step(1e-3 * (step + 1) / STEPS)
            total += loss.detach()
        losses.append(reduce_sum(total, mesh.dp).item())
        norms.append(float(engine.grad_norm or 0))
        if step == SAVED - 1:
            saved = engine.full_state(step=step + 1)
    return {"losses": losses, "norms": norms, "saved": saved, "final": engine.full_state(step=STEPS)}


def pack_loss(engine: Engine, config: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    layout = PackLayout((Clip(5, (2, 3, 4)), Clip(6, (1, 2, 2))))
    vision = torch.randn(layout.vision, config.patch_features_in, generator=generator)
    text = torch.randn(11, config.text_dim, generator=generator)
    dtype = next(engine.model.parameters()).dtype
    velocity = engine.forward(
        vision.to(dtype), text.to(dtype), timestep=torch.tensor([100, 900]), seq=SequenceShard(layout)
    )
    return (velocity.float() - vision).square().sum() / (PACKS * vision.numel())


@pytest.fixture(scope="module")
def single() -> Result:
    return run_ranks(job, 1, train_config(0), None)[0]


def worst(found: Result, expected: Result, *, skip: int = 0) -> float:
    pairs = [*zip(found["losses"], expected["losses"][skip:]), *zip(found["norms"], expected["norms"][skip:])]
    assert len(pairs) == 2 * (STEPS - skip)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def weight_error(found: Result, expected: Result) -> float:
    return max(
        (found["final"][kind][name] - tensor).abs().max().item()
        for kind in ("weights", "ema")
        for name, tensor in expected["final"][kind].items()
    )


@pytest.mark.parametrize(("stage", "world"), [(2, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_every_stage_equals_a_plain_step_and_resumes_bitwise(single: Result, stage: int, world: int) -> None:
    train = train_config(stage)
    found = run_ranks(job, world, train, None)[0]
    assert worst(found, single) <= 1e-5
    assert weight_error(found, single) <= 1e-5
    again = run_ranks(job, world, train, found["saved"])[0]
    assert again["losses"] == found["losses"][SAVED:]
    assert again["norms"] == found["norms"][SAVED:]
    for kind, tensors in found["final"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again["final"][kind][name]), (kind, name)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_continues_on_another_world_size_and_stage(single: Result, stage: int) -> None:
    found = run_ranks(job, 4, train_config(stage), single["saved"])[0]
    assert worst(found, single, skip=SAVED) <= 1e-5


@pytest.mark.parametrize("recompute", get_args(Recompute)[1:])
def test_recomputation_under_stage_3_changes_nothing(single: Result, recompute: str) -> None:
    found = run_ranks(job, 2, train_config(3, recompute), None)[0]
    assert worst(found, single) <= 1e-5


@pytest.mark.parametrize(
    ("precision", "stage"), [("bf16", 2), *(pytest.param("bf16", stage, marks=pytest.mark.long) for stage in (1, 3))]
)
def test_half_precision_trains_and_resumes_bitwise(single: Result, precision: str, stage: int) -> None:
    train = train_config(stage, precision=precision)
    found = run_ranks(job, 2, train, None)[0]
    assert worst(found, single) <= 0.1
    again = run_ranks(job, 2, train, found["saved"])[0]
    assert again["losses"] == found["losses"][SAVED:]
