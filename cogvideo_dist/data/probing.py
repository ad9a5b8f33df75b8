"""Looks into clips and images that may crash or hang a decoder: in a child process with limits, which is replaced when it dies.

The child (``python -m cogvideo_dist.data.probing``) reads requests and writes replies: four bytes of a length, then so much
JSON; a request's bytes follow it. It can neither open network connections by a file's wish nor write files.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cogvideo_dist.data.decode import DecodeError, Probe, probe, probe_image, probe_packets

DEATHS = 2
"""How often a child may die of the same bytes before they are refused."""


@dataclass(frozen=True)
class Limits:
    """What one look may take: bytes of memory beyond those of an idle child, seconds of computing, seconds by the clock."""

    memory: int = 4 * 2**30
    computing: int = 60
    waiting: float = 120.0


class Prober:
    """Looks into bytes, in a child that is started when first needed. Not for several threads at once."""

    def __init__(self, limits: Limits | None = None, *, decode: bool = False) -> None:
        self.limits, self.decode = limits or Limits(), decode
        self.child: subprocess.Popen[bytes] | None = None

    def probe(self, data: bytes | bytearray, *, kind: str, decode: bool | None = None) -> Probe:
        """What is in a video or an image. Raises ``DecodeError`` if it cannot be decoded, or two children died of it."""
        how = ""
        for _ in range(DEATHS):
            reply, how = self._ask(
                {"kind": kind, "size": len(data), "decode": self.decode if decode is None else decode}, data
            )
            if reply is not None:
                if "reason" in reply:
                    raise DecodeError(reply["reason"], reply["code"])
                return Probe(*reply["probe"])
        raise DecodeError(f"looking into it ended the process twice ({how})", "kills the decoder")

    def close(self) -> None:
        """End the child."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None

    def _ask(self, request: dict[str, Any], data: bytes | bytearray) -> tuple[dict[str, Any] | None, str]:
        """The child's reply; if there is none, what the child died of."""
        if self.child is None:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "cogvideo_dist.data.probing", json.dumps(dataclasses.asdict(self.limits))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
        child, late = self.child, threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        watch = threading.Timer(self.limits.waiting, end)
        watch.start()
        try:
            if child.stdin is None or child.stdout is None:
                raise RuntimeError("the child has no pipes")
            send(child.stdin, request, data=data)
            reply = receive(child.stdout)
        except BrokenPipeError:
            reply = None
        finally:
            watch.cancel()
        if reply is not None and not late.is_set():
            return reply, ""
        child.kill()
        child.communicate()
        self.child = None
        return None, f"no answer in {self.limits.waiting:g} s" if late.is_set() else f"exit code {child.returncode}"


def send(file: IO[bytes], message: dict[str, Any], *, data: bytes | bytearray = b"") -> None:
    """A message and the bytes that belong to it."""
    text = json.dumps(message).encode()
    file.write(len(text).to_bytes(4, "big") + text)
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> dict[str, Any] | None:
    """A message; nothing at the end of the file."""
    length = file.read(4)
    text = file.read(int.from_bytes(length, "big"))
    return json.loads(text) if len(length) == 4 and text else None


def _look(request: dict[str, Any], data: bytes) -> dict[str, Any]:
    try:
        if request["kind"] == "image":
            found = probe_image(data, header=not request["decode"])
        else:
            found = probe(data) if request["decode"] else probe_packets(data)
        return {"probe": list(found)}
    except DecodeError as error:
        return {"reason": " ".join(str(error).split()), "code": error.code}
    except MemoryError:
        return {"reason": "decoding it needs more memory than is allowed", "code": "too large"}


def _serve(limits: Limits) -> None:
    """Answer until the requests end."""
    idle = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (idle + limits.memory,) * 2)
    for none in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(none, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    while (request := receive(sys.stdin.buffer)) is not None:
        data = sys.stdin.buffer.read(request["size"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + limits.computing, hard))
        send(sys.stdout.buffer, _look(request, data))


if __name__ == "__main__":
    _serve(Limits(**json.loads(sys.argv[1])))
