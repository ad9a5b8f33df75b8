"""Releases: every variant is what diffusers computes, what is not is refused, and a folder appears whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvideo_dist.config.load import ConfigError, digest, load_config
from cogvideo_dist.config.schema import DiTRun, ImageCondition
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.schedule import ScheduleConfig
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import PRESETS, SNR_SHIFT
from launch import convert, release
from launch.beginning import trained_transformer
from launch.compose import load_vae
from tests.launch.releases import changed, command, figures, open_model, trained
from tests.launch.world import World

CPU = torch.device("cpu")


def pipeline(world: World, name: str, folder: Path, *, sampler: Any = "ddim", **changes: Any) -> Path:
    """A pipeline's folder around such a model."""
    hf.save_pipeline(
        folder, transformer=open_model(name, **changes), vae=load_vae(str(world.root / "vae"), CPU),
        text=world.root / "text", scheduler=scheduler_config(ScheduleConfig(snr_shift=SNR_SHIFT[name]), sampler),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def plain(world: World) -> Path:
    return pipeline(world, "cogvideox-5b", world.root / "released-plain")


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    return trained(world, world.root / "release-run")


# ---- Every variant.


LONG = pytest.mark.long
VARIANTS = [
    ("cogvideox-2b", "ddim"), ("cogvideox-5b", "dpmpp_2m_sde"), ("cogvideox-5b-i2v", "dpmpp_2m_sde"),
    ("cogvideox1.5-5b", "ddim"), ("cogvideox1.5-5b-i2v", "dpmpp_2m_sde"),
    pytest.param("cogvideox-2b", "dpmpp_2m_sde", marks=LONG), pytest.param("cogvideox-5b", "ddim", marks=LONG),
    pytest.param("cogvideox-5b-i2v", "ddim", marks=LONG), pytest.param("cogvideox1.5-5b", "dpmpp_2m_sde", marks=LONG),
    pytest.param("cogvideox1.5-5b-i2v", "ddim", marks=LONG),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sampler"), VARIANTS)
def test_every_variant_computes_in_the_public_library_what_it_computes_here(
    world: World, tmp_path: Path, name: str, sampler: str
) -> None:
    source, out = pipeline(world, name, tmp_path / "source", sampler=sampler), tmp_path / "out"
    code, said, stderr = command("diffusers", source, out, "--shard-size", "100KB")
    assert code == 0, stderr
    found = figures(said)
    assert found.keys() == {"text", "latents", "video", "mean", "logvar", "decoded", "forward"}
    assert found["forward"] <= 1e-6 and found["latents"] <= 1e-4 and found["video"] <= 1e-4
    assert len(list((out / "transformer").glob("*.safetensors"))) > 1
    files = {path.name for path in out.iterdir()}
    assert files == {*hf.PIPELINE, "README.md", "verification.png"}
    kind = json.loads((out / "model_index.json").read_text())["_class_name"]
    assert kind == ("CogVideoXImageToVideoPipeline" if name.endswith("i2v") else "CogVideoXPipeline")
    card = (out / "README.md").read_text()
    assert f"from diffusers import {kind}" in card and figures(card) == found


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=LONG)])
def test_narrow_releases_are_compared_with_the_same_rounded_weights(plain: Path, tmp_path: Path, dtype: str) -> None:
    code, said, stderr = command("diffusers", plain, tmp_path / "out", "--dtype", dtype)
    assert code == 0, stderr
    assert figures(said)["forward"] <= 1e-6 and figures(said)["latents"] <= 1e-4
    written = load_file(tmp_path / "out" / "transformer" / hf.WEIGHTS)
    before = load_file(plain / "transformer" / hf.WEIGHTS)
    assert all(torch.equal(tensor, before[name].to(convert.DTYPES[dtype])) for name, tensor in written.items())


