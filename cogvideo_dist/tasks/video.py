"""Text-to-video and image-to-video: a pack of clips -> the share of the step's velocity loss (Yang et al. 2024, sec. 2;
Salimans and Ho 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import TEMPORAL, AttentionName, Diffusion, Train, Validation
from cogvideo_dist.diffusion.loss import squared_errors
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig
from cogvideo_dist.diffusion.timesteps import TIMESTEP_SAMPLING
from cogvideo_dist.evaluation.media import to_uint8
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import Dropout
from cogvideo_dist.models.text import TextEncoder
from cogvideo_dist.models.vae import VAE, Posterior, Semantics
from cogvideo_dist.pack.layout import TEXT, VISION, PackLayout
from cogvideo_dist.pack.patch import patchify
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Batch, Defect, Learner, Loss, Picture, Sample
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.condition import Conditioner, padded_front, read_image, to_image
from cogvideo_dist.tasks.pixels import encode_pixels, stacked
from cogvideo_dist.tasks.sampling import Sampler

HELD_OUT_SEED = 0
"""Not the run's: held-out noise is the same in every run, so that held-out losses can be compared between runs."""


@dataclass(frozen=True)
class Sharding:
    """Which ranks share a sample's tokens, and the attention back end."""

    mesh: ParallelMesh = field(default_factory=ParallelMesh)
    attention: AttentionName = "auto"


@dataclass(frozen=True)
class FrozenModels:
    """The autoencoder and the text encoder, where the run needs them; ``latent_scale`` is the autoencoder's factor."""

    latent_scale: float
    vae: VAE | None = None
    vae_semantics: Semantics = "whole"
    text: TextEncoder | None = None
    vae_tiling: bool = False


@dataclass(frozen=True)
class Given:
    """What the model is asked about a pack: of each clip its latent, noise and condition [T, C, H, W] and its timestep; the
    pack's text [n_text, dim]; what adapters drop."""

    latents: list[Tensor]
    noise: list[Tensor]
    timesteps: list[int]
    text: Tensor
    conditions: list[Tensor] | None = None
    dropout: Dropout | None = None


@dataclass(frozen=True)
class Adapting:
    """That adapters are trained alone: their settings, and what the frozen weights under them are."""

    settings: Mapping[str, Any]
    base: str | None


