"""Sample videos from prompts: python | torchrun | deepspeed  launch/sample.py --checkpoint RUN --prompt TEXT --out DIR"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.config.schema import Sampling
from cogvideo_dist.diffusion.guidance import GuidanceKind
from cogvideo_dist.diffusion.samplers import SamplerName, first_step
from cogvideo_dist.engine.log import peak_memory
from cogvideo_dist.evaluation.media import to_uint8, write_contact_sheet, write_mp4, write_png
from cogvideo_dist.models.quantized import Quantization, weight_bytes
from cogvideo_dist.models.vae import Semantics
from cogvideo_dist.parallel.mesh import ParallelMesh, stop
from cogvideo_dist.parallel.ops import gather_objects
from cogvideo_dist.tasks.sampling import Edit, Sampler
from launch.environment import read_place, run_command
from launch.runs import Pipeline
from launch.sampling_inputs import Request, check_requests, image_of, read_requests, seeds_of, video_of
from launch.sampling_setup import (
    Precision,
    check_setup,
    read_source,
    ready_pipeline,
    sampling_layout,
    sampling_settings,
    start_ranks,
)

STRENGTH = 0.8
"""As in the public pipeline."""

SHOWN = 8
"""Frames of each video in the contact sheet."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sample videos from a run or from a diffusers pipeline folder, in one process or on ranks that share every "
        "video: an mp4 a prompt and a contact sheet. docs/sampling.md has the costs.",
        epilog="example:\n  python launch/sample.py --checkpoint runs/demo/dit --prompt 'A cat turns its head.' --out runs/out"
        "\n  torchrun --nproc_per_node 8 launch/sample.py --guidance-parallel --checkpoint CogVideoX-5b --prompts-file p.txt "
        "--out runs/out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a run's folder or a diffusers pipeline folder")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights of a run")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="RUN[=SHARE]",
        help="add the adapters of a run, whole or a share of them such as 0.7; may be given several times",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--preview-every", type=int, metavar="K", help="every K steps a picture of the running sample")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    add_inputs(parser.add_argument_group("what is sampled"))
    add_settings(parser.add_argument_group("how; what is left out is as the run's validation.sampling, or the model's"))
    add_levers(parser.add_argument_group("memory and precision"))
    add_ranks(parser.add_argument_group("ranks, started with torchrun or deepspeed"))
    return parser.parse_args()


def add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", action="append", default=[], help="may be given several times")
    group.add_argument(
        "--prompts-file", metavar="FILE",
        help='UTF-8 text, one prompt a line, or .jsonl with {"prompt": ..., "seed": ..., "image": ..., "video": ...} a line',
    )  # fmt: skip
    group.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video models")
    group.add_argument("--video", metavar="FILE", help="a video to start from instead of noise")
    group.add_argument(
        "--strength", type=float, help=f"how much of the way from noise is done on a video, in (0, 1]; {STRENGTH:g}"
    )
    group.add_argument("--seed", type=int, help="of the first prompt; the next ones count up")


def add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=int)
    group.add_argument("--guidance", type=float)
    group.add_argument("--guidance-kind", choices=get_args(GuidanceKind))
    group.add_argument("--sampler", choices=get_args(SamplerName))
    group.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    group.add_argument("--fps", type=float)
    group.add_argument(
        "--image-scale", choices=("scale", "none", "inverse"), help="how the image's latent is scaled; docs/sampling.md"
    )


def add_levers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision", choices=get_args(Precision),
        help="of the transformer; left out, what it was trained in on a GPU and fp32 on a CPU",
    )  # fmt: skip
    group.add_argument(
        "--quantize", choices=get_args(Quantization), help="weights of the transformer's blocks in 8 bits"
    )
    group.add_argument("--vae-precision", choices=get_args(Precision), default="fp32")
    group.add_argument(
        "--vae-semantics", choices=get_args(Semantics),
        help="whole: norms see the whole clip; chunked: eight frames at a time, in memory that does not grow",
    )  # fmt: skip
    group.add_argument(
        "--vae-tiling", action=argparse.BooleanOptionalAction,
        help="decode in overlapping tiles, for less memory; left out, as the run's frozen.vae_tiling says",
    )  # fmt: skip


def add_ranks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--guidance-parallel", action="store_true", help="guidance's two branches on halves of the ranks"
    )
    group.add_argument(
        "--sp", type=int, help="ranks over which a video's tokens are divided; left out, all that remain"
    )
    group.add_argument("--ulysses", type=int, help="of sp, those that exchange tokens for heads")
    group.add_argument("--ring", type=int, help="of sp, those around which keys and values travel")
    group.add_argument("--tp", type=int, default=1, help="ranks over which heads and features are divided")
    group.add_argument("--cp", type=int, default=1, help="ranks that decode a video together")


