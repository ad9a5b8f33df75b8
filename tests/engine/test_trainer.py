"""The loop on a toy task: what is logged when, what is saved, and what ends a run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import Checkpoint, Log, Run, Train, Validation
from cogvideo_dist.engine.checkpoint import newest
from cogvideo_dist.engine.ending import Stopped
from cogvideo_dist.engine.inputs import DataLimits
from cogvideo_dist.engine.log import Meter, RunLog, means
from cogvideo_dist.engine.optim import learning_rate
from cogvideo_dist.engine.outside import Outside
from cogvideo_dist.engine.trainer import Trainer
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.protocols import Batch, Defect, Learner, Loss, Picture, Sample, Slot, StepPlan
from tests.ranks import run_ranks

PACKS, SIZE = 2, (1, 16, 16)
LAYOUT = PackLayout((Clip(0, (1, 1, 1)),))
DAMAGED = Defect("9", "nine.mp4", "is damaged", replaced_by="1")
CUT = Defect("8", "eight.mp4", "is long")


@dataclass(frozen=True)
class Settings:
    """The sections of a run's configuration, as the trainer takes them."""

    run: Run
    train: Train
    checkpoint: Checkpoint
    log: Log
    validation: Validation


def settings(folder: Path, *, steps: int = 6, every: int = 1, save: int = 2, held_out: int = 0) -> Settings:
    train = Train(
        steps=steps,
        learning_rate=0.1,
        schedule="constant",
        precision="fp32",
        zero_stage=0,
        ema_decay=None,
        clip_norm=None,
    )
    return Settings(
        Run(str(folder), seed=1), train, Checkpoint(save, keep=9), Log(every, peak_tflops=1.0), Validation(held_out)
    )


class ToBe:
    """Packs of one number, the number of the step; some are noted as replaced."""

    def __init__(self, mesh: ParallelMesh, *, damaged: tuple[int, ...] = ()) -> None:
        self.mesh, self.damaged = mesh, damaged

    def iterate(self, first_step: int) -> Iterator[Batch]:
        for step in count(first_step):
            for pack in range(self.mesh.dp.rank, PACKS, self.mesh.dp.size):
                defects = (DAMAGED,) if step in self.damaged and pack == 0 else ()
                yield self.batch(step, pack, defects)

    def batch(self, step: int, pack: int, defects: tuple[Defect, ...] = ()) -> Batch:
        slot = Slot(0, PACKS * step + pack, SIZE)
        plan = StepPlan(step, ((slot,),) * PACKS, PACKS, PACKS)
        return Batch(plan, pack, pack, LAYOUT, (Sample(slot, "k", "s", "c"),), defects)

    def held_out(self) -> Iterator[tuple[Batch, float]]:
        """Three packs, dealt over the ranks; one of weight 0 fills up."""
        for first in range(0, 3, self.mesh.dp.size):
            mine = first + self.mesh.dp.rank
            yield self.batch(0, min(mine, 2)), float(mine < 3)


