"""One configuration is one run under every layout of ranks, from the data to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.test_train import assert_same_losses, killed, saved_lines
from tests.launch.world import World, train, try_train
from tests.ranks import run_ranks

LAYOUTS = {
    "ulysses2": ("parallel.sp=2",),
    "ring2": ("parallel.sp=2", "parallel.ring=2"),
    "tp2": ("parallel.tp=2",),
    "dp2-tp2": ("parallel.tp=2",),
    "ring2-tp2": ("parallel.sp=2", "parallel.ring=2", "parallel.tp=2"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in ("tp2", "ring2-tp2") else name for name in LAYOUTS]
)
def test_every_layout_computes_the_run(world: World, whole: Path, name: str) -> None:
    """Losses, held-out losses, and the same tokens and samples a step; the log tells what was sent."""
    run = world.root / f"layout-{name}"
    ranks = 4 if "-" in name else 2
    run_ranks(train, ranks, world.file, world.overrides(run, *LAYOUTS[name], "train.zero_stage=2"))
    assert_same_losses(run, whole)
    entries = [
        [entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in entry]
        for folder in (run, whole)
    ]
    for ours, theirs in zip(*entries):
        assert ours["data/samples"] == theirs["data/samples"]
        assert ours["data/padding_share"] == pytest.approx(theirs["data/padding_share"])
        assert ours["loss/quartile2"] == pytest.approx(theirs["loss/quartile2"], rel=1e-4)
        axis = name.split("-")[-1].rstrip("2")
        assert any(key.startswith(f"communication/{axis}_") and value > 0 for key, value in ours.items())


def test_a_run_goes_on_under_another_layout(world: World, whole: Path) -> None:
    """Stage 3 over a ring, killed, then stage 1 under tensor parallelism."""
    run = world.root / "moved"
    changes = ("checkpoint.every=3", "checkpoint.asynchronous=false")
    with pytest.raises(AssertionError, match=r"rank 0 ended with -9|rank 1 failed first"):
        run_ranks(killed, 2, world.file, world.overrides(run, *changes, *LAYOUTS["ring2"], "train.zero_stage=3"), 4)
    assert saved_lines(run)
    run_ranks(train, 2, world.file, world.overrides(run, *changes, *LAYOUTS["tp2"], "train.zero_stage=1"))
    assert_same_losses(run, whole)


@pytest.mark.parametrize(("change", "words"), [
    ("parallel.tp=4", ("parallel.tp 4", "legal layouts", "dp2")),
    ("parallel.sp=3", ("parallel.sp 3", "ulysses2")),
    ("parallel.attention=varlen", ("varlen", "cpu")),
])  # fmt: skip
def test_an_illegal_layout_is_refused_in_one_line(world: World, change: str, words: tuple[str, ...]) -> None:
    run = world.root / "refused"
    code, _, stderr = run_ranks(try_train, 2, world.file, world.overrides(run, change))[0]
    assert code
    assert len(stderr.strip().splitlines()) == 1
    assert all(word in stderr for word in words), stderr
