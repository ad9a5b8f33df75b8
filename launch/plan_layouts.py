"""Every way to run a configuration on a cluster, what it takes, and which of them is recommended.

The cost model of launch/cost.py, but for what is sent: every message takes as long as its axis' links (``Cluster.seconds``), a
ring travels beside the attention that it feeds and counts only where it takes longer, and nothing else hides behind anything.
Left out, beside what launch/cost.py leaves out: latencies, and ranks that wait for slower ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, product
from typing import get_args

from cogvideo_dist.config.schema import DiTRun, Offload, Train
from cogvideo_dist.pack.attention import PACKWISE
from cogvideo_dist.parallel.mesh import Layout, legal_layouts
from cogvideo_dist.parallel.volumes import Recompute, Volumes
from launch.cost import (
    HOST_LINK,
    KEPT,
    PEAK,
    Memory,
    Seconds,
    Share,
    attention_seconds,
    flops_of,
    memory_of,
    seconds_of,
    sent,
    share_of,
    states_of,
)
from launch.plan_cluster import Cluster

ALIKE = 1.05
"""Steps that are at most this much longer count as equal: the model is not that exact."""

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Candidate:
    """One way: a layout with its switches. ``travel``: seconds of every (axis, operation) in a step, of which the ring's are
    hidden up to the attention's. ``host``: bytes of the host's memory for a GPU."""

    share: Share
    memory: Memory
    host: float
    seconds: Seconds
    volumes: Volumes
    travel: Volumes
    flops: float

    @property
    def layout(self) -> Layout:
        return self.share.layout

    @property
    def train(self) -> Train:
        return self.share.config.train

    @property
    def step(self) -> float:
        return self.seconds.step

    @property
    def mfu(self) -> float:
        return self.flops / (self.step * self.layout.world * PEAK)

    @property
    def switches(self) -> tuple[int, ...]:
        """How far it is from a plain run: offloads, ranks that share a sample, what is made again, the stage of ZeRO."""
        offload, layout = self.train.offload, self.layout
        offloads = offload.activations + offload.optimizer + offload.parameters
        again = RECOMPUTES.index(self.train.recompute)
        return offloads, layout.sample, layout.tp, layout.ring, again, self.share.stage

    @property
    def name(self) -> str:
        """Such as ``dp4-ulysses2, ZeRO 2, recompute feed_forward, offload optimizer``."""
        parts = [self.layout.name, f"ZeRO {self.share.stage}"]
        if self.train.recompute != "none":
            parts.append(f"recompute {self.train.recompute}")
        parts += [f"offload {name}" for name, on in vars(self.train.offload).items() if on]
        return ", ".join(parts)

    def over(self, cluster: Cluster) -> float:
        """Bytes that a GPU lacks, or its part of the host; negative: that are left."""
        return max(self.memory.peak - cluster.usable, self.host - cluster.host_usable)

    def lack(self, cluster: Cluster) -> str:
        """What it lacks, in words."""
        parts = {"": self.memory.peak - cluster.usable, " of the host": self.host - cluster.host_usable}
        return " and ".join(f"{value / 1e9:.1f} GB{place} too many" for place, value in parts.items() if value > 0)


@dataclass(frozen=True)
class Refusal:
    """Layouts that cannot run at all, and why."""

    layouts: tuple[Layout, ...]
    why: str


@dataclass(frozen=True)
class Survey:
    """All ways on a cluster. ``candidates`` may be too large for it."""

    config: DiTRun
    cluster: Cluster
    candidates: tuple[Candidate, ...]
    refusals: tuple[Refusal, ...]

    @cached_property
    def fitting(self) -> list[Candidate]:
        """Fastest first, the plainest of equals."""
        fitting = [candidate for candidate in self.candidates if candidate.over(self.cluster) <= 0]
        return sorted(fitting, key=lambda candidate: (candidate.step, candidate.switches))

    @cached_property
    def recommended(self) -> Candidate | None:
        """Of those that fit and are about as fast as the fastest, the plainest."""
        fitting = self.fitting
        alike = [candidate for candidate in fitting if candidate.step <= ALIKE * fitting[0].step]
        return min(alike, key=lambda candidate: (candidate.switches, candidate.step), default=None)

    @property
    def leanest(self) -> Candidate:
        return min(self.candidates, key=lambda candidate: candidate.memory.peak)

    @cached_property
    def best(self) -> list[Candidate]:
        """For every layout the one that is recommended, or the leanest where none fits; those that fit first, by time."""
        found = []
        for _, group in groupby(self.candidates, key=lambda candidate: candidate.layout):
            own = replace(self, candidates=tuple(group))
            found.append(own.recommended or own.leanest)
        return sorted(found, key=lambda each: (each.over(self.cluster) > 0, each.step, each.switches))


def survey(config: DiTRun, cluster: Cluster, *, offloading: bool = True) -> Survey:
    """Raises ``ValueError`` where the configuration has no layout on the cluster."""
    candidates: list[Candidate] = []
    refusals = []
    ways = [replace(config, train=train) for train in trains(config.train, offloading=offloading)]
    legal = legal_layouts(cluster.gpus, heads=config.model.transformer().heads)
    for why, group in groupby(sorted(legal, key=lambda each: -each.dp), key=lambda each: refused(config, each)):
        layouts = tuple(group)
        if why is not None:
            refusals.append(Refusal(layouts, why))
            continue
        for layout in layouts:
            candidates += candidates_of(ways, cluster, layout=layout)
    if not candidates:
        raise ValueError(f"no layout of {cluster.gpus} GPUs: {'; '.join(refusal.why for refusal in refusals)}")
    return Survey(config, cluster, tuple(candidates), tuple(refusals))


def refused(config: DiTRun, layout: Layout) -> str | None:
    """Why a layout that is legal for the model cannot run the configuration."""
    packs, attention = config.data.packs_per_step, config.parallel.attention
    if packs % layout.dp:
        return f"data.packs_per_step {packs} does not divide over {layout.dp} data-parallel ranks"
    if layout.ring > 1 and attention in PACKWISE:
        return f"parallel.attention {attention} has no backward for parts of a clip, which a ring needs"
    return None


def candidates_of(ways: Sequence[DiTRun], cluster: Cluster, *, layout: Layout) -> Iterator[Candidate]:
    """The ways to train in one layout, from configurations that differ in ``train`` alone."""
    whole = share_of(ways[0], layout)
    paths = {axis: cluster.path(layout, axis) for axis in ("tp", "ulysses", "ring", "replica")}
    flops = ways[0].data.packs_per_step * flops_of(whole)
    for config in ways:
        share = replace(whole, config=config)
        volumes = sent(share)
        travel = {key: cluster.seconds(paths[key[0]], key[1], sent=value) for key, value in volumes.items()}
        seconds = replace(seconds_of(share), sent=exposed(share, travel) + fetched(share))
        yield Candidate(share, memory_of(share), host_bytes(share), seconds, volumes, travel, flops)


def host_bytes(share: Share) -> float:
    """Of a GPU's share of its host's memory: what is offloaded, with gradients and new weights on their way to and from an
    update there."""
    train, model = share.config.train, share.model
    offload, found = train.offload, 0.0
    if offload.activations:
        kept = KEPT[train.recompute] * share.element / 2 * model.layers * model.hidden
        found += kept * share.config.data.tokens_per_pack / share.sharers
    if offload.optimizer:
        found += (states_of(train) + 4 + share.element) * share.trained / share.replicas
    if offload.parameters:
        found += share.element * share.own / share.replicas
    return found


def exposed(share: Share, travel: Volumes) -> float:
    """Seconds of a step in which messages are waited for."""
    ring = sum(value for (axis, _), value in travel.items() if axis == "ring")
    return sum(travel.values()) - min(ring, share.micro_steps * attention_seconds(share))


def fetched(share: Share) -> float:
    """Seconds in which offloaded weights come from the host, in every forward and backward."""
    if not share.config.train.offload.parameters:
        return 0.0
    return 2 * share.micro_steps * share.element * share.own / share.replicas / HOST_LINK


def trains(train: Train, *, offloading: bool = True) -> list[Train]:
    """Every combination of ZeRO's stage, recomputation and offloading that a configuration may have. Stage 0 of 16 bits, which
    runs as stage 1, is left out."""
    found = []
    stages = (0, 1, 2, 3) if train.precision == "fp32" else (1, 2, 3)
    switch = (False, True) if offloading else (False,)
    for stage, recompute, *offloads in product(stages, RECOMPUTES, switch, switch, switch):
        try:
            found.append(replace(train, zero_stage=stage, recompute=recompute, offload=Offload(*offloads)))  # type: ignore[arg-type]
        except ValueError:
            continue
    return found


def plainer(chosen: Candidate, candidates: Sequence[Candidate]) -> list[tuple[str, Candidate]]:
    """What is changed, and the candidate with that one thing less: a level of recomputation, an offload, a stage of ZeRO, or
    half of the ranks of an axis."""
    found = []
    for other in candidates:
        what = _lacks(chosen, other)
        if what is not None:
            found.append((what, other))
    return found


def _lacks(chosen: Candidate, other: Candidate) -> str | None:
    mine, its = chosen.train, other.train
    same_layout = chosen.layout == other.layout
    less = RECOMPUTES.index(its.recompute) + 1 == RECOMPUTES.index(mine.recompute)
    if same_layout and less and its == replace(mine, recompute=its.recompute):
        return f"recompute {its.recompute} for {mine.recompute}"
    if same_layout and mine.zero_stage - 1 == its.zero_stage and its == replace(mine, zero_stage=its.zero_stage):
        return f"ZeRO {its.zero_stage} for {mine.zero_stage}"
    for name, on in vars(mine.offload).items():
        if on and same_layout and its == replace(mine, offload=replace(mine.offload, **{name: False})):
            return f"no offload of {name}"
    for name in ("ulysses", "ring", "tp"):
        size = getattr(chosen.layout, name)
        halved = replace(chosen.layout, **{name: size // 2}, dp=2 * chosen.layout.dp) if size % 2 == 0 else None
        if its == mine and other.layout == halved:
            return f"{name} {size // 2} for {size}"
    return None


def reasons(found: Survey, chosen: Candidate) -> list[str]:
    """Why this one, in sentences."""
    fitting, cluster = found.fitting, found.cluster
    alike = sum(each.step <= ALIKE * fitting[0].step for each in fitting)
    lines = [
        f"of {len(found.candidates):,} ways {len(fitting):,} fit, and {alike:,} of those come within {ALIKE - 1:.0%} of the "
        "fastest; of these it has the fewest switches"
    ]
    for what, other in plainer(chosen, found.candidates):
        if other.over(cluster) > 0:
            lines.append(f"{what}: {other.lack(cluster)}")
        else:
            lines.append(f"{what}: fits, and a step takes {other.step / chosen.step - 1:+.0%}")
    too_large = [each for each in found.candidates if each.over(cluster) > 0 and each.step < chosen.step]
    if too_large:
        fastest = min(too_large, key=lambda each: each.step)
        lines.append(
            f"the fastest that does not fit, {fastest.name}, would take {fastest.step / chosen.step - 1:+.0%}: "
            f"{fastest.lack(cluster)}"
        )
    return lines
