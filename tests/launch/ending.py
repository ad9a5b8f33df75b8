"""launch/train_dit.py, ended by a signal at a call that is counted, so that no clock decides where.

    python tests/launch/ending.py CALL SIGINT|SIGKILL --config ...

CALL counts from 0 the ends of backwards, of optimizer (micro-)steps and of lines of the log.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.engine.zero import Engine
from launch.environment import run_command
from launch.train_dit import main


def counted(function: Callable[..., Any], calls: count[int], *, last: int, by: signal.Signals) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if next(calls) == last:
            signal.raise_signal(by)
        return result

    return call


if __name__ == "__main__":
    _, last, name, *rest = sys.argv
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    calls = count()
    for owner, method in ((Engine, "backward"), (Engine, "step"), (RunLog, "scalars")):
        setattr(owner, method, counted(getattr(owner, method), calls, last=int(last), by=signal.Signals[name]))
    sys.argv = ["train_dit.py", *rest]
    run_command("train_dit", main)
