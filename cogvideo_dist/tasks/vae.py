"""The autoencoder: a pack of clips -> the share of the step's reconstruction and KL loss, over the whole clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Size, VAELoss
from cogvideo_dist.evaluation.media import to_uint8
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.pack.layout import PackLayout
from cogvideo_dist.protocols import Batch, Defect, Loss, Picture, Sample
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.pixels import to_video

SHOWN = 4
"""Held-out clips in the contact sheet."""


class VAETask:
    """Trains ``model`` to reconstruct clips; sums are divided by the pixels (times 3 colours) of the step's clips."""

    def __init__(self, model: VAE, settings: VAELoss, *, seed: int, fps: float) -> None:
        self.model, self.settings, self.seed, self.fps = model, settings, seed, fps
        self.shown: list[Sample] = []

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        reconstruction, kl = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for samples in _by_size(batch.samples):
            video = to_video(samples, next(self.model.parameters()))
            noise = torch.cat([self._noise(video, sample) for sample in samples])
            output, posterior = model(video, noise)
            error = (output - video).float()
            reconstruction = (
                reconstruction + (error.abs() if self.settings.reconstruction == "l1" else error.square()).sum()
            )
            kl = kl + posterior.kl().float().sum()
        pixels = sum(3 * prod(slot.size) for pack in batch.plan.packs for slot in pack)
        mine = torch.tensor(sum(3 * prod(sample.slot.size) for sample in batch.samples))
        total = (reconstruction + self.settings.kl_weight * kl) / pixels
        return Loss(total, {"loss/reconstruction": (reconstruction.detach(), mine), "loss/kl": (kl.detach(), mine)})

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Mean absolute error and PSNR (peak 2, per clip) of the posterior's mode, decoded."""
        errors, psnr = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for sample in batch.samples:
            output, video = self._reconstruct(model, sample)
            errors += (output - video).abs().mean()
            psnr += 10 * torch.log10(4 / (output - video).square().mean())
        self.shown = list(batch.samples[:SHOWN])
        count = torch.tensor(len(batch.samples))
        return {"held_out/loss": (errors, count), "held_out/psnr": (psnr, count)}

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> list[Picture]:
        """Held-out clips: the original on the left, its reconstruction on the right."""
        pictures = []
        for sample in self.shown:
            output, video = self._reconstruct(model, sample)
            pair = to_uint8(torch.cat([video[0], output[0]], dim=-1))
            pictures.append(
                Picture(f"clip-{sample.key}", f"original | reconstruction: {sample.caption}", pair, self.fps)
            )
        return pictures

    def notices(self) -> list[Defect]:
        return []

    def flops(self, layout: PackLayout) -> float:
        """Three forwards, as counted operation by operation."""
        return 3.0 * sum(_forward_flops(self.model.config, clip.grid) for clip in layout.clips)

    def fingerprint(self) -> Mapping[str, Any]:
        return {"task": "autoencoder", "model": asdict(self.model.config)}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _noise(self, video: Tensor, sample: Sample) -> Tensor:
        generator = fold(self.seed, "posterior", sample.slot.epoch, sample.slot.index)
        shape = (1, *self.model.config.latent_shape(tuple(video.shape[2:])))
        return torch.randn(shape, generator=generator).to(video)

    def _reconstruct(self, model: nn.Module, sample: Sample) -> tuple[Tensor, Tensor]:
        """(reconstruction, original), both [1, 3, T, H, W] float32."""
        video = to_video([sample], next(self.model.parameters()))
        output, _ = model(video, torch.zeros_like(self._noise(video, sample)))
        return output.float(), video.float()


def _by_size(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Clips of one size are one batch: nothing in the model crosses clips."""
    groups: dict[Size, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.slot.size, []).append(sample)
    return list(groups.values())


@lru_cache(maxsize=64)
def _forward_flops(config: VAEConfig, grid: tuple[int, int, int]) -> float:
    size: Size = (1 + (grid[0] - 1) * TEMPORAL, grid[1] * SPATIAL, grid[2] * SPATIAL)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VAE(config)(torch.empty(1, 3, *size), torch.empty(1, config.latent_channels, *grid))
    return float(counter.get_total_flops())
