"""A6: one training step of a small transformer on the CPU against diffusers' CogVideoXTransformer3DModel.

    python -m bench.dit [--threads 2] [--repeats 5]        # about 1 minute on two quiet cores

Forward and backward of the same loss with the same weights and input, float32: 4 layers, 8 heads of 64, 226 text and 1080
vision tokens. Without recomputation against diffusers without checkpointing, and our levels of recomputation against
diffusers with gradient checkpointing. All sides run in turn in one process.

Nine tenths of such a step are matrix products and attention kernels that both sides share, so without checkpointing
little can be won on a CPU but memory. With it, what is won is the attention that is not computed a second time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import attention_calls, interleaved, saved_bytes, worst_error
from bench.peers import (
    diffusers_transformer,
    gradients_by_our_names,
    predict_with_diffusers,
    set_checkpointing,
    set_recompute,
)
from bench.record import Row, faster, smaller
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import normal
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import Clip
from cogvideo_dist.rng import fold

CONFIG = DiTConfig(layers=4, heads=8, sample_frames=3, sample_height=30, sample_width=48)
CLIP = Clip(CONFIG.text_length, CONFIG.sample_grid)
CPU = torch.device("cpu")
PLAIN, CHECKPOINTED = "diffusers", "diffusers, checkpointed"
PAIRS = (("none", PLAIN, 1.0), ("feed_forward", CHECKPOINTED, 1.2), ("all_but_attention", CHECKPOINTED, 1.2))
"""What recomputation is held against which peer, and how many times faster it is to be."""
LEVELS = tuple(level for level, _, _ in PAIRS)

Loss = Callable[[], Tensor]


def models() -> tuple[DiT, nn.Module]:
    """Ours and diffusers', with every parameter random, also those that a model starts with at zero."""
    ours = DiT(CONFIG)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(normal(0.03)(parameter.shape, fold(0, "parameter", name)))
    return ours, diffusers_transformer(ours)


def losses(ours: DiT, theirs: nn.Module) -> dict[str, Loss]:
    """The mean squared velocity error of one clip, as every side computes it, with fresh gradients."""
    shape = (1, CONFIG.sample_frames, CONFIG.in_channels, CONFIG.sample_height, CONFIG.sample_width)
    latents, target = (torch.randn(shape, generator=fold(0, name)) for name in ("latents", "target"))
    text = torch.randn(1, CONFIG.text_length, CONFIG.text_dim, generator=fold(0, "text"))
    timestep = torch.tensor([500])
    predict = predict_with_diffusers(theirs, CONFIG, CLIP, CPU)

    def our_loss(level: Any) -> Tensor:
        ours.zero_grad()
        set_recompute(ours, level)
        return (ours.denoise(latents, text, timestep) - target).square().mean()

    def their_loss(checkpointed: bool) -> Tensor:
        theirs.zero_grad()
        set_checkpointing(theirs, checkpointed)
        return (predict(latents, text, timestep) - target).square().mean()

    return {
        **{level: partial(our_loss, level) for level in LEVELS},
        PLAIN: partial(their_loss, False),
        CHECKPOINTED: partial(their_loss, True),
    }


def step(loss: Loss) -> float:
    """Forward and backward; the loss."""
    value = loss()
    value.backward()
    return value.item()


def bench_dit(*, repeats: int = 5) -> dict[str, Any]:
    """Times, saved bytes, attention calls and errors of every side, ready for JSON."""
    ours, theirs = models()
    sides = losses(ours, theirs)
    values, calls, kept, errors = {}, {}, {}, {}
    expected = float("nan")
    for name in (PLAIN, CHECKPOINTED, *LEVELS):
        kept[name] = saved_bytes(sides[name], parameters=(ours if name in LEVELS else theirs).parameters())
        calls[name], values[name] = attention_calls(partial(step, sides[name]))
        if name == PLAIN:
            expected = values[name]
            gradients = {k: v.clone() for k, v in gradients_by_our_names(theirs, ours).items()}
        elif name in LEVELS:
            found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
            errors[name] = worst_error(found, gradients)
    # Every side has run already, so one more is enough to warm up.
    steps = {name: partial(step, loss) for name, loss in sides.items()}
    times, undisturbed = interleaved(steps, repeats=repeats, warm_ups=1)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "threads": torch.get_num_threads(),
        "tokens": CLIP.tokens,
        "layers": CONFIG.layers,
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "seconds": times,
        "undisturbed": undisturbed,
        "median_seconds": medians,
        "saved_bytes": kept,
        "attention_forwards_per_step": calls,
        "loss": values,
        "loss_difference": {name: abs(values[name] - expected) / abs(expected) for name in LEVELS},
        "worst_gradient": errors,
    }


def rows(result: dict[str, Any]) -> list[Row]:
    seconds, kept = result["median_seconds"], result["saved_bytes"]
    found = []
    for level, peer, goal in PAIRS:
        what = f"transformer step, recompute {level} vs {peer}"
        judged = goal if result["undisturbed"] else None
        found.append(faster("A6", what, ours=seconds[level], peer=seconds[peer], at_least=judged))
    for level in LEVELS:
        what = f"saved activations, recompute {level} vs {PLAIN}"
        found.append(smaller("A6", what, unit="MB", ours=kept[level] / 1e6, peer=kept[PLAIN] / 1e6, at_most=0.5))
    calls = {name: count / result["layers"] for name, count in result["attention_forwards_per_step"].items()}
    most = max(calls[level] for level in LEVELS)
    found.append(Row("A6", f"attention forwards per step and layer, any recompute vs {CHECKPOINTED}", "", most,
                     calls[CHECKPOINTED], at_most=1.0))  # fmt: skip
    found.append(Row("A6", "relative loss difference", "", max(result["loss_difference"].values()), at_most=1e-5))
    name, error = max(result["worst_gradient"].values(), key=lambda item: item[1])
    found.append(Row("A6", f"worst relative gradient error ({name})", "", error, at_most=1e-4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="undisturbed runs of every side (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(bench_dit(repeats=args.repeats)))


if __name__ == "__main__":
    main()
