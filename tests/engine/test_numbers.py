"""A loss or a gradient that is not finite on one rank: all know before the update, and none makes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from torch import Tensor, nn

from cogvideo_dist.engine.ending import Stopped
from cogvideo_dist.engine.inputs import DataLimits
from cogvideo_dist.engine.manifest import read_manifest
from cogvideo_dist.engine.numbers import INCIDENTS, LEFT_OUT, OVERFLOWS
from cogvideo_dist.engine.outside import Outside
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Batch, Loss
from tests.engine.toys import PACKS, RIVAL_START, Case, Dealt, Noisy, Watched, committed, witness
from tests.ranks import run_ranks

BAD = 5
"""The step, counted from 1, in which something is not finite."""


@dataclass(frozen=True)
class Poison:
    """What is wrong in which steps on which rank. ``once``: only the first time that a step is computed."""

    kind: str = "gradient"
    steps: tuple[int, ...] = (BAD,)
    rank: int = 0
    once: bool = False


class Poisoned(Noisy):
    """``gradient``: one element of the gradient of one parameter is NaN; ``loss``: a constant infinity is added, which leaves
    all gradients finite; ``output``: a module gives NaN; ``rival``: the loss of the second model is NaN."""

    def __init__(self, poison: Poison, rank: int, *, rival: bool) -> None:
        super().__init__(rival=rival)
        self.poison, self.rank, self.now, self.met = poison, rank, 0, set[tuple[str, int]]()
        self.model[2].weight.register_hook(self._gradient)
        self.model[1].register_forward_hook(self._output)

    def _strikes(self, kind: str) -> bool:
        poison = self.poison
        if (kind, self.rank, self.now in poison.steps) != (poison.kind, poison.rank, True):
            return False
        if poison.once and (kind, self.now) in self.met:
            return False
        self.met.add((kind, self.now))
        return True

    def _gradient(self, gradient: Tensor) -> Tensor:
        if not self._strikes("gradient"):
            return gradient
        changed = gradient.clone()
        changed.view(-1)[7] = math.nan
        return changed

    def _output(self, _: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output * math.nan if self._strikes("output") else output

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        self.now = batch.plan.step + 1
        loss = super().loss(model, batch)
        return Loss(loss.total + math.inf, {}) if self._strikes("loss") else loss

    def answer(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().answer(model, batch)
        return Loss(loss.total * math.nan, {}) if self._strikes("rival") else loss


class Counting(Watched):
    """Its witness also has the counts of updates, as the optimizers have them, and the loss scale."""

    def _learned(self, done: int, averages: dict[str, float]) -> dict[str, float]:
        values = super()._learned(done, averages)
        for player in self.players:
            counts = {float(state["step"]) for state in player.engine._inner.state.values() if "step" in state}
            assert counts <= {float(player.engine.updates)}
            self.figures = {**self.figures, f"{player.learner.tag}updates": float(player.engine.updates)}
        return values


def sixteen_bits() -> None:
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # torch computes in it on a CPU, slowly


def trained(mesh: ParallelMesh, case: Case, folder: Path, poison: Poison | None, stop_after: int = 0) -> str:
    """How the run ended. ``stop_after``: it is told to stop in that step of this start."""
    sixteen_bits()
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    task = Poisoned(poison, mesh.world.rank, rival=case.rival) if poison else Noisy(rival=case.rival)
    if case.training.get("precision", "fp32") != "fp32":
        task = halved(task)
    asked = [0]

    def stop(*, pace_s: float) -> str:
        asked[0] += 1
        return "told to" if stop_after and asked[0] >= stop_after else ""

    try:
        Counting(
            case.settings(folder), task, batches=Dealt(mesh), mesh=mesh, data_limits=limits, outside=Outside(stop)
        ).run()
    except FloatingPointError as error:
        return str(error)
    except Stopped:
        return "stopped"
    return ""


def halved(task: Noisy) -> Noisy:
    """Models of 16 bits take inputs of 16 bits."""

    def back(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.float()

    for model in (task.model, task.second):
        if model is not None:
            model.register_forward_pre_hook(cast_to(model))
            model.register_forward_hook(back)
    return task


def cast_to(model: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, arguments: tuple(x.to(next(model.parameters()).dtype) for x in arguments)


def incidents(folder: Path) -> list[dict[str, Any]]:
    """But for slow ranks, which a busy machine has now and then."""
    path = folder / INCIDENTS
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [entry for entry in found if entry["kind"] != "straggler"]


KINDS = [
    *(("fp32", stage, 2) for stage in (0, 2, 3)),
    ("bf16", 1, 2),
    *(pytest.param("fp32", stage, 1, marks=pytest.mark.long) for stage in (0, 1, 2, 3)),
    pytest.param("fp32", 1, 2, marks=pytest.mark.long),
    pytest.param("bf16", 2, 2, marks=pytest.mark.long),
    pytest.param("bf16", 3, 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("precision", "stage", "ranks"), KINDS)
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_no_rank_makes_the_update(tmp_path: Path, precision: str, stage: int, ranks: int, kind: str) -> None:
    """The whole state, counts included, is after the bad step bit by bit what it was before; the run then goes on."""
    case = Case(ranks, stage, steps=7, training={"non_finite": "skip", "precision": precision})
    assert run_ranks(trained, ranks, case, tmp_path, Poison(kind, rank=ranks - 1)) == [""] * ranks
    lines = witness(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 8))
    before, bad, after = (lines[BAD - 2], lines[BAD - 1], lines[BAD])
    assert bad["state"] == before["state"] != after["state"]
    assert float.fromhex(after["loss"]) < math.inf
    (incident,) = incidents(tmp_path)
    assert (incident["step"], incident["ranks"], incident["action"]) == (BAD, [ranks - 1], "skip")
    (account,) = incident["accounts"]
    fault = account["faults"][0]
    assert fault["what"] == kind
    if kind == "gradient":
        assert fault["parameters"] == ["2.weight"]
    else:
        assert fault["value"] == "inf"
    keys = {sample["key"] for sample in account["samples"]}
    assert len(keys) == PACKS // ranks
    assert all(any(f" {key} " in line for line in bad["drawn"]) for key in keys)
    assert {sample["timestep"] for sample in account["samples"]} == {BAD - 1}


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.long)])
def test_models_that_learn_together_are_updated_together(tmp_path: Path, stage: int) -> None:
    """The second model's loss is not finite after the first one's was found to be: neither is updated."""
    case = Case(2, stage, steps=7, rival=True, training={"non_finite": "skip"})
    assert BAD > RIVAL_START
    assert run_ranks(trained, 2, case, tmp_path, Poison("rival", rank=1)) == ["", ""]
    lines = witness(tmp_path)
    before, bad = lines[BAD - 2], lines[BAD - 1]
    assert (bad["state"], bad["updates"], bad["second/updates"]) == (
        before["state"], before["updates"], before["second/updates"],
    )  # fmt: skip
    (incident,) = incidents(tmp_path)
    assert (incident["ranks"], incident["accounts"][0]["faults"][0]["model"]) == ([1], "second")


@pytest.mark.parametrize("ranks", [1, 2])
def test_by_default_the_run_ends_and_its_last_checkpoint_stands(tmp_path: Path, ranks: int) -> None:
    messages = run_ranks(trained, ranks, Case(ranks, 1), tmp_path, Poison("output", rank=ranks - 1))
    assert len(set(messages)) == 1, "every rank ends with the same words"
    line = messages[0]
    assert line.startswith(f"step {BAD}: the loss is nan on rank {ranks - 1} (first in 1), samples ")
    assert line.endswith(f"the last checkpoint stands; look at it with --replay {BAD}")
    assert committed(tmp_path)[-1] == BAD - 1
    (incident,) = incidents(tmp_path)
    fault = incident["accounts"][0]["faults"][0]
    assert (incident["action"], fault["module"], incident["reproduced"]) == ("stop", "1", True)
    assert fault["inputs"][0]["finite"] == 1.0
    assert fault["inputs"][0]["min"] <= fault["inputs"][0]["max"]


WAYS = [
    ("skip", 1, 2),
    *(
        pytest.param(policy, stage, ranks, marks=pytest.mark.long)
        for policy in ("skip", "rewind")
        for stage, ranks in ((0, 1), (1, 2), (3, 2))
    ),
]


@pytest.mark.parametrize(("policy", "stage", "ranks"), WAYS)
def test_a_run_that_left_updates_out_goes_on_bitwise_wherever_it_is_ended(
    tmp_path: Path, policy: str, stage: int, ranks: int
) -> None:
    """Also from before the bad step, where it is finite this time: what was left out once is left out again."""
    case = Case(ranks, stage, keep=9, rival=True, training={"non_finite": policy})
    poison = Poison("loss", steps=(BAD, BAD + 1, 9), rank=ranks - 1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_ranks(trained, ranks, case, whole, poison) == [""] * ranks
    for after in (BAD + 1, 2):
        assert set(run_ranks(trained, ranks, case, broken, poison, after)) == {"stopped"}
    assert run_ranks(trained, ranks, replace(case, checkpoint="step-000004"), broken, None) == [""] * ranks, (
        "all finite"
    )
    expected, found = ({line["step"]: line for line in witness(folder)} for folder in (whole, broken))
    for lines in (expected, found):
        for line in lines.values():
            line["drawn"] = sorted(set(line["drawn"]))
    skipped = [step for step in expected if step > 1 and expected[step]["state"] == expected[step - 1]["state"]]
    assert skipped == [BAD, BAD + 1, 9]
    for step, line in expected.items():
        if step not in skipped:
            assert found[step] == line
        assert found[step]["state"] == line["state"]
    numbers = read_manifest(broken / "ckpt" / "step-000012")["numbers"]
    assert (numbers["updates"], numbers["left_out"]) == ({"": 9, "second": 12 - RIVAL_START - 3}, 3)


def test_rewinding_takes_the_steps_again_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """The log has every step once, as if nothing had happened but for the update that is missing."""
    case = Case(2, 2, training={"non_finite": "rewind"})
    assert run_ranks(trained, 2, case, tmp_path / "back", Poison("loss", steps=(BAD + 1,))) == ["", ""]
    steps = [line["step"] for line in witness(tmp_path / "back")]
    assert steps == [*range(1, BAD + 1), *range(BAD, 13)], "from step 4, whose state was saved"
    (incident,) = incidents(tmp_path / "back")
    assert (incident["step"], incident["action"]) == (BAD + 1, "rewind")
    log = [json.loads(line)["step"] for line in (tmp_path / "back" / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 13))
    starts = [json.loads(line) for line in (tmp_path / "back" / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["lost"]) for start in starts] == [(0, 0), (4, 1)]
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / LEFT_OUT).write_text('{"step": 6}\n{"st')
    assert run_ranks(trained, 2, case, tmp_path / "told", None) == ["", ""]
    assert witness(tmp_path / "told")[-1]["state"] == witness(tmp_path / "back")[-1]["state"]


FIRST = [
    ("fp32", 2),
    *(pytest.param(*kind, marks=pytest.mark.long) for kind in (("bf16", 1), ("fp32", 0), ("fp32", 1), ("fp32", 3))),
]


@pytest.mark.parametrize(("precision", "stage"), FIRST)
def test_the_first_updates_may_be_the_ones_that_are_left_out(tmp_path: Path, precision: str, stage: int) -> None:
    """And be saved: there are no moments yet."""
    case = Case(2, stage, steps=6, keep=9, training={"non_finite": "rewind", "precision": precision})
    assert run_ranks(trained, 2, case, tmp_path, Poison("loss", steps=(1, 2)), 2) == ["stopped"] * 2
    assert run_ranks(trained, 2, case, tmp_path, None) == ["", ""]
    assert witness(tmp_path)[-1]["updates"] == (4.0).hex()
    assert [incident["action"] for incident in incidents(tmp_path)] == ["skip", "skip"], "there was no checkpoint yet"


@pytest.mark.parametrize("steps", [(4, 5, 6, 7), (2, 4, 6, 8)], ids=["in a row", "of all"])
def test_too_many_updates_left_out_end_the_run(tmp_path: Path, steps: tuple[int, ...]) -> None:
    case = Case(1, 1, training={"non_finite": "skip"})
    (message,) = run_ranks(trained, 1, case, tmp_path, Poison("gradient", steps=steps))
    assert message.startswith(f"step {steps[-1]}: the gradient of 2.weight is not finite on rank 0, samples ")
    limit = "more than train.non_finite_in_a_row 3" if steps[-1] == 7 else "the 4th of 8 steps, more than 0.1%"
    assert limit in message
    (again,) = run_ranks(trained, 1, case, tmp_path, Poison("gradient", steps=steps))
    assert again == message, "what was counted is remembered"


def test_what_is_finite_the_second_time_is_the_hardware(tmp_path: Path) -> None:
    case = Case(2, 1, training={"non_finite": "skip"})
    assert run_ranks(trained, 2, case, tmp_path / "skip", Poison("loss", rank=1, once=True)) == ["", ""]
    (incident,) = incidents(tmp_path / "skip")
    assert (incident["reproduced"], incident["ranks"]) == (False, [])
    assert [account["loss_was_finite"] for account in incident["accounts"]] == [True, False]
    message = run_ranks(trained, 2, Case(2, 1), tmp_path / "stop", Poison("loss", rank=1, once=True))[0]
    assert message.startswith(f"step {BAD}: the loss of rank 1 (")
    assert "suspect the hardware" in message
    assert witness(tmp_path / "skip")[BAD - 1]["state"] == witness(tmp_path / "skip")[BAD - 2]["state"]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2])
def test_overflows_of_fp16_are_no_incident_but_a_loss_that_is_not_finite_is(tmp_path: Path, stage: int) -> None:
    """The loss scale finds its place by overflowing; it is as it was after a step that was left out."""
    case = Case(2, stage, steps=9, keep=9, training={"non_finite": "skip", "precision": "fp16"})
    assert run_ranks(trained, 2, case, tmp_path, Poison("loss", rank=1, steps=(7,))) == ["", ""]
    lines = witness(tmp_path)
    assert lines[0]["loss_scale"] != lines[5]["loss_scale"], "it overflowed"
    assert lines[6]["loss_scale"] == lines[5]["loss_scale"]
    assert lines[6]["state"] == lines[5]["state"] != lines[7]["state"]
    assert [incident["step"] for incident in incidents(tmp_path)] == [7]
    updates = int(float.fromhex(lines[-1]["updates"]))
    assert 1 < updates < 8, "less the overflows and the step that was left out"
    assert read_manifest(tmp_path / "ckpt" / "step-000008")["numbers"]["updates"][""] == updates - 1


def test_gradients_that_no_scale_of_fp16_helps_end_the_run(tmp_path: Path) -> None:
    case = Case(1, 2, steps=60, training={"precision": "fp16"}, log_every=30)
    (message,) = run_ranks(trained, 1, case, tmp_path, Poison("gradient", steps=tuple(range(1, 99))))
    halvings, spared = 16, 1  # from 65,536; DeepSpeed lets the first overflow pass
    assert message.startswith(
        f"step {spared + halvings + OVERFLOWS}: the gradients overflow fp16 for the 10th step in a row at the"
    )
    assert "train.precision: bf16" in message
