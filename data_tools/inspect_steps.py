"""Planned steps, as the run would take them and as other ways of packing would: how full, how even, how long clips wait."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cogvideo_dist.config.schema import Data
from cogvideo_dist.data.loader import check_ranks, dealt
from cogvideo_dist.data.order import Ints
from cogvideo_dist.data.packing import Mode, Pool, first_fit
from cogvideo_dist.data.plan import Plan
from data_tools.inspect_set import Inspected

MODES: tuple[Mode, ...] = ("pack", "bucket", "pad")
RANKS = 4
"""Numbers of ranks that are looked at where none are asked for: the largest that a step's packs divide over."""

Track = Callable[[Iterable[int], str], Iterable[int]]
"""(steps, mode) -> the same steps, shown as progress."""


class Step(NamedTuple):
    """The sizes' numbers of the clips in each pack, how many steps each clip has waited, and the clips of each source."""

    packs: list[Ints]
    waits: list[int]
    sources: tuple[int, ...]


@dataclass(frozen=True)
class ModeFacts:
    """One way of packing over some steps. ``fill``: the share of the budget that clips take, of all packs and of the emptiest.

    ``balance``: by number of ranks the costliest rank's cost over the mean rank's, averaged over steps, and of the worst step.
    ``waits``: clips by how many steps they waited. ``sources``: clips of each source in a step.
    """

    mode: str
    steps: int
    clips: float
    fill: tuple[float, float]
    balance: dict[int, tuple[float, float]]
    waits: Counter[int]
    sources: tuple[float, ...]

    @property
    def wait(self) -> tuple[float, int]:
        """Of a clip, in the mean and at most."""
        total = sum(self.waits.values())
        return sum(steps * count for steps, count in self.waits.items()) / total, max(self.waits)

    def as_data(self) -> dict[str, Any]:
        return {
            "mode": self.mode, "steps": self.steps, "clips_per_step": self.clips,
            "fill": {"mean": self.fill[0], "least": self.fill[1]},
            "balance": {str(ranks): {"mean": mean, "worst": worst} for ranks, (mean, worst) in self.balance.items()},
            "wait": {"mean": self.wait[0], "most": self.wait[1], "clips": {str(k): v for k, v in sorted(self.waits.items())}},
        }  # fmt: skip


def ranks_of(data: Data, asked: Sequence[int]) -> list[int]:
    """Numbers of data-parallel ranks to look at; refuses one over which a step's packs do not divide."""
    for ranks in asked:
        check_ranks(data.packs_per_step, ranks)
    packs = data.packs_per_step
    return list(asked) or [ranks for ranks in range(min(2, packs), packs + 1) if packs % ranks == 0][-RANKS:]


def compare(found: Inspected, plan: Plan, *, steps: int, ranks: Sequence[int], track: Track) -> list[ModeFacts]:
    """All ways of packing, over the first ``steps`` steps. ``plan``: of the configuration, which the first facts are of."""
    data, ways = found.data, dict[str, Iterator[Step]]()
    for mode in sorted(MODES, key=lambda name: name != data.mode):
        other = dataclasses.replace(data, mode=mode)
        own = plan if mode == data.mode else Plan(found.catalog, other, seed=plan.seed, geometry=found.geometry)
        ways[mode] = planned_steps(own)
    ways["first fit"] = first_fit_steps(plan)
    return [
        measure(mode, (step for _, step in zip(track(range(steps), mode), taken)), plan=plan, ranks=ranks)
        for mode, taken in ways.items()
    ]


def planned_steps(plan: Plan) -> Iterator[Step]:
    """The steps of a plan, from its first on."""
    drawn: dict[tuple[int, int], int] = {}
    step, made = 0, plan.seen(0)
    while True:
        packs = plan.step(step).packs
        after = plan.seen(step + 1)
        draws, _ = plan.mixture.take(made, sum(after) - sum(made))
        drawn |= dict.fromkeys(zip(draws.epochs.tolist(), draws.clips.tolist()), step)
        slots = [(slot.epoch, slot.index) for pack in packs for slot in pack]
        clips = np.array([clip for _, clip in slots])
        numbers = np.split(plan.found[clips].astype(np.int64), np.cumsum([len(pack) for pack in packs])[:-1])
        yield Step(numbers, [step - drawn.pop(slot) for slot in slots], _sources(plan, clips))
        step, made = step + 1, after


def first_fit_steps(plan: Plan) -> Iterator[Step]:
    """Clips as they come, each into the first pack with room."""
    classes, packs, pool, made, step = plan.classes, plan.packs_per_step, Pool(), plan.mixture.start(), 0
    while True:
        while (lacking := (packs + 1) * classes.budget - int(classes.tokens[pool.classes].sum())) > 0:
            draws, made = plan.mixture.take(made, lacking // int(classes.tokens.max()) + 1)
            pool = pool.joined(draws, plan.found[draws.clips].astype(np.int64), step=step)
        chosen = first_fit(pool, classes, packs=packs)
        taken = np.concatenate(chosen)
        waits = (step - pool.since[taken]).tolist()
        yield Step([pool.classes[pack] for pack in chosen], waits, _sources(plan, pool.clips[taken]))
        pool, step = pool.without(taken), step + 1


def measure(mode: str, steps: Iterable[Step], *, plan: Plan, ranks: Sequence[int]) -> ModeFacts:
    classes, waits, count, clips = plan.classes, Counter[int](), 0, 0
    fills, uneven = list[float](), {number: list[float]() for number in ranks}
    sources = np.zeros(len(plan.catalog.indexes))
    for step in steps:
        fills += [float(classes.tokens[pack].sum()) / classes.budget for pack in step.packs]
        costs = [int(classes.costs[pack].sum()) for pack in step.packs]
        for number, ratios in uneven.items():
            totals = [sum(costs[pack] for pack in mine) for mine in dealt(costs, number)]
            ratios.append(max(totals) * number / sum(totals))
        waits.update(step.waits)
        sources += step.sources
        count, clips = count + 1, clips + len(step.waits)
    return ModeFacts(
        mode, count, clips / count, (float(np.mean(fills)), min(fills)),
        {number: (float(np.mean(ratios)), max(ratios)) for number, ratios in uneven.items()},
        waits, tuple((sources / count).tolist()),
    )  # fmt: skip


def epochs(found: Inspected, plan: Plan, *, per_step: Sequence[float]) -> list[float]:
    """How often each source's clips are seen by the run's last step, draws of earlier runs among them; ``per_step``: clips of
    each source in a step."""
    bounds = np.searchsorted(plan.training, found.catalog.starts)
    steps = found.config.train.steps
    return [
        (source.skip + clips * steps) / int(count)
        for source, clips, count in zip(found.data.all_sources, per_step, np.diff(bounds))
    ]


def _sources(plan: Plan, clips: Ints) -> tuple[int, ...]:
    at = np.searchsorted(plan.catalog.starts, clips, side="right") - 1
    return tuple(np.bincount(at, minlength=len(plan.catalog.indexes)).tolist())
