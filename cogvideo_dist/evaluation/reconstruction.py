"""How well an autoencoder gives a clip back: PSNR, SSIM, LPIPS, flicker, and what its latents look like.

Every measure is a sum and its weight in float64, so that frames, clips and ranks add up; ``averages`` divides at the end.

Legend: T H W frames, height, width; N frames of any clip; z t h w channels, frames, height, width of latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Sums = dict[str, tuple[Tensor, Tensor]]
"""Measure -> (sum, weight), float64 on the CPU; a sum may be a vector."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two clips [B, 3, T, H, W] in [-1, 1] -> the sum of their frames' distances [B], such as LPIPS."""

CHUNK = 4
"""Frames that are measured at once, which bounds the memory for any length."""

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
"""SSIM's window and constants for pixels in [0, 1] (Wang et al. 2004)."""

LEVELS = 255.0
"""Flicker is told in 8-bit levels."""

LATENT = "latent/"


@dataclass(frozen=True)
class LatentStatistics:
    """Of latents drawn from the posterior: mean and standard deviation over all and by channel.

    ``scaling_factor`` is 1 / std, which brings latents to the unit variance that diffusion assumes (arXiv 2112.10752,
    appendix G); ``clamped`` the share of log-variances at a bound.
    """

    mean: float
    std: float
    scaling_factor: float
    clamped: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]


def reconstruction_sums(original: Tensor, reconstruction: Tensor, *, perceptual: Distance | None = None) -> Sums:
    """Measures of one clip and its reconstruction, each [3, T, H, W] in [-1, 1]; what lies outside is clipped, as when shown.

    ``psnr``, ``ssim``, ``lpips`` count frames; ``mse`` (pixels in [0, 1]) counts pixels; ``flicker/original`` and
    ``flicker/reconstruction`` count differences of neighbouring frames, so an image weighs nothing. Raises ``ValueError``
    for other shapes and for a reconstruction that is not finite.
    """
    if original.shape != reconstruction.shape or original.ndim != 4 or original.shape[0] != 3:
        raise ValueError(
            f"a clip and its reconstruction must both be [3, T, H, W], found {list(original.shape)} and "
            f"{list(reconstruction.shape)}"
        )
    if not reconstruction.isfinite().all():
        raise ValueError("the reconstruction holds NaN or infinite values; the autoencoder has diverged")
    frames = original.shape[1]
    parts = []
    for start in range(0, frames, CHUNK):
        # One frame more at the end, for the difference to it.
        x, y = (_frames(clip[:, start : start + CHUNK + 1]) for clip in (original, reconstruction))
        flicker = {"flicker/original": _flicker(x), "flicker/reconstruction": _flicker(y)}
        x, y = x[:CHUNK], y[:CHUNK]
        error = (x - y).square()
        part = {
            "psnr": _total(psnr(error.flatten(1).mean(1))),
            "mse": _total(error),
            "ssim": _total(ssim(x, y)),
            **flicker,
        }
        if perceptual is not None:
            first, second = (
                clip[None, :, start : start + CHUNK].float().clamp(-1, 1) for clip in (original, reconstruction)
            )
            part["lpips"] = (perceptual(first, second).sum().double().cpu(), part["psnr"][1])
        parts.append(part)
    return add(parts)


def latent_sums(mean: Tensor, logvar: Tensor, *, bounds: tuple[float, float]) -> Sums:
    """Moments of latents drawn from a posterior of ``mean`` and ``logvar`` [B, z, t, h, w], by channel, without drawing any.

    E[x] is the mean, E[x^2] = mean^2 + exp(logvar). ``bounds`` are those that log-variances are clamped to; ``clamped`` is
    the share of them that lie there.
    """
    first = mean.double().sum((0, 2, 3, 4))
    second = (mean.double().square() + logvar.double().exp()).sum((0, 2, 3, 4))
    low, high = bounds
    clamped = ((logvar <= low) | (logvar >= high)).sum().double()
    count = torch.tensor(float(mean.numel()), dtype=torch.float64)
    each = count / mean.shape[1]
    return {
        f"{LATENT}first": (first.cpu(), each),
        f"{LATENT}second": (second.cpu(), each),
        f"{LATENT}clamped": (clamped.cpu(), count),
    }


