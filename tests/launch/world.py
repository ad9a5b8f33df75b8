"""A world of toys to run the real commands in: clips, shards, a text encoder, an autoencoder and a configuration."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.parallel.mesh import ParallelMesh, Place, build_mesh
from data_tools import make_shards
from data_tools.make_demo_text import make_text
from launch import train_dit
from launch.environment import run_command
from tests.data.clips import add, make_clip, make_image

LENGTH = 64
SIZES = "[[9, 32, 32], [1, 32, 32]]"
CONFIG = f"""\
run: {{dir: WORLD/run, seed: 5}}
model:
  preset: cogvideox-5b
  layers: 2
  heads: 2
  head_dim: 16
  time_embed_dim: 16
  text_dim: 16
  text_length: {LENGTH}
  sample_frames: 3
  sample_height: 4
  sample_width: 4
frozen: {{vae: WORLD/vae, text: WORLD/text}}
data:
  shards: WORLD/shards
  source: pixels
  sizes: {SIZES}
  fps: 8
  tokens_per_pack: 160
  packs_per_step: 4
  held_out: 2
  workers: 0
train:
  steps: 10
  learning_rate: 2.0e-2
  warmup_steps: 2
  precision: fp32
  zero_stage: 2
  clip_norm: 0.5
  ema_decay: 0.9
checkpoint: {{every: 5, keep: 2}}
log: {{every: 1, peak_tflops: 0.1}}
validation:
  timesteps: [100, 900]
  sampling: {{steps: 3, sampler: ddim, size: [9, 32, 32], guidance: 2.0}}
"""


CLIPS = {
    **{f"videos/{i}.mp4": make_clip(12 + 3 * i, 8 + i, size=(48, 64)) for i in range(4)},
    **{f"videos/odd {i}.mp4": make_clip(14, 12, size=(38, 54)) for i in range(2)},
    **{f"images/still {i}.png": make_image(40 + i, 61) for i in range(2)},
}


@dataclass(frozen=True)
class World:
    """Where everything is. ``file`` is the configuration; its ``run.dir`` is always given as an override."""

    root: Path
    file: Path

    def overrides(self, run: Path, *changes: str) -> list[str]:
        return [f"run.dir={run}", *changes]

    def config(self, run: Path, *changes: str) -> DiTRun:
        return load_config(DiTRun, [self.file], overrides=self.overrides(run, *changes))


@cache
def make_world(root: Path) -> World:
    """Made once for all tests of a session."""
    for name, content in CLIPS.items():
        add(root / "clips", name, content, f"This is {name}, a clip of its own.")
    pack(root / "clips", root / "shards")
    make_text(root / "clips" / "labels", root / "text", dim=16, layers=1, length=LENGTH)
    save_tiny_vae(root / "vae", seed=0)
    file = root / "tiny.yaml"
    file.write_text(CONFIG.replace("WORLD", str(root)))
    return World(root, file)


def pack(source: Path, shards: Path) -> None:
    """What data_tools/make_shards.py does."""
    code, _, stderr = outcome("make_shards", lambda: sys.exit(make_shards.main([str(source), str(shards)])))
    assert code == 0, stderr


def save_tiny_vae(folder: Path, *, seed: int, scaling_factor: float = 0.7) -> None:
    vae = VAE(
        VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2, scaling_factor=scaling_factor)
    )
    draw_parameters(vae, seed)
    hf.save_vae(vae, folder)


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def steps_of(run: Path, *names: str) -> list[tuple[float, ...]]:
    """(step, value, ...) of every logged training step."""
    return [(e["step"], *(e[name] for name in names)) for e in read_log(run) if "loss" in e]


def report(run: Path) -> list[dict[str, Any]]:
    """The run's data report."""
    return [json.loads(line) for line in (run / "data_report.jsonl").read_text().splitlines()]


def outcome(name: str, main: Callable[[], Any]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command's ``main`` under the real handling of errors."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_command(name, main)
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def train(mesh: ParallelMesh, file: Path, overrides: list[str]) -> None:
    """A training on forked ranks, as the command composes it."""
    config = load_config(DiTRun, [file], overrides=overrides)
    rank, ranks = mesh.world.rank, mesh.world.size
    layout = train_dit.layout_of(config, Place(rank, ranks, rank, node=ranks))
    train_dit.train(config, build_mesh(layout, rank=rank), device=torch.device("cpu"))


def try_train(mesh: ParallelMesh, file: Path, overrides: list[str]) -> tuple[int, str, str]:
    """``train`` to the end that the command would come to."""
    return outcome("train_dit", lambda: train(mesh, file, overrides))
