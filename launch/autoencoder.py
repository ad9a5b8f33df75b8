"""The models of an autoencoder's training: itself, from wherever it starts, and the networks that judge it."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn

from cogvideo_dist.config.autoencoder import VAELoss, VAEModel, VAERun
from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import Train
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.engine.checkpoint import Stored, newest, read_parameters
from cogvideo_dist.models.critic import Critic, CriticConfig
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.perceptual import Perceptual
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.tasks.vae import Judges

FIELDS = {
    "channels": "block_out_channels", "layers_per_block": "layers_per_block", "latent_channels": "latent_channels",
    "norm_groups": "norm_groups", "scaling_factor": "scaling_factor",
}  # fmt: skip
"""What a configuration's ``model`` section says and what the model calls it."""


KINDS = {"raw": "weights", "ema": "ema"}
"""Weights as commands name them -> the kind of state that holds them."""


def vae_config(model: VAEModel) -> VAEConfig:
    return VAEConfig(**{theirs: getattr(model, ours) for ours, theirs in FIELDS.items()})


def build_vae(config: VAERun) -> VAE:
    """From ``model.weights`` (a diffusers ``vae`` folder or a run), else drawn from the seed."""
    wanted, source = vae_config(config.model), config.model.weights
    if source is None:
        model = VAE(wanted)
        draw_parameters(model, config.run.seed)
        return model
    path = Path(source)
    if (path / "config.yaml").exists():
        model, _ = trained_vae(path, None)
    elif (path / "config.json").exists():
        model = hf.load_vae(source).float()
    else:
        raise ConfigError(
            f"model.weights {source} is neither a run (config.yaml) nor a diffusers vae folder (config.json)"
        )
    for ours, theirs in FIELDS.items():
        found, said = getattr(model.config, theirs), getattr(wanted, theirs)
        if found != said:
            raise ConfigError(f"model.weights {source} has {ours} {found}, not {said}; set model.{ours} to that")
    return model


def trained_vae(path: Path, weights: str | None) -> tuple[VAE, int]:
    """The autoencoder of a run's newest whole checkpoint and its step; ``weights`` are "ema", "raw" or, left out, the averaged
    ones where the run keeps them."""
    if not is_vae_run(path):
        raise ConfigError(f"{path} is not a run of launch/train_vae.py")
    config = load_config(VAERun, [path / "config.yaml"])
    model = VAE(vae_config(config.model))
    weights = weights or kept_weights(config.train)
    return model, fill(model, newest_checkpoint(path, weights), weights=weights)


def build_judges(config: VAELoss, *, seed: int, device: torch.device) -> Judges:
    """The networks that the loss asks for."""
    perceptual = critic = None
    if config.perceptual is not None:
        perceptual = load_perceptual(config.perceptual.weights, config.perceptual.net).to(device)
    if config.critic is not None:
        critic = Critic(CriticConfig(channels=config.critic.channels))
        if config.critic.weights is None:
            draw_parameters(critic, seed)
        else:
            fill_critic(critic, Path(config.critic.weights))
    return Judges(perceptual, critic)


def load_perceptual(source: str, net: str) -> Perceptual:
    """LPIPS over a classifier's file, or over an untrained one; a file that is none is named."""
    try:
        return Perceptual(net, weights=source)
    # what its readers raise for bytes that they cannot make sense of, and for values that are no tensors
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "it ends too early")
        raise ConfigError(f"{source}: cannot be read as weights of torchvision's {net} ({reason})") from None


def fill_critic(critic: Critic, run: Path) -> None:
    """The weights of a run's critic."""
    stored = Stored.open(newest_checkpoint(run))
    if "weights" not in stored.kinds("critic"):
        raise ConfigError(f"loss.critic.weights: {stored.path} holds no critic; it was trained without one")
    _take(critic, stored, kind="weights", name="critic")


def kept_weights(train: Train) -> str:
    """The averaged ones where a run keeps them, else the last ones."""
    return "raw" if train.ema_decay is None else "ema"


def fill(model: nn.Module, checkpoint: Path, *, weights: str) -> int:
    """Load a checkpoint into what of ``model`` is trained (this rank's slice), averaged ("ema") or last ("raw") weights; its
    step."""
    stored = Stored.open(checkpoint)
    _take(model, stored, kind=weights_kind(stored, weights))
    return stored.saved.step


def _take(model: nn.Module, stored: Stored, *, kind: str, name: str = "") -> None:
    with torch.no_grad():
        for parameter, values in read_parameters(stored, model, kind=kind, name=name):
            parameter.copy_(values)


def weights_kind(stored: Stored, weights: str) -> str:
    """Under which kind a checkpoint has its averaged ("ema") or last ("raw") weights."""
    kind = KINDS[weights]
    if kind not in stored.kinds():
        raise ConfigError(
            f"{stored.path} keeps no averaged weights (train.ema_decay is off); take the last ones (--weights raw, or "
            "init.weights=raw)"
        )
    return kind


def newest_checkpoint(run: Path, weights: str | None = None) -> Path:
    """A run's newest whole one; whole as far as its averaged ("ema") or last ("raw") weights go, if these are all that is
    wanted."""
    checkpoint, _ = newest(run / "ckpt", kinds=[KINDS[weights]] if weights else None)
    if checkpoint is None:
        raise ConfigError(f"{run} has no checkpoint yet")
    return checkpoint


def is_vae_run(path: Path) -> bool:
    """Whether a run's folder is of launch/train_vae.py: only that one has a loss section."""
    import yaml

    return "loss" in yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
