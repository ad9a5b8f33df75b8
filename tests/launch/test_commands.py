"""Encode, sample and convert: what a run becomes, and that nothing is lost on the way."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import av
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from safetensors.torch import load_file

from cogvideo_dist.data.index import Index
from cogvideo_dist.engine.checkpoint import Stored, newest
from cogvideo_dist.engine.lineage import Lineage
from cogvideo_dist.models.init import draw_parameters
from launch.beginning import base_model
from launch.compose import load_vae
from launch.runs import open_pipeline
from tests.engine.saved_states import whole_states
from tests.launch.world import LENGTH, World, outcome, read_log, report, save_tiny_vae, steps_of, train, try_train
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def command(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``python launch/NAME.py ARGUMENTS``, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return outcome(name, importlib.import_module(f"launch.{name}").main)


@pytest.fixture(scope="session")
def trained(world: World) -> Path:
    """A short run, with pictures at its end."""
    run = world.root / "trained"
    run_ranks(
        train,
        1,
        world.file,
        world.overrides(run, "train.steps=4", "validation.samples_every=4", "validation.prompts=[A cat.]"),
    )
    return run


@pytest.fixture(scope="session")
def released(world: World, trained: Path) -> Path:
    """``trained`` as a public pipeline, by the command."""
    out = world.root / "released"
    with pytest.MonkeyPatch.context() as monkeypatch:
        code, stdout, stderr = command(monkeypatch, "convert", "diffusers", trained, out)
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == str(out)
    return out


@pytest.mark.parametrize("name", ["train_dit", "train_vae", "encode", "sample", "convert", "demo"])
def test_every_command_shows_an_example(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    code, stdout, _ = command(monkeypatch, name, "--help")
    assert code == 0
    assert f"launch/{name}.py " in stdout.split("example", 1)[1]


def test_pictures_are_made_from_prompts(trained: Path) -> None:
    assert sorted(path.name for path in (trained / "samples" / "step-000004").iterdir()) == [
        "captions.json",
        "contact-sheet.png",
        "prompt-00.mp4",
    ]


@pytest.mark.parametrize(
    "layout", ["parallel.sp=2", *(pytest.param(f"parallel.{one}", marks=pytest.mark.long) for one in ("sp=1", "tp=2"))]
)
def test_pictures_under_stage_3_on_two_ranks_are_those_of_one(world: World, trained: Path, layout: str) -> None:
    run = world.root / f"pictures-3-{layout}"
    changes = (
        "train.zero_stage=3", "train.steps=4", "validation.samples_every=4", "validation.prompts=[A cat.]", layout,
    )  # fmt: skip
    run_ranks(train, 2, world.file, world.overrides(run, *changes))
    ours, other = (decoded(folder / "samples" / "step-000004" / "prompt-00.mp4") for folder in (run, trained))
    assert ours.shape == other.shape == (9, 32, 32, 3)
    assert (ours - other).abs().mean() < 0.5
    assert ours.std() > 1


def decoded(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")).float() for f in container.decode(video=0)])


def test_a_pipeline_loads_in_diffusers_without_a_missing_or_unknown_tensor(released: Path, trained: Path) -> None:
    pipeline, loading = CogVideoXPipeline.from_pretrained(released), {}
    for part in (pipeline.transformer, pipeline.vae):
        folder = released / ("vae" if isinstance(part, AutoencoderKLCogVideoX) else "transformer")
        _, loading = type(part).from_pretrained(folder, output_loading_info=True)
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ours = open_pipeline(str(trained), "ema", device=CPU)
    assert ours.step == 4
    text = ours.text.encode(["A cat."])
    latents, times = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        theirs = pipeline.transformer(latents, text, times, return_dict=False, image_rotary_emb=rotations(pipeline))[0]
        assert (ours.sampler.model.denoise(latents, text, times) - theirs).abs().max() < 1e-5
    embeddings, _ = pipeline.encode_prompt("A cat.", do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    assert (embeddings - text).abs().max() < 1e-5


def rotations(pipeline: CogVideoXPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    return pipeline._prepare_rotary_positional_embeddings(32, 32, 3, CPU)


def test_a_released_pipeline_samples_as_its_run_does(
    monkeypatch: pytest.MonkeyPatch, released: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("A cat.\n\n\u732b\n", encoding="utf-8")
    options = ("--prompts-file", tmp_path / "prompts.txt", "--steps", 2, "--size", 9, 32, 32, "--seed", 3, "--guidance", 2,
               "--sampler", "dpmpp_2m_sde", "--guidance-kind", "constant", "--fps", 8)  # fmt: skip
    for name, folder in (("ours", trained), ("theirs", released)):
        code, stdout, stderr = command(
            monkeypatch, "sample", "--checkpoint", folder, "--out", tmp_path / name, *options
        )
        assert code == 0, stderr
        assert [line.split(":")[0] for line in stdout.splitlines()] == [
            str(tmp_path / name / file) for file in ("prompt-00.mp4", "prompt-01.mp4", "contact-sheet.png")
        ]
    for file in ("prompt-00.mp4", "prompt-01.mp4", "contact-sheet.png"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    assert (tmp_path / "ours" / "prompt-00.mp4").read_bytes() != (tmp_path / "ours" / "prompt-01.mp4").read_bytes()


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_exported_transformer_is_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, world: World, trained: Path, tmp_path: Path, weights: str
) -> None:
    options = ("--part", "transformer", "--weights", weights)
    assert command(monkeypatch, "convert", "diffusers", trained, tmp_path / "out", *options)[0] == 0
    assert command(monkeypatch, "convert", "native", tmp_path / "out", tmp_path / "native")[0] == 0
    found = load_file(tmp_path / "native" / "weights.safetensors")
    path, _ = newest(trained / "ckpt")
    assert path is not None
    expected = whole_states(path)["ema" if weights == "ema" else "weights"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "native" / "model.json").read_text())["class"] == "DiT"


def test_weights_are_written_in_the_dtype_asked_for(
    monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path
) -> None:
    assert command(monkeypatch, "convert", "native", world.root / "vae", tmp_path / "out", "--dtype", "bf16")[0] == 0
    found = load_file(tmp_path / "out" / "weights.safetensors")
    vae = load_vae(str(world.root / "vae"), CPU)
    assert all(torch.equal(found[name], parameter.bfloat16()) for name, parameter in vae.named_parameters())


@pytest.fixture(scope="session")
def latents(world: World) -> Path:
    """The world's clips, encoded by the command."""
    out = world.root / "latents"
    with pytest.MonkeyPatch.context() as monkeypatch:
        code, stdout, stderr = command(
            monkeypatch, "encode", "--config", world.file, *world.overrides(world.root / "x"), "--out", out
        )
    assert code == 0, stderr
    assert stdout.splitlines()[0] == f"8 samples encoded into {out}, 0 could not be used"
    return out


