"""How checkpoints are written, what is kept of them, and what happens where one cannot be written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_dist.config.schema import Checkpoint
from cogvideo_dist.engine import files, saving
from cogvideo_dist.engine.checkpoint import Stored, checkpoints, newest
from cogvideo_dist.engine.manifest import SaveError
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.engine.saved_states import Tensors, save, saved, state
from tests.engine.test_checkpoint import flip


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def saver(folder: Path, said: list[str], **policy: Any) -> Saver:
    return Saver(folder, Checkpoint(1, **policy), mesh=ParallelMesh(), say=said.append)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path / "ckpt", step)
    return tmp_path / "ckpt"


@pytest.mark.parametrize("count", [0, 2, 5])
def test_a_kill_while_writing_leaves_the_older_one(folder: Path, count: int) -> None:
    aside = folder / ".tmp-step-000015"
    aside.mkdir()
    for path in sorted((folder / "step-000010").iterdir())[:count]:
        shutil.copy(path, aside)
    assert newest(folder) == (folder / "step-000010", [])
    save(folder, 15)
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest", "ledger.jsonl", "step-000005", "step-000010", "step-000015",
    ]  # fmt: skip
    Stored.open(folder / "step-000015").verify()


def test_a_kill_between_the_renames_of_a_second_save_leaves_a_whole_one(folder: Path) -> None:
    """A run that fell back from a damaged step 10 saves step 10 again, and dies after moving the damaged one away."""
    (folder / "step-000010").rename(folder / ".del-step-000010")
    shutil.copytree(folder / "step-000005", folder / ".tmp-step-000010")
    assert newest(folder) == (folder / "step-000005", [])
    save(folder, 10)
    assert names(folder) == ["step-000005", "step-000010"]
    assert not list(folder.glob(".*"))


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    flip(folder / "step-000010" / "ema-00000.safetensors")
    save(folder, 10, value=1)
    assert newest(folder) == (folder / "step-000010", [])
    assert Stored.open(folder / "step-000010").whole("weights", "0.bias")[0] == 1


def test_only_the_newest_are_kept_by_step_and_not_by_name(folder: Path) -> None:
    for step in (999_999, 1_000_000, 1_000_001):
        save(folder, step, keep=2)
    assert names(folder) == ["step-1000000", "step-1000001"]
    assert not list(folder.glob(".*"))


def test_every_kth_and_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 0.5, 3: 4.0, 4: 3.0, 5: 0.7, 6: 2.0, 7: None, 8: 1.0, 9: 1.5}
    for step, loss in losses.items():
        save(tmp_path, step, held_out=loss, keep=1, keep_every=4, keep_best=2)
    assert names(tmp_path) == [f"step-00000{step}" for step in (2, 4, 5, 8, 9)]


def test_what_is_not_whole_does_not_count_and_is_not_deleted(folder: Path) -> None:
    (folder / "step-000010" / "ema-00000.safetensors").unlink()
    save(folder, 15, keep=2)
    assert names(folder) == ["step-000005", "step-000010", "step-000015"], "5 and 15 are the two whole ones"
    save(folder, 20, keep=2)
    assert names(folder) == ["step-000010", "step-000015", "step-000020"]


def test_people_find_the_newest_and_a_ledger(folder: Path) -> None:
    assert (folder / "latest").read_text() == "step-000010\n"
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [5, 10]
    held = sum(path.stat().st_size for path in (folder / "step-000010").glob("*.safetensors"))
    assert entries[1]["bytes"] == held


@pytest.mark.parametrize("content", ["", "step-000005\n", "../../etc/passwd\n", "step-000099\n"])
def test_latest_is_not_trusted(folder: Path, content: str) -> None:
    (folder / "latest").write_text(content)
    assert newest(folder) == (folder / "step-000010", [])


def test_the_next_step_may_change_everything_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was there when the save began."""
    tensors, said = state(3), list[str]()
    keeper = saver(tmp_path, said)
    write = files.write_tensors

    def late(*arguments: Any) -> Any:
        for kind in tensors.values():
            for tensor in kind.values():
                tensor.fill_(-1)
        return write(*arguments)

    monkeypatch.setattr(files, "write_tensors", late)
    keeper.save(saved(3), [Tensors(tensors)])
    keeper.finish()
    keeper.close()
    stored = Stored.open(tmp_path / "step-000003")
    assert all(torch.equal(stored.whole("ema", name), tensor) for name, tensor in state(3)["ema"].items())


