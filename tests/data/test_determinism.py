"""What a run sees is one sequence: of clips, cuts, pixels and noise, whatever ranks, workers, storage and deaths there are."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cogvideo_dist.config.schema import Data, Remote, Source
from cogvideo_dist.data.loader import Loader, open_sources, place_of
from cogvideo_dist.data.plan import Notes, Plan
from cogvideo_dist.rng import fold
from tests.data.clips import geometry, make_clip, make_image, make_shards, settings
from tests.data.servers import web_server

SEED, PACKS = 3, 24
FILES = {
    **{f"videos/{i}.mp4": make_clip(20 + i, 16, size=(48, 80)) for i in range(7)},
    **{f"videos/short {i}.mp4": make_clip(10, 12) for i in range(5)},
    **{f"images/still {i}.png": make_image(60 + i, 90) for i in range(9)},
}

Seen = dict[tuple[int, int], list[object]]
"""(step, pack) -> what is in it."""


class Wanted(NamedTuple):
    """Where the shards are and who reads them."""

    folder: str
    dp: int = 1
    workers: int = 0
    remote: Remote = Remote()
    more: str | None = None

    def data(self) -> Data:
        sources = (Source(self.folder, weight=0.7), Source(self.more, weight=0.3)) if self.more else ()
        return settings(
            shards=None if self.more else self.folder, sources=sources, packs_per_step=PACKS, tokens_per_pack=45,
            workers=self.workers, other_fps=(12.0,), window=2, remote=self.remote,
        )  # fmt: skip

    def loaders(self, notes: Notes | None = None) -> list[Loader]:
        data = self.data()
        catalog, stores = open_sources(data)
        plan = Plan(catalog, data, seed=SEED, geometry=geometry, notes=notes)
        return [
            Loader(plan, stores, data=data, geometry=geometry, dp_rank=rank, dp_size=self.dp) for rank in range(self.dp)
        ]


def seen(wanted: Wanted, steps: range) -> Seen:
    """Everything that the ranks get, of all of them together."""
    found: Seen = {}
    for loader in wanted.loaders():
        for batch in islice(loader.iterate(steps.start), len(steps) * loader.micro_steps):
            assert (batch.plan.step, batch.pack) not in found
            found[batch.plan.step, batch.pack] = [
                (
                    sample.key, sample.slot, place_of(sample.slot, data=loader.data, seed=SEED), sample.caption,
                    hashlib.sha256(sample.pixels.numpy().tobytes() if sample.pixels is not None else b"").hexdigest(),
                    torch.randn(3, generator=fold(SEED, "noise", sample.slot.epoch, sample.slot.index)).tolist(),
                )
                for sample in batch.samples
            ]  # fmt: skip
        loader.close()
    assert sorted(found) == [(step, pack) for step in steps for pack in range(PACKS)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_shards(tmp_path_factory.mktemp("set"), FILES.items()).folder)


@pytest.fixture(scope="module")
def alone(folder: str) -> Seen:
    return seen(Wanted(folder), range(3))


@pytest.mark.parametrize(
    ("dp", "workers"),
    [(3, 1), (8, 0), (2, 4), *(pytest.param(*case, marks=pytest.mark.long) for case in ((2, 0), (4, 0), (1, 4)))],
)
def test_ranks_and_workers_change_nothing(folder: str, alone: Seen, dp: int, workers: int) -> None:
    assert seen(Wanted(folder, dp, workers), range(3)) == alone


@pytest.mark.parametrize("whole_shards", [False, True])
def test_storage_changes_nothing(folder: str, alone: Seen, tmp_path: Path, whole_shards: bool) -> None:
    with web_server() as server:
        server.files = {f"/set/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
        remote = Remote(cache=str(tmp_path), whole_shards=whole_shards)
        found = seen(Wanted(f"{server.url}/set", 2, 1, remote), range(1))
        assert found == {key: pack for key, pack in alone.items() if key[0] == 0}


def test_several_sources_are_one_sequence_too(folder: str, tmp_path: Path) -> None:
    more = str(make_shards(tmp_path, [(f"images/{i}.png", make_image(70, 100 + i)) for i in range(5)]).folder)
    wanted = Wanted(folder, more=more)
    found = seen(wanted, range(2))
    assert seen(wanted._replace(dp=4, workers=1), range(2)) == found
    slots = [slot for pack in found.values() for _, slot, *_ in pack]  # type: ignore[misc]
    share = sum(slot.index >= len(FILES) for slot in slots) / len(slots)
    assert share == pytest.approx(0.3, abs=0.06)


def log_of(loaders: list[Loader], path: Path, first: int) -> None:
    """Go on from a step until the end of the process; every completed step is one line."""
    streams = [loader.iterate(first) for loader in loaders]
    with path.open("a") as log:
        for step in range(first, 10**6):
            batches = [
                batch for stream, loader in zip(streams, loaders) for batch in islice(stream, loader.micro_steps)
            ]
            lines = {
                batch.pack: [
                    (sample.key, sample.slot.epoch, int(sample.pixels.sum()) if sample.pixels is not None else 0)
                    for sample in batch.samples
                ]
                for batch in batches
            }
            log.write(json.dumps([step, [lines[pack] for pack in range(PACKS)]]) + "\n")
            log.flush()


def complete(path: Path) -> list[str]:
    """The log's whole lines; a killed writer may leave a part of one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_instant_a_run_goes_on_with_other_ranks_and_workers(
    folder: str, tmp_path: Path, kills: int
) -> None:
    """0 lost, 0 repeated: the log of all lives together is that of one."""
    dice = random.Random(kills)
    path, notes = tmp_path / "log", Notes(tmp_path / "plan", writes=True)
    for _ in range(kills):
        lines = complete(path)
        path.write_text("".join(lines))
        loaders = Wanted(folder, dice.choice([1, 2, 3, 4, 8]), dice.choice([0, 0, 1])).loaders(notes)
        life = multiprocessing.get_context("fork").Process(target=log_of, args=(loaders, path, len(lines)))
        life.start()
        while life.is_alive() and len(complete(path)) < len(lines) + 1:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.5)
        assert life.is_alive(), "it ended by itself"
        os.kill(life.pid or 0, signal.SIGKILL)
        life.join()
    found = [json.loads(line) for line in complete(path)]
    assert [step for step, _ in found] == list(range(len(found)))
    (loader,) = Wanted(folder).loaders()
    stream = loader.iterate(0)
    for step, packs in found:
        batches = {batch.pack: batch for batch in islice(stream, PACKS)}
        for pack, samples in enumerate(packs):
            now = [(s.key, s.slot.epoch, int(s.pixels.sum())) for s in batches[pack].samples if s.pixels is not None]
            assert [tuple(sample) for sample in samples] == now, (step, pack)
    slots = [(key, epoch) for _, packs in found for pack in packs for key, epoch, _ in pack]
    assert len(set(slots)) == len(slots)
    assert len(found) >= kills, "every life made a step"


@pytest.mark.long
def test_a_late_step_is_planned_from_a_note(folder: str, tmp_path: Path) -> None:
    """The notes of one process serve another; without them, and with damaged ones, the plan is the same."""
    data = Wanted(folder).data()
    catalog, _ = open_sources(data)

    def plan(notes: Notes | None) -> Plan:
        return Plan(catalog, data, seed=SEED, geometry=geometry, notes=notes)

    writer = plan(Notes(tmp_path, writes=True))
    steps = {n: step for n in range(2100) if (step := writer.step(n)) and n in (5, 1023, 1024, 1999, 2099)}
    assert len(list(tmp_path.iterdir())) == 2
    reader = plan(Notes(tmp_path, writes=False))
    assert reader.step(2099) == steps[2099]
    assert min(n for n in reader._states if n) >= 2048, "the first two thousand steps were not planned again"
    assert {n: reader.step(n) for n in steps} == steps
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert plan(Notes(tmp_path, writes=False)).step(2099) == steps[2099]
    assert plan(None).seen(2099) == writer.seen(2099)
