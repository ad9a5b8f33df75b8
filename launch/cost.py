"""What a run of launch/train_dit.py takes, on paper: python launch/cost.py --config FILE [key=value ...] --gpus N

Assumptions. Packs are full of the size that costs most a token, so times are upper bounds. Matrix products run at ``GEMM`` and
attention at ``ATTENTION`` (launch/compose.py), a backward of attention makes its scores again (2.5 forwards), everything
elementwise takes ``ELEMENTWISE`` more, and nothing that is sent hides behind anything that is computed. Every rank of a sample
encodes the whole sample. A layer keeps ``KEPT`` bytes for the backward of each token and hidden element in 16 bits, and its
backward needs ``WORKING`` more; gradients and their copies are those of DeepSpeed 0.19. Left out: the embeddings and the head
(under 1 % of the work), the low-rank products that adapters keep (3 % of activations at rank 128), the loader, and what
the allocator loses to fragments, for which a tenth of the card should stay free. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from cogvideo_dist.config.adaptation import LoRA
from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun, Frozen, Size, Train
from cogvideo_dist.data.loader import check_ranks
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import adapt, is_adapter
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.parallel.mesh import Axis, Layout, choose_layout
from cogvideo_dist.parallel.volumes import Volumes, layer_bytes, modulation_bytes
from launch.compose import ATTENTION, GEMM, TransformerGeometry
from launch.environment import config_parser, run_command, split_config

Device = Literal["cuda", "cpu"]

PEAK = 989e12
"""Operations a second of an H100 in 16 bits, by its data sheet: what utilisation is a part of."""

ELEMENTWISE = 1.1
LINK, HOST_LINK, HOST = 330e9, 50e9, 20e9
"""Bytes a second: between GPUs (NVLink, or eight 400 Gb cards to a node), to the host's memory, of an update done there."""

CONVOLUTION, SINGLE = 200e12, 40e12
"""Operations a second of the frozen models, which run in 32 bits: convolutions through TF32, the text encoder without."""

KEPT = {"none": 20, "feed_forward": 12, "all_but_attention": 6, "full": 2}
"""Bytes, in 16 bits, that a layer keeps for each token and hidden element: ten tensors; six; three; its input."""

LINEARS = {True: 72, False: 48}
"""Of all linears of a block, forward and backward, in n d^2: with the weights' gradients, and without them for adapters."""

REDONE = {"none": (0, 0), "feed_forward": (8, 0), "all_but_attention": (14, 0), "full": (24, 4)}
"""What the backward makes again: linears, in n d^2, and attention, in n^2 d. ``full`` repeats the forward."""

WORKING = {2: 24, 4: 18}
"""Bytes, in 16 bits, for each token and hidden element that the backward of a block needs beside what is kept and made again,
by those of an element: in 32 bits the rotation of queries and keys is no wider than they are."""

BUCKET, GATHERED, FETCHED = 5e8, 1e9, 5e7
"""Elements of DeepSpeed's buffer of gradients on their way; the most that stage 3 has of other ranks' weights at a time; what
it fetches ahead, of which it has a second copy meanwhile."""

UPDATED: dict[Device, int] = {"cuda": 1, "cpu": 2}
"""Copies of what a rank updates that AdamW makes on the way."""

TEXT_ENCODER, AUTOENCODER = 4.762e9, 215_583_907
"""Parameters of T5-v1.1-XXL's encoder and of the released autoencoder, both of which runs hold in 32 bits."""

ENCODING, DECODING = {"whole": 4.5, "chunked": 7.5}, {"whole": 5.5, "chunked": 9.5}
"""Tensors of 128 channels and full resolution that the autoencoder has at a time; ``chunked`` has them of nine frames, and its
convolutions' last two frames among them."""

PER_PIXEL = 8.8e6
"""Operations of the autoencoder's encoder for a pixel of a frame."""

NODE = 8
"""GPUs of a node, among which a sample is shared first."""


@dataclass(frozen=True)
class Pack:
    """The costliest pack: ``clips`` of one ``size``, each of ``length`` tokens."""

    size: Size
    clips: int
    length: int

    @property
    def tokens(self) -> int:
        return self.clips * self.length

    @property
    def squares(self) -> int:
        return self.clips * self.length**2


