"""The first frame as the condition of an image-to-video model: one function for training and for sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvideo_dist.config.schema import ImageCondition, Size
from cogvideo_dist.data.decode import DecodeError, decode_image
from cogvideo_dist.models.vae import VAE
from cogvideo_dist.tasks.pixels import tiling_of


def padded_front(latent: Tensor, patch_t: int) -> Tensor:
    """[T, C, H, W] with copies of the first frame in front, up to whole patches (CogVideoX 1.5)."""
    missing = (-len(latent)) % patch_t
    return torch.cat([latent[:1].expand(missing, -1, -1, -1), latent]) if missing else latent


def read_image(path: str | Path, size: Size) -> Tensor:
    """An image file [3, H, W] in [-1, 1], scaled down to cover a video of ``size`` and cut around its middle; ``ValueError``
    names the file."""
    pixels = np.empty((1, *size[1:], 3), np.uint8)
    try:
        decode_image(Path(path).read_bytes(), pixels)
    except (OSError, DecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return to_image(torch.from_numpy(pixels[0]))


def to_image(pixels: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W] in [-1, 1]."""
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Conditioner:
    """Makes conditions as ``settings`` say. ``latent_scale`` is the autoencoder's factor, ``patch_t`` the patches' length."""

    vae: VAE
    settings: ImageCondition
    latent_scale: float
    patch_t: int
    tiling: bool = False

    @property
    def factor(self) -> float:
        """What the image's latent is multiplied by."""
        return {"scale": self.latent_scale, "none": 1.0, "inverse": 1 / self.latent_scale}[self.settings.latent_scale]

    @torch.no_grad()
    def __call__(self, image: Tensor, frames: int, *, generator: torch.Generator, noisy: bool = False) -> Tensor:
        """An image [3, H, W] in [-1, 1] -> [T, C, h, w] float32 on the CPU, for a latent of so many ``frames`` (T: with those
        that are put in front of it). The posterior and, where it is to be ``noisy``, the noise come from ``generator``."""
        if noisy:
            deviation = math.exp(
                self.settings.noise_mean + self.settings.noise_std * float(torch.randn((), generator=generator))
            )
            image = image + deviation * torch.randn(image.shape, generator=generator).to(image)
        like = next(self.vae.parameters())
        posterior = self.vae.encode(image.to(like)[None, :, None], tiling=tiling_of(self.vae, self.tiling))
        first = posterior.sample(generator)[0].float().cpu().transpose(0, 1) * self.factor
        rest = first if self.settings.rest == "repeat" else torch.zeros_like(first)
        # Once, at the very front: where 1.5 has a copy of the first latent there, the public code gives that copy the image and
        # the first latent itself the rest, in training and in sampling alike.
        whole = frames + (-frames) % self.patch_t
        return torch.cat([first, rest.expand(whole - 1, -1, -1, -1)])
