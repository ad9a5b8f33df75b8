"""The autoencoder's training, through the command's composition."""

from __future__ import annotations

import math
import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.engine.checkpoint import newest
from cogvideo_dist.engine.manifest import read_manifest
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models.critic import Critic
from cogvideo_dist.models.vae import VAE
from cogvideo_dist.parallel.mesh import ParallelMesh, build_mesh
from launch import convert, train_vae
from launch.autoencoder import build_judges, build_vae
from launch.compose import load_vae
from launch.training import Start
from tests.engine.saved_states import whole_states
from tests.engine.test_numbers import incidents
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


CONTEST = """\
loss:
  reconstruction: l2
  kl_weight: 1.0e-4
  perceptual: {weights: random, net: squeeze, weight: 0.1}
  critic: {start: 3, learning_rate: 1.0e-3, channels: [4, 8], r1_weight: 1.0, r1_every: 2}
train: {steps: 6, eps: 1.0e-3}
checkpoint: {every: 2}
"""
"""With LPIPS, and a critic after three of six steps, which pays its penalty in steps 3 and 5."""


def train(mesh: ParallelMesh, files: list[Path], overrides: list[str]) -> None:
    config = load_config(VAERun, files, overrides=overrides)
    layout = train_vae.layout_of(config, mesh.world.size)
    train_vae.train(config, build_mesh(layout, rank=mesh.world.rank), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def file(world: World) -> Path:
    path = world.root / "vae.yaml"
    path.write_text(CONFIG.replace("WORLD", str(world.root)))
    return path


@pytest.fixture(scope="module")
def run(world: World, file: Path) -> Path:
    folder = world.root / "vae-run"
    run_ranks(train, 1, [file], [f"run.dir={folder}", "train.zero_stage=0"])
    return folder


@pytest.mark.long
def test_two_ranks_that_were_stopped_half_way_compute_the_run(file: Path, run: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        run_ranks(train, 2, [file], [f"run.dir={tmp_path}", f"train.steps={steps}", "validation.samples_every=0"])
    names = ("loss", "loss/reconstruction", "loss/kl")
    for found, expected in zip(steps_of(tmp_path, *names), steps_of(run, *names), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


SMOOTH = "train.eps=1.0e-3"
"""AdamW with less turns the rounding of a gradient near zero into an update of full size."""


@pytest.fixture(scope="module")
def smooth(world: World, file: Path) -> Path:
    folder = world.root / "vae-smooth"
    run_ranks(train, 1, [file], [f"run.dir={folder}", SMOOTH])
    return folder


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_clips_split_in_time_compute_the_run(file: Path, smooth: Path, tmp_path: Path, ranks: int) -> None:
    """cp = 2, with images, which do not split; alone and with two data-parallel ranks; losses, judgements and pictures."""
    run_ranks(train, ranks, [file], [f"run.dir={tmp_path}", SMOOTH, "parallel.cp=2"])
    # L1's gradient is a sign, which rounding flips where an error is next to nothing; from there on weights differ.
    for names, bound in ((("loss", "loss/reconstruction", "loss/kl"), 1e-4), (("gradient_norm",), 5e-4)):
        for found, expected in zip(steps_of(tmp_path, *names), steps_of(smooth, *names), strict=True):
            assert found == pytest.approx(expected, rel=bound)
    psnr = [
        [entry["held_out/psnr"] for entry in read_log(run) if "held_out/psnr" in entry] for run in (tmp_path, smooth)
    ]
    assert psnr[0] == pytest.approx(psnr[1], rel=1e-4)
    shown = [sorted(path.name for path in (run / "samples" / "step-000004").iterdir()) for run in (tmp_path, smooth)]
    assert set(shown[0]) <= set(shown[1])  # those of the first data-parallel rank
    assert len(shown[0]) == len(shown[1]) - (ranks == 4)


@pytest.fixture(scope="module")
def contest(file: Path) -> Path:
    path = file.with_name("contest.yaml")
    path.write_text(CONTEST)
    return path


LOSSES = ("loss", "loss/reconstruction", "loss/kl", "loss/perceptual")
AGAINST = ("loss/decoder", "critic/loss", "critic/balance", "critic/hinge", "critic/right")
ENDS = [
    (Critic, "backward", 1), (VAE, "backward", 9), (VAE, "backward", 3), (VAE, "step", 8), (VAE, "copy", 3),
    (Critic, "backward", 4), (Critic, "step", 0), (Critic, "step", 3), (Critic, "copy", 1), (Critic, "copy", 2),
]  # fmt: skip
"""Ends by kill -9: whose call of what, counted from 0. A step has two micro-steps; the critic's first is the seventh."""


@pytest.fixture(scope="module")
def undisturbed(world: World, file: Path, contest: Path) -> Path:
    folder = world.root / "vae-contest"
    run_ranks(
        train, 2, [file, contest], [f"run.dir={folder}", "parallel.cp=2", "checkpoint.every=1", "checkpoint.keep=9"]
    )
    return folder


def ended(mesh: ParallelMesh, files: list[Path], overrides: list[str], end: tuple[str, str, int]) -> None:
    """``train``, in which the first rank dies when the named call has returned."""
    whose, method, last = end
    function, calls = getattr(Engine, method), count()

    def call(engine: Engine, *args: Any, **options: Any) -> Any:
        result = function(engine, *args, **options)
        if type(engine.model).__name__ == whose and next(calls) == last and mesh.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(Engine, method, call)  # the process is this rank's own
    train(mesh, files, overrides)


@pytest.mark.long
@pytest.mark.parametrize(("model", "method", "call"), ENDS)
def test_a_run_killed_in_either_phase_goes_on_bitwise(
    file: Path, contest: Path, undisturbed: Path, tmp_path: Path, model: type, method: str, call: int
) -> None:
    overrides = [f"run.dir={tmp_path}", "parallel.cp=2", "checkpoint.every=1", "checkpoint.keep=9"]
    with pytest.raises(AssertionError, match=r"rank 0 ended with -9|rank 1 failed first"):
        run_ranks(ended, 2, [file, contest], overrides, (model.__name__, method, call))
    assert len(steps_of(tmp_path, "loss")) < 6
    run_ranks(train, 2, [file, contest], overrides)
    figures = ("step", "gradient_norm", "critic/gradient_norm", *LOSSES, *AGAINST)
    found, expected = (
        [{name: e.get(name) for name in figures} for e in read_log(run) if "loss" in e]
        for run in (tmp_path, undisturbed)
    )
    assert found == expected
    paths = [newest(run / "ckpt")[0] for run in (tmp_path, undisturbed)]
    states = [whole_states(folder) for folder in paths if folder]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) == 7
    for kind, tensors in states[0].items():
        assert all(torch.equal(tensor, states[1][kind][name]) for name, tensor in tensors.items()), kind


@pytest.mark.long
def test_a_critic_is_heard_from_its_start_on(undisturbed: Path) -> None:
    found = [entry for entry in read_log(undisturbed) if "loss" in entry]
    assert [all(name in entry for name in AGAINST) for entry in found] == [False] * 3 + [True] * 3
    assert ["critic/penalty" in entry for entry in found] == [False, False, False, True, False, True]
    assert all(math.isfinite(value) for entry in found for value in entry.values())
    held_out = [entry for entry in read_log(undisturbed) if "held_out/psnr" in entry][-1]
    assert {
        "held_out/ssim",
        "held_out/lpips",
        "held_out/flicker_original",
        "held_out/flicker_reconstruction",
    } < held_out.keys()


@pytest.mark.long
def test_a_run_with_a_critic_is_that_of_one_process(
    file: Path, contest: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """On two data-parallel ranks, and split in time, where rounding is another; training against a critic makes more of it."""
    run_ranks(train, 1, [file, contest], [f"run.dir={tmp_path / 'one'}"])
    run_ranks(train, 2, [file, contest], [f"run.dir={tmp_path / 'two'}"])
    # From the critic's start on, losses are balanced by a quotient of gradients' norms.
    for run, alone, against in ((tmp_path / "two", 1e-4, 2e-3), (undisturbed, 1.5e-2, 1.5e-2)):
        for found, expected in zip(read_log(run), read_log(tmp_path / "one"), strict=True):
            for name in {*LOSSES, *AGAINST, "held_out/psnr", "held_out/lpips"} & expected.keys():
                bound = alone if found["step"] <= 3 else against
                assert found[name] == pytest.approx(expected[name], rel=bound), (found["step"], name)


def test_a_second_stage_starts_from_the_averaged_weights_and_the_critic_of_the_first(
    file: Path, contest: Path, undisturbed: Path, tmp_path: Path
) -> None:
    changes = [f"run.dir={tmp_path}", f"model.weights={undisturbed}", f"loss.critic.weights={undisturbed}"]
    config = load_config(VAERun, [file, contest], overrides=changes)
    judges = build_judges(config.loss, seed=0, device=torch.device("cpu"))
    saved, _ = newest(undisturbed / "ckpt")
    assert saved is not None and judges.critic is not None
    for model, kind in ((build_vae(config), "ema"), (judges.critic, "critic.weights")):
        expected = whole_states(saved)[kind]
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.channels=[4, 4, 8, 16]", "model.weights=RUN"], "has channels .4, 4, 8, 8., not .4, 4, 8, 16."),
        (["model.weights=RUN/ckpt"], "is neither a run .config.yaml. nor a diffusers vae folder"),
        (["model.weights=SHARDS"], "is neither a run"),
        (["loss.critic.weights=PLAIN"], "loss.critic.weights: .*step-000004 holds no critic; it was trained without one"),
        (["loss.critic.channels=[4, 6]", "loss.critic.weights=RUN"], "is of another model"),
        (["loss.perceptual.weights=SHARDS/index.json"], "weights of the perceptual network are .safetensors or .pth"),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit_is_refused(
    world: World, file: Path, contest: Path, undisturbed: Path, run: Path, changes: list[str], message: str
) -> None:
    places = {"RUN": undisturbed, "PLAIN": run, "SHARDS": world.root / "shards"}
    for word, path in places.items():
        changes = [change.replace(word, str(path)) for change in changes]
    config = load_config(VAERun, [file, contest], overrides=changes)
    with pytest.raises(ValueError, match=message):
        build_vae(config)
        build_judges(config.loss, seed=0, device=torch.device("cpu"))


def test_a_critic_that_would_never_start_is_refused(file: Path, contest: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss.critic.start 6 is not before the run's end, train.steps 6"):
        load_config(VAERun, [file, contest], overrides=["loss.critic.start=6"])


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


def poisoned(mesh: ParallelMesh, files: list[Path], overrides: list[str]) -> None:
    """``train``, in which the critic's first gradient of step 5, its second, has an infinity on the last rank."""
    build, calls = train_vae.build_judges, count()

    def bad(gradient: torch.Tensor) -> torch.Tensor:
        strikes = next(calls) == 2 and mesh.world.rank == mesh.world.size - 1
        return gradient * math.inf if strikes else gradient

    def judges(*arguments: Any, **options: Any) -> Any:
        built = build(*arguments, **options)
        next(built.critic.parameters()).register_hook(bad)
        return built

    train_vae.build_judges = judges  # the process is this rank's own
    train(mesh, files, overrides)


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.long)])
def test_a_critic_that_goes_wrong_holds_the_autoencoder_back(
    file: Path, contest: Path, tmp_path: Path, stage: int
) -> None:
    """Neither is updated in that step, though all was finite of the autoencoder; on one process to the bit."""
    more = ["train.non_finite=skip", "checkpoint.every=1", "checkpoint.keep=9", f"train.zero_stage={stage}"]
    run_ranks(poisoned, 1, [file, contest], [f"run.dir={tmp_path}", *more])
    (incident,) = incidents(tmp_path)
    assert (incident["step"], incident["action"], incident["reproduced"]) == (5, "skip", False), "it strikes once"
    numbers = [read_manifest(tmp_path / "ckpt" / f"step-{step:06d}")["numbers"]["updates"] for step in (4, 5, 6)]
    assert numbers == [{"": 4, "critic": 1}, {"": 4, "critic": 1}, {"": 5, "critic": 2}]
    states = [whole_states(tmp_path / "ckpt" / f"step-{step:06d}") for step in (4, 5)]
    assert states[0].keys() == states[1].keys()
    for kind, tensors in states[0].items():
        assert all(torch.equal(tensor, states[1][kind][name]) for name, tensor in tensors.items()), kind


def replayed(mesh: ParallelMesh, files: list[Path], overrides: list[str], step: int) -> tuple[int, str, str]:
    """What ``train_vae.py --replay STEP`` comes to."""

    def main() -> None:
        config = load_config(VAERun, files, overrides=overrides)
        own = build_mesh(train_vae.layout_of(config, mesh.world.size), rank=mesh.world.rank)
        train_vae.train(config, own, device=torch.device("cpu"), start=Start(replay=step))

    return outcome("train_vae", main)


@pytest.mark.long
def test_a_step_with_a_critic_is_replayed(file: Path, contest: Path, undisturbed: Path) -> None:
    """From the checkpoint before it, split in time as it was."""
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    overrides = [f"run.dir={undisturbed}", "parallel.cp=2", "checkpoint.every=1", "checkpoint.keep=9"]
    found = run_ranks(replayed, 2, [file, contest], overrides, 5)
    assert [code for code, _, _ in found] == [0, 0]
    assert "step 5 is finite on every rank this time" in found[0][1]
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before
