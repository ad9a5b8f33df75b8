"""The VAE in files of SAT: there and back bit by bit, the same pixels as diffusers, and nothing overlooked."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import sat
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models.vae import VAE, VAEConfig

CONFIG = VAEConfig(
    block_out_channels=(4, 4, 8, 8), norm_groups=2, latent_channels=4, layers_per_block=1, scaling_factor=0.9
)

ROWS = vae_names(CONFIG)


def random_vae(dtype: torch.dtype = torch.float64) -> VAE:
    vae = VAE(CONFIG).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return vae


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(found: VAE, expected: VAE) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """As released: without a configuration."""
    sat.save_vae(random_vae(), tmp_path / "3d-vae.pt")
    change(tmp_path / "3d-vae.pt", lambda content: content.pop("vae_config"))
    return tmp_path / "3d-vae.pt"


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_there_and_back_is_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    vae = random_vae(dtype)
    sat.save_vae(vae, tmp_path / "new" / "3d-vae.pt")
    again, prefix, left_out = sat.load_vae(tmp_path / "new" / "3d-vae.pt")
    assert (prefix, left_out) == ("", {}) and again.config == CONFIG
    for (name, found), expected in zip(again.named_parameters(), vae.parameters(), strict=True):
        assert found.dtype == dtype and torch.equal(found, expected), name
    sat.save_vae(again, tmp_path / "again.pt")
    first, second = (torch.load(tmp_path / path, weights_only=True) for path in ("new/3d-vae.pt", "again.pt"))
    assert list(first) == ["state_dict", "vae_config"] and list(first["state_dict"]) == list(second["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(*(x["state_dict"].values() for x in (first, second)), strict=True))


def test_the_file_has_the_names_of_sat(file: Path) -> None:
    tensors = torch.load(file, weights_only=True)["state_dict"]
    state = random_vae().state_dict()
    assert tensors.keys() == {row.sat for row in vae_names(CONFIG)}
    assert all(torch.equal(tensors[row.sat], state[row.ours]) for row in vae_names(CONFIG))
    assert tensors["decoder.up.2.block.0.norm1.conv_y.conv.weight"].shape == (8, 4, 1, 1, 1)
    assert tensors["encoder.down.2.block.0.nin_shortcut.weight"].shape == (8, 4, 1, 1, 1)


@torch.no_grad()
def test_diffusers_to_sat_and_back_gives_the_pixels_of_diffusers(tmp_path: Path) -> None:
    hf.save_vae(random_vae(), tmp_path / "vae")
    theirs: Any = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae", torch_dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    sat.save_vae(hf.load_vae(tmp_path / "theirs"), tmp_path / "3d-vae.pt")
    ours = sat.load_vae(tmp_path / "3d-vae.pt").vae
    video = drawn(1, 3, 17, 16, 24).clamp(-1, 1)
    posterior, expected = ours.encode(video, "chunked"), theirs.encode(video).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=1e-9)
    decoded, whole = ours.decode(expected.mean, "chunked"), ours.decode(expected.mean)
    torch.testing.assert_close(decoded, theirs.decode(expected.mean).sample, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole, theirs.decoder(expected.mean)[0], rtol=0, atol=1e-9)


def test_what_belongs_to_the_loss_is_left_out_and_counted(file: Path) -> None:
    extra = {f"loss.perceptual_loss.lin{i}.weight": torch.zeros(2) for i in range(5)}
    change(file, lambda content: content["state_dict"].update(extra))
    change(file, lambda content: content.update(epoch=3))  # as Lightning has it
    vae, prefix, left_out = sat.load_vae(file, CONFIG)
    assert (prefix, left_out) == ("", {"loss": 5})
    same(vae, random_vae())


def fine_tuned(vae: VAE, *, prefix: str = "first_stage_model.") -> dict[str, Any]:
    """What SAT and DeepSpeed save of a whole model, generators' states and all."""
    state = vae.state_dict()
    module = OrderedDict(
        {
            "model.diffusion_model.time_embed.0.weight": torch.randn(4, 4).bfloat16(),
            "model.diffusion_model.mixins.final_layer.linear.bias": torch.randn(4).bfloat16(),
            "conditioner.embedders.0.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(4, 4),
            "conditioner.embedders.0.positions": torch.arange(3),
            **{prefix + row.sat: state[row.ours] for row in vae_names(vae.config)},
            prefix + "loss.perceptual_loss.lin0.weight": torch.zeros(2),
        }
    )
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in module.items())],
        "lr_scheduler": {"num_iters": 7},
        "sparse_tensor_module_names": set(),
        "ds_config": {"train_batch_size": 2, "zero_optimization": {"stage": 2}},
        "iteration": 7,
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_vae_of_a_fine_tuned_model_is_found(tmp_path: Path, zipped: bool, dtype: torch.dtype) -> None:
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(fine_tuned(random_vae(dtype)), file, _use_new_zipfile_serialization=zipped)
    vae, prefix, left_out = sat.load_vae(file, CONFIG)
    same(vae, random_vae(dtype))
    assert prefix == "first_stage_model."
    assert left_out == {"model": 2, "conditioner": 2, "first_stage_model.loss": 1}


