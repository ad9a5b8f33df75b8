"""Every protection is needed: without it, the check that it stands for fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.accelerator
import pytest
import torch
from torch import nn

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.checkpoint import Stored, StoredFile, newest
from cogvideo_dist.engine.manifest import Saved
from cogvideo_dist.engine.player import Player
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Learner, Loss
from tests.engine.kills import History, Kill, start
from tests.engine.saved_states import save
from tests.engine.test_checkpoint import flip
from tests.engine.toys import Case, Dealt, readable, trainer, witness
from tests.ranks import run_ranks

KEPT = Case(2, 1, steps=6, keep=2)
KILLS = {
    "in place": (Kill("shard half written", 1), "is not whole"),
    "without the others": (Kill("shard half written", 1, linger=0.3), "is not whole"),
    "said before it is done": (Kill("after the rename", 0, everyone=True), "is not whole"),
    "latest is trusted": (Kill("latest begun", 0, nth=1), "it went on with step 3 instead of 5"),
    "pruned before the commit": (Kill("before the rename", 0, nth=1), "4 steps are lost"),
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls") / "oracle"
    start(KEPT, folder)
    return folder


@pytest.mark.parametrize("broken", KILLS)
def test_kills_find_what_is_missing(tmp_path: Path, oracle: Path, broken: str) -> None:
    kill, problem = KILLS[broken]
    history = History(replace(KEPT, broken=broken), tmp_path / "run", oracle)
    assert history.start(kill)
    history.start()
    assert problem in "\n".join(history.figures.problems)


def test_flips_are_found_by_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    flip(tmp_path / "step-000010" / "ema-00000.safetensors", -1)
    assert newest(tmp_path)[0] == tmp_path / "step-000005"
    monkeypatch.setattr(StoredFile, "check", lambda *_: None)
    assert newest(tmp_path)[0] == tmp_path / "step-000010"
    assert readable(tmp_path / "step-000010"), "nobody else would notice"


def zeros(model: str, kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """One kind of a model's state comes back as zeros."""

    def drop(patch: pytest.MonkeyPatch) -> None:
        read = Stored.read

        def without(stored: Stored, found: str, name: str, **options: Any) -> torch.Tensor:
            values = read(stored, found, name, **options)
            return values * 0 if (options["model"], found) == (model, kind) else values

        patch.setattr(Stored, "read", without)

    return drop


def counter(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def drop(patch: pytest.MonkeyPatch) -> None:
        saved = Stored.saved.fget  # type: ignore[attr-defined]

        def without(stored: Stored) -> Saved:
            whole: Saved = saved(stored)
            return replace(whole, **{name: 0})

        patch.setattr(Stored, "saved", property(without))

    return drop


def updates(patch: pytest.MonkeyPatch) -> None:
    create = Engine._create_state
    patch.setattr(Engine, "_create_state", lambda engine, step: create(engine, 1))


def cursor(patch: pytest.MonkeyPatch) -> None:
    batch = Dealt.batch

    def behind(dealt: Dealt, step: int, pack: int) -> Any:
        return replace(batch(dealt, step, pack), samples=batch(dealt, step - 4, pack).samples)

    patch.setattr(Dealt, "batch", behind)


ITEMS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    **{kind: (zeros("", kind), "state") for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")},
    **{
        f"the rival's {kind}": (zeros("second", kind), "second/loss" if kind != "ema" else "state")
        for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")
    },
    "number of updates": (updates, "state"),
    "place in the data": (cursor, "drawn"),
    "samples": (counter("samples"), "samples"),
    "bad samples": (counter("bad"), "bad"),
    "nothing": (lambda patch: None, ""),
}


def without_each(mesh: ParallelMesh, root: str) -> dict[str, list[str]]:
    """What differs from the undisturbed run in the last steps of one that went on from step 4 without an item."""
    case, folder = Case(1, 1, steps=6, keep=9, rival=True), Path(root)
    trainer(mesh, case, folder / "oracle").run()
    expected = {line["step"]: line for line in witness(folder / "oracle")}
    found = {}
    for number, (item, (drop, _)) in enumerate(ITEMS.items()):
        run = folder / str(number)
        shutil.copytree(folder / "oracle", run)
        shutil.rmtree(run / "ckpt" / "step-000006")
        (run / "witness.jsonl").unlink()
        with pytest.MonkeyPatch.context() as patch:
            drop(patch)
            trainer(mesh, case, run).run()
        lines = witness(run)
        assert [line["step"] for line in lines] == [5, 6]
        found[item] = sorted({key for line in lines for key in line if line[key] != expected[line["step"]][key]})
    return found


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    (found,) = run_ranks(without_each, 1, str(tmp_path_factory.mktemp("items")))
    return dict(found)


@pytest.mark.parametrize("item", ITEMS)
def test_every_saved_item_is_needed(differing: dict[str, list[str]], item: str) -> None:
    needed = ITEMS[item][1]
    assert (needed in differing[item]) if needed else differing[item] == []


def scale(mesh: ParallelMesh, root: str) -> list[dict[str, float]]:
    """The loss scale of fp16 that was set by hand, as a run has it that goes on, with the saved one and without."""
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # nothing is computed
    train = Train(steps=9, learning_rate=0.1, precision="fp16", zero_stage=1, ema_decay=None)
    by_hand = {"cur_scale": 128.0, "cur_iter": 77.0, "last_overflow_iter": 70.0, "cur_hysteresis": 1.0}
    found = []
    for kept in (by_hand, {}):
        engines = [Engine(nn.Linear(3, 2), train, mesh=mesh, micro_steps=1) for _ in range(2)]
        players = [
            Player(Learner("", engine.model, train, lambda *_: Loss(torch.zeros(()), {})), engine) for engine in engines
        ]
        engines[0].scaler = by_hand
        folder = Path(root) / str(len(kept))
        saver = Saver(folder, KEPT.settings(folder).checkpoint, mesh=mesh, say=print)
        saver.save(Saved(0, 1, {}, players[0].scaler() if kept else {}), [players[0].state()])
        saver.close()
        players[1].restore(Stored.open(folder / "step-000000"))
        found.append({key: float(value) for key, value in engines[1].scaler.items()})
    return [by_hand, *found]


def test_the_loss_scale_comes_back_only_if_it_is_saved(tmp_path: Path) -> None:
    ((by_hand, kept, dropped),) = run_ranks(scale, 1, str(tmp_path))
    assert kept == by_hand
    assert dropped != by_hand
