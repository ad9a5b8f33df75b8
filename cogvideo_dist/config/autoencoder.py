"""What a run of launch/train_vae.py is told, beside what ``schema.py`` has for all runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cogvideo_dist.config.schema import Checkpoint, Data, Log, Run, Train, Validation, positive, share
from cogvideo_dist.config.watch import Watch


@dataclass(frozen=True)
class VAEModel:
    """The autoencoder; the defaults are the released one's. ``weights``: a diffusers folder or a run to start from, whose
    averaged weights are taken where it keeps them."""

    channels: tuple[int, int, int, int] = (128, 256, 256, 512)
    layers_per_block: int = 3
    latent_channels: int = 16
    norm_groups: int = 32
    scaling_factor: float = 0.7
    weights: str | None = None

    def __post_init__(self) -> None:
        positive("model", layers_per_block=self.layers_per_block, latent_channels=self.latent_channels)
        for width in self.channels:
            if width < 1 or width % self.norm_groups:
                raise ValueError(f"model.channels: {width} does not divide into model.norm_groups {self.norm_groups}")


@dataclass(frozen=True)
class PerceptualLoss:
    """LPIPS, averaged over frames. ``weights``: a file of torchvision's classifier ``net`` (vgg is VGG16), .safetensors or
    .pth; ``random``: an untrained one, which is for trying things out. With ``weight`` 0 it measures held-out clips alone."""

    weights: str
    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"loss.perceptual.weight must be >= 0, found {self.weight}")
        if not self.weights.strip():
            raise ValueError("loss.perceptual.weights must name a file of torchvision's classifier, or be random")


@dataclass(frozen=True)
class CriticLoss:
    """Adversarial training from optimizer step ``start`` on, against a 3D patch critic with an optimizer of its own.

    ``weight`` of what the decoder loses to it, after that has been balanced against the reconstruction's gradient.
    ``r1_weight``: gamma of the gradient penalty, which every ``r1_every``-th step pays for all. ``weights``: a run whose
    critic is taken over. Its learning rate warms up from ``start`` on and stays.
    """

    start: int
    learning_rate: float
    weight: float = 0.5
    warmup_steps: int = 0
    channels: tuple[int, ...] = (64, 128, 256, 512)
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    r1_weight: float = 0.0
    r1_every: int = 1
    weights: str | None = None

    def __post_init__(self) -> None:
        if min(self.start, self.warmup_steps, self.r1_weight, self.weight_decay) < 0:
            raise ValueError("loss.critic.start, warmup_steps, r1_weight and weight_decay must be >= 0")
        positive(
            "loss.critic", learning_rate=self.learning_rate, weight=self.weight, clip_norm=self.clip_norm,
            r1_every=self.r1_every,
        )  # fmt: skip
        share("loss.critic", **{"betas.0": self.betas[0], "betas.1": self.betas[1]})
        if not self.channels or min(self.channels) < 1:
            raise ValueError("loss.critic.channels must list a positive number for each layer")


@dataclass(frozen=True)
class VAELoss:
    """What the autoencoder is trained on: the reconstruction's error, KL to the normal distribution and, where given, LPIPS
    and what a critic says. Error and KL are averaged over pixels and colours."""

    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1.0e-6
    perceptual: PerceptualLoss | None = None
    critic: CriticLoss | None = None


@dataclass(frozen=True)
class TimeParallel:
    """``cp`` ranks share every video's frames; the rest are data parallel. Clips too short to split go whole to one of them."""

    cp: int = 1

    def __post_init__(self) -> None:
        positive("parallel", cp=self.cp)


@dataclass(frozen=True)
class VAERun:
    """A run of launch/train_vae.py. ``data.tokens_per_pack`` counts latents (t x h x w) here."""

    run: Run
    data: Data
    train: Train
    checkpoint: Checkpoint
    model: VAEModel = field(default_factory=VAEModel)
    parallel: TimeParallel = field(default_factory=TimeParallel)
    loss: VAELoss = field(default_factory=VAELoss)
    log: Log = field(default_factory=Log)
    watch: Watch = field(default_factory=Watch)
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        if self.train.zero_stage == 3:
            raise ValueError(
                "train.zero_stage must be 0, 1 or 2 for the autoencoder: ranks run it once per size of clip, and stage 3 "
                "waits for all of them in every forward"
            )
        if self.data.source != "pixels":
            raise ValueError("data.source must be pixels to train the autoencoder")
        if self.loss.critic is not None and self.loss.critic.start >= self.train.steps:
            raise ValueError(
                f"loss.critic.start {self.loss.critic.start} is not before the run's end, train.steps {self.train.steps}; "
                "leave loss.critic out to train without one"
            )
