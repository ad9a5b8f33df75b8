"""The link between the supervisors of a run: the first rank's listens, all have a connection to it.

The first one decides which failure came first, says it in one line and tells all others to end their ranks. It listens on the
machine's own interface unless the run has other nodes; where, the others read in the run's folder, together with a word without
which nobody is heard.
"""

from __future__ import annotations

import hmac
import json
import os
import resource
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.codes import TRANSIENT
from launch.supervise_verdict import first_cause, verdict

SETTLE_S = 1.0
"""Within which another failure may turn out to be the cause of the first one that was heard of."""

COLLECT_S = 6.0
"""For where all ranks stand."""

GRACE_S = 3.0
"""In which the others may come to an end by themselves where a rank has ended with an error of its own."""

RETRY_S = 0.2
LONGEST = 1 << 22
"""Bytes of a message."""

WELCOME_S = 3.0
"""In which whoever listens at an address proves to be the first supervisor; it may be an old one."""


def decoded(data: bytes) -> dict[str, Any]:
    """A message; one that is none is empty."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def say(name: str, text: str, *, trace: str = "") -> None:
    """One line on stderr, below the bar that shows the run's progress."""
    sys.stderr.write(f"\n{trace}{name}: {' '.join(text.split())}\n")
    sys.stderr.flush()


def meeting_file(place: Mapping[str, Any]) -> Path:
    """Where the first supervisor of this start says where it listens."""
    return Path(place["folder"]) / f".meeting-{place['meeting']}.json"


@dataclass(frozen=True)
class Ending:
    """Why a rank is to end, and until when (monotonic clock) it may do so by itself."""

    rank: int
    text: str
    code: int
    deadline: float

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Ending:
        return cls(message["rank"], message["text"], message["code"], time.monotonic() + message["grace_s"])


