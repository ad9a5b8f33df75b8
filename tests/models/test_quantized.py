"""Weights in 8 bits: how many bytes they are, how little the video changes, and what is refused."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.models.quantized import Quantization, check_quantization, quantize, weight_bytes
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.tasks.sampling import Sampler
from tests.tasks.samplers import image_for, sampler_of, settings_of, text_of

CPU = torch.device("cpu")
NAMES = ("cogvideox-5b", "cogvideox1.5-5b-i2v")


def wide_sampler(name: str, dtype: torch.dtype) -> Sampler:
    """As wide as the demo's transformer, so that blocks hold nearly all weights, as they do in released models; weights as
    large as trained ones, gates open, so that a prompt changes the whole picture."""
    sampler = sampler_of(name, heads=8, head_dim=16, time_embed_dim=64, layers=4)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sampler.model.blocks.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
            elif len(parameter) == 12 * sampler.model.config.hidden:  # the modulation's bias
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return replace(sampler, model=sampler.model.to(dtype).eval())


def rendered(sampler: Sampler, name: str, *, text: int = 3) -> Tensor:
    return sampler.video(text_of(name, seed=text), settings_of(name, steps=3), seed=5, image=image_for(name)).clamp(
        -1, 1
    )


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, relative to the range of brightness that ``b`` really has."""
    return 10 * math.log10(float((b.max() - b.min()).square() / (a - b).square().mean()))


@cache
def in_full(name: str) -> tuple[int, Tensor, Tensor]:
    """Bytes of the weights in bfloat16, the video, and that of another prompt."""
    sampler = wide_sampler(name, torch.bfloat16)
    return weight_bytes(sampler.model), rendered(sampler, name), rendered(sampler, name, text=6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_take_half_the_bytes_and_the_video_stays(kind: Quantization, name: str) -> None:
    size, video, other = in_full(name)
    sampler = wide_sampler(name, torch.bfloat16)
    quantize(sampler.model, kind)
    assert weight_bytes(sampler.model) <= 0.55 * size
    found = psnr(rendered(sampler, name), video)
    assert 30 <= found < 100, "it is another video, but nearly the same"
    assert psnr(other, video) < found - 6, "a prompt changes more"


def test_bytes_are_those_of_integers_and_their_scales() -> None:
    model = DiT(tiny("cogvideox-5b")).to(torch.bfloat16)
    assert weight_bytes(model) == 2 * sum(p.numel() for p in model.parameters())
    linears = [layer for block in model.blocks for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    rest = weight_bytes(model) - 2 * sum(layer.weight.numel() for layer in linears)
    quantize(model, "int8")
    of_scales = weight_bytes(model) - rest - sum(layer.weight.numel() for layer in linears)
    rows = sum(len(layer.weight) for layer in linears)
    assert 2 * rows <= of_scales <= 8 * rows
    assert type(model.embed.patch.weight) is type(model.head.proj.weight) is torch.nn.Parameter


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_are_those_of_the_rounded_weights(kind: Quantization, dtype: torch.dtype) -> None:
    """The fused block reads linears' weights itself; it must see what is stored."""
    quantized = DiT(tiny("cogvideox-5b")).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(quantized.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    quantize(quantized, kind)
    plain = DiT(tiny("cogvideox-5b"))
    rounded = {
        name: p.dequantize() if type(p) is not torch.nn.Parameter else p for name, p in quantized.named_parameters()
    }
    plain.load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    latents, text = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.randn(1, 6, 20)
    with torch.no_grad():
        ours = quantized.denoise(latents.to(dtype), text.to(dtype), torch.tensor([500])).float()
        expected = plain.denoise(latents, text, torch.tensor([500]))
    assert (ours - expected).norm() <= {torch.float32: 1e-5, torch.float16: 5e-3}[dtype] * expected.norm()


def test_tensor_parallel_ranks_are_refused() -> None:
    model = DiT(replace(tiny("cogvideox-5b"), heads=4), tp=Axis("tp", 0, 2, (0, 1)))
    with pytest.raises(ValueError, match=r"int8 weights under 2 tensor-parallel ranks .* \(--sp\)"):
        quantize(model, "int8")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        ValueError, match=r'need torchao, which cannot be imported .*pip install "cogvideo_dist\[quantized\]"'
    ):
        check_quantization("fp8", device=CPU, dtype=torch.float32)


def test_what_a_back_end_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fp8 weights do not work on cpu in torch.int32"):
        check_quantization("fp8", device=CPU, dtype=torch.int32)
    with pytest.raises(ValueError, match="'int4' is none of int8, fp8"):
        check_quantization("int4", device=CPU, dtype=torch.float32)  # type: ignore[arg-type]
