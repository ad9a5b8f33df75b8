"""What a run is told: frozen dataclasses, each of which refuses impossible values in plain words.

Sizes are in pixels and frames, rates in frames per second, lengths of a run in optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cogvideo_dist.config.adaptation import Init, LoRA
from cogvideo_dist.config.watch import Watch
from cogvideo_dist.models.presets import PRESETS, DiTConfig, RopeGrid

Size = tuple[int, int, int]
"""(frames, height, width) of a clip in pixels."""

TEMPORAL, SPATIAL = 4, 8
"""Compression of the autoencoder: 4 frames (after the first) and 8 x 8 pixels to one latent."""


AttentionName = Literal["auto", "cpu", "efficient", "cudnn", "flash", "varlen", "flex", "flash_attn"]
"""Attention back ends: chosen for the device, torch's fused kernels clip by clip (cpu, efficient, cudnn, flash), its varlen and
flex attention over whole packs, the flash-attn package."""


def positive(section: str, **values: float | None) -> None:
    """Refuse values that are not above zero, naming the first."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{section}.{name} must be above 0, found {value}")


def share(section: str, **values: float | None) -> None:
    """Refuse values outside [0, 1), naming the first."""
    for name, value in values.items():
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{section}.{name} must be at least 0 and below 1, found {value}")


@dataclass(frozen=True)
class Run:
    """Where the run lives and the seed of everything random in it."""

    dir: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.dir.strip():
            raise ValueError("run.dir must name a folder")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed must be in [0, 2^63), found {self.seed}")


@dataclass(frozen=True)
class Model:
    """The transformer: a preset with what is changed in it, and the weights to start from (none: drawn from the seed)."""

    preset: str
    weights: str | None = None
    layers: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    time_embed_dim: int | None = None
    text_dim: int | None = None
    text_length: int | None = None
    sample_frames: int | None = None
    sample_height: int | None = None
    sample_width: int | None = None
    rope_grid: RopeGrid | None = None
    spatial_interpolation: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"model.preset {self.preset!r} is unknown; use one of {', '.join(PRESETS)}")
        changes = self.changes()
        positive("model", **{name: value for name, value in changes.items() if not isinstance(value, str)})
        self.transformer()

    def changes(self) -> dict[str, int | float | str]:
        """What differs from the preset."""
        names = ("layers", "heads", "head_dim", "time_embed_dim", "text_dim", "text_length", "sample_frames",
                 "sample_height", "sample_width", "rope_grid", "spatial_interpolation")  # fmt: skip
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def transformer(self) -> DiTConfig:
        preset = PRESETS[self.preset]
        return DiTConfig(**{**vars(preset), **self.changes()})


@dataclass(frozen=True)
class Parallel:
    """How many ranks share a sample: ``sp`` = ``ulysses`` x ``ring`` over its tokens, ``tp`` over features; the rest are data
    parallel. ``cp`` splits a video's frames over ranks of a sample. ``attention`` names the back end.

    Left out, ulysses takes what one node and the heads allow, and the ring the rest.
    """

    sp: int = 1
    tp: int = 1
    ulysses: int | None = None
    ring: int | None = None
    cp: int = 1
    attention: AttentionName = "auto"

    def __post_init__(self) -> None:
        positive("parallel", sp=self.sp, tp=self.tp, ulysses=self.ulysses, ring=self.ring, cp=self.cp)


@dataclass(frozen=True)
class Frozen:
    """The frozen models in the loop: diffusers folders of the autoencoder (``vae``) and of T5 with its tokenizer (``text``).

    ``text`` holds ``text_encoder/`` and ``tokenizer/``. Training from precomputed latents needs neither. ``vae_tiling`` has
    frames go through the autoencoder in overlapping tiles that blend (``Tiling.of``), which takes less memory; tiles and
    whole frames give different results.
    """

    vae: str | None = None
    vae_semantics: Literal["whole", "chunked"] = "whole"
    vae_tiling: bool = False
    text: str | None = None


@dataclass(frozen=True)
class Source:
    """A set of shards and its part in the mix: of all clips drawn, ``weight`` of the sum of weights are from it.

    ``score`` keeps the ``top_share`` of its usable samples that score best; samples without that score are not used. ``skip``:
    clips of it that an earlier stage has drawn (``drawn`` in that run's data.json when it has ended); its epochs go on from
    there.
    """

    shards: str
    weight: float = 1.0
    skip: int = 0
    score: str | None = None
    top_share: float = 1.0

    def __post_init__(self) -> None:
        positive("data.sources", weight=self.weight, top_share=self.top_share)
        if not self.shards.strip():
            raise ValueError("data.sources.shards must name a folder of shards")
        if self.skip < 0 or self.top_share > 1:
            raise ValueError("data.sources.skip must be >= 0 and top_share at most 1")
        if self.score is None and self.top_share < 1:
            raise ValueError("data.sources.top_share needs data.sources.score, the number to choose by")


