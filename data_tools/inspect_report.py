"""The data report for people: a table, and a page in one file that opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cogvideo_dist.data.shards import shown
from data_tools.inspect_clips import Picture
from data_tools.inspect_lint import LINT, REMARKS
from launch.figures import STYLE, Bar, bars_against, bubbles, columns, html_table

MOST_BARS, CAPTION = 24, 160
"""Bars of a figure, and characters of a caption below its picture."""

Data = Mapping[str, Any]

SHEET = """
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:14px;margin-top:10px}
figure{margin:0;font-size:12px;min-width:0}figure img{max-width:100%;border-radius:6px;display:block}
figcaption{overflow-wrap:anywhere}.two{display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow:hidden}
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def table(data: Data) -> str:
    """For a terminal."""
    about = data["set"]
    rows = [("size", "samples", "tokens", "of cost", "pixels kept", "seconds cut"), *map(size_cells, data["sizes"])]
    modes = mode_rows(data)
    lines = [
        f"{about['samples']} samples ({kinds_text(about)}), {bytes_text(about['bytes'])} in shards: {about['shards']}, "
        f"{about['hours']:.2f} hours; index {about['digest']}",
        *(
            f"source {source['shards']}: {source['training']} samples to train on, {source['epochs']:.2f} epochs"
            for source in data["sources"]
        ),
        *_aligned(rows),
        *_aligned([modes[0], *modes[1]]),
        *unused_lines(data),
    ]
    if data["lint"] is not None:
        lines += _aligned([("remark", "samples"), *((name, str(count)) for name, count in remark_rows(data))])
        lines += [data["lint"]["reach"]] if data["lint"]["reach"] else []
    return "\n".join(map(shown, lines))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def bytes_text(count: float) -> str:
    """1234567 -> 1.2 MB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def kinds_text(about: Data) -> str:
    return ", ".join(f"{facts['samples']} {name}s" for name, facts in about["kinds"].items())


def size_cells(facts: Data) -> tuple[str, ...]:
    if not facts["samples"]:
        return (times(facts["size"]), "0", str(facts["tokens"]), "0.0 %", "-", "-")
    return (
        times(facts["size"]), str(facts["samples"]), str(facts["tokens"]), f"{100 * facts['share_of_cost']:.1f} %",
        f"{100 * facts['pixels_kept']:.1f} %", f"{facts['seconds_cut']:.2f}",
    )  # fmt: skip


def times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def mode_rows(data: Data) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and a row for every way of packing."""
    modes = data["packing"]["modes"]
    ranks = list(modes[0]["balance"])
    head = (
        "mode", "fill", "emptiest", "clips a step", *(f"worst rank, dp {number}" for number in ranks), "wait", "longest",
    )  # fmt: skip
    rows = []
    for mode in modes:
        balance = [f"+{100 * (mode['balance'][number]['mean'] - 1):.2f} %" for number in ranks]
        rows.append((
            mode["mode"] + (" (this run)" if mode is modes[0] else ""), f"{100 * mode['fill']['mean']:.2f} %",
            f"{100 * mode['fill']['least']:.1f} %", f"{mode['clips_per_step']:.1f}", *balance,
            f"{mode['wait']['mean']:.2f} steps", f"{mode['wait']['most']} steps",
        ))  # fmt: skip
    return head, rows


def unused_lines(data: Data) -> list[str]:
    unused = data["unused"]
    lines = [f"dropped {facts['count']}: {name}" for name, facts in unused["reasons"].items()]
    if not lines:
        lines = ["nothing is dropped"]
    if unused["left_out_by_score"]:
        lines.append(f"left out by their score: {unused['left_out_by_score']}")
    if unused["empty_captions"]:
        lines.append(
            f"captions that are empty: {unused['empty_captions']}; they are replaced when they are read, since "
            "data.empty_captions is off"
        )
    captions = data["captions"]
    if captions["unreadable_count"]:
        lines.append(f"captions that cannot be read: {captions['unreadable_count']} of {captions['read']}")
    if captions["cut"]:
        lines.append(f"captions longer than {captions['limit']} tokens: {captions['cut']} of {captions['counted']}")
    bad = sum(bool(picture["defect"]) for picture in data["pictures"])
    if bad:
        lines.append(f"pictures that cannot be decoded: {bad} of {len(data['pictures'])}")
    return lines


