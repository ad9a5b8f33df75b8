"""Prove a configuration's parallel layouts: python launch/parity.py --config FILE [key=value ...] --layouts all --ranks 8

Every layout must compute the loss, the gradients and the weights of one process, and send the bytes that the formulas say.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun, Size, check_size, positive
from cogvideo_dist.parallel.mesh import Layout, legal_layouts
from launch.compose import TransformerGeometry
from launch.environment import FAILED, config_parser, run_command, split_config
from launch.parity_report import Context, table, write_report
from launch.parity_steps import BREAKABLE, Job, Stage, attention_of, packs_of, work
from launch.parity_verdict import TOLERANCES, Shapes, Verdict, failed, judge
from launch.parity_worlds import Answer, WorldError, prepare, run_world

SMALL: Size = (9, 48, 64)
"""The video of a pack on CPUs, unless asked otherwise."""
PACKS_PER_RANK = 2
"""Of the most data-parallel layout, so that even its ranks accumulate."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    job, layouts = prepared(options)
    prepare(job.device)
    reference, verdicts = compared(job, layouts)
    warning = ". ".join(warnings(job))
    context = Context(job, reference["loss"], TOLERANCES[job.device], warning)
    out = Path(options.out or Path(job.config.run.dir) / "parity")
    write_report(out, verdicts, context=context)
    sys.stdout.write(f"warning: {warning}\n" if warning else "")
    sys.stdout.write(table(verdicts) + f"\nreport: {out / 'parity.html'}\n")
    if not all(verdict.passed for verdict in verdicts):
        sys.exit(FAILED)


def warnings(job: Job) -> list[str]:
    """What makes the comparison less than it seems."""
    found = [] if job.broken is None else [f"broken on purpose: {job.broken}"]
    wanted = job.config.parallel.attention
    if attention_of(job.config, device=torch.device(job.device), dtype=job.dtype, ring_size=1) != wanted:
        found.append(f"parallel.attention {wanted} does not serve {job.dtype} on {job.device}: auto stands in for it")
    return found


def parser() -> argparse.ArgumentParser:
    found = config_parser(
        "Run a few steps of a training configuration in one process and in parallel layouts on this machine, and compare loss, "
        "gradients, weights and traffic. Weights and clips are drawn from the seed: neither data nor frozen models are read.",
        "python launch/parity.py --config configs/demo/dit.yaml --layouts all --ranks 4",
    )
    add = found.add_argument
    add(
        "--layouts",
        default="all",
        metavar="all | NAME[,NAME...]",
        help="such as dp2-ulysses2-tp2 (default: all legal ones)",
    )
    add("--ranks", type=int, required=True, help="ranks of every layout; on CPUs any number")
    add("--layers", type=int, default=2, help="depth of the compared model (default 2); the rest is as configured")
    add(
        "--frames",
        type=int,
        help=f"of the video of each pack (default: {SMALL[0]} on CPUs, the configured largest on GPUs)",
    )
    add("--height", type=int, help="in pixels, likewise")
    add("--width", type=int, help="in pixels, likewise")
    add("--steps", type=int, default=3, help="optimizer steps after which weights are compared (default 3)")
    add("--stages", metavar="N[,N...]", help="ZeRO stages of these steps (default: the configured one)")
    add("--out", help="folder of parity.json and parity.html (default: parity in the run's folder)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs one GPU per rank and compares in float32")
    add(
        "--timeout",
        type=float,
        default=300.0,
        help="seconds after which a layout that has not ended fails (default 300)",
    )
    add("--broken", choices=BREAKABLE, help=argparse.SUPPRESS)
    return found


