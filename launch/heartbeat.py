"""What a rank is at, in memory that its supervisor reads: no message, no lock, nothing that a hanging rank has to do."""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from typing import NamedTuple

SLOT, SLOTS = 256, 2
HEADER = struct.Struct("<q")
"""How many beats there were; the last one lies in the slot of that number."""


class Beat(NamedTuple):
    """The ``phase`` that a rank is in, of ``step``, ``since`` when (monotonic clock) and how many seconds it may take (0: any
    time)."""

    phase: str = "start"
    step: int = 0
    since: float = 0.0
    limit_s: float = 0.0

    def overdue(self, now: float, *, since: float = 0.0) -> bool:
        """Whether it takes too long; time before ``since`` does not count."""
        return self.limit_s > 0 and now - max(self.since, since) > self.limit_s

    @property
    def place(self) -> str:
        """Such as ``backward of step 12``."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase


class Heartbeat:
    """A page of memory with a file descriptor, which a rank inherits."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.page = mmap.mmap(descriptor, HEADER.size + SLOTS * SLOT)
        self.beats = HEADER.unpack_from(self.page)[0]

    @classmethod
    def make(cls) -> Heartbeat:
        descriptor = os.memfd_create("heartbeat")
        os.ftruncate(descriptor, HEADER.size + SLOTS * SLOT)
        return cls(descriptor)

    def beat(self, phase: str, *, step: int = 0, limit_s: float = 0.0) -> None:
        """From now on the rank is in ``phase``. Written beside the last beat, then made the last one."""
        text = json.dumps(Beat(phase, step, time.monotonic(), limit_s)).encode()
        first = HEADER.size + (self.beats + 1) % SLOTS * SLOT
        self.page[first : first + SLOT] = text.ljust(SLOT)
        self.beats += 1
        HEADER.pack_into(self.page, 0, self.beats)

    def read(self) -> Beat:
        while True:
            (beats,) = HEADER.unpack_from(self.page)
            if not beats:
                return Beat()
            first = HEADER.size + beats % SLOTS * SLOT
            text = self.page[first : first + SLOT]
            if HEADER.unpack_from(self.page)[0] < beats + SLOTS - 1:  # nothing was written into it meanwhile
                return Beat(*json.loads(text))
