"""The autoencoder: a pack of clips -> the share of the step's loss (reconstruction, KL, LPIPS, critic), over whole clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cogvideo_dist.config.autoencoder import VAELoss
from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Size, Train
from cogvideo_dist.evaluation.media import to_uint8
from cogvideo_dist.evaluation.reconstruction import add, reconstruction_sums
from cogvideo_dist.models.adversarial import LastConvolution
from cogvideo_dist.models.critic import Critic
from cogvideo_dist.models.perceptual import Perceptual
from cogvideo_dist.models.vae import VAE, WHOLE, VAEConfig
from cogvideo_dist.pack.layout import PackLayout
from cogvideo_dist.parallel.frames import Shards, TimeContext, frames_of, latent_shares, most_ranks
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import gather
from cogvideo_dist.protocols import Batch, Defect, Learner, Loss, Picture, Sample
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.adversary import Adversary, Made, pixels_of
from cogvideo_dist.tasks.pixels import to_video


@dataclass(frozen=True)
class Piece:
    """A rank's frames and latent frames of a clip, and how the model asks for the others."""

    frames: slice
    latents: slice
    time: TimeContext


@dataclass(frozen=True)
class Judges:
    """Networks that look at reconstructions: LPIPS, and the critic that learns."""

    perceptual: Perceptual | None = None
    critic: Critic | None = None


NO_JUDGES = Judges()
SHOWN = 4
"""Held-out clips in the contact sheet."""
AMPLIFIED = 4
"""How much brighter errors are shown than they are."""


