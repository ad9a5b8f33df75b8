"""A small run whose every step leaves a line that says all that it computed, however often it is done again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import Checkpoint, Log, Run, Train, Validation
from cogvideo_dist.engine.checkpoint import Stored, checkpoints
from cogvideo_dist.engine.inputs import DataLimits, Origin
from cogvideo_dist.engine.manifest import CheckpointError
from cogvideo_dist.engine.player import Player
from cogvideo_dist.engine.trainer import Trainer
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import gather_objects
from cogvideo_dist.protocols import Batch, Defect, Learner, Loss, Picture, Sample, Slot, StepPlan
from cogvideo_dist.rng import fold
from tests.engine.test_trainer import Settings

SEED, PACKS, CLIPS, SIZE = 11, 4, 18, (1, 16, 16)
LAYOUT = PackLayout((Clip(0, (1, 1, 1)),))
EVERY, RIVAL_START = 2, 3
WITNESS = "witness.jsonl"


@dataclass(frozen=True)
class Case:
    """How a toy run is made; ``rival``: a second model learns from step ``RIVAL_START`` on. ``broken``: see controls.py."""

    ranks: int = 2
    stage: int = 1
    asynchronous: bool = False
    steps: int = 12
    keep: int = 1
    rival: bool = False
    policy: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    broken: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    log_every: int = 1

    def settings(self, folder: Path) -> Settings:
        train = Train(
            steps=self.steps, learning_rate=0.05, warmup_steps=2, schedule="cosine", precision="fp32",
            zero_stage=self.stage, ema_decay=0.9, clip_norm=0.5,
        )  # fmt: skip
        train = replace(train, **self.training)
        policy = Checkpoint(EVERY, keep=self.keep, asynchronous=self.asynchronous, **self.policy)
        return Settings(Run(str(folder), seed=SEED), train, policy, Log(self.log_every, peak_tflops=1.0), Validation(0))


class Dealt:
    """Packs of one clip each; epochs are orders of their own. One clip in seven took the place of another."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh = mesh

    def iterate(self, first_step: int) -> Iterator[Batch]:
        for step in count(first_step):
            for pack in range(self.mesh.dp.rank, PACKS, self.mesh.dp.size):
                yield self.batch(step, pack)

    def batch(self, step: int, pack: int) -> Batch:
        slots = tuple(((self.slot(step, each)),) for each in range(PACKS))
        slot = slots[pack][0]
        defects = (Defect(str(slot.index), "a.mp4", "is damaged", "1"),) if slot.index % 7 == 3 else ()
        sample = Sample(slot, f"{slot.epoch}/{slot.index}", "a.mp4", "")
        return Batch(StepPlan(step, slots, PACKS, PACKS), pack, pack, LAYOUT, (sample,), defects)

    def slot(self, step: int, pack: int) -> Slot:
        epoch, place = divmod(step * PACKS + pack, CLIPS)
        order = torch.randperm(CLIPS, generator=fold(SEED, "order", epoch))
        return Slot(epoch, int(order[place]), SIZE)

    def held_out(self) -> Iterator[tuple[Batch, float]]:
        return iter(())


