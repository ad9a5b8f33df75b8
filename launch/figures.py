"""Plain figures as inline SVG, for pages that open without a network, and the pages' style with the figures' colours."""

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
"""