@dataclass(frozen=True)
class Share:
    """What is one GPU's of a run. ``parameters``: of the whole model without adapters; ``own``: of this rank's, ``trained``:
    those of this rank's, adapters or all, that learn; ``adapters``: of all adapters of the whole model."""

    config: DiTRun
    model: DiTConfig
    layout: Layout
    pack: Pack
    parameters: int
    adapters: int
    own: int
    trained: int

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, over which ZeRO divides."""
        return self.layout.dp * self.layout.ring * self.layout.ulysses

    @property
    def sharers(self) -> int:
        """Ranks that share a pack."""
        return self.layout.ring * self.layout.ulysses * self.layout.tp

    @property
    def micro_steps(self) -> int:
        return self.config.data.packs_per_step // self.layout.dp

    @property
    def element(self) -> int:
        """Bytes of a weight and an activation."""
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def stage(self) -> int:
        """Of ZeRO; 16 bits run stage 0 as stage 1."""
        return max(self.config.train.zero_stage, 0 if self.element == 4 else 1)

    @property
    def merged(self) -> bool:
        """Whether DeepSpeed runs stage 1 with the optimizer that it has for bfloat16 alone."""
        return self.stage == 1 and self.config.train.precision == "bf16"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. ``gradients`` and DeepSpeed's ``buffers``: while activations are kept, or the frozen models are at work
    instead (``encoding``, ``sampling``). ``reduction`` and ``update``: all that there is of gradients and their copies as they
    are reduced and as the optimizer works, when activations are gone."""

    weights: float
    gradients: float
    states: float
    buffers: float
    frozen: float
    activations: float
    encoding: float
    sampling: float
    reduction: float
    update: float

    @property
    def moments(self) -> dict[str, dict[str, float]]:
        """Moment of a step -> what is there beside weights, states and frozen models."""
        learning = {"gradients": self.gradients, "buffers": self.buffers}
        found = {name: {**learning, name: getattr(self, name)} for name in ("activations", "encoding", "sampling")}
        return found | {name: {name: getattr(self, name)} for name in ("reduction", "update")}

    @property
    def at_peak(self) -> dict[str, float]:
        """What there is at the moment that takes most."""
        fullest = max(self.moments.values(), key=lambda parts: sum(parts.values()))
        return {"weights": self.weights, "states": self.states, "frozen": self.frozen, **fullest}

    @property
    def peak(self) -> float:
        return sum(self.at_peak.values())


@dataclass(frozen=True)
class Seconds:
    """Of one step: the transformer's forward and backward, the frozen models, what is sent, the update in the host's memory."""

    transformer: float
    frozen: float
    sent: float
    update: float

    @property
    def step(self) -> float:
        return self.transformer + self.frozen + self.sent + self.update


@dataclass(frozen=True)
class Cost:
    """Of a run on ``gpus``. ``flops``: those of a step that its mathematics asks for, without what is made again."""

    gpus: int
    share: Share
    memory: Memory
    seconds: Seconds
    flops: float

    @property
    def mfu(self) -> float:
        return self.flops / (self.seconds.step * self.gpus * PEAK)

    @property
    def gpu_hours(self) -> float:
        return self.seconds.step * self.share.config.train.steps * self.gpus / 3600


def cost_of(config: DiTRun, gpus: int) -> Cost:
    """Raises ``ValueError`` where the run's layout or its packs do not divide over ``gpus``."""
    if gpus < 1:
        raise ValueError(f"a run needs at least 1 GPU, found {gpus}")
    heads = config.model.transformer().heads
    layout = choose_layout(config.parallel, world=gpus, heads=heads, node=min(gpus, NODE))
    share = share_of(config, layout)
    return Cost(gpus, share, memory_of(share), seconds_of(share), config.data.packs_per_step * flops_of(share))


def share_of(config: DiTRun, layout: Layout) -> Share:
    """Raises ``ValueError`` where the packs do not divide over the layout."""
    check_ranks(config.data.packs_per_step, layout.dp)
    model = config.model.transformer()
    (parameters, adapters), (own, own_adapters) = (counted(model, lora=config.lora, tp=tp) for tp in (1, layout.tp))
    trained = own if config.lora is None else own_adapters
    return Share(config, model, layout, costliest_pack(config), parameters, adapters, own, trained)


