"""Clips of any length in constant memory: pieces of a clip come in, chunks with a past go through the VAE and out.

Legend: B batch, C channels, T H W frames, height, width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.models.vae_tiles import Part, Place, Tiling, tiled
from cogvideo_dist.parallel.frames import Stream, Whole

Semantics = Literal["whole", "chunked"]


class Half(NamedTuple):
    """The encoder or the decoder: in chunks of ``chunk`` frames, a latent being ``units`` long in its input and output."""

    part: Part
    chunk: int
    units: tuple[int, int]

    def run(self, x: Tensor, *, semantics: Semantics, tiling: Tiling | None) -> Tensor:
        """A clip [B, C, T, H, W] at once, or chunk by chunk and joined."""
        if semantics == "whole":
            return tiled(self.part, x, times=defaultdict(Whole), tiling=tiling, units=self.units)
        if semantics != "chunked":
            raise ValueError(f'semantics "{semantics}" of the VAE; it must be "whole" or "chunked"')
        return torch.cat(list(self.stream([x], total=x.shape[2], tiling=tiling)), dim=2)

    def stream(self, pieces: Iterable[Tensor], *, total: int | None, tiling: Tiling | None) -> Iterator[Tensor]:
        """Pieces [B, C, any T, H, W] of a clip -> results chunk by chunk; every tile remembers its own past."""
        pasts: defaultdict[Place, Stream] = defaultdict(Stream)
        for x in recut(pieces, chunk=self.chunk, total=total):
            yield tiled(self.part, x, times=pasts, tiling=tiling, units=self.units)
            for past in pasts.values():
                past.next()


def recut(pieces: Iterable[Tensor], *, chunk: int, total: int | None) -> Iterator[Tensor]:
    """Pieces [B, C, T, H, W] of any lengths joined and cut anew into contiguous chunks of ``chunk`` frames.

    Of a ``total`` of frames the first chunk takes the remainder, as in the released models. Where the total is not known,
    the first has one frame more than the others and the last is what is left.
    """
    missing = chunk + 1 if total is None else min(total, chunk + total % chunk)
    waiting: list[Tensor] = []
    for piece in pieces:
        start = 0
        while piece.shape[2] - start >= missing:
            waiting.append(piece[:, :, start : start + missing])
            start += missing
            # One memory layout whatever the pieces, so that the same routines run and give the same bits.
            joined = torch.cat(waiting, dim=2).contiguous()
            waiting, missing = [], chunk
            yield joined
        if start < piece.shape[2]:
            waiting.append(piece[:, :, start:])
            missing -= piece.shape[2] - start
    if waiting:
        yield torch.cat(waiting, dim=2).contiguous()


def checked(
    pieces: Iterable[Tensor], what: str, *, channels: int, total: int | None, legal: Callable[[Sequence[int]], object]
) -> Iterator[Tensor]:
    """The pieces as they come; ``legal`` raises for a (frames, height, width) that the VAE does not take.

    Raises ValueError for a piece of another shape than the first and where their frames are not ``total``.
    """
    count, first = 0, None
    for piece in pieces:
        check(piece, what, channels=channels)
        batch, _, frames, height, width = piece.shape
        if first is None:
            first = batch, height, width
            legal((1 if total is None else total, height, width))
        if (batch, height, width) != first:
            raise ValueError(
                f"a piece of {what} with batch, height and width {(batch, height, width)} follows pieces with {first}; "
                "a stream is one batch of clips of one size"
            )
        count += frames
        if total is not None and count > total:
            raise ValueError(f"a stream of {what} has at least {count} frames, but total={total} was announced")
        yield piece
    if first is None or not count:
        raise ValueError(f"a stream of {what} has no frames; give at least one")
    if total is not None and count < total:
        raise ValueError(f"a stream of {what} ended after {count} frames, but total={total} was announced")
    legal((count, *first[1:]))


def check(x: Tensor, what: str, *, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels:
        raise ValueError(f"{what} of shape {list(x.shape)}; the VAE takes [batch, {channels}, frames, height, width]")
