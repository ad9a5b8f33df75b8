"""What launch/parity.py shows: a table, parity.json and parity.html, a page that needs no network."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.config.load import to_yaml
from cogvideo_dist.evaluation.media import replacing
from launch.figures import STYLE, Bar, bars_against, log_dots
from launch.parity_steps import Job
from launch.parity_verdict import Tolerances, Verdict, Worst

COLUMNS = ("layout", "ranks", "loss", "gradient", "in", "weight", "norm", "bytes / formula", "verdict", "s")


@dataclass(frozen=True)
class Context:
    """What was asked of every layout, the single process's loss, and a warning for the page's head, if any."""

    job: Job
    loss: float
    tolerances: Tolerances
    warning: str = ""


def table(verdicts: Sequence[Verdict]) -> str:
    """For a terminal, with what is wrong below."""
    rows = [COLUMNS, *(cells(verdict) for verdict in verdicts)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [f"{verdict.layout}: {problem}" for verdict in verdicts for problem in verdict.problems]
    return "\n".join([*lines, summary(verdicts)])


def summary(verdicts: Sequence[Verdict]) -> str:
    wrong = [verdict.layout for verdict in verdicts if not verdict.passed]
    if wrong:
        return f"{len(wrong)} of {len(verdicts)} layouts are wrong: {', '.join(wrong)}"
    return f"all {len(verdicts)} layouts compute what one process computes"


def cells(verdict: Verdict) -> tuple[str, ...]:
    """One row, in the order of ``COLUMNS``."""
    sent = ", ".join(f"{s.axis} {s.operation} {s.measured / s.formula:.4f}" for s in verdict.sent)
    return (
        verdict.layout, str(verdict.ranks), number(verdict.loss), number(_error(verdict.gradient)),
        verdict.gradient.name if verdict.gradient else "-", number(_error(verdict.weight)), number(verdict.norm),
        sent or "-", "pass" if verdict.passed else "FAIL", f"{verdict.seconds:.1f}",
    )  # fmt: skip


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _error(found: Worst | None) -> float | None:
    return None if found is None else found.error


def write_report(out: Path, verdicts: Sequence[Verdict], *, context: Context) -> None:
    """parity.json and parity.html, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("parity.json", json.dumps(_finite(as_data(verdicts, context)), indent=1, allow_nan=False) + "\n"),
        ("parity.html", page(verdicts, context)),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def as_data(verdicts: Sequence[Verdict], context: Context) -> dict[str, Any]:
    """Everything the page shows, as plain values; a number that is none becomes null in the file."""
    job = context.job
    return {
        "passed": all(verdict.passed for verdict in verdicts),
        "warning": context.warning,
        "summary": summary(verdicts),
        "device": job.device,
        "gradient_dtype": str(job.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "steps": job.steps,
        "zero_stages": list(job.stages),
        "packs": [[list(size) for size in pack] for pack in job.packs],
        "tolerances": asdict(context.tolerances),
        "one_process_loss": context.loss,
        "layouts": [{"passed": verdict.passed, **asdict(verdict)} for verdict in verdicts],
        "config": asdict(job.config),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(verdicts: Sequence[Verdict], context: Context) -> str:
    job, passed = context.job, all(verdict.passed for verdict in verdicts)
    dtype, model = str(job.dtype).removeprefix("torch."), job.config.model
    figures = [
        _errors(verdicts, lambda v: _error(v.gradient), context.tolerances.gradient, f"Worst gradient error, {dtype}"),
        _errors(
            verdicts, lambda v: _error(v.weight), context.tolerances.weight, f"Worst weight error, {job.steps} steps"
        ),
        _traffic(verdicts),
    ]
    lead = (
        f"{model.preset}, {model.layers} layers, {job.config.model.transformer().heads} heads; ZeRO "
        f"{', '.join(map(str, job.stages))}; {len(job.packs)} packs a step around a video of "
        f"{' x '.join(map(str, max(job.packs[0])))}; {job.device}, torch {torch.__version__}."
    )
    warning = f'<p class="warning">{escape(context.warning)}</p>' if context.warning else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Parity of layouts</title><style>{STYLE}</style></head><body><main>
<header><span class="badge {"good" if passed else "bad"}">{"pass" if passed else "fail"}</span>
<h1>Parity of layouts</h1><p>{escape(summary(verdicts))}.</p><p class="quiet">{escape(lead)}</p>{warning}</header>
{_problems(verdicts)}
{"".join(figures)}
<section><h2>Every layout</h2><div class="wide">{_html_table(verdicts)}</div>
<p class="quiet">Errors are relative: of a gradient and of a weight to the parameter's largest element. Bytes are those a rank
sends for one layer and pack, forward and backward, divided by the formula's; sums of modulation gradients and DeepSpeed's
own traffic are not in them, and nothing is of a run of adapters.</p></section>
<section><h2>Configuration</h2><details><summary>as compared</summary><pre>{escape(to_yaml(job.config))}</pre></details>
</section></main></body></html>
"""


def _errors(
    verdicts: Sequence[Verdict], error_of: Callable[[Verdict], float | None], limit: float, title: str
) -> str:  # fmt: skip
    errors = [(verdict.layout, error_of(verdict)) for verdict in verdicts]
    bars = [
        Bar(layout, math.inf if math.isnan(error) else error, f"{error:.1e}", "good" if error <= limit else "bad")
        for layout, error in errors
        if error is not None
    ]
    drawn = log_dots(bars, limit=limit, title=title) if bars else ""
    return f'<section><h2>{escape(title)}</h2><p class="quiet">dashed: the tolerance, {limit:.0e}</p>{drawn}</section>'


def _traffic(verdicts: Sequence[Verdict]) -> str:
    bars = [
        Bar(
            f"{verdict.layout}: {s.axis}" + (f" {s.operation}" if s.axis == "tp" else ""), s.measured / 1e6,
            f"{s.measured / s.formula:.4f}", "good" if s.right else "bad", s.formula / 1e6,
        )
        for verdict in verdicts
        for s in verdict.sent
    ]  # fmt: skip
    if not bars:
        return ""
    drawn = bars_against(bars, unit="MB", title="Bytes sent per layer and rank")
    return f"""<section><h2>Bytes sent per layer and rank</h2>
<p class="quiet">tick: the formula; beside it, measured over formula</p>{drawn}</section>"""


def _problems(verdicts: Sequence[Verdict]) -> str:
    items = [
        f"<li><b>{escape(verdict.layout)}</b> {escape('; '.join(verdict.problems))}"
        + (
            f"<details><summary>details</summary><pre>{escape(verdict.details)}</pre></details>"
            if verdict.details
            else ""
        )
        for verdict in verdicts
        if not verdict.passed
    ]
    return f"<section><h2>What is wrong</h2><ul>{''.join(items)}</ul></section>" if items else ""


def _html_table(verdicts: Sequence[Verdict]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = [
        f'<tr class="{"" if verdict.passed else "bad"}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(verdict))
        + "</tr>"
        for verdict in verdicts
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