class Slope:
    """One weight w; the loss of step n is w, so that it falls by the rate in every step. NaN from step ``breaks`` on."""

    def __init__(self, breaks: float = math.inf) -> None:
        self.model, self.breaks = nn.Linear(1, 1, bias=False), breaks
        nn.init.constant_(self.model.weight, 5.0)
        self.noticed = [CUT, CUT]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        value = model(torch.ones(1, 1)).sum() / PACKS
        if batch.plan.step >= self.breaks:
            value = value * math.nan
        return Loss(value, {"number": (torch.tensor(float(batch.plan.step)), torch.tensor(1))})

    def held_out_loss(self, model: nn.Module, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {"held_out/loss": (torch.tensor(float(batch.pack)), torch.tensor(1))}

    def rivals(self, train: Train) -> Sequence[Learner]:
        return ()

    def pictures(self, model: nn.Module) -> list[Picture]:
        return []

    def describe(self, batch: Batch) -> Sequence[Mapping[str, Any]]:
        return [{} for _ in batch.samples]

    def notices(self) -> list[Defect]:
        noticed, self.noticed = self.noticed, []
        return noticed

    def flops(self, layout: PackLayout) -> float:
        return 1e6

    def fingerprint(self) -> Mapping[str, Any]:
        return {"task": "slope"}


START = 3


class Contest(Slope):
    """Beside the slope, from step ``START`` on, a second weight that learns from what the first was in the same micro-step."""

    def __init__(self, breaks: float = math.inf) -> None:
        super().__init__()
        self.second, self.of_second, self.said = nn.Linear(1, 1, bias=False), breaks, torch.zeros(())
        nn.init.constant_(self.second.weight, 1.0)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        self.said = loss.total.detach()
        return loss

    def rivals(self, train: Train) -> Sequence[Learner]:
        own = replace(train, learning_rate=0.2, warmup_steps=2, betas=(0.5, 0.5))
        return (Learner("second", self.second, own, self.answer, START),)

    def answer(self, model: nn.Module, batch: Batch) -> Loss:
        value = (model(torch.ones(1, 1)) * self.said).square().sum() / PACKS
        return Loss(value * math.nan if batch.plan.step >= self.of_second else value, {})


def contest(mesh: ParallelMesh, config: Settings, breaks: float = math.inf) -> str:
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    try:
        Trainer(config, Contest(breaks), batches=ToBe(mesh), mesh=mesh, data_limits=limits).run()
    except (FloatingPointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(
    mesh: ParallelMesh, config: Settings, breaks: float = math.inf, damaged: tuple[int, ...] = (), share: float = 0.9
) -> str:
    """The error that ended the run, if any."""
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=share)
    limits.judged_after = 4
    try:
        Trainer(config, Slope(breaks), batches=ToBe(mesh, damaged=damaged), mesh=mesh, data_limits=limits).run()
    except (FloatingPointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def stopped(mesh: ParallelMesh, config: Settings, after: int) -> str:
    """A run whose last rank is told to stop while it makes step ``after``; how it ended."""
    limits, asked = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9), count(1)

    def stop(*, pace_s: float) -> str:
        assert pace_s > 0
        return "SIGUSR1" if mesh.world.rank == mesh.world.size - 1 and next(asked) >= after else ""

    try:
        Trainer(config, Slope(), batches=ToBe(mesh), mesh=mesh, data_limits=limits, outside=Outside(stop)).run()
    except Stopped as error:
        return str(error)
    return "to its end"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_ranks_stop_after_the_same_step_with_nothing_lost(tmp_path: Path, ranks: int, asynchronous: bool) -> None:
    """One of them is told; all know it one step later, save that and leave. The next start goes on bitwise."""
    whole, broken = (settings(tmp_path / name, save=4, steps=9, every=3) for name in ("whole", "broken"))
    policy = replace(broken.checkpoint, asynchronous=asynchronous)
    run_ranks(run, ranks, whole)
    for after, ends in ((1, "after step 2,"), (2, "after step 5,")):  # counted from each start
        found = run_ranks(stopped, ranks, replace(broken, checkpoint=policy), after)
        assert all(ends in text for text in found)
        assert "SIGUSR1" in found[-1]
        assert ranks == 1 or "another rank was told to" in found[0]
    assert run_ranks(stopped, ranks, replace(broken, checkpoint=policy), 4) == ["to its end"] * ranks, (
        "at the last step"
    )
    figures = ("step", "loss", "gradient_norm", "learning_rate", "number", "data/samples", "lineage/samples")
    runs = [
        [{key: entry.get(key) for key in figures} for entry in entries(tmp_path / name) if "loss" in entry]
        for name in ("whole", "broken")
    ]
    assert runs[0] == runs[1]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_losses_are_means_over_the_steps_since_the_last_report(tmp_path: Path) -> None:
    assert run_ranks(run, 1, settings(tmp_path / "1", every=3, save=6)) == [""]
    assert run_ranks(run, 2, settings(tmp_path / "2", every=3, save=6)) == ["", ""]
    for folder in ("1", "2"):
        first, second = (e for e in entries(tmp_path / folder) if "loss" in e)
        assert (first["step"], second["step"]) == (3, 6)
        # The weight begins at 5; AdamW's step is the rate, and its decay of 1e-4 is too small to see.
        assert first["loss"] == pytest.approx(5 - (0 + 0.1 + 0.2) / 3, abs=1e-3)
        assert second["loss"] == pytest.approx(5 - (0.3 + 0.4 + 0.5) / 3, abs=1e-3)
        assert (first["number"], second["number"]) == (1, 4)
        assert first["gradient_norm"] == pytest.approx(1)
        assert first["data/samples"] == 6
        assert first["data/padding_share"] == 0.5


def test_a_report_comes_before_every_checkpoint(tmp_path: Path) -> None:
    """So that a run which goes on from there reports what the undisturbed one does."""
    run_ranks(run, 1, settings(tmp_path / "whole", every=4, save=3, steps=8))
    run_ranks(run, 1, settings(tmp_path / "halted", every=4, save=3, steps=3))
    run_ranks(run, 1, settings(tmp_path / "halted", every=4, save=3, steps=8))
    found = [[(e["step"], e["loss"]) for e in entries(tmp_path / name) if "loss" in e] for name in ("whole", "halted")]
    assert [step for step, _ in found[0]] == [3, 4, 6, 8]
    assert found[0] == found[1]


def test_a_second_model_learns_from_its_start_on(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=6)
    assert run_ranks(contest, 1, config) == [""]
    found = [entry for entry in entries(tmp_path) if "loss" in entry]
    assert ["second/loss" in entry for entry in found] == [False] * START + [True] * 3
    assert [entry["second/learning_rate"] for entry in found[START:]] == pytest.approx([0.1, 0.2, 0.2])
    # Both packs of a step: (w / 2)^2 halved, twice; w has fallen by its rate in each of three steps.
    assert found[START]["second/loss"] == pytest.approx((4.7 / 2) ** 2, rel=1e-3)
    assert found[START + 1]["second/loss"] == pytest.approx((0.9 * 4.6 / 2) ** 2, rel=1e-3)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2)])
