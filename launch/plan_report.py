"""What launch/plan.py shows: a table, plan.json and plan.png."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogvideo_dist.evaluation.media import replacing
from cogvideo_dist.parallel.mesh import divisors
from launch.cost import PEAK, Pack, duration, gigabytes
from launch.plan_cluster import Cluster
from launch.plan_layouts import Candidate, Survey, reasons
from launch.plan_scaling import Curve

SHOWN = 16
"""Rows of the table and bars of the figure; all are in plan.json."""

COLUMNS = ("layout", "ZeRO", "recompute", "offload", "memory", "fits", "step", "MFU", "sent", "waits")


def table(found: Survey) -> str:
    """For a terminal: what is planned, the layouts, the recommended one in full, and what cannot run."""
    chosen, rows = found.recommended, found.best
    shown = [COLUMNS, *(cells(each, found.cluster) for each in rows[:SHOWN])]
    widths = [max(map(len, column)) for column in zip(*shown)]
    lines = [*heading(found), ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} layouts more, in plan.json")
    lines += [f"refused: {names(refusal.layouts)}: {refusal.why}" for refusal in found.refusals]
    return "\n".join([*lines, "", *(details(found, chosen) if chosen else nothing(found))])


def heading(found: Survey) -> list[str]:
    share, cluster, data = found.candidates[0].share, found.cluster, found.config.data
    memory, usable = gigabytes(cluster.memory), gigabytes(cluster.usable)
    learning = "all" if found.config.lora is None else f"{share.adapters:,} of adapters"
    flops = found.candidates[0].flops
    return [
        f"{found.config.model.preset}: {share.parameters:,} parameters; trained: {learning}",
        f"a step of {data.packs_per_step} packs such as {packed(share.pack)}: {flops / 1e15:,.3g} PFLOP",
        f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs of {memory}, {usable} to plan with; "
        f"{cluster.link / 1e9:g} GB/s within a node, {cluster.network / 1e9:g} between nodes",
    ]  # fmt: skip


def packed(pack: Pack) -> str:
    return f"{pack.clips} x {list(pack.size)} ({pack.tokens:,} tokens)"


def names(layouts: Sequence[Any]) -> str:
    """The first few."""
    rest = len(layouts) - 3
    return ", ".join(layout.name for layout in layouts[:3]) + (f" and {rest} more" if rest > 0 else "")


def cells(each: Candidate, cluster: Cluster) -> tuple[str, ...]:
    """One row, in the order of ``COLUMNS``."""
    offload = "+".join(name for name, on in vars(each.train.offload).items() if on) or "-"
    return (
        each.layout.name, str(each.share.stage), each.train.recompute, offload, gigabytes(each.memory.peak),
        each.lack(cluster) or "yes", duration(each.step), f"{each.mfu:.0%}", gigabytes(sum(each.volumes.values())),
        duration(each.seconds.sent),
    )  # fmt: skip


def details(found: Survey, chosen: Candidate) -> list[str]:
    """The recommended one: its switches, memory, time and traffic by part, and why."""
    parts = ", ".join(f"{name} {gigabytes(value)}" for name, value in chosen.memory.at_peak.items() if value >= 5e7)
    times = ", ".join(f"{name} {duration(value)}" for name, value in vars(chosen.seconds).items() if value >= 5e-4)
    lines = [
        f"recommended: {chosen.name}",
        f"  settings   {' '.join(settings(chosen))}",
        f"  memory     {gigabytes(chosen.memory.peak)} a GPU: {parts}",
        f"  step       {duration(chosen.step)}: {times}; MFU {chosen.mfu:.0%} of {PEAK / 1e12:.0f} TFLOP/s",
    ]
    for axis, (sent, seconds) in by_axis(chosen).items():
        path = found.cluster.path(chosen.layout, axis)
        where = "within a node" if path.nodes == 1 else f"over {path.nodes} nodes"
        lines.append(f"  {axis:<10} {gigabytes(sent)} a GPU and step, {where}: {duration(seconds)}")
    return [*lines, *(f"  because    {line}" for line in reasons(found, chosen))]


def nothing(found: Survey) -> list[str]:
    least = found.leanest
    return [
        f"nothing fits; the smallest, {least.name}, takes {gigabytes(least.memory.peak)}: {least.lack(found.cluster)}"
    ]


def settings(chosen: Candidate) -> list[str]:
    """Overrides that make a configuration run so."""
    layout, train = chosen.layout, chosen.train
    values = {
        "parallel.sp": layout.ulysses * layout.ring, "parallel.ulysses": layout.ulysses, "parallel.ring": layout.ring,
        "parallel.tp": layout.tp, "train.zero_stage": chosen.share.stage, "train.recompute": train.recompute,
        **{f"train.offload.{name}": str(on).lower() for name, on in vars(train.offload).items()},
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def by_axis(chosen: Candidate) -> dict[str, tuple[float, float]]:
    """Axis -> bytes that a GPU sends in a step, and seconds."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (axis, operation), value in chosen.volumes.items():
        sums[axis][0] += value
        sums[axis][1] += chosen.travel[axis, operation]
    return {axis: (sent, seconds) for axis, (sent, seconds) in sums.items()}


