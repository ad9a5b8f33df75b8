"""Which ranks do what together. An axis is a value; of size 1 it means "not parallel" and needs no process group."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """The ranks that share one role, this rank's place among them, and their process group (None at size 1)."""

    name: str
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class ParallelMesh:
    """``dp``: ranks with different samples; ``replica``: ranks that hold the same parameters, over which ZeRO partitions."""

    dp: Axis
    replica: Axis

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: prints, logs and writes."""
        return self.replica.rank == 0


@dataclass(frozen=True)
class Place:
    """This process as its launcher describes it. ``address`` is host:port of rank 0's store; unused by a single process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = ""


def start(place: Place, *, device: torch.device, timeout_s: float = 1800.0) -> ParallelMesh:
    """Join the process group and build the mesh. A single process makes a group of its own, without a port."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{place.address}",
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout_s),
        )
    ranks = tuple(range(place.world))
    return ParallelMesh(
        dp=Axis("dp", place.rank, place.world, ranks, dist.group.WORLD),
        replica=Axis("replica", place.rank, place.world, ranks, dist.group.WORLD),
    )


def stop() -> None:
    """Leave the process group."""
    dist.destroy_process_group()
