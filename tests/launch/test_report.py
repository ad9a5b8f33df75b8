"""The report's page without a browser: what it holds, what it makes of damage and of hostile text, and what thinning keeps."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvideo_dist.config.load import load_config, to_yaml
from cogvideo_dist.config.schema import DiTRun
from launch import report
from launch.report_charts import ticks
from launch.report_curves import MOST, PENDING, Curve
from launch.report_films import steps_shown
from launch.report_read import Film
from launch.report_script import SCRIPT
from tests.engine.test_trainer import run, settings
from tests.launch.commands import ROOT
from tests.launch.report_runs import CAPTIONS, SAVED, STEPS, STOP, make_run
from tests.launch.world import outcome
from tests.ranks import run_ranks


class Parsed(HTMLParser):
    """A page's elements and texts, and the numbers of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        """Of charts, in the order of their numbers."""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        (data,) = [content for attributes, content in self.scripts if attributes.get("id") == "data"]
        self.data: dict[str, Any] = json.loads(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.scripts[-1][1] == "" and data.strip():
            self.scripts[-1] = (self.scripts[-1][0], data)
        elif data.strip():
            if [tag for tag, _ in self.elements[-3:]] == ["figure", "figcaption", "h3"]:
                self.titles.append(data)
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [
            found for name, found in self.elements if name == tag and kind in [*(found.get("class") or "").split(), ""]
        ]

    def chart(self, title: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data["charts"][self.titles.index(title)]
        return found


def write(out: Path, *arguments: Path | str) -> tuple[int, str, str]:
    return outcome("report", lambda: report.main([*map(str, arguments), "--out", str(out)]))


def written(out: Path, *arguments: Path | str) -> Parsed:
    code, _, stderr = write(out, *arguments)
    assert code == 0, stderr
    return Parsed(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "sft")


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "sft"))


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_value_of_a_short_log_is_on_the_page(made: Path, tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", made)
    names = {
        "Training loss": "loss", "Held-out loss": "held_out/loss", "Learning rate": "learning_rate",
        "Gradient norm": "gradient_norm", "Time of a step": "throughput/step_s", "Peak memory": "memory/peak_gib",
    }  # fmt: skip
    for title, name in names.items():
        (line,) = page.chart(title)["lines"]
        expected = [(entry["step"], entry[name]) for entry in logged(made) if name in entry]
        assert line["steps"] == [step for step, _ in expected]
        assert line["mean"] == pytest.approx([value for _, value in expected], rel=1e-5)
        assert "low" not in line, "nothing was thinned"
    for title, name in (("Model FLOPs utilisation", "throughput/mfu"), ("Waiting for data", "data/loader_wait_share")):
        (line,) = page.chart(title)["lines"]
        assert line["mean"] == pytest.approx([100 * entry[name] for entry in logged(made) if name in entry], rel=1e-5)
    timesteps = [line["label"] for line in page.chart("Held-out loss by timestep")["lines"]]
    assert timesteps == ["t100", "t500", "t900"]


def test_every_name_that_is_logged_is_drawn_once(own: Path, tmp_path: Path) -> None:
    with (own / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": STEPS, "skew/slowest_share": 0.25, "critic/loss": 0.5, "new": 3}) + "\n")
    page = written(tmp_path / "page.html", own)
    names = {name for entry in logged(own) for name in entry if name != "step" and not name.startswith("lineage/")}
    lines = [line for chart in page.data["charts"] for line in chart["lines"]]
    assert len(lines) == len(names) + 2, "and two of the checkpoints"
    for title in ("skew/slowest_share", "new"):
        (line,) = page.chart(title)["lines"]
        assert line["steps"] == [STEPS]
    assert page.chart("critic: loss")["lines"][0]["mean"] == [0.5]


def test_the_page_tells_of_everything_that_a_run_holds(made: Path, tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", made)
    for said in (
        f"{STEPS} of {STEPS}", f"2, {STOP - SAVED} steps lost", "8, 0 kept", "514,080", "runs/stage1", "abababababababab",
        "data/shards", "checksum", "caption of n tokens is cut to n", "21.4 GB", "2026-09-21 15:52:00 UTC", *CAPTIONS,
        f"step {STEPS}", "preset: cogvideox-5b",
    ):  # fmt: skip
        assert said in page.text, said
    assert len(page.of("video")) == 8
    content = base64.b64decode((page.of("video")[0]["src"] or "").removeprefix("data:video/mp4;base64,"))
    assert content == (made / "samples" / f"step-{STEPS:06d}" / "prompt-00.mp4").read_bytes()
    starts = [found["d"] for found in page.of("path", "start")]
    assert set(starts) == {f"M{10000 * SAVED / STEPS:.1f} 0V10000"}


def test_nothing_is_fetched_and_only_our_script_runs(made: Path, tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", made)
    places = [
        found[key] for _, found in page.elements for key in ("src", "href", "srcset", "action", "data") if key in found
    ]
    assert {re.split("[:#]", place or "")[0] for place in places} == {"data", ""}
    assert (
        not page.of("link")
        and not page.of("iframe")
        and not re.search("url\\(|@import", (tmp_path / "page.html").read_text())
    )
    assert [attributes for attributes, _ in page.scripts] == [{"type": "application/json", "id": "data"}, {}]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    (policy,) = [found["content"] or "" for found in page.of("meta") if "http-equiv" in found]
    assert page.scripts[1][1] == SCRIPT and f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("script-src")[1]
    names = [found["id"] for _, found in page.elements if "id" in found]
    assert len(names) == len(set(names)) and {f"#{name}" for name in names} > {found["href"] for found in page.of("a")}
    handlers = [key for _, found in page.elements for key in found if key.startswith("on")]
    assert not handlers


HOSTILE = (
    "</script></pre></title><script>window.hacked=1</script>\"'><img src=x onerror=alert(1)>\u202e\x1b[2J\ud800<!--"
)


def test_hostile_text_is_shown_and_adds_no_element(own: Path, tmp_path: Path) -> None:
    """The same run with harmless and with hostile words everywhere: both pages have the same elements."""
    pages = {}
    for kind, word in (("harmless", "word"), ("hostile", HOSTILE)):
        folder = tmp_path / kind / "run"
        shutil.copytree(own, folder)
        spread(folder, word)
        pages[kind] = written(tmp_path / f"{kind}.html", folder)
    harmless, hostile = pages["harmless"], pages["hostile"]
    counts = [Counter((tag, tuple(sorted(found))) for tag, found in page.elements) for page in (harmless, hostile)]
    assert counts[0] == counts[1]
    assert hostile.text.count("<script>window.hacked=1</script>") >= 8, "it can be read"
    raw = (tmp_path / "hostile.html").read_text(encoding="utf-8")
    assert raw.count("<script") == 2 and "\u202e" not in raw and "\x1b" not in raw
    assert hostile.data["charts"][-1]["lines"][0]["label"].startswith("</script>")


def spread(folder: Path, word: str) -> None:
    """A word into every place that holds text."""
    config = json.loads(json.dumps({"run": {"dir": word}, "train": {"steps": 9}, "frozen": {"vae": word}}))
    (folder / "config.yaml").write_text(json.dumps(config))
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, word: 1.0}) + "\n")
    lines = {
        "starts.jsonl": {"step": 3, "time": 1.0, "host": word, "lost": 0},
        "data_report.jsonl": {"key": word, "source": word, "reason": word, "code": word, "replaced_by": word},
        "ckpt/ledger.jsonl": {"step": 3, "name": word, "time": 1, "bytes": 1, "seconds": 1},
    }
    for name, line in lines.items():
        with (folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
    ancestor = {"run": word, "step": 1, "samples": 1, "weights": word, "sha256": word}
    (folder / "lineage.json").write_text(json.dumps([ancestor]))
    (folder / "data.json").write_text(json.dumps([{"shards": word, "samples": word, "digest": word}]))
    for captions in folder.glob("samples/*/captions.json"):
        captions.write_text(json.dumps({"prompt-00": word, "prompt-01": word + "2"}))


def test_what_cannot_be_read_is_said_and_the_rest_is_drawn(own: Path, tmp_path: Path) -> None:
    log = own / "log.jsonl"
    lines = log.read_text().splitlines()
    lines[5:5] = [
        '{"step": 3, "lo',
        "[1]",
        '{"loss": 1}',
        '{"step": -1, "loss": 9}',
        '{"step": 3, "odd": NaN, "off": 1e999}',
    ]
    log.write_text("\n".join(lines) + '\n{"step": 999, "loss": 0.0')
    (own / "lineage.json").write_text('{"a": 1}')
    (own / "data.json").write_text("[" * 100_000)
    (own / "samples" / f"step-{STEPS:06d}" / "captions.json").write_bytes(b"\xff\xfe")
    (own / "ckpt" / f"step-{STEPS:06d}").mkdir()
    code, stdout, _ = write(tmp_path / "page.html", own)
    page = Parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert code == 0
    problems = [line.removeprefix("warning: ") for line in stdout.splitlines() if line.startswith("warning: ")]
    assert problems[:3] == [
        f"{log}: lines that cannot be read and are left out: 2, the first is 6",
        f"{log}: lines without a step, which are left out: 2",
        f"{log}: values that are not finite, or above 1e+100, and are not drawn: odd 1, off 1",
    ]
    named = {
        name for name in ("lineage.json", "data.json", "captions.json", "manifest.json") if name in " ".join(problems)
    }
    assert len(named) == 4 and len(problems) == 7, problems
    assert all(problem[:60] in page.text for problem in problems)
    assert page.chart("Training loss")["lines"][0]["steps"][-1] == STEPS, (
        "a torn last line is that of a run that writes"
    )


@pytest.mark.parametrize(("break_it", "said"), [
    (lambda run: (run / "config.yaml").unlink(), "{run} is not the folder of a run: it has no config.yaml"),
    (lambda run: (run / "log.jsonl").unlink(), "{run} has logged nothing yet: log.jsonl is missing or has no line of "),
    (lambda run: (run / "log.jsonl").write_text('{"st'), "{run} has logged nothing yet: "),
    (lambda run: (run / "config.yaml").write_text("a: ["), "{run}/config.yaml: not valid YAML: "),
    (lambda run: (run.parent / "page.html").mkdir(), "--out {out} is a folder; name the page, for example {out}/report.html"),
])  # fmt: skip
def test_wrong_use_ends_with_one_line(own: Path, break_it: Callable[[Path], None], said: str) -> None:
    break_it(own)
    out = own.parent / "page.html"
    code, stdout, stderr = write(out, own)
    assert code == 78 and stdout == "" and stderr.count("\n") == 1
    assert stderr.startswith("report: error: " + said.format(run=own, out=out)), stderr
    assert not out.is_file()


def test_runs_lie_over_each_other(made: Path, own: Path, tmp_path: Path) -> None:
    other = own.rename(tmp_path / "lora")
    config = (other / "config.yaml").read_text().replace("learning_rate: 0.002", "learning_rate: 0.5")
    (other / "config.yaml").write_text(config)
    page = written(tmp_path / "page.html", made, other)
    assert [line["label"] for line in page.chart("Training loss")["lines"]] == ["sft", "lora"]
    labels = [line["label"] for line in page.chart("Held-out loss by timestep")["lines"]]
    assert labels == [f"{run}: {name}" for run in ("sft", "lora") for name in ("t100", "t500", "t900")]
    assert "what differs\nkey\nsft\nlora\ntrain.learning_rate\n0.002\n0.5" in page.text
    twins = written(tmp_path / "twins.html", made, made)
    assert [line["label"] for line in twins.chart("Training loss")["lines"]] == [str(made)] * 2


def test_passwords_of_urls_stay_out(own: Path, tmp_path: Path) -> None:
    (own / "config.yaml").write_text("data: {shards: 's3://key:hunter2@bucket/set?token=hunter2'}")
    (own / "data.json").write_text(json.dumps([{"shards": "https://me:hunter2@host/set?sig=hunter2", "samples": 1}]))
    page = written(tmp_path / "page.html", own)
    assert "s3://bucket/set" in page.text and "https://host/set" in page.text
    assert "hunter2" not in (tmp_path / "page.html").read_text()


def test_videos_are_bounded_and_the_newest_come_first(own: Path, tmp_path: Path) -> None:
    newest = own / "samples" / f"step-{STEPS:06d}"
    sizes = {path: path.stat().st_size for path in own.glob("samples/*/*.mp4")}
    limit = sum(size for path, size in sizes.items() if path.parent == newest) + 10
    page = written(tmp_path / "page.html", own, "--videos", str(limit / 1e6))
    assert len(page.of("video")) == 2 and page.text.count("is not embedded: ") == 6
    (newest / "prompt-00.mp4").write_bytes(b"root:x:0:0:root:/root:/bin/bash")
    (newest / "prompt-01.mp4").unlink()
    (newest / "prompt-01.mp4").symlink_to("/etc/passwd")
    page = written(tmp_path / "page.html", own)
    assert page.text.count("is not embedded: this is no mp4") == 2 and len(page.of("video")) == 6
    assert not written(tmp_path / "page.html", own, "--videos", "0").of("video")
    many = [Film(step, "a", "", newest) for step in range(0, 1000, 10)]
    assert steps_shown(many) == [990, 660, 330, 0]


def test_stalls_are_shown_of_runs_that_note_them(own: Path, made: Path, tmp_path: Path) -> None:
    """And a checkpoint behind the last logged step is listed, but has no place in a chart."""
    other = own.rename(tmp_path / "other")
    ledger = other / "ckpt" / "ledger.jsonl"
    entries = [json.loads(line) | {"stall": 0.125} for line in ledger.read_text().splitlines()]
    entries.append(entries[-1] | {"step": 10**6})
    ledger.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = written(tmp_path / "page.html", made, other)
    (line,) = page.chart("Time that the training stood still")["lines"]
    assert line["label"] == "other" and line["mean"] == [0.125] * 8 and max(line["steps"]) == STEPS
    assert "still" in page.texts and "1000000" in page.texts


def test_names_without_measure_are_left_out(own: Path, tmp_path: Path) -> None:
    with (own / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "x" * 300: 1.0, **{f"n{n}": 1.0 for n in range(500)}}) + "\n")
    page = written(tmp_path / "page.html", own)
    assert sum(len(chart["lines"]) for chart in page.data["charts"]) == 400 - 2 + 2, (
        "less two of lineage, two of the ledger"
    )
    (said,) = [text for text in page.texts if "which are left out" in text]
    assert said.endswith(
        f"which are left out: {501 - (400 - len({n for entry in logged(own)[:-1] for n in entry}) + 1)}"
    )


