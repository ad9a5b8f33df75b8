"""launch/parity.py: right layouts pass, a wrong collective is named with its first wrong parameter, the rest is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cogvideo_dist.parallel.mesh import Layout, Place
from launch.parity import main
from launch.parity_report import table
from launch.parity_verdict import failed
from launch.parity_worlds import WorldError, run_world
from tests.launch.commands import ROOT, environment
from tests.launch.world import outcome

CONFIG = """\
run: {dir: nowhere/run, seed: 3}
model: {preset: tiny-cogvideox-5b, layers: 30, heads: 4}
frozen: {vae: nowhere/vae, text: nowhere/text}
data:
  shards: nowhere/shards
  source: pixels
  sizes: [[49, 480, 720]]
  fps: 8
  tokens_per_pack: 20000
  packs_per_step: 4
train: {steps: 100, learning_rate: 1.0e-3, warmup_steps: 50, precision: bf16, clip_norm: 0.1, ema_decay: 0.9}
checkpoint: {every: 10}
"""
"""Of a run whose data and frozen models do not exist."""
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("parity")
    (made / "run.yaml").write_text(CONFIG)
    return made


@cache
def parity(folder: Path, *options: str) -> Done:
    """The command, as a user starts it; its report lies in a folder named after the options."""
    out = str(folder / "".join(options).replace("/", ""))
    command = [sys.executable, str(ROOT / "launch" / "parity.py"), "--config", str(folder / "run.yaml"), "--out", out]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, cwd=ROOT, env=environment(), timeout=200
    )


def read(folder: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "".join(options).replace("/", "") / "parity.json").read_text())
    return found


ALL = ("--ranks", "2", "--layouts", "all", "--stages", "1,3")


@pytest.mark.long
def test_every_layout_of_two_ranks_is_one_process(folder: Path) -> None:
    done = parity(folder, *ALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 4 layouts compute what one process computes" in done.stdout
    report = read(folder, *ALL)
    assert report["passed"] and [layout["layout"] for layout in report["layouts"]] == [
        "dp2",
        "ulysses2",
        "ring2",
        "tp2",
    ]
    for layout in report["layouts"]:
        assert layout["loss"] <= 1e-12 and layout["gradient"]["error"] <= 1e-12, layout
        assert 0 < layout["weight"]["error"] <= 1e-6 and layout["norm"] <= 1e-5, layout
        assert layout["gradient"]["first_wrong"] is None and layout["problems"] == []
    sent = {(s["axis"], s["operation"]) for layout in report["layouts"] for s in layout["sent"]}
    assert sent == {("ulysses", "all_to_all"), ("ring", "shift"), ("tp", "gather"), ("tp", "scatter_sum")}


@pytest.mark.long
def test_the_users_configuration_is_what_is_compared(folder: Path) -> None:
    parity(folder, *ALL)
    report = read(folder, *ALL)
    assert report["config"]["model"]["layers"] == 2 and report["config"]["model"]["heads"] == 4
    assert report["config"]["train"]["clip_norm"] == 0.1 and report["zero_stages"] == [1, 3]
    assert len(report["packs"]) == 4  # two for each rank of dp2
    assert sorted(map(tuple, report["packs"][0])) == [(1, 48, 64), (5, 64, 48), (9, 48, 64)]


@pytest.mark.long
def test_the_page_needs_no_network_and_its_figures_are_whole(folder: Path) -> None:
    parity(folder, *ALL)
    page = (folder / "".join(ALL) / "parity.html").read_text()
    assert not re.search(r"https?:|src=|@import|<link", page)
    figures = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    errors, weights, traffic = figures
    assert len(errors.findall("circle")) == len(weights.findall("circle")) == 4
    for figure in (errors, weights):  # every error lies left of the line of its tolerance
        limit = next(float(line.attrib["x1"]) for line in figure.findall("line") if line.get("class") == "limit")
        assert all(float(dot.attrib["cx"]) < limit for dot in figure.findall("circle"))
    bars = traffic.findall("rect")
    ticks = [float(line.attrib["x1"]) for line in traffic.findall("line") if line.get("class") == "tick"]
    ends = [float(bar.attrib["x"]) + float(bar.attrib["width"]) for bar in bars]
    assert ends == pytest.approx(ticks, rel=0.01) and len(bars) == 4
    assert "nowhere/shards" in page and "dp2" in page


@pytest.mark.long
@pytest.mark.parametrize(("operation", "layout"), [("to_tokens", "ulysses2"), ("enter", "tp2")])
def test_a_wrong_collective_is_found_where_it_is_used(folder: Path, operation: str, layout: str) -> None:
    options = ("--ranks", "2", "--layouts", f"dp2,{layout}", "--steps", "1", "--broken", operation)
    done = parity(folder, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"1 of 2 layouts are wrong: {layout}" in done.stdout
    right, wrong = read(folder, *options)["layouts"]
    assert right["passed"] and not wrong["passed"]
    assert wrong["gradient"]["first_wrong"] == "embed.patch.weight"
    assert f"{layout}: first wrong gradient: embed.patch.weight" in done.stdout
    assert wrong["layout"] in (folder / "".join(options) / "parity.html").read_text().split("What is wrong")[1]


def hang(job: object, place: Place) -> dict[str, Any]:
    return {} if place.rank else endless()


def endless() -> dict[str, Any]:
    while True:
        time.sleep(1)


def crash(job: object, place: Place) -> dict[str, Any]:
    if place.rank == 1:
        raise ValueError("no room\nfor this rank")
    return endless()


def vanish(job: object, place: Place) -> dict[str, Any]:
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return endless()


@pytest.mark.parametrize(
    ("work", "message", "seconds"),
    [
        (crash, "rank 1: for this rank", 60),
        (vanish, "rank 1 ended with exit code -9", 60),
        (hang, "ranks .*0.* did not end in 2 s", 2),
    ],
)
def test_ranks_that_crash_or_hang_end_their_world(
    tmp_path: Path, work: Callable[..., Any], message: str, seconds: float
) -> None:
    with pytest.raises(WorldError, match=message) as raised:
        run_world(work, None, world=2, device="cpu", folder=tmp_path / "world", timeout_s=seconds)
    assert not multiprocessing.active_children()
    verdict = failed(Layout(tp=2), str(raised.value), seconds=5.0, details=raised.value.details)
    assert not verdict.passed and re.search(message, table([verdict]))
    assert "1 of 1 layouts are wrong: tp2" in table([verdict])


@pytest.mark.long
def test_one_process_that_fails_leaves_nothing_to_compare_with(folder: Path) -> None:
    done = parity(folder, "--ranks", "2", "--timeout", "0.05")
    assert done.returncode == 1
    assert "one process alone failed" in done.stderr and "did not end in 0.05 s" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "3", "--layouts", "tp3"), "'tp3' is no legal layout of 3 ranks for 4 heads; use all or some of dp3, ul"),
        (("--ranks", "2", "--layouts", "dp2,pp2"), "'pp2' is no legal layout of 2 ranks for 4 heads; use all or some of "
         "dp2, ulysses2, ring2, tp2"),
        (("--ranks", "0"), "option.ranks must be above 0, found 0"),
        (("--ranks", "2", "--frames", "10"), "--frames, --height and --width: [10, 48, 64] is not a legal"),
        (("--ranks", "2", "--stages", "4"), "--stages must be some of 0,1,2,3, found '4'"),
        (("--ranks", "999", "--device", "cuda"), "--device cuda needs a GPU for each of --ranks 999, found"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(folder: Path, options: tuple[str, ...], message: str) -> None:
    arguments = ["--config", str(folder / "run.yaml"), *options]
    code, _, stderr = outcome("parity", lambda: main(arguments))
    assert code == 78
    assert message in stderr and stderr.count("\n") == 1, stderr


def test_the_hook_of_these_tests_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--layouts" in shown and "--broken" not in shown


@pytest.mark.long
def test_adapters_of_an_image_to_video_model_are_compared_too(folder: Path) -> None:
    (folder / "adapters.yaml").write_text(
        CONFIG.replace("cogvideox-5b", "cogvideox1.5-5b-i2v")
        + "lora: {rank: 4, alpha: 8, dropout: 0.2, targets: [q, v, out, ff1, ff2]}\n"
    )
    options = ("--config", str(folder / "adapters.yaml"), "--ranks", "2", "--layouts", "tp2,ring2", "--stages", "1")
    done = parity(folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (one, *_) = read(folder, *options)["layouts"]
    assert ".lora." in one["gradient"]["name"]
