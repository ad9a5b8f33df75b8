"""Clips as read -> what the autoencoder takes, and what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo_dist.models.vae import FRAME_CHUNK, VAE, Posterior, Semantics, Tiling
from cogvideo_dist.protocols import Sample


def to_video(samples: Sequence[Sample], like: Tensor) -> Tensor:
    """Pixels of clips of one size, 0..255, -> [B, 3, T, H, W] in [-1, 1], on the device and in the dtype of ``like``."""
    return normalized(stacked(samples), like)


def stacked(samples: Sequence[Sample]) -> Tensor:
    """The pixels of clips of one size, uint8 [B, T, H, W, 3]."""
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    if len(pixels) < len(samples):
        raise ValueError(f"sample {samples[0].key} holds no pixels to encode; use data.source: pixels")
    return torch.stack(pixels)


def normalized(pixels: Tensor, like: Tensor) -> Tensor:
    """[B, T, H, W, 3], 0..255, -> [B, 3, T, H, W] in [-1, 1], on the device and in the dtype of ``like``."""
    return pixels.to(like.device).permute(0, 4, 1, 2, 3).to(like.dtype) / 127.5 - 1


@torch.no_grad()
def encode_pixels(vae: VAE, pixels: Tensor, *, semantics: Semantics, tiling: bool) -> Posterior:
    """Clips uint8 [B, T, H, W, 3] -> their posterior. Chunked, the device holds eight frames at a time, whatever the length."""
    like, tiles = next(vae.parameters()), tiling_of(vae, tiling)
    if semantics == "whole":
        return vae.encode(normalized(pixels, like), tiling=tiles)
    pieces = (normalized(piece, like) for piece in pixels.split(FRAME_CHUNK, dim=1))
    parts = list(vae.encode_stream(pieces, total=pixels.shape[1], tiling=tiles))
    return Posterior(*(torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("mean", "logvar")))


def tiling_of(vae: VAE, tiling: bool) -> Tiling | None:
    """The tiles that ``frozen.vae_tiling`` stands for."""
    return Tiling.of(vae.config) if tiling else None