def net() -> nn.Module:
    """Uneven sizes; the middle one is wider than what a rank of two has of all of them."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 41), nn.Tanh(), nn.Linear(41, 1, bias=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=fold(SEED, "weights", name)) / 2)
    return model


class Noisy:
    """From noise of every clip's own to a target of its own. ``drawn``: what was drawn since this was last asked for."""

    def __init__(self, *, rival: bool = False) -> None:
        self.model, self.second = net(), nn.Linear(1, 3) if rival else None
        self.drawn: list[str] = []
        self.said = torch.zeros(1)
        if self.second:
            nn.init.constant_(self.second.weight, 0.5)
            nn.init.constant_(self.second.bias, 0.1)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        (sample,) = batch.samples
        slot = sample.slot
        noise = torch.randn(4, generator=fold(SEED, "noise", slot.epoch, slot.index))
        digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16]
        self.drawn.append(f"{batch.plan.step} {batch.pack} {sample.key} {digest}")
        self.said = model(noise[:3])
        return Loss((self.said - noise[3]).square().sum() / PACKS, {})

    def answer(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss((model(self.said.detach()) - 1).square().sum() / PACKS, {})

    def rivals(self, train: Train) -> Sequence[Learner]:
        own = replace(train, learning_rate=0.2, betas=(0.5, 0.5))
        return (Learner("second", self.second, own, self.answer, RIVAL_START),) if self.second else ()

    def held_out_loss(self, model: nn.Module, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {}

    def pictures(self, model: nn.Module) -> list[Picture]:
        return []

    def describe(self, batch: Batch) -> Sequence[Mapping[str, Any]]:
        return [{"timestep": batch.plan.step} for _ in batch.samples]

    def notices(self) -> list[Defect]:
        return []

    def flops(self, layout: PackLayout) -> float:
        return 1e6

    def fingerprint(self) -> Mapping[str, Any]:
        return {"task": "noisy"}


class Watched(Trainer):
    """Adds a line to the run's witness for every step: loss, gradient norm and rate to the bit, the samples and their noise,
    the counters, and a hash over the whole state of all ranks, which does not depend on how they divide it."""

    task: Noisy

    def _learned(self, done: int, averages: dict[str, float]) -> dict[str, float]:
        self.figures = super()._learned(done, averages)
        return self.figures

    def _report(self, done: int) -> None:
        super()._report(done)
        drawn = sorted(line for lines in gather_objects(self.task.drawn, self.mesh.world) for line in lines)
        self.task.drawn = []
        pieces = gather_objects([piece for player in self.players for piece in owned(player)], self.mesh.world)
        if self.mesh.is_first:
            figures = {name: float(value).hex() for name, value in self.figures.items()}
            counters = {"samples": self.samples, "bad": self.limits.bad, "judged": self.limits.samples}
            digest = hashlib.sha256(repr(sorted(piece for each in pieces for piece in each)).encode()).hexdigest()
            add_line(self.folder / WITNESS, {"step": done, **figures, **counters, "drawn": drawn, "state": digest})


def owned(player: Player) -> list[tuple[str, str, str, int, str]]:
    """Every element of a model's state that this rank has, or one of those that have it alike: (model, kind, tensor, place,
    value)."""
    state, found = player.state(), []
    into = {kind: torch.empty(sum(piece.count for piece in state.owned().values())) for kind in state.kinds()}
    state.copy(into)
    for kind, values in into.items():
        names = [(name, place) for name, piece in state.owned().items() for place in range(piece.start, piece.stop)]
        found += [
            (state.model_name, kind, name, place, value.hex()) for (name, place), value in zip(names, values.tolist())
        ]
    return found


def add_line(path: Path, entry: Mapping[str, Any]) -> None:
    """In one write, so that a kill leaves it whole or not at all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, json.dumps(entry).encode() + b"\n")
    os.close(descriptor)


def witness(folder: Path) -> list[dict[str, Any]]:
    """In the order in which steps were done, those that were done again, too."""
    path = folder / WITNESS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trainer(mesh: ParallelMesh, case: Case, folder: Path) -> Watched:
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    return Watched(
        case.settings(folder), Noisy(rival=case.rival), batches=Dealt(mesh), mesh=mesh, data_limits=limits,
        origin=Origin(checkpoint=case.checkpoint),
    )  # fmt: skip


def readable(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written, and every tensor of it whole."""
    try:
        stored = Stored.open(path)
        stored.verify()
        digest_of(stored)
    except CheckpointError:
        return False
    return True


def digest_of(stored: Stored) -> str:
    """Of the state that a checkpoint holds, whoever wrote it; ``CheckpointError`` where it is not whole."""
    digest = hashlib.sha256(json.dumps([stored.saved.step, stored.saved.samples, stored.saved.bad]).encode())
    for model in sorted(stored.manifest["tensors"]):
        for kind in sorted(stored.kinds(model)):
            for name in stored.cuts(model):
                digest.update(f"{model} {kind} {name}".encode())
                digest.update(stored.whole(kind, name, model=model).numpy().tobytes())
    return digest.hexdigest()


def committed(folder: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder / "ckpt")]
