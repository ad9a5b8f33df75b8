"""Power loss at any operation of a save by two ranks, any part of what was not synced gone: the old state or the new one."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cogvideo_dist.engine.checkpoint import Stored, newest
from cogvideo_dist.engine.manifest import CheckpointError
from cogvideo_dist.engine.restoring import restore_newest
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.engine.power import Disk, Entry, Machine, disk_of, journal_of, key_of, lay, record
from tests.engine.toys import Case, digest_of, trainer
from tests.ranks import run_ranks

SEED = 20260728


@dataclass(frozen=True)
class Saving:
    """A save as it was done: what the run's folder held before it and every operation on it. ``old`` and ``new``: digests of
    the checkpoints that may be found."""

    before: Disk
    journal: list[Entry]
    contents: Path
    old: str
    new: str


def run(mesh: ParallelMesh, case: Case, folder: Path, notes: Path | None) -> None:
    if notes:
        record(folder, notes)
    trainer(mesh, case, folder).run()


def found(folder: Path, *, alone: bool = True) -> str:
    """The state that a start would go on from; none: "". ``CheckpointError`` where it would end. ``alone``: as whoever reads
    it without training sees it."""
    if alone:
        path, _ = newest(folder / "ckpt")
        return digest_of(Stored.open(path)) if path else ""
    read: list[str] = []
    restore_newest(folder / "ckpt", ParallelMesh(), restore=lambda stored: read.append(digest_of(stored)))
    return read[-1] if read else ""


def saving(root: Path, name: str, *, steps: int) -> Saving:
    """What the next start of the run in ``root`` does until it has made ``steps`` steps, where it saves for the first time."""
    folder, notes = root / "run", root / name
    folder.mkdir(exist_ok=True)
    before, old = disk_of(folder), found(folder)
    run_ranks(run, 2, Case(2, 1, steps=steps), folder, notes)
    journal = [entry for entry in journal_of(notes) if entry[1].startswith("ckpt") or not entry[1]]
    kept = {path: data for path, data in before.items() if path.startswith("ckpt")}
    return Saving(kept, journal, notes, old, found(folder))


@pytest.fixture(scope="module")
def savings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saving]:
    """A run's first save; the next one, which deletes the first; and one of a step of which there is a damaged checkpoint."""
    root = tmp_path_factory.mktemp("power")
    done = {"first": saving(root, "first", steps=2), "next": saving(root, "next", steps=4)}
    damaged = root / "run" / "ckpt" / "step-000006"
    shutil.copytree(damaged.with_name("step-000004"), damaged)
    (damaged / "ema-00001.safetensors").write_bytes(b"short")
    return {**done, "again": saving(root, "again", steps=6)}


def decided(journal: list[Entry]) -> int:
    """After how many operations the run takes the checkpoint for written: it says so to people next."""
    return next(place for place, entry in enumerate(journal) if "latest" in entry[1])


def replay(saving: Saving, root: Path, *, journal: list[Entry] | None = None, most: int) -> tuple[int, list[str]]:
    """Every crash; how many different ones, and what was found that should not be."""
    journal = saving.journal if journal is None else journal
    machine, dice, decision = Machine(saving.before, saving.contents), random.Random(SEED), decided(journal)
    seen: dict[int, str] = {}
    lying: Disk = {}
    bad: list[str] = []
    for place in range(len(journal) + 1):
        allowed = {saving.new} if place > decision else {saving.old, saving.new}
        for disk in machine.crashes(dice, most):
            key = key_of(disk)
            if key not in seen:
                lay(disk, root, before=lying)
                lying = disk
                try:
                    seen[key] = found(root, alone=len(seen) % 2 == 0)
                except CheckpointError as error:
                    seen[key] = f"error: {error}"
            if seen[key] not in allowed:
                bad.append(f"after {place} of {len(journal)} operations: {seen[key]}")
        if bad and journal is not saving.journal:
            break  # one is enough to see that a protection is needed
        if place < len(journal):
            machine.do(journal[place])
    return len(seen), bad


@pytest.mark.parametrize("which", ["first", "next", pytest.param("again", marks=pytest.mark.long)])
def test_old_or_new_whatever_is_lost(tmp_path: Path, savings: dict[str, Saving], which: str) -> None:
    states, bad = replay(savings[which], tmp_path, most=24)
    print(f"{which}: {len(savings[which].journal)} operations, {states} states, {len(bad)} bad")
    assert bad == []
    assert states >= {"first": 250, "next": 350, "again": 600}[which]


@pytest.mark.long
@pytest.mark.parametrize("which", ["first", "next", "again"])
def test_old_or_new_in_five_thousand_states(tmp_path: Path, savings: dict[str, Saving], which: str) -> None:
    states, bad = replay(savings[which], tmp_path, most=300)
    print(f"{which}: {len(savings[which].journal)} operations, {states} states, {len(bad)} bad")
    assert bad == []
    assert states >= {"first": 800, "next": 1200, "again": 2800}[which]


def without(journal: list[Entry], action: str, name: str) -> list[Entry]:
    """As if nothing had been synced whose name fits; syncing does nothing else, so that the rest is what would be done."""
    return [entry for entry in journal if not (entry[0] == action and re.fullmatch(name, entry[1]))]


def in_place(journal: list[Entry]) -> list[Entry]:
    """As if files were written under the name that is read."""
    named = [tuple(part.replace(".tmp-step", "step") for part in entry) for entry in journal]
    return [entry for entry in named if not (entry[0] == "rename" and entry[1] == entry[2])]


UNPROTECTED: dict[str, tuple[str, Callable[[list[Entry]], list[Entry]]]] = {
    "shards are not synced": ("next", lambda journal: without(journal, "flush", r".*safetensors")),
    "the manifest is not synced": ("next", lambda journal: without(journal, "flush", r".*manifest\.json")),
    "names are not synced before the rename": ("next", lambda journal: without(journal, "sync", r".*\.tmp-step.*")),
    "names are not synced after the rename": ("next", lambda journal: without(journal, "sync", "ckpt")),
    "the folder of all is not synced": ("first", lambda journal: without(journal, "sync", "")),
    "files are written in place": ("first", in_place),
}


@pytest.mark.parametrize("unprotected", UNPROTECTED)
def test_every_sync_and_the_rename_are_needed(tmp_path: Path, savings: dict[str, Saving], unprotected: str) -> None:
    which, change = UNPROTECTED[unprotected]
    journal = change(savings[which].journal)
    assert journal != savings[which].journal
    _, bad = replay(savings[which], tmp_path, journal=journal, most=2)
    assert bad
