"""Plain figures as inline SVG, for pages that open without a network, and the pages' style with the figures' colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, LEFT, WIDTH, RIGHT, TOP, BOTTOM = 26, 190, 520, 90, 14, 34
"""Pixels: height of a row, room for labels, the plot, room for values, margins."""
FULL, MARGIN, PLOT = LEFT + WIDTH + RIGHT, 60, 150
"""Pixels of plots with two axes: their width, room on either side, and height."""


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
    """Bars from zero, with a tick where one should end."""
    most = max(max(bar.value, bar.expected or 0.0) for bar in bars) or 1.0
    scale = WIDTH / most
    marks = [(LEFT + WIDTH * part / 4, f"{most * part / 4:.3g} {unit}") for part in range(5)]
    rows = []
    for bar, y in zip(bars, _middles(bars)):
        rows.append(
            f'<rect class="{bar.kind}" x="{LEFT}" y="{y - 7}" width="{bar.value * scale:.1f}" height="14" rx="3"/>'
            f"{_labels(bar, y)}"
        )
        if bar.expected is not None:
            at = LEFT + bar.expected * scale
            rows.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 11}" y2="{y + 11}"/>')
    return _figure(rows, marks, rows=len(bars), title=title)


def columns(
    edges: Sequence[float], counts: Sequence[int], *, unit: str, title: str, limits: Sequence[tuple[float, str]] = ()
) -> str:
    """A histogram: a column between each two neighbours of ``edges``, and lines with labels at ``limits``."""
    low, high = min([edges[0], *(at for at, _ in limits)]), max([edges[-1], *(at for at, _ in limits)])
    most, foot = max(counts), TOP + PLOT

    def x(value: float) -> float:
        return MARGIN + (FULL - 2 * MARGIN) * (value - low) / ((high - low) or 1.0)

    parts = [
        f'<rect class="good" x="{x(a):.1f}" width="{max(x(b) - x(a) - 1, 1):.1f}" y="{foot - PLOT * count / most:.1f}" '
        f'height="{PLOT * count / most:.1f}"><title>{a:g} to {b:g} {escape(unit)}: {count}</title></rect>'
        for a, b, count in zip(edges, edges[1:], counts)
        if count
    ]
    parts += [
        f'<line class="limit" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{foot}"/>'
        f'<text class="mark" x="{x(at):.1f}" y="{TOP - 3}" text-anchor="middle">{escape(text)}</text>'
        for at, text in limits
    ]
    across = [(x(value), f"{value:.6g} {unit}") for value in _round_values(low, high)]
    up = [(foot - PLOT * value / most, f"{value:.6g}") for value in _round_values(0, most)]
    return _plot(parts, across, up=up, title=title)


def bubbles(
    points: Sequence[tuple[float, float, int]], *, crosses: Sequence[tuple[float, float, str]], title: str
) -> str:
    """Discs whose areas are counts, and crosses with labels; both axes begin at zero and have one unit."""
    wide = max(at for at, *_ in [*points, *crosses]) * 1.08
    high = max(at for _, at, _ in [*points, *crosses]) * 1.08
    most, foot = max(count for *_, count in points), TOP + 2 * PLOT

    def place(across: float, up: float) -> tuple[float, float]:
        return MARGIN + (FULL - 2 * MARGIN) * across / wide, foot - 2 * PLOT * up / high

    parts = []
    for across, up, count in points:
        (x, y), radius = place(across, up), 3 + 19 * math.sqrt(count / most)
        parts.append(
            f'<circle class="good faint" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
            f"<title>{across:g} x {up:g}: {count}</title></circle>"
        )
    for across, up, text in crosses:
        x, y = place(across, up)
        parts.append(f'<path class="cross" d="M{x - 5:.1f} {y:.1f}h10m-5 -5v10"/>')
        parts.append(f'<text class="mark" x="{x + 7:.1f}" y="{y + 13:.1f}">{escape(text)}</text>')
    sides = [(place(value, 0)[0], f"{value:.6g}") for value in _round_values(0, wide)]
    ups = [(place(0, value)[1], f"{value:.6g}") for value in _round_values(0, high)]
    return _plot(parts, sides, up=ups, title=title)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as text; what looks like HTML in them is shown, not obeyed."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _round_values(low: float, high: float) -> list[float]:
    """Some three to seven multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _plot(
    parts: Sequence[str], across: Sequence[tuple[float, str]], *, up: Sequence[tuple[float, str]], title: str
) -> str:
    """An axis below and one on the left, as (pixel, text) each."""
    foot = max(y for y, _ in up)
    grid = [
        f'<line class="grid" x1="{MARGIN}" x2="{FULL - MARGIN}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="mark" x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        for y, text in up
    ]
    grid += [
        f'<text class="mark" x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{escape(text)}</text>'
        for x, text in across
    ]
    size = f"0 0 {FULL} {foot + BOTTOM}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(title)}">{"".join([*grid, *parts])}</svg>'


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


STYLE = """
:root{--ink:#1c2430;--quiet:#68748a;--paper:#f5f6f9;--card:#fff;--line:#e3e7ee;--good:#2f7d6b;--bad:#c8452f;--limit:#b3862b}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf2;--quiet:#96a1b5;--paper:#12161d;--card:#1a2029;--line:#2c3440;
--good:#56b89f;--bad:#ee7a64;--limit:#d9b25c}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
main{max-width:920px;margin:0 auto;padding:40px 20px 64px}header{margin-bottom:28px}h1{margin:10px 0 4px;font-size:30px}
h2{margin:0 0 4px;font-size:17px}p{margin:4px 0}.quiet{color:var(--quiet);font-size:13px}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px 22px;margin:16px 0}
.badge{padding:3px 12px;border-radius:99px;color:#fff;font-size:13px;font-weight:600}.badge.good{background:var(--good)}
.badge.bad{background:var(--bad)}.warning{color:var(--bad);font-weight:600}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--quiet);font-weight:500}tr.bad td{color:var(--bad)}ul{padding-left:18px;margin:6px 0}
pre{overflow-x:auto;font:12px/1.5 ui-monospace,monospace}summary{cursor:pointer;color:var(--quiet)}
svg{width:100%;height:auto;display:block;margin-top:8px;font:12px system-ui,sans-serif;font-variant-numeric:tabular-nums}
svg text{fill:var(--ink)}svg .mark,svg .value{fill:var(--quiet)}svg .grid{stroke:var(--line)}
svg .stem{stroke:var(--line);stroke-width:2}svg .limit{stroke:var(--limit);stroke-width:2;stroke-dasharray:5 4}
svg .tick{stroke:var(--ink);stroke-width:2}svg .good{fill:var(--good)}svg .bad{fill:var(--bad)}
svg .other{fill:var(--quiet)}svg .faint{fill-opacity:.55}svg .cross{stroke:var(--bad);stroke-width:2;fill:none}
"""