def test_a_second_model_goes_on_bitwise_wherever_the_run_was_ended(tmp_path: Path, ranks: int, stage: int) -> None:
    """Before its start, at it, and after it."""
    whole, broken = (settings(tmp_path / name, save=1) for name in ("whole", "broken"))
    train = replace(whole.train, zero_stage=stage, ema_decay=0.9)
    assert run_ranks(contest, ranks, replace(whole, train=train)) == [""] * ranks
    for steps in (START - 1, START, START + 1, 6):
        assert run_ranks(contest, ranks, replace(broken, train=replace(train, steps=steps))) == [""] * ranks
    figures = ("step", "loss", "gradient_norm", "second/loss", "second/gradient_norm", "second/learning_rate")
    runs = [
        [{k: e.get(k) for k in figures} for e in entries(tmp_path / name) if "loss" in e]
        for name in ("whole", "broken")
    ]
    assert runs[0] == runs[1]
    paths = [newest(tmp_path / name / "ckpt")[0] for name in ("whole", "broken")]
    files = [{file.name: file.read_bytes() for file in path.glob("*.safetensors")} for path in paths if path]
    assert files[0] == files[1]
    assert {"second.weights", "second.exp_avg", "ema"} < {name.split("-")[0] for name in files[0]}


def test_a_second_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    (message,) = run_ranks(contest, 1, settings(tmp_path, save=2), 4)
    assert message.startswith("FloatingPointError: step 5: the loss of the second is nan on rank 0, samples k")


def test_a_checkpoint_without_the_second_model_is_refused(tmp_path: Path) -> None:
    run_ranks(run, 1, settings(tmp_path, steps=2))
    (message,) = run_ranks(contest, 1, settings(tmp_path))
    assert "step-000002 holds nothing of the second instead of weights" in message


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    (message,) = run_ranks(run, 1, settings(tmp_path, every=100, save=2), 3)
    assert message.startswith("FloatingPointError: step 4: the loss is nan on rank 0, samples k")
    path, _ = newest(tmp_path / "ckpt")
    assert path is not None
    assert path.name == "step-000002"


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run_ranks(run, 1, settings(tmp_path))
    before = (tmp_path / "log.jsonl").read_bytes()
    run_ranks(run, 1, settings(tmp_path))
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_run_without_checkpoint_begins_a_new_log(tmp_path: Path) -> None:
    tmp_path.joinpath("log.jsonl").write_text('{"step": 0, "old": 1}\n{"step": 1, "old": 1}\n{"st')
    run_ranks(run, 1, settings(tmp_path))
    assert not any("old" in entry for entry in entries(tmp_path))
    assert [entry["step"] for entry in entries(tmp_path) if "loss" in entry] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ranks", [1, 2])
