"""B4: the VAE against diffusers' AutoencoderKLCogVideoX: time and memory of encoding and decoding a clip.

    python -m bench.vae [--size 2 17 48 64]        # about 40 s on one core

Both sides run in diffusers' chunked semantics with the same weights and input, float32, without gradients. Time is the
median of interleaved runs in one process. Peak memory is measured for each side in a fresh process as the kernel's
high-water mark of resident memory (VmHWM, reset after a warm-up on a small clip), less what was resident just before;
unlike a count of live tensors it includes the scratch buffers of convolutions. Needs Linux.

The batch is 2 because torch gives a small convolution of a single float32 sample to a slow routine on the CPU, on both
sides alike, which then takes up to 85 % of the time and shows nothing of either model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.record import ROOT, Row, faster, smaller
from cogvideo_dist.convert.vae_config import config_to_diffusers
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.rng import fold

CONFIG = VAEConfig(block_out_channels=(32, 64, 64, 128), norm_groups=8)  # a quarter of the released channels
SIDES = ("ours", "diffusers")
PARTS = ("encode", "decode")
WARM_UPS = 2

Run = Callable[[Tensor], Tensor]
Size = tuple[int, int, int, int]  # batch, frames, height, width


def ours() -> tuple[nn.Module, dict[str, Run]]:
    vae = VAE(CONFIG)
    draw_parameters(vae, seed=0)
    return vae, {"encode": lambda x: vae.encode(x, "chunked").mode(), "decode": lambda z: vae.decode(z, "chunked")}


def diffusers() -> tuple[nn.Module, dict[str, Run]]:
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_config(config_to_diffusers(CONFIG)).eval()
    state = ours()[0].state_dict()
    vae.load_state_dict({row.diffusers: state[row.ours] for row in vae_names(CONFIG)})
    return vae, {"encode": lambda x: vae.encode(x).latent_dist.mode(), "decode": lambda z: vae.decode(z).sample}


def inputs(size: Size) -> dict[str, Tensor]:
    batch, *clip = size
    latents = CONFIG.latent_shape(clip)
    return {
        "encode": torch.rand(batch, 3, *clip, generator=fold(0, "clip")) * 2 - 1,
        "decode": torch.randn(batch, *latents, generator=fold(0, "latents")),
    }


def high_water() -> tuple[int, int]:
    """Bytes: the highest resident memory since the last reset, and the present one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, now = (int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
    return peak, now


@torch.no_grad()
def peak_bytes(side: str, size: Size) -> dict[str, int]:
    """Peak memory of each part above what is resident before; to be called in a fresh process."""
    _, parts = {"ours": ours, "diffusers": diffusers}[side]()
    clips, small = inputs(size), inputs((size[0], 9, 16, 16))
    peaks = {}
    for part in PARTS:
        parts[part](small[part])
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        _, before = high_water()
        parts[part](clips[part])
        peaks[part] = high_water()[0] - before
    return peaks


@torch.no_grad()
def seconds(size: Size, repeats: int) -> tuple[dict[str, dict[str, float]], float]:
    """Median time of each part and side, the sides interleaved, and the largest difference of their results, relative to
    diffusers' largest element."""
    sides = {"ours": ours()[1], "diffusers": diffusers()[1]}
    clips = inputs(size)
    times: dict[str, dict[str, list[float]]] = {side: {part: [] for part in PARTS} for side in SIDES}
    error = 0.0
    for part in PARTS:
        for i in range(WARM_UPS + repeats):
            results = {}
            for side in SIDES if i % 2 else SIDES[::-1]:
                start = time.perf_counter()
                results[side] = sides[side][part](clips[part])
                times[side][part].append(time.perf_counter() - start)
            difference = (results["ours"] - results["diffusers"]).abs().max() / results["diffusers"].abs().max()
            error = max(error, difference.item())
    medians = {side: {part: statistics.median(times[side][part][WARM_UPS:]) for part in PARTS} for side in SIDES}
    return medians, error


def bench_vae(
    *, batch: int = 2, frames: int = 17, height: int = 48, width: int = 64, repeats: int = 5
) -> dict[str, Any]:
    """Times, peaks and their ratios ours/diffusers (less than 1 is better), ready for JSON."""
    size = (batch, frames, height, width)
    taken, error = seconds(size, repeats)
    peaks = {}
    for side in SIDES:
        command = [sys.executable, "-m", "bench.vae", "--peak", side, "--size", *map(str, size)]
        # Freed blocks go back to the kernel at once, so that resident memory follows what is in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        peaks[side] = json.loads(done.stdout)
    total = {side: sum(taken[side].values()) for side in SIDES}
    return {
        "size": size,
        "channels": CONFIG.block_out_channels,
        "threads": torch.get_num_threads(),
        "seconds": taken,
        "peak_bytes": peaks,
        "relative_error": error,
        "time_ratio": total["ours"] / total["diffusers"],
        "time_ratio_by_part": {part: taken["ours"][part] / taken["diffusers"][part] for part in PARTS},
        "peak_ratio": max(peaks["ours"].values()) / max(peaks["diffusers"].values()),
        "peak_ratio_by_part": {part: peaks["ours"][part] / peaks["diffusers"][part] for part in PARTS},
    }


def rows(result: dict[str, Any]) -> list[Row]:
    found = []
    for part in PARTS:
        ours, theirs = (result["seconds"][side][part] for side in SIDES)
        found.append(faster("B4", f"VAE {part}", ours=ours, peer=theirs, at_least=1.1))
    for part in PARTS:
        ours, theirs = (result["peak_bytes"][side][part] / 1e6 for side in SIDES)
        found.append(smaller("B4", f"VAE {part}, peak resident memory", unit="MB", ours=ours, peer=theirs, at_most=0.7))
    found.append(
        Row("B4", "largest relative difference of latents and pixels", "", result["relative_error"], at_most=1e-5)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    axes = ("BATCH", "FRAMES", "HEIGHT", "WIDTH")
    parser.add_argument("--size", type=int, nargs=4, metavar=axes, default=(2, 17, 48, 64), help="of the clips")
    parser.add_argument("--peak", choices=SIDES, help="only print the peak memory of this side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch, frames, height, width = args.size
    if args.peak:
        result = peak_bytes(args.peak, (batch, frames, height, width))
    else:
        result = bench_vae(batch=batch, frames=frames, height=height, width=width)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
