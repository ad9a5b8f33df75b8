"""What launch/doctor.py shows: one row for each check over all ranks, a table, and its figures as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cogvideo_dist.evaluation.media import replacing
from launch.doctor_check import SEVERITY, Finding, Status, listed, ranks_of
from launch.plan_cluster import REACHED

FORMAT = 1
WIDTH = 120

STRAGGLES = 2.0
"""Between ranks' rates of one figure: such a rank holds up all others in every step."""


@dataclass(frozen=True)
class Row:
    """A check over all ``ranks`` that made it; ``figures``: rank -> name -> number."""

    finding: Finding
    ranks: tuple[int, ...]
    figures: Mapping[int, Mapping[str, float]]


def rows(reports: Mapping[int, Sequence[Finding]], hosts: Mapping[int, str]) -> list[Row]:
    """One for each check, in the order in which they first come."""
    checks: dict[str, dict[int, Finding]] = {}
    for rank in sorted(reports):
        for finding in reports[rank]:
            checks.setdefault(finding.check, {})[rank] = finding
    return [
        Row(merged(found, hosts), tuple(found), {rank: each.figures for rank, each in found.items() if each.figures})
        for found in checks.values()
    ]


def merged(found: Mapping[int, Finding], hosts: Mapping[int, str]) -> Finding:
    """The worst of several ranks' findings, and whose it is."""
    worst: Status = max((each.status for each in found.values()), key=SEVERITY.index)
    ranks = [rank for rank, each in found.items() if each.status == worst]
    first = min(ranks, key=lambda rank: _weakness(found[rank]))
    chosen = found[first]
    if len({(each.status, each.found) for each in found.values()}) > 1:
        whose = f"rank {first} ({hosts[first]})"
        if worst == "pass" and chosen.figures:
            said = f"{chosen.found} ({whose}, the least of all)"
        else:
            alike = f"; so or alike on {ranks_of(ranks)}" if len(ranks) > 1 and worst != "pass" else ""
            said = f"{whose}: {chosen.found}{alike}"
        chosen = replace(chosen, found=said)
    return straggling(chosen, found, hosts=hosts)


def _weakness(finding: Finding) -> float:
    """The least of its rates, to show the rank that others wait for."""
    return min((value for name, value in finding.figures.items() if name.endswith("_per_s")), default=0.0)


def straggling(chosen: Finding, found: Mapping[int, Finding], *, hosts: Mapping[int, str]) -> Finding:
    """A warning in its place where a rank is much slower than another at what it does alone."""
    if chosen.status in ("fail", "warn") or len(found) < 2 or chosen.check.startswith("links"):
        return chosen
    names = {name for each in found.values() for name in each.figures if name.endswith("_per_s")}
    for name in sorted(names):
        values = {rank: each.figures[name] for rank, each in found.items() if name in each.figures}
        slow, fast = (choose(values, key=lambda rank: values[rank]) for choose in (min, max))
        if values[fast] > STRAGGLES * values[slow]:
            said = (
                f"rank {slow} ({hosts[slow]}) is {values[fast] / values[slow]:.1f} times as slow as rank {fast} "
                f"({hosts[fast]}): {found[slow].found}"
            )
            remedy = (
                "all ranks wait for the slowest: see what else runs there, or leave the node out (sbatch --exclude)"
            )
            return replace(chosen, status="warn", found=said, expected=f"within {STRAGGLES:g} times", remedy=remedy)
    return chosen


def table(found: Sequence[Row]) -> str:
    """For a terminal: what passed in a line, what did not with what is expected and what to do."""
    width = max(len(row.finding.check) for row in found)
    lines = [line for row in found for line in _lines(row.finding, width)]
    return "\n".join([*lines, "", summary(found)])


def _lines(finding: Finding, width: int) -> list[str]:
    lead = f"{finding.status:<7}  {finding.check.ljust(width)}  "
    lines = _wrapped(lead, finding.found)
    margin = " " * len(lead)
    lines += [margin + detail for detail in finding.details]
    if finding.status in ("warn", "fail"):
        lines += _wrapped(f"{margin}expected  ", finding.expected) if finding.expected else []
        lines += _wrapped(f"{margin}remedy    ", finding.remedy) if finding.remedy else []
    return lines


def _wrapped(lead: str, text: str) -> list[str]:
    plain = "".join(c if c.isprintable() else "?" for c in text)  # names come from machines and files
    return textwrap.wrap(
        plain, max(WIDTH, len(lead) + 60), initial_indent=lead, subsequent_indent=" " * len(lead),
        break_long_words=False, break_on_hyphens=False,
    ) or [lead.rstrip()]  # fmt: skip


def counts(found: Sequence[Row]) -> dict[Status, int]:
    return {status: sum(row.finding.status == status for row in found) for status in reversed(SEVERITY)}


def summary(found: Sequence[Row]) -> str:
    number = counts(found)
    said = ", ".join(f"{number[status]} {status}" for status in ("pass", "warn", "fail", "skipped"))
    failed = [row.finding.check for row in found if row.finding.status == "fail"]
    return f"{said}{f': do not start before this is mended: {listed(failed, 8)}' if failed else ''}"


def plan_of(found: Sequence[Row], *, nodes: int, ranks: int) -> dict[str, float] | None:
    """The cluster as options of launch/plan.py, from what was measured: ``ranks`` GPUs on each of ``nodes``. None without GPUs.

    plan takes rates by data sheet, of which it reckons with ``REACHED``, and the cards of a node together where an axis has
    several ranks there.
    """
    by = {row.finding.check: row for row in found}
    memory = _least(by.get("device: memory"), "total_bytes")
    if memory is None:
        return None
    options = {"nodes": float(nodes), "gpus-per-node": float(ranks), "memory": memory / 1e9}
    if host := _least(by.get("host: memory"), "total_bytes"):
        options["host-memory"] = host / 1e9
    rates: dict[str, list[float]] = {"link": [], "network": []}
    for row in found:
        for figures in row.figures.values():
            if row.finding.check.startswith("links: ") and "sum_bus_bytes_per_s" in figures:
                over, size = int(figures["nodes"]), figures["ranks"]
                together = 1.0 if over == 1 else max(1.0, size // over)
                name = "link" if over == 1 else "network"
                rates[name].append(figures["sum_bus_bytes_per_s"] / REACHED / together / 1e9)
    return options | {name: min(values) for name, values in rates.items() if values}


def _least(row: Row | None, name: str) -> float | None:
    values = [figures[name] for figures in row.figures.values() if name in figures] if row else []
    return min(values, default=None)


def arguments(options: Mapping[str, float]) -> str:
    """As launch/plan.py takes them."""
    return " ".join(f"--{name} {value:.4g}" for name, value in options.items())


def write_json(path: Path, found: Sequence[Row], *, about: Mapping[str, Any]) -> None:
    """All figures, whole or not at all."""
    findings = [{**asdict(row.finding), "ranks": list(row.ranks), "figures": row.figures} for row in found]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **about, "findings": findings}, indent=1), encoding="utf-8")
