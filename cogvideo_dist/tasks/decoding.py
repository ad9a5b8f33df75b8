"""Latents of one clip -> its pixels, by one process or by ranks that share its frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from cogvideo_dist.models.vae import VAE, Semantics
from cogvideo_dist.models.vae_tiles import tiled
from cogvideo_dist.parallel.frames import Shards, frames_of, latent_shares
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import gather
from cogvideo_dist.tasks.pixels import tiling_of


@torch.no_grad()
def decoded(vae: VAE, latents: Tensor, *, semantics: Semantics, tiling: bool, cp: Axis) -> Iterator[Tensor]:
    """Latents [T, C, h, w], unscaled -> video in about [-1, 1], float32, in pieces [3, any t, H, W] in order.

    Chunked, a piece has eight frames and is made when it is asked for, so that the device's memory does not grow with the
    clip. Whole, there is one piece, whose frames the ranks of ``cp`` decode together; each of them gets all.
    """
    weight = next(vae.parameters())
    z, tiles = latents.to(weight.device, weight.dtype).transpose(0, 1)[None], tiling_of(vae, tiling)
    if cp.size > 1:
        check_decoding(len(latents), semantics=semantics, ranks=cp.size)
        yield _together(vae, z, tiling=tiling, cp=cp).float()
    elif semantics == "whole":
        yield vae.decode(z, semantics=semantics, tiling=tiles)[0].float()
    else:
        for piece in vae.decode_stream([z], total=len(latents), tiling=tiles):
            yield piece[0].float()


def check_decoding(latents: int, *, semantics: Semantics, ranks: int) -> None:
    """Refuse a clip of so many latent frames that does not split over ``ranks``."""
    if ranks > 1 and semantics != "whole":
        raise ValueError(
            f'{ranks} ranks decode a video together in the autoencoder\'s semantics "whole" alone; in "{semantics}" each '
            "chunk waits for the one before"
        )
    latent_shares(latents, ranks)


def _together(vae: VAE, z: Tensor, *, tiling: bool, cp: Axis) -> Tensor:
    """z [1, C, T, h, w], of which each rank decodes its share -> [3, frames, H, W] on all."""
    shares, units = latent_shares(z.shape[2], cp.size), (1, vae.config.spatial_compression)
    mine = z.split(shares, dim=2)[cp.rank].contiguous()
    times: defaultdict[tuple[int, int], Shards] = defaultdict(lambda: Shards(cp))
    video = tiled(vae.decoder, mine, times=times, tiling=tiling_of(vae, tiling), units=units)
    compression = vae.config.temporal_compression
    counts = [len(frames_of(shares, rank, compression=compression)) for rank in range(cp.size)]
    return gather(video[0].transpose(0, 1).contiguous(), cp, counts=counts).wait().transpose(0, 1)
