"""Every rank has a supervisor: the process that its launcher started, which starts the rank and does nothing but watch it.

It is light, since it imports nothing but Python's own. It knows at once when its rank dies, and sees from the rank's heartbeat
(launch/heartbeat.py) when it stands still. The supervisors of a run are linked (launch/supervise_hub.py), so that all ranks
end, and one line says why. Whatever the rank leaves behind dies with it, and the rank dies with its supervisor.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch.codes import LEAVE_NOW, TRANSIENT
from launch.heartbeat import Heartbeat
from launch.supervise_hub import Ending, Hub, Member, decoded, say

SUPERVISED = "COGVIDEO_DIST_SUPERVISED"
"""In the environment of a supervised rank: descriptors of its heartbeat, of its channel and of a file for stacks."""

ALONE = "COGVIDEO_DIST_ALONE"
"""If set, the process that was started does the work itself, for a debugger."""

DIES_WITH_PARENT, ADOPTS = 1, 36  # of prctl(2)

TURN_S = 0.1
"""Between two looks at the rank."""

PAUSE_S = 5.0
"""A turn that took longer: the whole job was suspended, and the time counts for nobody."""

START_S = 1800.0
"""For imports and the configuration."""

ALONE_S = 10.0
"""How long a supervisor whose rank hangs looks for the first one."""

PATIENCE_S = 3.0
"""How long a rank that is not linked yet holds back its error, which the first one most likely reports as well."""

ANSWER_S = 2.0
"""How long a rank may take to say where it stands."""

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def supervise() -> None:
    """In the process that a launcher started: start the rank as a process of its own, watch it, and end with its code.
    Returns in the rank, at once."""
    if SUPERVISED in os.environ:
        prctl(DIES_WITH_PARENT, signal.SIGKILL)
        return
    if ALONE in os.environ:
        return
    sys.exit(Supervisor(Path(sys.argv[0]).stem, spawned).run())


def spawned(descriptors: tuple[int, int, int]) -> int:
    """The rank: the same command once more, in a session of its own, so that every signal reaches it once."""
    environment = {**os.environ, SUPERVISED: ",".join(map(str, descriptors))}
    command = [sys.executable, *sys.orig_argv[1:]]
    return subprocess.Popen(command, env=environment, pass_fds=descriptors, start_new_session=True).pid


@dataclass(frozen=True)
class Said:
    """What is to be said of a rank's end."""

    text: str = ""
    trace: str = ""


@dataclass
class Rank:
    """The process that is watched."""

    pid: int
    heartbeat: Heartbeat
    channel: socket.socket
    stacks: int
    number: int = 0
    mute: bool = False
    """Whether it has closed its end of the channel."""
    rss: int = 0
    """Bytes, when it was last looked at."""
    ended: dict[str, Any] | None = None
    """What it said about its end."""
    stands: dict[str, Any] | None = None
    """What it said about where it stands."""


