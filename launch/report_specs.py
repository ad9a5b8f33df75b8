"""Which charts a report has: from the names of what runs log, and from their checkpoints. What no line here names has a chart
of its own at the end, so that nothing that was logged is unseen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.report_charts import COLOURS, Chart, Line, Marks
from launch.report_curves import Curve, Points
from launch.report_read import RunFacts

LOSS, OPTIMIZER, SPEED, MEMORY = "Loss", "Optimizer", "Speed", "Memory and padding"
TRAFFIC, DATA, OTHERS = "Communication", "Data", "Other figures"
HIDDEN = re.compile(r"lineage/.*")
"""Figures that count up, which the page's head has."""


@dataclass(frozen=True)
class Spec:
    """Figures whose whole name ``names`` matches; ``each``: a chart for every one of them, its title with the match's first
    group in place of {}. ``scale``: what they are multiplied by to have ``unit``."""

    section: str
    title: str
    names: str
    unit: str = ""
    note: str = ""
    scale: float = 1.0
    each: bool = False
    wide: bool = False
    smooth: bool = False
    scales: bool = False


SPECS = (
    Spec(LOSS, "Training loss", r"loss", wide=True, smooth=True, scales=True),
    Spec(LOSS, "Held-out loss", r"held_out/loss", scales=True),
    Spec(LOSS, "Held-out loss by timestep", r"held_out/(t\d+)", scales=True),
    Spec(
        LOSS,
        "Training loss by quarter of the timesteps",
        r"loss/(quartile\d)",
        smooth=True,
        scales=True,
        note="quartile1 has the least noise",
    ),
    Spec(LOSS, "Parts of the loss", r"loss/(.*)", smooth=True),
    Spec(LOSS, "Held out: {}", r"held_out/(.*)", each=True),
    Spec(LOSS, "{}: loss", r"(.*)/loss", each=True, smooth=True, scales=True),
    Spec(OPTIMIZER, "Learning rate", r"(?:(.*)/)?learning_rate"),
    Spec(OPTIMIZER, "Gradient norm", r"(?:(.*)/)?gradient_norm", smooth=True, scales=True, note="before clipping"),
    Spec(OPTIMIZER, "Loss scale", r"(?:(.*)/)?loss_scale", scales=True),
    Spec(SPEED, "Tokens per second", r"throughput/tokens_per_s", smooth=True, note="of all ranks"),
    Spec(
        SPEED, "Model FLOPs utilisation", r"throughput/mfu", "%", scale=100, smooth=True, note="without recomputation"
    ),
    Spec(SPEED, "Time of a step", r"throughput/step_s", "s", smooth=True),
    Spec(
        SPEED,
        "Waiting for data",
        r"data/loader_wait_share",
        "%",
        scale=100,
        smooth=True,
        note="share of the steps' time, mean of all ranks",
    ),
    Spec(SPEED, "Clips per second", r"throughput/samples_per_s", smooth=True),
    Spec(MEMORY, "Peak memory", r"memory/peak_gib", "GiB", note="of the rank with most; of the process on a CPU"),
    Spec(MEMORY, "Padding", r"data/padding_share", "%", scale=100, smooth=True, note="share of the packs' tokens"),
    Spec(
        TRAFFIC,
        "Sent in a step",
        r"communication/(.*)_mb",
        "MB",
        wide=True,
        note="by the first rank, by axis and collective; what DeepSpeed sends is not in it",
    ),
    Spec(
        DATA, "Clips not used as planned", r"data/((?:replaced|partial)_samples)", note="between two lines of the log"
    ),
    Spec(DATA, "Clips", r"data/samples", note="between two lines of the log"),
    Spec(OTHERS, "{}", r"(.*)", each=True, smooth=True),
)


def charts_by_section(runs: Sequence[RunFacts]) -> dict[str, list[Chart]]:
    """Runs lie over each other: with one of them a line's colour is its figure's, with several it is its run's."""
    free = {
        name for run in runs for name, curve in run.curves.items() if curve.last[0] >= 0 and not HIDDEN.fullmatch(name)
    }
    found: dict[str, list[Chart]] = {}
    for spec in SPECS:
        mine = {name: match for name in free if (match := re.fullmatch(spec.names, name, re.DOTALL))}
        free -= mine.keys()
        order = sorted(mine, key=_natural)
        for names in [[name] for name in order] if spec.each else [order] if order else []:
            words = [next((group for group in mine[name].groups() if group), name) for name in names]
            title = spec.title.replace("{}", words[0])
            found.setdefault(spec.section, []).append(_chart(runs, spec, dict(zip(names, words)), title=title))
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """t100 before t1000, and both behind t50."""
    return [(len(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _chart(runs: Sequence[RunFacts], spec: Spec, words: dict[str, str], *, title: str) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        for place, (name, word) in enumerate(words.items()):
            curve = run.curves.get(name)
            if curve is None or curve.last[0] < 0:
                continue
            label = word if len(runs) == 1 else run.label if len(words) == 1 else f"{run.label}: {word}"
            colour, dash = (place, place // COLOURS) if len(runs) == 1 else (number, place)
            lines.append(Line(label, _scaled(curve.points(), spec.scale), colour, dash))
    return Chart(
        title, lines, spec.unit, spec.note, wide=spec.wide, smooth=spec.smooth, scales=spec.scales,
        marks=_marks(runs, saves=spec.names == "loss"),
    )  # fmt: skip


def _scaled(points: Points, scale: float) -> Points:
    if scale == 1.0:
        return points
    return replace(points, mean=scale * points.mean, low=scale * points.low, high=scale * points.high)


def _marks(runs: Sequence[RunFacts], *, saves: bool) -> list[Marks]:
    """Where runs went on after a stop, and where they saved; what lies beyond the last logged step has no place."""
    found = []
    for colour, run in enumerate(runs):
        again = [begun.step for begun in run.starts[1:] if 0 < begun.step <= run.last_step]
        found.append(Marks("start", again, colour))
        if saves:
            found.append(Marks("save", [save.step for save in run.saves if save.step <= run.last_step], colour))
    return found


def checkpoint_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Bytes and seconds of every save, and how long the training stood still for it, of runs that note that."""
    charts = [
        ("Size of a checkpoint", "GB", 1e-9, "bytes"), ("Time until it is committed", "s", 1.0, "seconds"),
        ("Time that the training stood still", "s", 1.0, "stall"),
    ]  # fmt: skip
    found, last_step = [], max(run.last_step for run in runs)
    for title, unit, scale, name in charts:
        lines = []
        for number, run in enumerate(runs):
            curve = Curve()
            for save in run.saves:
                value = getattr(save, name)
                if value is not None and save.step <= last_step:
                    curve.add(save.step, scale * value)
            if curve.last[0] >= 0:
                lines.append(Line(run.label, curve.points(), number))
        if lines:
            found.append(Chart(title, lines, unit))
    return found


def traffic(run: RunFacts) -> dict[str, float]:
    """Megabytes that the first rank sent in a step over each axis, in the mean of what was logged."""
    sums: dict[str, float] = {}
    for name, curve in run.curves.items():
        match = re.fullmatch(r"communication/([^_]+)_.*_mb", name)
        if match and curve.last[0] >= 0:
            points = curve.points()
            mean = float((points.mean * points.count).sum() / points.count.sum())
            sums[match[1]] = sums.get(match[1], 0.0) + mean
    return sums
