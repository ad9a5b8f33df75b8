"""Ranks for benchmarks: processes of one thread each that meet over gloo, and times that hold for all of them."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from bench.measure import DISTURBANCE, TICK, WARM_UPS, machine_seconds
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh, Place, start
from cogvideo_dist.parallel.ops import barrier, broadcast_object, gather_objects

TIMEOUT_S = 120.0
PRELOADED = [
    "bench.silent", "bench.ranks", "cogvideo_dist.engine.zero", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.sequence.layer",
]  # fmt: skip
"""What takes seconds to import, imported once by the fork server."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """``function(mesh, *args)`` on ``world`` ranks of a mesh that is data parallel; what each returns, by rank.

    Function, arguments and results travel as pickles. A rank that fails ends all with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    os.environ["OMP_NUM_THREADS"] = "1"  # a pool of more threads would not survive the server's forks
    context.set_forkserver_preload(PRELOADED)
    address, pipes, processes = f"127.0.0.1:{_free_port()}", {}, []
    try:
        for rank in range(world):
            pipe, far_end = context.Pipe(duplex=False)
            job = (far_end, function, Place(rank, world, rank, address, world), args)
            processes.append(context.Process(target=_rank, args=job, daemon=True))
            processes[-1].start()
            far_end.close()
            pipes[pipe] = rank
        return _results(pipes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _results(pipes: Mapping[Any, int], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        ready: list[Any] = wait([pipe for pipe, rank in pipes.items() if rank not in results], end - time.monotonic())
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(pipes.values()) - set(results))} did not end in {timeout_s:g} s")
        for pipe in ready:
            failed, value = pipe.recv()
            if failed:
                raise RuntimeError(f"rank {pipes[pipe]} failed first:\n{value}")
            results[pipes[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Connection, function: Callable[..., Any], place: Place, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(place.rank), RANK=str(place.rank), WORLD_SIZE=str(place.world))
    try:
        result = function(start(place, device=torch.device("cpu"), timeout_s=60), *args)
    except BaseException:  # whatever it is, the parent shows it
        pipe.send((True, traceback.format_exc()))
    else:
        pipe.send((False, result))


@dataclass(frozen=True)
class Timing:
    """Undisturbed runs of every side that are wanted, the seconds for which they are waited for, and the runs before them."""

    repeats: int = 7
    limit: float = 8.0
    warm_ups: int = WARM_UPS


def timed(times: Mapping[str, list[float]], undisturbed: bool) -> dict[str, Any]:
    """What ``interleaved_ranks`` gives, for a result, with the medians."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {"seconds": times, "median_seconds": medians, "undisturbed": undisturbed}


def interleaved_ranks(
    sides: Mapping[str, Callable[[], object]], mesh: ParallelMesh, timing: Timing
) -> tuple[dict[str, list[float]], bool]:
    """``measure.interleaved`` for all ranks of a mesh at once: they start a run together, and it lasts as long as its slowest
    rank. A run is disturbed if processes other than the ranks took more than ``DISTURBANCE`` of a core."""
    keep_freed_blocks()
    names, world = list(sides), mesh.world
    every, kept = ({name: list[float]() for name in names} for _ in range(2))
    for name in names * timing.warm_ups:
        timed_ranks(sides[name], world)
    end, turn = time.monotonic() + timing.limit, 0
    while waiting := [name for name in names if len(kept[name]) < timing.repeats]:
        late = broadcast_object(time.monotonic() > end, world)
        if late and min(map(len, every.values())) >= timing.repeats:
            return every, False
        first = turn % len(waiting)
        for name in waiting[first:] + waiting[:first]:
            seconds, disturbed = timed_ranks(sides[name], world)
            every[name].append(seconds)
            if not disturbed:
                kept[name].append(seconds)
        turn += 1
    return kept, True


def timed_ranks(run: Callable[[], object], world: Axis) -> tuple[float, bool]:
    """Seconds of the slowest rank, and whether other processes disturbed the run; the same on every rank."""
    barrier(world)
    busy, own, start = machine_seconds(), time.process_time(), time.perf_counter()
    run()
    seconds, own = time.perf_counter() - start, time.process_time() - own
    busy = machine_seconds() - busy
    ranks = gather_objects((seconds, own, busy), world)
    slowest = max(ranks)
    others = slowest[2] - sum(rank[1] for rank in ranks)
    return slowest[0], others > DISTURBANCE * slowest[0] + 2 * TICK


def keep_freed_blocks() -> None:
    """Otherwise the time of a run depends on which blocks the C library gave back to the kernel before it."""
    _malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def peak_bytes(run: Callable[[], object], world: Axis) -> int:
    """The kernel's high-water mark of resident memory during a run, less what was resident before, on the worst rank.

    Freed blocks go back to the kernel at once from the first call on, so nothing may be timed in this process after it.
    """
    _malloc_options({M_MMAP_THRESHOLD: 65536, M_TRIM_THRESHOLD: 0})
    run()  # buffers of the process group and of matrix products, which stay
    gc.collect()
    barrier(world)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(gather_objects(_resident("VmHWM") - before, world))


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _malloc_options(options: Mapping[int, int]) -> None:
    library = ctypes.CDLL(None)
    for option, value in options.items():
        library.mallopt(option, value)