class VideoTask:
    """Trains ``model`` on the velocity of noisy latents; ``adapting``: only its adapters."""

    def __init__(
        self, model: DiT, frozen: FrozenModels, *, diffusion: Diffusion, validation: Validation, seed: int,
        sharding: Sharding | None = None, adapting: Adapting | None = None,
    ) -> None:  # fmt: skip
        self.model, self.frozen, self.diffusion, self.validation, self.seed = model, frozen, diffusion, validation, seed
        self.adapting = adapting
        self.schedule = Schedule(ScheduleConfig(snr_shift=diffusion.snr_shift))
        self.sharding = sharding or Sharding()
        self.measured: set[str] = set()  # keys of the samples whose captions were counted
        self.cut: list[Defect] = []

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The pack's share of the step's loss; timesteps, noise, posterior, condition and dropout follow (seed, epoch, step,
        sample)."""
        timesteps = self._timesteps(batch)
        latents = self._latents(batch.samples)
        noise = [
            torch.randn(latent.shape, generator=fold(self.seed, "noise", sample.slot.epoch, sample.slot.index))
            for latent, sample in zip(latents, batch.samples)
        ]
        given = Given(
            latents, noise, timesteps, self._text(batch.samples, dropout=True), self._conditions(batch.samples),
            Dropout(tuple(self._key(sample) for sample in batch.samples)),
        )  # fmt: skip
        errors = self._squared_errors(model, batch.layout, given)
        counts = torch.tensor([latent.numel() for latent in latents], device=errors.device)
        total = (errors * self._weights(batch, counts)).sum()
        return Loss(total, self._metrics(errors.detach() / counts, timesteps))

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Mean velocity error per clip at each timestep of the grid, with noise fixed by (sample, timestep)."""
        latents = self._latents(batch.samples, sampled=False)
        text, conditions = self._text(batch.samples, dropout=False), self._conditions(batch.samples, held_out=True)
        counts = torch.tensor([latent.numel() for latent in latents])
        clips = torch.tensor(len(latents) * self._share())
        metrics = {}
        for timestep in self.validation.timesteps:
            noise = [
                torch.randn(latent.shape, generator=fold(HELD_OUT_SEED, "held out", sample.key, timestep))
                for latent, sample in zip(latents, batch.samples)
            ]
            given = Given(latents, noise, [timestep] * len(latents), text, conditions)
            errors = self._squared_errors(model, batch.layout, given)
            metrics[f"held_out/t{timestep}"] = (errors / counts.to(errors.device)).sum(), clips
        together = torch.stack([total for total, _ in metrics.values()]).sum()
        return {"held_out/loss": (together, clips * len(metrics)), **metrics}

    def pictures(self, model: nn.Module) -> list[Picture]:
        """A video for every validation prompt, always from the same noise."""
        if self.frozen.vae is None or self.frozen.text is None:
            raise ValueError("sampling prompts needs frozen.vae and frozen.text in the configuration")
        settings = self.validation.sampling
        sampler = Sampler(
            self.model, self.frozen.vae, self.schedule, self.frozen.latent_scale, self.frozen.vae_semantics,
            self.frozen.vae_tiling, self.diffusion.image,
        )  # fmt: skip
        texts = self.frozen.text.encode(self.validation.prompts)
        files, made = self.validation.images or (None,) * len(texts), []
        for i, (prompt, text, file) in enumerate(zip(self.validation.prompts, texts, files)):
            image = None if file is None else read_image(file, settings.size)
            video = sampler.video(text, settings, seed=settings.seed + i, image=image)
            made.append(Picture(f"prompt-{i:02d}", prompt, to_uint8(video), settings.fps))
        return made

    def rivals(self, train: Train) -> Sequence[Learner]:
        return ()

    def describe(self, batch: Batch) -> Sequence[Mapping[str, Any]]:
        return [{"timestep": timestep} for timestep in self._timesteps(batch)]

    def notices(self) -> list[Defect]:
        """Captions that are longer than the text length, once each."""
        cut, self.cut = self.cut, []
        return cut

    def flops(self, layout: PackLayout) -> float:
        """Three forwards (one and its backward) of 24 n d^2 + 4 d sum(n_i^2) per layer; under adapters the weights have no
        gradients, which is a third of the linears."""
        d, layers = self.model.config.hidden, self.model.config.layers
        squares = sum(length**2 for length in layout.lengths)
        passes = 3 if self.adapting is None else 2
        return float(layers * (passes * 24 * layout.tokens * d**2 + 3 * 4 * d * squares))

    def fingerprint(self) -> Mapping[str, Any]:
        facts: dict[str, Any] = {
            "task": "text-to-video", "model": asdict(self.model.config), "latent_scale": self.frozen.latent_scale,
        }  # fmt: skip
        if self.model.config.image_channels:
            facts |= {"task": "image-to-video", "image": asdict(self.diffusion.image)}
        if self.adapting is not None:
            facts |= {"lora": self.adapting.settings, "base": self.adapting.base}
        return facts

    def _timesteps(self, batch: Batch) -> list[int]:
        """Of the batch's clips."""
        draw = TIMESTEP_SAMPLING[self.diffusion.timesteps]
        all_timesteps = draw(self.seed, batch.plan.step, clips=batch.plan.clips)
        return all_timesteps[batch.first : batch.first + len(batch.samples)]

    def _latents(self, samples: tuple[Sample, ...], *, sampled: bool = True) -> list[Tensor]:
        """[T, C, H, W] float32 each, as the transformer sees them: scaled, with the front padding of 1.5."""
        latents = []
        for sample, posterior in zip(samples, self._posteriors(samples)):
            generator = fold(self.seed, "posterior", sample.slot.epoch, sample.slot.index)
            latent = (posterior.sample(generator) if sampled else posterior.mode())[0].float().transpose(0, 1)
            latents.append(padded_front(latent * self.frozen.latent_scale, self.model.config.patch[0]))
        return latents

    def _conditions(self, samples: tuple[Sample, ...], *, held_out: bool = False) -> list[Tensor] | None:
        """The image condition of every clip, [T, C, H, W] as its latent, of an image-to-video model: its own first frame with
        noise, or nothing at all. Held-out clips have neither."""
        if not self.model.config.image_channels:
            return None
        settings, vae = self.diffusion.image, self.frozen.vae
        if vae is None:
            raise ValueError("an image-to-video model needs frozen.vae, which encodes its condition")
        conditioner = Conditioner(
            vae, settings, self.frozen.latent_scale, self.model.config.patch[0], self.frozen.vae_tiling
        )
        conditions = []
        for sample in samples:
            if sample.first_frame is None:
                raise ValueError(f"sample {sample.key} holds no first frame for its condition")
            slot, frames = sample.slot, (sample.slot.size[0] - 1) // TEMPORAL + 1
            what = (
                (HELD_OUT_SEED, "held out image", sample.key)
                if held_out
                else (self.seed, "image", slot.epoch, slot.index)
            )
            generator = fold(*what)
            left_out = not held_out and float(torch.rand((), generator=generator)) < settings.dropout
            image = to_image(sample.first_frame)
            condition = conditioner(image, frames, generator=generator, noisy=not held_out)
            conditions.append(torch.zeros_like(condition) if left_out else condition)
        return conditions

    def _key(self, sample: Sample) -> int:
        """From which the dropout of adapters' inputs follows."""
        generator = fold(self.seed, "adapter dropout", sample.slot.epoch, sample.slot.index)
        return int(torch.randint(2**32, (), generator=generator))

    def _posteriors(self, samples: tuple[Sample, ...]) -> list[Posterior]:
        """Stored ones, or those of the frozen autoencoder; neighbours of one size are one batch of it."""
        posteriors: list[Posterior] = []
        for _, group in groupby(samples, key=lambda sample: sample.slot.size):
            posteriors += self._encode(list(group))
        return posteriors

    @torch.no_grad()
    def _encode(self, samples: list[Sample]) -> list[Posterior]:
        stored = [
            Posterior(s.mean[None], s.logvar[None]) for s in samples if s.mean is not None and s.logvar is not None
        ]
        if len(stored) == len(samples):
            return stored
        if self.frozen.vae is None:
            raise ValueError(
                f"sample {samples[0].key} holds no latents and the configuration has no frozen.vae to make them"
            )
        together = encode_pixels(
            self.frozen.vae, stacked(samples), semantics=self.frozen.vae_semantics, tiling=self.frozen.vae_tiling
        )
        return [Posterior(mean, logvar) for mean, logvar in zip(together.mean.split(1), together.logvar.split(1))]

    def _text(self, samples: tuple[Sample, ...], *, dropout: bool) -> Tensor:
        """Text features of the pack [n_text, dim]; a dropped condition is all zeros, as in the released models' training."""
        features = self._features(samples)
        if dropout and self.diffusion.text_dropout:
            for feature, sample in zip(features, samples):
                chance = torch.rand((), generator=fold(self.seed, "text dropout", sample.slot.epoch, sample.slot.index))
                feature *= float(chance >= self.diffusion.text_dropout)
        return features.flatten(0, 1)

    def _features(self, samples: tuple[Sample, ...]) -> Tensor:
        """[clips, L, dim], a tensor of its own."""
        stored = [sample.text for sample in samples if sample.text is not None]
        if len(stored) == len(samples):
            return torch.stack(stored).clone()
        if self.frozen.text is None:
            raise ValueError("the samples hold no text features and the configuration has no frozen.text to make them")
        for sample in samples:
            if sample.key not in self.measured:
                self.measured.add(sample.key)
                tokens = self.frozen.text.token_count(sample.caption)
                if tokens > self.frozen.text.length:
                    self.cut.append(Defect(sample.key, sample.source, cut_reason(tokens, self.frozen.text.length)))
        return self.frozen.text.encode([sample.caption for sample in samples]).clone()

    def _squared_errors(self, model: nn.Module, layout: PackLayout, given: Given) -> Tensor:
        """Sum of squared velocity errors of each clip over this rank's tokens, [clips], in float32."""
        seq = SequenceShard(layout, self.sharding.mesh, attention=self.sharding.attention)
        weight = self.model.embed.patch.weight
        patch, config = self.model.config.patch, self.model.config
        inputs, targets = [], []
        for index, (latent, eps, timestep) in enumerate(zip(given.latents, given.noise, given.timesteps)):
            latent, eps, at = latent.to(weight.device), eps.to(weight.device), torch.tensor(timestep)
            noisy = self.schedule.add_noise(latent, eps, timestep=at)
            if given.conditions is not None:
                noisy = torch.cat([noisy, given.conditions[index].to(noisy)], dim=1)
            inputs.append(patchify(noisy, patch))
            targets.append(patchify(self.schedule.velocity(latent, eps, timestep=at), patch))
        velocity = model(
            seq.mine(torch.cat(inputs), VISION).to(weight.dtype),
            seq.mine(given.text, TEXT).to(weight.device, weight.dtype),
            timestep=torch.tensor(given.timesteps, device=weight.device),
            seq=seq,
            ofs=torch.full((len(inputs),), self.diffusion.image.ofs, device=weight.device) if config.ofs else None,
            dropout=given.dropout,
        )
        return squared_errors(velocity, seq.mine(torch.cat(targets), VISION), lengths=seq.vision_counts())

    def _share(self) -> int:
        """1 on the rank that counts for those it shares samples with: sums of errors are shared among them, counts are not."""
        return int(self.sharding.mesh.sample.rank == 0)

    def _weights(self, batch: Batch, counts: Tensor) -> Tensor | float:
        """1 / the step's global denominator, per clip or for all."""
        if self.diffusion.weighting == "clip":
            return 1.0 / (batch.plan.clips * counts)
        return 1.0 / (batch.plan.elements * self.model.config.patch_features_out)

    def _metrics(self, means: Tensor, timesteps: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean error per quartile of the timestep, each as (sum, count)."""
        quartile = torch.tensor([4 * t // self.schedule.config.timesteps for t in timesteps], device=means.device)
        return {
            f"loss/quartile{q + 1}": (means[quartile == q].sum(), (quartile == q).sum() * self._share())
            for q in range(4)
        }


def cut_reason(tokens: int, length: int) -> str:
    """What is noted of a caption that does not fit."""
    return f"caption of {tokens} tokens is cut to {length}"