def test_host_memory_is_one_copy_and_is_used_again(tmp_path: Path) -> None:
    keeper = saver(tmp_path, [])
    for step in (1, 2):
        keeper.save(saved(step), [Tensors(state(step))])
        keeper.finish()
        held = [tensor.data_ptr() for tensor in keeper.host.values()]
        assert sum(tensor.numel() for tensor in keeper.host.values()) == 4 * (12 + 4 + 8 + 2)
    assert held == [tensor.data_ptr() for tensor in keeper.host.values()]
    keeper.close()


@pytest.mark.parametrize("busy", ["wait", "skip"])
def test_a_save_that_comes_too_early_waits_or_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    from threading import Event, Timer

    said, gate = list[str](), Event()
    keeper, write = saver(tmp_path, said, while_busy=busy), files.write_tensors

    def slow(*arguments: Any) -> Any:
        gate.wait()
        return write(*arguments)

    monkeypatch.setattr(files, "write_tensors", slow)
    keeper.save(saved(1), [Tensors(state(1))])
    assert keeper.flying
    keeper.poll()
    assert names(tmp_path) == []
    if busy == "wait":
        Timer(0.2, gate.set).start()
    keeper.save(saved(2), [Tensors(state(2))])
    gate.set()
    keeper.finish()
    keeper.close()
    assert names(tmp_path) == (["step-000001", "step-000002"] if busy == "wait" else ["step-000001"])
    assert bool(said) == (busy == "skip")


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("function", ["write_tensors", "write_text", "make_folder", "sync"])
def test_a_full_disk_is_said_and_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, asynchronous: bool
) -> None:
    said = list[str]()
    keeper = saver(folder, said, asynchronous=asynchronous, keep=9)

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))

    with monkeypatch.context() as patch:
        patch.setattr(files, function, full)
        for step in (11, 12):
            keeper.save(saved(step), [Tensors(state(step))])
            keeper.finish()
        with pytest.raises(SaveError, match=f"3 checkpoints in a row.*No space left.*committed one in {folder} stands"):
            keeper.save(saved(13), [Tensors(state(13))])
            keeper.finish()
    assert [line.count("No space left") for line in said] == [1, 1]
    assert names(folder)[:2] == ["step-000005", "step-000010"]
    assert not list(folder.glob(".tmp-*"))
    Stored.open(folder / names(folder)[-1]).verify()
    keeper.save(saved(14), [Tensors(state(14))])
    keeper.finish()
    keeper.close()
    assert "step-000014" in names(folder)
    assert keeper.failures == 0


def test_space_is_looked_for_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(saving, "SPARE", 10**18)
    save(folder, 11, said=said)
    assert names(folder) == ["step-000005", "step-000010"]
    assert "MiB free, a checkpoint takes 0 MiB" in said[0]


def test_an_error_of_ours_ends_the_run_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a mistake")

    keeper = saver(folder, [])
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", broken)
        keeper.save(saved(11), [Tensors(state(11))])
        with pytest.raises(RuntimeError, match=r"saving a checkpoint: rank 0: KeyError: 'a mistake'"):
            keeper.finish()
    keeper.close()
    assert newest(folder)[0] == folder / "step-000010"


@pytest.mark.parametrize("function", ["replace_text", "append_line", "remove_folder"])
def test_what_follows_the_commit_may_fail(folder: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    said = list[str]()

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, function, full)
        save(folder, 15, said=said, keep=2)
    assert newest(folder)[0] == folder / "step-000015"
    assert "step-000015 is written, but: [Errno 28] No space left" in said[0]
