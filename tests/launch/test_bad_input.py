"""Wrong input ends with one line and an exit code, or is replaced, counted and listed; it is never used in silence.

What make_shards refuses (a missing or empty caption, a video that cannot be decoded, an empty file) is in tests/data.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import Index
from cogvideo_dist.data.plan import Plan
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.engine.checkpoint import checkpoints
from launch import train_dit, train_vae
from launch.compose import TransformerGeometry
from tests.data.clips import add, make_clip
from tests.launch.commands import finish, start
from tests.launch.world import SIZES, World, outcome, pack, read_log, report, train, try_train
from tests.ranks import run_ranks


def attempt(world: World, run: Path, *changes: str, ranks: int = 1) -> tuple[int, str, str]:
    """(exit code, stdout, last line of stderr) of the first rank."""
    code, stdout, stderr = run_ranks(try_train, ranks, world.file, world.overrides(run, *changes))[0]
    assert "Traceback" not in stderr
    return code, stdout, (stderr.splitlines() or [""])[-1]


def test_the_command_itself_ends_with_one_line_and_its_exit_code(world: World, tmp_path: Path) -> None:
    code, stdout, stderr = finish(
        start("python", [str(world.file), *world.overrides(tmp_path / "run", "train.stpes=3")])
    )
    assert code == 78
    assert (
        stderr.splitlines()[-1]
        == "train_dit: error: override 'train.stpes=3': unknown key train.stpes; did you mean steps?"
    )
    assert "Traceback" not in stderr + stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.sizes=[[9, 30, 32]]"], "data.sizes: [9, 30, 32] is not a legal [frames, height, width]"),
        (["data.sizes=[[10, 33, 47]]"], "the nearest is [9, 32, 48]"),
        (["train.precision=fp8"], "train.precision: input should be 'fp32', 'bf16' or 'fp16', found 'fp8'"),
        (["frozen.vae=null"], "data.source: pixels needs frozen.vae and frozen.text"),
        (["run.dir=' '"], "run.dir must name a folder"),
    ],
)
def test_an_impossible_configuration_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_dit.py", "--config", str(world.file), *changes])
    code, _, stderr = outcome("train_dit", train_dit.main)
    assert code == 78
    assert len(stderr.splitlines()) == 1
    assert message in stderr


def test_the_autoencoder_is_not_trained_on_latents(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(__file__).parents[2] / "configs" / "demo" / "vae.yaml"
    monkeypatch.setattr(sys, "argv", ["train_vae.py", "--config", str(config), "data.source=latents"])
    code, _, stderr = outcome("train_vae", train_vae.main)
    expected = "train_vae: error: override 'data.source=latents': data.source must be pixels to train the autoencoder\n"
    assert (code, stderr) == (78, expected)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            "data.shards=gone",
            1,
            "gone/index.json: no such file; a folder of shards is made by data_tools/make_shards.py",
        ),
        ("data.tokens_per_pack=70", 1, "none of the 8 samples is left to train on (6 larger than a pack, 2 held out)"),
        ("data.held_out=8", 1, "none of the 8 samples is left to train on (8 held out)"),
        ("model.text_dim=32", 78, "has features of 16, the transformer takes text_dim 32"),
        ("frozen.text=gone", 1, "gone/text_encoder: no such folder"),
        ("frozen.vae=gone", 1, "gone/config.json: no such file; expected a folder of the diffusers layout"),
        ("model.weights=gone", 1, "gone/config.json: no such file"),
    ],
)
def test_what_a_run_needs_and_does_not_find_is_named(
    world: World, tmp_path: Path, change: str, code: int, message: str
) -> None:
    found, _, line = attempt(world, tmp_path / "run", change)
    assert found == code
    assert line.startswith("train_dit: error: ")
    assert message in line


def test_a_run_folder_that_is_a_file_is_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    code, _, line = attempt(world, tmp_path / "run")
    assert code == 78
    assert str(tmp_path / "run") in line


def test_a_number_of_ranks_that_does_not_fit_names_those_that_do(world: World, tmp_path: Path) -> None:
    code, _, line = attempt(world, tmp_path / "run", ranks=3)
    assert code == 1
    assert "data.packs_per_step 4 does not divide over 3 data-parallel ranks; numbers of ranks that do: 1, 2, 4" in line
    assert not (tmp_path / "run").exists()


def test_clips_that_cannot_be_used_are_counted_and_listed(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, stdout, _ = attempt(world, run, "data.sizes=[[13, 32, 32], [17, 48, 64]]", "data.held_out=0", "train.steps=2")
    assert code == 0
    reasons = {line["source"]: line["reason"] for line in report(run)}
    assert reasons["images/still 0.png"] == "no size for an image: data.sizes lists none of 1 frame"
    assert reasons["videos/odd 0.mp4"] == "too short: 1.167 s do not hold 13 frames at 8 per second"
    first = f"first: {report(run)[0]['source']}: {report(run)[0]['reason']}"
    assert stdout.splitlines() == [
        f"data: {len(reasons)} of 8 samples are not used, listed with reasons in {run / 'data_report.jsonl'}; {first}"
    ]
    attempt(
        world,
        run,
        "data.sizes=[[13, 32, 32], [17, 48, 64]]",
        "data.held_out=0",
        "train.steps=3",
        "train.schedule=cosine",
    )
    assert len(report(run)) == len(reasons), "a second start does not list them again"


def test_a_clip_of_odd_size_is_cropped_and_used(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert attempt(world, run, f"data.sizes={SIZES}", "train.steps=2")[0] == 0
    assert report(run) == []


def test_a_caption_that_is_too_long_is_counted_and_listed_once(world: World, tmp_path: Path) -> None:
    source = tmp_path / "clips"
    for index, words in enumerate((5, 90, 120)):
        add(source, f"videos/{index}.mp4", make_clip(12, 8), " ".join(["clip"] * words))
    pack(source, tmp_path / "shards")
    run = tmp_path / "run"
    changes = (f"data.shards={tmp_path / 'shards'}", "data.held_out=1", "train.steps=3")
    ranks = run_ranks(try_train, 2, world.file, world.overrides(run, *changes))
    assert [code for code, *_ in ranks] == [0, 0]
    lines = report(run)
    assert sorted(line["source"] for line in lines) == ["videos/1.mp4", "videos/2.mp4"]
    assert all(
        line["reason"].startswith("caption of ") and line["reason"].endswith(" tokens is cut to 64") for line in lines
    )
    said = [line for line in ranks[0][2].replace("\r", "\n").splitlines() if line.startswith("data: ")]
    assert len(said) == 1
    assert f"this one and others alike are listed in {run / 'data_report.jsonl'}" in said[0]
    assert sum(entry.get("data/partial_samples", 0) for entry in read_log(run)) == 2


def damaged(world: World, folder: Path, *sources: str) -> Path:
    """A copy of the shards in which these clips have a flipped bit."""
    shutil.copytree(world.root / "shards", folder)
    reader = ShardReader(folder)
    for record in reader.records:
        if record.source in sources:
            path = folder / record.shard
            data = bytearray(path.read_bytes())
            data[next(member.offset for ext, member in record.members.items() if ext == "mp4") + 50] ^= 4
            path.write_bytes(data)
    return folder


def test_a_damaged_clip_is_replaced_counted_and_listed(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shards = damaged(world, tmp_path / "shards", "videos/1.mp4")
    ranks = run_ranks(try_train, 2, world.file, world.overrides(run, f"data.shards={shards}", "train.steps=4"))
    assert ranks[0][0] == 0
    (source,) = {line["source"] for line in report(run)}
    assert source == "videos/1.mp4"
    assert all("are damaged (their checksum is not the index's)" in line["reason"] for line in report(run))
    assert all(line["replaced_by"] for line in report(run))
    assert sum(entry.get("data/replaced_samples", 0) for entry in read_log(run)) == len(report(run)) > 0
    said = ranks[0][2].replace("\r", "\n")
    assert said.count("data: videos/1.mp4: shard-000000.tar: ") == len(report(run))
    assert "instead" in said


def test_a_damaged_held_out_clip_is_listed_too(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = ("train.steps=2", "data.held_out=5")
    config = world.config(run, *changes)
    records = Catalog([Index.read(config.data.shards)])
    plan = Plan(records, config.data, seed=config.run.seed, geometry=TransformerGeometry(config.model.transformer()))
    name = next(records[slot.index].source for slot in plan.held_out if slot.size[0] > 1)
    code, _, _ = attempt(world, run, *changes, f"data.shards={damaged(world, tmp_path / 'shards', name)}")
    assert code == 0
    assert [line["source"] for line in report(run)] == [name], "once, although it is met before and after the training"


def test_too_many_damaged_clips_end_the_run_with_a_line(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shards = damaged(world, tmp_path / "shards", "videos/0.mp4", "videos/1.mp4", "videos/2.mp4")
    code, _, line = attempt(world, run, f"data.shards={shards}", "train.steps=40", "data.held_out=0")
    assert code == 65
    assert "samples could not be read, more than data.max_bad_share 0.01; they are listed in" in line
    assert str(run / "data_report.jsonl") in line
    assert max(entry["step"] for entry in read_log(run)) < 40


@pytest.fixture(scope="module")
def other(world: World) -> Path:
    """A short run whose checkpoint others try to take up."""
    run = world.root / "other"
    run_ranks(train, 1, world.file, world.overrides(run, "train.steps=2"))
    return run


def taken_over(other: Path, run: Path, *, config: bool = False) -> Path:
    shutil.copytree(other / "ckpt", run / "ckpt")
    if config:
        shutil.copy(other / "config.yaml", run)
    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.layers=3", "step-000002 is of another model: it lacks blocks.2.modulation.weight"),
        ("model.layers=1", "step-000002 is of another model: it has the unknown tensor blocks.1.ff1.bias"),
        ("model.time_embed_dim=32", "time.linear1.weight has shape (16, 32), expected (32, 32)"),
        ("model.sample_height=8", "is of another run: it was made with model.sample_height=4, this run has 8"),
        ("run.seed=6", "is of another run: it was made with seed=5, this run has 6"),
        ("train.ema_decay=null", "holds ema, exp_avg, exp_avg_sq, weights instead of exp_avg, exp_avg_sq, weights"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(
    world: World, other: Path, tmp_path: Path, change: str, message: str
) -> None:
    code, _, line = attempt(world, taken_over(other, tmp_path / "run"), "train.steps=2", change)
    assert code == 78
    assert "ckpt/step-000002" in line
    assert message in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.layers=3", "config.yaml was started with model.layers=2, now 3; use another run.dir or the old value"),
        ("train.learning_rate=0.1", "config.yaml was started with train.learning_rate=0.02, now 0.1"),
        ("data.held_out=1", "config.yaml was started with data.held_out=2, now 1"),
    ],
)
def test_a_run_is_not_continued_as_another(
    world: World, other: Path, tmp_path: Path, change: str, message: str
) -> None:
    run = taken_over(other, tmp_path / "run", config=True)
    before = (run / "config.yaml").read_bytes()
    code, _, line = attempt(world, run, "train.steps=2", change, ranks=2 if "layers" in change else 1)
    assert code == 78
    assert message in line
    assert (run / "config.yaml").read_bytes() == before


def test_what_does_not_change_the_run_may_change(world: World, other: Path, tmp_path: Path) -> None:
    run = taken_over(other, tmp_path / "run", config=True)
    changes = ("train.steps=3", "train.zero_stage=3", "checkpoint.keep=1", "log.every=2", "train.recompute=full")
    assert attempt(world, run, *changes, ranks=2)[0] == 0
    assert [path.name for path in checkpoints(run / "ckpt")] == ["step-000003"]


def test_a_damaged_checkpoint_is_passed_over_aloud_and_none_whole_is_refused(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = ("train.steps=4", "checkpoint.every=2")
    assert attempt(world, run, *changes)[0] == 0
    (run / "ckpt" / "step-000004" / "ema-00000.safetensors").write_bytes(b"")
    ((code, _, stderr),) = run_ranks(try_train, 1, world.file, world.overrides(run, *changes))
    assert code == 0
    assert "warning: going on from step 2: " in stderr
    assert "step-000004/ema-00000.safetensors has 0 bytes" in stderr
    for path in (run / "ckpt").glob("step-*"):
        (path / "manifest.json").write_text(json.dumps({"format": 1}))
    code, _, line = attempt(world, run, *changes, ranks=2)
    assert code == 78
    assert "no checkpoint of" in line
