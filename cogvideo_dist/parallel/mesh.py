"""Which ranks do what together. An axis is a value; of size 1 it means "not parallel" and needs no process group.

Ranks are row-major over (dp, ring, ulysses, tp), so that neighbours, which share a node, exchange most: tp within ulysses
within ring within dp. The other axes are unions of these four.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cogvideo_dist.config.schema import Parallel
from cogvideo_dist.parallel.ledger import Ledger

DIMS = ("dp", "ring", "ulysses", "tp")
AXES = {
    "dp": ("dp",),
    "sp": ("ring", "ulysses"),
    "ring": ("ring",),
    "ulysses": ("ulysses",),
    "tp": ("tp",),
    "replica": ("dp", "ring", "ulysses"),
    "sample": ("ring", "ulysses", "tp"),
    "world": DIMS,
}
"""Axis -> the dimensions in which its ranks differ."""


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension; ``cp`` splits the ranks of one sample into runs of neighbours. Plain arithmetic."""

    dp: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    cp: int = 1

    @property
    def world(self) -> int:
        return self.dp * self.sample

    @property
    def sample(self) -> int:
        return self.ring * self.ulysses * self.tp

    @property
    def name(self) -> str:
        """Such as ``dp2-ulysses2-tp2``; ``single`` for one rank."""
        return "-".join(f"{d}{getattr(self, d)}" for d in (*DIMS, "cp") if getattr(self, d) > 1) or "single"

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that share ``axis`` with ``rank``, in their order on it."""
        if axis == "cp":
            sample = self.ranks("sample", rank)
            start = sample.index(rank) // self.cp * self.cp
            return sample[start : start + self.cp]
        sizes = [getattr(self, dim) for dim in DIMS]
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(DIMS))]
        choices = [
            range(size) if dim in AXES[axis] else (rank // stride % size,)
            for dim, size, stride in zip(DIMS, sizes, strides)
        ]
        return tuple(sum(map(math.prod, zip(place, strides))) for place in itertools.product(*choices))


def divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def legal_layouts(world: int, *, heads: int) -> tuple[Layout, ...]:
    """Every layout of ``world`` ranks for a model of ``heads``: tp divides them, ulysses has a head for each rank."""
    return tuple(
        Layout(dp, ring, world // (dp * ring * tp), tp)
        for dp in reversed(divisors(world))
        for tp in divisors(world // dp)
        if heads % tp == 0
        for ring in divisors(world // (dp * tp))
        if world // (dp * ring * tp) <= heads // tp
    )


def choose_layout(wanted: Parallel, *, world: int, heads: int, node: int) -> Layout:
    """The layout of ``world`` ranks that a configuration asks for; data parallelism takes what is left.

    Where it leaves the split of sp open, Ulysses takes the most ranks of one node (of ``node`` ranks) that divide the heads,
    and the ring the rest. Raises ``ValueError`` with the legal layouts.
    """
    sp, tp = wanted.sp, wanted.tp
    if world % (sp * tp):
        raise ValueError(
            _illegal(f"{world} ranks do not divide into parallel.sp {sp} x parallel.tp {tp}", world, heads)
        )
    if heads % tp:
        uses = ", ".join(map(str, divisors(heads)))
        raise ValueError(
            _illegal(f"{heads} heads do not divide over parallel.tp {tp} (use one of {uses})", world, heads)
        )
    ulysses, ring = wanted.ulysses, wanted.ring
    if ulysses is None and ring is None:
        fitting = [n for n in divisors(sp) if (heads // tp) % n == 0 and n * tp <= max(node, tp)]
        ulysses = fitting[-1]
    ulysses = sp // ring if ulysses is None and ring else ulysses or 1
    ring = sp // ulysses if ring is None else ring
    if ulysses * ring != sp:
        raise ValueError(
            _illegal(f"parallel.ulysses {ulysses} x parallel.ring {ring} is not parallel.sp {sp}", world, heads)
        )
    if ulysses > heads // tp:
        raise ValueError(
            _illegal(f"parallel.ulysses {ulysses} is more than the {heads // tp} heads of a rank", world, heads)
        )
    if (sp * tp) % wanted.cp:
        uses = ", ".join(map(str, divisors(sp * tp)))
        raise ValueError(
            f"parallel.cp {wanted.cp} does not divide parallel.sp {sp} x parallel.tp {tp}; use one of {uses}"
        )
    return Layout(world // (sp * tp), ring, ulysses, tp, wanted.cp)


def _illegal(why: str, world: int, heads: int) -> str:
    names = ", ".join(layout.name for layout in legal_layouts(world, heads=heads))
    return f"{why}; legal layouts of {world} ranks for {heads} heads: {names}"


@dataclass(frozen=True)
class Axis:
    """The ranks that share one role, this rank's place among them, their process group (None at size 1) and its traffic."""

    name: str
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    ledger: Ledger = field(default_factory=Ledger, compare=False)


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's axes. By default those of a single process.

    ``dp``: different samples; ``sp`` = ``ring`` x ``ulysses``: different tokens of the same packs; ``tp``: different heads and
    features; ``cp``: different frames of one video; ``replica``: the same parameters, over which ZeRO partitions; ``sample``:
    the same samples; ``world``: everyone.
    """

    dp: Axis = Axis("dp")
    sp: Axis = Axis("sp")
    ring: Axis = Axis("ring")
    ulysses: Axis = Axis("ulysses")
    tp: Axis = Axis("tp")
    cp: Axis = Axis("cp")
    replica: Axis = Axis("replica")
    sample: Axis = Axis("sample")
    world: Axis = Axis("world")
    ledger: Ledger = field(default_factory=Ledger, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: prints, logs and writes."""
        return self.world.rank == 0


@dataclass(frozen=True)
class Place:
    """This process as its launcher describes it. ``address`` is host:port of rank 0's store; unused by a single process.

    ``node`` is the number of ranks on its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = ""
    node: int = 1


def start(
    place: Place, *, device: torch.device, layout: Layout | None = None, timeout_s: float = 1800.0,
    check: Callable[[Axis], None] | None = None,
) -> ParallelMesh:  # fmt: skip
    """Join the process group and build the mesh; without a layout all ranks are data parallel.

    A single process makes a group of its own, without a port. ``check`` is called with everyone before ranks divide.
    """
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
    if check is not None:
        check(Axis("world", place.rank, place.world, tuple(range(place.world)), dist.group.WORLD))
    return build_mesh(layout or Layout(dp=place.world), rank=place.rank)


def build_mesh(layout: Layout, *, rank: int) -> ParallelMesh:
    """The axes of ``rank``; collective, since every rank takes part in making every group."""
    groups: dict[tuple[int, ...], Any] = {tuple(range(layout.world)): dist.group.WORLD}
    ledger, axes = Ledger(), {}
    for name in (*AXES, "cp"):
        for each in range(layout.world):
            ranks = layout.ranks(name, each)
            # DeepSpeed takes no group for "everyone", so that of replica exists at size 1 too.
            if (len(ranks) > 1 or name == "replica") and ranks not in groups:
                groups[ranks] = dist.new_group(list(ranks), group_desc=name)
        mine = layout.ranks(name, rank)
        axes[name] = Axis(name, mine.index(rank), len(mine), mine, groups.get(mine), ledger)
    return ParallelMesh(**axes, ledger=ledger)


def stop() -> None:
    """Leave the process group."""
    dist.destroy_process_group()
