"""Ranks for tests: forked from a server that has imported torch and deepspeed once, meeting over gloo on one thread each.

``run_ranks(function, world, ...)`` returns every rank's result, raises the traceback of the rank that failed first, and ends
every process it started within its time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.parallel.mesh import ParallelMesh, Place, start

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """``function(mesh, *args)`` on ``world`` ranks. Functions and arguments travel by reference and pickle."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"127.0.0.1:{free_port()}"
        ranks = [
            _context.Process(
                target=_rank, args=(function, Place(rank, world, rank, address), folder, args), daemon=True
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _wait(ranks: list[Any], folder: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks):
        failures = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if failures:
            raise AssertionError(f"rank {failures[0].stem} failed first:\n{failures[0].read_text()}")
        if time.monotonic() > end:
            raise AssertionError(
                f"ranks {[i for i, p in enumerate(ranks) if p.is_alive()]} did not end in {timeout_s} s"
            )
        time.sleep(0.01)
    for rank, process in enumerate(ranks):
        if process.exitcode:
            error = folder / f"{rank}.error"
            raise AssertionError(error.read_text() if error.exists() else f"rank {rank} ended with {process.exitcode}")


def _rank(function: Callable[[ParallelMesh], Any], place: Place, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(place.rank), RANK=str(place.rank), WORLD_SIZE=str(place.world))
    code = 0
    try:
        result = function(start(place, device=torch.device("cpu"), timeout_s=60), *args)
        torch.save(result, Path(folder) / f"{place.rank}.pt")
    except BaseException:  # whatever it is, the parent shows it
        partial = Path(folder) / f"{place.rank}.partial"
        partial.write_text(traceback.format_exc())
        partial.rename(partial.with_suffix(".error"))
        code = 1
    sys.stdout.flush()
    os._exit(code)