def test_held_out_means_count_every_pack_once(tmp_path: Path, ranks: int) -> None:
    run_ranks(run, ranks, settings(tmp_path, held_out=4))
    found = [(entry["step"], entry["held_out/loss"]) for entry in entries(tmp_path) if "held_out/loss" in entry]
    assert found == [(0, 1.0), (4, 1.0), (6, 1.0)], "the packs' numbers are 0, 1 and 2"


@pytest.mark.parametrize("ranks", [1, 2])
def test_replaced_samples_are_listed_each_time_and_cut_ones_once(tmp_path: Path, ranks: int) -> None:
    assert run_ranks(run, ranks, settings(tmp_path), math.inf, (1, 4)) == [""] * ranks
    lines = [json.loads(line) for line in (tmp_path / "data_report.jsonl").read_text().splitlines()]
    assert lines == [vars(CUT), vars(DAMAGED), vars(DAMAGED)]
    logged = [(e["data/replaced_samples"], e["data/partial_samples"]) for e in entries(tmp_path) if "loss" in e]
    assert logged == [(0, 1), (1, 0), (0, 0), (0, 0), (1, 0), (0, 0)]
    run_ranks(run, ranks, settings(tmp_path, steps=8))
    assert len((tmp_path / "data_report.jsonl").read_text().splitlines()) == 3, "a second start does not list it again"


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_replaced_samples_end_the_run_on_every_rank(tmp_path: Path, ranks: int) -> None:
    messages = run_ranks(run, ranks, settings(tmp_path), math.inf, (0, 1, 2, 3), 0.3)
    assert (
        messages
        == [
            "TooManyDefects: 2 of 4 samples could not be read, more than data.max_bad_share 0.3; they are listed in "
            f"{tmp_path / 'data_report.jsonl'}"
        ]
        * ranks
    )


def test_the_meter_divides_sums_by_sums() -> None:
    meter = Meter()
    meter.add("a", torch.tensor(3.0, dtype=torch.bfloat16), weight=torch.tensor(2))
    meter.add("a", 1.0, weight=2.0)
    meter.add("empty", 1.0)
    sums = meter.reduce(Axis("dp"), torch.device("cpu"))
    assert sums == {"a": (4.0, 4.0), "empty": (1.0, 0.0)}
    assert means(sums) == {"a": 1.0}
    assert meter.reduce(Axis("dp"), torch.device("cpu")) == {}


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", first_step=0, steps=1, speaks=False)
    log.scalars(1, {"loss": 1.0})
    log.say("hello")
    log.defects([DAMAGED])
    assert log.notices([CUT]) == 0
    log.close()
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    train = Train(steps=10, learning_rate=1.0, warmup_steps=4, schedule="cosine", final_ratio=0.1)
    rates = [learning_rate(train, step) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.1 + 0.9 * 0.5), "half way down"
    assert learning_rate(train, 10) == pytest.approx(0.1)
    assert learning_rate(train, 99) == pytest.approx(0.1)
    constant = replace(train, schedule="constant")
    assert [learning_rate(constant, step) for step in (3, 9, 99)] == [1.0, 1.0, 1.0]


def slow_to_save(mesh: ParallelMesh, config: Settings) -> str:
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    outside = Outside(grace_s=5.001)
    with redirect_stderr(io.StringIO()) as said:
        Trainer(config, Slope(), batches=ToBe(mesh), mesh=mesh, data_limits=limits, outside=outside).run()
    return said.getvalue()


def test_a_save_that_takes_longer_than_a_scheduler_waits_is_told_once(tmp_path: Path) -> None:
    (said,) = run_ranks(slow_to_save, 1, settings(tmp_path))
    assert said.count("warning: a step and a save take") == 1
