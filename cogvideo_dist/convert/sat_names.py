"""What SAT's names of a transformer's tensors mean beside the table in ``convert/names.py``."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from cogvideo_dist.models.embed import sincos_table
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import VISION, Clip, Span
from cogvideo_dist.parallel.split import Split

PREFIX = "model.diffusion_model."
"""Of the transformer in SAT's own files."""

MARK = "mixins.final_layer.linear.weight"
"""What every transformer has and nothing else does; what stands before it is the transformer's prefix."""

TABLE = "mixins.pos_embed.pos_embedding"
"""Learned positions, or the 2B's sines and cosines, which are computed here."""

POSITIONS = "transformer.position_embeddings.weight"
"""A parameter that SAT's base class has and CogVideoX does not use, [64, d]."""

UNUSED = (
    POSITIONS, "transformer.word_embeddings.weight", "mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos"
)  # fmt: skip
"""Tensors of SAT's files that a model does not compute with, or computes itself."""

SPLITS = {
    "attention.query_key_value.weight": Split(dim=0, stacked=3),
    "attention.query_key_value.bias": Split(dim=0, stacked=3),
    "attention.dense.weight": Split(dim=1),
    "mlp.dense_h_to_4h.weight": Split(dim=0),
    "mlp.dense_h_to_4h.bias": Split(dim=0),
    "mlp.dense_4h_to_h.weight": Split(dim=1),
}
"""What SAT cuts over its model-parallel ranks, by the end of the name; all else is whole on all of them."""


BESIDE = ("first_stage_model.", "conditioner.")
"""What begins the names of the autoencoder and of the text encoder, which fine-tuned checkpoints have, too."""


ORIGINAL, FACTOR_A, FACTOR_B = ".original.", ".matrix_A.", ".matrix_B."
"""In the names of an adapted linear: its own weight and bias, and the factors of each of its parts, by number."""

ADAPTED = {"attention.query_key_value": ("q", "k", "v"), "attention.dense": ("out",)}
"""SAT's adapted linears of a block, and what the adapters of their parts are named here."""


def layer_name(layer: int, name: str) -> str:
    """Of what a block has."""
    return f"transformer.layers.{layer}.{name}"


def split_of_name(name: str) -> Split | None:
    """How a tensor is cut; ``name`` without the prefix."""
    return SPLITS.get(name.split(".", 3)[-1]) if name.startswith("transformer.layers.") else None


def joined(slices: Sequence[Tensor], split: Split) -> Tensor:
    """The whole, from the slices of all ranks in order."""
    parts = [each.unflatten(split.dim, (split.stacked, -1)) for each in slices]
    return torch.cat(parts, dim=split.dim + 1).flatten(split.dim, split.dim + 1)


def names_of_transformer(names: Collection[str], *, wanted: str | None, source: str) -> tuple[str, list[str]]:
    """What stands before the transformer's names, and these names in full; ``wanted`` chooses one of several prefixes."""
    found = sorted({name.removesuffix(MARK) for name in names if name == MARK or name.endswith(f".{MARK}")})
    if not found:
        raise ValueError(f"{source}: no transformer in it, as no name ends in {MARK}")
    shown = " and ".join(f'"{prefix}"' for prefix in found)
    if wanted is None and len(found) > 1:
        raise ValueError(
            f"{source}: {len(found)} transformers in it, under the prefixes {shown}; choose one with --prefix"
        )
    if wanted is not None and wanted not in found:
        raise ValueError(f'{source}: no transformer under the prefix "{wanted}"; it is under {shown}')
    prefix = found[0] if wanted is None else wanted
    others = tuple(other for other in found if other.startswith(prefix) and other != prefix) + BESIDE
    return prefix, [name for name in names if name.startswith(prefix) and not name.startswith(others)]


def position_table(config: DiTConfig) -> Tensor:
    """The 2B's fixed positions as SAT stores them, [1, text + t*h*w, d] float32: zeros for the text."""
    clip = Clip(config.text_length, config.sample_grid)
    span = Span(0, VISION, 0, clip.vision)
    table = sincos_table(config, (clip,), spans=(span,), device=torch.device("cpu"), dtype=torch.float32)
    return torch.cat([torch.zeros(clip.text, config.hidden), table])[None]
