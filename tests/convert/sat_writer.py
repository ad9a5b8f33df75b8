"""Checkpoints of SAT, written and read from tables of its names and shapes alone, without any code of the converter.

Legend: d = hidden, L = layers, e = time embedding, r = rank of adapters, n = model-parallel ranks.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")


@dataclass(frozen=True)
class Sizes:
    """Of a transformer; ``grid`` of the base sample in patches."""

    kind: str
    layers: int = 2
    heads: int = 4
    head_dim: int = 16
    time_dim: int = 24
    text_dim: int = 20
    text: int = 6
    channels: int = 4
    grid: tuple[int, int, int] = (4, 6, 8)
    interpolation: float = 1.875

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def image(self) -> bool:
        return self.kind.endswith("i2v")

    @property
    def new(self) -> bool:
        return self.kind.startswith("1.5")


def shapes_of(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Every weight of the transformer under SAT's name without prefix, as one rank alone has it."""
    d, e, cin = s.hidden, s.time_dim, s.channels * (2 if s.image else 1)
    linears: dict[str, tuple[int, ...]] = {
        "mixins.patch_embed.proj": (d, 8 * cin) if s.new else (d, cin, 2, 2),
        "mixins.patch_embed.text_proj": (d, s.text_dim),
        "time_embed.0": (e, d),
        "time_embed.2": (e, e),
        "transformer.final_layernorm": (d,),
        "mixins.final_layer.norm_final": (d,),
        "mixins.final_layer.adaLN_modulation.1": (2 * d, e),
        "mixins.final_layer.linear": ((8 if s.new else 4) * s.channels, d),
    }
    if s.kind == "1.5-5b-i2v":
        linears |= {"ofs_embed.0": (e, e), "ofs_embed.2": (e, e)}
    for i in range(s.layers):
        trunk = f"transformer.layers.{i}"
        linears |= {
            f"{trunk}.input_layernorm": (d,),
            f"{trunk}.attention.query_key_value": (3 * d, d),
            f"{trunk}.attention.dense": (d, d),
            f"{trunk}.post_attention_layernorm": (d,),
            f"{trunk}.mlp.dense_h_to_4h": (4 * d, d),
            f"{trunk}.mlp.dense_4h_to_h": (d, 4 * d),
            f"mixins.adaln_layer.adaLN_modulations.{i}.1": (12 * d, e),
            f"mixins.adaln_layer.query_layernorm_list.{i}": (s.head_dim,),
            f"mixins.adaln_layer.key_layernorm_list.{i}": (s.head_dim,),
        }
    shapes = {}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if s.kind == "5b-i2v":
        t, h, w = s.grid
        shapes["mixins.pos_embed.pos_embedding"] = (1, s.text + t * h * w, d)
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def unused_of(s: Sizes, dtype: torch.dtype) -> dict[str, Tensor]:
    """What SAT's files hold beside the weights: the 2B's fixed positions, and an embedding that nothing reads."""
    if s.kind != "2b":
        return {"transformer.position_embeddings.weight": torch.zeros(64, s.hidden, dtype=dtype)}
    return {"mixins.pos_embed.pos_embedding": sincos(s).to(dtype)}