@dataclass(frozen=True)
class Remote:
    """How shards are read that are not on this machine (s3://, gs://, https:// ...).

    ``cache``: a folder for what is fetched, at most ``gigabytes`` of it, which processes of a machine share. ``whole_shards``:
    shards are fetched whole, one stream each; else only the bytes of each sample are asked for, and kept nowhere.
    """

    cache: str = "~/.cache/cogvideo_dist"
    gigabytes: float = 100.0
    whole_shards: bool = False
    retries: int = 5

    def __post_init__(self) -> None:
        positive("data.remote", gigabytes=self.gigabytes)
        if not self.cache.strip() or self.retries < 0:
            raise ValueError("data.remote.cache must name a folder, data.remote.retries be >= 0")


@dataclass(frozen=True)
class Data:
    """What is read and how it is packed.

    ``shards`` names one set, or ``sources`` several with weights. ``mode``: ``pack`` mixes sizes in packs that are full and of
    equal cost; ``bucket`` has one size to a pack; ``pad`` takes clips as they come, as many as fit when all are as long as the
    longest: the last two to compare with. ``window``: shards whose samples are shuffled together. Workers hold at most
    ``memory_gb`` of packs ready.

    ``sizes`` lists the legal (frames, height, width); a clip takes the largest that needs no upscaling and fits its shape best.
    Where ``other_fps`` are given, a training clip is read at ``fps`` or at one of those, all higher, that its source reaches,
    drawn for each visit; held-out clips stay at ``fps``.
    """

    source: Literal["pixels", "latents"]
    sizes: tuple[Size, ...]
    fps: float
    tokens_per_pack: int
    packs_per_step: int
    shards: str | None = None
    sources: tuple[Source, ...] = ()
    mode: Literal["pack", "bucket", "pad"] = "pack"
    window: int = 8
    remote: Remote = field(default_factory=Remote)
    memory_gb: float = 4.0
    empty_captions: bool = False
    held_out: int = 0
    workers: int = 1
    max_bad_share: float = 0.01
    crop: Literal["random", "center"] = "random"
    other_fps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        positive("data", fps=self.fps, tokens_per_pack=self.tokens_per_pack, packs_per_step=self.packs_per_step)
        positive("data", window=self.window, memory_gb=self.memory_gb)
        share("data", max_bad_share=self.max_bad_share)
        if (self.shards is None) == (not self.sources):
            raise ValueError("data must name either shards, one set, or sources, several with their weights")
        if self.held_out < 0 or self.workers < 0:
            raise ValueError(f"data.held_out and data.workers must be >= 0, found {self.held_out} and {self.workers}")
        if any(rate <= self.fps for rate in self.other_fps):
            raise ValueError(
                f"data.other_fps {list(self.other_fps)} must be above data.fps {self.fps:g}, at which clips must be long enough"
            )
        if not self.sizes:
            raise ValueError("data.sizes must list at least one [frames, height, width]")
        for size in self.sizes:
            check_size("data.sizes", size)

    @property
    def all_sources(self) -> tuple[Source, ...]:
        return self.sources if self.shards is None else (Source(self.shards),)

    def planned(self) -> tuple[object, ...]:
        """The fields that decide which clips a step works on."""
        return (
            self.all_sources, self.source, self.sizes, self.fps, self.tokens_per_pack, self.packs_per_step, self.mode,
            self.window, self.held_out,
        )  # fmt: skip


def check_size(key: str, size: Size) -> None:
    """Refuse a size that the autoencoder and 2 x 2 patches cannot represent, naming the nearest that they can."""
    frames, height, width = size
    step = 2 * SPATIAL
    legal = (
        max(0, round((frames - 1) / TEMPORAL)) * TEMPORAL + 1,
        max(1, round(height / step)) * step,
        max(1, round(width / step)) * step,
    )
    if tuple(size) != legal:
        raise ValueError(
            f"{key}: {list(size)} is not a legal [frames, height, width]: frames must be 1 + {TEMPORAL}k, height and width "
            f"multiples of {step}; the nearest is {list(legal)}"
        )


