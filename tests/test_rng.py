from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import torch

from cogvideo_dist.rng import fold, fold_seed


def test_the_same_ids_give_the_same_numbers_in_every_process() -> None:
    program = "from cogvideo_dist.rng import fold_seed; print(fold_seed(3, 'noise', 1, 2))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("0", "1")
    }  # fmt: skip
    assert found == {str(fold_seed(3, "noise", 1, 2))}


def test_the_numbers_do_not_change_between_versions() -> None:
    """A change here would break every seeded run: weights, order of data and noise would be others."""
    assert fold_seed(0) == 3582888934675442504
    assert fold_seed(3, "noise", 1, 2) == 3381168113925449661


def test_every_id_and_its_type_and_order_matter() -> None:
    ids: list[tuple[int | str, ...]] = [
        (),
        (1,),
        ("1",),
        (1, 2),
        (2, 1),
        (12,),
        ("1", 2),
        ("", 1),
        (1, ""),
        ("1, 2",),
        (-1,),
    ]
    found = {fold_seed(seed, *item) for seed, item in product((0, 1), ids)}
    assert len(found) == 2 * len(ids)
    assert all(0 <= seed < 2**63 for seed in found)


def test_the_global_generator_plays_no_part() -> None:
    state = torch.random.get_rng_state()
    first = torch.randn(4, generator=fold(7, "a"))
    torch.randn(3)
    assert torch.equal(first, torch.randn(4, generator=fold(7, "a")))
    torch.random.set_rng_state(state)
    torch.randn(2, generator=fold(7, "a"))
    assert torch.equal(state, torch.random.get_rng_state())


def test_neighbouring_ids_draw_independent_numbers() -> None:
    draws = torch.stack(
        [torch.randn(256, generator=fold(0, "noise", epoch, sample)) for epoch in range(4) for sample in range(8)]
    )
    correlation = torch.corrcoef(draws) - torch.eye(32)
    assert correlation.abs().max() < 6 / 256**0.5
