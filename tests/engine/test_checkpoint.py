"""What is in a checkpoint, and what is refused: damaged, of another model, of another format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cogvideo_dist.engine.checkpoint import Stored, checkpoints, newest, read_parameters
from cogvideo_dist.engine.files import BLOCK, file_hash, write_tensors
from cogvideo_dist.engine.manifest import CheckpointError, OtherRun, check_about, manifest_text, read_manifest
from tests.engine.saved_states import KINDS, model, save, saved, state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path / "ckpt", step)
    return tmp_path / "ckpt"


def test_everything_comes_back_bitwise(folder: Path) -> None:
    path, problems = newest(folder)
    assert path is not None
    assert (path.name, problems) == ("step-000010", [])
    stored = Stored.open(path)
    assert stored.saved == saved(10)
    assert stored.kinds() == set(KINDS)
    for kind, tensors in state(10).items():
        assert stored.cuts().keys() == tensors.keys()
        assert all(torch.equal(stored.whole(kind, name), tensor) for name, tensor in tensors.items())


def test_no_file_is_a_pickle_and_every_one_is_in_the_manifest(folder: Path) -> None:
    path = folder / "step-000010"
    manifest = read_manifest(path)
    assert sorted(p.name for p in path.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    for name in manifest["files"]:
        tensors = load_file(path / name)
        assert {key: t.numel() for key, t in tensors.items()} == {k: t.numel() for k, t in state(1)["ema"].items()}


@pytest.mark.parametrize("count", [0, 1, BLOCK // 4 - 30, BLOCK // 4, 3 * BLOCK // 4 + 5])
def test_a_file_is_what_the_library_writes_and_hashes_to_its_blocks(tmp_path: Path, count: int) -> None:
    values = torch.arange(float(count + 2))
    written = write_tensors(tmp_path / "a.safetensors", {"x": count, "y": 2}, values)
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(torch.cat([found["x"], found["y"]]), values)
    assert (tmp_path / "a.safetensors").stat().st_size == written.size
    assert len(written.blocks) == -(-written.size // BLOCK)
    if written.size <= BLOCK:
        assert written.blocks[0] == file_hash(tmp_path / "a.safetensors")


def flip(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest that was changed by somebody who gave it a new digest."""
    manifest: dict[str, Any] = dict(read_manifest(path))
    change(manifest)
    (path / "manifest.json").write_text(manifest_text(manifest))


EMA, WEIGHTS = "ema-00000.safetensors", "weights-00000.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (lambda path: flip(path / EMA), f"{EMA} is damaged: SHA-256"),
    "flipped bit of the first byte": (lambda path: flip(path / EMA, 0), f"{EMA} is damaged: SHA-256"),
    "flipped bit of the last byte": (lambda path: flip(path / EMA, -1), f"{EMA} is damaged: SHA-256"),
    "cut file": (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1]), f"{WEIGHTS} has"),
    "empty file": (lambda path: (path / EMA).write_bytes(b""), f"{EMA} has 0 bytes"),
    "missing file": (lambda path: (path / EMA).unlink(), f"{EMA} is missing"),
    "another file of that size": (lambda path: (path / EMA).write_bytes((path / WEIGHTS).read_bytes()), EMA),
    "torn manifest": (lambda path: (path / "manifest.json").write_text('{"format": 2, "fi'), "manifest.json cannot be"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "manifest of a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "manifest of deep lists": (lambda path: (path / "manifest.json").write_text("[" * 10**5), "manifest.json cannot"),
    "flipped manifest": (lambda path: edit(path, step=11), "manifest.json is damaged: it does not have the SHA-256"),
    "newer format": (lambda path: edit(path, format=3), "has format 3; this version of cogvideo_dist reads formats 1 and"),
    "foreign format": (lambda path: edit(path, format="x"), "has format x; .* it is none of ours"),
    "manifest without files": (lambda path: forge(path, lambda m: m.pop("files")), "manifest.json: files: Field required"),
    "file outside": (lambda path: forge(path, lambda m: m["files"].update({"../x": m["files"][EMA]})), "outside its folder"),
    "unknown writer": (lambda path: forge(path, lambda m: m["files"][EMA].update(writer=9)), "there is no writer 9"),
    "piece too long": (
        lambda path: forge(path, lambda m: m["writers"][0]["pieces"].update({"": [[0, 0, 99]]})), "outside its tensor",
    ),
    "missing piece": (
        lambda path: forge(path, lambda m: m["writers"][0]["pieces"].update({"": [[0, 0, 12]]})),
        "has 0 of 4 elements of weights of 0.bias",
    ),
    "digest of other blocks": (lambda path: forge(path, lambda m: m["files"][EMA].update(sha256="0" * 64)), "contradicts"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(folder: Path, damage: str) -> None:
    do, reason = DAMAGES[damage]
    do(folder / "step-000010")
    with pytest.raises(CheckpointError, match=f"step-000010.*{reason}|{reason}.*step-000010"):
        stored = Stored.open(folder / "step-000010")
        for kind in KINDS:
            list(read_parameters(stored, model(), kind=kind))


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"missing piece"}))
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(folder: Path, damage: str) -> None:
    do, reason = DAMAGES[damage]
    do(folder / "step-000010")
    path, problems = newest(folder)
    assert path == folder / "step-000005"
    assert len(problems) == 1
    assert re.search(reason, problems[0])
    assert "step-000010" in problems[0]


