"""Three synthetic data sets, and how well packs of them are filled and balanced (D1, D2)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Size
from cogvideo_dist.data.loader import dealt
from cogvideo_dist.data.order import Draws
from cogvideo_dist.data.packing import LOOK_AHEAD, Classes, Pool, compose, first_fit

TEXT, HIDDEN = 226, 3072
"""Tokens of text and width of the 5B model."""


class Mix(NamedTuple):
    """Legal sizes, and the size (its position) of every one of so many clips."""

    name: str
    sizes: tuple[Size, ...]
    draw: Callable[[np.random.Generator, int], NDArray[np.int64]]

    def classes(self, budget: int) -> Classes:
        tokens = [
            TEXT + ((f - 1) // TEMPORAL + 1) * (h // SPATIAL // 2) * (w // SPATIAL // 2) for f, h, w in self.sizes
        ]
        return Classes.of(tokens, [cost(count) for count in tokens], budget=budget)


def cost(tokens: int) -> float:
    """As launch/compose.py has it for the 5B model."""
    return 72 * tokens * HIDDEN**2 / 700e12 + 14 * tokens**2 * HIDDEN / 470e12


SHAPES = (
    (256, 256), (192, 336), (336, 192), (480, 720), (480, 480), (720, 480), (432, 768), (576, 576), (768, 432),
)  # fmt: skip
FRAMES = tuple(range(5, 50, 4))
WEB = (*((1, *shape) for shape in SHAPES), *((frames, *shape) for frames in FRAMES for shape in SHAPES))


def _web(generator: np.random.Generator, count: int) -> NDArray[np.int64]:
    """30 % images; durations log-normal around four seconds at eight frames per second, of nine shapes."""
    shape = generator.choice(len(SHAPES), count, p=(0.1, 0.1, 0.05, 0.3, 0.05, 0.1, 0.2, 0.05, 0.05))
    seconds = np.exp(generator.normal(np.log(4.0), 0.8, count))
    length = np.clip((seconds * 8 - 1).astype(np.int64) // 4, 1, len(FRAMES)) - 1
    return np.where(generator.random(count) < 0.3, shape, (1 + length) * len(SHAPES) + shape)


MIXES = (
    Mix("web, 30 % images", WEB, _web),
    Mix(
        "480 x 720 stage", ((1, 480, 720), (25, 480, 720), (49, 480, 720)),
        lambda generator, count: generator.choice(3, count, p=(0.3, 0.1, 0.6)),
    ),
    Mix(
        "bimodal", ((1, 256, 256), (49, 480, 720)),
        lambda generator, count: generator.choice(2, count, p=(0.5, 0.5)),
    ),
)  # fmt: skip


class Packed(NamedTuple):
    """Share of the token budget that is used; worst rank's cost over the mean's, its mean and its 95th percentile over steps;
    clips composed in a second; and the most steps that a clip waited."""

    fill: float
    ratio: float
    ratio95: float
    clips_per_second: float
    waited: int


def packed(
    mix: Mix, *, clips: int, ranks: int, budget: int, micro: int = 1, mode: str = "pack", seed: int = 0
) -> Packed:
    """Pack ``clips`` of a mix on ``ranks`` ranks, ``micro`` packs to a rank and step."""
    classes, packs = mix.classes(budget), ranks * micro
    numbers = mix.draw(np.random.default_rng(seed), clips)
    ahead = {"pack": LOOK_AHEAD * packs, "bucket": packs + len(mix.sizes)}.get(mode, packs + 1) * budget
    each = int(classes.tokens[numbers].mean())
    pool, at, step, begun = Pool(), 0, 0, time.perf_counter()
    fills, ratios, waited = list[float](), list[float](), 0
    while True:
        while (held := int(classes.tokens[pool.classes].sum())) < ahead and at < clips:
            count = min((ahead - held) // each + 1, clips - at)
            draws = Draws(np.zeros(count, np.int64), np.arange(at, at + count))
            pool, at = pool.joined(draws, numbers[at : at + count], step=step), at + count
        if at >= clips:
            break
        if mode == "first fit":
            made = first_fit(pool, classes, packs=packs)
        else:
            made = compose(pool, classes, mode=mode, packs=packs, step=step)  # type: ignore[arg-type]
        taken = np.concatenate(made)
        waited = max(waited, int((step - pool.since[taken]).max()))
        costs = [int(classes.costs[pool.classes[pack]].sum()) for pack in made]
        totals = [sum(costs[pack] for pack in mine) for mine in dealt(costs, ranks)]
        fills.append(int(classes.tokens[pool.classes[taken]].sum()) / (packs * budget))
        ratios.append(max(totals) * ranks / sum(totals))
        pool, step = pool.without(taken), step + 1
    seconds = time.perf_counter() - begun
    return Packed(float(np.mean(fills)), float(np.mean(ratios)), float(np.quantile(ratios, 0.95)), at / seconds, waited)
