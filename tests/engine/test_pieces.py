"""How tensors are divided and divided anew, against plain slicing of whole tensors."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cogvideo_dist.engine.pieces import Cut, Piece, overlaps
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.split import Split

CUTS = [
    Cut((12, 5), Split(0)), Cut((24, 3), Split(0, stacked=3)), Cut((5, 12), Split(1)), Cut((24,), Split(0, stacked=2)),
    Cut((7, 3)), Cut((2, 24, 3), Split(1, stacked=2)),
]  # fmt: skip


def content(cut: Cut, whole: Tensor, piece: Piece) -> Tensor:
    """What a piece holds, by slicing as models do."""
    axis = Axis("tp", piece.part, piece.parts)
    own = cut.split.slice(whole, axis) if cut.split else whole
    return own.flatten()[piece.start : piece.stop]


def divided(cut: Cut, parts: int, count: int, chance: random.Random) -> list[Piece]:
    """Every slice in ``count`` pieces at random places, some of them empty."""
    pieces = []
    for part in range(parts if cut.split else 1):
        whole = cut.slice(part, parts)
        places = sorted(chance.randint(0, whole.stop) for _ in range(count - 1))
        pieces += [replace(whole, start=a, stop=b) for a, b in zip([0, *places], [*places, whole.stop])]
    return pieces


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("parts", [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (4, 4), (3, 2)])
def test_pieces_of_one_division_give_those_of_another(cut: Cut, parts: tuple[int, int]) -> None:
    if cut.split and any(cut.shape[cut.split.dim] // cut.split.stacked % each for each in parts):
        pytest.skip("does not divide")
    chance, whole = random.Random(str((cut, parts))), torch.arange(float(cut.count)).view(cut.shape)
    for count in (1, 2, 5):
        sources = divided(cut, parts[0], count, chance)
        for target in divided(cut, parts[1], 3, chance):
            found, filled = torch.full((target.count,), -1.0), 0
            for source in sources:
                own = content(cut, whole, source)
                for shared in overlaps(cut, source=source, target=target):
                    shared.copy(own[slice(*shared.source)], found)
                    filled += shared.rows * (shared.source_columns[1] - shared.source_columns[0])
            assert torch.equal(found, content(cut, whole, target))
            assert filled == target.count


def test_a_tensor_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(12, 5\) does not divide into 5 slices"):
        Cut((12, 5), Split(0)).slice(0, 5)


def test_a_tensor_that_is_not_sliced_is_whole_everywhere() -> None:
    assert Cut((7, 3)).slice(1, 2) == Piece(0, 1, 0, 21)
