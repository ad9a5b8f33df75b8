"""Weights of the transformer's blocks in 8 bits, through torchao: less memory for sampling, nothing else changes.

Weight-only: products are computed in the model's own precision, with each row of a weight times its scale. Linears of blocks
hold 99 % of a released model's weights; embeddings, the timestep's and the last layer stay as they are.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo_dist.models.dit import Block, DiT

Quantization = Literal["int8", "fp8"]
"""Integers of 8 bits with a scale for each row; float8 (e4m3) with a scale for each row."""


def quantize(model: DiT, kind: Quantization) -> None:
    """Store the weights of every linear in a block in 8 bits, where the model is; for sampling, not for training.

    Raises ValueError under tensor parallelism, and where torchao or its back end cannot do it.
    """
    if model.tp.size > 1:
        raise ValueError(
            f"{kind} weights under {model.tp.size} tensor-parallel ranks would be rounded otherwise than those of one process; "
            "divide the tokens instead (--sp)"
        )
    weight = model.embed.patch.weight
    check_quantization(kind, device=weight.device, dtype=weight.dtype)
    for module in model.modules():
        if isinstance(module, Block):
            _quantized(module, kind)


def check_quantization(kind: Quantization, *, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what torchao cannot do here, by trying it on one small linear."""
    if kind not in get_args(Quantization):
        raise ValueError(f"quantization {kind!r} is none of {', '.join(get_args(Quantization))}")
    try:
        linear = nn.Linear(32, 32, device=device, dtype=dtype)
        with torch.no_grad():
            _quantized(nn.Sequential(linear), kind)
            F.linear(torch.ones(2, 32, device=device, dtype=dtype), linear.weight, linear.bias)
    except ImportError as error:
        raise ValueError(
            f'{kind} weights need torchao, which cannot be imported ({error}): pip install "cogvideo_dist[quantized]"'
        ) from None
    # whatever a back end raises for a type that it has no kernel for
    except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        raise ValueError(f"{kind} weights do not work on {device.type} in {dtype} ({error})") from None


def _quantized(module: nn.Module, kind: Quantization) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    settings: Any = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(module, settings)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they are stored, scales included."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(x: Any) -> int:
    """Of a tensor, or of those that a tensor of torchao is made of."""
    if type(x) not in (Tensor, nn.Parameter) and hasattr(x, "__tensor_flatten__"):
        return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()
