"""Measure a model on clips it has not seen: python launch/evaluate.py vae --vae FOLDER --shards SHARDS --out DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import Data, Size, check_size, positive
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import Index
from cogvideo_dist.data.loader import read_ahead, readers, to_sample
from cogvideo_dist.data.plan import HELD_OUT, Plan
from cogvideo_dist.data.pool import Task
from cogvideo_dist.data.reading import Cut
from cogvideo_dist.data.shards import DataError, ShardReader
from cogvideo_dist.data.sizes import assign_size
from cogvideo_dist.engine.files import file_hash
from cogvideo_dist.evaluation.reconstruction import Distance, latent_sums, reconstruction_sums
from cogvideo_dist.models.perceptual import RANDOM, SMALLEST
from cogvideo_dist.models.vae import LOGVAR_RANGE, VAE, Semantics
from cogvideo_dist.protocols import Defect, Sample, Slot
from cogvideo_dist.tasks.pixels import to_video
from launch.autoencoder import is_vae_run, load_perceptual, trained_vae
from launch.compose import LatentGeometry, load_vae, weights_digest
from launch.environment import run_command
from launch.evaluate_report import Evaluation, Measured, Shown, keep_extremes, show, table, write_report
from launch.runs import Weights

SIZE: Size = (17, 256, 256)
"""The size at which the CogVideoX paper compares autoencoders (table 2)."""
FPS = 8.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_autoencoder(options.vae, options.weights, device=device)
    reader = ShardReader(options.shards)
    data = chosen_data(options, source)
    perceptual = None if options.lpips == "none" else load_perceptual(options.lpips, options.lpips_net).to(device)
    slots, unused = chosen_clips(options, source, records=reader.records, data=data)
    readable = samples(reader, slots, data=data, unused=unused)
    clips, shown = measured(readable, source.vae, semantics=options.semantics, perceptual=perceptual)
    if not clips:
        raise ConfigError(f"none of the {len(reader.records)} samples of {options.shards} can be used; {first(unused)}")
    about = {
        "vae": source.about(), "semantics": options.semantics, "sizes": data.sizes, "fps": data.fps,
        "shards": options.shards, "index": reader.records.digest,
        "clips": wanted_clips(options, source), "lpips": about_lpips(options),
        "device": str(device), "torch": torch.__version__,
    }  # fmt: skip
    found = Evaluation(about, tuple(clips), tuple(shown), tuple(unused))
    write_report(Path(options.out), found)
    sys.stdout.write(table(found) + "\n")
    if unused:
        sys.stdout.write(f"{len(unused)} samples could not be used; {first(unused)}\n")
    sys.stdout.write(f"report: {Path(options.out) / 'evaluation.html'}\n")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Measure a model on clips of a shard set.")
    kinds = found.add_subparsers(dest="kind", required=True)
    vae = kinds.add_parser(
        "vae", help="an autoencoder's reconstructions",
        description="Reconstruct clips (the posterior's mode, decoded) and report PSNR, SSIM, LPIPS, flicker and statistics of "
        "the latents: a table, evaluation.json, evaluation.html, a contact sheet and the worst and best clip. Clips are "
        "taken in the order of the shards, from their beginning, cropped at the centre.",
        epilog="example:\n  python launch/evaluate.py vae --vae runs/demo/vae --shards runs/demo/shards --out runs/quality",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    vae.add_argument("--vae", required=True, metavar="FOLDER|RUN", help="a diffusers vae or pipeline folder, or a run")
    vae.add_argument("--weights", choices=get_args(Weights), default="ema", help="averaged or last weights of a run")
    vae.add_argument("--shards", required=True, help="folder of shards with videos and images")
    vae.add_argument("--clips", choices=("all", "held-out"), help="of a run; held-out if the shards are its own")
    vae.add_argument("--count", type=int, help="at most that many, from the beginning on")
    vae.add_argument(
        "--size", action="append", metavar="FRAMES,HEIGHT,WIDTH",
        help="may be given several times, each clip takes the nearest; left out, the run's sizes or 17,256,256",
    )  # fmt: skip
    vae.add_argument("--fps", type=float, help="frames per second of the clips; left out, the run's or 8")
    vae.add_argument(
        "--semantics", choices=get_args(Semantics), default="whole", help="group norm over the clip or chunks"
    )
    vae.add_argument(
        "--lpips", default="none", metavar="PATH|random|none",
        help="file of torchvision's classifier, safetensors or .pth; random: an untrained one, for a dry run",
    )  # fmt: skip
    vae.add_argument("--lpips-net", choices=SMALLEST, default="vgg", help="which classifier that is: vgg is VGG16")
    vae.add_argument("--out", required=True, help="folder to write to")
    return found


@dataclass(frozen=True)
class Source:
    """An autoencoder and where it came from; a run also says what it was trained on."""

    vae: VAE
    folder: str
    run: VAERun | None = None
    weights: Weights = "ema"
    step: int | None = None

    def about(self) -> dict[str, Any]:
        facts = {
            "folder": self.folder,
            "sha256": weights_digest(self.vae),
            "scaling_factor": self.vae.config.scaling_factor,
        }
        return facts if self.run is None else {**facts, "weights": self.weights, "step": self.step}


def open_autoencoder(folder: str, weights: Weights, *, device: torch.device) -> Source:
    """A run's newest whole checkpoint, or a diffusers folder of an autoencoder or of a pipeline with one."""
    path = Path(folder)
    if (path / "config.yaml").exists():
        if not is_vae_run(path):
            raise ConfigError(
                f"{folder} is not a run of launch/train_vae.py; give the autoencoder that it uses (frozen.vae)"
            )
        vae, step = trained_vae(path, weights)
        run = load_config(VAERun, [path / "config.yaml"])
        return Source(vae.to(device).requires_grad_(False).eval(), folder, run, weights, step)
    if not (path / "config.json").exists() and not (path / "vae" / "config.json").exists():
        raise ConfigError(
            f"{folder} is neither a run (it has no config.yaml) nor a diffusers vae folder (no config.json)"
        )
    return Source(load_vae(str(path if (path / "config.json").exists() else path / "vae"), device), folder)


