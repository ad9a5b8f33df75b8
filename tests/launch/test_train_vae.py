"""The autoencoder's training, through the command's composition."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import VAERun
from cogvideo_dist.parallel.mesh import ParallelMesh, build_mesh
from launch import convert, train_vae
from launch.compose import load_vae
from tests.launch.world import World, outcome, read_log, steps_of
from tests.ranks import run_ranks

CONFIG = """\
run: {dir: WORLD/run, seed: 2}
model: {channels: [4, 4, 8, 8], layers_per_block: 1, latent_channels: 16, norm_groups: 2, scaling_factor: 0.9}
data:
  shards: WORLD/shards
  source: pixels
  sizes: [[9, 32, 32], [1, 32, 32]]
  fps: 8
  tokens_per_pack: 80
  packs_per_step: 2
  held_out: 2
  workers: 0
train: {steps: 4, learning_rate: 3.0e-3, precision: fp32, zero_stage: 2, schedule: constant, ema_decay: 0.9}
checkpoint: {every: 4}
log: {every: 1, peak_tflops: 0.1}
validation: {samples_every: 4, prompts: ["held-out clips"]}
"""


def train(mesh: ParallelMesh, file: Path, overrides: list[str]) -> None:
    config = load_config(VAERun, [file], overrides=overrides)
    layout = train_vae.layout_of(config, mesh.world.size)
    train_vae.train(config, build_mesh(layout, rank=mesh.world.rank))


@pytest.fixture(scope="module")
def file(world: World) -> Path:
    path = world.root / "vae.yaml"
    path.write_text(CONFIG.replace("WORLD", str(world.root)))
    return path


@pytest.fixture(scope="module")
def run(world: World, file: Path) -> Path:
    folder = world.root / "vae-run"
    run_ranks(train, 1, file, [f"run.dir={folder}", "train.zero_stage=0"])
    return folder


def test_two_ranks_that_were_stopped_half_way_compute_the_run(file: Path, run: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        run_ranks(train, 2, file, [f"run.dir={tmp_path}", f"train.steps={steps}", "validation.samples_every=0"])
    names = ("loss", "loss/reconstruction", "loss/kl")
    for found, expected in zip(steps_of(tmp_path, *names), steps_of(run, *names), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


SMOOTH = "train.eps=1.0e-3"
"""AdamW with less turns the rounding of a gradient near zero into an update of full size."""


@pytest.fixture(scope="module")
def smooth(world: World, file: Path) -> Path:
    folder = world.root / "vae-smooth"
    run_ranks(train, 1, file, [f"run.dir={folder}", SMOOTH])
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_clips_split_in_time_compute_the_run(file: Path, smooth: Path, tmp_path: Path, ranks: int) -> None:
    """cp = 2, with images, which do not split; alone and with two data-parallel ranks; losses, judgements and pictures."""
    run_ranks(train, ranks, file, [f"run.dir={tmp_path}", SMOOTH, "parallel.cp=2"])
    # L1's gradient is a sign, which rounding flips where an error is next to nothing: its norm is less exact than the loss.
    for names, bound in ((("loss", "loss/reconstruction", "loss/kl"), 1e-5), (("gradient_norm",), 5e-4)):
        for found, expected in zip(steps_of(tmp_path, *names), steps_of(smooth, *names), strict=True):
            assert found == pytest.approx(expected, rel=bound)
    psnr = [
        [entry["held_out/psnr"] for entry in read_log(run) if "held_out/psnr" in entry] for run in (tmp_path, smooth)
    ]
    assert psnr[0] == pytest.approx(psnr[1], rel=1e-5)
    shown = [sorted(path.name for path in (run / "samples" / "step-000004").iterdir()) for run in (tmp_path, smooth)]
    assert len(shown[0]) == len(shown[1])  # those of the first data-parallel rank


def test_a_split_that_does_not_divide_the_ranks_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel.cp 2 does not divide 3 ranks; use one of 1, 3"):
        train_vae.layout_of(load_config(VAERun, [file], overrides=["parallel.cp=2"]), 3)


def test_reconstructions_get_better_and_are_shown(run: Path) -> None:
    psnr = [entry["held_out/psnr"] for entry in read_log(run) if "held_out/psnr" in entry]
    assert len(psnr) == 2
    assert psnr[1] > psnr[0]
    assert (run / "samples" / "step-000004" / "contact-sheet.png").stat().st_size > 0


def test_its_export_is_a_public_autoencoder(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", "diffusers", str(run), str(tmp_path / "vae")])
    code, _, stderr = outcome("convert", convert.main)
    assert code == 0, stderr
    theirs, loading = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert theirs.config.scaling_factor == 0.9
    ours = load_vae(str(tmp_path / "vae"), torch.device("cpu"))
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert (ours.encode(video).mean - theirs.encode(video).latent_dist.mean).abs().max() < 1e-4
