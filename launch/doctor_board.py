"""What the ranks of launch/doctor.py tell each other while nothing that they test can be relied upon.

The first rank keeps a board: values by name, over plain sockets, that work before a process group exists and after one hangs.
Whoever does not come is named and not waited for. Messages are lines of JSON; the board answers ranks of its own job alone.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

PORTS = 8
"""Tried above that of the rendezvous, which is left to what meets there."""

LINE = 1 << 24
"""Bytes of a message at most."""

SPARE_S = 10.0
"""Beyond what was asked for, that an answer of the board is waited for."""

PATIENCE_S = 2.0
"""For a connection and its greeting."""


class Meeting(NamedTuple):
    """Where ``world`` ranks meet: ``address`` is host:port of their rendezvous, ``token`` is known to this job's ranks alone;
    ``alone``: all are on one machine."""

    rank: int
    world: int
    address: str
    token: str
    alone: bool

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def ports(self) -> list[int]:
        first = int(self.address.rpartition(":")[2])
        return [1024 + (first - 1024 + step) % (2**16 - 1024) for step in range(1, PORTS + 1)]


class Desk:
    """The first rank's memory of what was said; for the threads of all connections."""

    def __init__(self, world: int, *, clock: Callable[[], float] = time.time) -> None:
        self.world, self.clock = world, clock
        self.values: dict[str, Any] = {}
        self.there: dict[str, set[int]] = {}
        self.decided: dict[str, list[int]] = {}
        self.lost: set[int] = set()
        self.changed = threading.Condition()

    def answer(self, rank: int, asked: dict[str, Any]) -> Any:
        """One of: put, get (None if it does not come), meet (who is missing), clock."""
        name, within_s = str(asked.get("name")), float(asked.get("within_s", 0.0))
        if asked["do"] == "clock":
            return self.clock()
        with self.changed:
            if asked["do"] == "put":
                self.values[name] = asked["value"]
                self.changed.notify_all()
            elif asked["do"] == "get":
                self.changed.wait_for(lambda: name in self.values, within_s)
                return self.values.get(name)
            elif asked["do"] == "meet":
                return self._meet(name, rank, within_s)
        return None

    def _meet(self, name: str, rank: int, within_s: float) -> list[int]:
        """All ranks get the same answer, which the first one that tires of waiting brings about."""
        self.there.setdefault(name, set()).add(rank)
        self.changed.notify_all()
        everyone = set(range(self.world))
        self.changed.wait_for(lambda: name in self.decided or self.there[name] | self.lost >= everyone, within_s)
        if name not in self.decided:
            self.decided[name] = sorted(everyone - self.there[name])
            self.lost |= {*self.decided[name]}  # they are not waited for again
            self.changed.notify_all()
        return self.decided[name]

    def lose(self, rank: int) -> None:
        with self.changed:
            self.lost.add(rank)
            self.changed.notify_all()


class Board:
    """One rank's end of it. Not for several threads."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any]) -> None:
        self._ask = ask

    def put(self, name: str, value: Any) -> None:
        self._ask({"do": "put", "name": name, "value": value})

    def get(self, name: str, *, within_s: float) -> Any:
        """None if nobody puts it there meanwhile."""
        return self._ask({"do": "get", "name": name, "within_s": within_s})

    def meet(self, name: str, *, within_s: float) -> list[int]:
        """Wait for all ranks; those that did not come, on all ranks the same."""
        found: list[int] = self._ask({"do": "meet", "name": name, "within_s": within_s})
        return found

    def offset(self, *, rounds: int, clock: Callable[[], float]) -> tuple[float, float]:
        """Seconds by which this rank's clock is ahead of the first one's, and how far off that may be: half of the shortest of
        ``rounds`` round trips."""
        best = (0.0, float("inf"))
        for _ in range(rounds):
            begun, at = time.perf_counter(), clock()
            theirs = self._ask({"do": "clock"})
            half = (time.perf_counter() - begun) / 2
            if half < best[1]:
                best = (at + half - theirs, half)
        return best


def alone() -> Board:
    """Of a single process."""
    desk = Desk(1)
    return Board(lambda asked: desk.answer(0, asked))


@contextmanager
def joined(meeting: Meeting, *, within_s: float) -> Iterator[Board]:
    """This rank's board. Raises ``OSError`` where the first rank finds no port or does not answer."""
    if meeting.world == 1:
        yield alone()
        return
    with _kept(meeting) if meeting.rank == 0 else _reached(meeting, within_s) as board:
        yield board


