"""The page of launch/report.py: one file, without a network. All that comes from a run is text in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

import yaml

from cogvideo_dist.data.remote import without_secrets
from cogvideo_dist.data.shards import shown
from cogvideo_dist.engine.manifest import flat
from launch.figures import STYLE, Bar, bars_against, html_table
from launch.report_charts import COLOURS, Chart, data_of, draw
from launch.report_films import NAMES, Shown
from launch.report_read import RunFacts, Save
from launch.report_script import SCRIPT
from launch.report_specs import (
    DATA,
    LOSS,
    MEMORY,
    OPTIMIZER,
    OTHERS,
    SPEED,
    TRAFFIC,
    charts_by_section,
    checkpoint_charts,
    traffic,
)

LATEST, MOST_ROWS, MOST_BARS, MOST_TEXT = 12, 500, 24, 400
"""Rows of a long table that are seen at once, rows of it in all, bars of a figure, characters of a text."""

HINT = (
    "Bold: the running mean over a twentieth of the points. Dashed: a start that went on; marks at the foot: checkpoints. Drag "
    "across a chart to look at its steps in all charts, double-click to see all steps again."
)

LOOK = """
:root{color-scheme:light dark;
--c0:#1f6fb2;--c1:#d1592a;--c2:#2f7d6b;--c3:#9a4fb5;--c4:#b3862b;--c5:#c2417a;--c6:#5b6bd6;--c7:#6f7d2b}
@media(prefers-color-scheme:dark){:root{--c0:#6cb2ee;--c1:#f08c5d;--c2:#56b89f;--c3:#c48be0;--c4:#d9b25c;--c5:#ee86b4;
--c6:#98a4f5;--c7:#b3c25e}}
main{max-width:1180px}h3{margin:0;font-size:14px;font-weight:600}nav{display:flex;flex-wrap:wrap;gap:2px 14px;margin-top:10px;
font-size:13px}nav a{color:var(--quiet)}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}.c7{color:var(--c7)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin-top:14px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:10px 14px;min-width:0}
.tiles b{display:block;font-size:19px;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tiles span{color:var(--quiet);font-size:12px}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:22px 26px;margin-top:12px}
.chart{margin:0;min-width:0;display:flex;flex-direction:column}.chart>svg{margin-top:auto}.wide-chart{grid-column:1/-1}
@media(max-width:820px){.charts{grid-template-columns:minmax(0,1fr)}}
.chart>svg{cursor:crosshair;touch-action:pan-y;user-select:none}
.plot{overflow:visible}.zoomed .plot{overflow:hidden}
.plot path{fill:none;stroke:currentColor;stroke-width:1.6;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.plot .band{fill:currentColor;stroke:none;opacity:.18}.plot .faint{stroke-width:1;opacity:.4}.plot .bold{stroke-width:2.4}
.plot .dots{stroke-width:6;stroke-linecap:round}.plot .start{stroke-dasharray:4 4;stroke-width:1.2;opacity:.8}
.plot .save{stroke-width:2}.d1 .line,.d1>svg path{stroke-dasharray:7 4}.d2 .line,.d2>svg path{stroke-dasharray:2 3}
.d3 .line,.d3>svg path{stroke-dasharray:10 3 2 3}.gone{display:none}
.hair{stroke:var(--quiet);stroke-width:1;pointer-events:none}.chosen{fill:var(--quiet);opacity:.2;pointer-events:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;margin-top:2px}
.legend button,#reset,#play{border:0;background:none;padding:1px 0;cursor:pointer;font:12px system-ui,sans-serif}
.legend button[aria-pressed=false]{opacity:.35}
.legend svg,.key svg{display:inline-block;width:22px;height:8px;margin:0 5px 1px 0}
.legend path,.key path{stroke:currentColor;stroke-width:2.4;fill:none}
#reset,#play{background:var(--ink);color:var(--card);border-radius:99px;padding:5px 14px}
#reset{position:fixed;right:18px;bottom:18px;z-index:2}#reset[hidden]{display:none}
.tip{position:absolute;display:none;z-index:3;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:6px 10px;font-size:12px;pointer-events:none;max-width:420px;box-shadow:0 4px 18px #0003}
.tip i{display:inline-block;width:9px;height:9px;border-radius:9px;background:currentColor;margin-right:6px}
.bars{max-width:800px}.charts+*{margin-top:22px}
.films{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:16px;margin-top:10px}
.films figure{margin:0;font-size:12px;min-width:0}.films video{width:100%;border-radius:8px;display:block;background:#0002}
figcaption{overflow-wrap:anywhere}details{margin-top:8px}
h4{margin:14px 0 0;font-size:13px}
"""

KEY = '<svg viewBox="0 0 22 8"><path d="M1 4h20"/></svg>'

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
"""Nothing is fetched, and of scripts only ours runs, whatever a run has written."""


class Charts:
    """Draws charts and keeps their numbers for the script."""

    def __init__(self, last_step: int) -> None:
        self.last_step, self.kept = last_step, list[dict[str, Any]]()

    def grid(self, charts: Sequence[Chart]) -> str:
        drawn = []
        for chart in charts:
            drawn.append(draw(chart, number=len(self.kept), last_step=self.last_step))
            self.kept.append(data_of(chart))
        return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""

    def data(self) -> str:
        """JSON that ends no element of the page."""
        text = json.dumps({"last_step": self.last_step, "charts": self.kept}, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(runs: Sequence[RunFacts], films: Sequence[Sequence[Shown]]) -> str:
    charts, by_section = Charts(max(run.last_step for run in runs)), charts_by_section(runs)

    def drawn(section: str) -> str:
        return charts.grid(by_section.get(section, []))

    sections = [
        (LOSS, drawn(LOSS), HINT),
        ("Samples", _films(runs, films), f"the newest step first; of a step {NAMES} videos at most"),
        *((title, drawn(title), "") for title in (OPTIMIZER, SPEED, MEMORY)),
        (TRAFFIC, drawn(TRAFFIC) + _traffic(runs), ""),
        ("Checkpoints", charts.grid(checkpoint_charts(runs)) + _each(runs, _saves), ""),
        ("Starts", _each(runs, _starts), "lost: steps that were logged before and are made again"),
        (DATA, drawn(DATA) + _each(runs, _defects), ""),
        ("Where it comes from", _each(runs, _origin), ""),
        (OTHERS, drawn(OTHERS), ""),
        ("Configuration", _differences(runs) + _each(runs, _config), ""),
    ]
    there = [(title, content, note) for title, content, note in sections if content]
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, *_ in there)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text("Training: " + ", ".join(run.label for run in runs))}</title><style>{STYLE}{LOOK}</style>
</head><body><main>
<header><h1>Training report</h1>{_head(runs)}<nav>{links}</nav>{_problems(runs)}</header>
{"".join(_section(title, content, note) for title, content, note in there)}
</main><button type="button" id="reset" hidden></button>
<script type="application/json" id="data">{charts.data()}</script>
<script>{SCRIPT}</script>
</body></html>
"""


def _plain(text: object) -> str:
    """As one line, without secrets; what is longer than a page takes is cut."""
    line = shown(" ".join(without_secrets(str(text)).split()))
    return line if len(line) <= MOST_TEXT else line[:MOST_TEXT] + " ..."


def _text(text: object) -> str:
    """What looks like HTML in it is shown, not obeyed."""
    return escape(_plain(text))


def _section(title: str, content: str, note: str) -> str:
    quiet = f'<p class="quiet">{_text(note)}</p>' if note else ""
    return f'<section id="{_anchor(title)}"><h2>{_text(title)}</h2>{quiet}{content}</section>'


def _anchor(title: str) -> str:
    return "section-" + title.lower().replace(" ", "-")


def _each(runs: Sequence[RunFacts], part: Callable[[RunFacts], str]) -> str:
    """A part for every run, under its name where there are several."""
    found = [(run, part(run)) for run in runs]
    if not any(content for _, content in found):
        return ""
    if len(runs) == 1:
        return found[0][1]
    return "".join(
        f'<h4 class="{_colour(n)}">{_text(run.label)}</h4>{content or "-"}' for n, (run, content) in enumerate(found)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first rows, and the others on demand; they are as many as a page takes."""
    cells = [[_plain(cell) for cell in row] for row in rows[:MOST_ROWS]]
    drawn = f'<div class="wide">{html_table(head, cells[:LATEST])}</div>'
    if len(rows) > LATEST:
        beyond = f", {len(rows) - MOST_ROWS} beyond them are left out" if len(rows) > MOST_ROWS else ""
        drawn += (
            f"<details><summary>{len(cells) - LATEST} more{beyond}</summary>"
            f'<div class="wide">{html_table(head, cells[LATEST:])}</div></details>'
        )
    return drawn


def _head(runs: Sequence[RunFacts]) -> str:
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(
            f"<div><span>{_text(name)}</span><b>{_text(value)}</b></div>" for name, value in facts[0].items()
        )
        return f'<p class="quiet">{_text(runs[0].folder)}</p><div class="tiles">{tiles}</div>'
    names = list(dict.fromkeys(name for mine in facts for name in mine))
    keys = "".join(f'<th class="key {_colour(n)}">{KEY}{_text(run.label)}</th>' for n, run in enumerate(runs))
    rows = [f"<tr><td>{_text(name)}</td>{_cells(mine.get(name, '-') for mine in facts)}</tr>" for name in names]
    rows.append(f"<tr><td>folder</td>{_cells(str(run.folder) for run in runs)}</tr>")
    body = f"<thead><tr><th></th>{keys}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<section class="wide"><table>{body}</table></section>'


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{_text(value)}</td>" for value in values)


def _colour(number: int) -> str:
    """A run's."""
    return f"c{number % COLOURS}"


def _facts(run: RunFacts) -> dict[str, str]:
    """What one looks for first."""
    found = {"step": str(run.last_step) + (f" of {run.steps}" if run.steps is not None else "")}

    def add(label: str, name: str, form: Callable[[float], str]) -> None:
        if name in run.curves and run.curves[name].last[0] >= 0:
            found[label] = form(run.curves[name].last[1])

    if "loss" in run.curves and run.curves["loss"].last[0] >= 0:
        points = run.curves["loss"].points()
        running = points.running_mean()
        found["loss" if running is None else "loss, running mean"] = (
            f"{float((points.mean if running is None else running)[-1]):.4g}"
        )
    add("held-out loss", "held_out/loss", lambda v: f"{v:.4g}")
    if "held-out loss" in found:
        points = run.curves["held_out/loss"].points()
        best = int(points.low.argmin())
        found["best held-out loss"] = f"{points.low[best]:.4g} at step {points.steps[best]:.0f}"
    add("clips seen, earlier stages too", "lineage/samples", lambda v: f"{v:,.0f}")
    add("time of a step", "throughput/step_s", lambda v: f"{v:.3g} s")
    add("MFU", "throughput/mfu", lambda v: f"{v:.1%}")
    add("waiting for data", "data/loader_wait_share", lambda v: f"{v:.1%}")
    add("peak memory", "memory/peak_gib", lambda v: f"{v:.3g} GiB")
    add("padding", "data/padding_share", lambda v: f"{v:.1%}")
    if run.starts:
        found["starts"] = f"{len(run.starts)}, {sum(begun.lost for begun in run.starts)} steps lost"
    if run.saves:
        found["checkpoints"] = f"{len(run.saves)}, {sum(save.kept for save in run.saves)} kept"
    if run.reasons:
        found["defects of data"] = f"{sum(reason.count for reason in run.reasons.values()):,}"
    return found


def _problems(runs: Sequence[RunFacts]) -> str:
    items = "".join(f"<li>{_text(problem)}</li>" for run in runs for problem in run.problems)
    return f'<section><h2 class="warning">What could not be read</h2><ul>{items}</ul></section>' if items else ""


def _films(runs: Sequence[RunFacts], films: Sequence[Sequence[Shown]]) -> str:
    """Those of one caption together: every run's, the newest step first."""
    by_caption: dict[tuple[str, str], list[str]] = {}
    for run, mine in zip(runs, films):
        for each in mine:
            of = "" if len(runs) == 1 else f"{run.label}, "
            by_caption.setdefault((each.film.name, each.film.caption), []).append(_film(each, of=of))
    parts = [
        f'<h4>{_text(caption or name)}</h4><div class="films">{"".join(cells)}</div>'
        for (name, caption), cells in by_caption.items()
    ]
    return f'<button type="button" id="play">play all</button>{"".join(parts)}' if parts else ""


def _film(each: Shown, *, of: str) -> str:
    place = f"<figcaption>{_text(f'{of}step {each.film.step}')}</figcaption>"
    if each.why:
        return (
            f'<figure><p class="quiet">{_text(each.film.path)} is not embedded: {_text(each.why)}</p>{place}</figure>'
        )
    return f'<figure><video controls loop muted playsinline preload="auto" src="{each.url}"></video>{place}</figure>'


def _traffic(runs: Sequence[RunFacts]) -> str:
    bars = [
        Bar(shown(axis if len(runs) == 1 else f"{run.label}: {axis}")[:24], value, f"{value:.4g} MB")
        for run in runs
        for axis, value in sorted(traffic(run).items(), key=lambda item: -item[1])
    ]
    title = "Sent by the first rank in a step, by axis"
    return f"<h3>{title}</h3>{_bars(bars, unit='MB', title=title)}" if bars else ""


def _bars(bars: Sequence[Bar], *, unit: str, title: str) -> str:
    return f'<div class="bars">{bars_against(bars[:MOST_BARS], unit=unit, title=title)}</div>'


def _saves(run: RunFacts) -> str:
    stalls = any(save.stall is not None for save in run.saves)
    head = ("step", "committed", "size", "seconds", *(("still",) if stalls else ()), "there")
    rows = [_save(save, stalls=stalls) for save in reversed(run.saves)]
    return _table(head, rows) if rows else ""


def _save(save: Save, *, stalls: bool) -> list[str]:
    still = [] if not stalls else ["-" if save.stall is None else f"{save.stall:.3f}"]
    seconds = f"{save.seconds:.3f}"
    return [str(save.step), _when(save.time), _size(save.bytes), seconds, *still, "yes" if save.kept else "deleted"]


def _starts(run: RunFacts) -> str:
    rows = [(str(begun.step), _when(begun.time), str(begun.lost), begun.host) for begun in reversed(run.starts)]
    return _table(("after step", "at", "lost", "host of the first rank"), rows) if rows else ""


def _defects(run: RunFacts) -> str:
    most = sorted(run.reasons.items(), key=lambda item: -item[1].count)
    if not most:
        return ""
    bars = [Bar(_plain(name)[:26], reason.count, str(reason.count), "other") for name, reason in most]
    rows = [(name, str(reason.count), str(reason.replaced), *reason.example) for name, reason in most]
    head = ("kind", "samples", "replaced by others", "for example", "source", "reason")
    return _bars(bars, unit="", title="defects by kind") + _table(head, rows)


def _origin(run: RunFacts) -> str:
    stages = [
        (stage.run, str(stage.step), f"{stage.samples:,}", stage.weights, stage.sha256[:16])
        for stage in run.lineage.ancestors
    ]
    sources = [tuple(source.get(key, "-") for key in ("shards", "samples", "digest", "drawn")) for source in run.data]
    made = run.made_with
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        ("stages before it", ("run", "steps", "clips", "weights taken", "SHA-256"), stages),
        ("data", ("shards", "samples", "index", "clips drawn"), sources),
        ("newest checkpoint", [_plain(name) for name in made], [list(made.values())] if made else []),
    ]
    return "".join(f"<h3>{title}</h3>{_table(head, rows)}" for title, head, rows in tables if rows)


def _differences(runs: Sequence[RunFacts]) -> str:
    """Keys that the runs do not have alike."""
    if len(runs) == 1:
        return ""
    flats = [flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for each in flats for key in each))
    rows = [
        (key, *(str(each.get(key, "-")) for each in flats))
        for key in keys
        if len({repr(e.get(key)) for e in flats}) > 1
    ]
    head = ("key", *(run.label for run in runs))
    return f"<h3>what differs</h3>{_table(head, rows)}" if rows else ""


def _config(run: RunFacts) -> str:
    lines = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=120).splitlines()
    text = "\n".join(escape(shown(without_secrets(line))) for line in lines)
    return f"<details><summary>as resolved</summary><pre>{text}</pre></details>"


def _when(seconds: float) -> str:
    """UTC; only of times that a clock may have shown."""
    if not 0 <= seconds < 4e9:
        return "-"
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or math.isnan(count):
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
