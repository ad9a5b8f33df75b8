"""Computing a step once more to see where its numbers stop being finite: module by module, on every rank, without an update."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_dist.engine.outside import Mark, unwatched
from cogvideo_dist.engine.player import Player
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import gather_objects
from cogvideo_dist.protocols import Batch

SHOWN = 8
"""How many parameters and inputs are listed of each fault."""

Account = dict[str, Any]
"""What a rank found, as plain values: ``rank``, ``host``, its ``faults`` and the ``samples`` of its packs.

A fault: ``model``, ``micro_step``, ``what`` (loss or gradient), ``value`` of a loss, ``module`` whose output (or whose output's
gradient) is the first that is not finite, ``inputs`` of that module, ``parameters`` whose gradients are not finite, in the
order in which the backward came to them.
"""


def examine(
    players: Sequence[Player], packs: Sequence[Batch], *, mesh: ParallelMesh,
    describe: Callable[[Batch], Sequence[Mapping[str, Any]]], mark: Mark = unwatched,
) -> list[Account]:  # fmt: skip
    """Every rank's account of a step: ``packs`` are its micro-steps, ``describe`` tells what was drawn for their samples.

    All gradients are dropped again, so that weights and optimizers stay as they were to the bit. Collective.
    """
    faults: list[dict[str, Any]] = []
    for number, batch in enumerate(packs):
        for player in players:
            faults += _faults(player, batch, micro_step=number, mark=mark)
        for player in players:
            if player.engine.at_boundary:
                player.engine.discard()
            else:
                player.end_micro_step()
    samples = [about for batch in packs for about in _samples(batch, describe(batch))]
    mine = {"rank": mesh.world.rank, "host": socket.gethostname(), "faults": faults, "samples": samples}
    return gather_objects(mine, mesh.world)


def _faults(player: Player, batch: Batch, *, micro_step: int, mark: Mark) -> list[dict[str, Any]]:
    """None or one: of this rank's own loss or, if that is finite, of its own gradients."""
    with Probe(player.engine.model, player.engine.names) as probe:
        loss = float(player.learn(batch, mark).total.detach())
    place: dict[str, Any] = {"model": player.learner.name, "micro_step": micro_step}
    if not math.isfinite(loss):
        return [place | {"what": "loss", "value": str(loss), "parameters": [], **probe.output.plain()}]
    # under fp16 gradients overflow while the loss scale is sought
    if probe.parameters and not player.engine.scaler:
        named = probe.parameters[:SHOWN]
        found = probe.output if probe.output.module is not None else probe.gradient
        return [place | {"what": "gradient", "parameters": named, "count": len(probe.parameters), **found.plain()}]
    return []


def _samples(batch: Batch, drawn: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample, more in zip(batch.samples, drawn):
        slot = sample.slot
        yield {"key": sample.key, "source": sample.source, "epoch": slot.epoch, "size": list(slot.size), **more}


@dataclass
class Place:
    """The first module of which something is not finite; ``inputs``: what went into it, or the gradient that it got."""

    module: str | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)

    def note(self, module: str, inputs: Any) -> None:
        if self.module is None:
            self.module, self.inputs = (
                module or "(the whole model)",
                [statistics(x) for x in tensors_in(inputs)][:SHOWN],
            )

    def plain(self) -> dict[str, Any]:
        return {"module": self.module, "inputs": self.inputs}


class Probe:
    """Within, looks at what every module of ``model`` gives and at every gradient; ``parameters``: those that are trained, by
    name. Reads the device again and again."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model, self.trained = model, parameters
        self.output, self.gradient = Place(), Place()
        self.parameters: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Probe:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
        for name, parameter in self.trained.items():
            self._handles.append(parameter.register_hook(partial(self._own, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def look(_: nn.Module, arguments: Any, named: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if not finite(tensor):
                    self.output.note(name, (arguments, named))
                if tensor.requires_grad:
                    self._handles.append(tensor.register_hook(partial(self._behind, name)))

        return look

    def _behind(self, name: str, gradient: Tensor) -> None:
        if not finite(gradient):
            self.gradient.note(name, gradient)

    def _own(self, name: str, gradient: Tensor) -> None:
        if name not in self.parameters and not finite(gradient):
            self.parameters.append(name)


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())


def statistics(x: Tensor) -> dict[str, Any]:
    """Shape, type, extremes of what is finite, and the share that is."""
    x = x.detach()
    good = x[torch.isfinite(x)]
    ends = {"min": float(good.min()), "max": float(good.max())} if good.numel() else {"min": None, "max": None}
    kind = str(x.dtype).removeprefix("torch.")
    return {"shape": list(x.shape), "dtype": kind, **ends, "finite": good.numel() / max(1, x.numel())}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those of real numbers in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(list(vars(value).values()))