class Supervisor:
    """``spawn`` starts a rank that inherits descriptors of a heartbeat, of a channel and of a file for stacks."""

    def __init__(self, name: str, spawn: Callable[[tuple[int, int, int]], int]) -> None:
        self.name, self.selector = name, selectors.DefaultSelector()
        prctl(ADOPTS, 1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        heartbeat, stacks = Heartbeat.make(), os.memfd_create("stacks")
        heartbeat.beat("start", limit_s=START_S)
        self.rank = Rank(spawn((heartbeat.descriptor, theirs.fileno(), stacks)), heartbeat, ours, stacks)
        theirs.close()
        for number in FORWARDED:
            signal.signal(number, self._forward)
        self.selector.register(ours, selectors.EVENT_READ, self._heard)
        self.member: Member | None = None
        self.hub: Hub | None = None
        self.folder: Path | None = None
        self.ending: Ending | None = None
        self.resumed = 0.0
        self.accused = 0.0  # since when its rank hangs
        self.said = Said()

    def run(self) -> int:
        """Until the rank has ended; the code to end with."""
        turned = time.monotonic()
        while True:
            for key, _ in self.selector.select(TURN_S):
                key.data()
            now = time.monotonic()
            self.resumed = now if now - turned > PAUSE_S else self.resumed
            turned = now
            status = self._status()
            if status is not None:
                return self._ended(status)
            self._watch(now)
            self._turn_links()
            if self.ending and now > self.ending.deadline:
                self._kill()

    def _watch(self, now: float) -> None:
        beat = self.rank.heartbeat.read()
        overdue = beat.overdue(now, since=self.resumed)
        if self.rank.ended is not None:
            if overdue:  # it has done its work, and hangs on its way out
                self._kill()
            return
        self.rank.rss = resident(self.rank.pid) or self.rank.rss
        if overdue and not self.accused:
            self.accused = now
            self._fail("hang", f"hangs: {beat.place} takes longer than {beat.limit_s:.0f} s", TRANSIENT)
        elif self.accused and not self.linked and now - self.accused > ALONE_S:
            self._kill()  # nobody is there to ask the others

    @property
    def linked(self) -> bool:
        return self.member is not None and self.member.welcome

    def _heard(self) -> None:
        """A message of the rank, which has one for this process or has closed its end."""
        try:
            data = self.rank.channel.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.rank.mute = True
            self.selector.unregister(self.rank.channel)
            return
        message = decoded(data)
        if "join" in message:
            self._join(message["join"])
        self.rank.ended = message.get("ended", self.rank.ended)
        self.rank.stands = message.get("stands", self.rank.stands)

    def _hear_out(self, seconds: float, enough: Callable[[], bool]) -> None:
        """What the rank says within ``seconds``."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.rank.channel, selectors.EVENT_READ)
            while not self.rank.mute and not enough() and selector.select(max(0.0, end - time.monotonic())):
                self._heard()

    def _join(self, place: dict[str, Any]) -> None:
        self.rank.number, self.folder = place["rank"], Path(place["folder"])
        if place["rank"] == 0:
            with suppress(OSError):  # of a folder that cannot be written, which the rank is about to say
                self.hub = Hub(self.name, place, selector=self.selector)
        self.member = Member(place, pid=self.rank.pid, selector=self.selector)

    def _turn_links(self) -> None:
        """What other supervisors say, and what the first one makes of it."""
        if self.hub:
            self.hub.turn()
        if not self.member:
            return
        for message in self.member.turn():
            if "ask" in message:
                self.member.say(stands=self._standing())
            elif "end" in message and self.ending is None:
                self.ending = Ending.of(message["end"])

    def _standing(self) -> dict[str, Any]:
        """Where the rank stands, by its own word if it answers, and by what the system says of it."""
        rank, beat = self.rank, self.rank.heartbeat.read()
        rank.stands = None
        state = process_state(rank.pid)
        if state not in "Tt":
            with suppress(OSError):
                rank.channel.send(b"?")
            self._hear_out(ANSWER_S, lambda: rank.stands is not None)
            with suppress(OSError):
                os.kill(rank.pid, signal.SIGUSR2)  # its stacks, even if it cannot run a line of Python
        return {
            "phase": beat.phase, "step": beat.step, "age": time.monotonic() - beat.since, "state": state,
            "host": socket.gethostname(), "pid": rank.pid, "overdue": bool(self.accused), **(rank.stands or {"stack": None}),
        }  # fmt: skip

    def _status(self) -> int | None:
        """The rank's exit status, negative for a signal, if it has ended. Whatever it left behind is adopted and buried."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return -signal.SIGKILL
            if pid == self.rank.pid:
                return os.waitstatus_to_exitcode(status)
            if not pid:
                return None

    def _ended(self, status: int) -> int:
        """The rank is gone: say why, end what it left behind, and let the others know."""
        self._hear_out(0.0, lambda: False)
        end_orphans()
        self._keep_stacks()
        said = self.rank.ended
        if said and said["trace"]:
            self._note(said["trace"])
        if said is None and status == LEAVE_NOW:
            said = {"text": "", "code": status, "trace": "", "bug": False, "agreed": True}
        if said is None and self.member is None and status >= 0:
            return status  # it came to nothing, and Python has said why
        code = said["code"] if said else TRANSIENT
        if said is None and not self.ending and not self.accused:
            self._fail("died", self._obituary(status), code)
        elif said:
            kind = "agreed" if said["agreed"] else "ended"
            self._fail(kind, said["text"], code, trace=said["trace"] if said["bug"] else "")
        self._leave(code)
        if self.ending is None or (said and said["agreed"]):
            return code
        if self.ending.rank != self.rank.number:
            self._note(f"rank {self.rank.number} stopped: rank {self.ending.rank} failed first: {self.ending.text}")
        return self.ending.code

    def _leave(self, code: int) -> None:
        """Until what this rank had to say is heard and, on the first one, all have ended."""
        if self.member:
            self.member.bye(code)
        while (self.member and not self.member.done) or (self.hub and not self.hub.done):
            for key, _ in self.selector.select(TURN_S):
                key.data()
            self._turn_links()
        if self.hub:
            self.hub.close()
        if not self.linked and self.said.text:
            self._say_alone()

    def _fail(self, kind: str, text: str, code: int, *, trace: str = "") -> None:
        """Let the first supervisor know."""
        self.said = Said(text if kind in ("ended", "agreed") else f"error: it {text}", trace)
        if self.member:
            self.member.say(fail={"kind": kind, "text": text, "code": code, "trace": trace})

    def _say_alone(self) -> None:
        """Nobody is known who would say it; the first rank most likely has the same to say."""
        first = rank_of_environment()
        if first and self.member is None:
            time.sleep(PATIENCE_S)
        say(self.name, f"rank {first}: {self.said.text}" if first else self.said.text, trace=self.said.trace)

    def _obituary(self, status: int) -> str:
        """How the rank died, and in which phase."""
        beat = self.rank.heartbeat.read()
        if status >= 0:
            how = f"ended with {status} before its end, without a word"
        else:
            name = signal.Signals(-status).name if -status in signal.valid_signals() else str(-status)
            how = f"was killed by {name}"
            if -status == signal.SIGKILL:
                how += f" (it held {self.rank.rss / 2**30:.2f} GiB; if the machine ran out of memory, the kernel's log says so)"
        return f"{how} in {beat.place}"

    def _kill(self) -> None:
        for number in (self.rank.pid, -self.rank.pid):
            with suppress(ProcessLookupError, PermissionError):
                (os.killpg if number < 0 else os.kill)(abs(number), signal.SIGKILL)

    def _keep_stacks(self) -> None:
        """Stacks that the rank wrote as it crashed or hung, beside the run's logs."""
        if self.folder and os.fstat(self.rank.stacks).st_size:
            self._note(os.pread(self.rank.stacks, 1 << 20, 0).decode(errors="replace"))

    def _note(self, text: str) -> None:
        """A line for whoever looks into this rank."""
        if self.folder is None:
            return
        with suppress(OSError):
            logs = self.folder / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            with (logs / f"rank-{self.rank.number}.log").open("a", encoding="utf-8") as file:
                file.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.rank.pid, number)


def rank_of_environment() -> int:
    """This process's number, as far as launchers say."""
    return next((int(text) for name in ("RANK", "SLURM_PROCID") if (text := os.environ.get(name, "")).isdecimal()), 0)


def prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 if it cannot be told."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def process_state(pid: int) -> str:
    """Its letter: R runs, S sleeps, D waits for a device, T is stopped; ``?`` if it cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def end_orphans() -> None:
    """Kill what this process has adopted, and what those leave behind, until nothing is left."""
    end = time.monotonic() + 5.0
    while time.monotonic() < end and (orphans := children_of(os.getpid())):
        for pid in orphans:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
