"""The names of the VAE's tensors here, in diffusers and in SAT: one table, row by row, no tensor changed on the way.

SAT's names are those inside ``3d-vae.pt`` under ``state_dict``; its ``loss.*`` belongs to no one here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cogvideo_dist.models.vae import VAEConfig


class NameRow(NamedTuple):
    """One tensor, or while the table is built one part of the model, under its three names."""

    ours: str
    diffusers: str
    sat: str

    def inside(self, part: NameRow) -> NameRow:
        """``part`` of this one, with its full names."""
        return NameRow(*(f"{whole}.{name}" for whole, name in zip(self, part, strict=True)))

    def tensors(self) -> Iterator[NameRow]:
        """The weight and the bias of this part."""
        for kind in ("weight", "bias"):
            yield self.inside(NameRow(kind, kind, kind))


def vae_names(config: VAEConfig) -> tuple[NameRow, ...]:
    """Every tensor of the VAE of this shape."""
    return (*_encoder(config), *_decoder(config))


def _encoder(config: VAEConfig) -> Iterator[NameRow]:
    encoder = NameRow("encoder", "encoder", "encoder")
    widths = config.block_out_channels
    yield from _ends(encoder, spatial_norm=False)
    yield from _mid(encoder, spatial_norm=False)
    for i, width in enumerate(widths):
        level = encoder.inside(NameRow(f"levels.{i}", f"down_blocks.{i}", f"down.{i}"))
        for j in range(config.layers_per_block):
            block = level.inside(NameRow(f"blocks.{j}", f"resnets.{j}", f"block.{j}"))
            yield from _block(block, spatial_norm=False, shortcut=j == 0 and widths[max(i - 1, 0)] != width)
        if i < len(widths) - 1:
            yield from level.inside(NameRow("resample", "downsamplers.0.conv", "downsample.conv")).tensors()


def _decoder(config: VAEConfig) -> Iterator[NameRow]:
    decoder = NameRow("decoder", "decoder", "decoder")
    widths = config.block_out_channels[::-1]
    last = len(widths) - 1
    yield from _ends(decoder, spatial_norm=True)
    yield from _mid(decoder, spatial_norm=True)
    for i, width in enumerate(widths):
        # SAT counts the decoder's levels from fine to coarse.
        level = decoder.inside(NameRow(f"levels.{i}", f"up_blocks.{i}", f"up.{last - i}"))
        for j in range(config.layers_per_block + 1):
            block = level.inside(NameRow(f"blocks.{j}", f"resnets.{j}", f"block.{j}"))
            yield from _block(block, spatial_norm=True, shortcut=j == 0 and widths[max(i - 1, 0)] != width)
        if i < last:
            yield from level.inside(NameRow("resample", "upsamplers.0.conv", "upsample.conv")).tensors()


def _ends(half: NameRow, *, spatial_norm: bool) -> Iterator[NameRow]:
    for name in ("conv_in", "conv_out"):
        yield from half.inside(NameRow(name, f"{name}.conv", f"{name}.conv")).tensors()
    yield from _norm(half, "norm_out", spatial_norm=spatial_norm)


def _mid(half: NameRow, *, spatial_norm: bool) -> Iterator[NameRow]:
    for j in range(2):
        block = half.inside(NameRow(f"mid.blocks.{j}", f"mid_block.resnets.{j}", f"mid.block_{j + 1}"))
        yield from _block(block, spatial_norm=spatial_norm, shortcut=False)


def _block(block: NameRow, *, spatial_norm: bool, shortcut: bool) -> Iterator[NameRow]:
    for i in ("1", "2"):
        yield from _norm(block, f"norm{i}", spatial_norm=spatial_norm)
        yield from block.inside(NameRow(f"conv{i}", f"conv{i}.conv", f"conv{i}.conv")).tensors()
    if shortcut:
        yield from block.inside(NameRow("shortcut", "conv_shortcut", "nin_shortcut")).tensors()


def _norm(part: NameRow, name: str, *, spatial_norm: bool) -> Iterator[NameRow]:
    norm = part.inside(NameRow(name, name, name))
    if not spatial_norm:
        yield from norm.tensors()
        return
    for kind in ("weight", "bias"):
        yield norm.inside(NameRow(kind, f"norm_layer.{kind}", f"norm_layer.{kind}"))
    yield from norm.inside(NameRow("scale", "conv_y.conv", "conv_y.conv")).tensors()
    yield from norm.inside(NameRow("shift", "conv_b.conv", "conv_b.conv")).tensors()
