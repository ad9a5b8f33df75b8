"""Plain figures as inline SVG, for pages that open without a network; colours are the page's CSS classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, LEFT, WIDTH, RIGHT, TOP, BOTTOM = 26, 190, 520, 90, 14, 34
"""Pixels: height of a row, room for labels, the plot, room for values, margins."""


@dataclass(frozen=True)
class Bar:
    """A value with its label, what is written beside it, a class of its colour and, if any, what it should be."""

    label: str
    value: float
    text: str
    kind: str = "good"
    expected: float | None = None


def log_dots(bars: Sequence[Bar], *, limit: float, title: str) -> str:
    """One dot per bar on a logarithmic axis, with a line at ``limit``. Zero stands at the axis' left end."""
    positive = [bar.value for bar in bars if 0 < bar.value < math.inf]
    low = math.floor(math.log10(min([*positive, limit]))) - 1
    high = math.ceil(math.log10(max([*positive, limit]))) + 1

    def x(value: float) -> float:
        power = math.log10(value) if 0 < value < math.inf else (low if value <= 0 else high)
        return LEFT + WIDTH * (power - low) / (high - low)

    step = max(1, (high - low) // 8)
    marks = [(x(10.0**power), f"1e{power}") for power in range(low, high + 1, step)]
    line = f'<line class="limit" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{TOP}" y2="{TOP + ROW * len(bars)}"/>'
    rows = [
        f'<line class="stem" x1="{LEFT}" x2="{x(bar.value):.1f}" y1="{y}" y2="{y}"/>'
        f'<circle class="{bar.kind}" cx="{x(bar.value):.1f}" cy="{y}" r="5"/>{_labels(bar, y)}'
        for bar, y in zip(bars, _middles(bars))
    ]
    return _figure([line, *rows], marks, rows=len(bars), title=title)


def bars_against(bars: Sequence[Bar], *, unit: str, title: str) -> str:
    """Bars from zero, each with a tick where it should end."""
    most = max(max(bar.value, bar.expected or 0.0) for bar in bars) or 1.0
    scale = WIDTH / most
    marks = [(LEFT + WIDTH * part / 4, f"{most * part / 4:.3g} {unit}") for part in range(5)]
    rows = []
    for bar, y in zip(bars, _middles(bars)):
        at = LEFT + (bar.expected or 0.0) * scale
        rows.append(
            f'<rect class="{bar.kind}" x="{LEFT}" y="{y - 7}" width="{bar.value * scale:.1f}" height="14" rx="3"/>'
            f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 11}" y2="{y + 11}"/>{_labels(bar, y)}'
        )
    return _figure(rows, marks, rows=len(bars), title=title)


def _middles(bars: Sequence[Bar]) -> list[float]:
    return [TOP + ROW * (row + 0.5) for row in range(len(bars))]


def _labels(bar: Bar, y: float) -> str:
    return (
        f'<text class="label" x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(bar.label)}</text>'
        f'<text class="value" x="{LEFT + WIDTH + 12}" y="{y + 4}">{escape(bar.text)}</text>'
    )


def _figure(parts: Sequence[str], marks: Sequence[tuple[float, str]], *, rows: int, title: str) -> str:
    foot = TOP + ROW * rows
    grid = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{foot}"/>'
        f'<text class="mark" x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{escape(text)}</text>'
        for x, text in marks
    ]
    size = f"0 0 {LEFT + WIDTH + RIGHT} {foot + BOTTOM}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(title)}">{"".join([*grid, *parts])}</svg>'
