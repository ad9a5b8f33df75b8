"""Fresh worlds of ranks for one question each: processes that meet, answer with a JSON file and are gone in time."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.parallel.mesh import Place

Answer = dict[str, Any]
PRELOADED = ("launch.parity_steps", "deepspeed.runtime.zero.muon.muon_optimizer")
"""What takes seconds to import, imported once by the fork server."""
POLL_S = 0.01


class WorldError(RuntimeError):
    """A world that did not answer: the last line of its first error, or what ended it. ``details`` is the whole error."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def prepare(device: str) -> None:
    """Settings of this process that its ranks inherit."""
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # a pool of more threads would not survive the fork server's forks
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed takes a GPU where there is one
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


def run_world(
    work: Callable[..., Answer], job: Any, *, world: int, device: str, folder: Path, timeout_s: float
) -> list[Answer]:
    """``work(job, place)`` on ``world`` ranks of this machine, and what each answered; raises ``WorldError``.

    On GPUs every rank is a process of its own from the start, since CUDA does not survive a fork.
    """
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    folder.mkdir(parents=True)
    address = f"127.0.0.1:{_free_port()}"
    ranks = [
        context.Process(target=_rank, args=(work, job, Place(rank, world, rank, address, world), folder), daemon=True)
        for rank in range(world)
    ]
    try:
        for process in ranks:
            process.start()
        _wait(ranks, folder, timeout_s)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ranks: list[Any], folder: Path, timeout_s: float) -> None:
    """Until all ranks have ended; the first error ends the wait."""
    end = time.monotonic() + timeout_s
    while True:
        running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            text = errors[0].read_text(encoding="utf-8")
            raise WorldError(f"rank {errors[0].stem}: {text.strip().splitlines()[-1]}", text)
        for rank, process in enumerate(ranks):
            if process.exitcode:
                raise WorldError(f"rank {rank} ended with exit code {process.exitcode}", _tail(folder / f"{rank}.log"))
        if not running:
            return
        if time.monotonic() > end:
            raise WorldError(f"ranks {', '.join(map(str, running))} did not end in {timeout_s:g} s")
        time.sleep(POLL_S)


def _tail(log: Path, characters: int = 2000) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-characters:] if log.exists() else ""


def _rank(work: Callable[..., Answer], job: Any, place: Place, folder: Path) -> None:
    log = os.open(folder / f"{place.rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):  # what libraries print is not the command's result
        os.dup2(log, stream)
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(place.local_rank), RANK=str(place.rank), WORLD_SIZE=str(place.world))
    try:
        _put(folder / f"{place.rank}.json", json.dumps(work(job, place)))
    except BaseException:  # whatever it is, the command tells it
        _put(folder / f"{place.rank}.error", traceback.format_exc())
    # Without the end of an interpreter, in which threads of a process group may hang.
    os._exit(0)


def _put(path: Path, text: str) -> None:
    """Whole or not at all, as the waiting process may read at any time."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
