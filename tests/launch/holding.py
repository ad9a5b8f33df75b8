"""A job's command, held in its first attempt where a test disturbs it, so that no clock decides what it has done until then.

    INSIDE=("$PYTHON" tests/launch/holding.py step 4)           in env.sh; behind it come python launch/train_dit.py ...
    INSIDE=("$PYTHON" tests/launch/holding.py item FOLDER 4)    ... and python launch/encode.py ...

``step N``: the first rank of a training waits, behind step N's line in the log, for a signal. ``item FOLDER N``: all N tasks of
an array wait for each other, and task 2 for its end, behind the first item that it has made; FOLDER/held appears when it does.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.supervise import SUPERVISED

LIMIT_S = 300.0
HELD = "2"


def hold_training(step: int) -> None:
    from cogvideo_dist.engine.log import RunLog  # not in the supervisor, which starts a rank at once

    scalars, (signals, told) = RunLog.scalars, socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno())  # Python writes a byte to it for every signal that it handles

    def held(log: RunLog, done: int, values: Mapping[str, float]) -> None:
        scalars(log, done, values)
        if log.speaks and done == step and not select.select([signals], [], [], LIMIT_S)[0]:
            raise TimeoutError(f"no signal in {LIMIT_S:.0f} s")

    RunLog.scalars = held  # type: ignore[method-assign]


def hold_encoding(folder: Path, tasks: int) -> None:
    from cogvideo_dist.data.workshop import Workshop

    task, provide = os.environ["SLURM_ARRAY_TASK_ID"], Workshop._provide
    (folder / f"up.{task}").touch()
    wait_for(lambda: len([*folder.glob("up.*")]) == tasks)

    def held(workshop: Workshop, number: int, role: str) -> Any:
        item = provide(workshop, number, role)
        if task == HELD:
            (folder / "held").touch()
            wait_for(lambda: False)
        return item

    Workshop._provide = held  # type: ignore[method-assign]


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came in {LIMIT_S:.0f} s")
        time.sleep(0.05)


def main() -> None:
    place, *words = sys.argv[1:]
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if place == "step":
        step, _, *command = words
        if first and SUPERVISED in os.environ:
            hold_training(int(step))
    else:
        folder, tasks, _, *command = words
        if first:
            hold_encoding(Path(folder), int(tasks))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
