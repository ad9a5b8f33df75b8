"""A1 to A5: whole training steps of the released transformers on one GPU, and what they hold.

A step is forward, backward and optimizer on one 480x720x49 clip: weights and gradients in bfloat16; AdamW on float32 copies
of the weights with both moments, so 16 bytes a parameter in all, 4 of which are weights and gradients.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.measure import Setting, peak_memory, synchronize
from bench.peers import Predict, diffusers_installed, diffusers_transformer, predict_with_diffusers, set_checkpointing
from bench.rates import square_product_rate
from bench.record import Row, faster, smaller
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.presets import PRESETS, DiTConfig
from cogvideo_dist.pack.layout import Clip

PEAK_TFLOPS = 989.0
"""Dense bfloat16 peak of a Hopper GPU (vendor's data sheet)."""
WARM_UPS, REPEATS = 1, 3


def model_flops(config: DiTConfig, tokens: int) -> float:
    """Forward and backward of one clip of ``tokens`` text and vision tokens, without anything made twice:
    3 L (24 S h^2 + 4 S^2 h) for L layers of width h."""
    h = config.hidden
    return 3.0 * config.layers * (24.0 * tokens * h**2 + 4.0 * tokens**2 * h)


def clip_of(config: DiTConfig) -> Clip:
    return Clip(config.text_length, config.sample_grid)


class MixedAdamW:
    """AdamW on float32 copies of 16-bit parameters, a few at a time so that float32 gradients never exist for all."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self.groups: list[list[Tensor]] = [list(group) for group in groups if group]
        self.masters = [[p.detach().to(torch.float32, copy=True) for p in group] for group in self.groups]
        self.optimizers = [torch.optim.AdamW(masters, lr=1e-5, fused=True) for masters in self.masters]

    @torch.no_grad()
    def step(self) -> None:
        for group, masters, optimizer in zip(self.groups, self.masters, self.optimizers):
            for parameter, master in zip(group, masters):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_copy_(group, masters)


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step (the median one) and of its parts; bytes of weights and optimizer, and what comes on top at the peak:
    activations mostly, since gradients grow while these go."""

    seconds: float
    parts: dict[str, float]
    resident_bytes: int
    peak_bytes: int


def our_model(setting: Setting, config: DiTConfig, recompute: Recompute = "none") -> DiT:
    """Random weights, drawn on the device: what they are does not change the cost."""
    with torch.device("meta"):
        model = DiT(config, recompute=recompute).to(setting.dtype)
    model = model.to_empty(device=setting.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def our_step(setting: Setting, config: DiTConfig, recompute: Recompute) -> StepCost:
    model = our_model(setting, config, recompute)
    return step_cost(setting, config, model, predict=model.denoise)


def their_step(setting: Setting, config: DiTConfig, checkpointed: bool) -> StepCost:
    theirs = diffusers_transformer(our_model(setting, config))
    set_checkpointing(theirs, checkpointed)
    predict = predict_with_diffusers(theirs, config, clip_of(config), setting.device)
    return step_cost(setting, config, theirs, predict=predict)


def step_cost(setting: Setting, config: DiTConfig, model: nn.Module, *, predict: Predict) -> StepCost:
    shape = (1, config.sample_frames, config.in_channels, config.sample_height, config.sample_width)
    latents, target = setting.randn(*shape), setting.randn(*shape)
    text = setting.randn(1, config.text_length, config.text_dim)
    timestep = torch.tensor([500], device=setting.device)
    optimizer = MixedAdamW([list(child.parameters()) for child in leaves_of(model)])
    history: list[dict[str, float]] = []

    def timed_step() -> None:
        marks = [now(setting)]
        loss = (predict(latents, text, timestep) - target).float().square().mean()
        marks.append(now(setting))
        loss.backward()
        marks.append(now(setting))
        optimizer.step()
        marks.append(now(setting))
        parts = ("forward", "backward", "optimizer")
        history.append({part: stop - start for part, start, stop in zip(parts, marks, marks[1:])})

    for _ in range(WARM_UPS):
        timed_step()
    resident = torch.cuda.memory_allocated(setting.device) if setting.device.type == "cuda" else 0
    with peak_memory(setting.device) as peak:
        for _ in range(REPEATS):
            timed_step()
    middle = sorted(history[WARM_UPS:], key=lambda parts: sum(parts.values()))[REPEATS // 2]
    return StepCost(sum(middle.values()), middle, resident, peak["bytes"])


def leaves_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a transformer, its blocks one by one."""
    parts: list[nn.Module] = []
    for child in model.children():
        parts += list(child.children()) if isinstance(child, nn.ModuleList) else [child]
    return parts


def now(setting: Setting) -> float:
    synchronize(setting.device)
    return time.perf_counter()


def fine_tune_5b(setting: Setting) -> list[Row]:
    """A1, A4, A5: every weight of the 5B; where not all layers fit, 12 of them, scaled up."""
    config = PRESETS["tiny-cogvideox-5b" if setting.toy else "cogvideox-5b"]
    plans: list[tuple[int, Recompute]] = [(config.layers, "feed_forward"), (config.layers, "all_but_attention")]
    cost, layers, recompute = first_that_fits(setting, config, [*plans, (min(12, config.layers), "feed_forward")])
    factor = config.layers / layers
    seconds = cost.seconds * factor
    slice_of = "" if layers == config.layers else f", {layers} layers times {factor:g}"
    what = f"5B fine-tuning step, recompute {recompute}{slice_of}"
    free_memory()
    peer = their_step(setting, replace(config, layers=layers), True).seconds * factor if diffusers_installed() else None
    flops, square = model_flops(config, clip_of(config).tokens), square_product_rate(setting)
    rate = flops / seconds / 1e12
    parts = [
        Row("A1", f"{what}: {part}", "s", seconds_of_part * factor) for part, seconds_of_part in cost.parts.items()
    ]
    return [
        faster("A1", f"{what} vs diffusers checkpointed", ours=seconds, peer=peer, at_least=1.5),
        *parts,
        Row("A4", f"{what}: peak memory", "GB", (cost.resident_bytes + cost.peak_bytes) / 1e9, at_most=125.0),
        Row("A5", f"{what}: of {PEAK_TFLOPS:g} TFLOP/s", "%", 100 * rate / PEAK_TFLOPS, at_least=45.0),
        Row("A5", f"{what}: of a measured {square:.0f} TFLOP/s", "%", 100 * rate / square, at_least=56.0),
    ]


def first_that_fits(
    setting: Setting, config: DiTConfig, plans: Sequence[tuple[int, Recompute]]
) -> tuple[StepCost, int, Recompute]:
    """The cost of the first plan (layers, recomputation) that the memory allows."""
    for layers, recompute in plans[:-1]:
        try:
            return our_step(setting, replace(config, layers=layers), recompute), layers, recompute
        except torch.OutOfMemoryError:
            pass
        free_memory()  # here: while the error is handled, its traceback holds the model
    layers, recompute = plans[-1]
    return our_step(setting, replace(config, layers=layers), recompute), layers, recompute


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def fine_tune_2b(setting: Setting) -> list[Row]:
    """A2, A3: the 2B with nothing recomputed but elementwise work."""
    config = PRESETS["tiny-cogvideox-2b" if setting.toy else "cogvideox-2b"]
    ours = our_step(setting, config, "none")
    free_memory()
    peer = their_step(setting, config, False) if diffusers_installed() else None
    rate = model_flops(config, clip_of(config).tokens) / ours.seconds / 1e12
    seconds, above = (None, None) if peer is None else (peer.seconds, peer.peak_bytes / 1e9)
    what = "2B step, peak memory above weights and optimizer"
    return [
        faster("A2", "2B step, no recomputation vs diffusers", ours=ours.seconds, peer=seconds, at_least=1.12),
        Row("A2", f"2B step: of {PEAK_TFLOPS:g} TFLOP/s", "%", 100 * rate / PEAK_TFLOPS),
        smaller("A3", what, unit="GB", ours=ours.peak_bytes / 1e9, peer=above, at_most=0.5),
    ]
