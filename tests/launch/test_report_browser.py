"""The report's page in headless Chromium: what a person sees and does, and that nothing leaves or enters it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import report
from launch.report_page import POLICY
from tests.launch.browser import CHROMIUM, MISSING, Browser
from tests.launch.report_runs import CAPTIONS, STEPS, make_run
from tests.launch.world import outcome

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

LOSS = 'figure.chart[data-chart="0"]'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    return [
        str(make_run(root / name, seed=seed, rate=rate)) for seed, (name, rate) in enumerate((("a", 2e-3), ("b", 5e-3)))
    ]


@pytest.fixture(scope="module")
def page(runs: list[str]) -> Path:
    out = Path(runs[0]).parent / "report.html"
    assert outcome("report", lambda: report.main([*runs, "--out", str(out)]))[0] == 0
    return out


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Browser:
    chromium.open(page)
    assert chromium.evaluate("document.documentElement.dataset.ready") == "yes", chromium.complaints
    return chromium


def axis(browser: Browser, chart: str = LOSS) -> list[str]:
    """The steps below a chart."""
    return list(
        browser.evaluate(
            f"(() => {{const all = [...document.querySelectorAll('{chart} .axes text')], y = t => Number(t.getAttribute('y')), "
            "foot = Math.max(...all.map(y)); return all.filter(t => y(t) === foot).map(t => t.textContent)})()"
        )
    )


def test_every_figure_is_drawn_and_nothing_is_asked_of_a_network(browser: Browser, page: Path) -> None:
    drawn = browser.evaluate(
        "[...document.querySelectorAll('figure.chart')].map(f => [f.querySelector('h3').textContent, "
        "...['width', 'height'].map(side => Math.max(...[...f.querySelectorAll('.plot .line')]"
        ".map(line => line.getBoundingClientRect()[side])))])"
    )
    titles = [title for title, *_ in drawn]
    assert titles[:2] == ["Training loss", "Held-out loss"] and len(titles) >= 16
    outside = browser.evaluate(
        "[...document.querySelectorAll('figure.chart > svg')].flatMap(svg => [...svg.querySelectorAll('.axes text')].filter("
        "t => t.getBoundingClientRect().right > svg.getBoundingClientRect().right + 1 || "
        "t.getBoundingClientRect().left < svg.getBoundingClientRect().left - 1).map(t => t.textContent))"
    )
    assert outside == [], "texts that are cut"
    assert all(width > 300 for title, width, _ in drawn), drawn
    assert all(
        height > 60 for title, _, height in drawn if title in ("Training loss", "Held-out loss", "Gradient norm")
    )
    fetched = [url for url in browser.requests if not url.startswith("data:")]
    assert fetched == [page.as_uri()]
    assert len(browser.requests) > 1, "the videos were read, from the page itself"
    assert browser.complaints == []


def test_all_videos_play(browser: Browser) -> None:
    count = browser.evaluate("document.querySelectorAll('video').length")
    assert count == 2 * 2 * 4, "two runs, two prompts, the newest step and three earlier ones"
    assert browser.evaluate("[...document.querySelectorAll('video')].every(v => v.paused && v.currentTime === 0)")
    browser.click("#play")
    played = browser.evaluate(
        "Promise.all([...document.querySelectorAll('video')].map(v => new Promise((done, fail) => {"
        "v.addEventListener('error', () => fail(v.error.message)); const look = () => v.currentTime > 0.3 && "
        "v.videoWidth ? done([v.videoWidth, v.videoHeight, v.duration]) : v.requestVideoFrameCallback(look); look()})))"
    )
    assert [each[:2] for each in played] == [[128, 96]] * count
    assert all(each[2] == pytest.approx(17 / 8, abs=0.02) for each in played)
    browser.click("#play")
    assert browser.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
    headings = browser.evaluate(
        "[...document.querySelectorAll('.films')].map(f => f.previousElementSibling.textContent)"
    )
    assert headings == list(CAPTIONS)


def test_hovering_tells_every_runs_value(browser: Browser, runs: list[str]) -> None:
    browser.mouse("mouseMoved", *browser.place(f"{LOSS} .plot", 0.5))
    told = browser.evaluate("[...document.querySelectorAll('.tip .row')].map(row => row.textContent)")
    for row, run in zip(told, runs, strict=True):
        logged = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
        value = next(entry["loss"] for entry in logged if entry["step"] == STEPS // 2 and "loss" in entry)
        assert row.startswith(f"{Path(run).name} {value:.6g}, running mean ") and row.endswith(f" at step {STEPS // 2}")
    browser.mouse("mouseMoved", 2, 2)
    assert browser.evaluate("document.querySelector('.tip').style.display") == "none"


def test_dragging_zooms_all_charts_and_a_double_click_ends_it(browser: Browser) -> None:
    before, other = axis(browser), 'figure.chart[data-chart="4"]'
    assert before[0] == "0" and axis(browser, other)[0] == "0"
    (left, y), (right, _) = browser.place(f"{LOSS} .plot", 0.5), browser.place(f"{LOSS} .plot", 0.75)
    browser.mouse("mousePressed", left, y)
    browser.mouse("mouseMoved", (left + right) / 2, y)
    browser.mouse("mouseMoved", right, y)
    browser.mouse("mouseReleased", right, y)
    for chart in (LOSS, other):
        assert all(80 <= int(step) <= 120 for step in axis(browser, chart)) and len(axis(browser, chart)) >= 3
    assert browser.evaluate("document.getElementById('reset').textContent") == "steps 80 to 120: show all"
    visible = browser.evaluate(
        f"(() => {{const b = document.querySelector('{LOSS} .plot').viewBox.baseVal; return [b.x, b.width, b.height]}})()"
    )
    assert visible[0] == pytest.approx(5000, rel=0.01) and visible[1] == pytest.approx(2500, rel=0.01)
    assert visible[2] < 5000, "the axis of values follows what is seen"
    for clicks in (1, 2):
        browser.mouse("mousePressed", left, y, clicks=clicks)
        browser.mouse("mouseReleased", left, y, clicks=clicks)
    assert axis(browser) == before and browser.evaluate("document.getElementById('reset').hidden")


def test_a_legend_hides_its_line(browser: Browser) -> None:
    browser.click(f'{LOSS} .legend button[data-line="1"]')
    shown = browser.evaluate(
        f"[...document.querySelectorAll('{LOSS} .plot [data-line]')].map(line => getComputedStyle(line).display)"
    )
    assert shown == ["inline", "none"]
    browser.mouse("mouseMoved", *browser.place(f"{LOSS} .plot"))
    assert browser.evaluate("document.querySelectorAll('.tip .row').length") == 1


CONTRASTS = """(() => {
  const colour = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const card = light(colour(getComputedStyle(document.querySelector('section')).backgroundColor));
  const ratio = c => { const own = light(colour(c)); return (Math.max(own, card) + 0.05) / (Math.min(own, card) + 0.05); };
  const of = (selector, key) => [...document.querySelectorAll(selector)].map(e => ratio(getComputedStyle(e)[key]));
  return {text: Math.min(...of('h3, td, figcaption', 'color')), quiet: Math.min(...of('.quiet', 'color'),
    ...of('.axes text', 'fill')), line: Math.min(...of('.plot .line', 'stroke')), card};
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_light_and_dark(browser: Browser, scheme: str) -> None:
    """Contrasts as WCAG 2 asks them: 4.5 of text, 3 of lines."""
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    found: dict[str, Any] = browser.evaluate(CONTRASTS)
    assert (found["card"] > 0.5) == (scheme == "light")
    assert found["text"] >= 4.5 and found["quiet"] >= 4.5 and found["line"] >= 3, found


def test_no_part_is_wider_than_a_telephone(browser: Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
    wide = browser.evaluate("document.documentElement.scrollWidth")
    browser.call("Emulation.clearDeviceMetricsOverride")
    assert wide <= 390


ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><img src=https://example.com/a.png>"


@pytest.mark.parametrize("guarded", [True, False])
def test_even_what_escaping_would_miss_runs_nothing_and_fetches_nothing(
    browser: Browser, page: Path, guarded: bool
) -> None:
    """A page into which somebody has written HTML; without its policy the same text does run, so that this can fail."""
    text = page.read_text(encoding="utf-8").replace("<main>", f"<main>{ATTACK}")
    attacked = page.with_name("attacked.html")
    attacked.write_text(text if guarded else text.replace(POLICY, ""), encoding="utf-8")
    browser.open(attacked)
    assert browser.evaluate("document.documentElement.dataset.ready") == "yes", "ours still runs"
    assert browser.evaluate("window.hacked === undefined") == guarded
    assert any("Content Security Policy" in complaint for complaint in browser.complaints) == guarded
