"""Runs to report on: what a run's own log writes of figures like those of a training, with a stop on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from cogvideo_dist.config.load import load_config, to_yaml
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.lineage import Ancestor, Lineage
from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.protocols import Defect, Picture
from cogvideo_dist.rng import fold
from tests.launch.commands import ROOT

STEPS, STOP, SAVED = 160, 90, 80
CAPTIONS = ("The camera slowly drifts across a red coffee cup on a wooden table.", "A brown cat. 猫 <b>&amp;")


def make_run(folder: Path, *, seed: int = 0, rate: float = 2e-3, every: int = 1) -> Path:
    """Killed after ``STOP`` steps, gone on with from ``SAVED``, with samples, defects, an earlier stage and a ledger."""
    folder.mkdir(parents=True)
    config = load_config(
        DiTRun, [ROOT / "configs/demo/dit.yaml"],
        overrides=[f"run.dir={folder}", f"train.learning_rate={rate!r}", f"train.steps={STEPS}"],
    )  # fmt: skip
    (folder / "config.yaml").write_text(to_yaml(config))
    for first, last in ((0, STOP), (SAVED, STEPS)):
        log = RunLog(folder, first_step=first, steps=STEPS, speaks=True)
        for step in range(first, last + 1, every):
            if step % 20 == 0 and (step > first or not step):
                log.scalars(step, held_out(step, seed))
            if step > first:
                log.scalars(step, figures(step, seed, rate))
            if step % 40 == 0 and step > first:
                log.pictures(step, [Picture(f"prompt-{n:02d}", c, film(step, n), 8.0) for n, c in enumerate(CAPTIONS)])
        log.defects([Defect(str(first), "shard-000001.tar", "the checksum is wrong", "17", "checksum")])
        log.notices([Defect(f"{first}{n}", "a.mp4", f"caption of {80 + n} tokens is cut to 64") for n in range(4)])
        log.close()
    lineage = Lineage((Ancestor("runs/stage1", 4000, 512_000, "ema", "ab" * 32),))
    (folder / "lineage.json").write_text(json.dumps(lineage.plain()))
    (folder / "data.json").write_text(json.dumps([{"shards": "data/shards", "samples": 91_222, "digest": "9f" * 16}]))
    (folder / "ckpt").mkdir()
    with (folder / "ckpt" / "ledger.jsonl").open("w") as ledger:
        for step in range(20, STEPS + 1, 20):
            entry = {"step": step, "name": f"step-{step:06d}", "time": 1.79e9 + 37 * step, "files": 8, "bytes": 21_400_000_000,
                     "seconds": 31 + 9 * unit(seed, "save", step)}  # fmt: skip
            ledger.write(json.dumps(entry) + "\n")
    return folder


def unit(seed: int, *what: str | int) -> float:
    """One of [0, 1), the same whenever it is asked for."""
    return float(torch.rand((), generator=fold(seed, *what)))


def figures(step: int, seed: int, rate: float) -> dict[str, float]:
    """What a trainer reports of a step."""
    noise = {name: unit(seed, name, step) - 0.5 for name in ("loss", "norm", "speed", "wait", "padding")}
    loss = (0.11 + 0.9 * math.exp(-step * rate * 15)) * (1 + 0.35 * noise["loss"])
    speed = 1.0 if step % 50 else 0.55
    return {
        "loss": loss, "learning_rate": rate * min(1.0, step / 20) * (1 - 0.9 * step / STEPS),
        "gradient_norm": math.exp(1.5 - step / 60 + 1.4 * noise["norm"]),
        "throughput/tokens_per_s": 41_000 * speed * (1 + 0.06 * noise["speed"]),
        "throughput/samples_per_s": 2.1 * speed * (1 + 0.06 * noise["speed"]),
        "throughput/mfu": 0.47 * speed * (1 + 0.06 * noise["speed"]),
        "throughput/step_s": 6.2 / speed / (1 + 0.06 * noise["speed"]),
        "data/padding_share": 0.012 + 0.01 * noise["padding"], "data/loader_wait_share": 0.004 + 0.006 * noise["wait"],
        "data/samples": 13.0, "lineage/steps": 4000 + step, "lineage/samples": 512_000 + 13 * step,
        "data/replaced_samples": float(step == 33), "data/partial_samples": float(step % 37 == 0),
        "memory/peak_gib": 61.5 + 4 * (step > 12), "communication/ulysses_all_to_all_mb": 812.0 + 9 * noise["padding"],
        "communication/ring_shift_mb": 402.0, "communication/tp_gather_mb": 1210.0, "communication/world_sum_mb": 0.0003,
        **{f"loss/quartile{q + 1}": loss * (1.9 - 0.45 * q) for q in range(4)},
    }  # fmt: skip


def held_out(step: int, seed: int) -> dict[str, float]:
    own = 0.13 + 0.9 * math.exp(-step / 40) + 0.01 * unit(seed, "held", step)
    return {"held_out/loss": own, "held_out/t100": 2.1 * own, "held_out/t500": 0.8 * own, "held_out/t900": 0.3 * own}


def film(step: int, number: int) -> Tensor:
    """uint8 [17, 96, 128, 3]: a disc that moves before a background that changes."""
    t = torch.arange(17).view(-1, 1, 1) / 17
    y, x = torch.arange(96).view(1, -1, 1) / 96, torch.arange(128).view(1, 1, -1) / 128
    disc = ((x - 0.2 - 0.6 * t) ** 2 + (y - 0.5 - 0.2 * torch.sin(6.28 * t + number)) ** 2 < 0.02).float()
    blur = min(1.0, step / STEPS)
    colours = [blur * disc * strength + (1 - disc) * (0.3 + 0.4 * x * (1 - number * y)) for strength in (0.9, 0.4, 0.3)]
    return (255 * torch.stack(colours, dim=-1)).clamp(0, 255).to(torch.uint8)
