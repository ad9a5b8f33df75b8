"""--replay STEP: which module of which rank made a step's numbers go wrong, from which clips."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.numbers import told
from cogvideo_dist.engine.probing import Account
from cogvideo_dist.engine.replay import Replay
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object
from cogvideo_dist.protocols import Task
from launch.compose import RankData, refused_as_other_data, refused_as_other_run
from launch.pulse import pulse_of_process

SHOWN = 4
"""Inputs of a module, parameters and clips of a rank that are listed."""


def replay(config: DiTRun | VAERun, task: Task, *, data: RankData, mesh: ParallelMesh, step: int) -> None:
    """Print what is found of ``step`` of the run, which stays as it is. Raises ``FloatingPointError`` if it is not finite."""
    refusal = _refused(config, data, step) if mesh.is_first else None
    if refusal := broadcast_object(refusal, mesh.world):
        raise ConfigError(refusal)
    folder = Path(config.run.dir)
    micro_steps, mark = data.loader.micro_steps, pulse_of_process().mark
    again = Replay(config, task, batches=data, mesh=mesh, micro_steps=micro_steps, mark=mark)
    found, accounts = again.look(step)
    if mesh.is_first:
        for line in table(accounts):
            print(line)
        sys.stdout.flush()
    if any(account["faults"] for account in accounts):
        early = "" if found == step else f"; step {step} comes after it"
        raise FloatingPointError(f"step {found}: {told(accounts)}{early}")
    if mesh.is_first:
        print(
            f"step {step} is finite on every rank this time: if it was not in the run, that does not repeat, so suspect the "
            f"hardware of the ranks named in {folder / 'incidents.jsonl'}, and run launch/doctor.py on their hosts",
            flush=True,
        )


def _refused(config: DiTRun | VAERun, data: RankData, step: int) -> str | None:
    """Why this step cannot be computed again."""
    folder = Path(config.run.dir)
    if not (folder / "config.yaml").exists():
        return f"--replay {step}: run.dir {folder} is no run yet (it has no config.yaml)"
    if not 1 <= step <= config.train.steps:
        return f"--replay {step}: the run's steps are 1 to {config.train.steps} (train.steps)"
    return refused_as_other_run(config, folder / "config.yaml") or refused_as_other_data(
        config.data, data.plan.catalog, path=folder / "data.json"
    )


def table(accounts: Sequence[Account]) -> Iterator[str]:
    """What every rank found, in lines."""
    yield f"{'rank':>4}  {'host':<16}  {'what':<28}  first module that is not finite"
    for account in accounts:
        head = f"{account['rank']:>4}  {account['host'][:16]:<16}  "
        for fault in account["faults"] or [None]:
            yield head + (f"{_what(fault):<28}  {fault['module'] or '-'}" if fault else f"{'finite':<28}  -")
            yield from (f"{'':>26}{line}" for line in _details(fault) if fault)
        keys = [sample["key"] for sample in account["samples"]]
        if account["faults"]:
            yield f"{'':>26}clips {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"


def _what(fault: dict[str, Any]) -> str:
    whose = f" of the {fault['model']}" if fault["model"] else ""
    value = f" {fault['value']}" if fault["what"] == "loss" else ""
    return f"{fault['what']}{whose}{value}, pack {fault['micro_step']}"


def _details(fault: dict[str, Any] | None) -> Iterator[str]:
    if fault is None:
        return
    for about in fault["inputs"][:SHOWN]:
        ends = "nothing finite" if about["min"] is None else f"{about['min']:.4g} to {about['max']:.4g}"
        yield f"in: {about['dtype']} {about['shape']}: {ends}, {about['finite']:.2%} finite"
    if fault["parameters"]:
        yield f"gradients: {', '.join(fault['parameters'][:SHOWN])}{', ...' if fault['count'] > SHOWN else ''}"