@dataclass(frozen=True)
class Offload:
    """What is kept in the host's memory instead of the device's, and brought over when it is needed.

    ``activations``: what the forward keeps for the backward. ``optimizer``: masters and moments, which are updated there, under
    ZeRO 1 to 3. ``parameters``: a rank's share of the weights, under ZeRO 3.
    """

    activations: bool = False
    optimizer: bool = False
    parameters: bool = False


@dataclass(frozen=True)
class Train:
    """The optimizer's run. AdamW; the learning rate warms up linearly, then stays or falls as a cosine.

    ``optimizer: adamw8bit`` keeps both moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861).

    ``non_finite``: what is done about a step whose loss or gradients are not finite, and whose update no rank makes: ``stop``
    ends the run, ``skip`` goes on without, ``rewind`` goes back to the newest checkpoint and leaves it out on the way; at most
    ``non_finite_in_a_row`` in a row. ``checksum_every``: steps after which the weights that ranks hold alike are compared
    (0: never).
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "cosine"
    final_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1.0e-8
    weight_decay: float = 1.0e-4
    clip_norm: float | None = 1.0
    ema_decay: float | None = 0.9999
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    recompute: Literal["none", "feed_forward", "all_but_attention", "full"] = "none"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    offload: Offload = field(default_factory=Offload)
    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    non_finite_in_a_row: int = 3
    checksum_every: int = 500

    def __post_init__(self) -> None:
        if self.offload.parameters and self.zero_stage != 3:
            raise ValueError(f"train.offload.parameters needs train.zero_stage 3, found {self.zero_stage}")
        if self.offload.optimizer and self.zero_stage == 0:
            raise ValueError("train.offload.optimizer needs train.zero_stage 1, 2 or 3, found 0")
        if self.offload.activations and self.recompute not in ("none", "full"):
            raise ValueError(
                f"train.offload.activations goes with train.recompute none or full, found {self.recompute}, under which blocks "
                "hold on to the inputs that they compute from again"
            )
        positive("train", steps=self.steps, eps=self.eps, clip_norm=self.clip_norm)
        if self.non_finite_in_a_row < 1 or self.checksum_every < 0:
            raise ValueError("train.non_finite_in_a_row must be at least 1, train.checksum_every at least 0")
        share("train", **{"betas.0": self.betas[0], "betas.1": self.betas[1], "ema_decay": self.ema_decay})
        if self.learning_rate < 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError("train.learning_rate, weight_decay and warmup_steps must be >= 0")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"train.final_ratio must be in [0, 1], found {self.final_ratio}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"train.warmup_steps {self.warmup_steps} exceeds train.steps {self.steps}")


@dataclass(frozen=True)
class ImageCondition:
    """How the first frame becomes the condition of an image-to-video model, in training and in sampling.

    In training it is covered with noise of standard deviation exp(N(``noise_mean``, ``noise_std``)), drawn for each clip, and
    left out with probability ``dropout``. ``latent_scale``: its latent is multiplied by the autoencoder's factor (``scale``, as
    SAT trains), left as it is (``none``, as SAT samples) or divided by it (``inverse``, as diffusers does where a transformer's
    configuration has invert_scale_latents). ``rest``: what stands for the frames behind it. ``ofs`` goes with 1.5.
    """

    noise_mean: float = -3.0
    noise_std: float = 0.5
    dropout: float = 0.05
    latent_scale: Literal["scale", "none", "inverse"] = "scale"
    rest: Literal["zeros", "repeat"] = "zeros"
    ofs: float = 2.0

    def __post_init__(self) -> None:
        share("diffusion.image", dropout=self.dropout)
        if self.noise_std < 0:
            raise ValueError(f"diffusion.image.noise_std must be >= 0, found {self.noise_std}")


@dataclass(frozen=True)
class Diffusion:
    """The training objective: v-prediction on the zero-terminal-SNR schedule. ``image``: of an image-to-video model."""

    snr_shift: float = 1.0
    timesteps: Literal["stratified", "uniform"] = "stratified"
    weighting: Literal["element", "clip"] = "element"
    """``element``: every latent element of a step counts alike; ``clip``: every clip does."""
    text_dropout: float = 0.1
    image: ImageCondition = field(default_factory=ImageCondition)

    def __post_init__(self) -> None:
        positive("diffusion", snr_shift=self.snr_shift)
        share("diffusion", text_dropout=self.text_dropout)


@dataclass(frozen=True)
class Checkpoint:
    """When the run's state is written and how long it is kept: the newest ``keep``, those of every ``keep_every``-th step, and
    the ``keep_best`` whose figure ``best_by`` of the held-out clips is smallest.

    ``asynchronous``: the run stands still for the copy to the host's memory only; if one is still being written when the next
    is due, that waits or is skipped (``while_busy``). ``failures``: how many in a row that cannot be written end the run.
    ``upload``: a folder or URL (s3://, gs://, ...) that every checkpoint is copied to.
    """

    every: int
    keep: int = 3
    keep_every: int | None = None
    keep_best: int = 0
    best_by: str = "held_out/loss"
    asynchronous: bool = True
    while_busy: Literal["wait", "skip"] = "wait"
    failures: int = 3
    upload: str | None = None

    def __post_init__(self) -> None:
        positive("checkpoint", every=self.every, keep=self.keep, keep_every=self.keep_every, failures=self.failures)
        if self.keep_best < 0:
            raise ValueError(f"checkpoint.keep_best must be at least 0, found {self.keep_best}")


@dataclass(frozen=True)
class Log:
    """``peak_tflops``: the device's peak for the utilisation figure; left out, it is looked up, or measured on a CPU.

    ``spikes``: by how many deviations a reported loss or gradient norm must exceed the median of earlier ones to be called a
    spike (0: none is).
    """

    every: int = 10
    peak_tflops: float | None = None
    spikes: float = 8.0

    def __post_init__(self) -> None:
        positive("log", every=self.every, peak_tflops=self.peak_tflops)
        if self.spikes < 0:
            raise ValueError(f"log.spikes must be at least 0, found {self.spikes}")


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled."""

    steps: int = 50
    sampler: Literal["ddim", "dpmpp_2m_sde"] = "dpmpp_2m_sde"
    guidance: float = 6.0
    guidance_kind: Literal["constant", "dynamic", "ramp"] = "dynamic"
    """``dynamic`` is what the released code does (on the training timestep), ``ramp`` what it meant (on the step)."""
    size: Size = (49, 480, 720)
    fps: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive("sampling", steps=self.steps, fps=self.fps)
        check_size("sampling.size", self.size)


@dataclass(frozen=True)
class Validation:
    """Held-out loss on a fixed grid of noise and timesteps, and samples of ``prompts``. 0 means never.

    ``images``: the first frame for each prompt, of an image-to-video model.
    """

    every: int = 0
    samples_every: int = 0
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if min(self.every, self.samples_every) < 0:
            raise ValueError("validation.every and samples_every must be >= 0")
        if not self.timesteps or not all(0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"validation.timesteps must be integers in [0, 1000), found {list(self.timesteps)}")
        if self.samples_every and not self.prompts:
            raise ValueError("validation.prompts must name at least one prompt where samples_every is set")


@dataclass(frozen=True)
class DiTRun:
    """A run of launch/train_dit.py, of a text-to-video or an image-to-video model.

    ``init`` starts it from another run; ``lora`` trains adapters alone.
    """

    run: Run
    model: Model
    data: Data
    train: Train
    checkpoint: Checkpoint
    init: Init | None = None
    lora: LoRA | None = None
    parallel: Parallel = field(default_factory=Parallel)
    frozen: Frozen = field(default_factory=Frozen)
    diffusion: Diffusion = field(default_factory=Diffusion)
    log: Log = field(default_factory=Log)
    watch: Watch = field(default_factory=Watch)
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        if self.init is not None and self.model.weights is not None:
            raise ValueError("model.weights and init.from are two beginnings; leave one of them out")
        if self.model.transformer().image_channels and not self.frozen.vae:
            raise ValueError(
                f"frozen.vae must name an autoencoder for model.preset {self.model.preset}: its condition is the first frame "
                "with noise on it, which is drawn anew for every visit"
            )
        if self.validation.samples_every and self.model.transformer().image_channels:
            wanted, found = len(self.validation.prompts), len(self.validation.images)
            if found != wanted:
                raise ValueError(
                    f"validation.images must name an image for each of the {wanted} prompts, found {found}"
                )
        if self.data.source == "pixels" and not (self.frozen.vae and self.frozen.text):
            raise ValueError("data.source: pixels needs frozen.vae and frozen.text, which encode in the loop")
        if self.validation.samples_every and not (self.frozen.vae and self.frozen.text):
            raise ValueError(
                "validation.samples_every needs frozen.vae and frozen.text to encode prompts and decode videos"
            )