@lru_cache
def counted(model: DiTConfig, *, lora: LoRA | None = None, tp: int = 1) -> tuple[int, int]:
    """Parameters of a tensor-parallel rank's transformer and of its adapters, counted on real modules without memory."""
    with torch.device("meta"):
        dit = DiT(model, tp=Axis("tp", 0, tp, tuple(range(tp))))
        if lora is not None:
            adapt(dit, lora.adapters())
    adapters = sum(p.numel() for name, p in dit.named_parameters() if is_adapter(name))
    return sum(p.numel() for p in dit.parameters()) - adapters, adapters


def costliest_pack(config: DiTRun) -> Pack:
    """The pack, full of one of ``data.sizes``, that takes longest."""
    geometry = TransformerGeometry(config.model.transformer())
    packs = []
    for size in config.data.sizes:
        clip = geometry(size)
        if count := config.data.tokens_per_pack // clip.tokens:
            packs.append((count * geometry.cost(clip), Pack(size, count, clip.tokens)))
    if not packs:
        raise ValueError(f"data.tokens_per_pack {config.data.tokens_per_pack} holds none of data.sizes")
    return max(packs, key=lambda pair: pair[0])[1]


def flops_of(share: Share) -> float:
    """Of one pack: a forward and its backward, which has no weights' gradients but those of adapters."""
    model, pack = share.model, share.pack
    blocks = LINEARS[share.config.lora is None] * pack.tokens * model.hidden**2 + 12 * pack.squares * model.hidden
    return model.layers * blocks + 6 * pack.tokens * share.adapters


def memory_of(share: Share, *, device: Device = "cuda") -> Memory:
    """On one GPU, or in one rank on CPUs, where collectives and updates make other copies."""
    config, train, model = share.config, share.config.train, share.model
    divided = [share.replicas if share.stage >= bound else 1 for bound in (1, 3)]  # states, weights
    masters = 0 if share.stage else 4  # stage 0 updates the weights themselves
    kept = KEPT[train.recompute] * (1 if train.offload.activations else model.layers)
    again = KEPT["none"] - KEPT[train.recompute]  # of one block, as its backward comes
    tokens = config.data.tokens_per_pack / share.sharers
    encoding, sampling = frozen_at_work(share)
    return Memory(
        weights=0.0 if train.offload.parameters else share.element * share.own / divided[1],
        gradients=gradients_kept(share),
        states=0.0 if train.offload.optimizer else (states_of(train) - masters) * share.trained / divided[0],
        buffers=buffers_of(share),
        frozen=frozen_bytes(config),
        activations=(kept + again + WORKING[share.element]) * share.element / 2 * tokens * model.hidden,
        encoding=encoding,
        sampling=sampling,
        reduction=reduction_of(share, device=device),
        update=update_of(share, device=device),
    )


def states_of(train: Train) -> int:
    """Bytes for each parameter that learns: masters, moments and their average."""
    return 4 + (8 if train.optimizer == "adamw" else 2) + (0 if train.ema_decay is None else 4)


def gradients_kept(share: Share) -> float:
    """Bytes of gradients while activations are kept: those of earlier packs of a step; DeepSpeed's stage 3, and its stage 1 of
    bfloat16, have their sums at all times, the latter beside the gradients themselves."""
    earlier = share.micro_steps > 1
    if share.merged:
        return (4.0 + share.element * earlier) * share.trained
    if share.stage == 3:
        return 4.0 * share.trained / share.replicas
    return 4.0 * earlier * share.trained / (share.replicas if share.stage == 2 else 1)


def buffers_of(share: Share) -> float:
    """Bytes of DeepSpeed's buffers while activations are kept. Stage 3 has weights of others, some twice as they come, and
    where the gradients do not fit the bucket, it is copied to be scattered meanwhile."""
    if share.stage == 0 or share.merged:
        return 0.0
    if share.stage < 3:
        return (4 if share.stage == 1 else share.element) * BUCKET
    ahead = min(share.own, FETCHED + share.own / share.model.layers)
    again = BUCKET if share.trained > BUCKET else 0.0
    return share.element * (BUCKET + again + min(share.own, GATHERED) + ahead)


def reduction_of(share: Share, *, device: Device) -> float:
    """Bytes of gradients and their copies at the end of a backward."""
    bucket, part = min(share.trained, BUCKET), share.trained / share.replicas
    if share.stage == 0:
        return 4.0 * (share.trained + bucket)
    if share.merged:
        return (4.0 + share.element) * (share.trained + bucket)
    if share.stage == 3:  # gloo scatters a copy
        return 4 * part + share.element * (BUCKET + bucket * (2 if device == "cpu" else 1))
    kept = 4 * part if share.stage == 2 and share.micro_steps > 1 else 0.0
    return buffers_of(share) + kept + share.element * part


