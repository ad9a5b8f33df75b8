"""What a run tells beside its figures: when it was started, and what its pictures show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.protocols import Picture
from tests.engine.test_trainer import run, settings
from tests.ranks import run_ranks


def starts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def test_every_start_is_noted_with_the_steps_that_it_makes_again(tmp_path: Path) -> None:
    """A run that ends at a loss of no number has logged steps that its next start, from an older checkpoint, repeats."""
    (message,) = run_ranks(run, 1, settings(tmp_path, save=2), 3)
    assert message.startswith("FloatingPointError: step 4: the loss is nan")
    with (tmp_path / "log.jsonl").open("a") as log:  # as a killed one would leave it
        log.write('{"step": 5, "loss": 1.0}\n{"st')
    assert run_ranks(run, 1, settings(tmp_path, save=2)) == [""]
    assert run_ranks(run, 2, settings(tmp_path, save=2)) == ["", ""], "a finished one"
    found = starts(tmp_path)
    assert [(each["step"], each["lost"]) for each in found] == [(0, 0), (2, 3), (6, 0)]
    assert all(each["host"] for each in found)
    assert sorted(each["time"] for each in found) == [each["time"] for each in found]


def test_a_run_that_begins_anew_keeps_its_starts(tmp_path: Path) -> None:
    for steps in (3, 0):
        log = RunLog(tmp_path, first_step=0, steps=9, speaks=True)
        for step in range(1, steps + 1):
            log.scalars(step, {"loss": 1.0})
        log.close()
    assert [(each["step"], each["lost"]) for each in starts(tmp_path)] == [(0, 0), (0, 3)]
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_captions_lie_beside_their_videos(tmp_path: Path) -> None:
    frames = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    captions = {"prompt-00": "A snail,\nslowly. 蝸牛", "prompt-01": "</script>"}
    log = RunLog(tmp_path, first_step=0, steps=1, speaks=True)
    log.pictures(40, [Picture(name, caption, frames, 8.0) for name, caption in captions.items()])
    log.close()
    folder = tmp_path / "samples" / "step-000040"
    assert json.loads((folder / "captions.json").read_text(encoding="utf-8")) == captions
    names = {path.name for path in folder.iterdir()}
    assert names == {"captions.json", "contact-sheet.png", *(f"{name}.mp4" for name in captions)}
