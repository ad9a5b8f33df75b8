"""AdamW that keeps an exponential moving average of the weights beside its moments, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import Train


class AdamWithEma(torch.optim.AdamW):
    """``state[p]["ema"]`` follows the weights: ema = d * ema + (1 - d) * p with d = min(decay, (1 + n) / (10 + n)).

    It lives in the optimizer's state so that ZeRO shards it like the moments.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, ema_decay: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.ema_decay is None:
            super().step(closure)
            return
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fresh = {p: p.detach().clone() for p in moving if "ema" not in self.state[p]}
        super().step(closure)
        for p in moving:
            state = self.state[p]
            if p in fresh:
                state["ema"] = fresh[p]
            count = int(state["step"])
            state["ema"].lerp_(p.detach(), 1 - min(self.ema_decay, (1 + count) / (10 + count)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, train: Train) -> AdamWithEma:
    return AdamWithEma(
        parameter_groups(model, train.weight_decay),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.eps,
        ema_decay=train.ema_decay,
    )


def learning_rate(train: Train, step: int) -> float:
    """The rate of optimizer step ``step`` (from 0): linear warm-up, then constant or half a cosine to ``final_ratio``."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return train.learning_rate * (train.final_ratio + (1 - train.final_ratio) * cosine)


Moments = dict[str, Tensor]
"""One parameter's optimizer state by key: ``exp_avg``, ``exp_avg_sq`` and, where kept, ``ema``."""


def state_keys(train: Train) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq") + (() if train.ema_decay is None else ("ema",))
