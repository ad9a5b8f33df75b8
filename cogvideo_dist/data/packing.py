"""Which of the waiting clips make the packs of a step: all of a step's packs full, and of equal cost.

A clip is its class here: its legal size, which decides its tokens and its cost. Costs are integers, so that sums are exact and
a plan is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.data.order import Draws, Ints

Mode = Literal["pack", "bucket", "pad"]

LOOK_AHEAD = 4
"""Steps' worth of clips that wait and from which a step's are chosen."""

PATIENCE = 24
"""Steps after which a waiting clip is taken, whatever becomes of the balance."""

ALIKE = 0.25
"""A round's difference between its costliest and its cheapest clip, in mean costs, up to which exchanges can make up for it."""

FULL, EVEN = 0.9875, 0.0015
"""A pack is good if that share of its budget is used and its cost is so close to the mean."""

FILLED = 0.9925
"""Share of the budget that a step's rounds are to fill."""

COST_UNITS = 10**12
"""Of the costliest class of clips, so that rounding to integers loses nothing."""


@dataclass(frozen=True)
class Classes:
    """Tokens and cost of a clip of each class, and how many tokens a pack may hold."""

    tokens: Ints
    costs: Ints
    budget: int

    @classmethod
    def of(cls, tokens: Sequence[int], costs: Sequence[float], *, budget: int) -> Classes:
        """``costs`` in any unit."""
        whole = np.array(costs, np.float64)
        return cls(
            np.array(tokens, np.int64), np.rint(whole / whole.max() * COST_UNITS / 1000).astype(np.int64), budget
        )


@dataclass
class Pool:
    """Waiting clips, the longest waiting first: epoch, number and class of each, and the step in which it was drawn."""

    epochs: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    clips: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    classes: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    since: Ints = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.clips)

    def joined(self, draws: Draws, classes: Ints, *, step: int) -> Pool:
        """With further clips at its end, drawn in ``step``."""
        new = (draws.epochs, draws.clips, classes, np.full(len(classes), step))
        return Pool(*(np.concatenate(pair) for pair in zip(vars(self).values(), new)))

    def without(self, taken: Ints) -> Pool:
        keep = np.ones(len(self), bool)
        keep[taken] = False
        return Pool(*(column[keep] for column in vars(self).values()))


Refill = Callable[[Pool, int], Pool]
"""(pool, tokens) -> with as many more clips that it holds at least so many tokens, or all there are."""


def compose(pool: Pool, classes: Classes, *, mode: Mode, packs: int, step: int) -> list[Ints]:
    """The packs of a step, each the positions of its clips in the pool; every pack has at least one clip."""
    if mode == "bucket":
        return _bucketed(pool, classes, packs=packs)
    if mode == "pad":
        return _padded(pool, classes, packs=packs)
    return Composer(pool, classes, packs=packs, step=step).packs()


