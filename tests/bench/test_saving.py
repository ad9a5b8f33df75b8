"""The benchmark of checkpoints, at a size that takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.saving import STALL, bench_saving, rows
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.ranks import run_ranks

TINY = DiTConfig(layers=1, heads=2, head_dim=16, time_embed_dim=16, text_dim=16, text_length=4)


def measured(mesh: ParallelMesh, folder: str) -> dict[str, Any]:
    return bench_saving(TINY, Path(folder), mesh=mesh)


def test_every_side_saves_and_has_its_rows(tmp_path: Path) -> None:
    result = run_ranks(measured, 1, str(tmp_path))[0]
    assert result["bytes"] == 16 * result["parameters"]
    assert all(
        0 < result[side]["stall"] <= result[side]["total"] for side in ("ours", "ours beside", "dcp", "dcp beside")
    )
    found = rows(result)
    assert [row.id for row in found] == ["C7"] * 4
    assert found[0].at_most == STALL
    assert not list(tmp_path.iterdir()), "nothing is left on the disk"
