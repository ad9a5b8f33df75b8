"""Embeddings of timesteps and of positions, computed from integers when needed and never stored in a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import TEXT, VISION, Clip, Span

Grid = tuple[int, int, int]


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[b] -> [b, dim] = [cos | sin] of t * 10000^(-i / (dim/2)), in float32 as in the released models."""
    exponent = -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=timestep.device) / (dim // 2)
    angle = timestep[:, None].float() * exponent.exp()[None, :]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_table(
    config: DiTConfig, clips: Sequence[Clip], *, spans: Sequence[Span], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Rotations of the tokens of ``spans``, [n, head_dim/2] complex; 1 for text, whose tokens are not rotated.

    None where the model has no rotary positions. ``dtype`` is the activations': 64-bit ones get 128-bit rotations.
    """
    if config.positions != "rope":
        return None
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    parts = [torch.ones(0, config.head_dim // 2, dtype=wide, device=device)]
    for span in spans:
        if span.kind == TEXT:
            parts.append(torch.ones(span.tokens, config.head_dim // 2, dtype=wide, device=device))
        else:
            grid = clips[span.clip].grid
            parts.append(_over_grid(_rotations(config, grid, wide, device), grid)[span.start : span.stop])
    return torch.cat(parts)


def _over_grid(axes: tuple[Tensor, ...], grid: Grid) -> Tensor:
    """Tables along single axes of the grid, [t,1,1,a] and so on -> [t*h*w, a + b + c]."""
    return torch.cat([table.expand(*grid, -1) for table in axes], dim=-1).flatten(0, 2)


# Kept per axis and on the device: small, and no forward copies a table of every token to the GPU or waits for it.
@lru_cache(maxsize=256)
def _rotations(config: DiTConfig, grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Complex tables along t, h and w; the head splits into t : h : w = 2 : 3 : 3."""
    dims = (config.head_dim // 4, config.head_dim // 8 * 3, config.head_dim // 8 * 3)
    tables = []
    for axis, (positions, dim) in enumerate(zip(rope_positions(config, grid), dims)):
        frequency = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(positions, frequency)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = grid[axis]
        tables.append(torch.polar(torch.ones_like(angle), angle).reshape(shape).to(device, dtype))
    return tuple(tables)


def rope_positions(config: DiTConfig, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of a clip's patches on t, h, w, float64.

    Time is counted in both kinds. ``fit_base`` resizes the base sample's grid to the clip's aspect ratio, centred, and spreads
    the clip's rows and columns over it (diffusers, CogVideoX 1.0); at the base size that is counting.
    """
    t, h, w = (torch.arange(size, dtype=torch.float64) for size in grid)
    if config.rope_grid == "fit_base":
        _, base_h, base_w = config.sample_grid
        _, rows, columns = grid
        if rows / columns > base_h / base_w:
            fit_h, fit_w = base_h, round(base_h / rows * columns)
        else:
            fit_h, fit_w = round(base_w / columns * rows), base_w
        h = _spread(rows, round((base_h - fit_h) / 2), fit_h)
        w = _spread(columns, round((base_w - fit_w) / 2), fit_w)
    return t, h, w


def _spread(count: int, start: int, extent: int) -> Tensor:
    stop = (start + extent) * (count - 1) / count
    return torch.linspace(start, stop, count, dtype=torch.float64)


def sincos_table(
    config: DiTConfig, clips: Sequence[Clip], *, spans: Sequence[Span], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Fixed positions of the vision tokens of ``spans``, [n_vision, hidden]: temporal quarter, then width and height (2B)."""
    parts = [torch.zeros(0, config.hidden, dtype=dtype, device=device)]
    for span in spans:
        if span.kind == VISION:
            grid = clips[span.clip].grid
            parts.append(_over_grid(_waves(config, grid, dtype, device), grid)[span.start : span.stop])
    return torch.cat(parts)


@lru_cache(maxsize=256)
def _waves(config: DiTConfig, grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    t, h, w = grid
    quarter, rest = config.hidden // 4, config.hidden * 3 // 8
    temporal = _sincos(torch.arange(t) / config.temporal_interpolation, quarter)[:, None, None, :]
    across = _sincos(torch.arange(w) / config.spatial_interpolation, rest)[None, None, :, :]
    down = _sincos(torch.arange(h) / config.spatial_interpolation, rest)[None, :, None, :]
    return tuple(table.to(device, dtype) for table in (temporal, across, down))


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """[n] -> [n, dim] = [sin | cos]; positions in float32, as in the released 2B, frequencies in float64."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.outer(positions.float().double(), frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
