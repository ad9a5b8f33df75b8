"""A device's memory is full: what took it, and which other ways to run would fit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.ending import OutOfMemory
from cogvideo_dist.parallel.mesh import ParallelMesh
from launch.cost import Memory, cost_of
from launch.plan_cluster import Cluster
from launch.plan_layouts import survey


def explained(error: Exception, config: DiTRun | VAERun, *, mesh: ParallelMesh, total: int) -> OutOfMemory:
    """``error`` with what the cost model says of it; the allocator's own account goes to the run's logs. ``total``: bytes of
    this rank's device."""
    rank = mesh.world.rank
    path = Path(config.run.dir) / "logs" / f"rank-{rank}.memory.txt"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{error}\n\n{_account()}\n", encoding="utf-8")
    text = f"rank {rank} is out of device memory ({total / 1e9:.0f} GB): {' '.join(str(error).split())[:160]}"
    if isinstance(config, DiTRun):
        text += f"; {advice(config, mesh, total=total)}"
    return OutOfMemory(f"{text}; the allocator's account is in {path}")


def advice(config: DiTRun, mesh: ParallelMesh, *, total: int) -> str:
    """What the run takes by the cost model, and the fastest way that fits."""
    taken = cost_of(config, mesh.world.size).memory
    node = min(mesh.world.size, max(1, torch.cuda.device_count()))
    nodes = max(1, mesh.world.size // node)
    found = survey(config, Cluster(nodes, node, memory=float(total))).recommended
    said = f"by the cost model it peaks at {taken.peak / 1e9:.1f} GB ({parts(taken)})"
    if found is None:
        few = f"nothing fits on {mesh.world.size} such devices"
        return f"{said}, and {few}: take more of them, or a smaller data.tokens_per_pack"
    return f"{said}; {found.name} would take {found.memory.peak / 1e9:.1f} GB (launch/plan.py lists all ways)"


def parts(memory: Memory) -> str:
    """Such as ``activations 31.2, weights 11.1``; the largest first."""
    found = sorted(memory.at_peak.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {value / 1e9:.1f}" for name, value in found if value > 0.01 * memory.peak)


def _account() -> str:
    return torch.cuda.memory_summary() if torch.cuda.is_available() else "no device"
