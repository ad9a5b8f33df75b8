"""AdamW that keeps an exponential moving average of the weights beside its moments, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import Train

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, by their keys in an optimizer's state."""


class AdamWithEma(torch.optim.AdamW):
    """``state[p]["ema"]`` follows the weights: ema = d * ema + (1 - d) * p with d = min(decay, (1 + n) / (10 + n)).

    It lives in the optimizer's state so that ZeRO shards it like the moments. While it ``refuses``, ``step`` does nothing.
    """

    refuses = False

    def __init__(self, groups: Iterable[dict[str, Any]], *, ema_decay: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.ema_decay = ema_decay

    def begin(self, p: Tensor, group: dict[str, Any], *, step: int) -> None:
        """Give ``p`` of ``group`` the state that it has after ``step`` updates, all zeros."""
        keys = MOMENTS if self.ema_decay is None else (*MOMENTS, "ema")
        self.state[p] = {"step": torch.tensor(float(step))} | {key: torch.zeros_like(p) for key in keys}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every state is a float32 tensor, to be read and written."""
        yield

    def update(self, closure: Callable[[], float] | None) -> None:
        """Of the weights and their moments."""
        super().step(closure)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.refuses:
            return
        if self.ema_decay is None:
            self.update(closure)
            return
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fresh = {p: p.detach().clone() for p in moving if "ema" not in self.state[p]}
        self.update(closure)
        for p in moving:
            state = self.state[p]
            if p in fresh:
                state["ema"] = fresh[p]
            count = int(state["step"])
            state["ema"].lerp_(p.detach(), 1 - min(self.ema_decay, (1 + count) / (10 + count)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay and may have moments of few bits (``low``); biases and norms, which are few, do and have not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "low": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "low": False},
    ]


def make_optimizer(model: nn.Module, train: Train) -> AdamWithEma:
    """As ``train.optimizer`` says. A ``ValueError`` names the library that it lacks."""
    return _kind(train)(
        parameter_groups(model, train.weight_decay),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.eps,
        ema_decay=train.ema_decay,
    )


def _kind(train: Train) -> type[AdamWithEma]:
    if train.optimizer == "adamw":
        return AdamWithEma
    try:
        from cogvideo_dist.engine.lowbit import LowBitAdamWithEma  # its library is an extra
    except ImportError as error:
        raise ValueError(
            f'train.optimizer: adamw8bit needs torchao, which cannot be imported ({error}): pip install "cogvideo_dist[lowbit]"'
        ) from None
    return LowBitAdamWithEma


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
    return MOMENTS if train.ema_decay is None else (*MOMENTS, "ema")
