from __future__ import annotations

import torch

from cogvideo_dist.parallel.ballot import Ballot
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.ranks import run_ranks


def turns(mesh: ParallelMesh) -> list[list[bool]]:
    """Rank 1 wishes the first thing at its second turn, every rank the second thing at the third."""
    ballot = Ballot(mesh.world, torch.device("cpu"))
    last = mesh.world.size - 1
    return [list(ballot.turn((turn == 1 and mesh.world.rank == last, turn == 2))) for turn in range(5)]


def test_a_wish_of_one_rank_is_known_to_all_one_turn_later() -> None:
    for world in (1, 3):
        for found in run_ranks(turns, world):
            assert found == [[False, False], [False, False], [True, False], [False, True], [False, False]]
