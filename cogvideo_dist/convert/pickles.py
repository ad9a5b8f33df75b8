"""The one door to foreign files of torch, which are pickles: what they hold, and their tensors, without trusting them.

The file is opened by another process (``convert/pickle_reader.py``) under limits of memory and time, never by this one. What
comes back is JSON and safetensors.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

REAL = ("float64", "float32", "bfloat16", "float16")
"""Dtypes of weights."""


class Stored(NamedTuple):
    """A tensor in a file: its number there, dtype and shape."""

    number: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """At most."""
        count = 8
        for size in self.shape:
            count *= size
        return count


class Odd(NamedTuple):
    """Whatever else a file holds: the name of its class, and what it was made with."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Limits:
    """Of the process that reads a file, beyond what the file's size asks for: bytes of memory, seconds of processor time (and
    four times as many on the clock)."""

    memory: int = 2**31
    seconds: int = 120


LIMITS = Limits()

SLOWEST = 20e6
"""Bytes a second that are read at least."""


@dataclass(frozen=True)
class TorchFile:
    """A file and what it holds: dictionaries, lists and plain values, ``Stored`` for tensors, ``Odd`` for all else."""

    path: Path
    content: Any
    limits: Limits = LIMITS


def open_file(path: str | Path, limits: Limits = LIMITS) -> TorchFile:
    """Look into a file. Raises ``ValueError`` naming it if it is absent, damaged, or holds more than data."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        return TorchFile(path, _decoded(_ask(path, Path(folder), limits=limits)), limits)


def read_tensors(file: TorchFile, wanted: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Some of a file's tensors, by names of the caller's. They are mapped from a file that has no name any more: they come into
    memory when they are used, and their place on disk is free once they are gone."""
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        numbers = sorted({stored.number for stored in wanted.values()})
        needed, free = sum(stored.bytes for stored in wanted.values()), shutil.disk_usage(folder).free
        if min(needed, file.path.stat().st_size) > free:
            raise ValueError(
                f"{file.path}: up to {needed / 1e9:.1f} GB of it pass through {tempfile.gettempdir()}, which has "
                f"{free / 1e9:.1f} GB left; name a larger folder in TMPDIR"
            )
        _ask(file.path, Path(folder), limits=file.limits, tensors=numbers)
        with safe_open(Path(folder) / "tensors", framework="pt") as tensors:
            found = {name: tensors.get_tensor(str(stored.number)) for name, stored in wanted.items()}
    for name, stored in wanted.items():
        if (str(found[name].dtype), tuple(found[name].shape)) != (f"torch.{stored.dtype}", stored.shape):
            raise ValueError(
                f"{file.path}: {name} has changed since the file was opened; convert it when nobody writes it"
            )
    return found


def weights_of(values: Mapping[str, Any], source: Path) -> dict[str, Stored]:
    """``values``, of which every one must be a tensor of real numbers; raises ``ValueError`` naming the first that is not."""
    for name, value in values.items():
        if not (isinstance(value, Stored) and value.dtype in REAL):
            raise ValueError(f"{source}: {name} is no dense tensor of real numbers; save its values as such a tensor")
    return dict(values)


def _ask(path: Path, folder: Path, *, limits: Limits, tensors: list[int] | None = None) -> Any:
    """What the reader answers; ``tensors``: numbers of those that it is to write to ``folder``/tensors."""
    size = path.stat().st_size
    request = {
        "path": str(path.resolve()), "answer": str(folder / "answer.json"), "out": str(folder / "tensors"), "tensors": tensors,
        "memory": limits.memory + 2 * size, "seconds": int(limits.seconds + size / SLOWEST),
    }  # fmt: skip
    reader = _reader(os.getpid())
    code = reader.serve(request)
    answer = folder / "answer.json"
    if not answer.exists():
        if reader.process.poll() is not None:
            _reader.cache_clear()  # the next file gets a new one
        raise ValueError(f"{path}: the process that reads it {_ended(code)}; it is damaged or hostile")
    found = json.loads(answer.read_text())
    if "refused" in found:
        raise ValueError(f"{path}: {found['refused']}")
    if "damaged" in found:
        raise ValueError(f"{path}: damaged, or no file of torch ({found['damaged']}); get it again")
    if "failed" in found:
        raise ValueError(f"{path}: cannot be read or passed on through {tempfile.gettempdir()}: {found['failed']}")
    return found["found"]


def _ended(code: str) -> str:
    if not code.startswith("-"):
        return f"ended without an answer (exit code {code or 'unknown'})"
    number = signal.Signals(-int(code))
    slow = number in (signal.SIGXCPU, signal.SIGALRM)
    return "took longer than it may" if slow else f"was ended by {number.name}"


def _decoded(value: Any) -> Any:
    """What ``pickle_reader.Description`` made JSON of."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return Stored(value["tensor"], value["dtype"], tuple(value["shape"]))
    if "dict" in value:
        return {key: _decoded(each) for key, each in value["dict"]}
    if "list" in value:
        return [_decoded(each) for each in value["list"]]
    return Odd(value["object"], _decoded(value["arguments"]))


class _Reader:
    """The process that reads, kept for as long as this one lives."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from cogvideo_dist.convert.pickle_reader import main; main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.process.communicate)  # it ends at the end of its input

    def serve(self, request: Mapping[str, Any]) -> str:
        """The exit code of the fork that served the request; nothing if the process is gone."""
        requests, codes = self.process.stdin, self.process.stdout
        if requests is None or codes is None:
            raise RuntimeError("a process that is started with pipes has them")
        with self.lock, suppress(BrokenPipeError):
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            return codes.readline().strip()
        return ""


@lru_cache(maxsize=1)
def _reader(process: int) -> _Reader:
    """Of this ``process``; a fork of it starts its own."""
    return _Reader()