@pytest.mark.parametrize(("first", "second"), [("first_stage_model.", "ema.first_stage_model."), ("", "ema.")])
def test_of_two_vaes_one_is_chosen(tmp_path: Path, first: str, second: str) -> None:
    other = random_vae()
    for parameter in other.parameters():
        parameter.data.neg_()
    state = {p + row.sat: v.state_dict()[row.ours] for p, v in ((first, random_vae()), (second, other)) for row in ROWS}
    file = tmp_path / "3d-vae.pt"
    torch.save({"state_dict": state}, file)
    with pytest.raises(ValueError, match='2 VAEs in it, under the prefixes ".*" and ".*"; choose one with --prefix'):
        sat.load_vae(file, CONFIG)
    same(sat.load_vae(file, CONFIG, prefix=first).vae, random_vae())
    vae, prefix, left_out = sat.load_vae(file, CONFIG, prefix=second)
    same(vae, other)
    assert prefix == second and sum(left_out.values()) == len(ROWS)
    with pytest.raises(ValueError, match='no VAE under the prefix "x."; it is under'):
        sat.load_vae(file, CONFIG, prefix="x.")


def test_the_scaling_factor_travels_and_another_is_refused(tmp_path: Path) -> None:
    sat.save_vae(random_vae(), tmp_path / "3d-vae.pt")
    hf.save_vae(sat.load_vae(tmp_path / "3d-vae.pt").vae, tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"] == 0.9
    assert hf.load_vae(tmp_path / "vae").config == CONFIG
    with pytest.raises(ValueError, match=r"3d-vae.pt says itself that scaling_factor is 0.9, not 0.7"):
        sat.load_vae(tmp_path / "3d-vae.pt", replace(CONFIG, scaling_factor=0.7))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (7, "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ("{", "Expecting"),
        ('{"act_fn": "gelu"}', "act_fn"),
        ('{"scaling_factor": NaN}', "scaling_factor"),
        ('{"block_out_channels": 4}', "block_out_channels"),
    ],
)
def test_a_configuration_that_is_none_is_refused(file: Path, stored: object, message: str) -> None:
    change(file, lambda content: content.update(vae_config=stored))
    with pytest.raises(ValueError, match=f"3d-vae.pt: vae_config: .*{message}"):
        sat.load_vae(file)


def test_a_file_of_tensors_alone_needs_a_configuration(file: Path) -> None:
    with pytest.raises(ValueError, match=r"3d-vae.pt holds tensors alone; give the scaling factor .*--scaling-factor"):
        sat.load_vae(file)


FIRST = "encoder.conv_in.conv.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["state_dict"].pop("encoder.conv_in.conv.bias"), "lacks tensor encoder.conv_in.conv.bias; give"),
        (lambda c: c["state_dict"].pop(FIRST), f"lacks tensor {FIRST}; give the whole file"),
        (lambda c: c["state_dict"].update(quant=torch.zeros(1)), "has the unknown tensor quant; give"),
        (lambda c: c["state_dict"].update({"lossy.x": torch.zeros(1)}), "has the unknown tensor lossy.x"),
        (
            lambda c: c["state_dict"].update({"encoder.norm_out.bias": torch.zeros(3)}),
            r"encoder.norm_out.bias has shape \(3,\), expected \(8,\); give",
        ),
        (lambda c: c["state_dict"].update({"encoder.norm_out.bias": 3}), "encoder.norm_out.bias is no dense"),
        (
            lambda c: c["state_dict"].update({"encoder.norm_out.bias": torch.zeros(8).to_sparse()}),
            "encoder.norm_out.bias is no dense",
        ),
        (
            lambda c: c["state_dict"].update({"encoder.norm_out.bias": torch.zeros(8, dtype=torch.int64)}),
            "encoder.norm_out.bias is no dense",
        ),
        (lambda c: c["state_dict"].update({7: torch.zeros(1)}), "under 7, which is no name"),
        (lambda c: c.pop("state_dict"), 'no dictionary "state_dict" .* or "module"'),
        (lambda c: c.update(state_dict=[1]), 'no dictionary "state_dict"'),
        (lambda c: c.update(module={}), 'both dictionary "state_dict" .* and "module"'),
        (lambda c: c.update(state_dict={}), r"\(empty\): no VAE in it"),
        (
            lambda c: c.update(state_dict={"model.diffusion_model.x": torch.zeros(1)}),
            r"\(1 under model.\*\): no VAE in it, .*; give a 3d-vae.pt",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    file: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(file, edit)
    with pytest.raises(ValueError, match=message) as refusal:
        sat.load_vae(file, CONFIG)
    assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)


def test_tensors_of_a_fine_tuned_model_are_named_in_full(tmp_path: Path) -> None:
    content = fine_tuned(random_vae())
    del content["module"]["first_stage_model.decoder.conv_in.conv.bias"]
    torch.save(content, tmp_path / "states.pt")
    with pytest.raises(ValueError, match=r"states.pt lacks tensor first_stage_model.decoder.conv_in.conv.bias; give"):
        sat.load_vae(tmp_path / "states.pt", CONFIG)


def test_the_shape_of_another_vae_is_refused_by_name(file: Path) -> None:
    with pytest.raises(ValueError, match=r"3d-vae.pt lacks tensors .* and \d+ more; give .*the configuration"):
        sat.load_vae(file, VAEConfig())