def main() -> None:
    options = arguments()
    begun = time.monotonic()
    requests = read_requests(options.prompt, options.prompts_file, image=options.image, video=options.video)
    place, source = read_place(), read_source(options.checkpoint)
    settings = sampling_settings(options, source)
    seeds = seeds_of(requests, first=settings.seed)
    strength = checked_strength(options, requests, steps=settings.steps)
    layout = sampling_layout(options, place, heads=source.model.heads)
    check_setup(options, source, settings=settings, place=place)
    check_requests(requests, source.model, settings=settings)
    mesh, ranks, device = start_ranks(options, place, layout=layout)
    pipeline = ready_pipeline(options, source, ranks=ranks, device=device)
    job = Job(pipeline.sampler, settings, strength, Path(options.out), options.preview_every, mesh, device)
    texts = encode(pipeline, requests)
    rows = [
        (request.prompt, shown)
        for number, (request, seed) in enumerate(zip(requests, seeds))
        for shown in job.run(number, request, text=texts[number], seed=seed)
    ]
    if rows:
        sheet = job.out / "contact-sheet.png"
        write_contact_sheet(sheet, rows)
        size = weight_bytes(pipeline.sampler.model) / 1e6
        kind = options.quantize or str(pipeline.sampler.model.embed.patch.weight.dtype).removeprefix("torch.")
        print(
            f"{sheet}: {len(rows)} videos in {time.monotonic() - begun:.1f} s; the transformer's weights are {size:.1f} MB "
            f"({kind})" + (f" on each of {mesh.world.size} ranks" if mesh.world.size > 1 else "")
        )
    if place.world > 1:
        stop()


def checked_strength(options: argparse.Namespace, requests: Sequence[Request], *, steps: int) -> float:
    """How much of the way is done on videos; refused where it means nothing."""
    if options.preview_every is not None and options.preview_every < 1:
        raise ConfigError(f"--preview-every {options.preview_every}: the number of steps must be at least 1")
    strength: float = STRENGTH if options.strength is None else options.strength
    if all(request.video is None for request in requests):
        if options.strength is not None:
            raise ConfigError("--strength says how much of a video is made anew; give one with --video")
        return strength
    try:
        first_step(steps, strength=strength)
    except ValueError as error:
        raise ConfigError(f"--strength: {error}") from None
    return strength


def encode(pipeline: Pipeline, requests: Sequence[Request]) -> list[Tensor]:
    """Features of the prompts, [length, dim] each, one by one: in a batch, a prompt's would depend on its neighbours in the
    last digit. Then the text encoder makes room for what follows."""
    features = [pipeline.text.encode([request.prompt])[0].cpu() for request in requests]
    pipeline.text.to("cpu")
    return features


@dataclass(frozen=True)
class Job:
    """Makes one video after the other, in ``out``; ``strength`` is for those that start from a video."""

    sampler: Sampler
    settings: Sampling
    strength: float
    out: Path
    preview_every: int | None
    mesh: ParallelMesh
    device: torch.device

    def run(self, number: int, request: Request, *, text: Tensor, seed: int) -> list[Tensor]:
        """Sample, decode and write a video. On the first rank what the contact sheet shows of it, uint8 [t, H, W, 3]; nothing
        on the others."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        video = video_of(request, self.settings)
        edit = None if video is None else Edit(video, self.strength)
        name = f"prompt-{number:02d}"
        with Watch(self, name, first=first_step(self.settings.steps, strength=self.strength) if edit else 0) as watch:
            latents = self.sampler.latents_of(
                text, self.settings, seed=seed, image=image_of(request, self.settings), edit=edit, preview=watch
            )
        begun = time.monotonic()
        frames = self._decoded(latents)
        seconds = time.monotonic() - begun
        peak = max(gather_objects(peak_memory(self.device), self.mesh.world))
        if not self.mesh.is_first:
            return []
        path = self.out / f"{name}.mp4"
        write_mp4(path, frames, self.settings.fps)
        print(
            f"{path}: {len(frames)} frames of {frames.shape[1]} x {frames.shape[2]}, seed {seed}, {watch.steps} steps "
            f"of {watch.seconds:.3g} s, decoded in {seconds:.3g} s, peak memory {peak / 1e9:.2f} GB",
            flush=True,
        )
        return [frames[torch.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().long()]]

    def _decoded(self, latents: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3] on the first rank, which alone writes; the others decode where it needs them."""
        if not {0, self.mesh.world.rank} <= set(self.sampler.ranks.cp.ranks):
            return torch.empty(0)
        return torch.cat([to_uint8(piece) for piece in self.sampler.pieces(latents)])


class Watch:
    """What is seen of a video's steps on the first rank: a bar, pictures of the running sample, and how long a step takes."""

    def __init__(self, job: Job, name: str, *, first: int) -> None:
        self.job, self.path = job, job.out / f"{name}.preview.png"
        self.first, self.steps = first, job.settings.steps - first
        self.bar = tqdm(total=self.steps, desc=name, unit="step", disable=not job.mesh.is_first)
        self.seconds = 0.0

    def __enter__(self) -> Watch:
        self.begun, self.looked = time.monotonic(), 0.0
        return self

    def __call__(self, index: int, x0: Tensor) -> None:
        self.bar.update()
        done, every = index - self.first + 1, self.job.preview_every
        if every is not None and done % every == 0 and done < self.steps and self.job.mesh.is_first:
            begun = time.monotonic()
            write_png(self.path, to_uint8(self.job.sampler.still(x0))[0])
            self.looked += time.monotonic() - begun
        if done == self.steps and x0.device.type == "cuda":
            torch.cuda.synchronize(x0.device)

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.seconds = (time.monotonic() - self.begun - self.looked) / self.steps


if __name__ == "__main__":
    run_command("sample", main)
