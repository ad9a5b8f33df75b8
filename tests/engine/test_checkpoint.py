from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cogvideo_dist.engine.checkpoint import (
    CheckpointError,
    FullState,
    Saved,
    check_about,
    checkpoints,
    load,
    newest,
    save,
    verify,
)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def state(value: float) -> FullState:
    """Every kind of state a run has, filled with ``value``."""
    shapes = {name: p.shape for name, p in model().named_parameters()}
    return {
        kind: {name: torch.full(shape, value + index) for name, shape in shapes.items()}
        for index, kind in enumerate(("weights", "exp_avg", "exp_avg_sq", "ema"))
    }


def saved(step: int) -> Saved:
    return Saved(step, 7, {"task": "t", "model": {"layers": 2}}, {"cur_scale": 4.0})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path / "ckpt", state(step), saved=saved(step), keep=3)
    return tmp_path / "ckpt"


def test_everything_comes_back_bitwise(folder: Path) -> None:
    path, problems = newest(folder)
    assert path is not None
    assert (path.name, problems) == ("step-000010", [])
    found, about = load(path, model())
    assert about == saved(10)
    assert found.keys() == state(10).keys()
    for kind, tensors in state(10).items():
        assert found[kind].keys() == tensors.keys()
        assert all(torch.equal(found[kind][name], tensor) for name, tensor in tensors.items())


def test_no_file_is_a_pickle_and_every_one_is_in_the_manifest(folder: Path) -> None:
    path = folder / "step-000010"
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(p.name for p in path.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    for name in manifest["files"]:
        load_file(path / name)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": (lambda path: flip(path / "ema.safetensors"), "ema.safetensors is damaged: SHA-256"),
    "cut file": (
        lambda path: (path / "weights.safetensors").write_bytes((path / "weights.safetensors").read_bytes()[:-1]),
        "weights.safetensors has",
    ),
    "empty file": (lambda path: (path / "exp_avg.safetensors").write_bytes(b""), "exp_avg.safetensors has 0 bytes"),
    "missing file": (lambda path: (path / "exp_avg.safetensors").unlink(), "exp_avg.safetensors is missing"),
    "torn manifest": (
        lambda path: (path / "manifest.json").write_text('{"format": 1, "fi'),
        "manifest.json cannot be read",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "manifest of a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "manifest without files": (
        lambda path: (path / "manifest.json").write_text('{"format": 1}'),
        "manifest.json lacks step",
    ),
    "another format": (
        lambda path: (path / "manifest.json").write_text('{"format": 2}'),
        "manifest.json has format 2; this version of cogvideo_dist reads format 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(folder: Path, damage: str) -> None:
    do, reason = DAMAGES[damage]
    do(folder / "step-000010")
    path, problems = newest(folder)
    assert path == folder / "step-000005"
    assert len(problems) == 1
    assert reason in problems[0]
    assert "step-000010" in problems[0]


def test_none_whole_is_an_error_and_no_silent_new_start(folder: Path) -> None:
    for path in checkpoints(folder):
        flip(path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .*ckpt can be used: .*step-000010.*; .*step-000005"):
        newest(folder)


def test_no_checkpoint_at_all_is_a_new_run(tmp_path: Path) -> None:
    assert newest(tmp_path / "ckpt") == (None, [])


@pytest.mark.parametrize("files", [0, 2, 5])
def test_a_kill_while_writing_leaves_the_older_one(folder: Path, files: int) -> None:
    aside = folder / ".tmp-step-000015"
    aside.mkdir()
    for path in sorted((folder / "step-000010").iterdir())[:files]:
        shutil.copy(path, aside)
    assert newest(folder) == (folder / "step-000010", [])
    save(folder, state(15), saved=saved(15), keep=3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000005", "step-000010", "step-000015"]
    verify(folder / "step-000015")


def test_a_kill_between_the_renames_of_a_second_save_leaves_a_whole_one(folder: Path) -> None:
    """A run that fell back from a damaged step 10 saves step 10 again, and dies after moving the damaged one away."""
    (folder / "step-000010").rename(folder / ".del-step-000010")
    shutil.copytree(folder / "step-000005", folder / ".tmp-step-000010")
    assert newest(folder) == (folder / "step-000005", [])
    save(folder, state(10), saved=saved(10), keep=3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000005", "step-000010"]


def test_a_kill_while_pruning_leaves_the_newest(folder: Path) -> None:
    (folder / "step-000005").rename(folder / ".del-step-000005")
    shutil.rmtree(folder / ".del-step-000005", ignore_errors=True)
    (folder / ".del-step-000005").mkdir()
    assert newest(folder) == (folder / "step-000010", [])


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    flip(folder / "step-000010" / "ema.safetensors")
    save(folder, state(1), saved=saved(10), keep=3)
    assert newest(folder) == (folder / "step-000010", [])
    assert load(folder / "step-000010", model())[0]["weights"]["0.bias"][0] == 1


def test_only_the_newest_are_kept_by_step_and_not_by_name(folder: Path) -> None:
    for step in (999_999, 1_000_000, 1_000_001):
        save(folder, state(step), saved=saved(step), keep=2)
    assert [path.name for path in checkpoints(folder)] == ["step-1000000", "step-1000001"]
    assert not list(folder.glob(".*"))


def test_foreign_names_are_no_checkpoints(folder: Path) -> None:
    (folder / "step-best").mkdir()
    (folder / "notes.txt").touch()
    assert [path.name for path in checkpoints(folder)] == ["step-000005", "step-000010"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), r"1.weight has shape \(2, 4\), expected \(3, 4\)"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)), "it lacks 2.weight"),
        (nn.Sequential(nn.Linear(3, 4)), "it has the unknown tensor 1.bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_difference(
    folder: Path, other: nn.Module, message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"weights.safetensors is of another model: {message}"):
        load(folder / "step-000010", other)


def test_a_frozen_parameter_is_no_part_of_a_checkpoint(folder: Path) -> None:
    larger = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    larger[2].requires_grad_(False)
    load(folder / "step-000010", larger)


def test_a_checkpoint_that_computed_something_else_is_refused_by_its_first_difference() -> None:
    found = {"task": "t", "model": {"layers": 2, "patch": [1, 2, 2]}, "latent_scale": 0.7}
    check_about({"task": "t", "model": {"layers": 2, "patch": (1, 2, 2)}, "latent_scale": 0.7}, found, source="x")
    check_about({**found, "added_later": 1}, found, source="x")
    with pytest.raises(
        CheckpointError,
        match=r"x is of another run: it was made with model.patch=\[1, 2, 2\], this run has \[2, 2, 2\]",
    ):
        check_about({"model": {"patch": (2, 2, 2)}}, found, source="x")
    with pytest.raises(CheckpointError, match="it was made with latent_scale=0.7, this run has 1.15"):
        check_about({"latent_scale": 1.15}, found, source="x")


def test_foreign_safetensors_are_refused(folder: Path) -> None:
    path = folder / "step-000010"
    save_file({"0.weight": torch.zeros(4, 3)}, path / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema.safetensors (has|is damaged)"):
        verify(path)
