"""From pixels to latents and back in the loop: the configuration's semantics and tiles, and what memory that takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cogvideo_dist.config.schema import Diffusion, Validation
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import PRESETS
from cogvideo_dist.models.vae import VAE, Semantics, Tiling, VAEConfig
from cogvideo_dist.parallel.frames import TimeContext
from cogvideo_dist.protocols import Sample, Slot
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.pixels import encode_pixels, to_video
from cogvideo_dist.tasks.sampling import Sampler
from cogvideo_dist.tasks.video import FrozenModels, VideoTask

FRAMES = 21


@pytest.fixture(scope="module")
def vae() -> VAE:
    """Tiles of 6 x 6 latents that share one."""
    vae = VAE(
        VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2, sample_height=96, sample_width=96)
    )
    draw_parameters(vae, 1)
    assert Tiling.of(vae.config) == Tiling((6, 6), (1, 1))
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    size = (FRAMES, 64, 80)
    pixels = torch.randint(0, 256, (2, *size, 3), generator=fold(0, "pixels"), dtype=torch.uint8)
    return [Sample(Slot(0, i, size), str(i), str(i), "", pixels=clip) for i, clip in enumerate(pixels)]


@pytest.mark.parametrize("semantics", ["whole", "chunked"])
@pytest.mark.parametrize("tiling", [False, True])
def test_training_encodes_and_sampling_decodes_as_configured(
    vae: VAE, samples: list[Sample], semantics: Semantics, tiling: bool
) -> None:
    tiles = Tiling.of(vae.config) if tiling else None
    expected = vae.encode(to_video(samples, next(vae.parameters())), semantics, tiling=tiles)
    frozen = FrozenModels(1.0, vae, semantics, vae_tiling=tiling)
    model = DiT(replace(PRESETS["tiny-cogvideox-2b"], in_channels=16, out_channels=16))
    task = VideoTask(model, frozen, diffusion=Diffusion(), validation=Validation(), seed=0)
    for i, found in enumerate(task._posteriors(tuple(samples))):
        assert torch.equal(found.mean[0], expected.mean[i])
        assert torch.equal(found.logvar[0], expected.logvar[i])
    sampler = Sampler(model, vae, Schedule(ScheduleConfig()), 0.5, semantics, tiling)
    video = vae.decode(expected.mean[:1] / 0.5, semantics, tiling=tiles)[0]
    assert torch.equal(sampler.decode(expected.mean[0].transpose(0, 1)), video)
    in_tiles = vae.encode(to_video(samples, next(vae.parameters())), semantics, tiling=Tiling.of(vae.config)).mean
    assert torch.equal(in_tiles, expected.mean) == tiling, "tiles are another result than whole frames"


def test_chunks_of_a_clip_are_all_that_the_autoencoder_is_given(
    vae: VAE, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, encoder = list[int](), vae.encoder.forward

    def measured(video: torch.Tensor, time: TimeContext) -> torch.Tensor:
        assert video.untyped_storage().nbytes() == video.nbytes, "no view into the whole clip"
        frames.append(video.shape[2])
        return encoder(video, time)

    monkeypatch.setattr(vae.encoder, "forward", measured)
    pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
    encode_pixels(vae, pixels, semantics="chunked", tiling=False)
    assert frames == [8 + FRAMES % 8, 8]
