"""What a rank of launch/parity.py computes: one step's gradients, a few steps' weights, and what it sent meanwhile.

Everything random follows from the configuration's seed and what it is for, so every layout is given the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, AttentionName, DiTRun, Size, Train
from cogvideo_dist.engine.optim import learning_rate
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models import dit
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.lora import adapt
from cogvideo_dist.models.presets import LATENT_SCALE
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.pack import ring, shard
from cogvideo_dist.pack.attention import backend_for
from cogvideo_dist.pack.layout import PackLayout
from cogvideo_dist.parallel import ops
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, Place, start
from cogvideo_dist.parallel.ops import barrier, reduce_sum
from cogvideo_dist.parallel.split import full_shape, joined_whole, own_slice
from cogvideo_dist.protocols import Batch, Loss, Sample, Slot, StepPlan
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.video import FrozenModels, Sharding, VideoTask
from launch.compose import TransformerGeometry

BREAKABLE = ("gather", "scatter_sum", "to_heads", "to_tokens", "shift", "enter")
FLOOR = 1e-3
"""A gradient that is zero in exact arithmetic (of a key's bias where no rotation follows, which shifts all scores of a query
alike) is held to the rounding of the others: errors are relative to at least this part of the largest gradient."""
Stage = Literal[0, 1, 2, 3]
SPREAD = 0.1
"""Standard deviation of what is added to every initial weight: many start at zero, and with them gradients of others."""


@dataclass(frozen=True)
class Job:
    """One layout's question, with a ``folder`` for what is too large for the answer. ``reference`` is that of the single
    process, which itself has none to meet."""

    config: DiTRun
    layout: Layout
    packs: tuple[tuple[Size, ...], ...]
    stages: tuple[Stage, ...]
    steps: int
    device: str
    folder: Path = Path()
    reference: Path | None = None
    broken: str | None = None
    timeout_s: float = 300.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the compared gradients: the GPU's fused attention does not compute in float64."""
        return torch.float64 if self.device == "cpu" else torch.float32


def work(job: Job, place: Place) -> dict[str, Any]:
    """This rank's answer; collective."""
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    mesh = start(place, device=device, layout=job.layout, timeout_s=job.timeout_s)
    if job.broken is not None:
        break_operation(job.broken)
    answer = compared_step(job, mesh, device=device)
    answer["trained"] = {str(stage): trained(job, mesh, device=device, stage=stage) for stage in job.stages}
    barrier(mesh.world)  # rank 0 keeps the store that others may still ask
    return answer


def packs_of(size: Size, count: int) -> tuple[tuple[Size, ...], ...]:
    """``count`` packs of clips around ``size``, as plans sort them: a video with an image and, in turn, a shorter video of the
    other orientation or a second image."""
    frames, height, width = size
    short = ((frames - 1) // TEMPORAL // 2 * TEMPORAL + 1, width, height)
    kinds = ((1, height, width), short, size), ((1, width, height), (1, height, width), size)
    return tuple(kinds[pack % 2] for pack in range(count))


def compared_step(job: Job, mesh: ParallelMesh, *, device: torch.device) -> dict[str, Any]:
    """Loss and gradients of one global step, without DeepSpeed."""
    task = build_task(job, mesh, device=device, dtype=job.dtype)
    total = torch.zeros((), dtype=job.dtype, device=device)
    for batch in batches(job.config, 0, packs=job.packs, dp=mesh.dp):
        loss: Loss = task.loss(task.model, batch)
        loss.total.backward()
        total += loss.total.detach()
    sent = {" ".join(key): traffic.bytes for key, traffic in mesh.ledger.take().items()}
    gradients = (
        (name, joined_whole(task.model, name, reduce_sum(_gradient(p), mesh.replica)).cpu())
        for name, p in task.model.named_parameters()
        if p.requires_grad
    )
    answer = {"loss": reduce_sum(total, mesh.world).item(), "sent": sent}
    if job.reference is None:
        _store(dict(gradients), job.folder / "gradients.safetensors")
        return answer
    return answer | {"gradients": differences(gradients, job.reference / "gradients.safetensors", floor=FLOOR)}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def trained(job: Job, mesh: ParallelMesh, *, device: torch.device, stage: Stage) -> dict[str, Any]:
    """Gradient norms of float32 steps under DeepSpeed, and the weights (and their average) after the last."""
    task = build_task(job, mesh, device=device, dtype=torch.float32)
    train = comparable(job.config.train, task.model, stage=stage)
    engine = Engine(task.model, train, mesh=mesh, micro_steps=len(job.packs) // mesh.dp.size)
    norms = []
    for step in range(job.steps):
        rate = learning_rate(train, step)
        for batch in batches(job.config, step, packs=job.packs, dp=mesh.dp):
            engine.backward(task.loss(engine.forward, batch).total)
            engine.step(rate)
        norms.append(float(engine.grad_norm or 0.0))
    state = {
        kind: tensors for kind, tensors in engine.full_state(step=job.steps).items() if not kind.startswith("exp_")
    }
    answer: dict[str, Any] = {"norms": norms}
    for kind, tensors in state.items():
        path = (job.reference or job.folder) / f"{kind}.safetensors"
        if job.reference is None:
            _store(tensors, path)
        elif mesh.is_first:
            answer[kind] = differences(iter(tensors.items()), path, floor=0.0)
    return answer


def comparable(train: Train, model: nn.Module, *, stage: Stage) -> Train:
    """The configured training in float32, without a warm-up, in which weights would not move, and with a larger ``eps``.

    AdamW divides a gradient by its own size, which turns the rounding of one near zero into an update of full size and hides
    a wrong scale. With ``eps`` the size of a mean element of the clipped gradient, updates follow gradients in size too.
    """
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    elements = sum(math.prod(full_shape(model, name, p.shape)) for name, p in trained)
    eps = max(train.eps, (train.clip_norm or 1.0) / math.sqrt(elements))
    return replace(train, precision="fp32", zero_stage=stage, warmup_steps=0, eps=eps)


def _store(tensors: dict[str, Tensor], path: Path) -> None:
    largest = max(tensor.abs().max().item() for tensor in tensors.values())
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"largest": repr(largest)})