class Line:
    """Messages in lines of JSON over a socket that never blocks."""

    def __init__(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        self.connection, self.selector = connection, selector
        self.taken, self.sent = b"", b""
        self.open = True
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        selector.register(connection, selectors.EVENT_READ, _nothing)

    def say(self, **message: Any) -> None:
        self.sent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        while self.open and self.sent:
            try:
                self.sent = self.sent[self.connection.send(self.sent) :]
            except BlockingIOError:
                return
            except OSError:
                self.close()

    def read(self) -> list[dict[str, Any]]:
        """What has arrived; afterwards ``open`` says whether more may come."""
        while self.open:
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.taken += data
            if not data or len(self.taken) > LONGEST:
                self.close()
        *lines, self.taken = self.taken.split(b"\n")
        return [decoded(line) for line in lines]

    def close(self) -> None:
        if self.open:
            self.open = False
            self.selector.unregister(self.connection)
            self.connection.close()


class Member:
    """This supervisor's connection to the first one's."""

    def __init__(self, place: Mapping[str, Any], *, pid: int, selector: selectors.BaseSelector) -> None:
        self.place, self.pid, self.selector = place, pid, selector
        self.line: Line | None = None
        self.waiting: list[dict[str, Any]] = []  # to be said
        self.left = self.welcome = False
        self.since = self.tried = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether nothing more is to be said, or nobody is there to hear it."""
        if self.line is None or not self.welcome:
            return self.left and time.monotonic() - self.since > GRACE_S
        return self.left and not (self.line.open and (self.waiting or self.line.sent))

    def say(self, **message: Any) -> None:
        self.waiting.append(message)
        self._say_waiting()

    def _say_waiting(self) -> None:
        if self.line and self.welcome:
            for message in self.waiting:
                self.line.say(**message)
            self.waiting = []

    def bye(self, code: int) -> None:
        self.say(bye=code)
        self.left, self.since = True, time.monotonic()

    def turn(self) -> list[dict[str, Any]]:
        """What the first supervisor says; that it is gone is a message, too."""
        if self.line is None:
            self._connect()
            return []
        self.line.flush()
        found = self.line.read()
        self.welcome = self.welcome or any("welcome" in message for message in found)
        if not self.welcome and (not self.line.open or time.monotonic() - self.tried > WELCOME_S):
            self.line.close()
            self.line = None
            return []
        self._say_waiting()
        if not self.line.open and not self.left and not any("end" in message for message in found):
            text = "the supervisor of rank 0 is gone, and so is its node or its launcher"
            found.append({"end": {"rank": 0, "text": text, "code": TRANSIENT, "grace_s": 0.0}})
        return found

    def _connect(self) -> None:
        now = time.monotonic()
        if now - self.tried < RETRY_S and self.place["rank"]:
            return
        self.tried = now
        try:
            where = json.loads(meeting_file(self.place).read_text(encoding="utf-8"))
            connection = socket.create_connection((where["host"], where["port"]), timeout=RETRY_S)
        except (OSError, ValueError, KeyError, TypeError):
            return
        self.line = Line(connection, self.selector)
        self.line.say(
            hello={"word": where["word"], "rank": self.place["rank"], "host": socket.gethostname(), "pid": self.pid}
        )


@dataclass
class Known:
    """A supervisor that has said who it is."""

    line: Line
    rank: int
    host: str
    pid: int
    code: int | None = None
    """With which its rank has ended."""


@dataclass
class Failure:
    """What a supervisor reports of its rank; ``kind``: died, ended, lost, hang, or agreed: all ranks end so by
    themselves."""

    rank: int
    kind: str
    text: str
    code: int
    trace: str = ""


@dataclass
class Hub:
    """On the first rank's supervisor. ``place`` is what that rank said of itself."""

    name: str
    place: Mapping[str, Any]
    selector: selectors.BaseSelector
    known: dict[int, Known] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    settled: Failure | None = None

    def __post_init__(self) -> None:
        self.strangers: dict[Line, float] = {}  # since when
        self.standing: dict[int, dict[str, Any]] = {}
        self.asked = self.heard = 0.0
        self.said = False
        self.until = 0.0
        self.word = secrets.token_hex(16)
        self.listener = self._listen()
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)

    @property
    def done(self) -> bool:
        """Whether all ranks have ended, or had the time to."""
        if self.failures and not self.settled:
            return False
        gone = len(self.known) == self.place["world"] and all(each.code is not None for each in self.known.values())
        return gone or (self.settled is not None and time.monotonic() > self.until)

    def turn(self) -> None:
        for line in list(self.strangers):
            self._meet(line)
        for each in list(self.known.values()):
            self._hear(each)
        now = time.monotonic()
        if not self.failures or self.settled:
            return
        self.heard = self.heard or now
        first = first_cause(self.failures)
        if now - self.heard < SETTLE_S:
            return
        if first.kind == "hang":
            if not self.asked:
                self.asked = now
                for each in self.known.values():
                    each.line.say(ask=True)
            if len(self.standing) < len(self.known) and now - self.asked < COLLECT_S:
                return
            first.rank, first.text = verdict(self.standing, world=self.place["world"], found=first.text)
        self._settle(first)

    def close(self) -> None:
        """The last word on how the run ended, and nobody listens any more."""
        first = self.settled
        if first:
            self._write("exit_status.json", {
                "code": first.code, "reason": " ".join(first.text.split()), "rank": first.rank, "kind": first.kind,
                "job": os.environ.get("SLURM_JOB_ID", ""), "time": time.time(),
            })  # fmt: skip
        self.selector.unregister(self.listener)
        self.listener.close()
        with suppress(OSError):
            meeting_file(self.place).unlink()

    def _settle(self, first: Failure) -> None:
        """All ranks end, and one line says why."""
        self.settled = first
        known = self.known.get(first.rank)
        where = f"rank {first.rank}" + (f" ({known.host}, process {known.pid})" if known else "")
        goes_on = (
            "; the last checkpoint stands, and the same command goes on from there" if first.code == TRANSIENT else ""
        )
        text = first.text if first.kind == "ended" else f"error: {where} {first.text}{goes_on}"
        if first.kind == "ended" and first.rank:
            text = f"rank {first.rank}: {text}"
        if first.text:
            say(self.name, text, trace=first.trace)
        if self.standing:
            self._write("logs/hang.json", {"time": time.time(), "verdict": text, "ranks": self.standing})
        grace = GRACE_S if first.kind == "ended" else 0.0
        self.until = time.monotonic() + grace + GRACE_S
        for each in self.known.values():
            each.line.say(end={"rank": first.rank, "text": first.text, "code": first.code, "grace_s": grace})

    def _listen(self) -> socket.socket:
        """Listen, and say where in the run's folder. Every supervisor takes a file descriptor here."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        elsewhere = self.place["world"] > self.place["node"]
        host = self.place["address"].rpartition(":")[0].strip("[]") if elsewhere else "127.0.0.1"
        try:
            listener = socket.create_server((host, 0), family=_family(host), backlog=128)
        except OSError:  # the address by which others reach this machine is not one of its own
            listener = socket.create_server(("", 0), backlog=128)
        listener.setblocking(False)
        path = meeting_file(self.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"host": host, "port": listener.getsockname()[1], "word": self.word}
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
        aside.replace(path)
        return listener

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self.listener.accept()
            self.strangers[Line(connection, self.selector)] = time.monotonic()

    def _meet(self, line: Line) -> None:
        """Hear who somebody is; whoever does not know the word is not heard."""
        messages = line.read()
        late = time.monotonic() - self.strangers[line] > WELCOME_S
        if messages or late or not line.open:
            del self.strangers[line]
        if not messages:
            if late:
                line.close()
            return
        hello, *rest = messages
        said = hello.get("hello", {})
        if not isinstance(said, dict) or not hmac.compare_digest(str(said.get("word", "")), self.word):
            line.close()
            return
        line.say(welcome=True)
        self.known[said["rank"]] = known = Known(line, said["rank"], said["host"], said["pid"])
        for message in rest:
            self._take(known, message)
        if self.settled:
            line.say(
                end={"rank": self.settled.rank, "text": self.settled.text, "code": self.settled.code, "grace_s": 0.0}
            )

    def _hear(self, each: Known) -> None:
        each.line.flush()
        for message in each.line.read():
            self._take(each, message)
        if not each.line.open and each.code is None:
            each.code = TRANSIENT
            self.failures.append(
                Failure(each.rank, "lost", "is gone together with its supervisor: its node or launcher", TRANSIENT)
            )

    def _take(self, each: Known, message: Mapping[str, Any]) -> None:
        if "fail" in message:
            self._count(Failure(each.rank, **message["fail"]))
        if "stands" in message:
            self.standing[each.rank] = message["stands"]
        if "bye" in message:
            each.code = message["bye"]

    def _count(self, failure: Failure) -> None:
        if failure.kind == "agreed":
            if failure.text and not self.said:  # all ranks end so, each with the same to say
                self.said = True
                say(self.name, failure.text)
            return
        self.failures.append(failure)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        path = Path(self.place["folder"]) / name
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
            aside.replace(path)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _nothing() -> None:
    """A line is read at the next turn."""
