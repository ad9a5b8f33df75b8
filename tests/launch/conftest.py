from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.commands import FREQUENT
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
