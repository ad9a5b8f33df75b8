"""The GPUs that a plan is made for, and what it takes to send bytes between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cogvideo_dist.parallel.mesh import AXES, DIMS, Layout

USABLE = 0.9
"""Of a memory, what a run may need on paper: the rest is for CUDA itself and for what the allocator loses to fragments."""

REACHED = 0.8
"""Of a link's nominal rate, what collectives reach: 360 of 450 GB/s over NVLink, 40 of 50 GB/s over a 400 Gb card."""

POINT_TO_POINT, EVERYONE = ("shift",), ("all_to_all",)
"""Collectives in which a rank sends to its neighbour alone, and to every other one. All others go around a ring of all ranks,
which enters and leaves a node through all of its cards."""


class Path(NamedTuple):
    """Between the ranks of an axis: the ``nodes`` that they lie in at most, and how many of them share one at least."""

    size: int
    nodes: int
    together: int


@dataclass(frozen=True)
class Cluster:
    """``memory`` and ``host_memory``: bytes of a GPU and of a node's host; ``link`` and ``network``: bytes a second that a GPU
    sends within its node and out of it."""

    nodes: int
    gpus_per_node: int
    memory: float
    host_memory: float = 1e12
    link: float = 450e9
    network: float = 50e9

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> float:
        """Bytes of a GPU."""
        return USABLE * self.memory

    @property
    def host_usable(self) -> float:
        """Bytes of the host for each of its GPUs."""
        return USABLE * self.host_memory / self.gpus_per_node

    def path(self, layout: Layout, axis: str) -> Path:
        """Ranks are dealt to nodes in their order; of all groups of an axis the most scattered counts."""
        grid = np.arange(layout.world).reshape([getattr(layout, dim) for dim in DIMS])
        own = [place for place, dim in enumerate(DIMS) if dim in AXES[axis]]
        others = [place for place in range(len(DIMS)) if place not in own]
        groups = grid.transpose(*others, *own).reshape(-1, int(np.prod([grid.shape[place] for place in own])))
        nodes = np.sort(groups // self.gpus_per_node, axis=1)
        most = 1 + int((np.diff(nodes, axis=1) != 0).sum(axis=1).max(initial=0))
        return Path(groups.shape[1], most, max(1, groups.shape[1] // most))

    def seconds(self, path: Path, operation: str, *, sent: float) -> float:
        """To send ``sent`` bytes from every rank. What goes to ranks of the own node travels beside what leaves it."""
        if path.nodes == 1:
            return sent / (REACHED * self.link)
        if operation in POINT_TO_POINT:  # the whole ring waits for those whose neighbour is elsewhere
            return sent / (REACHED * self.network)
        if operation in EVERYONE:
            within = (path.together - 1) / (path.size - 1)
            return sent / REACHED * max(within / self.link, (1 - within) / self.network)
        return sent / REACHED / min(self.link, path.together * self.network)