LATENTS = ("data.source=latents", "frozen.vae=null", "frozen.text=null")


def test_latents_carry_what_made_them(latents: Path) -> None:
    origins = [record.origin for record in Index.read(latents)]
    assert all(origin["scaling_factor"] == 0.7 and origin["text_length"] == LENGTH for origin in origins)
    assert all(0 < origin["caption_tokens"] <= LENGTH for origin in origins)
    assert len({origin["vae"] for origin in origins}) == 1


def test_training_from_latents_needs_no_encoder_and_sees_the_same_held_out_clips(world: World, latents: Path) -> None:
    pixels, stored = world.root / "from-pixels", world.root / "from-latents"
    run_ranks(train, 1, world.file, world.overrides(pixels, "train.steps=3", "data.crop=center"))
    run_ranks(train, 2, world.file, world.overrides(stored, "train.steps=3", f"data.shards={latents}", *LATENTS))
    ours, theirs = read_log(stored)[0], read_log(pixels)[0]
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5, abs=0)
    # Images have no beginning to choose, but a clip of the loop starts anywhere, so the training losses are near, not equal.
    assert steps_of(stored, "loss")[0][1] == pytest.approx(steps_of(pixels, "loss")[0][1], rel=0.2)


@pytest.mark.parametrize("seed, scale, key", [(1, 0.7, "vae"), (0, 1.0, "scaling_factor")])
def test_latents_of_another_autoencoder_are_refused(
    world: World, latents: Path, tmp_path: Path, seed: int, scale: float, key: str
) -> None:
    save_tiny_vae(tmp_path / "vae", seed=seed, scaling_factor=scale)
    changes = (f"data.shards={latents}", "data.source=latents", f"frozen.vae={tmp_path / 'vae'}",
               "validation.samples_every=2", "validation.prompts=[A cat.]")  # fmt: skip
    ((code, _, stderr),) = run_ranks(try_train, 1, world.file, world.overrides(tmp_path / "run", *changes))
    assert code == 78
    assert f"the latents of {latents} were made with {key} " in stderr.splitlines()[-1]
    assert f"but frozen.vae {tmp_path / 'vae'} has " in stderr.splitlines()[-1]


def test_latents_of_another_text_encoder_are_refused(world: World, latents: Path, tmp_path: Path) -> None:
    changes = (f"data.shards={latents}", *LATENTS, "model.text_length=32")
    ((code, _, stderr),) = run_ranks(try_train, 1, world.file, world.overrides(tmp_path / "run", *changes))
    assert code == 78
    assert f"were made with text_length {LENGTH}, but model.text_length has 32" in stderr.splitlines()[-1]