def chosen_data(options: argparse.Namespace, source: Source) -> Data:
    """What the command line says, else the run, else the paper's size."""
    if source.run is not None:
        base = replace(source.run.data, shards=options.shards, sources=())
    else:
        base = Data("pixels", (SIZE,), FPS, tokens_per_pack=1, packs_per_step=1, shards=options.shards)
    if options.size:
        base = replace(base, sizes=tuple(map(read_size, options.size)))
    if options.fps is not None:
        positive("evaluate", fps=options.fps)
        base = replace(base, fps=options.fps)
    for size in base.sizes:
        source.vae.config.latent_shape(size)
    return base


def about_lpips(options: argparse.Namespace) -> dict[str, str] | None:
    if options.lpips == "none":
        return None
    facts = {"network": options.lpips_net, "backbone": options.lpips}
    return facts if options.lpips == RANDOM else {**facts, "sha256": file_hash(Path(options.lpips))}


def read_size(text: str) -> Size:
    try:
        frames, height, width = map(int, text.split(","))
    except ValueError:
        raise ConfigError(f"--size {text}: expected FRAMES,HEIGHT,WIDTH, such as 17,256,256") from None
    check_size("--size", (frames, height, width))
    return frames, height, width


def wanted_clips(options: argparse.Namespace, source: Source) -> str:
    """Whether all clips are taken or those that a run held out."""
    own = source.run is not None and source.run.data.held_out > 0
    if options.clips == "held-out" and not own:
        raise ConfigError(f"--clips held-out needs a run that held clips out (data.held_out); {source.folder} is none")
    if options.clips is not None or source.run is None:
        return options.clips or "all"
    same = own and source.run.data.shards and Path(source.run.data.shards).resolve() == Path(options.shards).resolve()
    return "held-out" if same else "all"


def chosen_clips(
    options: argparse.Namespace, source: Source, *, records: Index, data: Data
) -> tuple[list[Slot], list[Defect]]:
    """The clips to measure at their sizes, in the order of the shards, and those of no listed size."""
    if options.count is not None:
        positive("evaluate", count=options.count)
    wanted, indices = wanted_clips(options, source), list(range(len(records)))
    if source.run is not None and wanted == "held-out":
        plan = Plan(Catalog([records]), source.run.data, seed=source.run.run.seed, geometry=LatentGeometry())
        indices = [slot.index for slot in plan.held_out]
    slots, unused = list[Slot](), list[Defect]()
    for index in indices:
        size = assign_size(records[index], data)
        if isinstance(size, str):
            unused.append(Defect(records[index].key, records[index].source, size))
        else:
            slots.append(Slot(HELD_OUT, index, size))
    return slots[: options.count], unused


def samples(reader: ShardReader, slots: Sequence[Slot], *, data: Data, unused: list[Defect]) -> Iterator[Sample]:
    """The clips, with progress; one whose bytes are at fault is added to ``unused``."""
    reads = readers([reader.store], data)
    tasks = (Task(0, reader.records[slot.index], Cut(slot.size, data.fps)) for slot in slots)
    for slot, read in zip(tqdm(slots, unit="clip"), read_ahead(reads, tasks)):
        if isinstance(read, DataError):
            unused.append(Defect(read.key, read.source, read.reason, code=read.code))
        else:
            yield to_sample(read, reader.records[slot.index], slot=slot)
    reads.close()


@torch.no_grad()
def measured(
    readable: Iterator[Sample], vae: VAE, *, semantics: Semantics, perceptual: Distance | None
) -> tuple[list[Measured], list[Shown]]:
    """Every clip's sums; of the worst and the best also their frames."""
    clips, shown = list[Measured](), list[Shown]()
    for sample in readable:
        video = to_video([sample], next(vae.parameters()))
        posterior = vae.encode(video, semantics)
        output = vae.decode(posterior.mode(), semantics)
        try:
            sums = reconstruction_sums(video[0], output[0], perceptual=perceptual)
        except ValueError as error:
            raise ValueError(f"clip {sample.key} ({sample.source}): {error}") from None
        sums |= latent_sums(posterior.mean, posterior.logvar, bounds=LOGVAR_RANGE)
        clips.append(Measured(sample.key, sample.source, sample.caption, sample.slot.size, sums))
        shown = keep_extremes([*shown, show(clips[-1], video[0], reconstruction=output[0])])
    return clips, shown


def first(unused: Sequence[Defect]) -> str:
    return f"the first, {unused[0].source}: {unused[0].reason}" if unused else "it is empty"


if __name__ == "__main__":
    run_command("evaluate", main)
