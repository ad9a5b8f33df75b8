"""What travels between ranks and how fast, for launch/doctor.py, by the collectives that training uses.

Bandwidth as NCCL's tests have it: ``algorithm`` is a rank's bytes over the time, ``bus`` what the slowest link carries for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, Place, choose_layout, start
from cogvideo_dist.parallel.ops import barrier, reduce_sum, shift, to_heads
from launch.doctor_check import Finding, rate, told, within
from launch.doctor_device import wait_for
from launch.plan_cluster import REACHED

LIMIT_S, START_S = 60.0, 120.0
"""For everything on one axis, and for the process group."""

HALF = 0.5
"""Of what a link should carry, below which it is worth a look."""

UNEVEN = 2.0
"""Between the fastest and the slowest pair of like ranks."""


NAMES = ("dp", "ring", "ulysses", "tp", "cp", "sp", "world", "replica", "sample")
"""Axes, in the order in which one lends its name to others between the same ranks."""


class Sizes(NamedTuple):
    """Bytes of a large message, and how often each is sent."""

    message: int
    repeats: int
    small: int

    @classmethod
    def of(cls, device: torch.device, *, quick: bool) -> Sizes:
        message = 64 << 20 if device.type == "cuda" else 4 << 20
        return cls(message // 8, 3, 10) if quick else cls(message, 5, 50)


class Nominal(NamedTuple):
    """Bytes a second that a GPU sends within its node and out of it, by data sheet, if somebody said."""

    link: float | None = None
    network: float | None = None


class Measured(NamedTuple):
    """Seconds of the operations on an axis of ``ranks``, as this rank saw them."""

    axis: str
    ranks: tuple[int, ...]
    message: int
    latency: float
    reduced: float
    exchanged: float
    shifted: float

    def rates(self) -> dict[str, float]:
        """Bytes a second."""
        n = len(self.ranks)
        return {
            "sum_algorithm_bytes_per_s": self.message / self.reduced,
            "sum_bus_bytes_per_s": 2 * (n - 1) / n * self.message / self.reduced,
            "all_to_all_algorithm_bytes_per_s": self.message / self.exchanged,
            "all_to_all_bus_bytes_per_s": (n - 1) / n * self.message / self.exchanged,
            "neighbour_bytes_per_s": self.message / self.shifted,
        }


def layout_of(config: DiTRun | VAERun | None, place: Place) -> Layout:
    """As the configuration's command divides its ranks; without one, the ranks of a node and those of like number on all nodes.

    Raises ``ValueError`` where that many ranks cannot run it.
    """
    if isinstance(config, DiTRun):
        heads = config.model.transformer().heads
        return choose_layout(config.parallel, world=place.world, heads=heads, node=place.node)
    if isinstance(config, VAERun):
        cp = config.parallel.cp
        if place.world % cp:
            raise ValueError(f"parallel.cp {cp} does not divide {place.world} ranks")
        return Layout(dp=place.world // cp, ulysses=cp, cp=cp)
    node = place.node if place.world % place.node == 0 else 1
    return Layout(dp=place.world // node, ulysses=node)


def axes_of(mesh: ParallelMesh) -> list[Axis]:
    """Those with something to send; of several between the same ranks the first."""
    found: dict[tuple[int, ...], Axis] = {}
    for name in NAMES:
        axis: Axis = getattr(mesh, name)
        if axis.size > 1:
            found.setdefault(axis.ranks, axis)
    return list(found.values())


Say = Callable[[str], None]


def joined(place: Place, layout: Layout, *, device: torch.device) -> ParallelMesh:
    """The process group and its axes; ``doctor_check.Hung`` where they do not come about: torch's own limit is not kept."""
    return within(START_S, lambda: start(place, device=device, layout=layout, timeout_s=START_S), device=device)


def links(
    mesh: ParallelMesh, *, device: torch.device, sizes: Sizes, nominal: Nominal, node: int, say: Say,
    limit_s: float = LIMIT_S,
) -> tuple[list[Finding], dict[str, Any]]:  # fmt: skip
    """Every axis of ``mesh``: what was found, and the seconds of each pair of neighbours (``axis`` -> ``a-b`` -> seconds).

    An axis that does not answer is named, and those after it are left alone: a process group that hangs does not recover.
    """
    found: list[Finding] = []
    pairs: dict[str, Any] = {}
    for axis in axes_of(mesh):
        say(f"links: {axis.name}")
        try:
            measured, seconds = within(limit_s, partial(measure, axis, device, sizes=sizes), device=device)
        except Exception as error:  # of gloo, NCCL or sockets: each has its own
            found.append(_dead(axis, error))
            return found, pairs
        found.append(judge(measured, nominal=nominal, node=node))
        pairs[axis.name] = seconds
    return found, pairs


def _dead(axis: Axis, error: Exception) -> Finding:
    said = f"{axis.name} ({len(axis.ranks)} ranks): {told(error)}"
    remedy = (
        "see NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, firewalls between the nodes, and NCCL_DEBUG=INFO of this command"
    )
    return Finding(f"links: {axis.name}", "fail", said, "an answer from all ranks", remedy)