def update_of(share: Share, *, device: Device) -> float:
    """Bytes of gradients, their copies and the optimizer's own as it works on the device; 8 bits work in small parts."""
    train, part = share.config.train, share.trained / share.replicas
    if train.offload.optimizer:
        return 0.0
    copies = UPDATED[device] if train.optimizer == "adamw" else 0
    if share.stage == 0:  # on CPUs one parameter after the other
        return 4.0 * share.trained * (2 if device == "cuda" else 1)
    if share.merged:
        return (4.0 + share.element) * share.trained + 4 * copies * part
    flat = 4 * part if share.stage == 3 or share.element == 4 else 0.0
    return 4 * part + flat + 4 * copies * part + (share.element * BUCKET if share.stage == 3 else 0.0)


def frozen_bytes(config: DiTRun) -> float:
    """Of the frozen models: both for pixels and for pictures; the autoencoder for the condition of image-to-video models."""
    both = config.data.source == "pixels" or config.validation.samples_every > 0
    autoencoder = both or config.model.transformer().image_channels > 0
    return 4.0 * (TEXT_ENCODER * both + AUTOENCODER * autoencoder)


def frozen_at_work(share: Share) -> tuple[float, float]:
    """Bytes of the autoencoder as it encodes a pack, whose clips of one size it takes together, and as it decodes a validation
    video, to which the weights belong that the averaged ones stand in for meanwhile."""
    config, semantics = share.config, share.config.frozen.vae_semantics
    encoding = sampling = 0.0
    if config.data.source == "pixels":
        encoding = ENCODING[semantics] * share.pack.clips * full_tensor(config.frozen, share.pack.size)
    if config.validation.samples_every:
        replaced = 0 if config.train.ema_decay is None else share.element * share.trained
        sampling = DECODING[semantics] * full_tensor(config.frozen, config.validation.sampling.size) + replaced
    return encoding, sampling


def full_tensor(frozen: Frozen, size: Size) -> float:
    """Bytes of 128 channels in 32 bits over the frames, and the part of the picture, that the autoencoder has at a time."""
    frames, height, width = size
    if frozen.vae_semantics == "chunked":
        frames = min(frames, 9)
    if frozen.vae_tiling:
        height, width = min(height, 240), min(width, 360)
    return 4.0 * 128 * frames * height * width


def seconds_of(share: Share) -> Seconds:
    """Of a step."""
    update = (
        share.trained / share.replicas * (6 / HOST_LINK + 36 / HOST) if share.config.train.offload.optimizer else 0.0
    )
    frozen = share.micro_steps * frozen_seconds(share.config, share.pack)
    return Seconds(share.micro_steps * transformer_seconds(share), frozen, sum(sent(share).values()) / LINK, update)


def transformer_seconds(share: Share) -> float:
    """Of one pack."""
    train, model, pack = share.config.train, share.model, share.pack
    linears = (LINEARS[share.config.lora is None] + REDONE[train.recompute][0]) * pack.tokens * model.hidden**2
    products = linears * model.layers + 6 * pack.tokens * share.adapters
    computed = ELEMENTWISE * products / GEMM / share.sharers + attention_seconds(share)
    if not train.offload.activations:
        return computed
    # Out in the forward and back in the backward, beside the computation.
    moved = 2 * KEPT[train.recompute] * share.element / 2 * pack.tokens * model.hidden * model.layers / share.sharers
    return max(computed, moved / HOST_LINK)


def attention_seconds(share: Share) -> float:
    """Of one pack."""
    model = share.model
    attention = (14 + REDONE[share.config.train.recompute][1]) * share.pack.squares * model.hidden * model.layers
    return ELEMENTWISE * attention / ATTENTION / share.sharers


def frozen_seconds(config: DiTRun, pack: Pack) -> float:
    """Of one pack: of clips from pixels all frames through the autoencoder and captions through the text encoder, and for
    image-to-video models one frame more, the condition."""
    model, (frames, height, width) = config.model.transformer(), pack.size
    pixels = config.data.source == "pixels"
    encoded = (frames if pixels else 0) + (1 if model.image_channels else 0)
    text = 2 * TEXT_ENCODER * model.text_length if pixels else 0.0
    return pack.clips * (PER_PIXEL * encoded * height * width / CONVOLUTION + text / SINGLE)


