"""When a run is to stop before its end: signals of a scheduler, and the end of its time."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from types import FrameType

from launch.codes import LEAVE_NOW

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

AGAIN_S = 1.0
"""Within which a second SIGTERM is the first one, forwarded by a launcher beside the scheduler's own."""


@dataclass
class Stopping:
    """Why this process is to stop, if it is. ``ends_at``: when the scheduler ends the job, in seconds of the clock; the run
    stops ``margin_s`` before, and earlier if its steps and saves take longer."""

    ends_at: float | None = None
    margin_s: float = 120.0
    asked: str = ""
    since: float = field(default=0.0, repr=False)

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 ask for a stop. A second SIGTERM leaves at once: the last checkpoint stands."""
        for number in SIGNALS:
            signal.signal(number, self._told)

    def reason(self, *, pace_s: float) -> str:
        """Empty while there is none; ``pace_s``: seconds that a step and a save take."""
        if not self.asked and self.ends_at is not None and time.time() > self.ends_at - max(self.margin_s, 3 * pace_s):
            self.asked = "the job's time is nearly over"
        return self.asked

    def _told(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGTERM and now - self.since > AGAIN_S:
            os._exit(LEAVE_NOW)
        if not self.asked:
            self.asked, self.since = signal.Signals(number).name, now
