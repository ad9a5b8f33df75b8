"""Starting from other weights: adapters, stages, image conditions, through the real training on forked ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.lineage import read_lineage
from cogvideo_dist.engine.manifest import CheckpointError
from cogvideo_dist.models.lora import is_adapter
from launch import convert, encode
from launch.adapters import check_adapter, merge_adapter, read_adapter
from launch.beginning import base_model, begin, trained_transformer
from launch.runs import open_pipeline
from tests.engine.saved_states import whole_states
from tests.launch.world import World, outcome, read_log, steps_of, train, try_train
from tests.ranks import run_ranks

LORA = ("lora.rank=4", "lora.alpha=8", "train.ema_decay=null", "train.learning_rate=5.0e-2")


def trained(world: World, run: Path, *changes: str, ranks: int = 1) -> Path:
    run_ranks(train, ranks, world.file, world.overrides(run, *changes))
    return run


def refused(world: World, run: Path, *changes: str) -> str:
    code, _, stderr = run_ranks(try_train, 1, world.file, world.overrides(run, *changes))[0]
    assert code
    return stderr


def state(run: Path, kind: str = "weights", step: int = 10) -> dict[str, torch.Tensor]:
    return whole_states(run / "ckpt" / f"step-{step:06d}")[kind]


def manifest(run: Path, step: int = 10) -> dict[str, Any]:
    return json.loads((run / "ckpt" / f"step-{step:06d}" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def base(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in which text, image and video tokens have been learnt from."""
    return trained(world, tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def released(world: World, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its transformer as a diffusers folder."""
    folder = tmp_path_factory.mktemp("released") / "transformer"
    model, _ = trained_transformer(base, world.config(base), weights="ema")
    hf.save_transformer(model, folder)
    return folder


def test_only_adapters_are_trained_and_kept_and_the_base_stays_bit_by_bit(
    world: World, released: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in released.iterdir()}
    run = trained(world, tmp_path / "run", *LORA, f"model.weights={released}", "train.steps=20")
    kept = state(run, step=20)
    assert all(is_adapter(name) for name in kept) and len(kept) == 2 * 4 * 2
    assert all(value.any() for value in kept.values())
    losses = [loss for _, loss in steps_of(run, "loss")]
    assert sum(losses[-5:]) < sum(losses[:5])
    config = world.config(run, *LORA, f"model.weights={released}", "train.steps=20")
    merged, step = trained_transformer(run, config, weights="raw")
    original = hf.load_transformer(released)
    assert step == 20 and not any(is_adapter(name) for name, _ in merged.named_parameters())
    for name, parameter in original.named_parameters():
        changed = not torch.equal(parameter, merged.get_parameter(name))
        assert changed == name.endswith((".qkv.weight", ".out.weight")), name
    low = {target: kept[f"blocks.0.lora.{target}.b"] @ kept[f"blocks.0.lora.{target}.a"] * 2 for target in "qkv"}
    expected = original.get_parameter("blocks.0.qkv.weight") + torch.cat([low[target] for target in "qkv"])
    assert torch.allclose(merged.get_parameter("blocks.0.qkv.weight"), expected, atol=1e-6)
    assert {path.name: path.read_bytes() for path in released.iterdir()} == before


def test_the_weights_under_the_adapters_do_not_move_while_they_train(world: World, base: Path, tmp_path: Path) -> None:
    """Bit by bit, after 20 steps of the engine itself."""
    run_ranks(assert_base_stays, 2, world, base, tmp_path / "run")


def assert_base_stays(mesh: Any, world: World, base: Path, run: Path) -> None:
    from cogvideo_dist.engine.zero import Engine

    config = world.config(run, *LORA, f"init.from={base}", "train.zero_stage=1")
    model = begin(config, mesh).model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(model, config.train, mesh=mesh, micro_steps=1)
    batch = torch.randn(2, 3, 16, 4, 4), torch.randn(2, 4, 16), torch.tensor([100, 800])
    for _ in range(20):
        for block in model.blocks:
            assert block.qkv.weight.grad is None
        engine.backward(
            sum(p.square().sum() for p in model.parameters() if p.requires_grad) + 0 * model.denoise(*batch).sum()
        )
        engine.step(1e-2)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value) != is_adapter(name) or name.endswith(".b"), name


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_go_on_bit_by_bit_and_under_other_ranks_and_layouts(
    world: World, released: Path, tmp_path: Path, stage: int
) -> None:
    changes = (
        *LORA,
        f"model.weights={released}",
        f"train.zero_stage={stage}",
        "lora.dropout=0.1",
        "lora.targets=[q,out,ff2]",
    )
    whole = trained(world, tmp_path / "whole", *changes, ranks=2)
    parts = trained(world, tmp_path / "parts", *changes, "train.steps=5", "train.schedule=constant", ranks=2)
    constant = trained(world, tmp_path / "constant", *changes, "train.schedule=constant", ranks=2)
    trained(world, parts, *changes, "train.schedule=constant", ranks=2)
    assert steps_of(parts, "loss", "gradient_norm") == steps_of(constant, "loss", "gradient_norm")
    for name, value in state(constant).items():
        assert torch.equal(state(parts)[name], value), name
    other = trained(world, tmp_path / "other", *changes, "parallel.tp=2", "train.recompute=all_but_attention", ranks=2)
    for found, expected in zip(steps_of(other, "loss"), steps_of(whole, "loss")):
        assert found == pytest.approx(expected, rel=1e-5)


def test_another_base_under_the_adapters_is_refused(world: World, released: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(released, tmp_path / "transformer")
    changes = (*LORA, f"model.weights={mine}", "train.steps=5")
    run = trained(world, tmp_path / "run", *changes)
    file = mine / hf.WEIGHTS
    save_file({name: value + 1e-6 for name, value in load_file(file).items()}, file)
    assert "was made with base=" in refused(world, run, *changes[:-1])
    with pytest.raises(CheckpointError, match="trained on other weights than .*transformer holds now"):
        trained_transformer(run, world.config(run, *changes), weights="raw")


def test_a_stage_goes_on_from_another_at_a_larger_size_and_remembers_it(
    world: World, base: Path, tmp_path: Path
) -> None:
    changes = (
        f"init.from={base}", "init.positions=extrapolate", "model.rope_grid=extrapolate", "model.sample_height=6",
        "model.sample_width=6", "data.sizes=[[9, 48, 48], [1, 32, 32]]", "data.tokens_per_pack=200", "train.steps=6",
    )  # fmt: skip
    run = trained(world, tmp_path / "run", *changes, "checkpoint.every=3")
    (first,) = json.loads((run / "lineage.json").read_text())
    assert (first["run"], first["step"], first["weights"]) == (str(base), 10, "ema")
    seen = sum(entry["data/samples"] for entry in read_log(base) if "data/samples" in entry)
    assert first["samples"] == manifest(base)["samples"] == seen > 0
    assert first["sha256"] == Stored.open(base / "ckpt" / "step-000010").digest("ema")
    last = (
        read_log(run)[-1]
        if "lineage/steps" in read_log(run)[-1]
        else [e for e in read_log(run) if "lineage/steps" in e][-1]
    )
    assert last["lineage/steps"] == 16
    assert last["lineage/samples"] == first["samples"] + manifest(run, 6)["samples"]
    assert manifest(run, 6)["lineage"] == [first]
    # re-warmed from its own first step on
    assert [rate for _, rate in steps_of(run, "learning_rate")][:3] == pytest.approx([1e-2, 2e-2, 2e-2])
    third = trained(world, tmp_path / "third", *changes[1:], f"init.from={run}", "train.steps=2", "init.positions=null")
    assert [entry["step"] for entry in json.loads((third / "lineage.json").read_text())] == [10, 6]
    assert [e["lineage/steps"] for e in read_log(third) if "lineage/steps" in e][-1] == 18


@pytest.mark.long
def test_the_stages_weights_are_those_of_the_checkpoint_that_it_began_from(
    world: World, base: Path, tmp_path: Path
) -> None:
    """Although the earlier run has gone on since; and a run that has its own weights does not need them any more."""
    first = shutil.copytree(base, tmp_path / "first")
    init = (f"init.from={first}", "init.weights=raw")
    run = trained(world, tmp_path / "run", *init, "train.steps=5", "train.schedule=constant")
    adapters = trained(world, tmp_path / "adapters", *init, *LORA, "train.steps=5", "train.schedule=constant")
    trained(world, first, "train.steps=15")
    lineage = read_lineage(adapters)
    assert lineage is not None
    model, _ = base_model(world.config(adapters, *init), lineage)
    for name, value in model.named_parameters():
        assert torch.equal(value, state(base)[name]), name
    trained(world, adapters, *init, *LORA, "train.schedule=constant")
    shutil.rmtree(first / "ckpt" / "step-000010")
    assert "began from step 10 of" in refused(
        world, adapters, *init, *LORA, "train.schedule=constant", "train.steps=12"
    )
    trained(world, run, *init, "train.schedule=constant")
    assert [step for step, _ in steps_of(run, "loss")] == list(range(1, 11))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.sample_height=6",), "say extrapolate or interpolate"),
        (("model.sample_height=6", "init.positions=extrapolate"), "takes model.rope_grid: extrapolate"),
        (("model.sample_height=6", "init.positions=interpolate"), "model.sample_height: 4 and model.sample_width: 4"),
        (("model.layers=3",), "has a model of layers 2, this run one of 3"),
        (("model.preset=cogvideox-5b-i2v",), "set init.widen: true"),
        (("init.weights=raw", "init.from=nowhere"), "init.from nowhere is no run"),
    ],
)  # fmt: skip
def test_a_stage_that_is_another_model_or_says_nothing_of_its_positions_is_refused(
    world: World, base: Path, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    assert message in refused(world, tmp_path / "run", f"init.from={base}", *changes)


def test_an_image_condition_starts_as_nothing_beside_the_text_to_video_model(
    world: World, base: Path, tmp_path: Path
) -> None:
    """The widened model's first loss is that of the model it came from, whatever the condition; then it learns from it."""
    fixed = (
        "data.sizes=[[9, 32, 32]]",
        "data.tokens_per_pack=192",
        "train.steps=4",
        "train.warmup_steps=0",
        f"init.from={base}",
    )
    plain = trained(world, tmp_path / "plain", *fixed)
    run = trained(world, tmp_path / "run", *fixed, "model.preset=cogvideox-5b-i2v", "init.widen=true")
    assert steps_of(run, "loss")[0][1] == pytest.approx(steps_of(plain, "loss")[0][1], rel=1e-5)
    weight = state(run, step=4)["embed.patch.weight"]
    assert weight.shape[1] == 2 * state(plain, step=4)["embed.patch.weight"].shape[1]
    assert weight[:, weight.shape[1] // 2 :].abs().max() > 1e-3
    assert state(run, step=4)["embed.positions"].abs().max() > 1e-4


@pytest.mark.long
def test_adapters_of_several_runs_are_added_with_their_shares(
    world: World, base: Path, released: Path, tmp_path: Path
) -> None:
    changes = (*LORA, f"model.weights={released}", "train.steps=4", "train.warmup_steps=0", "checkpoint.every=4")
    one = trained(world, tmp_path / "one", *changes)
    two = trained(world, tmp_path / "two=", *changes, "lora.targets=[ff1]", "run.seed=6")

    def weights(*given: str) -> dict[str, torch.Tensor]:
        model = hf.load_transformer(released)
        for text in given:
            merge_adapter(model, read_adapter(text))
        return {name: p.detach() for name, p in model.named_parameters()}

    plain, first, both = weights(), weights(str(one)), weights(f"{one}=0.5", f"{two}=-1", str(two))
    name = "blocks.0.qkv.weight"
    assert torch.allclose(both[name] - plain[name], 0.5 * (first[name] - plain[name]), atol=1e-6)
    assert not torch.equal(first[name], plain[name])
    assert torch.allclose(both["blocks.1.ff1.weight"], plain["blocks.1.ff1.weight"], atol=1e-6)
    assert not torch.equal(weights(str(two))["blocks.1.ff1.weight"], plain["blocks.1.ff1.weight"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("BASE", "no adapters; give it as --checkpoint"),
        ("nowhere", "no run"),
        ("BASE=much", "expected RUN or RUN=SHARE"),
    ],
)
def test_what_is_no_run_of_adapters_is_refused(base: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_adapter(read_adapter(given.replace("BASE", str(base))))


def test_encoded_clips_bring_their_first_frames_and_train_as_their_pixels_do(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("model.preset=cogvideox1.5-5b-i2v", "data.crop=center", "train.steps=2", "train.warmup_steps=0")
    from_pixels = trained(world, tmp_path / "pixels", *changes)
    monkeypatch.setattr(
        "sys.argv", ["encode", "--config", str(world.file), *changes, "run.dir=x", "--out", str(tmp_path / "z")]
    )
    assert outcome("encode", encode.main)[0] == 0
    latents = ("data.source=latents", f"data.shards={tmp_path / 'z'}")
    from_latents = trained(world, tmp_path / "latents", *changes, *latents)
    for found, expected in zip(steps_of(from_latents, "loss"), steps_of(from_pixels, "loss")):
        assert found == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(
        "sys.argv", ["encode", "--config", str(world.file), "run.dir=x", "--out", str(tmp_path / "bare")]
    )
    assert outcome("encode", encode.main)[0] == 0
    bare = ("data.source=latents", f"data.shards={tmp_path / 'bare'}")
    assert "lack the first frames" in refused(world, tmp_path / "other", *changes, *bare)


def test_an_image_to_video_run_becomes_a_public_image_to_video_pipeline(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import CogVideoXImageToVideoPipeline, DiffusionPipeline

    changes = (
        "model.preset=cogvideox1.5-5b-i2v",
        "train.steps=1",
        "train.warmup_steps=0",
        "diffusion.image.latent_scale=inverse",
    )
    run = trained(world, tmp_path / "run", *changes, "validation.sampling.sampler=ddim")
    monkeypatch.setattr("sys.argv", ["convert", "diffusers", str(run), str(tmp_path / "pipeline")])
    assert outcome("convert", convert.main)[0] == 0
    public = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(public) is CogVideoXImageToVideoPipeline
    assert public.vae.config.invert_scale_latents is True
    assert (
        open_pipeline(str(tmp_path / "pipeline"), "raw", device=torch.device("cpu")).sampler.image.latent_scale
        == "inverse"
    )
