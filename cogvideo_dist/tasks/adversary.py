"""The critic's part in the autoencoder's training: what the decoder loses to it, and how it learns from what was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cogvideo_dist.config.autoencoder import CriticLoss
from cogvideo_dist.config.schema import Train
from cogvideo_dist.models.adversarial import LastConvolution, balanced, critic_hinge, decoder_hinge, gradient_penalty
from cogvideo_dist.models.critic import Critic
from cogvideo_dist.parallel.frames import TimeContext
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.protocols import Batch, Learner, Loss, StepPlan


class Made(NamedTuple):
    """This rank's piece of clips and what the autoencoder made of it, both [B, 3, T, H, W]; ``seen`` is what losses are
    computed from, the output or a copy of it. ``weight`` is 0 where it only fills up."""

    clip: Tensor
    output: Tensor
    seen: Tensor
    time: TimeContext
    weight: float


def pixels_of(plan: StepPlan) -> int:
    """Pixels, times 3 colours, of all clips of a step."""
    return sum(3 * prod(slot.size) for pack in plan.packs for slot in pack)


class Adversary:
    """A critic from its ``start`` on. Sums are divided by the logits, or for the penalty the pixels, of the step's clips."""

    def __init__(self, critic: Critic, settings: CriticLoss, *, cp: Axis) -> None:
        self.critic, self.settings, self.cp = critic, settings, cp
        self.made: Sequence[Made] = ()

    def learner(self, train: Train) -> Learner:
        """The critic with its optimizer: ``train`` but for what the settings say. Its weights are not averaged."""
        own = self.settings
        settings = replace(
            train, learning_rate=own.learning_rate, warmup_steps=own.warmup_steps, schedule="constant", betas=own.betas,
            weight_decay=own.weight_decay, clip_norm=own.clip_norm, ema_decay=None,
        )  # fmt: skip
        return Learner("critic", self.critic, settings, self.loss, own.start)

    def heard(self, step: int) -> bool:
        return step >= self.settings.start

    def joined(
        self, reconstruction: Tensor, made: Sequence[Made], *, plan: StepPlan, last: LastConvolution
    ) -> tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]]:
        """This rank's share of ``reconstruction`` and of what the decoder loses, balanced at its last layer; and metrics.

        What was ``made`` of the pack is kept for the critic's own turn.
        """
        logits = torch.zeros((), device=reconstruction.device)
        for item in made:
            logits = logits + item.weight * decoder_hinge(self.critic(item.seen.to(self.dtype), time=item.time))
        total, balance = balanced(
            [item.output for item in made], [item.seen for item in made], reconstruction=reconstruction,
            adversarial=logits / self.count(plan), last=last, strength=self.settings.weight, axis=self.cp,
        )  # fmt: skip
        self.made = [item._replace(output=item.output.detach()) for item in made]
        speaks = torch.tensor(float(self.cp.rank == 0))  # every rank has come to the same balance
        mean = (logits.detach(), self.rank_count(made))
        return total, {"loss/decoder": mean, "critic/balance": (balance * speaks, speaks)}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The critic's share: half the hinge losses' sum, and the penalty where it is due."""
        made, self.made = self.made, ()
        hinge = penalty = torch.zeros((), device=next(self.critic.parameters()).device)
        right, due = hinge, self.due(batch.plan.step)
        for item in made:
            clip = item.clip.detach().to(self.dtype).requires_grad_(due)
            # The engine ties what it returns to its own backward, which is not this one of the penalty.
            real = (self.critic if due else model)(clip, time=item.time)
            judged = model(item.output.to(self.dtype), time=item.time)
            hinge = hinge + item.weight * critic_hinge(real, judged)
            right = right + item.weight * ((real > 0).sum() + (judged < 0).sum())
            if due:
                penalty = penalty + item.weight * gradient_penalty(real, clip)
        count = 2 * self.rank_count(made)
        metrics = {"critic/hinge": (hinge.detach(), count), "critic/right": (right, count)}
        total = hinge / (2 * self.count(batch.plan))
        if self.settings.r1_weight:
            total = total + self.settings.r1_weight / 2 * self.settings.r1_every * penalty / pixels_of(batch.plan)
            seen = torch.tensor(sum(item.weight * item.clip.numel() for item in made) * due)
            metrics["critic/penalty"] = (penalty.detach(), seen)
        return Loss(total, metrics)

    def due(self, step: int) -> bool:
        """Whether a step pays the gradient penalty."""
        return self.settings.r1_weight > 0 and (step - self.settings.start) % self.settings.r1_every == 0

    def count(self, plan: StepPlan) -> int:
        """Logits of all clips of a step."""
        return sum(prod(self.critic.config.logits(slot.size)) for pack in plan.packs for slot in pack)

    def rank_count(self, made: Sequence[Made]) -> Tensor:
        """Logits of the pieces that this rank judges."""
        shapes = ((item.weight * item.clip.shape[0], item.clip.shape[2:]) for item in made)
        return torch.tensor(sum(weight * prod(self.critic.config.logits(size)) for weight, size in shapes))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.critic.parameters()).dtype
