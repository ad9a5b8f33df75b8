"""A program that reads files of torch for a parent that trusts neither them nor what they may do to whoever reads them.

Started by ``convert/pickles.py``; needs torch alone. It imports torch once and then forks for every request, one line of JSON
each. The fork has limits of memory, time and written bytes, describes what the file holds in JSON or writes some of its tensors
as safetensors, and ends. Files are read by ``torch.load(weights_only=True)``, which builds tensors and plain containers;
classes that hold data only are let through as stand-ins that do nothing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError  # the name of the error alone
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What a file may hold, under safetensors' names."""

DEEPEST, MOST = 40, 200_000
"""Containers within one another, and values in all, that are described."""

ANSWER_BYTES = 2**28
"""Room for a description beside as many bytes of tensors as the file has."""

CHUNK = 2**26

SURROUNDINGS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EIO,
    errno.ENOMEM,
)
"""Errors that say nothing of a file's bytes."""

NUMPY = (
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"
)  # fmt: skip
"""What the state of a random generator beside the weights wants; it is thrown away."""

DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.runtime.zero.config.ZeroStageEnum",
)  # fmt: skip
"""What DeepSpeed's files want."""


class StandIn:
    """Takes the place of a class of data: keeps what it is given and does nothing."""

    name = ""
    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS: list[Any] = [(type("Named", (StandIn,), {"name": name}), name) for name in (*NUMPY, *DEEPSPEED)]


class Refused(Exception):
    """What is wrong with a file, as its reader is to see it behind the file's name."""


def main() -> None:
    """Serve requests from stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _serve(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


def _serve(request: dict[str, Any]) -> None:
    """Answer one request and end this process. The answer is written aside, so that a torn one is none."""
    path, answer = Path(request["path"]), Path(request["answer"])
    try:
        limit(path.stat().st_size, memory=request["memory"], seconds=request["seconds"])
        if request["tensors"] is None:
            found = {"found": Description(path.stat().st_size).of(load(path, check=True))}
        else:
            write(path, Path(request["out"]), numbers=request["tensors"])
            found = {"found": None}
    except Refused as error:
        found = {"refused": str(error)}
    except BaseException as error:  # the bytes of a damaged file may mislead its reader in any way
        found = _explained(error)
    aside = answer.with_suffix(".partial")
    aside.write_text(json.dumps(found))
    aside.rename(answer)
    os._exit(0)


def _explained(error: BaseException) -> dict[str, str]:
    if isinstance(error, OSError) and error.errno in SURROUNDINGS:
        return {"failed": f"{error.strerror}"}
    asked = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, UnpicklingError) else None
    if asked:
        return {
            "refused": f"refused, as it holds more than tensors: {asked[1]}, of which nothing was run; save its tensors alone"
        }
    reason = type(error).__name__ if isinstance(error, UnpicklingError) else f"{type(error).__name__}: {error}"
    return {"damaged": shown(" ".join(reason.split()).partition(". ")[0])}


def shown(key: str | int) -> str:
    """A text of the file as it may stand in a message."""
    return str(key) if str(key).isprintable() else ascii(key)


def limit(size: int, *, memory: int, seconds: int) -> None:
    """Bound this process: ``memory`` bytes beyond what it has mapped now, ``seconds`` of processor time, and four times as
    many on the clock. ``size``: of the file, as many bytes as which may be written."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, value in (
        (resource.RLIMIT_AS, mapped + memory),
        (resource.RLIMIT_FSIZE, size + ANSWER_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # at the second, SIGKILL, which says nothing
    signal.alarm(4 * seconds)


def load(path: Path, *, check: bool) -> Any:
    """What the file holds. Where it is a zip file its tensors are mapped; ``check`` compares all of them with their checksums,
    at which torch does not look."""
    zipped = zipfile.is_zipfile(path)
    if zipped and check:
        check_zip(path)
    with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is refused anyway
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("refused, as it is compressed, which files of torch never are")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise Refused("refused, as its records together are longer than the file")
        if damaged := file.testzip():
            raise ValueError(f"{damaged} differs from its checksum")


class Description:
    """Makes JSON of plain values; in the place of tensors their number, dtype and shape. ``tensors``: those met, in order."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self.tensors: list[Tensor] = []

    def of(self, value: Any, name: str = "", *, depth: int = 0) -> Any:
        self.count += 1
        if depth > DEEPEST or self.count > MOST:
            raise Refused(f"refused, as it holds more than {MOST} values or more than {DEEPEST} within one another")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        before = f"{name}." if name else ""
        if isinstance(value, dict):
            keys = [key if isinstance(key, str | int) else f"({type(key).__name__})" for key in value]
            inner = [self.of(v, f"{before}{shown(key)}", depth=depth + 1) for key, v in zip(keys, value.values())]
            return {"dict": list(zip(keys, inner))}
        if isinstance(value, list | tuple | set):
            return {"list": [self.of(each, f"{before}{n}", depth=depth + 1) for n, each in enumerate(value)]}
        if isinstance(value, StandIn):
            return {"object": value.name, "arguments": self.of(value.arguments, f"{before}arguments", depth=depth + 1)}
        return {"object": type(value).__name__, "arguments": None}

    def _tensor(self, tensor: Tensor, name: str) -> Any:
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPES
        if not dense or tensor.is_quantized or tensor.is_nested:
            raise Refused(f"{name} is no dense tensor of real numbers; save its values as such a tensor")
        if tensor.numel() * tensor.element_size() > min(tensor.untyped_storage().nbytes(), self.size):
            raise Refused(f"{name} claims to be larger than what is stored of it; save its values as a dense tensor")
        self.tensors.append(tensor)
        about = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        return {"tensor": len(self.tensors) - 1, **about}


def write(path: Path, out: Path, *, numbers: list[int]) -> None:
    """The tensors of these numbers as safetensors, one after another, so that no more than one is in memory."""
    size = path.stat().st_size
    description = Description(size)
    description.of(load(path, check=False))
    tensors = [description.tensors[number].detach() for number in numbers]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > size:
        raise Refused("refused, as its tensors together are larger than the file")
    header, at = {}, 0
    for number, tensor in zip(numbers, tensors):
        end = at + tensor.numel() * tensor.element_size()
        about = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        header[str(number)], at = about, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in pieces(tensor):
                _write(file, piece)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.contiguous().reshape(-1)
    yield from flat.split(CHUNK)


def _write(file: BinaryIO, piece: Tensor) -> None:
    if piece.numel():
        file.write(piece.view(torch.uint8).numpy().data)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
