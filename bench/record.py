"""What a benchmark found: rows against their goals, the machine they hold for, and the files they are kept in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
QUIET_LOAD = 1.5
"""Running processes (one-minute average) above which times on a small machine say little."""


@dataclass(frozen=True)
class Row:
    """One figure: ours, the peer's, and the ratio as the goal reads it. The goal bounds the ratio, or ours without one."""

    id: str
    what: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def goal(self) -> str:
        unit = "x" if self.ratio is not None else f" {self.unit}"
        bounds = (("≥", self.at_least), ("≤", self.at_most))
        return ", ".join(f"{sign} {bound:g}{unit}" for sign, bound in bounds if bound is not None)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        value = self.ours if self.ratio is None else self.ratio
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"goal": self.goal, "met": self.met}


def faster(id: str, what: str, *, ours: float, peer: float | None, at_least: float | None = None) -> Row:
    """Seconds: the ratio says how many times faster than the peer; without a peer there is no goal to judge."""
    ratio = None if peer is None else peer / ours
    return Row(id, what, "s", ours, peer, ratio, at_least=None if peer is None else at_least)


def smaller(id: str, what: str, *, ours: float, peer: float | None, unit: str, at_most: float | None = None) -> Row:
    """A size or an error: the ratio is ours / the peer's; without a peer, or with one of 0, there is none to judge."""
    return Row(id, what, unit, ours, peer, ours / peer, at_most=at_most) if peer else Row(id, what, unit, ours, peer)


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    verdict: Mapping[bool | None, str] = {True: "yes", False: "**no**", None: ""}
    lines = ["| id | what | ours | peer | ratio | goal | met? |", "|---|---|---:|---:|---:|---|---|"]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.4g} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
        cells = (row.id, row.what, f"{row.ours:.4g} {row.unit}", peer, ratio, row.goal, verdict[row.met])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """The machine, the versions and the moment that a result holds for."""
    installed = {package: _version(package) for package in ("diffusers", "triton")}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version for package, version in installed.items() if version},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with a + if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


@dataclass(frozen=True)
class Report:
    """One run of a benchmark: ``notes`` are sentences (measurements left out, a busy machine), ``raw`` all it measured."""

    title: str
    environment: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    raw: Any = None

    def markdown(self, heading: Literal["#", "##"] = "#") -> str:
        facts = "\n".join(f"- {name}: {value}" for name, value in self.environment.items() if value is not None)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"{heading} {self.title}\n\n{table(self.rows)}\n{notes}\n\n{facts}\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "environment": dict(self.environment),
            "rows": [row.as_json() for row in self.rows],
            "notes": list(self.notes),
            "raw": self.raw,
        }


def write(report: Report, folder: Path, stem: str) -> None:
    """``stem``.json and ``stem``.md in ``folder``, in place of what was there."""
    _write_pair(folder, stem, report.as_json(), report.markdown())


def append(report: Report, folder: Path, stem: str) -> None:
    """The report as one more run of ``stem``.json, a list, and of ``stem``.md, the latest run first."""
    path = folder / f"{stem}.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    markdown = folder / f"{stem}.md"
    earlier = markdown.read_text(encoding="utf-8").partition("\n\n")[2] if markdown.exists() else ""
    text = f"# Every run on this device, the latest first\n\n{report.markdown('##')}\n{earlier}"
    _write_pair(folder, stem, [*runs, report.as_json()], text.rstrip("\n") + "\n")


def _write_pair(folder: Path, stem: str, value: Any, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
