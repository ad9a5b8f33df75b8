"""The video task against plain computations, clip by clip."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.diffusion.timesteps import stratified_timesteps, uniform_timesteps
from cogvideo_dist.engine.lineage import Lineage
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.protocols import Batch
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.video import FrozenModels, VideoTask
from launch.beginning import base_model
from launch.compose import RankData, TransformerGeometry, load_frozen
from tests.launch.world import World

CPU = torch.device("cpu")
SEED = 5


def mesh(rank: int, size: int) -> ParallelMesh:
    axis = Axis("dp", rank, size, tuple(range(size)))
    return ParallelMesh(dp=axis, replica=axis, world=axis)


def data(config: DiTRun, rank: int = 0, size: int = 1) -> RankData:
    geometry = TransformerGeometry(config.model.transformer())
    return RankData(config.data, run=config.run, geometry=geometry, mesh=mesh(rank, size))


def batches(config: DiTRun, step: int, *, rank: int = 0, size: int = 1) -> list[Batch]:
    """Everything that one rank works on in one step."""
    return list(islice(data(config, rank, size).iterate(step), config.data.packs_per_step // size))


@pytest.fixture(scope="module")
def config(world: World) -> DiTRun:
    return world.config(world.root / "x", "diffusion.text_dropout=0.5")


@pytest.fixture(scope="module")
def model(config: DiTRun) -> DiT:
    """With open gates, so that every token's loss depends on its text and timestep."""
    model, _ = base_model(config, Lineage())
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=fold(index)) * 0.1)
    return model


@pytest.fixture(scope="module")
def frozen(config: DiTRun) -> FrozenModels:
    return load_frozen(config, device=CPU, records=[], pictures=False)


def make(config: DiTRun, model: DiT, frozen: FrozenModels, seed: int = SEED) -> VideoTask:
    return VideoTask(model, frozen, diffusion=config.diffusion, validation=config.validation, seed=seed)


@pytest.fixture
def task(config: DiTRun, model: DiT, frozen: FrozenModels) -> VideoTask:
    return make(config, model, frozen)


def plain_errors(config: DiTRun, task: VideoTask, step: int) -> tuple[Tensor, Tensor]:
    """(sum of squared velocity errors, number of latent elements) of every clip of a step, one forward each."""
    vae, text = task.frozen.vae, task.frozen.text
    assert vae is not None
    assert text is not None
    in_order = sorted(batches(config, step), key=lambda batch: batch.first)
    samples = [sample for batch in in_order for sample in batch.samples]
    errors, counts = [], []
    with torch.no_grad():
        for sample, timestep in zip(samples, stratified_timesteps(SEED, step, clips=len(samples))):
            ids = (sample.slot.epoch, sample.slot.index)
            assert sample.pixels is not None
            posterior = vae.encode(sample.pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1)
            latent = 0.7 * posterior.sample(fold(SEED, "posterior", *ids)).transpose(1, 2)
            noise = torch.randn(latent.shape[1:], generator=fold(SEED, "noise", *ids))[None]
            kept = torch.rand((), generator=fold(SEED, "text dropout", *ids)) >= 0.5
            a, s = task.schedule.coefficients(torch.tensor(timestep))
            velocity = task.model.denoise(
                a * latent + s * noise, text.encode([sample.caption]) * kept, torch.tensor([timestep])
            )
            errors.append((velocity - (a * noise - s * latent)).square().sum())
            counts.append(latent.numel())
    return torch.stack(errors), torch.tensor(counts)


@pytest.mark.parametrize("step", [0, 7])
def test_the_loss_is_the_mean_squared_velocity_error_of_the_step(config: DiTRun, task: VideoTask, step: int) -> None:
    errors, counts = plain_errors(config, task, step)
    assert len(counts.unique()) == 2, "clips and images"
    found = sum(task.loss(task.model, batch).total.detach() for batch in batches(config, step))
    assert float(found) == pytest.approx(float(errors.sum() / counts.sum()), rel=1e-5)


def test_weighting_by_clip_counts_every_clip_alike(config: DiTRun, model: DiT, frozen: FrozenModels) -> None:
    by_clip = replace(config, diffusion=replace(config.diffusion, weighting="clip"))
    task = make(by_clip, model, frozen)
    errors, counts = plain_errors(config, task, 0)
    found = sum(task.loss(task.model, batch).total.detach() for batch in batches(config, 0))
    assert float(found) == pytest.approx(float((errors / counts).mean()), rel=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_the_loss_and_its_gradient_are_the_same_however_packs_are_dealt(
    config: DiTRun, task: VideoTask, size: int
) -> None:
    results = []
    for ranks in (1, size):
        torch.manual_seed(ranks)  # plays no part
        task.model.zero_grad()
        total = 0.0
        for rank in reversed(range(ranks)):
            for batch in batches(config, 3, rank=rank, size=ranks):
                loss = task.loss(task.model, batch)
                loss.total.backward()
                total += float(loss.total.detach())
        results.append(
            (total, {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None})
        )
    (alone, gradients), (dealt, others) = results
    assert dealt == pytest.approx(alone, rel=1e-6)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).abs().max() <= 1e-6 * scale, name


def test_metrics_add_up_to_the_mean_error(config: DiTRun, task: VideoTask) -> None:
    errors, counts = plain_errors(config, task, 0)
    metrics = [task.loss(task.model, batch).metrics for batch in batches(config, 0)]
    value, weight = (sum(float(pair[i]) for found in metrics for pair in found.values()) for i in range(2))
    assert weight == len(counts)
    assert value == pytest.approx(float((errors / counts).sum()), rel=1e-5)


