"""How a configuration's step scales with the cluster: the same step on more GPUs, and a step that grows with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogvideo_dist.config.schema import DiTRun
from launch.plan_cluster import Cluster
from launch.plan_layouts import Candidate, survey

MOST = 1024
"""GPUs of the largest cluster of a curve."""


@dataclass(frozen=True)
class Point:
    """The recommended way on ``gpus`` for steps of ``packs``; none where nothing fits or divides."""

    gpus: int
    packs: int
    best: Candidate | None


@dataclass(frozen=True)
class Curve:
    """``strong``: a step has as many packs on every cluster; else as many for each GPU."""

    strong: bool
    points: tuple[Point, ...]

    def efficiency(self, point: Point) -> float:
        """Useful work of a GPU and second, relative to the smallest cluster that can run it."""
        if point.best is None:
            return 0.0
        return point.best.mfu / next(each.best.mfu for each in self.points if each.best is not None)


def curve(config: DiTRun, cluster: Cluster, *, strong: bool) -> Curve:
    """Over one node, two, four ... up to ``MOST`` GPUs, with the packs of ``config`` on ``cluster`` itself."""
    points = []
    nodes = 1
    while nodes * cluster.gpus_per_node <= MOST:
        size = replace(cluster, nodes=nodes)
        packs = config.data.packs_per_step
        if not strong:
            packs = packs * size.gpus // cluster.gpus
        points.append(Point(size.gpus, packs, best_of(config, size, packs=packs)))
        nodes *= 2
    return Curve(strong, tuple(points))


def best_of(config: DiTRun, cluster: Cluster, *, packs: int) -> Candidate | None:
    """The recommended way for steps of ``packs``, nothing offloaded, if there is any."""
    if packs == 0:
        return None
    try:
        return survey(
            replace(config, data=replace(config.data, packs_per_step=packs)), cluster, offloading=False
        ).recommended
    except ValueError:  # none divides
        return None
