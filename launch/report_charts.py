"""Charts of curves over a run's steps as inline SVG, and the numbers with which report_script.py brings them to life.

A chart's plot is an SVG of its own, SIDE x SIDE units whatever its size on the page, so that a zoom is another viewBox.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from cogvideo_dist.data.shards import shown
from launch.report_curves import Points, Rows

SIDE = 10_000
WIDE, NARROW = (1090, 300), (530, 230)
"""Pixels of a chart: width, height."""
LEFT, RIGHT, TOP, BOTTOM = 78, 12, 10, 26
"""Pixels around its plot."""
EDGE = 40
"""Pixels at the right in which a step's text ends where it stands, since there is no room behind it."""
COLOURS, DASHES = 8, 4
DECADES = 50.0
"""A positive figure whose values differ by this factor is drawn on a logarithmic axis, if its chart allows that."""
ALIKE = 1e-9
"""Values that differ relatively by less are drawn as one."""


@dataclass(frozen=True)
class Line:
    """``colour`` and ``dash``: numbers of classes of the page's style."""

    label: str
    points: Points
    colour: int = 0
    dash: int = 0

    @property
    def classes(self) -> str:
        return f"c{self.colour % COLOURS} d{self.dash % DASHES}"


@dataclass(frozen=True)
class Marks:
    """Steps at which something happened to a run of this colour. ``kind``: start or save."""

    kind: str
    steps: Sequence[int]
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """``smooth``: with running means; ``scales``: a logarithmic axis is allowed."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    note: str = ""
    wide: bool = False
    smooth: bool = False
    scales: bool = False
    marks: Sequence[Marks] = ()

    @property
    def size(self) -> tuple[int, int]:
        return WIDE if self.wide else NARROW

    @property
    def logarithmic(self) -> bool:
        low, high = self._extremes()
        return self.scales and low > 0 and high / low >= DECADES

    def bounds(self) -> tuple[float, float]:
        """What the plot shows, in values or, on a logarithmic axis, in their powers of ten."""
        low, high = self._extremes()
        if self.logarithmic:
            low, high = math.log10(low), math.log10(high)
            return low - 0.04 * (high - low), high + 0.04 * (high - low)
        if high - low <= ALIKE * max(abs(low), abs(high)):
            return (min(0.0, 1.25 * low), max(0.0, 1.25 * high)) if low else (0.0, 1.0)
        room = 0.04 * (high - low)
        return (0.0 if 0 <= low < 0.5 * high else low - room), (0.0 if high == 0 else high + room)

    def _extremes(self) -> tuple[float, float]:
        return (
            min(float(line.points.low.min()) for line in self.lines),
            max(float(line.points.high.max()) for line in self.lines),
        )


def draw(chart: Chart, *, number: int, last_step: int) -> str:
    """The figure with its legend; ``number`` is that of its data in the script, ``last_step`` the axis' end."""
    width, height = chart.size
    plot = f'x="{LEFT}" y="{TOP}" width="{width - LEFT - RIGHT}" height="{height - TOP - BOTTOM}"'
    inner = "".join([
        *(_marks(marks, last_step) for marks in chart.marks),
        *(_line(chart, line, number=place, last_step=last_step) for place, line in enumerate(chart.lines)),
    ])  # fmt: skip
    note = f'<p class="quiet">{_text(_note(chart))}</p>' if _note(chart) else ""
    return (
        f'<figure class="chart{" wide-chart" if chart.wide else ""}" data-chart="{number}">'
        f"<figcaption><h3>{_text(chart.title)}</h3>{note}{_legend(chart)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(_spoken(chart))}">'
        f'<g class="axes">{_axes(chart, last_step)}</g>'
        f'<svg class="plot" {plot} viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none">{inner}</svg>'
        "</svg></figure>"
    )


def data_of(chart: Chart) -> dict[str, Any]:
    """What the script needs: bounds and, for every line, its values."""
    low, high = chart.bounds()
    return {
        "size": chart.size, "plot": [LEFT, TOP, RIGHT, BOTTOM], "edge": EDGE, "bounds": [low, high],
        "log": chart.logarithmic, "unit": chart.unit, "lines": [_values(chart, line) for line in chart.lines],
    }  # fmt: skip


