"""Fine-tuning on a small scale: one clip learnt by heart in three ways, and a run in two stages.

python launch/demo_finetune.py --demo runs/demo
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.config.schema import Size
from cogvideo_dist.data.decode import DecodeError, decode_video
from cogvideo_dist.evaluation.media import write_contact_sheet, write_png
from cogvideo_dist.evaluation.reconstruction import psnr
from cogvideo_dist.tasks.pixels import normalized
from launch.compose import load_vae
from launch.demo import python, stage, train
from launch.demo_vae import read_log
from launch.environment import run_command

SIZE: Size = (17, 96, 96)
FPS = 8.0
FALL = 5.0
"""How many times the training loss must fall."""

NEAR = 20.0
"""Decibels that the first frame of an image-to-video sample must be near to its image."""

CLIP = "clip_018"
"""A cat, which one can tell in the pictures."""

ONE = "configs/demo/overfit_sft.yaml"
GATES = {
    "sft": ("all weights", (ONE,)),
    "lora": ("adapters alone", (ONE, "configs/demo/overfit_lora.yaml")),
    "i2v": ("an image condition beside the text", (ONE, "configs/demo/overfit_i2v.yaml")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="One clip of the demo learnt by heart, by all weights, by adapters and from its first frame; then a run in "
        "two stages. The demo is made first where it is not there.",
        epilog="example:\n  python launch/demo_finetune.py --demo runs/demo --only lora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--demo", default="runs/demo", help="the demo's folder; results go to overfit/ and stage*/ in it"
    )
    parser.add_argument("--only", nargs="+", choices=(*GATES, "stages"), default=[*GATES, "stages"])
    options = parser.parse_args()
    demo = Path(options.demo)
    os.environ.update(HF_HUB_OFFLINE="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    if not (demo / "pipeline" / "model_index.json").exists():
        python("launch/demo.py", "--out", demo)
    clips = read_clips(demo / "clips")
    prepare(demo, clips[CLIP])
    verdicts = [gate(demo, kind, clips=clips) for kind in GATES if kind in options.only]
    if "stages" in options.only:
        verdicts.append(two_stages(demo))
    print("\n== " + "\n== ".join(verdict.line for verdict in verdicts))
    if failed := [verdict.line for verdict in verdicts if not verdict.good]:
        raise ConfigError(f"the demo did not behave: {failed[0]}")


@dataclass(frozen=True)
class Verdict:
    line: str
    good: bool


def read_clips(folder: Path) -> dict[str, Tensor]:
    """The demo's clips that are long and large enough, as training sees them: uint8 [T, H, W, 3] by name."""
    clips = {}
    for path in sorted((folder / "videos").glob("*.mp4")):
        pixels = np.empty((*SIZE, 3), np.uint8)
        try:
            decode_video(path.read_bytes(), pixels, fps=FPS)
        except DecodeError:
            continue
        clips[path.stem] = torch.from_numpy(pixels)
    return clips


