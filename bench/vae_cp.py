"""B5, B6, B7: the autoencoder over a clip that is split in time, on 2 and 4 ranks of one thread each, over gloo.

    python -m bench.vae_cp [--size 2 33 40 56] [--repeats 3]        # about 60 s on two quiet cores

B5  Gradients of a reconstruction's error and the KL divergence against those of one process in float64; one process in
    float32 shows what is rounding.
B6  Bytes that a rank sends forward, encoding and decoding.
B7  The time above that of the same pieces without any exchange, each with statistics of its own and its own first frame on
    its left, which is the work of a rank alone.

The peer of B5 and B6 is the released models' scheme, written here (``Released``): it passes frames on as ours does, but cuts
their gradient off, and its group norms gather the activations of all ranks. B5 takes a small clip, which one process runs
whole. The batch is 2 for the reason that bench.vae gives.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import worst_error
from bench.ranks import Timing, interleaved_ranks, run_ranks, timed
from bench.record import Row, smaller
from bench.vae import CONFIG, Size
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.vae import VAE
from cogvideo_dist.models.vae_blocks import Moments, NormSiLU
from cogvideo_dist.parallel.frames import Shards, TimeContext, Whole, frames_of, latent_shares
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import everyone, gather_objects, reduce_sum
from cogvideo_dist.rng import fold

SMALL: Size = (1, 25, 16, 24)


class Alone(Whole):
    """A piece by itself, at its place in the clip: the work of a rank without exchange."""

    def __init__(self, axis: Axis) -> None:
        self.first = axis.rank == 0


class Released(Shards):
    """Shards as the released training code has them: no gradient comes back for lent frames nor for the repeated frame 0, and
    the statistics of a group norm are taken from activations that were gathered."""

    def __init__(self, axis: Axis, model: nn.Module) -> None:
        super().__init__(axis)
        for norm in (module for module in model.modules() if isinstance(module, NormSiLU)):
            norm.register_forward_pre_hook(self._see)

    def _see(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._normed = inputs[0]

    def recall(self, asker: nn.Module, padded: Tensor, *, width: int) -> Tensor:
        padded[:, :, :width] = padded[:, :, :width].detach().clone()
        return padded

    def moments(self, mean: Tensor, m2: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        x, groups = self._normed, mean.shape[1]
        frames = gather_objects(x.shape[2], self.axis)
        pieces = everyone(
            F.pad(x, (0, 0, 0, 0, 0, max(frames) - x.shape[2])), self.axis
        )  # gloo gathers equal shapes alone
        whole = torch.cat([piece[:, :, :own] for piece, own in zip(pieces, frames)], dim=2)
        mean, m2 = Moments.apply(whole, groups)
        return mean, m2 * groups / whole[0].numel()


@dataclass(frozen=True)
class Work:
    """A clip and its posterior's noise, or a rank's piece of them; ``totals``: elements of the whole clip and its latents."""

    video: Tensor
    noise: Tensor
    totals: tuple[int, int]

    @classmethod
    def of(cls, size: Size, dtype: torch.dtype) -> Work:
        batch, *clip = size
        video = torch.rand(batch, 3, *clip, generator=fold(0, "clip")) * 2 - 1
        noise = torch.randn(batch, *CONFIG.latent_shape(clip), generator=fold(0, "noise"))
        return cls(video.to(dtype), noise.to(dtype), (video.numel(), noise.numel()))

    def piece(self, axis: Axis) -> Work:
        shares = latent_shares(self.noise.shape[2], axis.size)
        mine, start = frames_of(shares, axis.rank, compression=CONFIG.temporal_compression), sum(shares[: axis.rank])
        own = slice(start, start + shares[axis.rank])
        return Work(self.video[:, :, mine.start : mine.stop], self.noise[:, :, own], self.totals)


def model_of(dtype: torch.dtype) -> VAE:
    vae = VAE(CONFIG).to(dtype)
    draw_parameters(vae, seed=0)
    return vae


def step(vae: VAE, work: Work, time: TimeContext) -> dict[str, Tensor]:
    """Gradients of this piece's share of the loss, by parameter."""
    vae.zero_grad()
    reconstruction, posterior = vae(work.video, work.noise, time=time)
    error = (reconstruction - work.video).square().sum() / work.totals[0]
    (error + posterior.kl().sum() / work.totals[1]).backward()
    return {name: parameter.grad for name, parameter in vae.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def forward(vae: VAE, work: Work, time: TimeContext) -> None:
    vae(work.video, work.noise, time=time)


def line_of(mesh: ParallelMesh) -> Axis:
    """All ranks, over the frames of one clip."""
    return build_mesh(Layout(ulysses=mesh.world.size, cp=mesh.world.size), rank=mesh.world.rank).cp


def schemes(axis: Axis) -> dict[str, Callable[[VAE], TimeContext]]:
    return {"ours": lambda vae: Shards(axis), "released": lambda vae: Released(axis, vae)}


def bench_gradients(mesh: ParallelMesh, size: Size) -> dict[str, Any]:
    """B5 on every rank; rank 0 has the errors."""
    axis, found = line_of(mesh), {}
    for name, scheme, dtype in (
        ("ours", "ours", torch.float32), ("released", "released", torch.float32), ("ours in float64", "ours", torch.float64),
    ):  # fmt: skip
        vae = model_of(dtype)
        mine = step(vae, Work.of(size, dtype).piece(axis), schemes(axis)[scheme](vae))
        found[name] = {key: reduce_sum(grad, axis).double() for key, grad in mine.items()}
    if axis.rank:
        return {}
    found["one process"], expected = (
        step(model_of(dtype), Work.of(size, dtype), Whole()) for dtype in (torch.float32, torch.float64)
    )
    return {name: errors(gradients, expected) for name, gradients in found.items()}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Of the whole gradient |a - b| / |b|, and of the parameter that differs most max |a - b| / max |b|."""
    difference, length = (
        torch.stack([x.square().sum() for x in tensors]).sum().sqrt()
        for tensors in ([found[name] - expected[name] for name in expected], list(expected.values()))
    )
    return {"whole": (difference / length).item(), "worst": worst_error(found, expected)}


def norm_inputs(model: nn.Module) -> list[int]:
    """A list that fills with the bytes of what the model's norms take in, when it runs."""
    sizes: list[int] = []
    for norm in (module for module in model.modules() if isinstance(module, NormSiLU)):
        norm.register_forward_pre_hook(lambda norm, inputs: sizes.append(inputs[0].nbytes))
    return sizes


def bench_bytes(mesh: ParallelMesh, size: Size) -> dict[str, dict[str, int]]:
    """B6: what this rank sends of either scheme, by operation, and of the released one by formula: each norm's input to every
    other rank. An odd number of latent frames gives rank 0 the most frames, so that nothing that it sends is padding."""
    axis = line_of(mesh)
    work, found, sizes = Work.of(size, torch.float32).piece(axis), {}, []
    for name, scheme in schemes(axis).items():
        vae = model_of(torch.float32)
        sizes, time = norm_inputs(vae), scheme(vae)
        axis.ledger.take()
        forward(vae, work, time)
        found[name] = {operation: traffic.bytes for (_, operation), traffic in axis.ledger.take().items()}
    return found | {"formula": found["ours"] | {"gather": (axis.size - 1) * sum(sizes)}}


def bench_times(mesh: ParallelMesh, size: Size, timing: Timing) -> dict[str, Any]:
    """B7 on every rank of the mesh."""
    axis = line_of(mesh)
    vae, work = model_of(torch.float32), Work.of(size, torch.float32).piece(axis)
    sides: dict[str, Callable[[], object]] = {
        f"{part} {name}": partial(run, vae, work, time)
        for part, run in (("forward", forward), ("step", step))
        for name, time in (("split", Shards(axis)), ("alone", Alone(axis)))
    }
    return timed(*interleaved_ranks(sides, mesh, timing))


def bench_vae_cp(size: Size, timing: Timing, *, run: Callable[..., list[Any]] = run_ranks) -> dict[str, Any]:
    """All of them, ready for JSON; ``run`` starts the ranks."""
    gradients = {str(ranks): run(bench_gradients, ranks, SMALL)[0] for ranks in (2, 4)}
    sent = {str(ranks): run(bench_bytes, ranks, size)[0] for ranks in (2, 4)}
    times = run(bench_times, 2, size, timing, timeout_s=400.0)[0]
    return {"size": size, "gradients": gradients, "bytes": sent, "times": times, "undisturbed": times["undisturbed"]}


def rows(result: dict[str, Any]) -> list[Row]:
    found = []
    for ranks, sides in result["gradients"].items():
        ours, released, alone, exact = (sides[n] for n in ("ours", "released", "one process", "ours in float64"))
        what = f"VAE over {ranks} ranks: relative error of the gradient"
        found += [
            Row("B5", f"{what} vs released scheme", "", ours["whole"], released["whole"], at_most=1e-5),
            Row("B5", f"{what} vs one process in float32", "", ours["whole"], alone["whole"]),
            Row("B5", f"{what} in float64", "", exact["whole"], at_most=1e-12),
            Row("B5", f"{what} of the worst parameter ({ours['worst'][0]}) vs that of the released scheme "
                f"({released['worst'][0]})", "", ours["worst"][1], released["worst"][1]),
        ]  # fmt: skip
    for ranks, sides in result["bytes"].items():
        ours, released, formula = (sum(sides[name].values()) / 1e6 for name in ("ours", "released", "formula"))
        what = f"VAE over {ranks} ranks: bytes that rank 0 sends forward vs released scheme"
        found += [
            smaller("B6", what, unit="MB", ours=ours, peer=released, at_most=1 / 7 if ranks == "2" else None),
            smaller("B6", f"{what} by formula", unit="MB", ours=ours, peer=formula),
            Row("B6", f"{what}: of ours, statistics", "MB", sides["ours"]["gather"] / 1e6),
        ]
    medians = result["times"]["median_seconds"]
    goal = 2.0 if result["undisturbed"] else None
    for part, what in (("forward", "encode and decode"), ("step", "encode, decode and backward")):
        split, alone = medians[f"{part} split"], medians[f"{part} alone"]
        what = f"VAE over 2 ranks, {what}: time above that of the pieces alone ({alone:.2f} s)"
        found.append(Row("B7", what, "%", 100 * (split / alone - 1), at_most=goal))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    axes = ("BATCH", "FRAMES", "HEIGHT", "WIDTH")
    parser.add_argument(
        "--size", type=int, nargs=4, metavar=axes, default=(2, 33, 40, 56), help="of the clips of B6, B7"
    )
    parser.add_argument("--repeats", type=int, default=3, help="undisturbed runs of every side (default 3)")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds to wait for them (default 45)")
    args = parser.parse_args()
    batch, frames, height, width = args.size
    print(json.dumps(bench_vae_cp((batch, frames, height, width), Timing(args.repeats, args.limit, warm_ups=1))))


if __name__ == "__main__":
    main()
