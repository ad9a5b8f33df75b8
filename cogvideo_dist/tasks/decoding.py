"""Latents of one clip -> its pixels, by one process or by ranks that share its frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cogvideo_dist.models.vae import LATENT_CHUNK, VAE, Semantics
from cogvideo_dist.models.vae_stream import recut
from cogvideo_dist.models.vae_tiles import Place, Tiling, tiled
from cogvideo_dist.parallel.frames import Rounds, Shards, frames_of, latent_shares
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import gather
from cogvideo_dist.tasks.pixels import tiling_of


@torch.no_grad()
def decoded(vae: VAE, latents: Tensor, *, semantics: Semantics, tiling: bool, cp: Axis) -> Iterator[Tensor]:
    """Latents [T, C, h, w], unscaled -> video in about [-1, 1], float32, in pieces [3, any t, H, W] in order.

    Chunked, a piece has the eight frames of a chunk for each rank of ``cp`` and is made when it is asked for, so that the
    device's memory does not grow with the clip. Whole, there is one piece, whose frames are divided over ``cp``. All ranks get
    every piece.
    """
    weight = next(vae.parameters())
    z, tiles = latents.to(weight.device, weight.dtype).transpose(0, 1)[None], tiling_of(vae, tiling)
    if semantics == "whole" and cp.size == 1:
        pieces = iter([vae.decode(z, semantics=semantics, tiling=tiles)])
    elif semantics == "whole":
        pieces = iter([_shared(vae, z, tiling=tiles, cp=cp)])
    elif cp.size == 1:
        pieces = vae.decode_stream([z], total=len(latents), tiling=tiles)
    else:
        pieces = _in_rounds(vae, z, tiling=tiles, cp=cp)
    for piece in pieces:
        yield piece[0].float()


def check_decoding(latents: int, *, semantics: Semantics, ranks: int) -> None:
    """Refuse a clip of so many latent frames that does not split over ``ranks``."""
    if semantics == "whole":
        latent_shares(latents, ranks)


def _shared(vae: VAE, z: Tensor, *, tiling: Tiling | None, cp: Axis) -> Tensor:
    """z [1, C, T, h, w], of which each rank decodes its share -> [1, 3, frames, H, W]."""
    shares, compression = latent_shares(z.shape[2], cp.size), vae.config.temporal_compression
    mine = z.split(shares, dim=2)[cp.rank].contiguous()
    times: defaultdict[Place, Shards] = defaultdict(lambda: Shards(cp))
    video = tiled(vae.decoder, mine, times=times, tiling=tiling, units=(1, vae.config.spatial_compression))
    return _joined(video, [len(frames_of(shares, rank, compression=compression)) for rank in range(cp.size)], cp)


def _in_rounds(vae: VAE, z: Tensor, *, tiling: Tiling | None, cp: Axis) -> Iterator[Tensor]:
    """The chunks of z [1, C, T, h, w], as many at a time as there are ranks -> [1, 3, frames, H, W] of each round."""
    compression = vae.config.temporal_compression
    chunks = list(recut([z], chunk=LATENT_CHUNK, total=z.shape[2]))
    times: defaultdict[Place, Rounds] = defaultdict(lambda: Rounds(cp))
    for start in range(0, len(chunks), cp.size):
        here = chunks[start : start + cp.size]
        mine = here[cp.rank] if cp.rank < len(here) else chunks[-1]  # something to do, so that no neighbour waits
        video = tiled(vae.decoder, mine, times=times, tiling=tiling, units=(1, vae.config.spatial_compression))
        for time in times.values():
            time.next()
        frames = [compression * chunk.shape[2] for chunk in here]
        if start == 0:
            frames[0] -= compression - 1
        counts = frames + [0] * (cp.size - len(here))
        yield _joined(video[:, :, : counts[cp.rank]], counts, cp)


def _joined(video: Tensor, counts: Sequence[int], cp: Axis) -> Tensor:
    """[1, 3, counts[r], H, W] of every rank, one after another."""
    return gather(video[0].transpose(0, 1).contiguous(), cp, counts=counts).wait().transpose(0, 1)[None]
