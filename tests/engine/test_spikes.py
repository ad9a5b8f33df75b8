"""A loss or gradient norm that leaps is told with its samples, by every start of a run alike, and changes nothing."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cogvideo_dist.engine.ending import Stopped
from cogvideo_dist.engine.inputs import DataLimits
from cogvideo_dist.engine.manifest import read_manifest
from cogvideo_dist.engine.outside import Outside
from cogvideo_dist.engine.spikes import FEWEST, KEPT, Spikes
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Batch, Loss
from tests.engine.test_numbers import incidents
from tests.engine.toys import PACKS, Case, Dealt, Noisy, Watched, witness
from tests.ranks import run_ranks

LEAPS = (25, 32)


def test_what_leaps_is_found_and_what_wanders_is_not() -> None:
    draw, spikes = random.Random(0), Spikes(8.0)
    for step in range(1000):
        assert spikes.look({"loss": math.exp(-step / 300) * draw.lognormvariate(0, 0.2)}) == []
    (spike,) = spikes.look({"loss": 5.0, "norm": 1e9})
    assert (spike.figure, spike.value, spike.reports) == ("loss", 5.0, KEPT)
    assert spike.deviations > 8
    assert spikes.look({"loss": -5.0}) == [], "downward is no spike"


def test_one_leap_does_not_hide_the_next() -> None:
    spikes = Spikes(8.0)
    for _ in range(FEWEST):
        assert spikes.look({"loss": 1.0}) == []
    assert all(len(spikes.look({"loss": 2.0})) == 1 for _ in range(5))
    assert spikes.look({"loss": 1.02}) == [], "a figure that does not move may begin to"
    assert Spikes(0.0).look({"loss": 1.0}) == []


class Leaping(Noisy):
    """In some steps every loss is a thousand times as large; the gradient is, too."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        return Loss(loss.total * (1000.0 if batch.plan.step + 1 in LEAPS else 1.0), {})


def leapt(mesh: ParallelMesh, case: Case, folder: Path, bound: float, stop_after: int = 0) -> str:
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    asked, settings = [0], case.settings(folder)

    def stop(*, pace_s: float) -> str:
        asked[0] += 1
        return "told to" if stop_after and asked[0] >= stop_after else ""

    settings = replace(settings, log=replace(settings.log, spikes=bound))
    try:
        Watched(settings, Leaping(), batches=Dealt(mesh), mesh=mesh, data_limits=limits, outside=Outside(stop)).run()
    except Stopped:
        return "stopped"
    return ""


def told(folder: Path) -> list[dict[str, Any]]:
    """Incidents without their times."""
    return [{key: value for key, value in entry.items() if key != "time"} for entry in incidents(folder)]


def test_every_start_of_a_run_tells_the_same_leaps(tmp_path: Path) -> None:
    case = Case(2, 2, steps=36, training={"learning_rate": 1e-3, "clip_norm": None})
    assert run_ranks(leapt, 2, case, tmp_path / "whole", 8.0) == ["", ""]
    found = told(tmp_path / "whole")
    assert {(entry["step"], entry["figure"]) for entry in found} == {
        (step, figure) for step in LEAPS for figure in ("loss", "gradient_norm")
    }
    assert all(len(entry["samples"]) == PACKS for entry in found)
    drawn = {line["step"]: line["drawn"] for line in witness(tmp_path / "whole")}
    for entry in found:
        assert {(entry["step"], line.split()[2]) for line in drawn[entry["step"]]} == set(map(tuple, entry["samples"]))
    assert run_ranks(leapt, 2, case, tmp_path / "broken", 8.0, 22) == ["stopped"] * 2
    assert len(read_manifest(tmp_path / "broken" / "ckpt" / "step-000023")["numbers"]["reported"]["loss"]) == 23
    assert run_ranks(leapt, 2, case, tmp_path / "broken", 8.0) == ["", ""]
    assert told(tmp_path / "broken") == found
    assert run_ranks(leapt, 2, case, tmp_path / "off", 0.0) == ["", ""]
    assert told(tmp_path / "off") == []
    assert witness(tmp_path / "off") == witness(tmp_path / "whole"), "nothing is changed by it"
    assert json.loads(json.dumps(found)) == found
