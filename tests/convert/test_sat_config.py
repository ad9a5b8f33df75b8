"""SAT's configuration files: what they say reaches ours, no key is lost, and no name in them is ever imported."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun, ImageCondition
from cogvideo_dist.convert.sat_config import Situation, Translation, translate
from cogvideo_dist.convert.sat_config_rules import ADVICE, BUILT_IN, CLASSES, NO_EFFECT, UNKNOWN_ARGUMENT
from cogvideo_dist.models.presets import LATENT_SCALE, RELEASED, SNR_SHIFT
from tests.convert.sat_files import COMMAND_LINE, INFERENCE, KINDS, PRESETS, model_file, sft_file, write_files

ALL = [(kind, lora) for kind in KINDS for lora in (None, 128)]


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all values of a YAML document, by PyYAML alone."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{number}")
    else:
        yield path


def translated(folder: Path, *texts: str, situation: Situation | None = None) -> Translation:
    paths = [folder / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_text(text, encoding="utf-8")
    return translate(paths, situation)


@cache
def released(kind: str, lora: int | None = None) -> Translation:
    """Of the files of a released model, which several tests look at."""
    with TemporaryDirectory() as folder:
        return translate(write_files(Path(folder), kind, lora=lora))


def refusal(folder: Path, *texts: str, situation: Situation | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        translated(folder, *texts, situation=situation)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


def kind_of(translation: Translation, key: str) -> str:
    return next(line.kind for line in translation.lines if line.key == key)


def changed(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(("kind", "lora"), ALL)
def test_every_key_of_the_released_files_is_accounted_for_once(kind: str, lora: int | None) -> None:
    texts = (model_file(kind, lora=lora), sft_file(kind))
    expected = [key for text in texts for key in leaves(yaml.safe_load(text))]
    assert len(expected) == len(set(expected)) > 120  # the two files share no key
    translation = released(kind, lora)
    assert Counter(line.key for line in translation.lines) == Counter(expected)
    counts = Counter(line.kind for line in translation.lines)
    assert min(counts["translated"], counts["dropped"]) > 40
    # Of what was released, this alone has neither effect nor counterpart here.
    assert [line.key for line in translation.lines if line.kind == "missing"] == ["data.params.skip_frms_num"]
    for table in (translation.table, translation.yaml):
        rows = Counter(
            line.removeprefix("#").split()[0] for line in table.splitlines() if line.removeprefix("#").strip()
        )
        assert all(rows[key] == 1 for key in expected)


@pytest.mark.parametrize(("kind", "lora"), ALL)
def test_a_released_model_is_its_preset(tmp_path: Path, kind: str, lora: int | None) -> None:
    translation = released(kind, lora)
    (tmp_path / "ours.yaml").write_text(translation.yaml)
    config = load_config(DiTRun, [tmp_path / "ours.yaml"])
    assert config == translation.config
    name = PRESETS[kind]
    assert config.model.preset == name and config.model.changes() == {"text_length": 224 if "1.5" in kind else 226}
    assert config.model.transformer() == RELEASED[name]
    assert config.diffusion.snr_shift == SNR_SHIFT[name]
    assert config.train.precision == ("fp16" if kind == "2b" else "bf16")
    assert config.data.source == ("latents" if kind == "1.5-5b" else "pixels")
    assert config.data.sizes == (((81, 768, 1360) if "1.5" in kind else (49, 480, 720)),)
    assert config.validation.sampling.size == config.data.sizes[0]
    assert config.data.fps == config.validation.sampling.fps == (16.0 if "1.5" in kind else 8.0)
    assert f"{LATENT_SCALE[name]}" in next(line.text for line in translation.lines if line.key == "model.scale_factor")
    if lora is None:
        assert config.lora is None
    else:
        assert config.lora is not None
        assert {*config.lora.adapters()} == {"q", "k", "v", "out"}
        assert all(adapter.scale == 1 / 128 for adapter in config.lora.adapters().values())


def test_the_run_is_what_sft_yaml_says() -> None:
    config = released("5b").config
    train, data = config.train, config.data
    assert (train.steps, train.learning_rate, train.betas, train.eps) == (1000, 1e-5, (0.9, 0.95), 1e-8)
    assert (train.weight_decay, train.clip_norm, train.zero_stage, train.ema_decay) == (1e-4, 0.1, 2, 0.9999)
    assert (train.recompute, train.warmup_steps, train.schedule, train.final_ratio) == ("full", 100, "cosine", 0.0)
    assert (data.shards, data.crop, data.workers, data.held_out) == ("shards/disney", "center", 8, 1)
    # 8 GPUs x 2 clips of 226 + 13 x 30 x 45 tokens
    assert (data.tokens_per_pack, data.packs_per_step) == (2 * 17776, 8)
    assert (config.checkpoint.every, config.log.every, config.validation.every) == (500, 20, 100)
    assert (config.diffusion.timesteps, config.diffusion.text_dropout) == ("stratified", 0.1)
    assert (config.run.dir, config.model.weights) == ("ckpts_5b_lora/lora-disney", "models/CogVideoX-5b/transformer")
    assert (config.frozen.vae, config.frozen.text) == ("models/CogVideoX-5b/vae", "models/CogVideoX-5b")
    sampling = config.validation.sampling
    assert (sampling.sampler, sampling.steps) == ("dpmpp_2m_sde", 50)
    assert (sampling.guidance, sampling.guidance_kind) == (6.0, "dynamic")


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-5b-i2v"])
def test_the_image_condition_is_as_sat_trains_it(tmp_path: Path, kind: str) -> None:
    as_trained = ImageCondition(
        noise_mean=-3.0, noise_std=0.5, dropout=0.05, latent_scale="scale", rest="zeros", ofs=2.0
    )
    assert released(kind).config.diffusion.image == as_trained
    text = changed(
        model_file(kind), ("  noised_image_dropout: 0.05\n", "  noised_image_all_concat: true\n" * ("1.5" not in kind))
    )
    text = text.replace("noised_image_all_concat: false", "noised_image_all_concat: true")
    image = translated(tmp_path, text, sft_file(kind)).config.diffusion.image
    latents = translated(
        tmp_path, changed(model_file(kind), ("latent_input: false", "latent_input: true")), sft_file(kind)
    )
    assert latents.config.data.source == "pixels" and kind_of(latents, "model.latent_input") == "missing"
    assert (image.dropout, image.rest) == (0.0, "repeat")  # SAT's own default is no dropout, ours is 0.05


def test_later_files_win_key_by_key(tmp_path: Path) -> None:
    over = "args: {train_iters: 7}\ndeepspeed: {optimizer: {params: {lr: 2e-4, betas: [0.8, 0.9]}}}\n"
    translation = translated(tmp_path, model_file("2b"), sft_file("2b"), over)
    train = translation.config.train
    assert (train.steps, train.learning_rate, train.betas, train.weight_decay) == (7, 2e-4, (0.8, 0.9), 1e-4)
    assert translation.config.checkpoint.every == 500
    lines = {line.key: line.value for line in translation.lines}
    assert lines["args.train_iters"] == 7 and len(lines) == len(translation.lines)


def test_the_batch_follows_from_gpus_accumulation_and_model_parallelism(tmp_path: Path) -> None:
    text = changed(
        sft_file("5b"), ("model_parallel_size: 1", "model_parallel_size: 2"),
        ("accumulation_steps: 1", "accumulation_steps: 3"),
    )  # fmt: skip
    model = changed(model_file("5b"), ("model_parallel_size: 1", "model_parallel_size: 2"))
    config = translated(tmp_path, model, text, situation=Situation(gpus=16)).config
    assert config.parallel.tp == 2
    assert (config.data.packs_per_step, config.data.tokens_per_pack) == (3 * 16 // 2, 2 * 17776)
    assert "--gpus 3 does not divide by 2" in refusal(tmp_path, model, text, situation=Situation(gpus=3))
    differing = refusal(tmp_path, model_file("5b"), text)
    assert (
        "transformer_args.model_parallel_size: means parallel.tp 1, but args.model_parallel_size means 2" in differing
    )


def test_what_differs_from_a_preset_is_an_override(tmp_path: Path) -> None:
    text = changed(
        model_file("5b"), ("num_layers: 42", "num_layers: 8"), ("hidden_size: 3072", "hidden_size: 512"),
        ("num_attention_heads: 48", "num_attention_heads: 8"), ("time_embed_dim: 512", "time_embed_dim: 256"),
        ("text_hidden_size: 4096", "text_hidden_size: 768"), (": 226", ": 64"), ("latent_width: 90", "latent_width: 60"),
    )  # fmt: skip
    config = translated(tmp_path, text, sft_file("5b")).config
    assert config.model.changes() == {
        "layers": 8, "heads": 8, "time_embed_dim": 256, "text_dim": 768, "text_length": 64, "sample_width": 60,
        "rope_grid": "extrapolate",  # for SAT's table of 60 x 60 does not stretch over 60 x 90
    }  # fmt: skip
    assert config.data.tokens_per_pack == 2 * (64 + 13 * 30 * 45)
    waves = changed(
        model_file("2b"), ("            height_interpolation: 1.875\n            width_interpolation: 1.875\n", "")
    )
    assert translated(tmp_path, waves, sft_file("2b")).config.model.spatial_interpolation == 1.0


def test_a_hostile_target_is_listed_as_unknown_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model, sft = model_file("5b", lora=64), sft_file("5b")
    keys = [key for text in (model, sft) for key in leaves(yaml.safe_load(text)) if key.endswith(".target")]
    assert len(keys) > 20
    for name in ("os.system", "trap.Bomb", "sgm.modules.diffusionmodules.sampling.VideoDDIMSampler; import trap"):
        hostile = [yaml.safe_load(text) for text in (model, sft)]
        for document in hostile:
            _retarget(document, name)
        before = set(sys.modules)
        translation = translated(tmp_path, *map(yaml.safe_dump, hostile))
        assert "trap" not in set(sys.modules) - before
        found = {line.key: line for line in translation.lines}
        for key in keys:
            assert found[key].kind == "missing" and found[key].value == name, key
            assert "nothing was imported" in found[key].text or key == "model.sampler_config.target"
        assert found["deepspeed.optimizer.type"].kind == "missing"
        assert translation.config.model.preset == "cogvideox-5b"  # by its sizes
        assert translation.config.lora is None and translation.config.train.ema_decay is None


def _retarget(value: Any, name: str) -> None:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == "target" or (key == "type" and "params" in value):
            value[key] = name
        else:
            _retarget(inner, name)


def test_text_of_a_file_stays_within_its_comment(tmp_path: Path) -> None:
    breaks = "x\\nrun: {dir: /elsewhere}\\u2028train: 1\\x85data: 2\\r\\e[2J"
    sft = changed(
        sft_file("5b"), ('[ "disney" ]', f'["{breaks}"]'), ("experiment_name: lora-disney", f'"{breaks}": "{breaks}"'),
        ("save: ckpts_5b_lora", f'save: "{breaks}"'),
    )  # fmt: skip
    translation = translated(tmp_path, model_file("5b"), sft)
    for text in (translation.yaml, translation.table):
        assert all(line.isprintable() for line in text.split("\n"))
    config = load_config(DiTRun, [_written(tmp_path / "ours.yaml", translation.yaml)])
    assert config == translation.config
    plain = "x\nrun: {dir: /elsewhere}\u2028train: 1\x85data: 2\r\x1b[2J"
    assert config.run.dir == plain and config.data.shards == f"shards/{plain.rpartition('/')[2]}"
    assert kind_of(translation, f"args.{plain}") == "missing"


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_unknown_keys_are_named_and_unread_sections_dropped(tmp_path: Path) -> None:
    extra = """\
