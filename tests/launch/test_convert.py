"""Releases of an autoencoder: every way between a run, diffusers, SAT and our own names gives the same numbers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import load_config, to_yaml
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import native, sat
from cogvideo_dist.engine.manifest import Saved
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.models.vae import VAE
from launch import release
from launch.autoencoder import build_vae
from tests.convert.sat_files import write_files
from tests.convert.test_sat import CONFIG, fine_tuned, random_vae
from tests.engine.saved_states import commit
from tests.launch.world import LENGTH, World, outcome, read_log, train
from tests.ranks import run_ranks

RUN = """\
run: {dir: RUN, seed: 2}
model: {channels: [4, 4, 8, 8], layers_per_block: 1, latent_channels: 4, norm_groups: 2, scaling_factor: 0.9}
data: {shards: nowhere, source: pixels, sizes: [[9, 32, 32]], fps: 8, tokens_per_pack: 80, packs_per_step: 1}
train: {steps: 4, learning_rate: 3.0e-3, precision: fp32, zero_stage: 0, ema_decay: 0.9}
checkpoint: {every: 4}
"""
Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of ``python launch/convert.py ARGUMENTS``, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        return outcome("convert", importlib.import_module("launch.convert").main)

    return run


@pytest.fixture
def done(command: Callable[..., tuple[int, str, str]]) -> Command:
    """What the command says, which must succeed."""

    def run(*arguments: object) -> str:
        code, stdout, stderr = command(*arguments)
        assert code == 0, stderr
        assert stdout.splitlines()[-1] == str(arguments[2])
        return stdout

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, whose averaged weights are half of its last."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.yaml").write_text(RUN.replace("RUN", str(folder)))
    config = load_config(VAERun, [folder / "run.yaml"])
    weights = {name: p.detach() for name, p in build_vae(config).named_parameters()}
    (folder / "config.yaml").write_text(to_yaml(config))
    state = {"weights": weights, "ema": {name: tensor / 2 for name, tensor in weights.items()}}
    commit(folder / "ckpt", state, saved=Saved(7, 2, {}, {}))
    return folder


def weights_of(run: Path, factor: float = 1.0) -> dict[str, Tensor]:
    vae = build_vae(load_config(VAERun, [run / "run.yaml"]))
    return {name: p.detach() * factor for name, p in vae.named_parameters()}


def same(found: VAE | DiT, expected: dict[str, Tensor]) -> None:
    parameters = dict(found.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, tensor in expected.items():
        assert parameters[name].dtype == tensor.dtype and torch.equal(parameters[name], tensor), name


@pytest.mark.parametrize(("weights", "factor"), [("ema", 0.5), ("raw", 1.0)])
def test_a_run_goes_everywhere_and_back_bit_by_bit(
    done: Command, run: Path, tmp_path: Path, weights: str, factor: float
) -> None:
    expected = weights_of(run, factor)
    folder, file, ours = tmp_path / "vae", tmp_path / "3d-vae.pt", tmp_path / "ours"
    unproved = {"diffusers": ("--no-verify",)}  # other tests prove it
    for kind, out in (("diffusers", folder), ("sat-vae", file), ("native", ours)):
        done(kind, run, out, "--weights", weights, *unproved.get(kind, ()))
    for found in (hf.load_vae(folder), sat.load_vae(file).vae, native.load(ours)):
        same(found, expected)
        assert found.config == CONFIG
    # Any of the three into any of the three, without a word about shape or scaling factor.
    for source in (folder, file, ours):
        for kind, out in (("diffusers", "again"), ("sat-vae", "again.pt"), ("native", "own")):
            done(kind, source, tmp_path / out, *unproved.get(kind, ()))
        for found in (
            hf.load_vae(tmp_path / "again"), sat.load_vae(tmp_path / "again.pt").vae, native.load(tmp_path / "own")
        ):  # fmt: skip
            same(found, expected)
            assert found.config == CONFIG
    first, second = (folder / hf.WEIGHTS, tmp_path / "again" / hf.WEIGHTS)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_every_format_is_written_in_the_dtype_asked_for(
    done: Command, run: Path, tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:
    expected = {name: tensor.to(kind) for name, tensor in weights_of(run, 0.5).items()}
    said = done("diffusers", run, tmp_path / "vae", "--dtype", dtype, "--verify")
    assert said.startswith("largest difference to diffusers, of the largest value: mean ")
    done("sat-vae", run, tmp_path / "3d-vae.pt", "--dtype", dtype)
    done("native", run, tmp_path / "ours", "--dtype", dtype)
    same(hf.load_vae(tmp_path / "vae"), expected)
    same(sat.load_vae(tmp_path / "3d-vae.pt").vae, expected)
    same(native.load(tmp_path / "ours"), expected)


def test_the_vae_of_a_fine_tuned_model_becomes_a_folder_and_what_is_left_out_is_listed(
    done: Command, tmp_path: Path
) -> None:
    file, shape = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "shape.json"
    torch.save(fine_tuned(random_vae(torch.float32)), file)
    hf.save_vae(random_vae(), tmp_path / "shape")
    shape = tmp_path / "shape" / "config.json"
    said = done("diffusers", file, tmp_path / "vae", "--vae-config", shape, "--verify").splitlines()
    assert said[:-2] == [
        "the VAE is what lies under first_stage_model.*",
        *(f"{count} tensors of {name}.* left out, which are no part of the autoencoder" for name, count in
          (("model", 2), ("conditioner", 2), ("first_stage_model.loss", 1))),
    ]  # fmt: skip
    same(hf.load_vae(tmp_path / "vae"), dict(random_vae(torch.float32).named_parameters()))
    assert json.loads((tmp_path / "vae" / "config.json").read_text()) == json.loads(shape.read_text())
    done("native", file, tmp_path / "ours", "--vae-config", shape, "--prefix", "first_stage_model.")
    same(native.load(tmp_path / "ours"), dict(random_vae(torch.float32).named_parameters()))


def test_an_export_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    vae = random_vae()
    hf.save_vae(vae, tmp_path / "vae")
    with torch.no_grad():
        vae.decoder.levels[2].blocks[1].conv2.bias += 1e-6
    with pytest.raises(ValueError, match=r"diffusers loads another decoder.up_blocks.2.resnets.1.conv2.conv.bias than"):
        release.verify(vae, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"norm_num_groups": fields["norm_num_groups"] // 2}))
    with pytest.raises(ValueError, match=r"diffusers computes something else than we do: mean \S+, .* decoded"):
        release.verify(random_vae(), tmp_path / "vae")
    path.write_text(json.dumps(fields))
    path = tmp_path / "vae" / "config.json"
    path.write_text(path.read_text().replace("0.9", "0.8"))
    with pytest.raises(ValueError, match="diffusers finds scaling_factor 0.8, not ours"):
        release.verify(random_vae(), tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / hf.WEIGHTS)
    tensors["surplus"] = torch.zeros(1)
    save_file(tensors, tmp_path / "vae" / hf.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="diffusers finds unexpected_keys surplus in the export"):
        release.verify(random_vae(), tmp_path / "vae")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("diffusers", "file", "out"), 1, "holds tensors alone; give the scaling factor of its release"),
        (
            ("diffusers", "file", "out", "--scaling-factor", "0.7"),
            1,
            "lacks tensors",
        ),  # the released shape, not this one
        (("native", "file", "out", "--scaling-factor", "-1"), 1, "scaling_factor is -1.0; it must be positive"),
        (("diffusers", "file", "out", "--vae-config", "none.json"), 1, "none.json: no such file"),
        (
            ("sat-vae", "file", "out", "--prefix", "ema.", "--vae-config", "vae/config.json"),
            1,
            'under the prefix "ema."',
        ),
        (("native", "vae", "out", "--scaling-factor", "0.7"), 78, "and --prefix are for a file of SAT alone"),
        (("native", "vae", "out", "--prefix", "x."), 78, "and --prefix are for a file of SAT alone"),
        (("sat-vae", "dit", "out"), 78, "dit is a transformer; expected an autoencoder"),
        (("native", "pipeline", "out"), 78, "describes a UNet; expected a CogVideoX"),
    ],
)
def test_what_cannot_be_converted_is_named_in_one_line(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    arguments: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    hf.save_vae(random_vae(), tmp_path / "vae")
    sat.save_vae(random_vae(), tmp_path / "file")
    content = torch.load(tmp_path / "file", weights_only=True)
    del content["vae_config"]
    torch.save(content, tmp_path / "file")
    dit = DiT(tiny("cogvideox-5b"))
    draw_parameters(dit, 0)
    hf.save_transformer(dit, tmp_path / "dit")
    hf.write_json(tmp_path / "pipeline" / "config.json", {"_class_name": "UNet"})
    found, _, stderr = command(*arguments)
    assert (found, len(stderr.splitlines())) == (code, 1), stderr
    assert message in stderr


def test_a_transformer_comes_back_from_our_own_names(done: Command, tmp_path: Path) -> None:
    dit = DiT(tiny("cogvideox-5b"))
    draw_parameters(dit, 0)
    hf.save_transformer(dit, tmp_path / "dit")
    done("native", tmp_path / "dit", tmp_path / "ours")
    found = native.load(tmp_path / "ours")
    same(found, dict(dit.named_parameters()))
    assert found.config == dit.config
    done("diffusers", tmp_path / "ours", tmp_path / "again")
    assert (tmp_path / "again" / hf.WEIGHTS).read_bytes() == (tmp_path / "dit" / hf.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(colour="blue"), "model.json: unknown field colour of a VAE's configuration"),
        (lambda c: c.pop("norm_eps"), "model.json: missing field norm_eps"),
        (lambda c: c.update(latent_channels="4"), "model.json: latent_channels: "),
        (lambda c: c.update({"class": "UNet"}), "model.json: class is 'UNet'; expected one of DiT, VAE"),
        (lambda c: c.update(latent_channels=8), r"weights.safetensors: tensor \S+ has shape \(.*\), expected \("),
        (lambda c: c.update(layers_per_block=2), "weights.safetensors lacks tensors"),
    ],
)
def test_our_own_folder_is_read_strictly(
    tmp_path: Path, edit: Callable[[dict[str, object]], object], message: str
) -> None:
    native.save(random_vae(), tmp_path)
    fields = json.loads((tmp_path / "model.json").read_text())
    edit(fields)
    (tmp_path / "model.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        native.load(tmp_path)


def test_sat_configurations_become_one_of_ours_and_the_account_goes_to_stderr(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    files, out = write_files(tmp_path, "5b", lora=16), tmp_path / "new" / "ours.yaml"
    code, stdout, stderr = command("sat-config", *files, "--out", out, "--run-dir", "runs/mine", "--gpus", 4)
    assert (code, stdout) == (0, f"{out}\n")
    config = load_config(DiTRun, [out])
    assert (config.run.dir, config.data.packs_per_step) == ("runs/mine", 4)
    assert config.lora is not None and config.lora.rank == 16
    assert "without counterpart: look at these (1)\n  data.params.skip_frms_num  " in stderr
    # Without --out the same file goes to stdout, but for the name that it has in its own header.
    code, stdout, again = command("sat-config", *files, "--run-dir", "runs/mine", "--gpus", 4)
    assert (code, again) == (0, stderr)
    assert stdout.replace("translated.yaml", str(out)) == out.read_text()
    code, stdout, stderr = command("sat-config", *files, "--out", out)
    assert (code, stdout) == (78, "") and stderr.count("\n") == 1
    assert "ours.yaml is there already; remove it or give another --out" in stderr
    code, stdout, stderr = command("sat-config", files[1])
    assert (code, stdout) == (78, "") and stderr.count("\n") == 1 and "model.network_config is missing" in stderr


@pytest.mark.parametrize("lora", [None, 4])
def test_a_translated_configuration_trains(
    command: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path, lora: int | None
) -> None:
    """SAT's 5B at the size of toys; what only the user knows, where the sets and the frozen models lie, is an override."""
    sizes = {
        "num_layers: 42": "num_layers: 2", "hidden_size: 3072": "hidden_size: 32",
        "num_attention_heads: 48": "num_attention_heads: 2",
        "time_embed_dim: 512": "time_embed_dim: 16", "hidden_size_head: 64": "hidden_size_head: 16",
        "text_hidden_size: 4096": "text_hidden_size: 16", ": 226": f": {LENGTH}", "num_frames: 49": "num_frames: 9",
        "latent_width: 90": "latent_width: 4", "latent_height: 60": "latent_height: 4", "[ 480, 720 ]": "[ 32, 32 ]",
        "max_num_frames: 49": "max_num_frames: 9", "train_iters: 1000": "train_iters: 2",
        "    enabled: True": "    enabled: False",
        "log_interval: 20": "log_interval: 1", "num_workers: 8": "num_workers: 0", "eval_interval: 100": "eval_interval: 2",
        '  load: "{your CogVideoX SAT folder}/transformer"\n': "",
    }  # fmt: skip
    files, out = write_files(tmp_path, "5b", lora=lora), tmp_path / "ours.yaml"
    for file in files:
        text = file.read_text()
        for old, new in sizes.items():
            text = text.replace(old, new)
        file.write_text(text)
    run = tmp_path / "run"
    code, _, stderr = command("sat-config", *files, "--out", out, "--run-dir", run, "--gpus", 2)
    assert code == 0, stderr
    places = [
        f"data.shards={world.root / 'shards'}",
        f"frozen.vae={world.root / 'vae'}",
        f"frozen.text={world.root / 'text'}",
    ]
    run_ranks(train, 1, out, places)
    logged = read_log(run)
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
    assert [line["step"] for line in logged if "held_out/loss" in line] == [0, 2]
