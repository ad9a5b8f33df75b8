"""B1, B2, B3: the VAE on one GPU in bfloat16, in the released models' chunks: time, peak memory, and what changes them.

The peer is diffusers with the same weights where it is installed: as it is, and with its tiling and slicing on, against which
ours runs with tiles of the same size. Peaks are above weights and input.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Setting, peak_memory, synchronize
from bench.peers import diffusers_installed
from bench.record import Row, faster, smaller
from cogvideo_dist.models import vae_blocks
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.vae import VAE, Tiling, VAEConfig

Size = tuple[int, int, int]  # frames, height, width
SIZES: tuple[Size, ...] = ((49, 480, 720), (81, 768, 1360))
TOY: Size = (9, 56, 48)
LENGTHS = (49, 97, 193)
TOY_LENGTHS = (9, 17)
PARTS = (("B1", "encode", 1.4, 0.6), ("B2", "decode", 1.8, 0.5))
"""Row, part, and its goals: how many times faster than diffusers, and how much of its peak."""
PIECE = {"encode": 8, "decode": 2}
REPEATS = 3

Run = Callable[[], Tensor]


def sizes(setting: Setting) -> tuple[Size, ...]:
    return (TOY,) if setting.toy else SIZES


def config_of(setting: Setting) -> VAEConfig:
    """The released VAE, or one whose tiles are smaller than the toy clip."""
    toy = VAEConfig(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2, sample_height=96, sample_width=80
    )
    return toy if setting.toy else VAEConfig()


def model_of(setting: Setting) -> VAE:
    with torch.device(setting.device):
        vae = VAE(config_of(setting))
    draw_parameters(vae, seed=0)
    return vae.to(setting.dtype).eval()


def peer_of(ours: VAE) -> Any:
    """diffusers' VAE with the same weights."""
    from diffusers import AutoencoderKLCogVideoX

    from cogvideo_dist.convert.vae_config import config_to_diffusers
    from cogvideo_dist.convert.vae_names import vae_names

    weight = next(ours.parameters())
    theirs = AutoencoderKLCogVideoX.from_config(config_to_diffusers(ours.config))
    state = ours.state_dict()
    theirs.load_state_dict({row.diffusers: state[row.ours] for row in vae_names(ours.config)})
    return theirs.to(weight.device, weight.dtype).eval()


def inputs(setting: Setting, size: Size) -> dict[str, Tensor]:
    latents = config_of(setting).latent_shape(size)
    return {"encode": setting.randn(1, 3, *size), "decode": setting.randn(1, *latents)}


def our_run(vae: VAE, part: str, x: Tensor, *, tiling: Tiling | None = None) -> Run:
    """The part in chunks: latents' mean, or pixels."""
    if part == "encode":
        return lambda: vae.encode(x, "chunked", tiling=tiling).mode()
    return lambda: vae.decode(x, "chunked", tiling=tiling)


def their_run(vae: Any, part: str, x: Tensor) -> Run:
    return lambda: vae.encode(x).latent_dist.mode() if part == "encode" else vae.decode(x).sample