class Composer:
    """One step of mode ``pack``.

    The pool, sorted by tokens, is cut into rounds of as many neighbours as there are packs, of one class where there are
    enough. A round gives every pack one clip; the packs of least cost get the costliest. Rounds whose clips wait longest come
    first, those of unlike clips later. What is then left of unevenness is taken away by exchanging clips with the pool.
    """

    def __init__(self, pool: Pool, classes: Classes, *, packs: int, step: int) -> None:
        self.pool, self.classes, self.count = pool, classes, packs
        self.tokens, self.costs = classes.tokens[pool.classes], classes.costs[pool.classes]
        self.age = step - pool.since
        self.tokens_out, self.costs_out = np.append(classes.tokens, 0), np.append(classes.costs, 0)
        self.members: list[list[int]] = [[] for _ in range(packs)]
        self.used, self.cost = np.zeros(packs, np.int64), np.zeros(packs, np.int64)

    def packs(self) -> list[Ints]:
        chosen = self._chosen(self._rounds())
        for row in chosen[np.argsort(-self.costs[chosen].sum(1), kind="stable")] if len(chosen) else ():
            self._deal(row)
        self._polish()
        return [np.array(members, np.int64) for members in self.members]

    def _rounds(self) -> Ints:
        """[rounds, packs] positions in the pool; the clips that are left over wait."""
        order = np.argsort(-self.tokens * len(self.classes.tokens) - self.pool.classes, kind="stable")
        classes = self.pool.classes[order]
        begins = np.flatnonzero(np.append(True, classes[1:] != classes[:-1])) if len(order) else np.empty(0, np.int64)
        counts = np.diff(np.append(begins, len(order)))
        place = np.arange(len(order)) - np.repeat(begins, counts)
        even = place < np.repeat(counts // self.count * self.count, counts)
        if self.age[:1].sum() >= PATIENCE and not even[order == 0].any() and np.count_nonzero(~even) < self.count:
            even[np.flatnonzero(even)[-self.count :]] = (
                False  # or there would be no round for the clip that waits longest
            )
        rest = order[~even]
        # The youngest are left over, so that the oldest is always in a round.
        rest = rest[np.argsort(np.argsort(rest)) < len(rest) // self.count * self.count]
        return np.concatenate([order[even], rest]).reshape(-1, self.count)

    def _chosen(self, rounds: Ints) -> Ints:
        """The rounds that this step takes: as many as the packs' budget holds."""
        if not len(rounds):
            return rounds
        tokens, costs = self.tokens[rounds].sum(1), self.costs[rounds]
        spread = (costs.max(1) - costs.min(1)) * self.count / np.maximum(costs.sum(1), 1)
        age = self.age[rounds].max(1)
        urgency = np.where(age >= PATIENCE, 1e12 - rounds.min(1), age - PATIENCE * spread)
        by = np.argsort(-urgency, kind="stable")
        sizes = -(-tokens // self.count)
        alike = by[(spread[by] <= ALIKE) | (age[by] >= PATIENCE)]
        taken = alike[self._fitting(sizes[alike], age[alike])]
        if sizes[taken].sum() < FULL * self.classes.budget:
            taken = by[self._fitting(sizes[by], age[by])]
        return rounds[taken]

    def _fitting(self, sizes: Ints, age: Ints) -> list[int]:
        return fitting(sizes.tolist(), self.classes.budget, must=int(len(age) > 0 and age[0] >= PATIENCE))

    def _deal(self, row: Ints) -> None:
        """One clip of a round to every pack."""
        costs = self.costs[row]
        if costs[0] != costs.max() or costs[0] != costs.min():
            row = row[np.argsort(-costs, kind="stable")]
            to = np.argsort(self.cost, kind="stable")
        else:
            to = np.arange(self.count)
        self.used[to] += self.tokens[row]
        self.cost[to] += self.costs[row]
        for pack, clip in zip(to.tolist(), row.tolist()):
            self.members[pack].append(clip)

    def _polish(self) -> None:
        """Exchange clips of packs with waiting ones until every pack is within its budget, full and of the mean's cost."""
        waiting = np.ones(len(self.pool), bool)
        for members in self.members:
            waiting[members] = False
        stock: list[list[int]] = [[] for _ in range(len(self.classes.tokens))]
        for clip in np.flatnonzero(waiting)[::-1].tolist():
            stock[self.pool.classes[clip]].append(clip)
        target = int(self.cost.sum()) // self.count
        for pack in np.argsort(-np.abs(self.cost - target), kind="stable").tolist():
            for _ in range(64):
                if not self._improve(pack, stock, target):
                    break

    def _improve(self, pack: int, stock: list[list[int]], target: int) -> bool:
        """Put a waiting clip in, take one out or exchange two, whichever helps a pack most; whether anything did."""
        budget, used, cost = self.classes.budget, int(self.used[pack]), int(self.cost[pack])
        if used <= budget and used >= FULL * budget and abs(cost - target) <= EVEN * target:
            return False
        out: dict[int, int] = {}
        for clip in self.members[pack]:
            if clip > 0 and (self.age[clip] < PATIENCE or used > budget):  # clip 0 of the pool waits longest
                out[int(self.pool.classes[clip])] = clip
        gone = [-1, *(out if len(self.members[pack]) > 1 else ())]
        come = [-1, *(number for number, clips in enumerate(stock) if clips)]
        tokens, costs = self.tokens_out, self.costs_out
        new_used = used + tokens[come][None, :] - tokens[gone][:, None]
        new_cost = cost + costs[come][None, :] - costs[gone][:, None]
        score = self._score(new_used, new_cost, target)
        best = int(np.argmin(score))
        i, j = divmod(best, len(come))
        if score[i, j] >= score[0, 0]:
            return False
        if gone[i] >= 0:
            clip = out[gone[i]]
            self.members[pack].remove(clip)
            stock[gone[i]].append(clip)
        if come[j] >= 0:
            self.members[pack].append(stock[come[j]].pop())
        self.used[pack], self.cost[pack] = new_used[i, j], new_cost[i, j]
        return True

    def _score(self, used: Ints, cost: Ints, target: int) -> NDArray[np.float64]:
        """How bad a pack would be."""
        budget = self.classes.budget
        uneven = np.abs(cost - target) / max(target, 1)
        empty = np.maximum(FULL * budget - used, 0) / budget
        over = np.maximum(used - budget, 0)
        return np.where(over > 0, 10.0 + over / budget, np.maximum(uneven - EVEN, 0) + 3 * empty)


def fitting(sizes: Sequence[int], room: int, *, must: int = 0) -> list[int]:
    """Positions of sizes whose sum is at most ``room`` and nearly all of it, or as near as any choice comes; the first ones
    are taken wherever the others can fill up what they leave, and ``must`` of them in any case."""
    reach = [1]  # bit s: the sizes from the k-th last on have a choice of sum s
    mask = (1 << (room + 1)) - 1
    for size in reversed(sizes):
        reach.append((reach[-1] | (reach[-1] << size)) & mask)
    at, taken = sum(sizes[:must]), list(range(must))
    least = min(int(FILLED * room), at + (reach[len(sizes) - must] & (mask >> at)).bit_length() - 1)
    for place, size in list(enumerate(sizes))[must:]:
        with_it = at + size
        rest = reach[len(sizes) - 1 - place]
        if with_it <= room and (rest & (mask >> with_it)) >> max(least - with_it, 0):
            at = with_it
            taken.append(place)
    return taken


def _bucketed(pool: Pool, classes: Classes, *, packs: int) -> list[Ints]:
    """Clips of one class to a pack: the fullest packs that the pool gives, beginning with the class that waits longest."""
    sizes = classes.budget // classes.tokens
    made: list[Ints] = []
    queues = [np.flatnonzero(pool.classes == number) for number in range(len(sizes))]
    while len(made) < packs:
        waiting = [number for number, queue in enumerate(queues) if len(queue)]
        full = [number for number in waiting if len(queues[number]) >= sizes[number]]
        number = min(full or waiting, key=lambda n: int(queues[n][0]))
        made.append(queues[number][: sizes[number]])
        queues[number] = queues[number][sizes[number] :]
    return made


def _padded(pool: Pool, classes: Classes, *, packs: int) -> list[Ints]:
    """Clips as they come, as many to a pack as its budget holds when all are as long as the longest."""
    tokens, at, made = classes.tokens[pool.classes].tolist(), 0, list[Ints]()
    for _ in range(packs):
        begin, longest = at, 0
        while at < len(tokens) and (at + 1 - begin) * max(longest, tokens[at]) <= classes.budget:
            longest = max(longest, tokens[at])
            at += 1
        made.append(np.arange(begin, at))
    return made


def first_fit(pool: Pool, classes: Classes, *, packs: int) -> list[Ints]:
    """Clips as they come, each into the first pack with room, until one fits nowhere: what ``pack`` is compared with."""
    room, made = [classes.budget] * packs, [list[int]() for _ in range(packs)]
    for clip, size in enumerate(classes.tokens[pool.classes].tolist()):
        pack = next((p for p, left in enumerate(room) if size <= left), None)
        if pack is None:
            break
        room[pack] -= size
        made[pack].append(clip)
    return [np.array(clips, np.int64) for clips in made]
