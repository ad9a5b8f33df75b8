"""The image condition: one function for training and sampling, against its definition, clip by clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_dist.config.schema import DiTRun, ImageCondition
from cogvideo_dist.diffusion.timesteps import stratified_timesteps
from cogvideo_dist.engine.lineage import Lineage
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.protocols import Batch, Sample
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.condition import Conditioner
from cogvideo_dist.tasks.video import VideoTask
from launch.beginning import base_model
from launch.compose import load_frozen
from tests.launch.world import World
from tests.tasks.test_video import CPU, SEED, batches

KINDS = ("cogvideox-5b-i2v", "cogvideox1.5-5b-i2v")
SHARE = 0.4


@pytest.fixture(scope="module", params=KINDS)
def config(world: World, request: pytest.FixtureRequest) -> DiTRun:
    frames = () if request.param == KINDS[0] else ("data.sizes=[[9, 32, 32], [1, 32, 32]]",)
    sizes = frames or ("data.sizes=[[9, 32, 32]]",)
    return world.config(
        world.root / "x", f"model.preset={request.param}", f"diffusion.image.dropout={SHARE}", "data.tokens_per_pack=224",
        "diffusion.text_dropout=0", *sizes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(config: DiTRun) -> VideoTask:
    model, _ = base_model(config, Lineage())
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=fold(index)) * 0.1)
    frozen = load_frozen(config, device=CPU, records=[], pictures=False)  # type: ignore[arg-type]
    return VideoTask(model, frozen, diffusion=config.diffusion, validation=config.validation, seed=SEED)


def conditions(task: VideoTask, batch: Batch) -> list[Tensor]:
    found = task._conditions(batch.samples)
    assert found is not None
    return found


def plain(task: VideoTask, sample: Sample) -> tuple[Tensor, bool]:
    """A clip's condition by its definition, and whether it is left out."""
    assert sample.pixels is not None and task.frozen.vae is not None
    generator = fold(SEED, "image", sample.slot.epoch, sample.slot.index)
    left_out = bool(torch.rand((), generator=generator) < SHARE)
    deviation = math.exp(-3.0 + 0.5 * torch.randn((), generator=generator).item())
    image = sample.pixels[0].permute(2, 0, 1) / 127.5 - 1
    image = image + deviation * torch.randn(image.shape, generator=generator)
    first = 0.7 * task.frozen.vae.encode(image[None, :, None]).sample(generator)[0].transpose(0, 1)
    latents = (sample.slot.size[0] - 1) // 4 + 1
    latents += latents % task.model.config.patch[0]
    whole = torch.cat([first, torch.zeros(latents - 1, *first.shape[1:])])
    return whole * (not left_out), left_out


def test_each_clip_has_its_own_noise_and_its_own_dropout(config: DiTRun, task: VideoTask) -> None:
    """So one batch has conditions and lacks them, and what a clip has does not depend on the batch it is in."""
    dropped = set()
    for batch in (batch for step in range(3) for batch in batches(config, step)):
        for sample, found in zip(batch.samples, conditions(task, batch)):
            expected, left_out = plain(task, sample)
            dropped.add(left_out)
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-5)
            if left_out:
                assert not found.any()
    assert dropped == {True, False}
    ranks = [batch for rank in range(2) for batch in batches(config, 1, rank=rank, size=2)]
    alone = {
        sample.slot: c for batch in batches(config, 1) for sample, c in zip(batch.samples, conditions(task, batch))
    }
    for batch in ranks:
        assert all(torch.equal(c, alone[sample.slot]) for sample, c in zip(batch.samples, conditions(task, batch)))


def test_the_loss_is_the_velocity_error_beside_the_condition(config: DiTRun, task: VideoTask) -> None:
    step, errors, counts = 2, list[float](), list[int]()
    in_order = sorted(batches(config, step), key=lambda batch: batch.first)
    samples = [sample for batch in in_order for sample in batch.samples]
    ofs = torch.tensor([2.0]) if task.model.config.ofs else None
    for sample, timestep in zip(samples, stratified_timesteps(SEED, step, clips=len(samples))):
        (latent,) = task._latents((sample,))
        noise = torch.randn(latent.shape, generator=fold(SEED, "noise", sample.slot.epoch, sample.slot.index))
        a, s = task.schedule.coefficients(torch.tensor(timestep))
        with torch.no_grad():
            velocity = task.model.denoise(
                (a * latent + s * noise).float()[None], task._text((sample,), dropout=False)[None],
                torch.tensor([timestep]), plain(task, sample)[0][None], ofs,
            )  # fmt: skip
        errors.append(float((velocity[0] - (a * noise - s * latent)).square().sum()))
        counts.append(latent.numel())
    found = sum(float(task.loss(task.model, batch).total) for batch in batches(config, step))
    assert found == pytest.approx(sum(errors) / sum(counts), rel=1e-5)


def test_held_out_clips_have_a_condition_without_noise_and_it_matters(config: DiTRun, task: VideoTask) -> None:
    (batch, *_) = batches(config, 0)
    first, again = (task._conditions(batch.samples, held_out=True) for _ in range(2))
    assert first is not None and again is not None
    assert all(torch.equal(x, y) and x.any() for x, y in zip(first, again))
    losses = [task.held_out_loss(task.model, batch)["held_out/loss"][0] for _ in range(2)]
    assert losses[0] == losses[1]


def conditioner(**changes: Any) -> Conditioner:
    vae = VAE(VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2, scaling_factor=0.7))
    from cogvideo_dist.models.init import draw_parameters

    draw_parameters(vae, 0)
    return Conditioner(vae, ImageCondition(**changes), 0.7, 1)


def test_the_three_scales_and_what_stands_for_the_rest() -> None:
    image, make = torch.randn(3, 32, 32, generator=fold(1)), lambda c: c(image, 4, generator=fold(2))
    scaled, bare, inverse = (make(conditioner(latent_scale=scale)) for scale in ("scale", "none", "inverse"))
    assert torch.allclose(scaled, 0.7 * bare) and torch.allclose(inverse, bare / 0.7)
    assert bare.shape[0] == 4 and bare[0].any() and not bare[1:].any()
    repeated = make(conditioner(latent_scale="none", rest="repeat"))
    assert all(torch.equal(frame, bare[0]) for frame in repeated)
    longer: Callable[[int], Tensor] = lambda n: replace(conditioner(), patch_t=2)(image, n, generator=fold(2))  # noqa: E731
    assert [len(longer(n)) for n in (1, 2, 3, 4)] == [2, 2, 4, 4]
    assert longer(3)[0].any() and not longer(3)[1:].any()


def test_noise_covers_the_image_as_the_settings_say() -> None:
    """Far more noise, far from the latent of the clean image; none, equal to it."""
    image = torch.randn(3, 32, 32, generator=fold(1))

    def distance(**settings: float) -> float:
        noisy = conditioner(**settings)(image, 1, generator=fold(3), noisy=True)
        return float((noisy - conditioner()(image, 1, generator=fold(3))).norm())

    little, much = distance(noise_mean=-20.0, noise_std=0.0), distance(noise_mean=1.0, noise_std=0.0)
    assert much > 2 * little
