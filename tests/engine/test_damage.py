"""Damaged checkpoints under two ranks: both refuse them, by the name of the file, and take the older one together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogvideo_dist.engine import checkpoint, restoring
from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.engine.manifest import CheckpointError
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.engine.test_checkpoint import flip
from tests.engine.toys import RIVAL_START, Case, committed, trainer, witness
from tests.ranks import run_ranks

CASE = Case(2, 1, steps=6, keep=9, rival=True)
NEWEST, OLDER = "step-000006", "step-000004"


def run(mesh: ParallelMesh, case: Case, folder: str) -> tuple[str, list[str]]:
    """Its error, and what was said."""
    said: list[str] = []
    RunLog.say = lambda log, text: said.append(text)  # type: ignore[method-assign, assignment]
    try:
        trainer(mesh, case, Path(folder)).run()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}", said
    return "", said


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "oracle"
    run_ranks(run, 2, CASE, str(folder))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = [
    f"{model}{kind}-0000{rank}.safetensors"
    for model, rank in (("", 1), ("second.", 0))
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")
]
DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{f"a bit of {name}": (name, flip) for name in (*FILES, "manifest.json")},
    "a missing shard": ("ema-00001.safetensors", Path.unlink),
    "a cut shard": ("exp_avg-00001.safetensors", cut),
    "an empty shard": ("weights-00001.safetensors", lambda path: path.write_bytes(b"")),
    "no manifest": ("manifest.json", Path.unlink),
}


def damaged(mesh: ParallelMesh, case: Case, oracle: str, root: str) -> dict[str, tuple[str, list[str]]]:
    """A start after each of the damages to the newest checkpoint, by what was said of it."""
    found = {}
    for number, (damage, (name, do)) in enumerate(DAMAGES.items()):
        folder = Path(root) / str(number)
        if mesh.is_first:
            shutil.copytree(oracle, folder)
            (folder / "witness.jsonl").unlink()
            do(folder / "ckpt" / NEWEST / name)
        found[damage] = run(mesh, case, str(folder))
    return found


@pytest.fixture(scope="module")
def starts(
    tmp_path_factory: pytest.TempPathFactory, oracle: Path
) -> tuple[Path, list[dict[str, tuple[str, list[str]]]]]:
    root = tmp_path_factory.mktemp("starts")
    return root, run_ranks(damaged, 2, CASE, str(oracle), str(root))


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_ranks_fall_back_and_come_to_the_same_end(
    starts: tuple[Path, list[dict[str, tuple[str, list[str]]]]], oracle: Path, damage: str
) -> None:
    root, results = starts
    folder = root / str(list(DAMAGES).index(damage))
    for found in results:
        assert found[damage][0] == ""
    warnings = [text for text in results[0][damage][1] if "going on from step 4" in text]
    assert len(warnings) == 1
    assert f"{NEWEST}/{DAMAGES[damage][0]}" in warnings[0]
    assert witness(folder) == [line for line in witness(oracle) if line["step"] > 4]
    assert committed(folder) == [2, 4, 6], "the damaged one is replaced"
    Stored.open(folder / "ckpt" / NEWEST).verify()


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_falling_back_to_before_a_second_model_learned_forgets_what_it_had(
    tmp_path: Path, oracle: Path, stage: int
) -> None:
    """Both newer checkpoints fail when the first model, and a part of the second, have been read already."""
    case = replace(CASE, stage=stage)
    run_ranks(run, 2, case, str(tmp_path / "oracle"))
    shutil.copytree(tmp_path / "oracle", tmp_path / "run")
    (tmp_path / "run" / "witness.jsonl").unlink()
    for step in (NEWEST, OLDER):
        flip(tmp_path / "run" / "ckpt" / step / "second.ema-00000.safetensors", -1)
    assert RIVAL_START > 2
    assert [error for error, _ in run_ranks(run, 2, case, str(tmp_path / "run"))] == ["", ""]
    assert witness(tmp_path / "run") == witness(tmp_path / "oracle")[2:]


def test_the_one_that_was_asked_for_is_taken_or_nothing(tmp_path: Path, oracle: Path) -> None:
    shutil.copytree(oracle, tmp_path / "run")
    folder = tmp_path / "run" / "ckpt"
    flip(folder / OLDER / "ema-00001.safetensors")
    for error, _ in run_ranks(run, 2, replace(CASE, checkpoint=OLDER), str(tmp_path / "run")):
        assert error.startswith(f"CheckpointError: {folder / OLDER / 'ema-00001.safetensors'} is damaged")
    for error, _ in run_ranks(run, 2, replace(CASE, checkpoint="step-000005"), str(tmp_path / "run")):
        assert error == f"CheckpointError: {folder} has no checkpoint step-000005"
    assert committed(tmp_path / "run") == [2, 4, 6], "nothing was set aside"
    (tmp_path / "run" / "witness.jsonl").unlink()
    results = run_ranks(run, 2, replace(CASE, checkpoint="step-000002"), str(tmp_path / "run"))
    assert [error for error, _ in results] == ["", ""]
    assert witness(tmp_path / "run") == witness(oracle)[2:]
    aside = sorted(path.name for path in folder.glob("set-aside-*"))
    assert aside == [f"set-aside-0-{OLDER}", f"set-aside-0-{NEWEST}"]
    Stored.open(folder / aside[1]).verify()


def test_none_that_can_be_used_is_no_new_start(tmp_path: Path, oracle: Path) -> None:
    shutil.copytree(oracle, tmp_path / "run")
    for path in (tmp_path / "run" / "ckpt").glob("step-*"):
        (path / "weights-00001.safetensors").unlink()
    for error, _ in run_ranks(run, 2, CASE, str(tmp_path / "run")):
        assert error.startswith(f"CheckpointError: no checkpoint of {tmp_path / 'run' / 'ckpt'} can be used: ")
        assert error.count("weights-00001.safetensors is missing") == 3


def blind(mesh: ParallelMesh, case: Case, folder: str, view: str) -> tuple[str, list[str]]:
    """A start in which rank 1 sees another directory than rank 0: without the newest, with one more, or an older manifest."""
    if mesh.world.rank == 1:
        restoring.PATIENCE_S = 0.0
        listing, read = restoring.checkpoints, checkpoint.read_manifest

        def older(path: Path) -> Any:
            if view == "the newest is missing" and path.name == NEWEST:
                raise CheckpointError(f"{path / 'manifest.json'} cannot be read: not here yet")
            return read(path)

        views = {"the newest is missing": lambda found: found[:-1], "one more": lambda found: [*found, found[-1] / "x"]}
        restoring.checkpoints = lambda folder: views[view](listing(folder))
        checkpoint.read_manifest = older
    return run(mesh, case, folder)


@pytest.mark.parametrize(("view", "first"), [("the newest is missing", 5), ("one more", 7)])
def test_ranks_that_see_other_folders_take_one_decision(tmp_path: Path, oracle: Path, view: str, first: int) -> None:
    shutil.copytree(oracle, tmp_path / "run")
    (tmp_path / "run" / "witness.jsonl").unlink()
    results = run_ranks(blind, 2, replace(CASE, steps=8), str(tmp_path / "run"), view)
    assert [error for error, _ in results] == ["", ""]
    assert [line["step"] for line in witness(tmp_path / "run")] == list(range(first, 9))


def slow_to_see(mesh: ParallelMesh, case: Case, folder: str) -> tuple[str, list[str]]:
    """Rank 1 sees the newest checkpoint when it looks for the third time, as on a network's file system."""
    if mesh.world.rank == 1:
        read, looks = checkpoint.read_manifest, list[Path]()

        def late(path: Path) -> Any:
            looks.append(path)
            if len(looks) < 3:
                raise CheckpointError(f"{path / 'manifest.json'} cannot be read: not here yet")
            return read(path)

        def unseen(path: Path) -> str:
            return digest(path) if len(looks) >= 3 else ""

        digest = restoring._digest
        checkpoint.read_manifest, restoring._digest = late, unseen
    return run(mesh, case, folder)


def test_a_file_system_that_is_slow_to_show_is_waited_for(tmp_path: Path, oracle: Path) -> None:
    shutil.copytree(oracle, tmp_path / "run")
    (tmp_path / "run" / "witness.jsonl").unlink()
    results = run_ranks(slow_to_see, 2, replace(CASE, steps=8), str(tmp_path / "run"))
    assert [error for error, _ in results] == ["", ""]
    assert [line["step"] for line in witness(tmp_path / "run")] == [7, 8]