def sincos(s: Sizes) -> Tensor:
    """[1, text + t*h*w, d]: a temporal quarter, then width, then height, each [sin | cos]; zeros for text."""

    def waves(positions: Any, dim: int) -> Any:
        angle = np.outer(positions, 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0)))
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    (t, h, w), d = s.grid, s.hidden
    table = np.zeros((t, h, w, d))
    table[..., : d // 4] = waves(np.arange(t, dtype=np.float32), d // 4)[:, None, None]
    across, down = (waves(np.arange(n, dtype=np.float32) / s.interpolation, d * 3 // 8) for n in (w, h))
    table[..., d // 4 : d // 4 + d * 3 // 8] = across[None, None]
    table[..., d // 4 + d * 3 // 8 :] = down[None, :, None]
    vision = torch.from_numpy(table.reshape(t * h * w, d)).float()
    return torch.cat([torch.zeros(s.text, d), vision])[None]


def part_of(name: str, whole: Tensor, rank: int, n: int) -> Tensor:
    """What a model-parallel rank has of a tensor."""
    name = name.replace(".original.", ".")
    if n == 1:
        return whole
    if "attention.query_key_value" in name:
        if "matrix_A" in name:
            return whole
        parts = 1 if "matrix_B" in name else 3
        return torch.cat([each.chunk(n)[rank] for each in whole.chunk(parts)])
    if "mlp.dense_h_to_4h" in name:
        return whole.chunk(n)[rank]
    if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")) or "attention.dense.matrix_A" in name:
        return whole.chunk(n, dim=1)[rank]
    return whole


def whole_of(name: str, parts: list[Tensor]) -> Tensor:
    """Put together what the ranks have."""
    n = len(parts)
    if n == 1:
        return parts[0]
    if "attention.query_key_value" in name:
        cut = [part.chunk(3) for part in parts]
        return torch.cat([cut[rank][which] for which in range(3) for rank in range(n)])
    if "mlp.dense_h_to_4h" in name:
        return torch.cat(parts)
    if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
        return torch.cat(parts, dim=1)
    assert all(torch.equal(part, parts[0]) for part in parts), name
    return parts[0]


PREFIX = "model.diffusion_model."


def write(
    folder: Path, tensors: dict[str, Tensor], *, n: int = 1, tag: str = "1000", prefix: str = PREFIX,
    extra: dict[str, Tensor] | None = None, fine_tuned: bool = False,
) -> Path:  # fmt: skip
    """A checkpoint's folder; ``extra``: tensors without the prefix; ``fine_tuned``: with all that DeepSpeed writes."""
    target = folder / tag
    target.mkdir(parents=True)
    (folder / "latest").write_text(tag)
    for rank in range(n):
        module = OrderedDict({prefix + name: part_of(name, whole, rank, n).clone() for name, whole in tensors.items()})
        module |= extra or {}
        content: dict[str, Any] = {"module": module}
        if fine_tuned:
            content |= {
                "buffer_names": [], "optimizer": None, "lr_scheduler": {"num_iters": 7}, "sparse_tensor_module_names": set(),
                "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in module.items())],
                "ds_config": {"train_batch_size": 2, "zero_optimization": {"stage": 2}}, "iteration": 7,
                "random_rng_state": random.Random(0).getstate(), "np_rng_state": np.random.RandomState(0).get_state(),
                "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {"mp": torch.get_rng_state()},
            }  # fmt: skip
        torch.save(content, target / f"mp_rank_{rank:02d}_model_states.pt")
    return target


def read(folder: Path, n: int) -> tuple[dict[str, Tensor], list[str]]:
    """The whole tensors of a checkpoint's folder without the prefix, and the files that are in it."""
    target = folder / (folder / "latest").read_text()
    ranks = [
        torch.load(target / f"mp_rank_{rank:02d}_model_states.pt", weights_only=True)["module"] for rank in range(n)
    ]
    assert all(rank.keys() == ranks[0].keys() for rank in ranks)
    assert all(name.startswith(PREFIX) for name in ranks[0])
    whole = {name.removeprefix(PREFIX): whole_of(name, [rank[name] for rank in ranks]) for name in ranks[0]}
    return whole, sorted(path.name for path in target.iterdir())


def lora_of(s: Sizes, r: int, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the factors of SAT's adapters."""
    shapes = {}
    for i in range(s.layers):
        for name, parts in (("query_key_value", 3), ("dense", 1)):
            for part in range(parts):
                shapes[f"transformer.layers.{i}.attention.{name}.matrix_A.{part}"] = (r, s.hidden)
                shapes[f"transformer.layers.{i}.attention.{name}.matrix_B.{part}"] = (s.hidden, r)
    return shapes


def with_lora(tensors: dict[str, Tensor], s: Sizes, r: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As LoraMixin names them: an adapted linear's own tensors are its original."""
    renamed = {}
    for name, tensor in tensors.items():
        for linear in (".attention.query_key_value.", ".attention.dense."):
            name = name.replace(linear, f"{linear}original.")
        renamed[name] = tensor
    return renamed | drawn(lora_of(s, r, dtype), dtype, seed=1)


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under diffusers' names."""
    renames = {
        "mixins.patch_embed.": "patch_embed.", "mixins.pos_embed.": "patch_embed.", "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2", "ofs_embed.0": "ofs_embedding.linear_1",
        "ofs_embed.2": "ofs_embedding.linear_2", "transformer.final_layernorm": "norm_final",
        "mixins.final_layer.norm_final": "norm_out.norm", "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
        "mixins.final_layer.linear": "proj_out",
    }  # fmt: skip
    of_layer = {
        "input_layernorm": "norm1.norm", "post_attention_layernorm": "norm2.norm", "attention.dense": "attn1.to_out.0",
        "mlp.dense_h_to_4h": "ff.net.0.proj", "mlp.dense_4h_to_h": "ff.net.2",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if name.startswith("transformer.layers."):
            layer, rest = name.split(".", 3)[2:]
            block, rest = f"transformer_blocks.{layer}", rest.rpartition(".")[0]
            if rest == "attention.query_key_value":
                found |= {f"{block}.attn1.to_{q}.{kind}": piece for q, piece in zip("qkv", tensor.chunk(3))}
            else:
                found[f"{block}.{of_layer[rest]}.{kind}"] = tensor
        elif name.startswith("mixins.adaln_layer."):
            what, layer = name.split(".")[2:4]
            block = f"transformer_blocks.{layer}"
            if what == "adaLN_modulations":
                c = tensor.chunk(12)
                found[f"{block}.norm1.linear.{kind}"] = torch.cat([c[i] for i in (0, 1, 2, 6, 7, 8)])
                found[f"{block}.norm2.linear.{kind}"] = torch.cat([c[i] for i in (3, 4, 5, 9, 10, 11)])
            else:
                found[f"{block}.attn1.norm_{what[0]}.{kind}"] = tensor
        else:
            for old, new in renames.items():
                if name.startswith(old):
                    found[name.replace(old, new)] = tensor
                    break
            else:
                raise AssertionError(name)
    return found


def sizes_of(kind: str, heads: int = 4) -> Sizes:
    """Those of the tiny models, with heads that divide over ranks."""
    sizes = Sizes(kind, heads=heads)
    return replace(sizes, grid=(2, 6, 8)) if kind.startswith("1.5") else sizes
