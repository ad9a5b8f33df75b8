"""make bench-gpu as far as a machine without a GPU goes: its refusal, budget and files, and all its code at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.measure import Setting
from bench.record import Row

TOY = Setting(torch.device("cpu"), toy=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", *arguments])
    return gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_ends_with_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "--out", str(tmp_path)) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_every_measurement_runs_at_toy_size_and_runs_are_appended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, "--smoke", "--out", str(tmp_path)) == 0
    assert run(monkeypatch, "--smoke", "--out", str(tmp_path), "--only", "head-norm") == 0
    first, second = json.loads((tmp_path / "gpu-smoke.json").read_text())
    ids = {row["id"] for row in first["rows"]}
    assert ids == {f"rate {i}" for i in range(1, 6)} | {
        "back end",
        "gate",
        "A1",
        "A2",
        "A3",
        "A4",
        "A5",
        "B1",
        "B2",
        "B3",
        "VAE",
    }
    assert all(row["met"] for row in first["rows"] if row["id"] == "gate" or "relative difference" in row["what"])
    assert not first["notes"]
    assert {row["id"] for row in second["rows"]} == {"rate 2"}
    text = (tmp_path / "gpu-smoke.md").read_text()
    assert text.count("# Every run on this device") == 1
    assert text.count("\n## Run of ") == 2
    assert text.index("rate 2") < text.index("rate 1")


def test_what_does_not_fit_is_left_out_by_name_and_a_failure_takes_nothing_with_it() -> None:
    def fails(setting: Setting) -> list[Row]:
        raise RuntimeError("no such kernel")

    row = Row("x", "x", "s", 1.0)
    chosen = [
        gpu.Measurement("broken", 0, fails),
        gpu.Measurement("long", 1e6, lambda setting: [row]),
        gpu.Measurement("short", 0, lambda setting: [row]),
    ]
    rows, notes, failed = gpu.run_all(chosen, TOY, 60.0)
    assert rows == [row] and failed
    assert any(note.startswith("broken failed: RuntimeError: no such kernel") for note in notes)
    assert any(note.startswith("long is left out") for note in notes)


def test_an_unknown_measurement_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--smoke", "--only", "attention", "--out", "unused")
    assert "no measurement 'attention'; there are attention-default-96" in capsys.readouterr().err


def test_on_a_gpu_every_kernel_is_gated_and_every_backend_measured() -> None:
    names = {measurement.name for measurement in gpu.measurements(Setting(torch.device("cuda")))}
    assert {"gate-cudnn", "gate-flash", "gate-efficient", "gate-block", "fine-tune-5b", "fine-tune-2b"} <= names
    for length in gpu.LENGTHS:
        assert {f"attention-{kind}-{length}" for kind in ("default", "cudnn", "flash")} <= names
    for name in ("cudnn", "flash", "varlen", "flex"):
        assert {f"gate-{name}", f"back-end-{name}-1x17776", f"back-end-{name}-2x45104"} <= names
    for size in ("49x480x720", "81x768x1360"):
        assert {f"vae-{size}", f"vae-tiled-{size}"} <= names
    assert {"vae-slope", "vae-layouts", "vae-compile"} <= names
