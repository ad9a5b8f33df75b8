"""One table of the transformer's tensors with three columns: ours, diffusers, SAT.

Every difference between the three is a cut along the first dimension, an order of the pieces and a shape, so a row says just
that and conversion either way moves numbers without touching them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cogvideo_dist.models.presets import DiTConfig

Column = Literal["diffusers", "sat"]


@dataclass(frozen=True)
class Part:
    """A foreign tensor: the pieces ``take`` of ours, in that order, seen as ``shape`` (None: as they are)."""

    name: str
    take: tuple[int, ...] = (0,)
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Row:
    """Our tensor, cut into ``pieces`` equal ones along its first dimension, and its counterparts."""

    ours: str
    pieces: int
    diffusers: tuple[Part, ...]
    sat: tuple[Part, ...]

    def parts(self, column: Column) -> tuple[Part, ...]:
        return self.diffusers if column == "diffusers" else self.sat


def dit_rows(config: DiTConfig) -> list[Row]:
    """Every parameter of the transformer, in the model's order."""
    d = config.hidden
    o, p, q = config.patch
    conv = (d, config.in_channels, p, q) if o == 1 else None
    rows = [
        Row("embed.patch.weight", 1, (Part("patch_embed.proj.weight", shape=conv),),
            (Part("mixins.patch_embed.proj.weight", shape=conv),)),
        _same("embed.patch.bias", "patch_embed.proj.bias", "mixins.patch_embed.proj.bias"),
        *_pair("embed.text", "patch_embed.text_proj", "mixins.patch_embed.text_proj"),
        *_pair("time.linear1", "time_embedding.linear_1", "time_embed.0"),
        *_pair("time.linear2", "time_embedding.linear_2", "time_embed.2"),
    ]  # fmt: skip
    if config.learned_positions:
        t, h, w = config.sample_grid
        shape = (1, config.text_length + t * h * w, d)
        rows.append(Row("embed.positions", 1, (Part("patch_embed.pos_embedding", shape=shape),),
                        (Part("mixins.pos_embed.pos_embedding", shape=shape),)))  # fmt: skip
    if config.ofs:
        rows += _pair("ofs.linear1", "ofs_embedding.linear_1", "ofs_embed.0")
        rows += _pair("ofs.linear2", "ofs_embedding.linear_2", "ofs_embed.2")
    for layer in range(config.layers):
        rows += _block_rows(layer)
    rows += _pair("head.norm_final", "norm_final", "transformer.final_layernorm")
    rows += _pair("head.modulation", "norm_out.linear", "mixins.final_layer.adaLN_modulation.1")
    rows += _pair("head.norm_out", "norm_out.norm", "mixins.final_layer.norm_final")
    rows += _pair("head.proj", "proj_out", "mixins.final_layer.linear")
    return rows


def _same(ours: str, diffusers: str, sat: str) -> Row:
    return Row(ours, 1, (Part(diffusers),), (Part(sat),))


def _pair(ours: str, diffusers: str, sat: str) -> list[Row]:
    return [_same(f"{ours}.{kind}", f"{diffusers}.{kind}", f"{sat}.{kind}") for kind in ("weight", "bias")]


def _block_rows(layer: int) -> Iterator[Row]:
    ours, theirs = f"blocks.{layer}", f"transformer_blocks.{layer}"
    trunk, ada = f"transformer.layers.{layer}", "mixins.adaln_layer"
    for kind in ("weight", "bias"):
        # Ours is [text, vision] x [shift, scale, gate of attention, then of feed-forward], twelve pieces of d.
        yield Row(
            f"{ours}.modulation.{kind}", 12,
            (Part(f"{theirs}.norm1.linear.{kind}", (6, 7, 8, 0, 1, 2)),
             Part(f"{theirs}.norm2.linear.{kind}", (9, 10, 11, 3, 4, 5))),
            (Part(f"{ada}.adaLN_modulations.{layer}.1.{kind}", (6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5)),),
        )  # fmt: skip
        yield Row(
            f"{ours}.qkv.{kind}", 3,
            tuple(Part(f"{theirs}.attn1.to_{name}.{kind}", (index,)) for index, name in enumerate("qkv")),
            (Part(f"{trunk}.attention.query_key_value.{kind}", (0, 1, 2)),),
        )  # fmt: skip
    yield from _pair(f"{ours}.norm1", f"{theirs}.norm1.norm", f"{trunk}.input_layernorm")
    yield from _pair(f"{ours}.norm_q", f"{theirs}.attn1.norm_q", f"{ada}.query_layernorm_list.{layer}")
    yield from _pair(f"{ours}.norm_k", f"{theirs}.attn1.norm_k", f"{ada}.key_layernorm_list.{layer}")
    yield from _pair(f"{ours}.out", f"{theirs}.attn1.to_out.0", f"{trunk}.attention.dense")
    yield from _pair(f"{ours}.norm2", f"{theirs}.norm2.norm", f"{trunk}.post_attention_layernorm")
    yield from _pair(f"{ours}.ff1", f"{theirs}.ff.net.0.proj", f"{trunk}.mlp.dense_h_to_4h")
    yield from _pair(f"{ours}.ff2", f"{theirs}.ff.net.2", f"{trunk}.mlp.dense_4h_to_h")


def to_foreign(state: Mapping[str, Tensor], rows: list[Row], column: Column) -> dict[str, Tensor]:
    """Our tensors under the names and shapes of ``column``; contiguous copies."""
    foreign = {}
    for row in rows:
        pieces = state[row.ours].chunk(row.pieces) if row.pieces > 1 else (state[row.ours],)
        for part in row.parts(column):
            tensor = torch.cat([pieces[index] for index in part.take])
            foreign[part.name] = tensor.reshape(part.shape) if part.shape else tensor
    return foreign


def from_foreign(
    foreign: Mapping[str, Tensor], rows: list[Row], *, column: Column, shapes: Mapping[str, torch.Size], source: str
) -> dict[str, Tensor]:
    """Foreign tensors under our names. Strict: a missing, extra or misshapen tensor is an error that names it."""
    check_names(foreign.keys(), {part.name for row in rows for part in row.parts(column)}, source=source)
    state = {}
    for row in rows:
        pieces: list[Tensor | None] = [None] * row.pieces
        for part in row.parts(column):
            tensor = foreign[part.name]
            expected = _foreign_shape(part, row, shapes[row.ours])
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{source}: tensor {part.name} has shape {tuple(tensor.shape)}, expected {expected}")
            flat = tensor.reshape(len(part.take) * shapes[row.ours][0] // row.pieces, *shapes[row.ours][1:])
            for index, piece in zip(part.take, flat.chunk(len(part.take))):
                pieces[index] = piece
        state[row.ours] = torch.cat([piece for piece in pieces if piece is not None])
    return state


def _foreign_shape(part: Part, row: Row, ours: torch.Size) -> tuple[int, ...]:
    return part.shape or (len(part.take) * ours[0] // row.pieces, *ours[1:])


def check_names(found: Set[str], wanted: Set[str], *, source: str) -> None:
    """Raises ``ValueError`` naming the tensors that are missing or unknown."""
    for problem, names in (("lacks", wanted - found), ("has the unknown", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{source} {problem} {'tensor' if len(names) == 1 else 'tensors'} {shown}")
