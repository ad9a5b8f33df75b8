from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideo_dist.config.load import ConfigError, digest, load_config, to_yaml
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.models.presets import PRESETS

ROOT = Path(__file__).parents[2]

GOOD = """\
run: {dir: runs/a, seed: 3}
model:
  preset: tiny-cogvideox-5b
  layers: 4
data:
  shards: shards
  source: latents
  sizes: [[9, 32, 32], [1, 48, 64]]
  fps: 8
  tokens_per_pack: 100
  packs_per_step: 4
train:
  steps: 10
  learning_rate: 1.0e-3
  betas: [0.9, 0.95]
  clip_norm: 1.0
checkpoint: {every: 5}
"""


def write(folder: Path, text: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder: Path, *overrides: str, text: str | bytes = GOOD) -> DiTRun:
    return load_config(DiTRun, [write(folder, text)], overrides=overrides)


def refused(folder: Path, *overrides: str, text: str | bytes = GOOD) -> str:
    """The error's message, which is one line and names the file or the override."""
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    assert "run.yaml" in message or "override" in message
    assert "pydantic" not in message
    return message.replace(str(folder) + "/", "")


def test_a_good_file_becomes_typed_values(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.run.seed, config.train.learning_rate, config.data.fps) == (3, 1e-3, 8.0)
    assert config.data.sizes == ((9, 32, 32), (1, 48, 64))
    assert config.model.transformer() == replace(PRESETS["tiny-cogvideox-5b"], layers=4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  steps: 10", "  stesp: 10", "run.yaml:13: unknown key train.stesp; did you mean steps?"),
        ("  steps: 10", "  steps: 10\n  zzz: 1", "run.yaml:14: unknown key train.zzz; allowed here: steps, learning_rate"),
        ("checkpoint: {every: 5}", "checkpont: {every: 5}", "run.yaml:17: unknown key checkpont; did you mean checkpoint?"),
        ("  steps: 10\n", "", "run.yaml:12: key train.steps is missing"),
        ("  steps: 10", "  steps: 10\n  steps: 20", "run.yaml:14: key train.steps is given twice"),
        ("run: {dir: runs/a, seed: 3}", "run: {dir: a, seed: 3}\nrun: {dir: b}", "run.yaml:2: key run is given twice"),
        ("  steps: 10", "  steps: ten", "run.yaml:13: train.steps: input should be a valid integer, found 'ten'"),
        ("  steps: 10", "  steps: 10.0", "run.yaml:13: train.steps: input should be a valid integer, found 10.0"),
        ("  steps: 10", "  steps: '10'", "run.yaml:13: train.steps is the text '10', not a number; write 10"),
        ("  steps: 10", "  steps: true", "run.yaml:13: train.steps: input should be a valid integer, found True"),
        ("  steps: 10", "  steps: null", "run.yaml:13: train.steps: input should be a valid integer, found None"),
        ("  steps: 10", "  steps: [10]", "run.yaml:13: train.steps: input should be a valid integer, found [10]"),
        ("1.0e-3", "1e-5", "run.yaml:14: train.learning_rate is the text '1e-5', not a number; write 1.0e-5"),
        ("1.0e-3", "2E5", "run.yaml:14: train.learning_rate is the text '2E5', not a number; write 2.0e+5"),
        ("1.0e-3", ".nan", "run.yaml:14: train.learning_rate: expected a finite number"),
        ("1.0e-3", "-.inf", "run.yaml:14: train.learning_rate: expected a finite number"),
        ("1.0e-3", "2024-13-01", "run.yaml:14: train.learning_rate: '2024-13-01' cannot be read"),
        ("1.0e-3", "2024-12-01", "run.yaml:14: train.learning_rate: expected a finite number"),
        ("1.0e-3", "!!binary aGk=", "run.yaml:14: train.learning_rate: expected a finite number"),
        ("1.0e-3", "!!python/name:os.system", "run.yaml: not valid YAML: could not determine a constructor"),
        ("[0.9, 0.95]", "[0.9]", "run.yaml:15: "),
        ("[0.9, 0.95]", "[0.9, 0.95, 0.99]", "run.yaml:15: "),
        ("[0.9, 0.95]", "[0.9, 1.5]", "run.yaml:15: train.betas.1 must be at least 0 and below 1, found 1.5"),
        ("[9, 32, 32]", "[9, 32]", "run.yaml:8: "),
        ("[9, 32, 32]", "[9, 32, 31]", "run.yaml:8: data.sizes: [9, 32, 31] is not a legal [frames, height, width]: "),
        ("[9, 32, 32]", "[10, 30, 100]", "the nearest is [9, 32, 96]"),
        ("latents", "laetnts", "run.yaml:7: data.source: input should be 'pixels' or 'latents', found 'laetnts'"),
        ("latents", "pixels", "run.yaml:7: data.source: pixels needs frozen.vae and frozen.text"),
        ("tiny-cogvideox-5b", "cogvideox-5", "run.yaml:3: model.preset 'cogvideox-5' is unknown; use one of cogvideox-2b"),
        ("layers: 4", "layers: 0", "run.yaml:4: model.layers must be above 0, found 0"),
        ("tiny-cogvideox-5b", "cogvideox-5b-i2v", "frozen.vae must name an autoencoder for model.preset cogvideox-5b-i2v"),
        ("run: {dir: runs/a, seed: 3}", "run: 5", "run.yaml:1: run: input should be an object, found 5"),
        ("checkpoint: {every: 5}", "checkpoint: {every: 5, <<: {keep: 2}}", "run.yaml:17: unknown key checkpoint.<<"),
        ("checkpoint: {every: 5}", "checkpoint: {every: 5", "run.yaml: not valid YAML: "),
        ("\n  layers: 4", "\n\tlayers: 4", "run.yaml: not valid YAML: "),
        ("  shards: shards\n", "", "data must name either shards, one set, or sources, several with their weights"),
        ("  shards: shards", "  shards: a\n  sources: [{shards: b}]", "data must name either shards, one set, or sources"),
        ("  shards: shards", "  sources: [{shards: b, weight: 0}]", "data.sources.weight must be above 0, found 0"),
        ("  shards: shards", "  sources: [{shards: b, top_share: 0.2}]", "data.sources.top_share needs data.sources.score"),
        ("  shards: shards", "  sources: [{shards: b, wieght: 2}]", "did you mean weight?"),
        ("  shards: shards", "  shards: a\n  window: 0", "data.window must be above 0, found 0"),
        ("  shards: shards", "  shards: a\n  mode: packed", "input should be 'pack', 'bucket' or 'pad', found 'packed'"),
        ("  shards: shards", "  shards: a\n  remote: {retries: -1}", "data.remote.retries be >= 0"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_refused_in_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    assert message in refused(tmp_path, text=GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"run: {dir: caf\xe9}", "run.yaml: cannot be read as UTF-8 text"),
        ("[1, 2]", "run.yaml: the top level must be a mapping of sections, found list"),
        ("steps", "run.yaml: the top level must be a mapping of sections, found str"),
        ("--- {}\n--- {}", "run.yaml: not valid YAML: expected a single document"),
        ("", "run.yaml: key run is missing"),
        ("run: &a [*a]", "run.yaml: nested too deeply; does an anchor hold itself?"),
        ("run: " + 3000 * "[", "run.yaml: "),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{b}: &{b} [{', '.join(10 * ['*' + a])}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
            "run.yaml: more than 100000 values; are anchors nested in each other?",
        ),
    ],
    ids=["latin-1", "list", "text", "two documents", "empty", "circle", "deep", "bomb"],
)
def test_what_is_no_configuration_at_all_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in refused(tmp_path, text=text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such configuration file"):
        load_config(DiTRun, [tmp_path / "gone.yaml"])
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: cannot be read as UTF-8 text")):
        load_config(DiTRun, [tmp_path])


def test_later_files_win_key_by_key_and_overrides_win_over_all(tmp_path: Path) -> None:
    first = write(tmp_path, GOOD, "first.yaml")
    second = write(tmp_path, "train: {steps: 20, warmup_steps: 5}\nrun: {dir: runs/b}", "second.yaml")
    config = load_config(DiTRun, [first, second], overrides=["train.steps=30", "train.steps=40", "model.layers="])
    assert (config.train.steps, config.train.warmup_steps, config.train.learning_rate) == (40, 5, 1e-3)
    assert (config.run.dir, config.run.seed, config.model.layers) == ("runs/b", 3, None)


def test_an_override_is_parsed_as_yaml_and_named_where_it_is_wrong(tmp_path: Path) -> None:
    config = load(
        tmp_path, "data.sizes=[[5, 16, 16]]", "checkpoint={every: 2, keep: 1}", "run.dir=a=b", "train.clip_norm=null"
    )
    assert config.data.sizes == ((5, 16, 16),)
    assert (config.checkpoint.every, config.checkpoint.keep, config.run.dir) == (2, 1, "a=b")
    assert config.train.clip_norm is None
    for override, message in {
        "train.stps=3": "override 'train.stps=3': unknown key train.stps; did you mean steps?",
        "train.steps=x": "override 'train.steps=x': train.steps: input should be a valid integer, found 'x'",
        "train.steps=-1": "override 'train.steps=-1': train.steps must be above 0, found -1",
        "train.learning_rate=1e-5": "override 'train.learning_rate=1e-5': train.learning_rate is the text '1e-5'",
        "checkpoint={evry: 2}": "override 'checkpoint={evry: 2}': unknown key checkpoint.evry; did you mean every?",
        "train.betas=[0.1, 2.0]": "override 'train.betas=[0.1, 2.0]': train.betas.1 must be at least 0 and below 1, found 2.0",
        "train.steps": "override 'train.steps': expected key.path=value, for example train.steps=20",
        "train..steps=2": "override 'train..steps=2': expected key.path=value",
        "run.dir=[a": "override 'run.dir=[a': not valid YAML",
    }.items():
        assert message in str(refused_override(tmp_path, override))


def refused_override(folder: Path, override: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(folder, override)
    return caught.value


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    odd = [
        "run.dir='1e-5'", "train.learning_rate=1.0e-16", "train.eps=1.0e+16", 'validation.prompts=["yes", "a: b", "\u732b #"]',
    ]  # fmt: skip
    config = load(tmp_path, *odd)
    text = to_yaml(config)
    again = load_config(DiTRun, [write(tmp_path, text, "resolved.yaml")])
    assert again == config
    assert to_yaml(again) == text
    assert digest(again) == digest(config) != digest(load(tmp_path))


INIT = GOOD + "init: {from: runs/first, positions: extrapolate}\nlora: {rank: 4, special: [{target: ff1, rank: 2}]}\n"


def test_a_key_that_is_a_word_of_python_is_read_and_written_as_it_is(tmp_path: Path) -> None:
    config = load(tmp_path, text=INIT)
    assert config.init is not None and config.init.from_ == "runs/first"
    assert "from: runs/first" in to_yaml(config)
    assert load_config(DiTRun, [write(tmp_path, to_yaml(config), "again.yaml")]) == config
    assert load(tmp_path, "init.from=other", text=INIT).init.from_ == "other"
    assert "did you mean from?" in refused(tmp_path, "init.fro=x", text=INIT)
    assert "init.from" in refused(tmp_path, "init.from=3", text=INIT)
    assert "two beginnings" in refused(tmp_path, "model.weights=x", text=INIT)


def test_adapters_are_one_for_each_linear_named(tmp_path: Path) -> None:
    lora = load(tmp_path, text=INIT).lora
    assert lora is not None
    assert {name: adapter.rank for name, adapter in lora.adapters().items()} == {
        "q": 4,
        "k": 4,
        "v": 4,
        "out": 4,
        "ff1": 2,
    }
    assert "'w' is none of q, k" in refused(tmp_path, "lora.targets=[w]", text=INIT)
    assert "rank must be at least 1" in refused(tmp_path, "lora.rank=0", text=INIT)
    assert "give patch dropout 0" in refused(tmp_path, "lora.targets=[patch]", "lora.dropout=0.1", text=INIT)
    assert "unknown key lora.special.0.rnak" in refused(tmp_path, "lora.special=[{target: q, rnak: 2}]", text=INIT)
