"""Folders of SAT on the command line: written of runs and of public folders, and read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import native
from cogvideo_dist.convert.sat_dit import load_dit
from cogvideo_dist.models.lora import merge
from launch.beginning import trained_transformer
from launch.convert_sat import add_commands, is_sat, read_sat_transformer, run
from tests.convert import sat_writer
from tests.convert.sat_writer import sizes_of
from tests.launch.world import World, outcome, train
from tests.ranks import run_ranks


def command(*arguments: object) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(dest="format", required=True))
    return outcome("convert", lambda: run(parser.parse_args(["sat", *map(str, arguments)])))


def alike(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sat") / "run"
    run_ranks(train, 1, world.file, world.overrides(folder))
    return folder


def test_a_run_becomes_a_folder_of_sat_and_that_the_other_formats(world: World, trained: Path, tmp_path: Path) -> None:
    model, step = trained_transformer(trained, world.config(trained), weights="ema")
    code, out, stderr = command(trained, tmp_path / "sat", "--tp", 2)
    assert (code, out.strip()) == (0, str(tmp_path / "sat" / str(step))), stderr
    assert len(list((tmp_path / "sat" / str(step)).iterdir())) == 2 and is_sat(tmp_path / "sat")
    again = load_dit(tmp_path / "sat", config=model.config).model
    alike(again, model)
    raw, _ = trained_transformer(trained, world.config(trained), weights="raw")
    assert command(trained, tmp_path / "raw", "--weights", "raw", "--iteration", 5)[0] == 0
    alike(load_dit(tmp_path / "raw" / "5", config=model.config).model, raw)


def test_adapters_of_a_run_are_written_as_sat_has_them_or_merged(world: World, trained: Path, tmp_path: Path) -> None:
    changes = (
        "lora.rank=4",
        "lora.alpha=8",
        "train.ema_decay=null",
        "train.learning_rate=5.0e-2",
        f"init.from={trained}",
    )
    folder = tmp_path / "run"
    run_ranks(train, 1, world.file, world.overrides(folder, *changes))
    model, _ = trained_transformer(folder, world.config(folder, *changes), weights="raw")
    for options, adapters in (((), "keep"), (("--lora",), "keep"), (("--lora",), "merge")):
        name = f"{len(options)}{adapters}"
        code, _, stderr = command(folder, tmp_path / name, "--weights", "raw", *options)
        assert code == 0, stderr
        found = load_dit(tmp_path / name, config=model.config, adapters=adapters).model  # type: ignore[arg-type]
        assert any(".lora." in name for name, _ in found.named_parameters()) == (bool(options) and adapters == "keep")
        merge(found)
        for (parameter, a), b in zip(found.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=parameter)
    assert command(trained, tmp_path / "none", "--lora")[0] == 78


def test_public_native_and_sat_folders_are_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = sizes_of("5b", heads=3)
    sat_writer.write(tmp_path / "theirs", sat_writer.drawn(sat_writer.shapes_of(sizes), torch.bfloat16))
    model = read_sat_transformer(tmp_path / "theirs", preset="tiny-cogvideox-5b", prefix=None)
    assert "the transformer is what lies under model.diffusion_model.*" in capsys.readouterr().out
    hf.save_transformer(model, tmp_path / "pipeline" / "transformer")
    hf.write_json(tmp_path / "pipeline" / "model_index.json", {})
    native.save(model, tmp_path / "native")
    for source in ("theirs", "pipeline", "pipeline/transformer", "native"):
        out = tmp_path / "out" / source
        code, _, stderr = command(tmp_path / source, out, "--tp", 3, "--dtype", "fp32")
        assert code == 0, stderr
        assert (out / "latest").read_text() == "1"
        alike(load_dit(out).model, model.float())


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    sizes = sizes_of("5b", heads=3)
    sat_writer.write(tmp_path / "theirs", sat_writer.drawn(sat_writer.shapes_of(sizes), torch.bfloat16))
    for source, options, message in (
        ("theirs", ("--lora",), "has no adapters; leave --lora out"),
        ("theirs", ("--tp", "2"), "3 heads do not divide over 2"),
        (
            "theirs",
            ("--preset", "tiny-cogvideox-5b-i2v"),
            "lacks tensor mixins.pos_embed.pos_embedding, for a transformer",
        ),
        ("absent", (), "absent"),
    ):
        code, _, stderr = command(tmp_path / source, tmp_path / "out", *options)
        assert code and message in stderr and stderr.count("\n") == 1, stderr
        assert not (tmp_path / "out").exists()
