"""The model of every rank of a layout, built without memory: do the ranks' slices and ZeRO's pieces make up the whole?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.optim import parameter_groups
from cogvideo_dist.engine.pieces import cut_of
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import adapt
from cogvideo_dist.parallel.mesh import Axis, Layout

ALIGNMENT = 2
"""Elements to multiples of which DeepSpeed's stages 1 and 2 round a rank's part up."""

Run = tuple[int, int, int]
"""(replica, start, stop): elements [start, stop) of a parameter, as its tensor-parallel rank has it, that the optimizer of a
replica works on."""


@dataclass(frozen=True)
class DryRun:
    """Numbers of elements. ``parameters`` and ``trained``: of the whole model; ``held`` and ``updated``: of each rank's, those
    that it keeps between two passes and those that its optimizer works on. ``problems``: parameters that the ranks' pieces do
    not make up."""

    parameters: int
    trained: int
    held: tuple[int, ...]
    updated: tuple[int, ...]
    problems: tuple[str, ...]


def dry_run(config: DiTRun, layout: Layout, *, stage: int) -> DryRun:
    """All ranks of ``layout``, under a stage of ZeRO."""
    models = [model_of(config, Axis("tp", rank, layout.tp, tuple(range(layout.tp)))) for rank in range(layout.tp)]
    replicas = layout.world // layout.tp
    runs = [runs_of(model, replicas=replicas, stage=stage) for model in models]
    cuts = {name: cut_of(models[0], name, own=tuple(p.shape)) for name, p in models[0].named_parameters()}
    problems = [
        line
        for tp, own in enumerate(runs)
        for name, found in own.items()
        if (
            line := wrong(
                found,
                cuts[name].slice(tp, layout.tp).count,
                copies=replicas if stage == 0 else 1,
                of=f"of {name} on tp {tp}",
            )
        )
    ]
    updated = [0] * layout.world
    for tp, own in enumerate(runs):
        for replica, start, stop in (run for found in own.values() for run in found):
            updated[replica * layout.tp + tp] += stop - start
    kept = [kept_by(model, replicas=replicas, stage=stage) for model in models]
    held = [kept[rank % layout.tp] + (updated[rank] if stage == 3 else 0) for rank in range(layout.world)]
    trained = sum(cuts[name].count for name in runs[0])
    return DryRun(sum(cut.count for cut in cuts.values()), trained, tuple(held), tuple(updated), tuple(problems))


def model_of(config: DiTRun, tp: Axis) -> DiT:
    """A rank's transformer on the meta device, with its adapters, which alone learn where there are any."""
    with torch.device("meta"):
        model = DiT(config.model.transformer(), recompute=config.train.recompute, tp=tp)
        if config.lora is not None:
            adapt(model, config.lora.adapters())
    return model


def kept_by(model: DiT, *, replicas: int, stage: int) -> int:
    """Elements that a rank keeps between two passes: all of its parameters; under stage 3 its part of those that do not learn,
    beside what its optimizer works on."""
    if stage < 3:
        return sum(p.numel() for p in model.parameters())
    return sum(-(-p.numel() // replicas) for p in model.parameters() if not p.requires_grad)


def runs_of(model: DiT, *, replicas: int, stage: int) -> dict[str, list[Run]]:
    """Of every trained parameter: all of it on every replica under stage 0; under 1 and 2 what lies in each replica's equal
    part of its parameter group, laid out one behind the other; under 3 an equal part on each."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[Run]] = {}
    for group in parameter_groups(model, 0.0):
        counts = {names[id(p)]: p.numel() for p in group["params"]}
        part, at = -(-sum(counts.values()) // (ALIGNMENT * replicas)) * ALIGNMENT, 0
        for name, count in counts.items():
            if stage == 0:
                found[name] = [(replica, 0, count) for replica in range(replicas)]
            elif stage == 3:
                found[name] = divided(0, count, part=-(-count // replicas))
            else:
                found[name] = divided(at, count, part=part)
            at += count
    return found


def divided(first: int, count: int, *, part: int) -> list[Run]:
    """A parameter of ``count`` elements that begins ``first`` elements into what replicas have in parts of ``part``."""
    return [
        (replica, max(replica * part - first, 0), min((replica + 1) * part - first, count))
        for replica in range(first // part, -(-(first + count) // part))
    ]


def wrong(runs: Sequence[Run], count: int, *, copies: int, of: str) -> str | None:
    """What is wrong where each of ``count`` elements must be in the runs of ``copies`` replicas."""
    at = dict.fromkeys(range(copies), 0)
    for number, (_, start, stop) in enumerate(sorted(runs)):
        copy = number % copies
        if start != at[copy]:
            return f"elements {min(at[copy], start)} to {max(at[copy], start)} {of} are with no rank or with two"
        at[copy] = stop
    short = [found for found in at.values() if found != count]
    return f"ranks have {short[0]} of the {count} elements {of}" if short else None
