"""The leaves of a SAT configuration, and the account of each: translated, dropped, or without counterpart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cogvideo_dist.config.load import ConfigError, Places

Kind = Literal["translated", "dropped", "missing"]


@dataclass(frozen=True)
class Line:
    """What became of a key of SAT. ``ours``: the key that it set, if any; ``text``: why, or what to do."""

    key: str
    value: Any
    kind: Kind
    ours: str
    text: str


@dataclass(frozen=True)
class Setting:
    """A key of ours that no key of the files stands for; ``fill_in``: a value that only the user can know."""

    ours: str
    value: Any
    text: str
    fill_in: bool


class Keys:
    """Reads leaves by their path with dots and keeps account of them; ``ours`` collects the configuration that comes out.

    A leaf is a value, a list without mappings, or an empty mapping; items of a list of mappings are numbered from 0.
    """

    def __init__(self, merged: Mapping[str, Any], places: Places) -> None:
        self.places = places
        self.leaves: dict[str, Any] = {}
        self.lines: dict[str, Line] = {}
        self.settings: list[Setting] = []
        self.ours: dict[str, Any] = {}
        self.origin: dict[str, list[str]] = {}
        self._said: dict[str, tuple[str, Any]] = {}
        self._flatten(merged, "")

    def _flatten(self, value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                if key == "<<":
                    raise self.error(f"{path}.<<", "merges of anchors are not read; write the keys out")
                self._flatten(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and _holds_mapping(value):
            for number, inner in enumerate(value):
                self._flatten(inner, f"{path}.{number}")
        elif path in self.leaves:
            raise self.error(path, "is given twice, nested and as one key with dots")
        elif path:
            if any("${" in item for item in _texts(value)):
                raise self.error(path, f"{shown(value)} is an interpolation, which is not resolved; write its value")
            self.leaves[path] = value

    def error(self, path: str, text: str) -> ConfigError:
        return ConfigError(f"{self.places.get(path, 'configuration')}: {printable(path)}: {text}")

    def has(self, path: str) -> bool:
        return path in self.leaves

    def under(self, section: str) -> bool:
        """Whether the section holds anything."""
        return any(path.startswith(f"{section}.") for path in self.leaves)

    def number(self, path: str, default: float = 0.0) -> float:
        """SAT's reader takes 1e-8 for a number, which is text to YAML 1.1; so does this."""
        value = self.leaves.get(path, default)
        found = as_number(value)
        if found is None:
            raise self.error(path, f"expected a number, found {shown(value)}")
        return found

    def whole(self, path: str, default: int = 0) -> int:
        found = self.leaves.get(path)
        if isinstance(found, int) and not isinstance(found, bool) and abs(found) < 2**63:
            return found  # as it is: a float would round a large seed
        value = self.number(path, default)
        if value != int(value) or abs(value) >= 2**63:
            raise self.error(path, f"expected a whole number of at most 64 bits, found {value:g}")
        return int(value)

    def flag(self, path: str, default: bool = False) -> bool:
        value = self.leaves.get(path, default)
        if not isinstance(value, bool):
            raise self.error(path, f"expected true or false, found {shown(value)}")
        return value

    def text(self, path: str, default: str = "") -> str:
        value = self.leaves.get(path, default)
        if not isinstance(value, str):
            raise self.error(path, f"expected text, found {shown(value)}")
        return value

    def numbers(self, path: str, *, count: int) -> list[float]:
        found = [as_number(item) for item in self.items(path)]
        if len(found) != count or None in found:
            raise self.error(path, f"expected {count} numbers, found {shown(self.leaves[path])}")
        return [number for number in found if number is not None]

    def items(self, path: str) -> list[Any]:
        """A list, or a single value as a list of one."""
        value = self.leaves.get(path, [])
        return list(value) if isinstance(value, list) else [value]

    def give(self, path: str, ours: str, *, value: Any, text: str = "") -> None:
        """``path`` is translated: our key ``ours`` gets ``value``."""
        self.agree(path, ours, value=value)
        self.ours[ours] = value
        self.origin.setdefault(ours, []).append(path)
        self._account(path, "translated", f"{ours}: {shown(value)}", text)

    def agree(self, path: str, ours: str, *, value: Any) -> None:
        """Refuse two keys of SAT that would give ``ours`` different values."""
        other, said = self._said.setdefault(ours, (path, value))
        if said != value:
            raise self.error(path, f"means {ours} {shown(value)}, but {other} means {shown(said)}; make them equal")

    def elsewhere(self, path: str, text: str) -> None:
        """``path`` is translated into something that is no key of the configuration: a folder, an option of a command."""
        self._account(path, "translated", "", text)

    def drop(self, path: str, text: str) -> None:
        self._account(path, "dropped", "", text)

    def lack(self, path: str, text: str) -> None:
        self._account(path, "missing", "", text)

    def assume(self, ours: str, value: Any, *, text: str, fill_in: bool = False) -> None:
        """Sets a key that the files say nothing of: SAT's own default, or what the user has to fill in."""
        self.ours[ours] = value
        self.settings.append(Setting(ours, value, text, fill_in))

    def settle(self, path: str, ours: str, *, value: Any, otherwise: str, text: str = "") -> None:
        """``give`` where the files have ``path``, else ``assume`` with the reason ``otherwise``."""
        if self.has(path):
            self.give(path, ours, value=value, text=text)
        else:
            self.assume(ours, value, text=otherwise)

    def open(self) -> list[str]:
        """Leaves that are not accounted for yet, in their order."""
        return [path for path in self.leaves if path not in self.lines]

    def _account(self, path: str, kind: Kind, ours: str, text: str) -> None:
        if path not in self.leaves or path in self.lines:
            raise ValueError(f"{path} is no leaf of the configuration, or has its line already")
        self.lines[path] = Line(path, self.leaves[path], kind, ours, text)


def as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if abs(found) < float("inf") else None


def shown(value: Any) -> str:
    """A value on one line, of printable characters."""
    return printable(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    """Whatever could end a line or hide is escaped, so that text of a file stays within its comment."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _holds_mapping(values: list[Any]) -> bool:
    return any(isinstance(item, dict) or (isinstance(item, list) and _holds_mapping(item)) for item in values)


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