def _values(chart: Chart, line: Line) -> dict[str, Any]:
    points = line.points
    found: dict[str, Any] = {
        "label": shown(line.label), "steps": points.steps.tolist(), "mean": _short(points.mean),
    }  # fmt: skip
    if points.thinned:
        found |= {"low": _short(points.low), "high": _short(points.high)}
    running = points.running_mean() if chart.smooth else None
    return found | ({} if running is None else {"running": _short(running)})


def _short(values: Rows) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _note(chart: Chart) -> str:
    parts = [chart.note] if chart.note else []
    if chart.logarithmic:
        parts.append("logarithmic")
    spans = [line.points.span for line in chart.lines if line.points.thinned]
    if spans:
        parts.append(f"up to {max(spans)} steps a point, which is their mean; band: least to greatest")
    return "; ".join(parts)


def _spoken(chart: Chart) -> str:
    """For whoever does not see it."""
    ends = [
        f"{line.label} {line.points.mean[0]:.4g} at step {line.points.steps[0]:.0f}, {line.points.mean[-1]:.4g} at step "
        f"{line.points.steps[-1]:.0f}"
        for line in chart.lines
    ]
    return f"{chart.title}: {'; '.join(ends)}"


def _legend(chart: Chart) -> str:
    if len(chart.lines) == 1:
        return ""
    buttons = [
        f'<button type="button" class="{line.classes}" data-line="{number}" aria-pressed="true">'
        f'<svg viewBox="0 0 22 8"><path d="M1 4h20"/></svg>{_text(line.label)}</button>'
        for number, line in enumerate(chart.lines)
    ]
    return f'<div class="legend">{"".join(buttons)}</div>'


def _axes(chart: Chart, last_step: int) -> str:
    width, height = chart.size
    low, high = chart.bounds()
    foot, inner = height - BOTTOM, (width - LEFT - RIGHT, height - TOP - BOTTOM)
    parts = []
    for value in ticks(low, high, whole=chart.logarithmic):
        y = foot - inner[1] * (value - low) / (high - low)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/><text class="mark" '
            f'x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_text(_written(chart, value))}</text>'
        )
    for step in ticks(0, max(last_step, 1), whole=True):
        x = LEFT + inner[0] * step / max(last_step, 1)
        anchor = "end" if x > width - EDGE else "middle"
        parts.append(f'<text class="mark" x="{x:.1f}" y="{foot + 18}" text-anchor="{anchor}">{step:.0f}</text>')
    return "".join(parts)


def _written(chart: Chart, value: float) -> str:
    unit = f" {chart.unit}" if chart.unit else ""
    return f"{10.0**value:.3g}{unit}" if chart.logarithmic else f"{value:.5g}{unit}"


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Some two to six multiples of 1, 2 or 5 times a power of ten; ``whole``: of at least 1."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _line(chart: Chart, line: Line, *, number: int, last_step: int) -> str:
    points, low_high = line.points, chart.bounds()

    def place(values: Rows) -> list[str]:
        x = SIDE * points.steps / max(last_step, 1)
        up = (np.log10(values) if chart.logarithmic else values) - low_high[0]
        y = SIDE * (1 - up / (low_high[1] - low_high[0]))
        return [f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist())]

    running = points.running_mean() if chart.smooth else None
    parts = []
    if points.thinned:
        parts.append(f'<path class="band" d="M{"L".join(place(points.high) + place(points.low)[::-1])}Z"/>')
    own = place(points.mean)
    parts.append(f'<path class="{"line" if running is None else "line faint"}" d="M{"L".join(own)}"/>')
    if len(own) <= 40:  # few enough to be told apart
        parts.append(f'<path class="dots" d="{"".join(f"M{at}h0" for at in own)}"/>')
    if running is not None:
        parts.append(f'<path class="line bold" d="M{"L".join(place(running))}"/>')
    return f'<g class="{line.classes}" data-line="{number}">{"".join(parts)}</g>'


def _marks(marks: Marks, last_step: int) -> str:
    top = 0 if marks.kind == "start" else SIDE - SIDE // 40
    drawn = "".join(f"M{SIDE * step / max(last_step, 1):.1f} {top}V{SIDE}" for step in marks.steps)
    return f'<path class="{marks.kind} c{marks.colour % COLOURS}" d="{drawn}"/>' if drawn else ""


def _text(text: str) -> str:
    return escape(shown(text))
