"""Kill -9 at every place of a step, a save and a start: what is committed is whole, little is lost, every bit comes again."""

from __future__ import annotations

import os
import random
from itertools import product
from pathlib import Path

import pytest

from tests.engine.kills import ANYWHERE, PHASES, draw_kill, histories
from tests.engine.toys import Case

SEED = int(os.environ.get("KILL_SEED", "20260728"))
NAMES = [*PHASES, *[ANYWHERE] * 2]
SHORT = [(Case(2, 1), 7), (Case(2, 0, asynchronous=True), 7), (Case(2, 3, asynchronous=True), 2)]
ALL = [Case(ranks, stage, asynchronous=late) for ranks, stage, late in product((2, 4), range(4), (False, True))]
EACH = 19
"""Kills of each of ``ALL``, so that they are 304."""


def name_of(case: Case) -> str:
    return f"{case.ranks} ranks, ZeRO {case.stage}, {'async' if case.asynchronous else 'sync'}"


def kill(case: Case, root: Path, phases: list[str], dice: random.Random) -> None:
    kills = [draw_kill(phase, case.ranks, dice) for phase in phases]
    figures = histories(case, root, kills)
    print(f"seed {SEED}; {name_of(case)}: {figures}")
    assert not figures.problems, "\n".join([f"seed {SEED}", *figures.problems])
    assert figures.kills >= len(phases)


@pytest.mark.parametrize("number", range(len(SHORT)), ids=[name_of(case) for case, _ in SHORT])
def test_nothing_that_was_computed_before_a_kill_is_lost_or_changed(tmp_path: Path, number: int) -> None:
    dice = random.Random(SEED)
    shuffled = dice.sample(NAMES, len(NAMES))
    first = sum(count for _, count in SHORT[:number])
    case, count = SHORT[number]
    kill(case, tmp_path, shuffled[first : first + count], random.Random(SEED + number))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_three_hundred_kills(tmp_path: Path, case: Case) -> None:
    number = ALL.index(case)
    dice = random.Random(SEED + 1)
    shuffled = dice.sample(NAMES, len(NAMES))
    first = number * EACH
    phases = [shuffled[(first + each) % len(shuffled)] for each in range(EACH)]
    kill(case, tmp_path, phases, random.Random(SEED + 100 + number))
