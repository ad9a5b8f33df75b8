"""What the launcher says about this process, and how a command ends. The only place that reads the environment."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.data.pool import WorkerError
from cogvideo_dist.data.storage import StorageError
from cogvideo_dist.engine.ending import NoProgress, OutOfMemory, Stopped
from cogvideo_dist.engine.manifest import CheckpointError, SaveError
from cogvideo_dist.parallel.agreement import check_alike
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, Place, start
from cogvideo_dist.protocols import TooManyDefects
from launch.codes import (
    DATA,
    FAILED,
    INTERRUPTED,
    NO_PROGRESS,
    NON_FINITE,
    REFUSED,
    STOPPED,
    TRANSIENT,
    UNSAVED,
)  # fmt: skip
from launch.pulse import pulse_of_process
from launch.slurm.place import integer, place_of, read_task, refuse_contradiction
from launch.supervise import PATIENCE_S, rank_of_environment
from launch.supervise_verdict import GONE

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
NAMES = (*RANKS, "MASTER_ADDR", "MASTER_PORT")

LOST = re.compile(
    r"(closed|reset) by peer|Broken pipe|timed out (waiting|after)|NCCL|connection refused", re.IGNORECASE
)
"""What a collective says when a rank that it waits for is gone."""

TAKEN, FULL = "EADDRINUSE", "DefaultCPUAllocator"
"""In what torch says when a port is taken, and when the host's memory is full."""