def differences(found: Iterator[tuple[str, Tensor]], reference: Path, *, floor: float) -> dict[str, float]:
    """Each tensor's largest difference relative to its largest element (or to ``floor`` times the largest of all)."""
    errors = {}
    with safe_open(reference, "pt") as file:
        least = max(floor * float(file.metadata()["largest"]), torch.finfo(torch.float64).tiny)
        for name, tensor in found:
            expected = file.get_tensor(name)
            error, scale = (tensor - expected).abs().max().item(), max(expected.abs().max().item(), least)
            errors[name] = error / scale
    return errors


SMALL_VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2)


def build_task(job: Job, mesh: ParallelMesh, *, device: torch.device, dtype: torch.dtype) -> VideoTask:
    """The task with a model all of whose weights are random, adapters' too. Samples are encoded already; a small autoencoder
    with random weights makes the conditions of an image-to-video model."""
    config = job.config
    model = dit.DiT(config.model.transformer(), recompute=config.train.recompute, tp=mesh.tp)
    if config.lora is not None:
        adapt(model, config.lora.adapters())
    draw_parameters(model, config.run.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            whole = torch.randn(full_shape(model, name, p.shape), generator=fold(config.run.seed, "parity", name))
            p.add_(own_slice(model, name, whole), alpha=SPREAD)
    scale = LATENT_SCALE.get(config.model.preset.removeprefix("tiny-"), 1.0)
    attention = attention_of(config, device=device, dtype=dtype, ring_size=mesh.ring.size)
    vae = None
    if model.config.image_channels:
        vae = VAE(replace(SMALL_VAE, latent_channels=model.config.out_channels, scaling_factor=scale)).to(device)
        draw_parameters(vae, config.run.seed)
    return VideoTask(
        model.to(device, dtype), FrozenModels(scale, vae), diffusion=config.diffusion, validation=config.validation,
        seed=config.run.seed, sharding=Sharding(mesh, attention),
    )  # fmt: skip


def attention_of(config: DiTRun, *, device: torch.device, dtype: torch.dtype, ring_size: int) -> AttentionName:
    """The configured back end where it serves this device and precision, else the one chosen for them."""
    try:
        backend_for(config.parallel.attention, device=device, dtype=dtype, ring=ring_size)
    except ValueError:
        return "auto"
    return config.parallel.attention


def batches(config: DiTRun, step: int, *, packs: tuple[tuple[Size, ...], ...], dp: Axis) -> Iterator[Batch]:
    """This rank's batches of a step, dealt as the loader does."""
    geometry = TransformerGeometry(config.model.transformer())
    numbers = iter(range(step * sum(map(len, packs)), 2**62))
    slots = tuple(
        tuple(
            Slot(0, next(numbers), size) for size in sorted(pack, key=lambda size: (geometry(size).tokens, size))
        )
        for pack in packs
    )  # fmt: skip
    sizes = [slot.size for pack in slots for slot in pack]
    plan = StepPlan(step, slots, len(sizes), sum(geometry(size).vision for size in sizes))
    for pack in range(dp.rank, len(slots), dp.size):
        layout = PackLayout(tuple(geometry(slot.size) for slot in slots[pack]))
        samples = tuple(_sample(config, slot) for slot in slots[pack])
        yield Batch(plan, pack, sum(map(len, slots[:pack])), layout, samples)


def _sample(config: DiTRun, slot: Slot) -> Sample:
    model, seed = config.model.transformer(), config.run.seed
    frames, height, width = slot.size
    shape = (model.out_channels, (frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL)
    mean = torch.randn(shape, generator=fold(seed, "parity mean", slot.index))
    logvar = torch.randn(shape, generator=fold(seed, "parity logvar", slot.index)) - 2
    text = torch.randn(model.text_length, model.text_dim, generator=fold(seed, "parity text", slot.index))
    image = torch.randint(256, (height, width, 3), generator=fold(seed, "parity image", slot.index), dtype=torch.uint8)
    return Sample(slot, f"parity-{slot.index}", "drawn", "", mean=mean, logvar=logvar, text=text, image=image)


WRONG = 1.001
"""What a broken collective multiplies its result by."""


def break_operation(name: str) -> None:
    """Put a slightly wrong collective in the place of one of ``BREAKABLE``, for tests of this command."""
    if name == "enter":  # its forward is the identity, its backward this sum
        setattr(ops, "reduce_sum", _wrong(reduce_sum))  # noqa: B010 (of a module, which has no such field to mypy)
        return
    right: Callable[..., Any] = getattr(ops, name)
    for module in (shard, ring, dit):
        if getattr(module, name, None) is right:
            setattr(module, name, _wrong(right))


def _wrong(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(x: Tensor, axis: Axis, **rest: Any) -> Any:
        result = right(x, axis, **rest)
        if axis.size == 1:
            return result
        return result * WRONG if isinstance(result, Tensor) else ops.Pending((), lambda: result.wait() * WRONG)

    return wrong