def prepared(options: argparse.Namespace) -> tuple[Job, tuple[Layout, ...]]:
    """The question to every layout; raises ``ConfigError`` for what cannot be asked."""
    config = load_config(DiTRun, **split_config(options.config))
    try:
        positive("option", ranks=options.ranks, layers=options.layers, steps=options.steps, timeout=options.timeout)
        size = _size(options, config)
        check_size("the video of --frames, --height and --width", size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and options.ranks > gpus:
        raise ConfigError(
            f"--device cuda needs a GPU for each of --ranks {options.ranks}, found {gpus}; use --device cpu"
        )
    layouts = _layouts(options, heads=config.model.transformer().heads)
    config = replace(config, model=replace(config.model, layers=options.layers, weights=None))
    packs = packs_of(size, PACKS_PER_RANK * max(layout.dp for layout in layouts))
    return Job(
        config, Layout(), packs, _stages(options, config), options.steps, options.device, broken=options.broken,
        timeout_s=options.timeout,
    ), layouts  # fmt: skip


def _size(options: argparse.Namespace, config: DiTRun) -> Size:
    largest = max(config.data.sizes, key=lambda size: size[0] * size[1] * size[2])
    frames, height, width = SMALL if options.device == "cpu" else largest
    return options.frames or frames, options.height or height, options.width or width


def _layouts(options: argparse.Namespace, *, heads: int) -> tuple[Layout, ...]:
    legal = {layout.name: layout for layout in legal_layouts(options.ranks, heads=heads)}
    if options.layouts == "all":
        return tuple(legal.values())
    names = options.layouts.split(",")
    for name in names:
        if name not in legal:
            raise ConfigError(
                f"--layouts: {name!r} is no legal layout of {options.ranks} ranks for {heads} heads; use all or some of "
                f"{', '.join(legal)}"
            )
    return tuple(legal[name] for name in dict.fromkeys(names))


def _stages(options: argparse.Namespace, config: DiTRun) -> tuple[Stage, ...]:
    if options.stages is None:
        return (config.train.zero_stage,)
    legal: dict[str, Stage] = {"0": 0, "1": 1, "2": 2, "3": 3}
    wanted = options.stages.split(",")
    if not set(wanted) <= set(legal):
        raise ConfigError(f"--stages must be some of {','.join(legal)}, found {options.stages!r}")
    return tuple(stage for name, stage in legal.items() if name in wanted)


def compared(job: Job, layouts: Sequence[Layout]) -> tuple[Answer, list[Verdict]]:
    """The single process's answer, and every layout's verdict."""
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        progress = tqdm(total=1 + len(layouts), desc="one process", unit="layout", file=sys.stderr)
        single = folder / "one process"
        try:
            reference = _answers(replace(job, stages=(0,), broken=None), single)[0]
        except WorldError as error:
            raise ValueError(f"one process alone failed, with which the layouts are compared: {error}") from None
        verdicts = []
        for layout in layouts:
            progress.update()
            progress.set_description(layout.name)
            verdicts.append(_verdict(replace(job, layout=layout, reference=single), folder / layout.name, reference))
        progress.update()
        progress.close()
        return reference, verdicts


def _answers(job: Job, folder: Path) -> list[Answer]:
    return run_world(
        work, replace(job, folder=folder), world=job.layout.world, device=job.device, folder=folder,
        timeout_s=job.timeout_s,
    )  # fmt: skip


def _verdict(job: Job, folder: Path, reference: Answer) -> Verdict:
    begun = time.monotonic()
    try:
        answers = _answers(job, folder)
    except WorldError as error:
        return failed(job.layout, str(error), seconds=time.monotonic() - begun, details=error.details)
    return judge(
        job.layout, answers, reference=reference, shapes=shapes_of(job), tolerances=TOLERANCES[job.device],
        seconds=time.monotonic() - begun,
    )  # fmt: skip


def shapes_of(job: Job) -> Shapes:
    model = job.config.model.transformer()
    geometry = TransformerGeometry(model)
    tokens = sum(geometry(size).tokens for pack in job.packs for size in pack)
    return Shapes(
        tokens / len(job.packs), model.hidden, model.heads, model.layers, len(job.packs), job.dtype.itemsize,
        job.config.train.recompute, job.config.lora is not None,
    )  # fmt: skip


if __name__ == "__main__":
    run_command("parity", main)