def remark_rows(data: Data) -> list[tuple[str, int]]:
    return [(name, data["lint"]["remarks"].get(name, 0)) for name in REMARKS]


def page(data: Data, pictures: Sequence[Picture]) -> str:
    about, run = data["set"], data["run"]
    lead = (
        f"{run['class']}, {run['dir']}: {about['samples']} samples ({kinds_text(about)}), {bytes_text(about['bytes'])} in "
        f"shards: {about['shards']}, {about['hours']:.2f} hours of video; index {about['digest']}"
    )
    parts = (
        _sources(data), _histograms(data), _shapes(data), _sizes(data), _packing(data), _unused(data), _lint(data),
        _sheet(pictures),
    )  # fmt: skip
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data report</title><style>{STYLE}{SHEET}</style>
</head><body><main>
<header><h1>Data report</h1><p class="quiet">{_text(lead)}</p></header>
{"".join(parts)}
</main></body></html>
"""


def _text(text: str) -> str:
    return escape(shown(text))


def _section(title: str, content: str, note: str = "") -> str:
    quiet = f'<p class="quiet">{_text(note)}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{quiet}{content}</section>" if content else ""


def _wide(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f'<div class="wide">{html_table(head, [list(map(shown, row)) for row in rows])}</div>'


def _sources(data: Data) -> str:
    rows = [
        (
            source["shards"], f"{100 * source['share']:.1f} %", str(source["samples"]), str(source["training"]),
            bytes_text(source["bytes"]), str(source["shard_files"]), f"{source['hours']:.2f}", f"{source['epochs']:.3g}",
        )
        for source in data["sources"]
    ]  # fmt: skip
    head = ("source", "of all draws", "samples", "to train on", "bytes", "shards", "hours", "epochs")
    note = f"epochs: how often each sample is seen by the run's last step; held out: {data['unused']['held_out']}"
    kinds = [
        (name, str(facts["samples"]), bytes_text(facts["bytes"]), f"{facts['hours']:.2f}")
        for name, facts in data["set"]["kinds"].items()
    ]
    return _section("The set", _wide(head, rows) + _wide(("kind", "samples", "bytes", "hours"), kinds), note)


def _histograms(data: Data) -> str:
    drawn, limit = data["histograms"], data["captions"]["limit"]
    lengths = sorted({(size[0] / data["data"]["fps"], f"{size[0]} frames") for size in data["data"]["sizes"]})
    lines = [(at, text) for at, text in lengths if at > 1 / data["data"]["fps"]]
    parts = [
        _columns("Duration", drawn["seconds"], unit="s", limits=lines),
        _bars("Frames per second", {f"{rate} frames/s": count for rate, count in drawn["fps"].items()}),
        _columns("Captions in characters", drawn["caption_characters"]),
    ]
    captions = data["captions"]
    if captions["counted"]:
        note = f"of {captions['counted']} samples; {captions['cut']} are longer than the text encoder takes"
        lines = [(limit, f"limit {limit}")]
        parts.append(_columns("Captions in tokens", drawn["caption_tokens"], limits=lines, note=note))
    elif captions["note"]:
        parts.append(_section("Captions in tokens", "<p>-</p>", captions["note"]))
    return "".join(parts)


def _columns(
    title: str, histogram: Data, *, unit: str = "", limits: Sequence[tuple[float, str]] = (), note: str = ""
) -> str:
    if not histogram["counts"]:
        return ""
    return _section(
        title, columns(histogram["edges"], histogram["counts"], unit=unit, title=title, limits=limits), note
    )


def _bars(title: str, counts: Mapping[str, int], note: str = "") -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    bars = [Bar(label, count, str(count)) for label, count in most[:MOST_BARS]]
    if len(most) > MOST_BARS:
        rest = sum(count for _, count in most[MOST_BARS:])
        bars.append(Bar("others", rest, str(rest)))
    return _section(title, bars_against(bars, unit="", title=title), note) if bars else ""


def _shapes(data: Data) -> str:
    square = data["shapes"]["square"]
    points = [
        (width + square / 2 - 0.5, height + square / 2 - 0.5, count)
        for height, width, count in data["shapes"]["counts"]
    ]
    legal = {(width, height) for _, height, width in data["data"]["sizes"]}
    crosses = [(width, height, f"{height} x {width}") for width, height in sorted(legal)]
    note = "width across, height up, in pixels; areas are counts, crosses the legal sizes"
    if square > 1:
        note += f"; counted in squares of {square} pixels"
    return _section("Heights and widths", bubbles(points, crosses=crosses, title="heights and widths"), note)


def _sizes(data: Data) -> str:
    bars = [Bar(times(facts["size"]), facts["samples"], str(facts["samples"])) for facts in data["sizes"]]
    head = ("frames x height x width", "samples", "tokens", "of cost", "pixels kept", "seconds cut")
    note = (
        "samples by the size they are used at; tokens: of a clip, its text among them; pixels kept: by the crop, in the mean; "
        f"seconds cut: at the end, in the mean, read at {data['data']['fps']:g} frames per second"
    )
    drawn = bars_against(bars, unit="", title="samples by size")
    return _section("Where sizes go", drawn + _wide(head, list(map(size_cells, data["sizes"]))), note)


def _packing(data: Data) -> str:
    packing = data["packing"]
    head, rows = mode_rows(data)
    note = (
        f"{packing['steps']} planned steps of {packing['packs_per_step']} packs of {packing['tokens_per_pack']} tokens. "
        "Fill: share of the tokens that clips take. Worst rank: its cost above the mean rank's, averaged over steps: time "
        "that the others wait. Wait: from when a clip is drawn until it is used."
    )
    fills = [
        Bar(mode["mode"], 100 * mode["fill"]["mean"], f"{100 * mode['fill']['mean']:.2f} %", _kind(number), 100.0)
        for number, mode in enumerate(packing["modes"])
    ]
    uneven = [
        Bar(f"{mode['mode']}, dp {ranks}", excess, f"{excess:.2f} %", _kind(number))
        for ranks in packing["modes"][0]["balance"]
        for number, mode in enumerate(packing["modes"])
        for excess in (max(0.0, 100 * (mode["balance"][ranks]["mean"] - 1)),)
    ]
    waits = [
        Bar(steps, count, str(count)) for steps, count in list(data["histograms"]["wait_steps"].items())[:MOST_BARS]
    ]
    return (
        _section("Packs", _wide(head, rows), note)
        + _section("Fill", bars_against(fills, unit="%", title="fill"))
        + _section("Cost of the worst rank above the mean", bars_against(uneven, unit="%", title="balance"))
        + _section(
            "How long clips wait", bars_against(waits, unit="", title="waits"), "clips by steps from draw to use"
        )
    )


def _kind(number: int) -> str:
    return "good" if number == 0 else "other"


def _unused(data: Data) -> str:
    rows = [
        (name, str(facts["count"]), example["key"], example["source"], example["reason"])
        for name, facts in data["unused"]["reasons"].items()
        for example in facts["examples"]
    ]
    items = "".join(f"<li>{_text(line)}</li>" for line in unused_lines(data))
    listed = _wide(("why", "samples", "for example", "source", "reason"), rows) if rows else ""
    return _section("What is not used as it is", f"<ul>{items}</ul>{listed}")


def _lint(data: Data) -> str:
    if data["lint"] is None:
        return ""
    rows = [(name, str(count), REMARKS[name]) for name, count in remark_rows(data)]
    note = f"{data['lint']['samples']} samples with remarks, a line each in {LINT}. {data['lint']['reach']}"
    return _section("Remarks", _wide(("remark", "samples", "its value"), rows), note)


def _sheet(pictures: Sequence[Picture]) -> str:
    cells = "".join(map(_cell, pictures))
    return _section(
        "Samples", f'<div class="sheet">{cells}</div>' if cells else "", "centre frames, evenly spaced over the set"
    )


def _cell(picture: Picture) -> str:
    source = base64.b64encode(picture.jpeg).decode()
    image = (
        f'<img alt="" src="data:image/jpeg;base64,{source}">'
        if source
        else f"<p class=warning>{_text(picture.defect)}</p>"
    )
    caption = picture.caption[:CAPTION].replace("\n", " ")
    return (
        f'<figure>{image}<figcaption><span class="quiet">{_text(picture.key)}<br>{times(picture.size)}</span>'
        f'<span class="two">{_text(caption)}</span></figcaption></figure>'
    )
