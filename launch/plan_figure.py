"""The figure of launch/plan.py: memory by part, and what a step takes on up to 1,024 GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.plan_layouts import Candidate, Survey
from launch.plan_scaling import Curve

SHOWN = 14

PARTS = {
    "weights": "#2f6d8f", "states": "#5b9bd5", "gradients": "#f0a04b", "buffers": "#c9c9c9", "frozen": "#7f6bb0",
    "activations": "#3f9a77", "encoding": "#b0597f", "sampling": "#d97fa6", "reduction": "#d06a3a", "update": "#8c5a2b",
}  # fmt: skip
LABELS = {
    "states": "masters, moments, average", "buffers": "DeepSpeed's buffers", "frozen": "autoencoder, text encoder",
    "encoding": "autoencoder at work", "sampling": "validation's sampling", "reduction": "gradients as they are reduced",
    "update": "gradients and copies at the update",
}  # fmt: skip
INK, QUIET = "#1c2430", "#68748a"


def draw(found: Survey, *, curves: Sequence[Curve], path: Path) -> None:
    """A PNG."""
    figure = Figure(figsize=(13, 8.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    memory, time, efficiency = figure.subplot_mosaic(
        [["memory", "time"], ["memory", "efficiency"]], width_ratios=[1.35, 1]
    ).values()
    cluster = found.cluster
    figure.suptitle(
        f"{found.config.model.preset} on {cluster.gpus} GPUs of {cluster.memory / 1e9:g} GB: computed, not measured", color=INK
    )  # fmt: skip
    draw_memory(memory, found)
    draw_time(time, curves)
    draw_efficiency(efficiency, curves)
    figure.savefig(path, dpi=110, format="png")


def draw_memory(axes: Axes, found: Survey) -> None:
    """A bar for each of the first layouts, and the fastest way of all that does not fit."""
    rows = found.best[:SHOWN]
    bottoms = [0.0] * len(rows)
    for part, colour in PARTS.items():
        sizes = [each.memory.at_peak.get(part, 0.0) / 1e9 for each in rows]
        if max(sizes) > 0.05:
            axes.barh(range(len(rows)), sizes, left=bottoms, color=colour, label=LABELS.get(part, part), height=0.72)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes)]
    widest = max(*bottoms, found.cluster.memory / 1e9)
    for row, each in enumerate(rows):
        axes.text(1.02 * widest, row, f"{each.step:.3g} s", va="center", fontsize=8, color=QUIET)
    axes.axvline(found.cluster.usable / 1e9, color="#c8452f", linestyle="--", linewidth=1.3, label="planned with")
    chosen = found.recommended
    axes.set_yticks(range(len(rows)), [label(each, chosen) for each in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * widest)
    axes.set_xlabel("GB of a GPU at the fullest moment of a step; to the right the step's time")
    axes.set_title("Memory of the best way in each layout", fontsize=11, loc="left", color=INK)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.07), ncols=3, frameon=False)
    plain(axes)


def label(each: Candidate, chosen: Candidate | None) -> str:
    switches = each.name.removeprefix(each.layout.name).removeprefix(", ")
    return f"{'▶ ' if each == chosen else ''}{each.layout.name}\n{switches}"


def draw_time(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve, style in zip(curves, ("o-", "s--")):
        there = [point for point in curve.points if point.best]
        steps = [point.best.step for point in there if point.best]
        axes.plot([point.gpus for point in there], steps, style, label=described(curve))
    if any(point.best for curve in curves for point in curve.points):  # no logarithm of nothing
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_ylabel("seconds of a step")
    axes.set_title("Time of a step in the recommended layout", fontsize=11, loc="left", color=INK)
    gpus(axes, curves)
    axes.legend(fontsize=8, frameon=False)
    plain(axes)


def draw_efficiency(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve, style in zip(curves, ("o-", "s--")):
        there = [point for point in curve.points if point.best]
        axes.plot(
            [point.gpus for point in there], [100 * point.best.mfu for point in there if point.best], style,
            label=described(curve),
        )  # fmt: skip
    if any(point.best for curve in curves for point in curve.points):
        axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.set_ylabel("MFU, %")
    axes.set_xlabel("GPUs")
    axes.set_title("Use of the GPUs", fontsize=11, loc="left", color=INK)
    gpus(axes, curves)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    plain(axes)


def described(curve: Curve) -> str:
    if curve.strong:
        return f"strong: {curve.points[0].packs:,} packs a step"
    last = curve.points[-1]
    return f"weak: {last.packs / last.gpus:.3g} packs a GPU and step"


def gpus(axes: Axes, curves: Sequence[Curve]) -> None:
    counts = [point.gpus for point in curves[0].points]
    axes.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8)
    axes.minorticks_off()


def plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
