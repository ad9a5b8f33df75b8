"""What srun says about this process: one task is one rank, and nothing else has to be said."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.parallel.mesh import Place

TASKS = "SLURM_STEP_NUM_TASKS"
"""Only srun sets it: a batch script has SLURM_PROCID and SLURM_NTASKS, too, but is one process."""

NUMBERS = (TASKS, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID")
LISTS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")

LOW, SPAN = 15_000, 15_000
"""Ports of rank 0: above those of services, below those that Linux gives to clients (32768 and up)."""


class Task(NamedTuple):
    """One of ``tasks`` processes of a step: ``per_node`` on each of its nodes, of which ``first_node`` is the first."""

    tasks: int
    number: int
    local: int
    per_node: int
    first_node: str
    port: int


def integer(name: str) -> int:
    """An environment variable's number."""
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(f"environment variable {name} must be an integer, found {os.environ[name]!r}") from None


def read_task() -> Task | None:
    """This process as srun numbers it; None outside of srun. Raises ``ConfigError`` where that is not a row of equal nodes."""
    if TASKS not in os.environ:
        return None
    if missing := [name for name in NUMBERS + LISTS if name not in os.environ]:
        raise ConfigError(
            f"srun started {os.environ[TASKS]} processes that would all do the same, since the environment sets {TASKS} but "
            f"not {', '.join(missing)}; start them with srun itself, or unset {TASKS}"
        )
    tasks, number, local, node, job, step = map(integer, NUMBERS)
    counts = _counts(os.environ[LISTS[0]])
    if len(set(counts)) > 1 or sum(counts) != tasks:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE {os.environ[LISTS[0]]} is not {tasks} tasks in equal numbers on every node; use srun's "
            "--ntasks-per-node"
        )
    if not 0 <= number < tasks or number != node * counts[0] + local:
        raise ConfigError(
            f"SLURM_PROCID {number} is not what SLURM_NODEID {node} and SLURM_LOCALID {local} mean with {counts[0]} tasks on a "
            "node; neighbouring ranks share a node with srun's --distribution=block"
        )
    restart = integer("SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in os.environ else 0
    return Task(tasks, number, local, counts[0], first_host(os.environ[LISTS[1]]), port_of(job, restart, step=step))


def place_of(task: Task) -> Place:
    """MASTER_ADDR and MASTER_PORT are followed where a site sets them."""
    if task.tasks == 1:
        return Place()
    address = os.environ.get("MASTER_ADDR", task.first_node)
    port = integer("MASTER_PORT") if "MASTER_PORT" in os.environ else task.port
    return Place(task.number, task.tasks, task.local, f"{address}:{port}", task.per_node)


def refuse_contradiction(place: Place, task: Task) -> None:
    """Between srun and the variables of another launcher that it started, or that somebody exported."""
    direct = "LOCAL_WORLD_SIZE" not in os.environ and "LOCAL_SIZE" not in os.environ  # torchrun's word, and deepspeed's
    ours, theirs = (place.rank, place.world, place.local_rank), (task.number, task.tasks, task.local)
    if direct and ours != theirs:
        raise ConfigError(
            f"RANK {ours[0]}, WORLD_SIZE {ours[1]} and LOCAL_RANK {ours[2]} contradict SLURM_PROCID {theirs[0]}, {TASKS} "
            f"{theirs[1]} and SLURM_LOCALID {theirs[2]}; leave RANK, WORLD_SIZE and LOCAL_RANK out, srun says it all"
        )
    if place.world % task.tasks:
        raise ConfigError(
            f"WORLD_SIZE {place.world} does not divide over {TASKS} {task.tasks}: srun started the launcher {task.tasks} "
            "times, each for a run of its own; give it all nodes (torchrun --nnodes), or leave it out, since srun is one itself"
        )


def first_host(nodes: str) -> str:
    """The first of a list such as ``gpu[003-005,9],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not first:
        raise ConfigError(f"SLURM_STEP_NODELIST must be a list of nodes, found {nodes!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def port_of(job: int, restart: int, *, step: int) -> int:
    """Another one for each of eight attempts, with eight steps each, of 154 consecutive jobs: none meets what an earlier one
    left, such as a process that would not die, or shared memory that DeepSpeed names by the port."""
    return LOW + (97 * job + 8 * restart + step) % SPAN


def _counts(text: str) -> list[int]:
    """Of ``2(x3),1``: 2, 2, 2, 1."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