def test_a_real_run_is_reported_with_its_checkpoints(tmp_path: Path) -> None:
    """The trainer's own log, starts, ledger and manifests."""
    folder = tmp_path / "real"
    assert run_ranks(run, 1, settings(folder, steps=4)) == [""]
    assert run_ranks(run, 2, settings(folder, steps=6)) == ["", ""]
    config = load_config(DiTRun, [ROOT / "configs/demo/dit.yaml"], overrides=[f"run.dir={folder}", "train.steps=16"])
    (folder / "config.yaml").write_text(to_yaml(config))
    page = written(tmp_path / "page.html", folder)
    assert page.chart("Training loss")["lines"][0]["steps"] == [1, 2, 3, 4, 5, 6]
    assert "2, 0 steps lost" in page.text and "3, 3 kept" in page.text and "zero_stage" in page.text
    assert page.chart("Time until it is committed")["lines"][0]["steps"] == [2, 4, 6]
    assert "What could not be read" not in page.text


def test_a_thinned_curve_keeps_every_extreme_and_every_mean() -> None:
    """Against all values: each point's least, greatest and mean are those of the steps that it stands for."""
    steps = np.arange(3 * PENDING + 77) * 5
    values = np.sin(steps / 9e3) + np.random.default_rng(0).normal(size=len(steps))
    values[31_234] = 1e6  # one step of many
    curve = Curve()
    for step, value in zip(steps.tolist(), values.tolist()):
        curve.add(step, value)
    points = curve.points()
    assert MOST / 2 <= len(points.steps) <= MOST and points.thinned
    assert points.high.max() == 1e6 and points.count.sum() == len(steps)
    assert (points.mean * points.count).sum() == pytest.approx(values.sum(), rel=1e-12)
    for number, place in enumerate(steps // points.span == first for first in np.unique(steps // points.span)):
        mine = values[place]
        assert (points.low[number], points.high[number]) == (mine.min(), mine.max())
        assert points.mean[number] == pytest.approx(mine.mean(), rel=1e-9)
        assert points.steps[number] == (steps[place][0] + steps[place][-1]) / 2
    assert curve.last == (steps[-1], values[-1])


def test_a_thinned_curve_does_not_depend_on_when_it_was_thinned() -> None:
    values = np.random.default_rng(1).normal(size=PENDING + 5000)
    early, late = Curve(), Curve()
    for step, value in enumerate(values.tolist()):
        early.add(step, value)
        late.add(step, value)
        if step % 3001 == 0:
            early.points()
    for name in ("steps", "low", "high", "count"):
        assert np.array_equal(getattr(early.points(), name), getattr(late.points(), name))
    assert np.allclose(early.points().mean, late.points().mean, rtol=1e-12, atol=1e-15)


def test_the_running_mean_is_that_of_its_window() -> None:
    curve, values = Curve(), np.random.default_rng(2).normal(size=200)
    for step, value in enumerate(values.tolist()):
        curve.add(step, value)
    running = curve.points().running_mean()
    assert running is not None
    windows = [values[i - min(i, 5) : i + min(i, 5) + 1] for i in range(200)]
    assert running.tolist() == pytest.approx([window.mean() for window in windows])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 7), (1e-9, 2e-9), (0, 1_000_000), (0.99, 1.01), (-1e100, 1e100)]
)
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low - 1e-9 * abs(high) <= tick <= high + 1e-9 * abs(high) for tick in found)
    step = found[1] - found[0]
    assert step / 10 ** math.floor(math.log10(step * 1.001)) == pytest.approx(
        round(step / 10 ** math.floor(math.log10(step * 1.001)))
    )


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [-2.0], [1e99, -1e99], [1e-99, 1e99], [1.0, 1.0 + 1e-15], [1e-320, 0.0]]
)
def test_any_finite_figure_is_drawn(own: Path, tmp_path: Path, values: list[float]) -> None:
    (own / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": v}) + "\n" for n, v in enumerate(values)))
    page = written(tmp_path / "page.html", own)
    (drawn,) = [found["d"] or "" for found in page.of("path", "dots")][:1]
    heights = [float(point.split()[1].removesuffix("h0")) for point in drawn.split("M")[1:]]
    assert len(heights) == len(values) and all(0 <= height <= 10_000 for height in heights)


@pytest.mark.long
def test_a_million_lines_make_a_small_page(own: Path, tmp_path: Path) -> None:
    entry = {name: value for name, value in logged(own)[5].items() if name != "step"}
    assert len(entry) > 20
    with (own / "log.jsonl").open("w") as log:
        for step in range(1, 1_000_001):
            spike = 50.0 if step == 777_777 else 0.0
            log.write(json.dumps({"step": step, **entry, "loss": 1 + 100 / step + spike}) + "\n")
    page = written(tmp_path / "page.html", own)
    (line,) = page.chart("Training loss")["lines"]
    assert len(line["steps"]) <= MOST and max(line["high"]) == pytest.approx(51, abs=1e-3)
    assert (tmp_path / "page.html").stat().st_size < 12e6
