"""What is measured of an autoencoder, against scikit-image and plain computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from cogvideo_dist.evaluation import reconstruction
from cogvideo_dist.evaluation.reconstruction import (
    add,
    averages,
    latent_statistics,
    latent_sums,
    psnr,
    reconstruction_sums,
    ssim,
)
from cogvideo_dist.models.perceptual import RANDOM, Perceptual
from cogvideo_dist.rng import fold


def pair(frames: int = 6, seed: int = 0, *, height: int = 24, width: int = 32) -> tuple[Tensor, Tensor]:
    """A smooth clip with flat places and a noisy copy that reaches beyond [-1, 1]; both [3, T, H, W] float32."""
    generator = fold(seed, "pair")
    coarse = torch.randn(1, 3, frames, 3, 4, generator=generator)
    clip = torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0].clamp(-1, 1)
    return clip, clip + 0.2 * torch.randn(clip.shape, generator=generator)


def as_images(clip: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, H, W, 3] in [0, 1]"""
    return ((clip.double().clamp(-1, 1) + 1) / 2).permute(1, 2, 3, 0).numpy()


def like_skimage(x: np.ndarray, y: np.ndarray) -> float:
    return float(
        structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
        )
    )


def test_ssim_and_psnr_are_those_of_scikit_image_frame_by_frame() -> None:
    original, copy = pair()
    x, y = as_images(original), as_images(copy)
    ours = ssim(*(torch.from_numpy(images).permute(0, 3, 1, 2) for images in (x, y)))
    similar = [like_skimage(a, b) for a, b in zip(x, y)]
    assert ours.tolist() == pytest.approx(similar, abs=1e-9)
    found = averages(reconstruction_sums(original, copy))
    assert found["ssim"] == pytest.approx(np.mean(similar), abs=1e-9)
    noise = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(x, y)]
    assert found["psnr"] == pytest.approx(np.mean(noise), abs=1e-9)
    assert found["psnr_of_mse"] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-9)


def test_ssim_of_nearly_flat_float32_frames_keeps_its_digits() -> None:
    original = torch.full((3, 1, 16, 16), 0.8)
    copy = original + 1e-3 * torch.randn(original.shape, generator=fold(0, "flat"))
    found = averages(reconstruction_sums(original, copy))["ssim"]
    assert found == pytest.approx(like_skimage(as_images(original)[0], as_images(copy)[0]), abs=1e-9)


def test_a_perfect_reconstruction_has_no_error_and_the_same_flicker() -> None:
    clip, _ = pair()
    found = averages(reconstruction_sums(clip, clip))
    assert found["psnr"] == found["psnr_of_mse"] == math.inf
    assert found["ssim"] == pytest.approx(1, abs=1e-12)
    assert found["flicker/original"] == found["flicker/reconstruction"] > 0


def test_flicker_is_the_mean_difference_of_neighbouring_frames_in_levels() -> None:
    original, copy = pair(frames=9)
    found = averages(reconstruction_sums(original, copy))
    for name, clip in (("original", original), ("reconstruction", copy)):
        assert found[f"flicker/{name}"] == pytest.approx(
            255 * np.abs(np.diff(as_images(clip), axis=0)).mean(), abs=1e-9
        )
    levels = torch.tensor([0, 10, 30]).div(127.5).sub(1).view(1, 3, 1, 1).expand(3, 3, 16, 16)
    assert averages(reconstruction_sums(levels, levels))["flicker/original"] == pytest.approx(15, abs=1e-5)


def test_an_image_has_no_flicker_and_takes_none_from_others() -> None:
    image, video = reconstruction_sums(*pair(frames=1)), reconstruction_sums(*pair(frames=5, seed=1))
    assert "flicker/original" not in averages(image)
    together, alone = averages(add([image, video])), averages(video)
    assert together["flicker/original"] == alone["flicker/original"]
    assert together["psnr"] != alone["psnr"]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_how_many_frames_are_measured_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    clips = pair(frames=9)
    expected = averages(reconstruction_sums(*clips))
    monkeypatch.setattr(reconstruction, "CHUNK", chunk)
    assert averages(reconstruction_sums(*clips)) == pytest.approx(expected, rel=1e-12)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    clips = [pair(frames=5, seed=seed) for seed in range(4)]
    sums = [reconstruction_sums(*clip) for clip in clips]
    whole, parts = add(sums), add([add(sums[:1]), add(sums[1:])])
    assert averages(parts) == pytest.approx(averages(whole), rel=1e-12)
    error = torch.cat([torch.from_numpy(as_images(x) - as_images(y)) for x, y in clips])
    by_frame = psnr(error.square().flatten(1).mean(1))
    assert averages(whole)["psnr"] == pytest.approx(float(by_frame.mean()), rel=1e-12)
    assert averages(whole)["mse"] == pytest.approx(float(error.square().mean()), rel=1e-12)


def test_lpips_counts_frames_as_shown_and_is_zero_of_a_perfect_clip() -> None:
    perceptual = Perceptual("vgg", weights=RANDOM)
    original, copy = pair(frames=6)
    found = averages(reconstruction_sums(original, copy, perceptual=perceptual))["lpips"]
    assert found == pytest.approx(float(perceptual(copy.clamp(-1, 1)[None], original[None])) / 6, rel=1e-5)
    assert averages(reconstruction_sums(original, original, perceptual=perceptual))["lpips"] == 0


def test_latent_statistics_are_those_of_draws() -> None:
    generator = fold(0, "latents")
    mean = torch.randn(3, 4, 2, 5, 6, generator=generator) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1) + 0.5
    logvar = torch.randn(mean.shape, generator=generator)
    spread = (logvar.double() / 2).exp()
    draws = torch.cat([mean + spread, mean - spread]).transpose(0, 1).flatten(1)  # have the posterior's two moments
    parts = [latent_sums(mean[i : i + 1], logvar[i : i + 1], bounds=(-30, 20)) for i in range(3)]
    found = latent_statistics(add(parts))
    assert found.mean == pytest.approx(float(draws.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(draws.std(correction=0)), rel=1e-12)
    assert found.scaling_factor == 1 / found.std
    assert found.channel_mean == pytest.approx(draws.mean(1).tolist(), rel=1e-12)
    assert found.channel_std == pytest.approx(draws.std(1, correction=0).tolist(), rel=1e-12)
    assert found.clamped == 0
    assert not averages(add(parts))


def test_log_variances_at_their_bounds_are_counted() -> None:
    logvar = torch.tensor([-30.0, 20.0, 0.0, 1.0]).view(1, 2, 2, 1, 1)
    assert latent_statistics(latent_sums(torch.zeros_like(logvar), logvar, bounds=(-30, 20))).clamped == 0.5


def test_what_cannot_be_measured_is_refused_in_words() -> None:
    original, copy = pair()
    with pytest.raises(ValueError, match="NaN or infinite"):
        reconstruction_sums(original, copy.clone().fill_(math.nan))
    with pytest.raises(ValueError, match=r"must both be \[3, T, H, W\], found \[3, 6, 24, 32\] and \[3, 5, 24, 32\]"):
        reconstruction_sums(original, copy[:, :5])
    with pytest.raises(ValueError, match="frames of 8 x 32; SSIM takes at least 11 x 11"):
        reconstruction_sums(original[:, :, :8], copy[:, :, :8])
