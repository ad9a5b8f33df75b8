"""Clips as read -> what the autoencoder takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo_dist.protocols import Sample


def to_video(samples: Sequence[Sample], like: Tensor) -> Tensor:
    """Pixels of clips of one size, 0..255, -> [B, 3, T, H, W] in [-1, 1], on the device and in the dtype of ``like``."""
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    if len(pixels) < len(samples):
        raise ValueError(f"sample {samples[0].key} holds no pixels to encode; use data.source: pixels")
    # [B, T, H, W, 3] -> [B, 3, T, H, W]
    return torch.stack(pixels).to(like.device).permute(0, 4, 1, 2, 3).to(like.dtype) / 127.5 - 1