def read_place() -> Place:
    """This process's rank as ``deepspeed``, ``torchrun`` or ``srun`` announces it; if none does, a single process."""
    task, given = read_task(), [name for name in NAMES if name in os.environ]
    if task is not None and not {*RANKS} & {*given}:
        return place_of(task)
    if not given:
        _refuse_unread_launchers()
        return Place()
    missing = [name for name in NAMES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start with deepspeed, torchrun or srun, or "
            "unset them to run one process"
        )
    rank, world, local_rank, port = (integer(name) for name in (*RANKS, "MASTER_PORT"))
    # torchrun and deepspeed have each their word for the ranks of a node.
    node = next((integer(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), 1)
    if not 0 <= rank < world:
        raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {world}")
    if not 0 <= local_rank < world:
        raise ConfigError(f"LOCAL_RANK {local_rank} is not below WORLD_SIZE {world}")
    if not 0 < port < 2**16 or not os.environ["MASTER_ADDR"]:
        raise ConfigError(f"MASTER_ADDR {os.environ['MASTER_ADDR']!r} and MASTER_PORT {port} are no address to meet at")
    place = Place(rank, world, local_rank, f"{os.environ['MASTER_ADDR']}:{port}", node)
    if task is not None:
        refuse_contradiction(place, task)
    return place


def _refuse_unread_launchers() -> None:
    """Processes that would take themselves for the only one."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in os.environ and integer(name) > 1:
            raise ConfigError(
                f"mpirun started {os.environ[name]} processes ({name}) that would all do the same; start with deepspeed, "
                "torchrun or srun"
            )


class Worker(NamedTuple):
    """One of ``workers`` processes that divide work among themselves without talking to each other."""

    number: int = 0
    workers: int = 1


ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")


def read_worker(task: int | None, tasks: int | None) -> Worker:
    """This process among the ranks of all tasks: a task is given by ``task`` of ``tasks`` or by a Slurm array, its ranks by a
    launcher. Raises ``ConfigError`` where these contradict each other."""
    if (task is None) != (tasks is None):
        raise ConfigError("--task and --tasks belong together, such as --task 0 --tasks 8")
    if tasks is not None and task is not None and not 0 <= task < tasks:
        raise ConfigError(f"--task {task} is not in 0 to {tasks - 1}, as --tasks {tasks} means")
    given, array = None if task is None or tasks is None else Worker(task, tasks), _array_task()
    if given and array and given != array:
        raise ConfigError(
            f"--task {given.number} --tasks {given.workers} contradicts the Slurm array, in which this is task "
            f"{array.number} of {array.workers} (counted from 0); leave --task and --tasks out"
        )
    own, place = given or array or Worker(), read_place()
    return Worker(own.number * place.world + place.rank, own.workers * place.world)


def _array_task() -> Worker | None:
    """This task of a Slurm array, counted from 0 whatever the array's first number and step."""
    given = [name for name in ARRAY if name in os.environ]
    if "SLURM_ARRAY_TASK_ID" not in given:
        return None
    if len(given) < len(ARRAY):
        missing = ", ".join(name for name in ARRAY if name not in given)
        raise ConfigError(
            f"the environment sets SLURM_ARRAY_TASK_ID but not {missing}; give --task and --tasks instead"
        )
    number, count, first, step = map(integer, ARRAY)
    last = integer("SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in os.environ else first + (count - 1) * step
    if step < 1 or (last - first) // step + 1 != count or number not in range(first, last + 1, step):
        raise ConfigError(
            f"task {number} of a Slurm array of {count} tasks from {first} to {last} in steps of {step}: the numbers must be "
            "evenly spaced, such as --array=0-7 or --array=1-15:2"
        )
    return Worker((number - first) // step, count)


def device_of(place: Place) -> torch.device:
    """This process's GPU; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= (visible := torch.cuda.device_count()):
        raise ConfigError(
            f"rank {place.rank} is number {place.local_rank} on its node but sees {visible} GPU{'s' * (visible > 1)}; start at "
            "most one rank for each, all of which every rank must see (with srun --gpus-per-node, without --gpus-per-task and "
            "--gpu-bind)"
        )
    return torch.device("cuda", place.local_rank)


def join(
    place: Place, layout: Layout | None = None, *, facts: Mapping[str, str] | None = None
) -> tuple[ParallelMesh, torch.device]:
    """Take this process's device, join the process group and build the mesh; without a layout all ranks are data parallel.

    Raises ``ConfigError`` where ranks differ in ``facts``.
    """
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed insists on it, also in a single process
    device = device_of(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.node))
    check = None if facts is None else partial(check_alike, facts)
    return start(place, device=device, layout=layout, check=check), device


def config_parser(description: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="FILE.yaml | key.path=value",
        help="configuration files, later ones win key by key, and overrides such as train.steps=20",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    return parser


def training_parser(description: str, example: str) -> argparse.ArgumentParser:
    """That of a command that trains."""
    parser = config_parser(description, example)
    parser.add_argument(
        "--new-data", action="store_true",
        help="go on although the shards are not what the run began with; which clips come next is then another order",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", metavar="step-000020",
        help="go on from this checkpoint of the run instead of its newest whole one; newer ones are set aside",
    )  # fmt: skip
    parser.add_argument(
        "--replay", metavar="STEP", type=int,
        help="only compute this step, counted from 1, once more and name the first module whose numbers are not finite; the "
        "run stays as it is",
    )  # fmt: skip
    return parser


def job_name() -> str:
    """The scheduler's or launcher's name of this job, which all its starts have, if one started it."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")


def job_end() -> float | None:
    """When the scheduler ends this job, in seconds of the clock, if it says so."""
    return float(integer("SLURM_JOB_END_TIME")) if "SLURM_JOB_END_TIME" in os.environ else None


def meeting_of(place: Place) -> str:
    """A name of this start of the job, which all its ranks have alike and no other start has."""
    names = (
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
    )
    said = [place.address, str(place.world), *(os.environ.get(name, "") for name in names)]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]


def restarts() -> int:
    """How often the scheduler or launcher has started this job again."""
    return sum(integer(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT") if name in os.environ)


class ConfigItems(TypedDict):
    files: list[str]
    overrides: list[str]


def split_config(items: Sequence[str]) -> ConfigItems:
    """Whatever has a ``=`` and is no existing file is an override."""
    overrides = [item for item in items if "=" in item and not Path(item).is_file()]
    return {"files": [item for item in items if item not in overrides], "overrides": overrides}


def run_command(name: str, main: Callable[[], None]) -> None:
    """Run a command to its exit code; errors of the input end with one line, from one rank.

    A supervised rank leaves it to its supervisor to say that line.
    """
    pulse = pulse_of_process()
    try:
        main()
    except SystemExit as error:  # argparse has said why
        pulse.ended(error.code if isinstance(error.code, int) else bool(error.code), "", agreed=not error.code)
        raise
    except BaseException as error:
        text, code = ending_of(error), code_of(error)
        if pulse.heard:
            trace = "".join(traceback.format_exception(error))
            said = text or f"error: {type(error).__name__}: {error}"
            pulse.ended(code, said, trace=trace, bug=not text, agreed=isinstance(error, AGREED))
            sys.exit(code)
        if not text:
            raise
        _leave(name, text, code)
    pulse.ended(0, "", agreed=True)


def ending_of(error: BaseException) -> str:
    """What is to be said of a command that ends with ``error``; empty if that is a fault of ours, which needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; start the same command again to go on from the last checkpoint"
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, MemoryError) or _says(error, FULL):
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return f"error: the host's memory is full ({error or 'no room'}); this process held {held:.1f} GiB at most"
    if isinstance(error, (ValueError, OSError, FloatingPointError, WorkerError, NoProgress, OutOfMemory)):
        return f"error: {error}"
    if _says(error, TAKEN):
        port = os.environ.get("MASTER_PORT", "")
        return (
            f"error: port {port} of this machine, at which ranks are to meet, is taken; see by whom with ss -ltnp, or choose "
            "another (--master_port, MASTER_PORT)"
        )
    if isinstance(error, RuntimeError) and code_of(error) == TRANSIENT:
        return f"error: {GONE}: {error}; the last checkpoint stands"
    return ""


def code_of(error: BaseException) -> int:
    """The exit code of a command that ends with ``error``."""
    if isinstance(error, (StorageError, WorkerError)):
        return FAILED if getattr(error, "missing", False) else TRANSIENT
    for kinds, code in CODES:
        if isinstance(error, kinds):
            return code
    passing = _says(error, TAKEN) or _says(error, FULL) or (isinstance(error, RuntimeError) and LOST.search(str(error)))
    return TRANSIENT if passing else FAILED


def _says(error: BaseException, what: str) -> bool:
    return isinstance(error, RuntimeError) and what in str(error)


CODES: tuple[tuple[type[BaseException], int], ...] = (
    (KeyboardInterrupt, INTERRUPTED), (Stopped, STOPPED), (ConfigError, REFUSED), (CheckpointError, REFUSED),
    (FloatingPointError, NON_FINITE), (SaveError, UNSAVED),
    (TooManyDefects, DATA), (NoProgress, NO_PROGRESS), (OutOfMemory, NON_FINITE), (MemoryError, TRANSIENT),
)  # fmt: skip


AGREED = (Stopped, FloatingPointError, SaveError)
"""Errors that all ranks raise alike."""


def _leave(name: str, text: str, code: int) -> None:
    rank = rank_of_environment()
    if rank:
        time.sleep(PATIENCE_S)  # the launcher ends this rank meanwhile if the first one failed too
        text = f"rank {rank}: {text}"
    sys.stderr.write(f"{name}: {' '.join(text.split())}\n")
    sys.stderr.flush()
    sys.exit(code)
