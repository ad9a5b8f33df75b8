"""The autoencoder's task against plain computations."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from cogvideo_dist.config.schema import Data, VAELoss
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import reduce_sum
from cogvideo_dist.protocols import Batch
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.vae import VAETask
from launch.compose import RankData, latent_geometry
from tests.launch.world import World
from tests.ranks import run_ranks


def batches(world: World, step: int, *, rank: int = 0, size: int = 1) -> list[Batch]:
    axis = Axis("dp", rank, size)
    settings = Data(
        str(world.root / "shards"), "pixels", ((9, 32, 32), (1, 32, 32)), 8.0, tokens_per_pack=80, packs_per_step=2,
        held_out=2, workers=0,
    )  # fmt: skip
    data = RankData(settings, seed=1, geometry=latent_geometry, mesh=ParallelMesh(dp=axis, replica=axis, world=axis))
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
            # in 0..1 of brightness, as commonly defined
            mse = ((model.decode(model.encode(video).mode()) - video) / 2).square().mean()
            psnr.append(float(-10 * torch.log10(mse)))
    found = [task.held_out_loss(model, batch)["held_out/psnr"] for batch in batches(world, -1)]
    assert sum(float(v) for v, _ in found) / sum(int(n) for _, n in found) == pytest.approx(
        sum(psnr) / len(psnr), rel=1e-5
    )
    pictures = task.pictures(model)
    assert [picture.frames.shape[2] for picture in pictures] == [64] * len(pictures), (
        "original and reconstruction side by side"
    )


def test_operations_grow_with_the_clip(model: VAE, world: World) -> None:
    task = VAETask(model, VAELoss(), seed=1, fps=8)
    (batch, *_) = batches(world, 0)
    single = [task.flops(type(batch.layout)((clip,))) for clip in batch.layout.clips]
    assert task.flops(batch.layout) == pytest.approx(sum(single))
    assert task.flops(batch.layout) > 1e6


def gradients(mesh: ParallelMesh, world: World, cp: int) -> dict[str, torch.Tensor]:
    """Of two packs with clips of 9 frames and images, in float64, by name, and their loss."""
    axis = build_mesh(Layout(ulysses=cp, cp=cp), rank=mesh.world.rank).cp
    vae = VAE(VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2))
    draw_parameters(vae, 3)
    task = VAETask(vae.double(), VAELoss(kl_weight=0.01), seed=1, fps=8, cp=axis)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches(world, 2):
        loss = task.loss(vae, batch).total
        loss.backward()
        total += loss.detach()
    summed = {name: reduce_sum(p.grad, axis) for name, p in vae.named_parameters() if p.grad is not None}
    return summed | {"loss": reduce_sum(total, axis)}


def test_clips_split_in_time_and_images_dealt_to_ranks_have_every_gradient(world: World) -> None:
    expected = run_ranks(gradients, 1, world, 1)[0]
    for found in run_ranks(gradients, 2, world, 2):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 2e-6 * value.abs().max(), name  # errors are summed in float32