def test_every_flipped_byte_of_every_file_is_found(folder: Path) -> None:
    path = folder / "step-000010"
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 50)):
            flip(file, place)
            with pytest.raises(CheckpointError, match=f"step-000010/{file.name}"):
                Stored.open(path).verify()
            file.write_bytes(whole)
    Stored.open(path).verify()


def test_only_what_is_read_is_hashed(folder: Path) -> None:
    """So that a rank which needs a part of a file does not read all of it."""
    flip(folder / "step-000010" / EMA)
    stored = Stored.open(folder / "step-000010")
    list(read_parameters(stored, model(), kind="weights"))
    with pytest.raises(CheckpointError, match=f"{EMA} is damaged"):
        list(read_parameters(stored, model(), kind="ema"))
    assert newest(folder, kinds=["weights"])[0] == folder / "step-000010"


def test_none_whole_is_an_error_and_no_silent_new_start(folder: Path) -> None:
    for path in checkpoints(folder):
        flip(path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .*ckpt can be used: .*step-000010.*; .*step-000005"):
        newest(folder)


def test_no_checkpoint_at_all_is_a_new_run(tmp_path: Path) -> None:
    assert newest(tmp_path / "ckpt") == (None, [])


def test_foreign_names_are_no_checkpoints(folder: Path) -> None:
    for name in ("step-best", "set-aside-0-step-000020", ".tmp-step-000020", "latest-step-000020"):
        (folder / name).mkdir()
    assert [path.name for path in checkpoints(folder)] == ["step-000005", "step-000010"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)),
            r"1.weight has shape \(2, 4\), expected \(3, 4\); 1.bias has",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)), "it lacks 2.weight; it lacks 2.bias"),
        (nn.Sequential(nn.Linear(3, 4)), "it has the unknown tensor 1.bias; it has the unknown tensor 1.weight"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 1)), "and 2 more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_differences(
    folder: Path, other: nn.Module, message: str
) -> None:
    with pytest.raises(OtherRun, match=rf"step-000010 is of another model: .*{message}"):
        list(read_parameters(Stored.open(folder / "step-000010"), other, kind="weights"))


def test_a_frozen_parameter_is_no_part_of_a_checkpoint(folder: Path) -> None:
    larger = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    larger[2].requires_grad_(False)
    found = dict(read_parameters(Stored.open(folder / "step-000010"), larger, kind="ema"))
    assert len(found) == 4


def test_a_checkpoint_that_computed_something_else_is_refused_by_its_first_difference() -> None:
    found = {"task": "t", "model": {"layers": 2, "patch": [1, 2, 2]}, "latent_scale": 0.7}
    check_about({"task": "t", "model": {"layers": 2, "patch": (1, 2, 2)}, "latent_scale": 0.7}, found, source="x")
    check_about({**found, "added_later": 1}, found, source="x")
    with pytest.raises(
        OtherRun, match=r"x is of another run: it was made with model.patch=\[1, 2, 2\], this run has \[2, 2, 2\]"
    ):
        check_about({"model": {"patch": (2, 2, 2)}}, found, source="x")
    with pytest.raises(OtherRun, match="it was made with latent_scale=0.7, this run has 1.15"):
        check_about({"latent_scale": 1.15}, found, source="x")


def first_format(path: Path, step: int) -> None:
    """A checkpoint as it was written before pieces: a file per kind with whole tensors, hashed as a whole."""
    path.mkdir(parents=True)
    found = {}
    for kind, tensors in state(step).items():
        file = path / f"{kind}.safetensors"
        save_file(tensors, file)
        found[file.name] = {"size": file.stat().st_size, "sha256": file_hash(file)}
    content = {
        "format": 1, "step": step, "seed": 7, "about": {"task": "t"}, "scaler": {}, "samples": 4, "lineage": [],
        "torch": "2.11", "files": found,
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(content, indent=1))


def test_the_first_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "step-000003"
    first_format(path, 3)
    stored = Stored.open(path)
    stored.verify()
    assert (stored.saved.step, stored.saved.samples, stored.kinds()) == (3, 4, set(KINDS))
    for kind, tensors in state(3).items():
        assert all(torch.equal(stored.whole(kind, name), tensor) for name, tensor in tensors.items())
    assert stored.digest("ema") == file_hash(path / "ema.safetensors"), "what adapters were pinned to"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(path / "ema.safetensors", -1), "ema.safetensors is damaged: SHA-256"),
        (lambda path: flip(path / "ema.safetensors", 0), "ema.safetensors"),
        (lambda path: (path / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1}'), "manifest.json lacks step, seed"),
    ],
)
def test_damage_of_the_first_format_is_found(tmp_path: Path, damage: Callable[[Path], Any], reason: str) -> None:
    path = tmp_path / "step-000003"
    first_format(path, 3)
    damage(path)
    with pytest.raises(CheckpointError, match=reason):
        Stored.open(path).verify()