@pytest.mark.long
def test_positions_that_training_counts_are_compared_where_both_count_and_told(world: World, tmp_path: Path) -> None:
    run = trained(world, tmp_path / "run", "model.rope_grid=extrapolate")
    code, said, stderr = command("diffusers", run, tmp_path / "out")
    assert code == 0, stderr
    assert figures(said)["forward"] <= 1e-6
    assert (
        "diffusers stretches those of other heights and widths over 32 x 32" in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(("name", "changes"), [
    ("cogvideox-5b", {"rope_grid": "extrapolate"}),
    ("cogvideox1.5-5b", {"sample_height": 4, "sample_width": 4}),  # diffusers has no positions beyond the base
    ("cogvideox-5b-i2v", {"sample_frames": 5}),
])  # fmt: skip
def test_models_whose_base_is_not_that_of_the_probe_are_compared_at_a_base_that_is(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    model = open_model(name, **changes)
    hf.save_transformer(model, tmp_path)
    assert figures(release.verify(model, tmp_path))["forward"] <= 1e-6


# ---- What is not the same is refused, and nothing appears.


def weights_changed(part: str, name: str) -> Callable[[Path], None]:
    return lambda folder: changed(folder / part / hf.WEIGHTS, name)


def setting_changed(file: str, **fields: Any) -> Callable[[Path], None]:
    """Another value of a field, with which every tensor still fits."""

    def change(folder: Path) -> None:
        before = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(before | fields))

    return change


def tampered(arguments: tuple[object, ...], change: Callable[[Path], None]) -> str:
    """The last line of a release in which something is changed before it is verified; nothing may be left of it."""
    save, out = hf.save_pipeline, Path(str(arguments[2]))

    def saved(folder: Path, **given: Any) -> None:
        save(folder, **given)
        change(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release.hf, "save_pipeline", saved)
        code, _, stderr = command(*arguments)
    assert code == 1 and not [path for path in out.parent.iterdir() if out.name in path.name]
    return stderr.splitlines()[-1]


WEIGHTS = [
    ("transformer", "transformer_blocks.1.attn1.to_v.weight"), ("transformer", "time_embedding.linear_1.weight"),
    ("transformer", "proj_out.weight"), ("vae", "decoder.conv_out.conv.weight"), ("vae", "encoder.conv_in.conv.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name"), [WEIGHTS[0], *(pytest.param(*each, marks=LONG) for each in WEIGHTS[1:])])
def test_a_release_with_one_number_changed_by_a_thousandth_is_refused(
    plain: Path, tmp_path: Path, part: str, name: str
) -> None:
    said = tampered(("diffusers", plain, tmp_path / "out"), weights_changed(part, name))
    assert f"diffusers loads another {name} than was to be written; nothing is released" in said


@pytest.mark.parametrize(("change", "first"), [
    (setting_changed("scheduler/scheduler_config.json", snr_shift_scale=1.01), "latents"),
    pytest.param(setting_changed("transformer/config.json", norm_eps=1e-4), "forward", marks=LONG),
    pytest.param(setting_changed("transformer/config.json", sample_height=16), "forward", marks=LONG),  # other rotations
    pytest.param(setting_changed("vae/config.json", norm_num_groups=4), "mean", marks=LONG),
])  # fmt: skip
def test_a_release_that_computes_something_else_is_refused(
    plain: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    first: str,
) -> None:
    said = tampered(("diffusers", plain, tmp_path / "out"), change)
    assert "diffusers computes something else than we do: " in said and f"({first} may differ by" in said


def test_a_changed_learned_position_is_refused_even_where_no_probe_looks(tmp_path: Path) -> None:
    model = open_model("cogvideox-5b-i2v", sample_frames=5)
    hf.save_transformer(model, tmp_path)
    changed(tmp_path / hf.WEIGHTS, "patch_embed.pos_embedding")
    with pytest.raises(ValueError, match="diffusers loads another patch_embed.pos_embedding"):
        release.verify(model, tmp_path)


def test_a_forward_that_is_off_by_more_than_it_may_be_is_refused() -> None:
    ours = {"forward": torch.tensor([1.0, -4.0])}
    assert release.proof.compare(ours, {"forward": torch.tensor([1.0, -4.0 - 3.9e-6])})
    for value in (4e-5, float("nan")):
        with pytest.raises(ValueError, match=r"forward \S+ \(forward may differ by 1e-06\); nothing is released"):
            release.proof.compare(ours, {"forward": torch.tensor([1.0, -4.0 + value])})


# ---- What is written, and when.


def test_without_the_public_library_one_line_says_that_nothing_was_verified(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.release_proof.importlib.util.find_spec", lambda name: None)
    code, said, stderr = command("diffusers", plain, tmp_path / "out")
    assert code == 0, stderr
    assert said.splitlines()[0].startswith("not verified: diffusers is not installed") and not figures(said)
    assert "Not verified." in (tmp_path / "out" / "README.md").read_text()
    code, _, stderr = command("diffusers", plain, tmp_path / "out2", "--verify")
    assert code == 78 and stderr.count("\n") == 1 and "--verify needs diffusers, which is not installed" in stderr


def test_a_text_encoder_elsewhere_is_named_and_not_copied(world: World, plain: Path, tmp_path: Path) -> None:
    from diffusers import CogVideoXPipeline
    from transformers import T5EncoderModel, T5Tokenizer

    out, text = tmp_path / "out", world.root / "text"
    code, said, stderr = command("diffusers", plain, out, "--text", "reference", "--text-from", text)
    assert code == 0, stderr
    assert figures(said)["text"] == 0.0 and figures(said)["latents"] <= 1e-4
    assert not (out / "text_encoder").exists() and not (out / "tokenizer").exists()
    index = json.loads((out / "model_index.json").read_text())
    assert (index["text_encoder"], index["_text_from"]) == ([None, None], str(text))
    assert f'T5EncoderModel.from_pretrained("{text}", subfolder="text_encoder"' in (out / "README.md").read_text()
    with pytest.raises(
        ValueError, match="expected .*'text_encoder', 'tokenizer'"
    ):  # diffusers asks for what is missing
        CogVideoXPipeline.from_pretrained(out)
    parts = {
        "text_encoder": T5EncoderModel.from_pretrained(text, subfolder="text_encoder"),
        "tokenizer": T5Tokenizer.from_pretrained(text, subfolder="tokenizer"),
    }
    assert CogVideoXPipeline.from_pretrained(out, **parts).text_encoder is parts["text_encoder"]


def test_the_cards_own_lines_make_a_video(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command("diffusers", run, "my-pipeline", "--no-verify")
    assert code == 0, stderr
    code_of_card = re.search(r"```python\n(.*?)```", (tmp_path / "my-pipeline/README.md").read_text(), re.DOTALL)
    assert code_of_card is not None
    exec(
        code_of_card[1].replace('"cuda"', '"cpu"').replace('export_to_video(frames, "video.mp4"', "dict(frames=frames"),
        {},
    )


def test_a_runs_card_tells_what_it_was_made_of(run: Path, tmp_path: Path) -> None:
    code, said, stderr = command("diffusers", run, tmp_path / "out", "--dtype", "bf16")
    assert code == 0, stderr
    card = (tmp_path / "out" / "README.md").read_text()
    config = load_config(DiTRun, [run / "config.yaml"])
    source = json.loads((run / "data.json").read_text())[0]
    for fact in (
        "| Began from | weights drawn from seed 5 |", "| Steps | 2 |", "| Weights | averaged (EMA, decay 0.9) |",
        f"| Configuration | SHA-256 {digest(config)} |", f"{source['samples']} samples, index {source['digest']}",
        "| Precision of training | fp32 |", "zero_stage 2", "| Written in | bfloat16 |",
        "| Recommended sampling | ddim, 3 steps, guidance 2 (dynamic), 9x32x32 at 8 fps |",
        "num_frames=9, height=32, width=32, num_inference_steps=3", "use_dynamic_cfg=True", "torch_dtype=torch.bfloat16",
        "# license: fill in",
    ):  # fmt: skip
        assert fact in card, fact
    assert re.search(r"\| Clips seen \| [1-9]\d* \|", card)
    assert str(run.parent) not in card  # where things lie here is nobody's business
    assert figures(card) == figures(said)


def test_averaged_and_last_weights_are_two_releases(run: Path, tmp_path: Path) -> None:
    written = {}
    for weights in ("ema", "raw"):
        code, _, stderr = command(
            "diffusers", run, tmp_path / weights, "--part", "transformer", "--weights", weights, "--no-verify"
        )
        assert code == 0, stderr
        model, _ = trained_transformer(run, load_config(DiTRun, [run / "config.yaml"]), weights=weights)
        hf.save_transformer(model, tmp_path / "expected")
        expected, written[weights] = (
            load_file(tmp_path / "expected" / hf.WEIGHTS),
            load_file(tmp_path / weights / hf.WEIGHTS),
        )
        assert all(torch.equal(tensor, expected[name]) for name, tensor in written[weights].items())
    assert any(not torch.equal(tensor, written["raw"][name]) for name, tensor in written["ema"].items())
    assert "as of the last step" in (tmp_path / "raw" / "README.md").read_text()


def test_a_release_replaces_a_release_and_nothing_else(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for size in ("100KB", "5GB"):
        assert command("diffusers", plain, out, "--no-verify", "--shard-size", size)[0] == 0
    assert len(list((out / "transformer").glob("*.safetensors"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "LICENSE").write_text("mine")
    code, _, stderr = command("diffusers", plain, out, "--no-verify")
    assert code == 78 and "holds LICENSE, which is no part of a release" in stderr
    assert (out / "LICENSE").read_text() == "mine"


def test_a_release_between_whose_renamings_a_process_was_killed_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".old-out").mkdir()
    (tmp_path / ".old-out" / "README.md").write_text("before")
    (tmp_path / ".tmp-out").mkdir()
    with pytest.raises(OSError), release.appearing(tmp_path / "out") as folder:
        (folder / "README.md").write_text("after")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "out" / "README.md").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_goes_wrong_halfway_leaves_what_was_there(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert command("diffusers", plain, out, "--no-verify")[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cogvideo_dist.convert.diffusers.shutil.copytree", full)
    code, _, stderr = command("diffusers", plain, out, "--no-verify")
    assert code == 1 and "No space left" in stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (("diffusers", "SOURCE", "out", "--text-from", "a/b"), 78, "add --text reference"),
    (("diffusers", "SOURCE", "out", "--shard-size", "5 elephants"), 2, "is no size; give one such as 5GB"),
    (("diffusers", "nowhere", "out"), 78, "nowhere: no such folder or file"),
    (("lora", "SOURCE", "out"), 78, "no run (it has no config.yaml)"),
])  # fmt: skip
def test_what_cannot_be_released_is_named(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found, _, stderr = command(*(str(plain) if word == "SOURCE" else word for word in arguments))
    assert found == code and message in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("setting", "message"), [
    ({"latent_scale": "none"}, "diffusion.image.latent_scale none, which diffusers' pipelines cannot do; .* scale or inverse"),
    ({"rest": "repeat"}, "diffusion.image.rest repeat, which diffusers' pipelines cannot do; convert --part transformer"),
    ({"ofs": 1.0}, "diffusion.image.ofs 1.0, which .* train with 2.0"),
])  # fmt: skip
def test_a_condition_that_no_public_pipeline_makes_is_refused(setting: dict[str, Any], message: str) -> None:
    image = ImageCondition(**setting)
    with pytest.raises(ConfigError, match=message):
        release.check_image(PRESETS["cogvideox1.5-5b-i2v"], image, source=Path("run"))
    release.check_image(PRESETS["cogvideox1.5-5b"], image, source=Path("run"))  # of text alone there is no condition


def test_what_sat_trained_is_released_like_everything_else(tmp_path: Path) -> None:
    model = DiT(PRESETS["tiny-cogvideox-5b"])
    draw_parameters(model, 0)
    hf.save_transformer(model, tmp_path / "before")
    for arguments in (
        ("sat", tmp_path / "before", tmp_path / "sat", "--tp", 3),
        ("diffusers", tmp_path / "sat", tmp_path / "after", "--preset", "tiny-cogvideox-5b"),
    ):
        code, said, stderr = command(*arguments)
        assert code == 0, stderr
    assert figures(said)["forward"] <= 1e-6
    assert (tmp_path / "after" / hf.WEIGHTS).read_bytes() == (tmp_path / "before" / hf.WEIGHTS).read_bytes()


@pytest.mark.long
def test_the_card_of_a_later_stage_tells_of_the_earlier_one(world: World, run: Path, tmp_path: Path) -> None:
    stage = trained(world, tmp_path / "stage", f"init.from={run}")
    code, _, stderr = command("diffusers", stage, tmp_path / "out", "--part", "transformer", "--no-verify")
    assert code == 0, stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Began from | the run {'/'.join(run.parts[-2:])} |" in card
    assert re.search(r"\| Stage 1 \| \S+: 2 steps, [1-9]\d* clips; its ema weights went on \(SHA-256 \w{16}\) \|", card)
    assert "| Steps | 4, of them 2 in the last stage |" in card
