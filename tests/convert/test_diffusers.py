"""diffusers folders: every variant comes back bit by bit, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.dit_config import dit_config_to_diffusers
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import RELEASED, tiny

SMALL_VAE = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}


def same_files(first: Path, second: Path) -> None:
    a, b = (load_file(folder / hf.WEIGHTS) for folder in (first, second))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RELEASED)
def test_transformer_round_trip_is_bitwise(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fields = {key: v for key, v in dit_config_to_diffusers(tiny(name)).items() if key != "_class_name"}
    theirs = CogVideoXTransformer3DModel(**fields).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    hf.save_transformer(hf.load_transformer(tmp_path / "theirs"), tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    fields = {key: v for key, v in dit_config_to_diffusers(tiny("cogvideox-5b")).items() if key != "_class_name"}
    theirs = CogVideoXTransformer3DModel(**fields)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    hf.save_transformer(hf.load_transformer(tmp_path / "parts"), tmp_path / "ours")
    same_files(tmp_path / "whole", tmp_path / "ours")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_files_are_divided_by_size_as_the_public_library_divides_them(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = DiT(tiny("cogvideox-5b"))
    draw_parameters(model, 0)
    hf.save_transformer(model, tmp_path / "ours", storage=hf.Storage(dtype, 100_000))
    theirs, loading = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "ours", torch_dtype=dtype, output_loading_info=True
    )
    assert not any(loading.values())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    indices = []
    for side in ("ours", "theirs"):  # of the order of tensors, and so of the number of files, each has its own idea
        indices.append(json.loads((tmp_path / side / f"{hf.WEIGHTS}.index.json").read_text()))
        names = sorted(set(indices[-1]["weight_map"].values()))
        stem, count = Path(hf.WEIGHTS).stem, len(names)
        assert names == [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] and count > 1
        assert sorted(path.name for path in (tmp_path / side).glob("*.safetensors")) == names
    ours, public = indices
    assert ours["weight_map"].keys() == public["weight_map"].keys()
    size = (2 if dtype else 4) * sum(p.numel() for p in model.parameters())
    assert ours["metadata"] == {"total_size": size}
    for name in set(ours["weight_map"].values()):
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / "ours" / name).values()) <= 100_000
    again = hf.load_transformer(tmp_path / "ours")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.to(dtype))


def test_a_tensor_larger_than_a_file_may_be_has_its_own(tmp_path: Path) -> None:
    model = DiT(tiny("cogvideox-5b"))
    draw_parameters(model, 0)
    hf.save_transformer(model, tmp_path, storage=hf.Storage(shard_size=1))
    index = json.loads((tmp_path / f"{hf.WEIGHTS}.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == len(index)
    hf.save_transformer(model, tmp_path)  # nothing of the other division is left to be read
    assert [path.name for path in tmp_path.glob("diffusion*")] == [hf.WEIGHTS]
    hf.load_transformer(tmp_path)


@pytest.mark.parametrize(("value", "dtype", "message"), [
    (1e5, torch.float16, "norm_final.bias has values that are beyond what float16 holds; write bf16 or fp32"),
    (float("nan"), None, "norm_final.bias has values that are NaN or infinite"),
])  # fmt: skip
def test_values_that_a_release_must_not_have_are_named(
    value: float, dtype: torch.dtype | None, message: str, tmp_path: Path
) -> None:
    model = DiT(tiny("cogvideox-5b"))
    draw_parameters(model, 0)
    with torch.no_grad():
        model.head.norm_final.bias[0] = value
    with pytest.raises(ValueError, match=message):
        hf.save_transformer(model, tmp_path, storage=hf.Storage(dtype))


def test_vae_round_trip_is_bitwise(tmp_path: Path) -> None:
    AutoencoderKLCogVideoX(**SMALL_VAE).save_pretrained(tmp_path / "theirs")
    hf.save_vae(hf.load_vae(tmp_path / "theirs"), tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    AutoencoderKLCogVideoX.from_pretrained(tmp_path / "ours")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = DiT(tiny("cogvideox-5b"))
    draw_parameters(model, 0)
    hf.save_transformer(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize(("change", "message"), [
    ("missing", "lacks tensor norm_final.bias"),
    ("extra", "has the unknown tensor surplus"),
    ("misshapen", r"norm_final.bias has shape \(3,\), expected \(48,\)"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: str, message: str) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    if change == "missing":
        del tensors["norm_final.bias"]
    elif change == "extra":
        tensors["surplus"] = torch.zeros(1)
    else:
        tensors["norm_final.bias"] = torch.zeros(3)
    save_file(tensors, folder / hf.WEIGHTS)
    with pytest.raises(ValueError, match=message):
        hf.load_transformer(folder)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("activation_fn", "relu", "only 'gelu-approximate' is supported"),
    ("num_lairs", 3, "unknown field 'num_lairs'"),
    ("_class_name", "UNet", "expected a CogVideoXTransformer3DModel"),
])  # fmt: skip
def test_a_configuration_that_is_not_computed_is_refused(folder: Path, field: str, value: object, message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        hf.load_transformer(folder)


def test_a_damaged_or_absent_file_is_named(folder: Path) -> None:
    path = folder / hf.WEIGHTS
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        hf.load_transformer(folder)
    path.unlink()
    with pytest.raises(ValueError, match="safetensors only"):
        hf.load_transformer(folder)


def test_an_index_cannot_point_outside(folder: Path) -> None:
    (folder / f"{hf.WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        hf.load_transformer(folder)