def add(parts: Iterable[Sums]) -> Sums:
    """The sums of several frames, clips or ranks."""
    total: Sums = {}
    for part in parts:
        for name, (value, weight) in part.items():
            before, already = total.get(name, (torch.zeros_like(value), torch.zeros_like(weight)))
            total[name] = (before + value, already + weight)
    return total


def averages(sums: Sums) -> dict[str, float]:
    """Sums of ``reconstruction_sums``, divided; a measure of no weight is left out, as flicker is for images.

    ``psnr`` is the mean over frames, infinite if one is exact; ``psnr_of_mse`` that of the mean error over all pixels.
    """
    found = {
        name: float(value / weight)
        for name, (value, weight) in sums.items()
        if weight > 0 and not name.startswith(LATENT)
    }
    if "mse" in found:
        found["psnr_of_mse"] = float(psnr(torch.tensor(found["mse"], dtype=torch.float64)))
    return found


def latent_statistics(sums: Sums) -> LatentStatistics:
    """Sums of ``latent_sums``, divided."""
    first, second = (sums[f"{LATENT}{name}"][0] / sums[f"{LATENT}{name}"][1] for name in ("first", "second"))
    mean = float(first.mean())
    std = math.sqrt(max(float(second.mean()) - mean**2, 0.0))
    clamped, count = sums[f"{LATENT}clamped"]
    return LatentStatistics(
        mean=mean,
        std=std,
        scaling_factor=1 / std if std else math.inf,
        clamped=float(clamped / count),
        channel_mean=tuple(first.tolist()),
        channel_std=tuple((second - first.square()).clamp_min(0).sqrt().tolist()),
    )


def psnr(mse: Tensor) -> Tensor:
    """Mean squared errors of pixels in [0, 1] -> peak signal-to-noise ratios in dB, infinite where there is no error."""
    return -10 * torch.log10(mse)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity [N] of frames [N, 3, H, W] in [0, 1], the mean over colours and places (Wang et al. 2004).

    A Gaussian window of 11 pixels, sigma 1.5, and population covariances; places whose window leaves the frame are left out.
    """
    height, width = x.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"frames of {height} x {width}; SSIM takes at least {WINDOW} x {WINDOW} pixels")
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x.square(), _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return (likeness / ((mean_x.square() + mean_y.square() + C1) * (var_x + var_y + C2))).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean over every whole window: [N, 3, H, W] -> [N, 3, H - 10, W - 10]."""
    weights = [math.exp(-0.5 * (i / SIGMA) ** 2) for i in range(-(WINDOW // 2), WINDOW // 2 + 1)]
    for dim in (-2, -1):
        size = x.shape[dim] - WINDOW + 1
        total = torch.zeros_like(x.narrow(dim, 0, size))
        for i, weight in enumerate(weights):
            total.add_(x.narrow(dim, i, size), alpha=weight / sum(weights))
        x = total
    return x


def _frames(clip: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> [T, 3, H, W] in [0, 1]; float64, for a variance is a small difference of large sums."""
    return ((clip.detach().double().clamp(-1, 1) + 1) / 2).transpose(0, 1)


def _flicker(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute difference of neighbouring frames (CogVideoX's measure, arXiv 2408.06072 table 1), in 8-bit levels.

    The paper does not say its units, so that its numbers compare among themselves alone.
    """
    differences = [(following - frame).abs().mean() for frame, following in pairwise(frames)]
    return _total(LEVELS * torch.stack(differences) if differences else frames.new_zeros(0))


def _total(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.double().sum().cpu(), torch.tensor(float(values.numel()), dtype=torch.float64)
