"""Adapters of finished runs on top of a model: what ``--adapter RUN=SHARE`` of launch/sample.py stands for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import adapt, merge
from launch.autoencoder import fill, kept_weights
from launch.beginning import different, newest_checkpoint


class Given(NamedTuple):
    """A run of adapters, and how much of their update is added."""

    run: Path
    share: float


def read_adapter(text: str) -> Given:
    """RUN or RUN=SHARE; a folder's own name may have a =."""
    run, equals, share = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Given(Path(text), 1.0)
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--adapter {text}: expected RUN or RUN=SHARE with a number, such as runs/style=0.7")
    return Given(Path(run), value)


def check_adapter(given: Given) -> DiTRun:
    """Its run's configuration; refuses what is no run of adapters."""
    path = given.run / "config.yaml"
    if not path.exists():
        raise ConfigError(f"--adapter {given.run}: no run (it has no config.yaml)")
    config = load_config(DiTRun, [path])
    if config.lora is None:
        raise ConfigError(f"--adapter {given.run}: trained all weights, no adapters; give it as --checkpoint")
    return config


def merge_adapter(model: DiT, given: Given) -> int:
    """Add a run's adapters, averaged ones where it keeps them, to a model of the same shape; the step they are of."""
    config = check_adapter(given)
    assert config.lora is not None
    if difference := different(config.model.transformer(), model.config):
        raise ConfigError(f"--adapter {given.run} is of another model: {difference}")
    adapt(model, config.lora.adapters())
    checkpoint = newest_checkpoint(given.run)
    step = fill(model, checkpoint, weights=kept_weights(config.train))
    merge(model, given.share)
    return step