def test_five_steps_at_rate_zero_leave_a_released_model_and_its_samples_as_they_were(
    world: World, released: Path
) -> None:
    """From a public pipeline through DeepSpeed, the optimizer, the average and the checkpoint, bit by bit."""
    run = world.root / "identity"
    changes = (
        "train.learning_rate=0.0",
        "train.weight_decay=0.1",
        "train.steps=5",
        f"model.weights={released / 'transformer'}",
    )
    run_ranks(train, 2, world.file, world.overrides(run, *changes))
    config = world.config(run, *changes)
    before = base_model(config, Lineage())[0]
    path, _ = newest(run / "ckpt")
    assert path is not None
    state = whole_states(path)
    assert Stored.open(path).saved.step == 5
    for kind in ("weights", "ema"):
        assert all(torch.equal(state[kind][name], p) for name, p in before.named_parameters()), kind
    assert any(tensor.any() for tensor in state["exp_avg"].values()), "gradients were there"
    settings = config.validation.sampling
    pipelines = [
        open_pipeline(str(released), "ema", device=CPU),
        *(open_pipeline(str(run), kind, device=CPU) for kind in ("ema", "raw")),
    ]
    videos = [p.sampler.video(p.text.encode(["A cat."])[0], settings, seed=1) for p in pipelines]
    assert all(torch.equal(video, videos[0]) for video in videos)


def test_weights_of_another_preset_are_refused(world: World, released: Path, tmp_path: Path) -> None:
    changes = (f"model.weights={released / 'transformer'}", "model.layers=3")
    ((code, _, stderr),) = run_ranks(try_train, 1, world.file, world.overrides(tmp_path / "run", *changes))
    assert code == 78
    assert "is not model.preset cogvideox-5b: layers is 2, not 3" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sample", ("--checkpoint", "gone", "--prompt", "a", "--out", "o"), "gone is neither a run"),
        ("sample", ("--checkpoint", "gone", "--out", "o"), "give a prompt with --prompt or --prompts-file"),
        ("sample", ("--checkpoint", "gone", "--prompts-file", "none.txt", "--out", "o"), "none.txt: cannot be read as UTF-8"),
        ("convert", ("native", "gone", "o"), "gone: no such folder"),
        ("convert", ("diffusers", "gone", "o"), "gone: no such folder"),
        ("train_dit", ("--config", "gone.yaml"), "gone.yaml: no such configuration file"),
        ("train_vae", ("--config", "gone.yaml"), "gone.yaml: no such configuration file"),
        ("encode", ("--config", "gone.yaml", "--out", "o"), "gone.yaml: no such configuration file"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple[str, ...], message: str
) -> None:
    code, _, stderr = command(monkeypatch, name, *arguments)
    assert code == 78
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith(f"{name}: error: ")
    assert message in stderr


def test_a_size_that_cannot_be_sampled_is_refused(
    monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path
) -> None:
    options = ("--checkpoint", trained, "--prompt", "a", "--out", tmp_path, "--size", 8, 30, 32)
    code, _, stderr = command(monkeypatch, "sample", *options)
    assert code == 1
    assert "the nearest is [9, 32, 32]" in stderr.splitlines()[-1]


def test_a_run_without_average_says_so(monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(train, 1, world.file, world.overrides(run, "train.steps=2", "train.ema_decay=null"))
    code, _, stderr = command(monkeypatch, "convert", "diffusers", run, tmp_path / "out")
    assert code == 78
    assert (
        "keeps no averaged weights (train.ema_decay is off); take the last ones (--weights raw,"
        in stderr.splitlines()[-1]
    )
    shutil.rmtree(run / "ckpt")
    code, _, stderr = command(monkeypatch, "convert", "diffusers", run, tmp_path / "out")
    assert (code, stderr.splitlines()[-1].endswith("has no checkpoint yet")) == (78, True)


def test_the_seed_alone_decides_the_first_weights(world: World) -> None:
    config = world.config(world.root / "x")
    first, again, other = (
        base_model(config, Lineage())[0],
        base_model(config, Lineage())[0],
        base_model(config, Lineage())[0],
    )
    draw_parameters(other, 6)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_latents_list_the_captions_that_were_cut(monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path) -> None:
    short = ("model.text_length=8", "model.sample_frames=3")
    options = ("--config", world.file, *world.overrides(tmp_path / "x", *short), "--out", tmp_path / "latents")
    code, stdout, stderr = command(monkeypatch, "encode", *options)
    assert code == 0, stderr
    assert stdout.splitlines()[1].startswith(
        "8 captions were cut; runs list them in data_report.jsonl; first: images/still 0.png: caption of "
    )
    run = tmp_path / "run"
    changes = ("train.steps=2", f"data.shards={tmp_path / 'latents'}", *short, *LATENTS)
    ((code, stdout, stderr),) = run_ranks(try_train, 1, world.file, world.overrides(run, *changes))
    assert code == 0, stderr
    assert "data: 8 of 8 samples have a caption that is cut, listed with reasons in" in stdout
    assert len(report(run)) == 8
    assert all(line["reason"].endswith("tokens is cut to 8") for line in report(run))