def test_what_is_drawn_changes_with_seed_step_and_visit_alone(config: DiTRun, model: DiT, frozen: FrozenModels) -> None:
    (batch, *_) = batches(config, 0)
    loss = float(make(config, model, frozen).loss(model, batch).total.detach())
    assert float(make(config, model, frozen).loss(model, batch).total.detach()) == loss
    assert float(make(config, model, frozen, seed=6).loss(model, batch).total.detach()) != loss
    later = replace(batch, plan=replace(batch.plan, step=1))
    assert float(make(config, model, frozen).loss(model, later).total.detach()) != loss
    again = replace(batch, samples=tuple(replace(s, slot=replace(s.slot, epoch=9)) for s in batch.samples))
    assert float(make(config, model, frozen).loss(model, again).total.detach()) != loss


def test_timesteps_of_a_step_cover_every_stratum(config: DiTRun, task: VideoTask) -> None:
    (batch, *_) = batches(config, 0)
    drawn = stratified_timesteps(SEED, 0, clips=batch.plan.clips)
    assert sorted(t * batch.plan.clips // 1000 for t in drawn) == list(range(batch.plan.clips))
    assert uniform_timesteps(SEED, 0, clips=batch.plan.clips) != drawn


def test_dropped_captions_are_zeros_at_the_configured_rate(config: DiTRun, task: VideoTask) -> None:
    (batch, *_) = batches(config, 0)
    dropped = 0
    for epoch in range(200):
        samples = tuple(replace(s, slot=replace(s.slot, epoch=epoch), text=torch.ones(4, 3)) for s in batch.samples[:2])
        features = task._text(samples, dropout=True).unflatten(0, (2, 4))
        kept = features.flatten(1).any(1)
        assert features[kept].eq(1).all()
        dropped += int((~kept).sum())
        assert task._text(samples, dropout=False).eq(1).all()
    assert abs(dropped / 400 - 0.5) < 4 * 0.5 / 20


def test_held_out_losses_are_those_of_the_posteriors_mode_and_never_change(
    world: World, config: DiTRun, model: DiT, frozen: FrozenModels
) -> None:
    tasks = make(config, model, frozen), make(config, model, frozen, seed=99)
    found = []
    for task in tasks:
        ((batch, weight),) = data(config).held_out()
        assert weight == 1
        found.append({name: float(value / count) for name, (value, count) in task.held_out_loss(model, batch).items()})
    assert found[0] == found[1]
    vae, text = frozen.vae, frozen.text
    assert vae is not None
    assert text is not None
    losses = []
    with torch.no_grad():
        for sample in batch.samples:
            assert sample.pixels is not None
            latent = 0.7 * vae.encode(sample.pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1).mean.transpose(1, 2)
            for t in config.validation.timesteps:
                noise = torch.randn(latent.shape[1:], generator=fold(0, "held out", sample.key, t))[None]
                a, s = task.schedule.coefficients(torch.tensor(t))
                velocity = model.denoise(a * latent + s * noise, text.encode([sample.caption]), torch.tensor([t]))
                losses.append(float((velocity - (a * noise - s * latent)).square().mean()))
    assert found[0]["held_out/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_long_captions_are_noticed_once(config: DiTRun, task: VideoTask) -> None:
    (batch, *_) = batches(config, 0)
    long = replace(batch.samples[0], caption="clip " * 200)
    for _ in range(2):
        task._features((long, *batch.samples[1:]))
    (notice,) = task.notices()
    assert (notice.key, notice.source, notice.replaced_by) == (long.key, long.source, None)
    assert notice.reason.startswith("caption of ")
    assert task.notices() == []


@pytest.mark.parametrize("lacking", ["vae", "text"])
def test_a_missing_encoder_is_named(config: DiTRun, model: DiT, frozen: FrozenModels, lacking: str) -> None:
    (batch, *_) = batches(config, 0)
    with pytest.raises(ValueError, match=rf"has no frozen.{lacking} to make them"):
        make(config, model, replace(frozen, **{lacking: None})).loss(model, batch)
    with pytest.raises(ValueError, match=r"needs frozen.vae and frozen.text"):
        make(config, model, replace(frozen, **{lacking: None})).pictures(model)


class PlainBlock(nn.Module):
    """The products of a layer in plain torch: what a count of operations should count."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ff1, self.ff2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        parts = zip(*(tensor.split(lengths, dim=1) for tensor in (q, k, v)))
        joined = torch.cat([F.scaled_dot_product_attention(*(p[None] for p in part))[0] for part in parts], dim=1)
        x = x + self.out(joined.transpose(0, 1).flatten(1))
        return x + self.ff2(F.gelu(self.ff1(x)))


def test_the_count_of_operations_is_that_of_a_plain_stack(config: DiTRun, frozen: FrozenModels) -> None:
    shape = replace(tiny("cogvideox-5b"), layers=3, heads=4)
    task = make(config, DiT(shape), frozen)
    layout = PackLayout((Clip(6, (3, 6, 8)), Clip(6, (1, 6, 8)), Clip(6, (1, 6, 8))))
    blocks = [PlainBlock(shape.hidden, shape.heads) for _ in range(shape.layers)]
    x = torch.randn(layout.tokens, shape.hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = x
        for block in blocks:
            y = block(y, layout.lengths)
        y.sum().backward()
    assert task.flops(layout) == pytest.approx(counter.get_total_flops(), rel=0.01)