def sent(share: Share) -> Volumes:
    """Bytes that a rank sends in a step: for its packs over the axes of a sample, and over ``replica`` to those with the same
    parameters."""
    model = share.model
    shape = {"hidden": model.hidden, "heads": model.heads, "element_size": share.element}
    layer = layer_bytes(share.layout, tokens=share.pack.tokens, recompute=share.config.train.recompute, **shape)
    if share.layout.tp > 1:
        layer["tp", "sum"] = modulation_bytes(share.layout, clips=share.pack.clips, **shape)
    pack = {key: model.layers * value for key, value in layer.items()}
    if share.layout.tp > 1:
        pack["tp", "sum"] += 2 * (1 - 1 / share.layout.tp) * share.element * outside(model, clips=share.pack.clips)
    return {key: share.micro_steps * value for key, value in pack.items()} | sent_for_update(share)


def outside(model: DiTConfig, *, clips: int) -> int:
    """Elements beside the blocks whose gradients the ranks of tp, who hold them alike, sum for every pack: embeddings, learned
    positions, the head with its final norm and, for each clip, its modulation."""
    wide = model.patch_features_in + model.text_dim + model.patch_features_out + 2 + 2 + 2 * clips
    positions = model.text_length + math.prod(model.sample_grid) if model.learned_positions else 0
    return model.hidden * (wide + positions) + model.patch_features_out


def sent_for_update(share: Share) -> Volumes:
    """Gradients to their owners (under stages 2 and 3 with every pack) and new weights to everyone; under stage 3 instead all
    weights in every forward and backward."""
    if share.replicas == 1:
        return {}
    reductions = share.micro_steps if share.stage >= 2 else 1
    weights = 2 * share.micro_steps * share.own if share.stage == 3 else share.trained
    each = share.element * (share.replicas - 1) / share.replicas
    return {("replica", "reduce"): each * reductions * share.trained, ("replica", "gather"): each * weights}


def rows(cost: Cost) -> dict[str, str]:
    """The figures in words; files under configs/ have those of Memory, Step time and Cost in their headers."""
    share, memory, seconds = cost.share, cost.memory, cost.seconds
    train, data, pack = share.config.train, share.config.data, share.pack
    learning = "all" if share.config.lora is None else f"{share.adapters:,} of adapters"
    parts = ", ".join(f"{name} {gigabytes(value)}" for name, value in memory.at_peak.items() if value >= 5e7)
    times = ", ".join(f"{name} {duration(value)}" for name, value in vars(seconds).items() if value >= 5e-4)
    return {
        "Model": f"{share.config.model.preset}: {share.parameters:,} parameters; trained: {learning}",
        "GPUs": f"{cost.gpus}: {share.layout.name}, ZeRO {train.zero_stage}, {train.precision}, recompute {train.recompute}",
        "Step": f"{data.packs_per_step} packs of {data.tokens_per_pack:,} tokens, such as {pack.clips} x {list(pack.size)}",
        "Memory": f"{gigabytes(memory.peak)} a GPU",
        "In memory": parts,
        "Step time": f"{duration(seconds.step)}",
        "In a step": times,
        "MFU": f"{cost.mfu:.0%} of {PEAK / 1e12:.0f} TFLOP/s",
        "Cost": f"{significant(cost.gpu_hours)} GPU-hours for {train.steps:,} steps",
    }


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.0f} GB" if value >= 9.95e9 else f"{value / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    return f"{significant(seconds)} s"


def significant(value: float) -> str:
    """To two digits."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.2g}"


def main() -> None:
    parser = config_parser(
        "Parameters, memory of a GPU, time of a step and cost of a run of train_dit.py, on paper: nothing is loaded or run.",
        "python launch/cost.py --config configs/cogvideox-5b/base.yaml configs/cogvideox-5b/sft.yaml --gpus 8",
    )
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="how many the run has (%(default)s)")
    options = parser.parse_args()
    config = load_config(DiTRun, **split_config(options.config))
    for name, text in rows(cost_of(config, options.gpus)).items():
        print(f"{name:<10} {text}")


if __name__ == "__main__":
    run_command("cost", main)