def cost(run: Run, setting: Setting) -> tuple[float, float, Tensor]:
    """Median seconds of a few runs; GB at most during one before them, above what was there; and its result."""
    with peak_memory(setting.device) as peak:
        result = run()
    times = []
    for _ in range(REPEATS):
        synchronize(setting.device)
        start = time.perf_counter()
        run()
        synchronize(setting.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak["bytes"] / 1e9, result


@torch.no_grad()
def clip(setting: Setting, *, size: Size, tiles: bool) -> list[Row]:
    """B1, B2: encoding and decoding one clip of ``size``, in ``tiles`` or in whole frames."""
    ours, clips, rows = model_of(setting), inputs(setting, size), []
    tiling = Tiling.of(ours.config) if tiles else None
    theirs = peer_of(ours) if diffusers_installed() else None
    if theirs is not None and tiles:
        theirs.enable_tiling()
        theirs.enable_slicing()
    for id, part, times, share in PARTS:
        what = f"VAE {part}, {'x'.join(map(str, size))}{', tiled' if tiles else ''}"
        seconds, peak, result = cost(our_run(ours, part, clips[part], tiling=tiling), setting)
        peer_seconds = peer_peak = None
        if theirs is not None:
            peer_seconds, peer_peak, expected = cost(their_run(theirs, part, clips[part]), setting)
            error = ((result - expected).float().norm() / expected.float().norm()).item()
            rows.append(Row(id, f"{what}: relative difference from diffusers", "", error, at_most=2e-2))
        rows += [
            faster(id, f"{what} vs diffusers", ours=seconds, peer=peer_seconds, at_least=None if tiles else times),
            smaller("B3", f"{what}: peak vs diffusers", unit="GB", ours=peak, peer=peer_peak, at_most=None if tiles else share),
        ]  # fmt: skip
    return rows


@contextmanager
def layout(memory_format: torch.memory_format) -> Iterator[None]:
    """The VAE's activations in another memory layout."""
    kept, vae_blocks.LAYOUT = vae_blocks.LAYOUT, memory_format
    try:
        yield
    finally:
        vae_blocks.LAYOUT = kept


@torch.no_grad()
def layouts(setting: Setting) -> list[Row]:
    """Activations and weights in either memory layout: ours are activations in channels_last_3d, weights contiguous."""
    size = sizes(setting)[0]
    rows, clips = [], inputs(setting, size)
    for weights in (torch.contiguous_format, torch.channels_last_3d):
        vae = model_of(setting)
        for conv in (module for module in vae.modules() if isinstance(module, nn.Conv3d)):
            conv.weight.data = conv.weight.data.contiguous(memory_format=weights)
        for activations in (torch.channels_last_3d, torch.contiguous_format):
            names = " and ".join(
                f"{what} {str(format).removeprefix('torch.')}"
                for what, format in (("activations", activations), ("weights", weights))
            )
            with layout(activations):
                rows += own_rows(setting, vae, clips, what=f"{'x'.join(map(str, size))}, {names}")
    return rows


@torch.no_grad()
def compiled(setting: Setting) -> list[Row]:
    """Encoder and decoder by torch.compile, after its first runs; what it cannot trace runs as it is."""
    size = sizes(setting)[0]
    vae = model_of(setting)
    for part in (vae.encoder, vae.decoder):
        part.compile(dynamic=False, backend="eager" if setting.toy else "inductor")
    with torch._dynamo.config.patch(recompile_limit=128, accumulated_recompile_limit=4096):
        return own_rows(setting, vae, inputs(setting, size), what=f"{'x'.join(map(str, size))}, torch.compile")


def own_rows(setting: Setting, vae: VAE, clips: dict[str, Tensor], *, what: str) -> list[Row]:
    rows = []
    for _, part, *_ in PARTS:
        run = our_run(vae, part, clips[part])
        run()
        seconds, peak, _ = cost(run, setting)
        rows.append(Row("VAE", f"{part}, {what}", "s", seconds))
        rows.append(Row("VAE", f"{part}, {what}: peak", "GB", peak))
    return rows


@torch.no_grad()
def slope(setting: Setting) -> list[Row]:
    """B3: memory of a stream of chunks over the length of the clip, of which neither frames nor latents are kept."""
    vae, rows = model_of(setting), []
    lengths, (_, *frame) = TOY_LENGTHS if setting.toy else LENGTHS, sizes(setting)[0]
    for _, part, *_ in PARTS:
        peaks = {length: stream_peak(setting, vae, part, (length, frame[0], frame[1])) for length in lengths}
        per_frame = (peaks[lengths[-1]] - peaks[lengths[0]]) / (lengths[-1] - lengths[0])
        what = f"VAE {part} as a stream, {frame[0]}x{frame[1]}"
        rows += [Row("B3", f"{what}, {length} frames: peak", "GB", peak / 1e9) for length, peak in peaks.items()]
        rows.append(Row("B3", f"{what}: peak per frame more", "MB", per_frame / 1e6, at_most=0.01))
    return rows


def stream_peak(setting: Setting, vae: VAE, part: str, size: Size) -> int:
    """Bytes at most while a clip of ``size`` goes through, piece by piece."""
    channels, frames, height, width = (
        (3, *size) if part == "encode" else (vae.config.latent_channels, *vae.config.latent_shape(size)[1:])
    )
    pieces = (
        setting.randn(1, channels, min(PIECE[part], frames - start), height, width)
        for start in range(0, frames, PIECE[part])
    )
    with peak_memory(setting.device) as peak:
        for _ in getattr(vae, f"{part}_stream")(pieces, total=frames):
            pass
    return peak["bytes"]


def measured(setting: Setting) -> Iterator[tuple[str, float, Callable[[Setting], list[Row]]]]:
    """Name, about how many seconds, and what to run."""
    factor = 3.0 if diffusers_installed() else 1.0
    for size in sizes(setting):
        seconds = 10.0 if size == SIZES[0] else 45.0
        for name, tiles in (("", False), ("-tiled", True)):
            run = partial(clip, size=size, tiles=tiles)
            yield f"vae{name}-{'x'.join(map(str, size))}", factor * seconds, run
    yield "vae-slope", 30.0, slope
    yield "vae-layouts", 50.0, layouts
    yield "vae-compile", 150.0, compiled
