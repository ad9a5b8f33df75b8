"""The VAE's names and configuration against diffusers' own class."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvideo_dist.convert.diffusers import vae_rows
from cogvideo_dist.convert.names import from_foreign, to_foreign
from cogvideo_dist.convert.vae_config import config_from_diffusers, config_to_diffusers
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models.vae import VAE, VAEConfig

TINY = VAEConfig(block_out_channels=(8, 16, 24), norm_groups=4, layers_per_block=2, temporal_compression=2)


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config", [VAEConfig(), TINY], ids=["released", "tiny"])
def test_every_tensor_maps_one_to_one_onto_diffusers(config: VAEConfig) -> None:
    with torch.device("meta"):
        ours = shapes(VAE(config))
        theirs = shapes(AutoencoderKLCogVideoX.from_config(config_to_diffusers(config)))
    rows = vae_names(config)
    assert sorted(row.ours for row in rows) == sorted(ours)
    assert sorted(row.diffusers for row in rows) == sorted(theirs)
    assert len({row.sat for row in rows}) == len(rows)
    assert {row.diffusers: ours[row.ours] for row in rows} == theirs


def test_the_released_vae_has_its_436_tensors_and_215583907_parameters() -> None:
    assert len(vae_names(VAEConfig())) == 436
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in VAE(VAEConfig()).parameters()) == 215_583_907


def test_sat_names_follow_its_published_conventions() -> None:
    sat = {row.diffusers: row.sat for row in vae_names(VAEConfig())}
    expected = {
        "encoder.conv_in.conv.weight": "encoder.conv_in.conv.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": "encoder.down.1.block.0.nin_shortcut.bias",
        "encoder.down_blocks.2.downsamplers.0.conv.weight": "encoder.down.2.downsample.conv.weight",
        "encoder.mid_block.resnets.1.norm2.weight": "encoder.mid.block_2.norm2.weight",
        "encoder.norm_out.bias": "encoder.norm_out.bias",
        "decoder.mid_block.resnets.0.conv1.conv.bias": "decoder.mid.block_1.conv1.conv.bias",
        "decoder.up_blocks.0.resnets.3.norm1.norm_layer.weight": "decoder.up.3.block.3.norm1.norm_layer.weight",
        "decoder.up_blocks.1.upsamplers.0.conv.bias": "decoder.up.2.upsample.conv.bias",
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.norm_out.conv_b.conv.weight": "decoder.norm_out.conv_b.conv.weight",
    }
    assert {name: sat[name] for name in expected} == expected


def test_the_configuration_says_all_that_diffusers_writes_and_survives_the_way_there_and_back() -> None:
    with torch.device("meta"):
        model: Any = AutoencoderKLCogVideoX.from_config(config_to_diffusers(TINY))
    written: dict[str, Any] = json.loads(model.to_json_string())
    del written["_diffusers_version"]
    assert written == json.loads(json.dumps(config_to_diffusers(TINY)))
    assert config_from_diffusers(written) == TINY


def test_fields_left_out_take_the_defaults_of_diffusers() -> None:
    with torch.device("meta"):
        model: Any = AutoencoderKLCogVideoX()
    written = json.loads(model.to_json_string())
    assert config_from_diffusers({}) == config_from_diffusers(written) == VAEConfig(scaling_factor=1.15258426)


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "AutoencoderKL"},
        {"colour": "blue"},
        {"use_quant_conv": True},
        {"act_fn": "gelu"},
        {"norm_eps": 1e-5},
        {"latents_mean": [0.0]},
        {"invert_scale_latents": "no"},
        {"temporal_compression_ratio": 2.5},
        {"latent_channels": "16"},
        {"latent_channels": float("inf")},
        {"scaling_factor": float("nan")},
        {"block_out_channels": 4},
        {"up_block_types": 4},
        {"block_out_channels": [32, 64]},
    ],
)
def test_what_the_vae_does_not_compute_is_refused_by_name(fields: dict[str, Any]) -> None:
    name = "down_block_types" if fields == {"block_out_channels": [32, 64]} else next(iter(fields))
    with pytest.raises(ValueError, match=name):
        config_from_diffusers(fields)


def test_an_epsilon_that_diffusers_cannot_express_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_eps"):
        config_to_diffusers(VAEConfig(norm_eps=1e-5))


def sat_layout() -> dict[str, tuple[int, ...]]:
    """The released VAE's tensors as SAT builds it: 128 channels times 1, 2, 2, 4, three blocks a level, one more on the way
    back, spatial norms with the latents' 16 channels in the decoder."""
    widths, found = (128, 256, 256, 512), {}

    def conv(name: str, *shape: int) -> None:
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def norm(name: str, width: int) -> None:
        if name.startswith("encoder"):
            conv(name, width)
        else:
            conv(f"{name}.norm_layer", width)
            conv(f"{name}.conv_y.conv", width, 16, 1, 1, 1)
            conv(f"{name}.conv_b.conv", width, 16, 1, 1, 1)

    def block(name: str, before: int, width: int) -> None:
        for i, channels in (("1", before), ("2", width)):
            norm(f"{name}.norm{i}", channels)
            conv(f"{name}.conv{i}.conv", width, channels, 3, 3, 3)
        if before != width:
            conv(f"{name}.nin_shortcut", width, before, 1, 1, 1)

    for half, ins, out, last in (("encoder", (3, 128), (32, 512), 3), ("decoder", (16, 512), (3, 128), 0)):
        conv(f"{half}.conv_in.conv", ins[1], ins[0], 3, 3, 3)
        norm(f"{half}.norm_out", out[1])
        conv(f"{half}.conv_out.conv", out[0], out[1], 3, 3, 3)
        for i in ("1", "2"):
            block(f"{half}.mid.block_{i}", 512, 512)
        before = ins[1]
        for i in range(4) if half == "encoder" else reversed(range(4)):
            way, change, count = ("down", "downsample", 3) if half == "encoder" else ("up", "upsample", 4)
            for j in range(count):
                block(f"{half}.{way}.{i}.block.{j}", before, widths[i])
                before = widths[i]
            if i != last:
                conv(f"{half}.{way}.{i}.{change}.conv", before, before, 3, 3)
    return found


def test_the_released_vae_has_the_layout_of_sat_and_comes_back_from_it() -> None:
    rows = vae_rows(VAEConfig())
    with torch.device("meta"):
        state = VAE(VAEConfig()).state_dict()
    foreign = to_foreign(state, rows, "sat")
    assert {name: tuple(tensor.shape) for name, tensor in foreign.items()} == sat_layout()
    sizes = {half: sum(t.numel() for n, t in foreign.items() if n.startswith(half)) for half in ("encoder", "decoder")}
    assert sizes == {"encoder": 92_215_456, "decoder": 123_368_451}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    again = from_foreign(foreign, rows, column="sat", shapes=shapes, source="released")
    assert {name: tensor.shape for name, tensor in again.items()} == shapes