def write_report(out: Path, found: Survey, *, curves: Sequence[Curve], dry: dict[str, Any] | None) -> None:
    """plan.json and plan.png, each whole or not at all."""
    from launch.plan_figure import draw  # its library is an extra

    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "plan.json") as temporary:
        temporary.write_text(
            json.dumps(as_data(found, curves) | ({"dry_run": dry} if dry else {}), indent=1, allow_nan=False) + "\n",
            encoding="utf-8",
        )
    with replacing(out / "plan.png") as temporary:
        draw(found, curves=curves, path=temporary)


def as_data(found: Survey, curves: Sequence[Curve]) -> dict[str, Any]:
    """Everything, as plain values: bytes, seconds, operations."""
    share, chosen, config = found.candidates[0].share, found.recommended, found.config
    return {
        "model": {"preset": config.model.preset, **asdict(share.model)},
        "parameters": share.parameters,
        "adapters": share.adapters,
        "pack": asdict(share.pack),
        "packs_per_step": config.data.packs_per_step,
        "cluster": {**asdict(found.cluster), "gpus": found.cluster.gpus, "usable": found.cluster.usable},
        "recommended": full(chosen, found.cluster) if chosen else None,
        "reasons": reasons(found, chosen) if chosen else nothing(found),
        "layouts": [full(each, found.cluster) for each in found.best],
        "refused": [{"layouts": [layout.name for layout in each.layouts], "why": each.why} for each in found.refusals],
        "candidates": [
            [each.name, each.memory.peak, each.host, each.step, each.over(found.cluster) <= 0]
            for each in found.candidates
        ],
        "scaling": {"strong" if curve.strong else "weak": points(curve) for curve in curves},
    }


def full(each: Candidate, cluster: Cluster) -> dict[str, Any]:
    layout = each.layout
    return {
        "name": each.name,
        "layout": {**asdict(layout), "cp": list(divisors(layout.sample))},
        "settings": settings(each),
        "fits": each.over(cluster) <= 0,
        "lacks": each.lack(cluster),
        "memory": {"peak": each.memory.peak, "at_peak": each.memory.at_peak, **asdict(each.memory)},
        "host_memory": each.host,
        "flops": each.flops,
        "step_s": each.step,
        "seconds": asdict(each.seconds),
        "mfu": each.mfu,
        "sent": {
            " ".join(key): {"bytes": value, "seconds": each.travel[key], "nodes": cluster.path(layout, key[0]).nodes}
            for key, value in each.volumes.items()
        },
    }


def points(curve: Curve) -> list[dict[str, Any]]:
    return [
        {
            "gpus": point.gpus, "packs": point.packs, "name": point.best.name if point.best else None,
            "step_s": point.best.step if point.best else None, "mfu": point.best.mfu if point.best else None,
            "efficiency": curve.efficiency(point),
        }
        for point in curve.points
    ]  # fmt: skip


def scaling(curves: Sequence[Curve]) -> str:
    """For a terminal."""
    lines = []
    for curve in curves:
        lines.append("the same step on more GPUs:" if curve.strong else "as many packs for every GPU:")
        for point in curve.points:
            best = point.best
            told = f"{duration(best.step):>8}  {curve.efficiency(point):>4.0%}  {best.name}" if best else "nothing fits"
            lines.append(f"  {point.gpus:>5} GPUs  {point.packs:>5,} packs  {told}")
    return "\n".join(lines)