@torch.no_grad()
def prepare(demo: Path, clip: Tensor) -> None:
    """Shards of the one clip; and how well the demo's small autoencoder keeps it: no sample comes nearer than that."""
    vae = load_vae(str(demo / "vae-export"), torch.device("cpu"))
    video = normalized(clip[None], next(vae.parameters()))
    kept = vae.decode(vae.encode(video).mode())[0]
    print(f"{CLIP}: the autoencoder keeps it to {distance(video[0], kept):.1f} dB", flush=True)
    folder = demo / "overfit"
    if not (folder / "shards").exists():
        for part, suffix in (("videos", ".mp4"), ("labels", ".txt")):
            (folder / "clip" / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(demo / "clips" / part / f"{CLIP}{suffix}", folder / "clip" / part)
        python("data_tools/make_shards.py", folder / "clip", folder / "shards")
    write_png(folder / "first-frame.png", clip[0])


def distance(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of what lies in [-1, 1]."""
    return float(psnr((x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean() / 4))


def gate(demo: Path, kind: str, *, clips: dict[str, Tensor]) -> Verdict:
    """Train on the one clip, sample its caption, and say what the sample is nearest to."""
    what, configs = GATES[kind]
    folder, run = demo / "overfit", demo / "overfit" / kind
    stage(f"one clip by heart: {what}")
    begun = time.monotonic()
    overrides = [
        f"run.dir={run}", f"init.from={demo / 'dit'}", f"data.shards={folder / 'shards'}",
        f"frozen.vae={demo / 'vae-export'}", f"frozen.text={demo / 'text'}",
    ]  # fmt: skip
    train("train_dit", ["configs/demo/dit.yaml", *configs], overrides=overrides)
    caption = (folder / "clip" / "labels" / f"{CLIP}.txt").read_text(encoding="utf-8").strip()
    image: list[str | Path] = ["--image", folder / "first-frame.png"] if kind == "i2v" else []
    python(
        "launch/sample.py", "--checkpoint", run, "--prompt", caption, "--out", run / "sample", "--guidance-kind", "constant",
        "--guidance", "1", *image,
    )  # fmt: skip
    minutes = (time.monotonic() - begun) / 60
    sample = sampled(run / "sample" / "prompt-00.mp4")
    near = sorted(((distance(as_video(sample), as_video(clip)), name) for name, clip in clips.items()), reverse=True)
    rows = [(f"{kind}: sample", sample)]
    rows += [
        (f"{value:.1f} dB  {name}{' (the clip)' if name == CLIP else ''}", clips[name]) for value, name in near[:4]
    ]
    write_contact_sheet(run / "nearest.png", rows)
    losses = [entry["loss"] for entry in read_log(run) if "loss" in entry]
    fall = losses[0] / (sum(losses[-5:]) / len(losses[-5:]))
    first = distance(as_video(sample[:1]), as_video(clips[CLIP][:1]))
    line = (
        f"{kind}: loss {losses[0]:.3f}, {fall:.1f} times less at the end; sample {near[0][0]:.1f} dB from {near[0][1]}, "
        f"{near[1][0]:.1f} dB from {near[1][1]}; first frame {first:.1f} dB from the clip's; {minutes:.1f} minutes; "
        f"{run / 'nearest.png'}"
    )
    good = fall >= FALL and near[0][1] == CLIP and (kind != "i2v" or first >= NEAR)
    return Verdict(line, good)


def as_video(frames: Tensor) -> Tensor:
    return normalized(frames[None], torch.zeros(()))[0]


def sampled(path: Path) -> Tensor:
    """The frames of a sample as written."""
    pixels = np.empty((*SIZE, 3), np.uint8)
    decode_video(path.read_bytes(), pixels, fps=FPS)
    return torch.from_numpy(pixels)


def two_stages(demo: Path) -> Verdict:
    """Small and short clips, then larger and longer ones from there; the demo's own run says what a fresh model begins with."""
    first, second = demo / "stage1", demo / "stage2"
    given = [f"data.shards={demo / 'shards'}", f"frozen.vae={demo / 'vae-export'}", f"frozen.text={demo / 'text'}"]
    stage("stage 1 of 2: small and short")
    train("train_dit", ["configs/demo/dit.yaml", "configs/demo/stage1.yaml"], overrides=[f"run.dir={first}", *given])
    stage("stage 2 of 2: larger and longer, from stage 1")
    overrides = [f"run.dir={second}", f"init.from={first}", *given]
    train("train_dit", ["configs/demo/dit.yaml", "configs/demo/stage2.yaml"], overrides=overrides)
    fresh, begun = (
        next(entry["held_out/loss"] for entry in read_log(run) if "held_out/loss" in entry)
        for run in (demo / "dit", second)
    )
    (ancestor,) = json.loads((second / "lineage.json").read_text(encoding="utf-8"))
    last = [entry for entry in read_log(second) if "lineage/steps" in entry][-1]
    seen = sum(entry["data/samples"] for run in (first, second) for entry in read_log(run) if "data/samples" in entry)
    line = (
        f"stages: held-out loss {begun:.3f} at the beginning of stage 2, {fresh:.3f} of a fresh model; "
        f"{last['lineage/steps']:g} steps and {last['lineage/samples']:g} clips in all, "
        f"{ancestor['step']} and {ancestor['samples']} of them in stage 1"
    )
    return Verdict(line, begun < fresh and last["lineage/samples"] == seen)


if __name__ == "__main__":
    run_command("demo_finetune", main)
