"""States to be saved without an engine: tensors in memory, by one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import Checkpoint
from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.manifest import Saved
from cogvideo_dist.engine.pieces import Cut, Piece
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.parallel.mesh import ParallelMesh

KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Tensors:
    """As ``Saver`` takes them."""

    state: State
    model_name: str = ""

    def kinds(self) -> Sequence[str]:
        return tuple(self.state)

    def cuts(self) -> Mapping[str, Cut]:
        return {name: Cut(tuple(tensor.shape)) for name, tensor in next(iter(self.state.values())).items()}

    def owned(self) -> Mapping[str, Piece]:
        return {name: Piece(0, 1, 0, cut.count) for name, cut in self.cuts().items()}

    def copy(self, into: Mapping[str, Tensor]) -> None:
        for kind, values in into.items():
            values.copy_(torch.cat([tensor.flatten() for tensor in self.state[kind].values()]))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def state(value: float) -> State:
    """Every kind of state a run has, filled with ``value``."""
    shapes = {name: p.shape for name, p in model().named_parameters()}
    return {
        kind: {name: torch.full(shape, value + index) for name, shape in shapes.items()}
        for index, kind in enumerate(KINDS)
    }


def saved(step: int, **facts: Any) -> Saved:
    return Saved(
        step, 7, {"task": "t", "model": {"layers": 2}}, {"cur_scale": 4.0}, samples=3 * step, bad=1, facts=facts
    )  # fmt: skip


def save(
    folder: Path, step: int, *, said: list[str] | None = None, value: float | None = None, held_out: float | None = None,
    **policy: Any,
) -> None:  # fmt: skip
    """Commit one checkpoint, or say why not."""
    facts = {} if held_out is None else {"held_out": {"held_out/loss": held_out}}
    commit(folder, state(step if value is None else value), saved=saved(step, **facts), said=said, **policy)


def commit(folder: Path, tensors: State, *, saved: Saved, said: list[str] | None = None, **policy: Any) -> None:
    """As a run does it that has one process."""
    saver = Saver(folder, Checkpoint(1, **policy), mesh=ParallelMesh(), say=(said if said is not None else []).append)
    saver.save(saved, [Tensors(tensors)])
    saver.finish()
    saver.close()


def whole_states(path: Path) -> State:
    """Everything in a checkpoint, whoever wrote it: kind (``critic.weights`` ... of a model named critic) -> name -> tensor."""
    stored, found = Stored.open(path), {}
    for facts in stored.manifest["files"].values():
        model, kind = facts["model"], facts["kind"]
        key = f"{model}.{kind}" if model else kind
        found[key] = {name: stored.whole(kind, name, model=model) for name in stored.cuts(model)}
    return found
