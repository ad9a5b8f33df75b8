"""The autoencoder's task against plain computations."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from cogvideo_dist.config.autoencoder import CriticLoss, PerceptualLoss, VAELoss
from cogvideo_dist.config.schema import Data, Run, Train
from cogvideo_dist.models.critic import Critic, CriticConfig
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.perceptual import Perceptual
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import reduce_sum
from cogvideo_dist.protocols import Batch, Learner
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.vae import Judges, VAETask
from launch.compose import LatentGeometry, RankData
from tests.launch.world import World
from tests.ranks import run_ranks

TRAIN = Train(steps=10, learning_rate=1e-3)


def batches(world: World, step: int, *, rank: int = 0, size: int = 1) -> list[Batch]:
    axis = Axis("dp", rank, size)
    settings = Data(
        "pixels", ((9, 32, 32), (1, 32, 32)), 8.0, tokens_per_pack=80, packs_per_step=2, shards=str(world.root / "shards"),
        held_out=2, workers=0,
    )  # fmt: skip
    data = RankData(
        settings, run=Run(str(world.root), seed=1), geometry=LatentGeometry(),
        mesh=ParallelMesh(dp=axis, replica=axis, world=axis),
    )  # fmt: skip
    if step < 0:
        return [batch for batch, _ in data.held_out()]
    return list(islice(data.iterate(step), 2 // size))


@pytest.fixture(scope="module")
def model() -> VAE:
    vae = VAE(VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2))
    draw_parameters(vae, 3)
    return vae


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_loss_is_the_mean_error_of_the_steps_pixels_and_the_kl(world: World, model: VAE, kind: str) -> None:
    task = VAETask(model, VAELoss(reconstruction=kind, kl_weight=0.01), seed=1, fps=8)  # type: ignore[arg-type]
    total, pixels = 0.0, 0
    with torch.no_grad():
        for sample in (sample for batch in batches(world, 2) for sample in batch.samples):
            assert sample.pixels is not None
            video = sample.pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1
            posterior = model.encode(video)
            z = posterior.sample(fold(1, "posterior", sample.slot.epoch, sample.slot.index))
            error = model.decode(z) - video
            total += float((error.abs() if kind == "l1" else error.square()).sum() + 0.01 * posterior.kl().sum())
            pixels += video.numel()
    found = sum(float(task.loss(model, batch).total.detach()) for batch in batches(world, 2))
    assert found == pytest.approx(total / pixels, rel=1e-5)
    dealt = sum(
        float(task.loss(model, b).total.detach()) for rank in (1, 0) for b in batches(world, 2, rank=rank, size=2)
    )
    assert dealt == pytest.approx(found, rel=1e-6)


def test_held_out_psnr_is_that_of_the_modes_reconstruction(world: World, model: VAE) -> None:
    task = VAETask(model, VAELoss(), seed=1, fps=8)
    psnr = []
    with torch.no_grad():
        for sample in (sample for batch in batches(world, -1) for sample in batch.samples):
            assert sample.pixels is not None
            video = sample.pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1
            # in 0..1 of brightness, by frame, of what is shown
            output = model.decode(model.encode(video).mode()).clamp(-1, 1)
            psnr += (-10 * torch.log10(((output - video) / 2).square().mean((0, 1, 3, 4)))).tolist()
    found = [task.held_out_loss(model, batch)["held_out/psnr"] for batch in batches(world, -1)]
    assert sum(float(v) for v, _ in found) / sum(int(n) for _, n in found) == pytest.approx(
        sum(psnr) / len(psnr), rel=1e-5
    )
    pictures = task.pictures(model)
    assert [picture.frames.shape[2] for picture in pictures] == [96] * len(pictures)
    original, reconstruction, error = (f.int() for f in pictures[0].frames.split(32, dim=2))
    # where it does not saturate, to the rounding of each
    expected = 4 * (original - reconstruction).abs()
    assert ((error - expected).abs() <= 4)[expected < 250].all()


def test_operations_grow_with_the_clip(model: VAE, world: World) -> None:
    task = VAETask(model, VAELoss(), seed=1, fps=8)
    (batch, *_) = batches(world, 0)
    single = [task.flops(type(batch.layout)((clip,))) for clip in batch.layout.clips]
    assert task.flops(batch.layout) == pytest.approx(sum(single))
    assert task.flops(batch.layout) > 1e6


LOSS = VAELoss(
    kl_weight=0.01,
    perceptual=PerceptualLoss("random", net="squeeze", weight=0.3),
    critic=CriticLoss(2, 1e-3, weight=0.4, channels=(4, 6), r1_weight=10.0, r1_every=3),
)
"""With a critic from step 2 on, which pays its penalty in steps 2, 5, ..."""


def judged_task(model: VAE, cp: Axis | None = None) -> VAETask:
    critic = Critic(CriticConfig(channels=(4, 6)))
    draw_parameters(critic, 3)
    judges = Judges(Perceptual("squeeze", weights="random").double(), critic.double())
    return VAETask(model.double(), LOSS, seed=1, fps=8, cp=cp, judges=judges)


def learn(task: VAETask, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Every gradient of the packs by name and their losses, the autoencoder's and the critic's."""
    totals = {"autoencoder": torch.zeros((), dtype=torch.float64), "critic": torch.zeros((), dtype=torch.float64)}
    learners = {"autoencoder": Learner("", task.model, TRAIN, task.loss), "critic": task.rivals(TRAIN)[0]}
    metrics: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, learner in learners.items():
            loss = learner.loss(learner.model, batch)
            loss.total.backward()
            totals[name] += loss.total.detach()
            for key, (value, count) in loss.metrics.items():
                metrics[key] = metrics.get(key, torch.zeros(2)) + torch.tensor([float(value), float(count)])
    found = totals | metrics
    for name, learner in learners.items():
        found |= {f"{name}.{key}": p.grad for key, p in learner.model.named_parameters() if p.grad is not None}
        learner.model.zero_grad()
    return found


