from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cogvideo_dist.config.schema import Checkpoint, DiTRun, Frozen, Model, Run, Train
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import Index, IndexWriter, Kind, Member, Record
from cogvideo_dist.data.loader import dealt
from cogvideo_dist.data.plan import Plan
from cogvideo_dist.data.sizes import assign_size
from cogvideo_dist.data.sources import find_sources, take_in
from cogvideo_dist.data.writing import write_shards
from data_tools.inspect_clips import pictures
from data_tools.inspect_lint import LINT, Lint
from data_tools.inspect_set import Histogram, Inspected, evenly, load_run
from data_tools.inspect_shards import NUMBERS, PAGE, main
from data_tools.make_demo_text import train_tokenizer
from launch.compose import TransformerGeometry
from tests.data.clips import STEP, add, make_clip, make_image, settings

HOSTILE = "<script>alert('x')</script> & \"quotes\" https://example.org/x.js"
LONG = "a very long caption of a cat " * 9
CAPTIONS = ("a cat", "a dog", HOSTILE, "a cat", LONG, "some bird", "a fish in the sea", "an image", "a view")
SIZES = [[5, 32, 48], [9, 48, 64], [1, 48, 64]]


def media() -> dict[str, bytes]:
    """Short and long clips, slow and fast ones, wide ones, images, and three that have no size."""
    return {
        "videos/long.mp4": make_clip(24, 8),
        "videos/wide.mp4": make_clip(12, 8, size=(48, 96)),
        "videos/short.mp4": make_clip(6, 8, size=(32, 48)),
        "videos/fast.mp4": make_clip(40, 30, size=(96, 128)),
        "videos/slow.mp4": make_clip(10, 4),
        "videos/blink.mp4": make_clip(3, 8),
        "images/fits.png": make_image(48, 64),
        "images/large.png": make_image(96, 96),
        "images/small.png": make_image(20, 20),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a tokenizer and configurations of both kinds."""
    root: Path = tmp_path_factory.mktemp("inspected")
    for (name, content), caption in zip(media().items(), CAPTIONS):
        add(root / "source", name, content, caption)
    write_shards(root / "shards", take_in(find_sources(root / "source")), max_shard_size=10_000)
    train_tokenizer([*CAPTIONS, *"abcdefghijklmnopqrstuvwxyz"], root / "text" / "tokenizer", length=20)
    common: dict[str, Any] = {
        "run": {"dir": str(root / "run"), "seed": 3}, "checkpoint": {"every": 10},
        "train": {"steps": 40, "learning_rate": 1e-3},
        "data": {"shards": str(root / "shards"), "source": "pixels", "sizes": SIZES, "fps": 8, "tokens_per_pack": 200,
                 "packs_per_step": 4, "held_out": 1, "workers": 0},
    }  # fmt: skip
    dit = {
        "model": {"preset": "cogvideox-2b", "text_length": 20},
        "frozen": {"vae": "unused", "text": str(root / "text")},
    }
    (root / "dit.yaml").write_text(yaml.safe_dump(common | dit))
    (root / "vae.yaml").write_text(yaml.safe_dump(common | {"loss": {"reconstruction": "l1"}}))
    return root


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    out = folder / "report"
    assert main(["--config", f"{folder}/dit.yaml", "--out", str(out), "--lint", "--dp", "2", "4"]) == 1
    return json.loads((out / NUMBERS).read_text())


def run_of(folder: Path) -> DiTRun:
    config = load_run([str(folder / "dit.yaml")], [])
    assert isinstance(config, DiTRun)
    return config


def records_of(folder: Path) -> list[Record]:
    return list(Index.read(folder / "shards"))


def plan_of(folder: Path) -> Plan:
    config = run_of(folder)
    geometry = TransformerGeometry(config.model.transformer())
    return Plan(Catalog([Index.read(folder / "shards")]), config.data, seed=3, geometry=geometry)


def test_the_numbers_of_the_set_are_those_of_its_records(folder: Path, report: dict[str, Any]) -> None:
    records, about = records_of(folder), report["set"]
    videos = [record for record in records if record.kind == "video"]
    assert about["samples"] == 9 and about["shards"] == len({record.shard for record in records}) >= 2
    assert about["bytes"] == sum(member.size for record in records for member in record.members.values())
    assert about["kinds"]["video"]["samples"] == len(videos) == 6 and about["kinds"]["image"]["samples"] == 3
    assert about["hours"] == pytest.approx(sum(record.frames / record.fps for record in videos) / 3600)
    assert about["digest"] == Index.read(folder / "shards").digest
    assert sum(report["histograms"]["seconds"]["counts"]) == len(videos)
    assert sum(report["histograms"]["fps"].values()) == len(videos)
    assert sum(report["histograms"]["caption_characters"]["counts"]) == len(records)
    shapes = Counter((record.height, record.width) for record in records)
    assert {(h, w): count for h, w, count in report["shapes"]["counts"]} == shapes


def test_the_numbers_of_sizes_and_drops_are_those_of_each_sample(folder: Path, report: dict[str, Any]) -> None:
    records, data = records_of(folder), run_of(folder).data
    sizes = {record.key: assign_size(record, data) for record in records}
    geometry = TransformerGeometry(run_of(folder).model.transformer())
    for facts in report["sizes"]:
        mine = [record for record in records if sizes[record.key] == tuple(facts["size"])]
        assert facts["samples"] == len(mine) > 0
        assert facts["tokens"] == geometry(tuple(facts["size"])).tokens
        _, height, width = facts["size"]
        kept = [height * width / (max(height / r.height, width / r.width) ** 2 * r.height * r.width) for r in mine]
        assert facts["pixels_kept"] == pytest.approx(float(np.mean(kept)))
    reasons = Counter(size.split(":")[0] for size in sizes.values() if isinstance(size, str))
    assert {name: facts["count"] for name, facts in report["unused"]["reasons"].items()} == reasons
    assert reasons == {"too short": 1, "too small": 1}
    assert report["unused"]["dropped"] == 2 and report["unused"]["held_out"] == 1


def test_fill_balance_waits_and_epochs_are_those_of_the_plan(folder: Path, report: dict[str, Any]) -> None:
    plan, own = plan_of(folder), report["packing"]["modes"][0]
    tokens, fills, ratios, clips = plan.classes.tokens, list[float](), list[float](), 0
    waits: Counter[int] = Counter()
    made, order = [0], list[tuple[int, int]]()
    steps = [plan.step(n) for n in range(40)]
    for n in range(40):
        made.append(sum(plan.seen(n + 1)))
    draws, _ = plan.mixture.take(plan.mixture.start(), made[-1])
    order = list(zip(draws.epochs.tolist(), draws.clips.tolist()))
    born = {draw: n for n in range(40) for draw in order[made[n] : made[n + 1]]}
    for n, step in enumerate(steps):
        fills += [sum(int(tokens[plan.found[slot.index]]) for slot in pack) / 200 for pack in step.packs]
        ranks = [sum(step.costs[pack] for pack in mine) for mine in dealt(step.costs, 2)]
        ratios.append(max(ranks) / (sum(ranks) / 2))
        clips += step.clips
        waits.update(n - born[slot.epoch, slot.index] for pack in step.packs for slot in pack)
    assert (own["mode"], own["steps"], own["clips_per_step"]) == ("pack", 40, clips / 40)
    assert own["fill"] == pytest.approx({"mean": float(np.mean(fills)), "least": min(fills)})
    assert own["balance"]["2"] == pytest.approx({"mean": float(np.mean(ratios)), "worst": max(ratios)})
    assert own["wait"]["clips"] == {str(steps): count for steps, count in sorted(waits.items())}
    assert [mode["mode"] for mode in report["packing"]["modes"]] == ["pack", "bucket", "pad", "first fit"]
    assert report["sources"][0]["epochs"] == pytest.approx(clips / len(plan.training))


def test_captions_are_counted_as_the_text_encoder_counts_them(folder: Path, report: dict[str, Any]) -> None:
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(folder / "text" / "tokenizer", local_files_only=True)
    used = [i for i, caption in enumerate(CAPTIONS) if caption not in (CAPTIONS[5], CAPTIONS[8])]
    counts = [len(tokenizer(CAPTIONS[i], verbose=False).input_ids) for i in used]
    assert report["captions"]["counted"] == report["captions"]["read"] == 7 and report["captions"]["limit"] == 20
    assert report["captions"]["cut"] == sum(count > 20 for count in counts) > 0
    assert sum(report["histograms"]["caption_tokens"]["counts"]) == 7


def test_the_page_is_one_file_that_obeys_no_caption(folder: Path, report: dict[str, Any]) -> None:
    page = (folder / "report" / PAGE).read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert (
        not re.search(r'(href|src|url)\s*[=(]\s*["\']?https?:', page) and "<link" not in page and "@import" not in page
    )
    assert (
        page.count("<img") == 7 and page.count("<svg") >= 7 and "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()
    )


def test_pictures_are_whole_centre_frames(folder: Path) -> None:
    found = Inspected.open(run_of(folder))
    made = {picture.source: picture for picture in pictures(found, np.arange(9), track=lambda places, _: places)}
    (folder / "long.jpg").write_bytes(made["videos/long.mp4"].jpeg)
    with Image.open(folder / "long.jpg") as image:
        assert image.size == (64, 48) and np.asarray(image).mean() == pytest.approx(12 * STEP, abs=2)
    (folder / "fast.jpg").write_bytes(made["videos/fast.mp4"].jpeg)
    with Image.open(folder / "fast.jpg") as image:
        assert image.size == (128, 96)
    assert made["videos/fast.mp4"].caption == "a cat" and not any(picture.defect for picture in made.values())


def many(count: int) -> list[Record]:
    """Random videos and images, some with captions that are alike, empty, or among other facts."""
    draw, records = random.Random(0), list[Record]()
    for key in range(count):
        kind: Kind = draw.choice(("video", "video", "image"))
        text = f"{draw.randrange(count):032x}"
        place = draw.choice(("txt", "txt", "json:text"))
        members = {"mp4": Member(0, 5, "0" * 32), place.partition(":")[0]: Member(5, 5, text)}
        records.append(Record(
            key=f"k{key:05d}", source=f"{key}.mp4", shard="a.tar", kind=kind, members=members,
            frames=draw.randrange(1, 60) if kind == "video" else 1, fps=draw.choice((4, 8, 8.05, 30)) if kind == "video" else 0,
            height=draw.choice((20, 48, 64, 96)), width=draw.choice((48, 64, 85, 96)), caption_length=draw.choice((0, 5, 9)),
            caption=place,
        ))  # fmt: skip
    return records


def config_with(preset: str, **changes: object) -> DiTRun:
    data = settings(**{"sizes": tuple(map(tuple, SIZES)), "tokens_per_pack": 300, **changes})
    return DiTRun(
        Run("run"), Model(preset, text_length=20), data, Train(10, 1e-3), Checkpoint(10), frozen=Frozen("vae", text="text")
    )  # fmt: skip


def by_hand(record: Record, found: Inspected, alike: Counter[str]) -> dict[str, object]:
    """The remarks on one sample, and what stands beside each."""
    remarks: dict[str, object] = {}
    data, size = found.data, assign_size(record, found.data)
    tokens = found.geometry(size).tokens if isinstance(size, tuple) else 0
    if isinstance(size, str) or tokens > data.tokens_per_pack:
        remarks["dropped"] = found.sizing.of(record)
        if not record.caption_length and data.empty_captions:
            remarks["caption empty"] = 0
        return remarks
    if not record.caption_length and not data.empty_captions:
        return {"dropped": "caption empty: data.empty_captions is off"}
    if not record.caption_length:
        remarks["caption empty"] = 0
    frames, height, width = size
    if record.kind == "video":
        if record.frames / record.fps - frames / data.fps > 1e-3:
            remarks["cut in time"] = round(record.frames / record.fps - frames / data.fps, 3)
        if record.fps > 8.08:
            remarks["frames left out"] = record.fps
        if record.fps < 7.92:
            remarks["frames repeated"] = record.fps
    scale = max(height / record.height, width / record.width)
    if height * record.width != width * record.height:
        remarks["cropped"] = round(1 - height * width / (scale**2 * record.height * record.width), 4)
    if scale < 1:
        remarks["scaled down"] = round(scale, 4)
    if found.config.model.preset == "cogvideox1.5-5b" and ((frames - 1) // 4 + 1) % 2:  # type: ignore[union-attr]
        remarks["padded"] = 1
    if "txt" in record.members and record.caption_length and alike[record.members["txt"].checksum] > 1:
        remarks["caption duplicated"] = alike[record.members["txt"].checksum]
    return remarks


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("cogvideox-2b", {}),
        ("cogvideox-2b", {"empty_captions": True, "tokens_per_pack": 40}),
        ("cogvideox1.5-5b", {}),
    ],
)
def test_lint_lists_what_a_look_at_every_sample_finds(
    preset: str, changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.inspect_lint.CHUNK", 64)
    records = many(400)
    parts = [Index.of(records[:150]), Index.of(records[150:])]
    found = Inspected(config_with(preset, **changes), Catalog(parts), [])
    alike = Counter(r.members["txt"].checksum for r in records if "txt" in r.members and r.caption_length)
    expected = {record.key: by_hand(record, found, alike) for record in records}
    lint = Lint(found, captions=None, left_out=None)
    lint.write(tmp_path, lambda count: None)
    lines = [json.loads(line) for line in (tmp_path / LINT).read_text().splitlines()]
    made = {
        line["key"]: {item["remark"]: item.get("value", item.get("reason")) for item in line["remarks"]}
        for line in lines
    }
    wanted = {key: remarks for key, remarks in expected.items() if remarks}
    assert list(made) == list(wanted)
    for key, remarks in wanted.items():
        assert made[key].keys() == remarks.keys(), key
        for name, value in remarks.items():
            assert made[key][name] == (value if isinstance(value, str) else pytest.approx(value, abs=2e-4)), (key, name)
    assert lint.counts == Counter(name for remarks in wanted.values() for name in remarks)
    assert lint.samples == len(wanted)


def test_lint_of_real_files_names_them(folder: Path, report: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (folder / "report" / LINT).read_text().splitlines()]
    remarks = {line["source"]: {item["remark"] for item in line["remarks"]} for line in lines}
    assert remarks["videos/blink.mp4"] == remarks["images/small.png"] == {"dropped"}
    assert remarks["videos/slow.mp4"] >= {"cut in time", "frames repeated"}
    assert remarks["videos/fast.mp4"] >= {"frames left out", "scaled down", "caption duplicated"}
    assert "caption duplicated" in remarks["videos/long.mp4"]
    assert report["lint"]["remarks"]["caption too long"] == report["captions"]["cut"]
    assert report["lint"]["samples"] == len(lines)


def test_an_autoencoders_run_has_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "vae"
    assert main(["--config", f"{folder}/vae.yaml", "train.steps=3", "--out", str(out), "--captions", "3"]) == 0
    found = json.loads((out / NUMBERS).read_text())
    assert found["run"]["class"] == "VAERun" and found["captions"]["counted"] == 0 and found["lint"] is None
    assert [facts["tokens"] for facts in found["sizes"]] == [2 * 4 * 6, 3 * 6 * 8, 6 * 8]
    assert found["packing"]["steps"] == 3 and not (out / LINT).exists()
    assert "pack (this run)" in capsys.readouterr().out


def latents(shards: Path) -> Path:
    """Twelve encoded clips with scores, half of them with a caption that was cut."""
    index = IndexWriter()
    shards.mkdir()
    (shards / "a.tar").write_bytes(b"\0" * 1000)
    for key in range(12):
        index.add(Record(
            key=f"{shards.name}{key}", source=f"{key}.mp4", shard="a.tar", kind="latent", frames=9, fps=8, height=48, width=64,
            members={"latent.safetensors": Member(0, 9, "0" * 32), "txt": Member(9, 1, f"{key:032x}")}, caption_length=1,
            size=(9, 48, 64), origin={"text_length": 20, "caption_tokens": 15 + key}, scores={"taste": float(key)},
        ))  # fmt: skip
    index.write(shards)
    return shards


def test_latents_tell_their_tokens_and_have_no_pictures(folder: Path) -> None:
    shards, out = latents(folder / "latents"), folder / "of-latents"
    data = ["data.source=latents", f"data.shards={shards}"]
    assert main(["--config", f"{folder}/dit.yaml", *data, "--out", str(out), "--lint", "--steps", "5"]) == 0
    found = json.loads((out / NUMBERS).read_text())
    assert found["captions"]["counted"] == 12 and found["captions"]["cut"] == 6 and not found["pictures"]
    assert {name: count for name, count in found["lint"]["remarks"].items() if count} == {"caption too long": 6}
    assert found["set"]["hours"] == pytest.approx(12 * 9 / 8 / 3600)


def test_every_source_has_its_own_epochs_and_what_its_score_leaves_out_is_not_remarked(folder: Path) -> None:
    first, second, out = latents(folder / "first"), latents(folder / "second"), folder / "of-sources"
    sources = [f"{{shards: {first}, weight: 3, skip: 6}}", f"{{shards: {second}, score: taste, top_share: 0.25}}"]
    data = ["data.source=latents", "data.shards=null", f"data.sources=[{', '.join(sources)}]", "data.held_out=0"]
    assert main(["--config", f"{folder}/dit.yaml", *data, "--out", str(out), "--lint"]) == 0
    found = json.loads((out / NUMBERS).read_text())
    config = load_run([str(folder / "dit.yaml")], data)
    inspected = Inspected.open(config)
    plan = Plan(inspected.catalog, config.data, seed=3, geometry=inspected.geometry)
    seen = Counter(slot.index < 12 for n in range(40) for pack in plan.step(n).packs for slot in pack)
    assert [source["training"] for source in found["sources"]] == [12, 3]
    assert [source["share"] for source in found["sources"]] == [0.75, 0.25]
    assert [source["epochs"] for source in found["sources"]] == pytest.approx([(6 + seen[True]) / 12, seen[False] / 3])
    assert found["unused"]["left_out_by_score"] == 9
    remarks = [json.loads(line) for line in (out / LINT).read_text().splitlines()]
    listed = {line["key"]: {item["remark"] for item in line["remarks"]} for line in remarks}
    assert listed.keys() == {*(f"first{key}" for key in range(12)), "second9", "second10", "second11"}
    assert listed["second9"] == {"caption too long", "caption duplicated"} and listed["first0"] == {
        "caption duplicated"
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.sises=[[5,32,48]]"], "unknown key data.sises"),
        (["--dp", "3"], "does not divide over 3"),
        (["data.shards=nowhere"], "nowhere"),
        (["data.sizes=[[49,48,64]]"], "none of the 9 samples is left"),
        (["--steps", "0"], "not a number of at least 1"),
        (["--captions", "few"], "neither a number of captions nor all"),
    ],
)
def test_errors_are_one_line(
    given: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", f"{folder}/dit.yaml", *given, "--out", str(tmp_path / "out"), "--lint"]
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith("inspect_shards: error: ") and message in error
    assert not (tmp_path / "out" / PAGE).exists()
    if "none of" in message:  # the remarks say why nothing is left
        assert len((tmp_path / "out" / LINT).read_text().splitlines()) == 9


def test_the_error_is_that_of_the_kind_of_run(folder: Path) -> None:
    with pytest.raises(ValueError, match="model.preset 'cogvideox-9b' is unknown"):
        load_run([str(folder / "dit.yaml")], ["model.preset=cogvideox-9b"])
    with pytest.raises(ValueError, match=r"loss\.reconstruction"):
        load_run([str(folder / "vae.yaml")], ["loss.reconstruction=l3"])


def test_a_histogram_counts_every_value_once() -> None:
    draw = np.random.default_rng(0)
    for values in (draw.normal(size=500), draw.integers(0, 7, 100), np.array([3.5]), np.array([0.0, 1e6])):
        edges, counts = Histogram.of(values, whole=values.dtype.kind == "i")
        assert sum(counts) == len(values) and len(edges) == len(counts) + 1 <= 43
        assert edges[0] <= values.min() and values.max() <= edges[-1]
        for low, high, count in zip(edges, edges[1:-1], counts):
            assert count == ((values >= low) & (values < high)).sum()
    assert Histogram.of(np.empty(0)) == ([], [])


def test_evenly_spaced_places_begin_and_end_with_the_set() -> None:
    assert evenly(np.arange(100), 4).tolist() == [0, 33, 66, 99]
    assert evenly(np.arange(3), 4).tolist() == [0, 1, 2]
