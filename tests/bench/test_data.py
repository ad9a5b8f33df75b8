"""The benchmarks of packing and loading at a toy size: all of their code runs, and their rows can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import loader, packing


def test_packing_has_a_row_for_every_figure_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packing, "OURS", packing.OURS[:1])
    monkeypatch.setattr(packing, "FOLDER", tmp_path)
    rows = packing.rows(packing.bench_packing(20_000))
    assert len(rows) == 3 * 4 + 9 * 3
    judged = [row for row in rows if row.goal and "per second" not in row.what]
    assert len(judged) == 9
    assert all(row.met for row in judged)
    assert (tmp_path / "packing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_loading_has_a_row_for_every_figure() -> None:
    rows = loader.rows(loader.bench_loader(samples=6, clips=3, small=1000, limit=1.0))
    assert [row.id for row in rows] == ["D4", "D4", "D4", "D4", "D5"]
    assert all(row.ours > 0 for row in rows)