def small() -> VAE:
    vae = VAE(VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2))
    draw_parameters(vae, 3)
    return vae


def test_the_step_with_a_critic_is_a_plain_computation(world: World) -> None:
    """Lambda, losses, penalty and gradients of one pack by two backwards, from what the models say."""
    (batch, *_) = batches(world, 2)
    task = judged_task(small())
    found = learn(task, [batch])
    vae, critic, perceptual = task.model, task.adversary.critic, task.perceptual  # type: ignore[union-attr]
    pixels = frames = logits = 0
    for pack in batch.plan.packs:
        for slot in pack:
            pixels += 3 * slot.size[0] * slot.size[1] * slot.size[2]
            frames += slot.size[0]
            logits += slot.size[0] * 16 * 16
    near = far = kl = hinge = penalty = torch.zeros((), dtype=torch.float64)
    for sample in batch.samples:
        video = sample.pixels.permute(3, 0, 1, 2)[None].double() / 127.5 - 1  # type: ignore[union-attr]
        posterior = vae.encode(video)
        output = vae.decode(posterior.sample(fold(1, "posterior", sample.slot.epoch, sample.slot.index)))
        near = near + (output - video).abs().sum() / pixels + 0.3 * perceptual(output, video).sum() / frames
        far = far - critic(output).sum() / logits
        kl = kl + 0.01 * posterior.kl().sum() / pixels
        video = video.detach().clone().requires_grad_()
        real = critic(video)
        hinge = hinge + ((1 - real).relu().sum() + (1 + critic(output.detach())).relu().sum()) / (2 * logits)
        (slope,) = torch.autograd.grad(real.sum(), video, create_graph=True)
        penalty = penalty + 5.0 * 3 * slope.square().sum() / pixels
    names, parameters = zip(*vae.named_parameters())
    slopes = [
        dict(
            zip(names, torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))
        )
        for x in (near, far, kl)
    ]
    last = "decoder.conv_out.weight"
    balance = slopes[0][last].norm() / slopes[1][last].norm()
    total = near + 0.4 * balance * far + kl
    torch.testing.assert_close(found["autoencoder"], total.detach())
    torch.testing.assert_close(found["critic"], (hinge + penalty).detach())
    for name in names:
        grad = slopes[0][name] + 0.4 * balance * slopes[1][name] + slopes[2][name]
        torch.testing.assert_close(found[f"autoencoder.{name}"], grad, rtol=1e-9, atol=1e-10 * float(grad.abs().max()))
    (hinge + penalty).backward()
    for name, p in critic.named_parameters():
        torch.testing.assert_close(found[f"critic.{name}"], p.grad)
    means = {key: found[key][0] / found[key][1] for key in ("loss/decoder", "critic/balance", "critic/hinge")}
    assert float(means["critic/balance"]) == pytest.approx(float(balance))
    assert float(found["loss/decoder"][0]) == pytest.approx(float(far) * logits)


def test_lpips_of_no_weight_measures_alone(world: World) -> None:
    task = judged_task(small())
    task.settings = replace(LOSS, perceptual=replace(LOSS.perceptual, weight=0.0))  # type: ignore[type-var]
    (batch, *_) = batches(world, 1)
    assert "loss/perceptual" not in task.loss(task.model, batch).metrics
    assert "held_out/lpips" in task.held_out_loss(task.model, batches(world, -1)[0])


def test_before_its_start_the_critic_is_not_heard(world: World) -> None:
    (batch, *_) = batches(world, 1)
    judged, deaf = judged_task(small()), VAETask(small().double(), LOSS, seed=1, fps=8)
    deaf.perceptual = judged.perceptual
    losses = [task.loss(task.model, batch) for task in (judged, deaf)]
    assert losses[0].total.item() == losses[1].total.item()
    assert losses[0].metrics.keys() == {"loss/reconstruction", "loss/kl", "loss/perceptual"}


def gradients(mesh: ParallelMesh, world: World, cp: int, step: int) -> dict[str, torch.Tensor]:
    """Of two packs with clips of 9 frames and images, summed over the ranks."""
    axis = build_mesh(Layout(ulysses=cp, cp=cp), rank=mesh.world.rank).cp
    return {
        name: reduce_sum(value, axis) for name, value in learn(judged_task(small(), axis), batches(world, step)).items()
    }


@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.long)])  # with the penalty and without
def test_clips_split_in_time_and_images_dealt_to_ranks_have_every_gradient(world: World, step: int) -> None:
    expected = run_ranks(gradients, 1, world, 1, step)[0]
    for found in run_ranks(gradients, 2, world, 2, step):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            exact = 1e-6 if "/" in name else 1e-12  # metrics are made numbers of float32
            assert (found[name] - value).abs().max() <= exact * value.abs().max(), name
