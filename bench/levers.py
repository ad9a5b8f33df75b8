"""What the levers on memory save and cost at a size that a CPU can bear: the figures of docs/memory.md.

    python -m bench.levers        # about a minute on one quiet core, 2 GB

A transformer of 4 layers of width 512 in float32 on 2,368 tokens. ``kept``: how much the resident memory has grown from before
the forward to after it, in tensors of [tokens, width] for a layer; every level runs in a process of its own, whose allocator
gives back what is free before the memory is read. ``offloaded``: how much of it went to the host. On a CPU the host's memory
is the device's, so nothing is saved here, and the time is that of the copies alone.

Moments: bytes and nanoseconds of an update for each element of a large matrix.
"""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.offload import Shelf
from cogvideo_dist.engine.optim import MOMENTS, AdamWithEma, make_optimizer
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard

CONFIG = DiTConfig(layers=4, heads=8, head_dim=64, time_embed_dim=128, text_dim=256, text_length=64)
LAYOUT = PackLayout((Clip(64, (9, 16, 16)),))
STREAM = LAYOUT.tokens * CONFIG.hidden * 4
ELEMENTS = 1 << 24


def resident() -> int:
    """Bytes of this process that lie in memory, free ones of the allocator's aside."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def activations(recompute: Recompute, offload: bool) -> tuple[float, float, float]:
    """What a layer keeps and what of it is offloaded, in streams; seconds of a forward and backward."""
    torch.set_num_threads(1)
    model = DiT(CONFIG, recompute=recompute)
    draw_parameters(model, 0)
    vision = torch.zeros(LAYOUT.vision, CONFIG.patch_features_in).uniform_(-1, 1)
    text = torch.zeros(CONFIG.text_length, CONFIG.text_dim)
    shelf = Shelf(torch.device("cpu")) if offload else None
    kept, moved, seconds = 0, 0, []
    for _ in range(2):  # the first makes the gradients, which stay
        before, begun = resident(), time.perf_counter()
        with shelf.keeping() if shelf else nullcontext():
            out = model(vision, text, timestep=torch.tensor([500]), seq=SequenceShard(LAYOUT))
        forward = time.perf_counter() - begun
        kept, moved = resident() - before, shelf.bytes if shelf else 0
        begun = time.perf_counter()
        out.square().mean().backward()
        seconds.append(forward + time.perf_counter() - begun)
        del out
    return kept / STREAM / CONFIG.layers, moved / STREAM / CONFIG.layers, min(seconds)


def update(optimizer: str) -> tuple[float, float]:
    """Bytes of both moments for an element, and nanoseconds of its update."""
    torch.set_num_threads(1)
    matrix = nn.Linear(1 << 12, ELEMENTS >> 12, bias=False)
    matrix.weight.grad = torch.zeros_like(matrix.weight).uniform_(-1, 1)
    train = Train(steps=1, learning_rate=1e-3, ema_decay=None, optimizer="adamw8bit" if "8" in optimizer else "adamw")
    adam = make_optimizer(matrix, train)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        adam.step()
        seconds.append(time.perf_counter() - begun)
    return bytes_of_moments(adam) / ELEMENTS, min(seconds) / ELEMENTS * 1e9


def bytes_of_moments(adam: AdamWithEma) -> int:
    wide = sum(state[key].nbytes for state in adam.state.values() for key in MOMENTS if key in state)
    return wide + sum(one.bytes for moments in getattr(adam, "packed", {}).values() for one in moments.values())


def main() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        for level in get_args(Recompute):
            for offload in (False, True) if level in ("none", "full") else (False,):
                kept, moved, seconds = fresh.submit(activations, level, offload).result()
                name = f"{level}, offload.activations" if offload else level
                print(f"{name:28s} kept {kept:5.2f}   offloaded {moved:5.2f}   step {seconds:.2f} s")
        for optimizer in ("adamw", "adamw8bit"):
            size, nanoseconds = fresh.submit(update, optimizer).result()
            print(f"{optimizer:28s} {size:.2f} bytes   {nanoseconds:.0f} ns")


if __name__ == "__main__":
    main()