class VAETask:
    """Trains ``model`` to reconstruct clips; sums are divided by the pixels (times 3 colours) of the step's clips, those of
    ``perceptual`` distances by their frames.

    The ranks of ``cp`` share every clip's frames; clips too short to split are dealt to them whole.
    """

    def __init__(
        self,
        model: VAE,
        settings: VAELoss,
        *,
        seed: int,
        fps: float,
        cp: Axis | None = None,
        judges: Judges = NO_JUDGES,
    ) -> None:
        self.model, self.settings, self.seed, self.fps = model, settings, seed, fps
        self.cp = cp or Axis("cp")
        self.perceptual = judges.perceptual
        self.adversary = None
        if judges.critic is not None and settings.critic is not None:
            self.adversary = Adversary(judges.critic, settings.critic, cp=self.cp)
        self.shown: list[Sample] = []

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        adversary = self.adversary if self.adversary and self.adversary.heard(batch.plan.step) else None
        made: list[Made] = []
        kl = torch.zeros((), device=self.device)
        with LastConvolution(self.model.decoder.conv_out) as last:
            for samples, piece, share in self._dealt(batch.samples):
                video = to_video(samples, next(self.model.parameters()))
                noise = torch.cat([self._noise(video, sample) for sample in samples])
                clip = video[:, :, piece.frames]
                output, posterior = model(clip, noise[:, :, piece.latents], time=piece.time)
                seen = output if adversary is None else output.detach().requires_grad_()
                made.append(Made(clip, output, seen, piece.time, share))
                kl = kl + share * wide(posterior.kl()).sum()
        total, metrics = self._reconstruction(batch, made)
        if adversary is not None:
            total, heard = adversary.joined(total, made, plan=batch.plan, last=last)
            metrics |= heard
        pixels, counted = pixels_of(batch.plan), metrics["loss/reconstruction"][1]
        return Loss(total + self.settings.kl_weight * kl / pixels, metrics | {"loss/kl": (kl.detach(), counted)})

    def _reconstruction(self, batch: Batch, made: Sequence[Made]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """This rank's share of how far reconstructions are from the clips."""
        error = torch.stack([item.weight * self._error(item.seen - item.clip).sum() for item in made]).sum()
        counted = [sample.slot.size for sample in batch.samples] if self.cp.rank == 0 else []
        metrics = {"loss/reconstruction": (error.detach(), torch.tensor(sum(3 * prod(size) for size in counted)))}
        total = error / pixels_of(batch.plan)
        settings, perceptual = self.settings.perceptual, self.perceptual
        if settings is not None and settings.weight and perceptual is not None:
            distance = torch.stack([item.weight * perceptual(item.seen, item.clip).sum() for item in made]).sum()
            frames = sum(slot.size[0] for pack in batch.plan.packs for slot in pack)
            total = total + settings.weight * distance / frames
            metrics["loss/perceptual"] = (distance.detach(), torch.tensor(sum(size[0] for size in counted)))
        return total, metrics

    def _error(self, difference: Tensor) -> Tensor:
        difference = wide(difference)
        return difference.abs() if self.settings.reconstruction == "l1" else difference.square()

    def rivals(self, train: Train) -> Sequence[Learner]:
        return () if self.adversary is None else (self.adversary.learner(train),)

    def _dealt(self, samples: Sequence[Sample]) -> list[tuple[list[Sample], Piece, float]]:
        """What this rank computes: batches of one size, its piece of them, and the weight of what comes out.

        A rank that has nothing runs a clip with weight 0, since every parameter's gradient is waited for from every rank.
        """
        work: list[tuple[list[Sample], Piece, float]] = []
        whole: list[Sample] = []
        for group in _by_size(samples):
            piece = self._piece(group[0].slot.size)
            if piece.time is WHOLE:
                whole += group
            else:
                work.append((group, piece, 1.0))
        mine = whole[self.cp.rank :: self.cp.size]
        work += [(group, self._piece(group[0].slot.size), 1.0) for group in _by_size(mine)]
        return work or [([whole[0]], self._piece(whole[0].slot.size), 0.0)]

    def _piece(self, size: Size) -> Piece:
        """This rank's frames of a clip; all of them where the clip does not split."""
        latents = 1 + (size[0] - 1) // TEMPORAL
        if self.cp.size == 1 or self.cp.size > most_ranks(latents):
            return Piece(slice(None), slice(None), WHOLE)
        shares = latent_shares(latents, self.cp.size)
        frames = frames_of(shares, self.cp.rank, compression=TEMPORAL)
        start = sum(shares[: self.cp.rank])
        return Piece(slice(frames.start, frames.stop), slice(start, start + shares[self.cp.rank]), Shards(self.cp))

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Mean absolute error, and the measures of ``reconstruction_sums``, of the posterior's mode, decoded."""
        error, parts = torch.zeros((), dtype=torch.float64), []
        for sample in batch.samples:
            output, video = self._reconstruct(model, sample)
            error += (output - video).abs().mean().double().cpu()
            parts.append(reconstruction_sums(video[0], output[0], perceptual=self.perceptual))
        self.shown = list({s.key: s for s in (*self.shown, *batch.samples)}.values())[-SHOWN:]
        speaks = float(self.cp.rank == 0)  # every rank has come to the same figures
        found = {"loss": (error, torch.tensor(float(len(batch.samples)))), **add(parts)}
        # A name with another slash would be a group of its own in TensorBoard.
        return {f"held_out/{name.replace('/', '_')}": (v * speaks, n * speaks) for name, (v, n) in found.items()}

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> list[Picture]:
        """Held-out clips: the original, its reconstruction, and how far they are apart."""
        pictures = []
        for sample in self.shown:
            output, video = self._reconstruct(model, sample)
            apart = (AMPLIFIED * (output.clamp(-1, 1) - video).abs() - 1).clamp(max=1)  # black where they agree
            three = to_uint8(torch.cat([video[0], output[0], apart[0]], dim=-1))
            caption = f"original | reconstruction | error x {AMPLIFIED}: {sample.caption}"
            pictures.append(Picture(f"clip-{sample.key}", caption, three, self.fps))
        return pictures

    def describe(self, batch: Batch) -> Sequence[Mapping[str, Any]]:
        return [{} for _ in batch.samples]

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
        """(reconstruction, original), both [1, 3, T, H, W] and whole, on every rank of ``cp``."""
        video = to_video([sample], next(self.model.parameters()))
        piece, noise = self._piece(sample.slot.size), torch.zeros_like(self._noise(video, sample))
        output, _ = model(video[:, :, piece.frames], noise[:, :, piece.latents], time=piece.time)
        if piece.time is not WHOLE:
            latents = noise.shape[2]
            shares = latent_shares(latents, self.cp.size)
            counts = [len(frames_of(shares, rank, compression=TEMPORAL)) for rank in range(self.cp.size)]
            output = gather(output.transpose(0, 2).contiguous(), self.cp, counts=counts).wait().transpose(0, 2)
        return wide(output), wide(video)


def wide(x: Tensor) -> Tensor:
    """In float32 at least, which is what is summed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
