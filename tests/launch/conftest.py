from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.commands import FREQUENT, finish, start
from tests.launch.world import World, make_world, train
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp() / "world")


@pytest.fixture(scope="session")
def whole(world: World) -> Path:
    """The run on one rank, undisturbed."""
    run = world.root / "whole"
    run_ranks(train, 1, world.file, world.overrides(run, *FREQUENT))
    return run


@pytest.fixture(scope="session")
def commanded(world: World) -> Path:
    """The same by the command itself, which has the machine's threads: sums are in another order."""
    run = world.root / "commanded"
    code, _, stderr = finish(start("python", [str(world.file), *world.overrides(run, *FREQUENT)]))
    assert code == 0, stderr
    return run
