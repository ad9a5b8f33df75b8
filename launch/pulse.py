"""A rank's side of its supervision (launch/supervise.py): what it is at, how it ends and, when asked, where it stands."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from cogvideo_dist.config.watch import Watch
from cogvideo_dist.parallel.mesh import Place
from cogvideo_dist.parallel.recorder import RECORDS, collectives
from launch.heartbeat import Heartbeat
from launch.supervise import SUPERVISED

STEP = ("data", "forward", "backward", "update")
"""The phases of a step."""

LONGEST_TRACE = 20_000

EXIT_S = 60.0
"""In which a rank that has said its last word is gone, or it is killed."""


class Pulse:
    """Says nothing where nobody listens."""

    def __init__(self, descriptors: tuple[int, int, int] | None) -> None:
        self.channel: socket.socket | None = None
        self.limits, self.first = Watch(), -1
        if descriptors is None:
            return
        beats, channel, self.stacks = descriptors
        self.heartbeat = Heartbeat(beats)
        self.channel = socket.socket(fileno=channel)
        faulthandler.enable(file=self.stacks, all_threads=True)
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=True)
        os.environ.setdefault(RECORDS, "2000")
        threading.Thread(target=self._answer, name="pulse", daemon=True).start()

    @property
    def heard(self) -> bool:
        return self.channel is not None

    def join(self, place: Place, folder: Path, *, limits: Watch, meeting: str) -> None:
        """This rank's place, the run's folder, and the name of this start, which all its ranks have alike."""
        self.limits = limits
        self.mark("init")
        self._tell(
            join={
                "rank": place.rank, "world": place.world, "node": place.node, "address": place.address,
                "folder": str(folder.absolute()), "meeting": meeting, "patience_s": limits.init_s,
            }
        )  # fmt: skip

    def mark(self, phase: str, step: int = 0) -> None:
        """From now on this rank is in ``phase`` of making ``step``."""
        if self.channel is None:
            return
        if phase in STEP:
            self.first = step if self.first < 0 else self.first
            limit = self.limits.first_step_s if step == self.first else self.limits.step_s
            limit = max(limit, self.limits.data_s) if phase == "data" else limit
        else:
            limit = float(getattr(self.limits, f"{phase}_s"))
        self.heartbeat.beat(phase, step=step, limit_s=limit)

    def ended(self, code: int, text: str, *, trace: str = "", bug: bool = False, agreed: bool = False) -> None:
        """Why this process is about to end with ``code``: ``text`` is for people, empty if there is nothing to say, ``trace``
        for the logs, and shown if it is a ``bug``. ``agreed``: all ranks end so, each in its own time."""
        if self.channel is not None:
            self.heartbeat.beat("exit", limit_s=EXIT_S)
        self._tell(
            ended={"code": int(code), "text": text, "trace": trace[-LONGEST_TRACE:], "bug": bug, "agreed": agreed}
        )

    def _tell(self, **message: Any) -> None:
        if self.channel is not None:
            with suppress(OSError):  # the supervisor is gone, and so is this process
                self.channel.send(json.dumps(message).encode())

    def _answer(self) -> None:
        """Whatever the supervisor sends is the question where this rank stands. Without a supervisor there is no rank."""
        channel = self.channel
        while channel is not None and channel.recv(1024):
            self._tell(stands={"collectives": collectives(), "stack": _main_stack()})
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # and what it has started
        os.kill(os.getpid(), signal.SIGKILL)


@cache
def pulse_of_process() -> Pulse:
    """That of this process, if ``launch/supervise.py`` started it."""
    said = os.environ.pop(SUPERVISED, "")
    if not said:
        return Pulse(None)
    beats, channel, stacks = map(int, said.split(","))
    return Pulse((beats, channel, stacks))


def _main_stack() -> list[str]:
    """Where the main thread is: file:line function, the innermost first, those of this project and torch's collectives."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    entries = traceback.extract_stack(frame)[::-1]
    return [f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in entries][:12]
