"""The autoencoder's two stages, small: short clips, then long ones over two ranks. python launch/demo_vae.py --out DIR"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from cogvideo_dist.config.load import ConfigError
from launch.demo import make_shards, python, stage, train
from launch.environment import run_command

FIRST, SECOND = ("configs/demo/vae_stage1.yaml",), ("configs/demo/vae_stage1.yaml", "configs/demo/vae_stage2.yaml")
RISE = 8.0
"""Decibels that held-out PSNR must rise by."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The autoencoder's two stages on a small scale: short clips, then long ones whose frames two ranks share.",
        epilog="example:\n  python launch/demo_vae.py --out runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="runs/demo", help="folder of everything that the demo makes")
    out = Path(parser.parse_args().out)
    begun = time.monotonic()
    os.environ.update(HF_HUB_OFFLINE="1", DIFFUSERS_VERBOSITY="error")
    make_shards(out)
    first, second, quality = out / "vae-stage1", out / "vae-stage2", out / "vae-quality"
    shards = f"data.shards={out / 'shards'}"
    stage("stage 1: short clips and images, 2 data-parallel ranks with ZeRO-2; a critic comes in near the end")
    train("train_vae", FIRST, overrides=[f"run.dir={first}", shards])
    stage("stage 2: long clips from stage 1's checkpoint, each shared by 2 ranks in time")
    overrides = [f"run.dir={second}", shards, f"model.weights={first}", f"loss.critic.weights={first}"]
    train("train_vae", SECOND, overrides=overrides)
    stage("measure the held-out clips")
    python("launch/evaluate.py", "vae", "--vae", second, "--shards", out / "shards", "--lpips", "random", "--lpips-net",
           "squeeze", "--out", quality)  # fmt: skip
    report(first, second, quality=quality, seconds=time.monotonic() - begun)


def report(first: Path, second: Path, *, quality: Path, seconds: float) -> None:
    """What came of it; refuses a demo in which the autoencoder has not learned or a loss was not finite."""
    logs = [read_log(run) for run in (first, second)]
    measured = [entry for log in logs for entry in log if "held_out/psnr" in entry]
    start, end = measured[0], measured[-1]
    contest = [entry for log in logs for entry in log if "critic/loss" in entry]
    rise = end["held_out/psnr"] - start["held_out/psnr"]
    print(f"""
== done in {seconds / 60:.1f} minutes
held-out PSNR    start {start["held_out/psnr"]:.2f} dB   end {end["held_out/psnr"]:.2f} dB   (+{rise:.2f})
held-out SSIM    start {start["held_out/ssim"]:.3f}      end {end["held_out/ssim"]:.3f}
held-out LPIPS   start {start["held_out/lpips"]:.4f}     end {end["held_out/lpips"]:.4f}   (through an untrained network)
flicker          reconstruction {end["held_out/flicker_reconstruction"]:.2f}, original {end["held_out/flicker_original"]:.2f}
critic           heard in {len(contest)} reports, last losses: decoder {contest[-1]["loss/decoder"]:.3f}, critic \
{contest[-1]["critic/loss"]:.3f}
contact sheets   {sheet(first)}
                 {sheet(second)}
quality          {quality / "evaluation.html"}
TensorBoard      tensorboard --logdir {second.parent}""")
    losses = [entry[name] for entry in contest for name in ("loss", "loss/decoder", "critic/loss")]
    if rise < RISE or not all(map(math.isfinite, losses)):
        raise ConfigError(f"the demo did not behave: held-out PSNR must rise by {RISE:g} dB and losses must be finite")


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def sheet(run: Path) -> Path:
    """The last contact sheet of a run."""
    return sorted((run / "samples").glob("step-*/contact-sheet.png"))[-1]


if __name__ == "__main__":
    run_command("demo_vae", main)
