"""Frames too large for the memory: the VAE over overlapping tiles, which fade into each other.

Every tile is a clip of its own: its group norms have statistics of their own and its convolutions see zeros beyond its edge,
so tiles and the whole frame give different results, and the overlap hides the seams.

Legend: B batch, C channels, T H W frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cogvideo_dist.parallel.frames import TimeContext

if TYPE_CHECKING:
    from cogvideo_dist.models.vae import VAEConfig

Part = Callable[[Tensor, TimeContext], Tensor]
Place = tuple[int, int]  # top and left edge of a tile


@dataclass(frozen=True)
class Tiling:
    """Tiles of ``size`` (height, width), of which each shares ``overlap`` with the one before; both in latents."""

    size: tuple[int, int]
    overlap: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, size, overlap in zip(("height", "width"), self.size, self.overlap, strict=True):
            if not 0 <= overlap < size:
                raise ValueError(
                    f"tiles of {name} {size} with an overlap of {overlap} latents; the overlap must be at least 0 and less "
                    f"than the {name}"
                )

    @classmethod
    def of(cls, config: VAEConfig) -> Tiling:
        """Half the sample size, with a sixth of the height and a fifth of the width as overlap.

        diffusers' defaults wherever its pixels and latents agree, which is so for every released size; elsewhere
        (sample_height no multiple of 12 latents, sample_width none of 10) diffusers' tiles do not meet, and these do.
        """
        height, width = (
            pixels // 2 // config.spatial_compression for pixels in (config.sample_height, config.sample_width)
        )
        return cls((height, width), (height // 6, width // 5))


def tiled(
    part: Part, x: Tensor, *, times: Mapping[Place, TimeContext], tiling: Tiling | None, units: tuple[int, int]
) -> Tensor:
    """``part`` over the tiles of x [B, C, T, H, W], or over the whole frame where there is no tiling or it fits in a tile.

    ``units`` is the length of a latent in x and in the result; ``times`` is asked for each tile's context by its place.
    """
    unit, unit_out = units
    if tiling is None or (x.shape[3] <= tiling.size[0] * unit and x.shape[4] <= tiling.size[1] * unit):
        return part(x, times[0, 0])
    (height, width), (down, right) = tiling.size, (size - lap for size, lap in zip(tiling.size, tiling.overlap))
    bottoms: dict[int, Tensor] = {}  # by left edge, what the tile above shares with the one below it
    side = joined = x.new_empty(
        0
    )  # what the tile on the left shares; the result, made once the first tile tells its size
    for top in range(0, x.shape[3], down * unit):
        for left in range(0, x.shape[4], right * unit):
            tile = part(x[:, :, :, top : top + height * unit, left : left + width * unit], times[top, left])
            if top:
                fade_into(tile, bottoms[left], dim=3)
            if left:
                fade_into(tile, side, dim=4)
            # Copies, because a view would keep the whole tile alive. Neighbours meet a tile that is faded itself.
            bottoms[left] = tile[:, :, :, down * unit_out :].clone()
            side = tile[..., right * unit_out :].clone()
            if not (top or left):
                joined = tile.new_empty(*tile.shape[:3], *(n // unit * unit_out for n in x.shape[3:]))
            rows, columns = (slice(edge // unit * unit_out, None) for edge in (top, left))
            place = joined[..., rows, columns][..., : down * unit_out, : right * unit_out]
            place.copy_(tile[..., : down * unit_out, : right * unit_out])
    return joined


def fade_into(tile: Tensor, before: Tensor, *, dim: int) -> None:
    """The start of ``tile`` along ``dim``, in place, from ``before`` (weight 1 at the edge) linearly to the tile's own."""
    count = before.shape[dim]
    own = torch.arange(count, dtype=tile.dtype, device=tile.device) / count
    own = own.view([count if i == dim else 1 for i in range(tile.ndim)])
    start = tile.narrow(dim, 0, count)
    start.copy_(before * (1 - own) + start * own)
