"""YAML files and ``key.path=value`` overrides -> a validated configuration, or one error that names place and remedy."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")
Places = dict[str, str]
"""Where each key path was set: ``file:line`` or the override itself."""

MAX_NODES = 100_000


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, what was found and what is allowed."""


def load_config(kind: type[Config], files: Sequence[str | Path], *, overrides: Sequence[str] = ()) -> Config:
    """Merge ``files`` (later ones win, key by key) and ``overrides`` into a ``kind``.

    Strict: an unknown or repeated key, a wrong type and an impossible value raise ``ConfigError``.
    """
    merged, places = read_merged(files)
    for override in overrides:
        _merge(merged, _parse_override(override, places))
    _refuse_unknown(kind, merged, "", places)
    merged = _renamed(merged, {name.rstrip("_"): name for name in _underscored(kind)})
    try:
        # JSON, in which pydantic's strict mode takes lists for tuples and mappings for dataclasses, and nothing else.
        return TypeAdapter(kind).validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, places, files)) from None


def read_merged(files: Sequence[str | Path]) -> tuple[dict[str, Any], Places]:
    """The mappings of ``files``, merged (later ones win, key by key), and where each key was set.

    No repeated key, endless anchor, date, infinity or tag that makes an object: those raise ``ConfigError``.
    """
    merged: dict[str, Any] = {}
    places: Places = {}
    for file in files:
        _merge(merged, _read(Path(file), places))
    return merged, places


def plain(config: Any) -> dict[str, Any]:
    """The resolved configuration as nested dictionaries under the keys of its files."""
    return _renamed(dataclasses.asdict(config), {name: name.rstrip("_") for name in _underscored(type(config))})


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(json.loads(json.dumps(plain(config))), sort_keys=False, allow_unicode=True)


def digest(config: Any) -> str:
    """SHA-256 of the resolved configuration."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


def _underscored(kind: Any) -> set[str]:
    """Fields of ``kind`` and its sections whose key is a word of Python, which they have with an underscore behind it."""
    names = set()
    types = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        names |= {item.name} if item.name.endswith("_") else set()
        for section in (types[item.name], *typing.get_args(types[item.name])):
            names |= _underscored(section) if dataclasses.is_dataclass(section) else set()
    return names


def _renamed(values: Any, names: dict[str, str]) -> Any:
    """Nested mappings with other keys."""
    if isinstance(values, dict):
        return {names.get(key, key): _renamed(value, names) for key, value in values.items()}
    return [_renamed(value, names) for value in values] if isinstance(values, (list, tuple)) else values


def _read(path: Path, places: Places) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return _parse(text, str(path), places)


def _parse(text: str, source: str, places: Places) -> dict[str, Any]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        budget = [MAX_NODES]
        value = {} if node is None else _value(loader, node, "", source=source, places=places, budget=budget)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply; does an anchor hold itself?") from None
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: the top level must be a mapping of sections, found {type(value).__name__}")
    return value


def _value(
    loader: yaml.SafeLoader, node: yaml.Node, path: str, *, source: str, places: Places, budget: list[int]
) -> Any:
    """The plain value of a YAML node, noting the place of every key and refusing repeated ones and endless anchors."""
    budget[0] -= 1
    if budget[0] < 0:
        raise ConfigError(f"{source}: more than {MAX_NODES} values; are anchors nested in each other?")
    place = f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            inner = f"{path}.{key}" if path else key
            if key in values:
                raise ConfigError(f"{source}:{key_node.start_mark.line + 1}: key {inner} is given twice")
            places[inner] = f"{source}:{key_node.start_mark.line + 1}"
            values[key] = _value(loader, value_node, inner, source=source, places=places, budget=budget)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [
            _value(loader, item, f"{path}.{index}", source=source, places=places, budget=budget)
            for index, item in enumerate(node.value)
        ]
    places.setdefault(path, place)
    return _scalar(loader, node, path=path, place=place)


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, *, path: str, place: str) -> str | int | float | None:
    try:
        value = loader.construct_object(node)
    except ValueError as error:  # a date that is none, a number of a million digits
        raise ConfigError(f"{place}: {path}: {node.value[:40]!r} cannot be read: {error}") from None
    if not isinstance(value, (str, int, float, type(None))) or value in (math.inf, -math.inf) or value != value:
        raise ConfigError(f"{place}: {path}: expected a finite number, text, true, false or null, found {node.value!r}")
    return value


def _parse_override(override: str, places: Places) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"override {override!r}: expected key.path=value, for example train.steps=20")
    source = f"override {override!r}"
    inner: Places = {}
    value = _parse(f"value: {text}", source, inner)["value"]
    places.update({path + key.removeprefix("value"): source for key in inner})
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _refuse_unknown(kind: Any, values: Any, path: str, places: Places) -> None:
    if isinstance(values, list):
        for number, value in enumerate(values):
            _refuse_unknown(kind, value, f"{path}.{number}", places)
    if not dataclasses.is_dataclass(kind) or not isinstance(values, dict):
        return
    types = typing.get_type_hints(kind)
    fields = {item.name.rstrip("_"): item.name for item in dataclasses.fields(kind)}
    known = list(fields)
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(known)}"
            raise ConfigError(f"{places.get(inner, 'configuration')}: unknown key {inner}; {hint}")
        own = types[fields[key]]
        section = next(filter(dataclasses.is_dataclass, typing.get_args(own)), own)  # of SECTION | None
        _refuse_unknown(section, value, inner, places)


def _explain(error: ValidationError, places: Places, files: Sequence[str | Path]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        keys = [str(part).rstrip("_") for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier()]
        path = ".".join(keys)
        place = next((places[p] for p in _prefixes(keys) if p in places), ", ".join(map(str, files)))
        found = problem["input"]
        if problem["type"] == "missing":
            lines.append(f"{place}: key {path} is missing")
        elif problem["type"] == "value_error":  # of a section, whose message begins with the key that is at fault
            message = str(problem["ctx"]["error"])
            lines.append(f"{places.get(message.split()[0].rstrip(':'), place)}: {message}")
        elif isinstance(found, str) and problem["type"] in ("int_type", "float_type") and _is_number(found):
            lines.append(f"{place}: {path} is the text {found!r}, not a number; write {_unquoted(found)}")
        else:
            lines.append(f"{place}: {path}: {problem['msg'].lower()}, found {found!r}")
    return "; ".join(dict.fromkeys(lines))


def _prefixes(keys: list[str]) -> list[str]:
    return [".".join(keys[:length]) for length in range(len(keys), 0, -1)]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _unquoted(text: str) -> str:
    """How a number must be spelled for YAML 1.1 to see one: 1e-5 -> 1.0e-5, '8' -> 8."""
    mantissa, exponent, power = text.strip().lower().partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{power if power[:1] in ('+', '-') else '+' + power}"