args: {my_flag: 1, epochs: 3, test_data: [x], seed: 1152921504606846977}
model: {my_loss_weight: 2, loss_fn_config: {params: {offset_noise_level: 0.1, min_snr_value: 5}}, ema: {}}
deepspeed: {scheduler: {type: WarmupLR}, zero_optimization: {cpu_offload: true, offload_param: {device: nvme}}}
mine: {a: [1, {b: 2}], c: }
"""
    translation = translated(tmp_path, model_file("5b"), sft_file("5b"), extra)
    kinds = {line.key: line.kind for line in translation.lines}
    for key in ("args.my_flag", "args.epochs", "args.test_data", "model.my_loss_weight", "model.ema",
                "deepspeed.scheduler.type",
                "model.loss_fn_config.params.offset_noise_level", "model.loss_fn_config.params.min_snr_value",
                "deepspeed.zero_optimization.offload_param.device"):  # fmt: skip
        assert kinds[key] == "missing", key
    assert [kinds[key] for key in ("mine.a.0", "mine.a.1.b", "mine.c")] == ["dropped"] * 3
    assert translation.config.train.offload.optimizer and not translation.config.train.offload.parameters
    assert translation.config.run.seed == 1152921504606846977


def test_what_the_files_do_not_hold_is_to_be_filled_in(tmp_path: Path) -> None:
    translation = translated(tmp_path, model_file("1.5-5b-i2v"))
    wanted = {setting.ours for setting in translation.settings if setting.fill_in}
    assert wanted == {"run.dir", "data.shards", "data.sizes", "data.fps", "train.steps", "train.learning_rate"}
    part = translation.table.partition("to be filled in")[2]
    assert all(f"  {key} " in part for key in wanted)
    # Without a word about betas and clipping, the optimizer and DeepSpeed have defaults of their own, which are not ours.
    assert (translation.config.train.betas, translation.config.train.clip_norm) == ((0.9, 0.999), None)
    assert translated(tmp_path, model_file("2b"), situation=Situation(run_dir="runs/x")).config.run.dir == "runs/x"


def test_several_sets_become_sources_with_their_weights(tmp_path: Path) -> None:
    sft = changed(
        sft_file("5b"), ('train_data: [ "disney" ]', 'train_data: ["a/cats", "b/cats"]\n  train_data_weights: [3, 1]')
    )
    translation = translated(tmp_path, model_file("5b"), sft)
    assert [(source.shards, source.weight) for source in translation.config.data.sources] == [
        ("shards/cats", 3.0), ("shards/cats-2", 1.0),
    ]  # fmt: skip
    assert "#   python data_tools/make_shards.py b/cats shards/cats-2\n" in translation.yaml
    assert kind_of(translation, "args.valid_data") == "missing"  # another set than the training data
    encoded = translated(tmp_path, model_file("1.5-5b"), sft_file("1.5-5b"), situation=Situation(out="my run.yaml"))
    assert encoded.config.data.shards == "shards/disney-latents"
    command = "python launch/encode.py --config 'my run.yaml' data.source=pixels data.shards=shards/disney"
    assert f"#   {command} --out shards/disney-latents\n" in encoded.yaml


@pytest.mark.parametrize(
    ("kind", "latents", "frames"), [("5b", 13, 49), ("5b", 9, 33), ("1.5-5b", 22, 81), ("1.5-5b", 42, 161)]
)
def test_sizes_of_sampling_are_frames_of_video(tmp_path: Path, kind: str, latents: int, frames: int) -> None:
    inference = changed(
        INFERENCE, ("sampling_num_frames: 13", f"sampling_num_frames: {latents}"), ("[480, 720]", "[256, 384]")
    )
    translation = translated(tmp_path, model_file(kind), inference)
    assert translation.config.validation.sampling.size == (frames, 256, 384)
    assert translation.config.train.precision == "bf16"
    assert Counter(line.key for line in translation.lines) == Counter(
        key for text in (model_file(kind), inference) for key in leaves(yaml.safe_load(text))
    )


@pytest.mark.parametrize(
    ("style", "steps", "expected"),
    [
        ("lr_decay_style: cosine", 5000, ("cosine", 0.1, 100)),
        ("lr_decay_style: cosine\n  lr_decay_ratio: 0.2\n  warmup: 0.1", 5000, ("cosine", 0.2, 500)),
        ("lr_decay_style: constant", 50, ("constant", 0.1, 50)),
        ("lr_decay_style: linear", 50000, ("cosine", 0.0, 500)),
    ],
)  # fmt: skip
def test_warm_up_and_decay(tmp_path: Path, style: str, steps: int, expected: tuple[Any, ...]) -> None:
    sft = changed(sft_file("5b"), ("train_iters: 1000", f"train_iters: {steps}\n  {style}"))
    train = translated(tmp_path, model_file("5b"), sft).config.train
    assert (train.schedule, train.final_ratio, train.warmup_steps) == expected


MALFORMED = {
    "num_layers: 42": [
        ("num_layers: many", "0.yaml:27: model.network_config.params.num_layers: expected a number, found many"),
        ("num_layers: 4.5", "expected a whole number of at most 64 bits, found 4.5"),
        ("num_layers: ${args.layers}", "is an interpolation, which is not resolved; write its value"),
        ("num_layers: 42\n      num_layers: 30", "key model.network_config.params.num_layers is given twice"),
        ("num_layers: 0", "model.network_config.params: a transformer needs layers and heads >= 1"),
        ("nlayers: 42", "model.network_config.params.num_layers: is missing; give the model's file, too"),
        ("num_layers: !!python/object/apply:os.system [true]", "num_layers: expected a number, found [true]"),
        ("num_layers: !!python/name:os.system", "not valid YAML"),
        ("num_layers: {<<: *none}", "not valid YAML"),
        ("num_layers: 42\n      <<: {a: 1}", "merges of anchors are not read; write the keys out"),
    ],
    "in_channels: 16": [("in_channels: 24", "no released model has in_channels 24")],
    "hidden_size: 3072": [("hidden_size: 3071", "3071 does not divide over 48 heads")],
    "max_length: 226": [("max_length: 300", "text_length: means model.text_length 226, but ")],
    "shift_scale: 1.0": [("shift_scale: -1", "diffusion.snr_shift must be above 0")],
    "train_iters: 1000": [
        ("train_iters: 10000000000000000000", "expected a whole number of at most 64 bits"),
        ("train_iters: 0", "1.yaml:8: args.train_iters: cannot be translated: train.steps must be above 0"),
    ],
    "max_num_frames: 49": [
        ("max_num_frames: 50", "data.params.max_num_frames: cannot be translated: data.sizes: [50, 480, 720]")
    ],
    "betas: [ 0.9, 0.95 ]": [("betas: 0.9", "deepspeed.optimizer.params.betas: expected 2 numbers, found 0.9")],
    "enabled: False": [("enabled: True", "is true, too; choose one precision")],
    "uniform_sampling: True": [("uniform_sampling: maybe", "uniform_sampling: expected true or false, found maybe")],
}


@pytest.mark.parametrize(
    ("old", "new", "message"), [(old, *case) for old, cases in MALFORMED.items() for case in cases]
)
def test_a_file_that_cannot_be_translated_is_refused_by_place_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    model, sft = model_file("5b"), sft_file("5b")
    assert (old in model) != (old in sft)
    assert message in refusal(tmp_path, model.replace(old, new), sft.replace(old, new))


def test_what_is_no_configuration_of_sat_is_refused(tmp_path: Path) -> None:
    assert "no configuration of SAT" in refusal(tmp_path, "run: {dir: x}\n")
    assert "no configuration of SAT" in refusal(tmp_path, "")
    assert "give the model's file, too" in refusal(tmp_path, sft_file("5b"))
    assert "the top level must be a mapping" in refusal(tmp_path, "- 1\n")
    assert "no such configuration file" in _message(tmp_path / "none.yaml")
    endless = "model: &a\n  network_config: *a\n"
    assert "does an anchor hold itself" in refusal(tmp_path, endless)
    laughs = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8))
    assert "more than 100000 values" in refusal(tmp_path, laughs)


def _message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        translate([path])
    return str(caught.value)


def test_the_page_has_every_option() -> None:
    """Of the released files, of SAT's command line, and of every rule of the translation."""
    page = (Path(__file__).parents[2] / "docs" / "from-sat.md").read_text(encoding="utf-8")
    rows = " ".join(line for line in page.partition("## Every option")[2].splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([\w.]+)`", rows))
    texts = [model_file(kind, lora=8) for kind in KINDS] + [sft_file("5b"), INFERENCE]
    keys = {key for text in texts for key in leaves(yaml.safe_load(text))}
    keys |= {f"args.{name}" for name in COMMAND_LINE.split()}
    keys |= {*CLASSES, *BUILT_IN, *NO_EFFECT, *ADVICE}
    # A class stands for its section, a switch of a section for that section.
    tails = {key.split(".")[-2] if key.endswith((".target", ".enabled")) else key.split(".")[-1] for key in keys}
    parts = {
        "network_config",
        "conditioner_config",
        "first_stage_config",
        "loss_fn_config",
        "sigma_sampler_config",
        "0",
        "data",
        "model",
    }
    parts |= {"encoder_config", "decoder_config", "patch_embed_config", "adaln_layer_config", "final_layer_config"}
    tails = {tail for tail in tails if "*" not in tail}
    assert len(tails) > 200
    assert not sorted(tails - parts - named)


def test_the_command_line_of_sat_is_known(tmp_path: Path) -> None:
    own = {key.removeprefix("args.") for key in leaves(yaml.safe_load(sft_file("5b"))) if key.startswith("args.")}
    # Of train_iters and epochs SAT allows one; base names the files themselves.
    rest = {name: 1 for name in COMMAND_LINE.split() if name not in {*own, "base"}}
    words = dict.fromkeys(("lr_decay_style", "load", "input_file", "output_dir"), "word")
    switches = {"fp16": False, "bf16": True, "sampling_image_size": [480, 720], "train_data_weights": [1]}
    extra = yaml.safe_dump({"args": rest | {name: value for name, value in (words | switches).items() if name in rest}})
    translation = translated(tmp_path, model_file("5b"), sft_file("5b"), extra)
    assert len(rest) > 40
    assert not [line.key for line in translation.lines if line.text == UNKNOWN_ARGUMENT]