def measure(axis: Axis, device: torch.device, *, sizes: Sizes) -> tuple[Measured, dict[str, float]]:
    """Collective over the axis."""
    small = torch.zeros(2, device=device)
    elements = max(1, sizes.message // 4 // axis.size) * axis.size
    large = torch.zeros(elements, device=device)
    # One row to each rank: parts that are whole, so that nothing is copied before it is sent.
    rows = large.view(1, axis.size, elements // axis.size)
    ones = (1,) * axis.size

    def best(work: Callable[[], object], repeats: int, *, of: int = 1) -> float:
        times = []
        for _ in range(repeats + 1):
            barrier(axis)
            wait_for(device)
            begun = time.perf_counter()
            for _ in range(of):
                work()
            wait_for(device)
            times.append((time.perf_counter() - begun) / of)
        return min(times[1:])  # the first one makes connections

    return Measured(
        axis.name, axis.ranks, 4 * elements,
        latency=best(lambda: reduce_sum(small, axis), 3, of=sizes.small),
        reduced=best(lambda: reduce_sum(large, axis), sizes.repeats),
        exchanged=best(lambda: to_heads(rows, axis, counts=ones).wait(), sizes.repeats),
        shifted=best(lambda: shift(large, axis, rows=elements).wait(), sizes.repeats),
    ), pairs_of(axis, large, repeats=sizes.repeats)  # fmt: skip


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """Neighbours around an axis, in rounds in which nobody has two partners."""
    if size < 3:
        return [[(0, 1)]] if size == 2 else []
    even = [(place, place + 1) for place in range(0, size - 1, 2)]
    odd = [(place, place + 1) for place in range(1, size - 1, 2)]
    last = (size - 1, 0)
    return [even, [*odd, last]] if size % 2 == 0 else [even, odd, [last]]


def pairs_of(axis: Axis, large: torch.Tensor, *, repeats: int) -> dict[str, float]:
    """``a-b`` -> seconds of an exchange with each neighbour while other pairs have theirs."""
    found: dict[str, float] = {}
    for each in rounds(axis.size):
        barrier(axis)
        for pair in each:
            if axis.rank in pair:
                ranks = tuple(axis.ranks[place] for place in pair)
                two = Axis(axis.name, pair.index(axis.rank), 2, ranks, axis.group, axis.ledger)
                found["{}-{}".format(*ranks)] = _exchange(two, large, repeats)
    return found


def _exchange(two: Axis, large: torch.Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        wait_for(large.device)
        begun = time.perf_counter()
        shift(large, two, rows=len(large)).wait()
        wait_for(large.device)
        times.append(time.perf_counter() - begun)
    return min(times)


def judge(measured: Measured, *, nominal: Nominal, node: int) -> Finding:
    """A row for an axis. Ranks of a node are neighbours, ``node`` of them."""
    rates, nodes = measured.rates(), {rank // node for rank in measured.ranks}
    wanted = nominal.link if len(nodes) == 1 else nominal.network
    bus = rates["sum_bus_bytes_per_s"]
    where = "within a node" if len(nodes) == 1 else f"over {len(nodes)} nodes"
    said = (
        f"{len(measured.ranks)} ranks {where}: {microseconds(measured.latency)}; "
        f"sum {rate(rates['sum_algorithm_bytes_per_s'])} (bus {rate(bus)}), "
        f"all-to-all {rate(rates['all_to_all_algorithm_bytes_per_s'])} "
        f"(bus {rate(rates['all_to_all_bus_bytes_per_s'])}), neighbour {rate(rates['neighbour_bytes_per_s'])}"
    )
    figures = {
        **rates,
        "latency_s": measured.latency,
        "message_bytes": float(measured.message),
        "nodes": float(len(nodes)),
    }
    check = f"links: {measured.axis}"
    if wanted is None:
        return Finding(check, "pass", said, "reported only", figures=figures)
    least = HALF * REACHED * wanted
    if bus < least:
        remedy = "see nvidia-smi topo -m, ibstat, and which way NCCL takes: NCCL_DEBUG=INFO of this command"
        return Finding(check, "warn", said, f"bus {rate(least)} or more", remedy, figures)
    return Finding(check, "pass", said, f"bus {rate(least)} or more", figures=figures)


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us" if seconds < 999.5e-6 else f"{1e6 * seconds:,.0f} us"


def pairs(seconds: Mapping[str, Mapping[str, float]], *, node: int, hosts: Mapping[int, str]) -> list[Finding]:
    """Pairs of neighbours against each other, on all ranks: ``axis`` -> ``a-b`` -> seconds. Those of a node and those of two
    are compared with their like."""
    check, expected = "links: pairs", f"within {UNEVEN:g} times of each other"
    found = []
    for axis, each in seconds.items():
        kinds: dict[bool, dict[tuple[int, int], float]] = {}
        for name, value in each.items():
            a, b = map(int, name.split("-"))
            kinds.setdefault(a // node == b // node, {})[a, b] = value
        found += [_slowest(axis, kind, hosts) for kind in kinds.values() if uneven(list(kind.values()))]
    if found:
        remedy = "see the cables, cards and lanes of the two, or leave their nodes out (sbatch --exclude)"
        return [Finding(check, "warn", "; ".join(found), expected, remedy)]
    count = sum(map(len, seconds.values()))
    return [Finding(check, "pass" if count else "skipped", f"{count} pairs alike" if count else "no pairs", expected)]


def uneven(values: Sequence[float]) -> bool:
    return max(values) > UNEVEN * min(values)


def _slowest(axis: str, seconds: Mapping[tuple[int, int], float], hosts: Mapping[int, str]) -> str:
    a, b = max(seconds, key=lambda pair: seconds[pair])
    ratio = seconds[a, b] / min(seconds.values())
    return f"{axis}: rank {a} ({hosts[a]}) and rank {b} ({hosts[b]}) take {ratio:.1f} times as long as the fastest pair"
