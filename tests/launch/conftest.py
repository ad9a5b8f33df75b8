from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.commands import FREQUENT, finish, start
from tests.launch.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp() / "world")


@pytest.fixture(scope="session")
def whole(world: World) -> Path:
    """The run by ``python launch/train_dit.py``, undisturbed."""
    run = world.root / "whole"
    code, _, stderr = finish(start("python", [str(world.file), *world.overrides(run, *FREQUENT)]))
    assert code == 0, stderr
    return run
