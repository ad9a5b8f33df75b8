"""What a translation looks like: a configuration file of ours with its origins, and the account of SAT's keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml

from cogvideo_dist.convert.sat_config_keys import Keys, Line, printable, shown

SECTIONS = (
    "run",
    "model",
    "frozen",
    "data",
    "train",
    "lora",
    "diffusion",
    "parallel",
    "checkpoint",
    "log",
    "validation",
)

TITLES = {
    "translated": "translated",
    "dropped": "dropped: without effect, or decided otherwise here",
    "missing": "without counterpart: look at these",
}


def account(keys: Keys) -> str:
    """A table in parts: every key of SAT in one of three, then what was set although no key stands for it."""
    parts = []
    for kind, title in TITLES.items():
        lines = [keys.lines[path] for path in keys.leaves if keys.lines[path].kind == kind]
        parts.append(_table(f"{title} ({len(lines)})", [_row(line) for line in lines]))
    for fill_in, title in (
        (False, "set, though SAT's files do not say it"),
        (True, "to be filled in: SAT's files do not hold it"),
    ):
        rows = [
            (setting.ours, shown(setting.value), printable(setting.text))
            for setting in keys.settings
            if setting.fill_in == fill_in
        ]
        parts.append(_table(f"{title} ({len(rows)})", rows))
    return "\n\n".join(parts) + "\n"


def configuration(keys: Keys, header: Sequence[str]) -> str:
    """YAML that ``load_config`` reads, with ``header`` above, SAT's keys behind each of ours, and the account below."""
    lines = [f"# {printable(line)}".rstrip() for line in header]
    nested = _nested(keys.ours)
    for section in SECTIONS:
        if section in nested:
            lines += _section({section: nested[section]}, keys=keys, path="", indent="")
    lines += ["", "# What became of SAT's keys.", "#"]
    lines += [f"# {line}".rstrip() for line in account(keys).splitlines()]
    return "\n".join(lines) + "\n"


def _row(line: Line) -> tuple[str, str, str]:
    text = "; ".join(part for part in (line.ours, line.text) if part)
    return printable(line.key), shown(line.value), printable(text)


def _table(title: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """Columns as wide as what most cells need; a wide cell pushes its own line alone."""
    widths = [min(max((len(row[column]) for row in rows), default=0), limit) for column, limit in ((0, 100), (1, 24))]
    lines = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {text}".rstrip() for key, value, text in rows]
    return "\n".join([title, *(lines or ["  none"])])


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return nested


def _section(values: dict[str, Any], *, keys: Keys, path: str, indent: str) -> list[str]:
    lines = []
    for name, value in values.items():
        own = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_section(value, keys=keys, path=own, indent=indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {_yaml(value)}  # {_origin(keys, own)}")
    return lines


def _origin(keys: Keys, ours: str) -> str:
    if ours in keys.origin:
        first, *others = keys.origin[ours]
        return printable(first + (f", and {len(others)} more" if others else ""))
    return printable(next(setting.text for setting in keys.settings if setting.ours == ours))


def _yaml(value: Any) -> str:
    """On one line; text that would break it is written with escapes."""
    for style in (None, '"'):
        written = yaml.safe_dump(
            [value], default_flow_style=True, default_style=style, allow_unicode=True, width=math.inf
        )
        if "\n" not in written.strip():
            break
    return written.strip()[1:-1]