@contextmanager
def _kept(meeting: Meeting) -> Iterator[Board]:
    desk = Desk(meeting.world)
    server = _server(meeting, desk)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    try:
        yield Board(lambda asked: desk.answer(0, asked))
    finally:
        server.shutdown()
        server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024


def _server(meeting: Meeting, desk: Desk) -> _Server:
    class Handler(socketserver.StreamRequestHandler):
        timeout = PATIENCE_S  # of the greeting alone

        def handle(self) -> None:
            rank = _greeted(self.rfile.readline(LINE), meeting)
            if rank is None:
                return
            self.connection.settimeout(None)
            _say(self.wfile, {"welcome": rank})
            try:
                while line := self.rfile.readline(LINE):
                    _say(self.wfile, {"answer": desk.answer(rank, json.loads(line))})
            except (OSError, ValueError):  # torn off
                pass
            finally:
                desk.lose(rank)

    found = _resolved(meeting.host)
    for port in meeting.ports:
        # Other nodes may know this one by another address than it does itself.
        place = (found[1] if meeting.alone else "", port)
        try:
            return type("_Bound", (_Server,), {"address_family": found[0]})(place, Handler)
        except OSError:
            continue
    raise OSError(
        f"no port of {meeting.ports[0]} to {meeting.ports[-1]} is free on this machine, at which the ranks of doctor.py meet; "
        "use another MASTER_PORT"
    )


def _resolved(host: str) -> tuple[int, str]:
    """(family, address)"""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"MASTER_ADDR {host!r} is no address that this machine knows: {error}") from None
    return family, str(address[0])


def _greeted(line: bytes, meeting: Meeting) -> int | None:
    """The rank that a greeting comes from, if it is one of this job's."""
    try:
        hello = json.loads(line)
        rank = hello["rank"]
        good = hello["token"] == meeting.token and isinstance(rank, int) and 0 < rank < meeting.world
    except (ValueError, KeyError, TypeError):
        return None
    return rank if good else None


@contextmanager
def _reached(meeting: Meeting, within_s: float) -> Iterator[Board]:
    link = _connected(meeting, within_s)
    with link, link.makefile("rb") as reading, link.makefile("wb") as writing:

        def ask(asked: dict[str, Any]) -> Any:
            link.settimeout(asked.get("within_s", 0.0) + SPARE_S)
            _say(writing, asked)
            line = reading.readline(LINE)
            if not line:
                raise ConnectionError("the first rank is gone")
            return json.loads(line)["answer"]

        yield Board(ask)


def _connected(meeting: Meeting, within_s: float) -> socket.socket:
    end, why = time.monotonic() + within_s, "no answer"
    while time.monotonic() < end:
        for port in meeting.ports:
            try:
                return _welcomed(meeting, port)
            except (OSError, ValueError, KeyError) as error:
                why = " ".join(str(error).split()) or why
        time.sleep(0.1)
    raise TimeoutError(
        f"rank {meeting.rank} on {socket.gethostname()} did not reach the first rank at {meeting.host}, ports "
        f"{meeting.ports[0]} to {meeting.ports[-1]}, in {within_s:g} s ({why}); see that it was started, and that no firewall "
        "is between them"
    )


def _welcomed(meeting: Meeting, port: int) -> socket.socket:
    link = socket.create_connection((meeting.host, port), timeout=PATIENCE_S)
    try:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.sendall(json.dumps({"token": meeting.token, "rank": meeting.rank}).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n") and len(line) < 100:
            piece = link.recv(1)
            if not piece:
                raise ConnectionError("turned away")
            line += piece
        if json.loads(line)["welcome"] != meeting.rank:
            raise ConnectionError("met another program")
        return link
    except BaseException:
        link.close()
        raise


def _say(file: Any, message: dict[str, Any]) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()
