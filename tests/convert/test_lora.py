"""Adapters as public files: every linear of every variant, with its strength, in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideo_dist.config.adaptation import LINEARS, OTHERS, Adapter
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.dit_config import dit_config_to_diffusers
from cogvideo_dist.convert.lora import FILE, METADATA, load_lora, modules_of, save_lora
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.lora import adapt, is_adapter, sites
from cogvideo_dist.models.presets import RELEASED, DiTConfig, tiny
from launch import release_proof as proof


def open_model(config: DiTConfig) -> DiT:
    """All gates open, so that every linear matters."""
    model = DiT(config)
    draw_parameters(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def targets_of(config: DiTConfig) -> list[str]:
    with torch.device("meta"):
        return list(dict.fromkeys(site.target for site in sites(DiT(config))))


def adapted(config: DiTConfig, adapters: dict[str, Adapter]) -> DiT:
    model = open_model(config)
    adapt(model, adapters)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapters_of(model: DiT) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if is_adapter(name)}


def every_linear(config: DiTConfig) -> dict[str, Adapter]:
    """Each with a rank and a strength of its own."""
    return {name: Adapter(2 + number % 3, 1.5 + number) for number, name in enumerate(targets_of(config))}


def public_base(model: DiT, folder: Path) -> Any:
    """The public transformer of the model without its adapters."""
    plain = DiT(model.config)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if not is_adapter(name)})
    hf.save_transformer(plain, folder)
    return proof.public_transformer(folder, model.config, wanted={})


def pipeline_of(transformer: Any) -> CogVideoXPipeline:
    return CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)


@pytest.mark.parametrize("name", RELEASED)
def test_the_public_library_adds_what_we_add_to_every_linear(name: str, tmp_path: Path) -> None:
    model = adapted(tiny(name), every_linear(tiny(name)))
    written = save_lora(model, tmp_path / "lora")
    theirs = public_base(model, tmp_path / "base")
    before = proof.public_forward(theirs, model.config)["forward"]
    pipeline_of(theirs).load_lora_weights(tmp_path / "lora")
    after = proof.public_forward(theirs, model.config)["forward"]
    ours = proof.own_forward(model)["forward"]
    assert proof.relative(after, ours) <= 1e-6
    assert proof.relative(before, ours) > 0.1  # without the adapters it is something else
    # A block's modulation is two public linears, every other linear of ours is one.
    assert len(written) == len(list(sites(model))) + model.config.layers


@pytest.mark.parametrize("name", RELEASED)
def test_a_public_file_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    adapters = every_linear(tiny(name))
    model = adapted(tiny(name), adapters)
    save_lora(model, tmp_path)
    again = open_model(tiny(name))
    assert load_lora(again, tmp_path / FILE) == adapters
    found, expected = adapters_of(again), adapters_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_all_that_a_run_may_adapt_has_a_public_place() -> None:
    targets = {module.target for name in RELEASED for module in modules_of(tiny(name))}
    assert targets == set(LINEARS + OTHERS)


def test_names_ranks_and_alphas_are_those_of_the_public_format(tmp_path: Path) -> None:
    adapters = {"q": Adapter(4, 8.0), "k": Adapter(4, 8.0), "out": Adapter(2, 3.5)}
    save_lora(adapted(replace(tiny("cogvideox-5b"), layers=1), adapters), tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}
        about = json.loads(file.metadata()[METADATA])
    block = "transformer.transformer_blocks.0.attn1"
    assert shapes == {
        f"{block}.to_q.lora_A.weight": ([4, 48], "BF16"), f"{block}.to_q.lora_B.weight": ([48, 4], "BF16"),
        f"{block}.to_k.lora_A.weight": ([4, 48], "BF16"), f"{block}.to_k.lora_B.weight": ([48, 4], "BF16"),
        f"{block}.to_out.0.lora_A.weight": ([2, 48], "BF16"), f"{block}.to_out.0.lora_B.weight": ([48, 2], "BF16"),
    }  # fmt: skip
    assert about["transformer.r"] == 4 and about["transformer.lora_alpha"] == 8
    assert about["transformer.rank_pattern"] == {"transformer_blocks.0.attn1.to_out.0": 2}
    assert about["transformer.alpha_pattern"] == {"transformer_blocks.0.attn1.to_out.0": 3.5}


# What others train: the usual four, one half of a modulation, both halves with factors of their own, another rank in one block.
FOREIGN: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
    {"r": 4, "lora_alpha": 8, "target_modules": ["norm1.linear", "ff.net.0.proj", "proj_out"]},
    {"r": 3, "lora_alpha": 6, "target_modules": ["norm1.linear", "norm2.linear"], "alpha_pattern": {"norm2.linear": 1}},
    {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "rank_pattern": {"transformer_blocks.1.attn1.to_q": 2}},
    {"r": 2, "lora_alpha": 2, "target_modules": ["patch_embed.proj", "transformer_blocks.1.ff.net.2"]},
]


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("settings", FOREIGN)
def test_a_file_of_the_public_library_means_the_same_here(
    settings: dict[str, Any], with_metadata: bool, tmp_path: Path
) -> None:
    model = open_model(tiny("cogvideox-5b"))
    theirs = public_base(model, tmp_path / "base")
    theirs.add_adapter(LoraConfig(init_lora_weights=False, **settings), adapter_name="default")
    layers = {name: tensor * 3 for name, tensor in get_peft_model_state_dict(theirs, adapter_name="default").items()}
    about = _collate_lora_metadata({"transformer": theirs}) if with_metadata else {}
    CogVideoXPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers, **about)
    fresh = proof.public_transformer(tmp_path / "base", model.config, wanted={})
    pipeline_of(fresh).load_lora_weights(tmp_path / "lora")
    before = proof.own_forward(open_model(model.config))["forward"]
    load_lora(model, tmp_path / "lora" / FILE)
    ours = proof.own_forward(model)["forward"]
    assert proof.relative(proof.public_forward(fresh, model.config)["forward"], ours) <= 1e-6
    assert proof.relative(before, ours) > 1e-3


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if old in name)
        tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def without(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if part in name)]

    return change


def reshaped(part: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[next(name for name in tensors if part in name)] = torch.zeros(shape)

    return change


@pytest.mark.parametrize(("change", "message"), [
    (renamed("transformer.", "text_encoder."), r"text_encoder\S+ is not understood; expected transformer\.<module>"),
    (renamed("lora_A.weight", "dora_scale"), r"to_q.dora_scale is not understood"),
    (without("to_q.lora_A"), r"transformer_blocks.0.attn1.to_q has only one of .lora_A.weight and .lora_B.weight"),
    (reshaped("to_q.lora_A", 3, 48), r"the factors of transformer_blocks.0.attn1.to_q have ranks 3 and 4"),
    (reshaped("to_q.lora_A", 4, 40), r"to_q goes from 40 to 48 features, here \(48, 48\)"),
])  # fmt: skip
def test_a_file_that_is_not_of_this_transformer_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    save_lora(adapted(tiny("cogvideox-5b"), {"q": Adapter(4, 4.0)}), tmp_path)
    tensors = load_file(tmp_path / FILE)
    change(tensors)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        load_lora(open_model(tiny("cogvideox-5b")), tmp_path / FILE)


@pytest.mark.parametrize(("text", "message"), [
    ("[1]", "says no transformer.lora_alpha"),
    ('{"transformer.lora_alpha": "4"}', "expected numbers above 0"),
    ('{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": NaN}}', "expected numbers above 0"),
    ('{"transformer.lora_alpha": 4, "transformer.use_dora": true}', "adapters with use_dora are not supported"),
])  # fmt: skip
def test_metadata_that_means_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    save_lora(adapted(tiny("cogvideox-5b"), {"q": Adapter(4, 4.0)}), tmp_path)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata={METADATA: text})
    with pytest.raises(ValueError, match=message):
        load_lora(open_model(tiny("cogvideox-5b")), tmp_path / FILE)


def test_adapters_of_more_blocks_than_the_model_has_are_refused(tmp_path: Path) -> None:
    save_lora(adapted(tiny("cogvideox-5b"), {"q": Adapter(4, 4.0)}), tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn1.to_q is no linear of this transformer"):
        load_lora(open_model(replace(tiny("cogvideox-5b"), layers=1)), tmp_path / FILE)


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = adapted(tiny("cogvideox-5b"), {"q": Adapter(4, 4.0)})
    with torch.no_grad():
        model.blocks[0].lora["q"].b[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"attn1.to_q.lora_B.weight has values that are not finite in float16"):
        save_lora(model, tmp_path / "lora", dtype=torch.float16)
    assert not (tmp_path / "lora").exists()


def test_the_public_transformer_takes_the_released_shapes() -> None:
    """Names alone, at full width and without weights."""
    for name in RELEASED:
        config = replace(RELEASED[name], layers=1)
        fields = {key: value for key, value in dit_config_to_diffusers(config).items() if key[0] != "_"}
        with torch.device("meta"):
            linears = dict(CogVideoXTransformer3DModel.from_config(fields).named_modules())
        for module in modules_of(config):
            weight = linears[module.name].weight
            assert (weight[0].numel(), weight.shape[0]) == module.features, (name, module.name)
