"""The causal 3D VAE of CogVideoX (arXiv 2408.06072, section 2.1): pixels to latents and back.

Frame 0 of a clip stands alone and every following group of ``temporal_compression`` frames shares a latent frame, so 1+4k
frames become 1+k latent frames; height and width shrink eightfold. Latents here are unscaled: whoever feeds a diffusion
model multiplies by ``config.scaling_factor``.

Group norms make a clip's latents depend on which frames share statistics. "whole" takes the whole clip, the definition for
training. "chunked" goes through the clip in chunks of eight frames (two latent frames) with statistics of their own, the
released models' mode of inference, where a clip may also come and go as a stream whose memory does not grow with its length.
Frames too large for the memory go through in tiles (``Tiling``) in either semantics.

Legend: B batch, T H W frames, height, width; t h w the same of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cogvideo_dist.models.init import Initial, constant, fan_in_uniform
from cogvideo_dist.models.vae_blocks import CausalConv3d, Downsample, NormSiLU, ResBlock, Upsample, with_past
from cogvideo_dist.models.vae_stream import Half, Semantics, check, checked
from cogvideo_dist.models.vae_tiles import Tiling
from cogvideo_dist.parallel.frames import TimeContext, Whole

__all__ = ["VAE", "Posterior", "Semantics", "Tiling", "VAEConfig"]

FRAME_CHUNK = 8
LATENT_CHUNK = 2
LOGVAR_RANGE = (-30.0, 20.0)
QUIET = -6.0
WHOLE = Whole()


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the VAE; the defaults are the released models'. ``block_out_channels`` runs from the finest level on."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    norm_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression: int = 4
    scaling_factor: float = 0.7
    sample_height: int = 480
    sample_width: int = 720

    def __post_init__(self) -> None:
        counts = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_groups")
        for name in (*counts, "norm_eps", "scaling_factor", "sample_height", "sample_width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"the VAE's {name} is {getattr(self, name)}; it must be positive")
        if not self.block_out_channels:
            raise ValueError("the VAE's block_out_channels is empty; give the channels of at least one level")
        for channels in self.block_out_channels:
            if channels <= 0 or channels % self.norm_groups:
                raise ValueError(
                    f"the VAE's block_out_channels {self.block_out_channels} must be multiples of "
                    f"norm_groups={self.norm_groups}; {channels} is not"
                )
        legal = [2**i for i in range(min(len(self.block_out_channels), 4))]
        if self.temporal_compression not in legal:
            raise ValueError(
                f"the VAE's temporal_compression is {self.temporal_compression}; with {len(self.block_out_channels)} levels, "
                f"each but the last halving time at most once, it must be one of {legal}"
            )

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along height and width."""
        return 1 << (len(self.block_out_channels) - 1)

    def latent_shape(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents of a clip of ``size`` (frames, height, width).

        Raises ValueError, naming the nearest legal size, unless frames = 1 + temporal_compression * k and height and width
        are multiples of spatial_compression.
        """
        frames, height, width = size
        nearest = 1 + self.temporal_compression * max(0, round((frames - 1) / self.temporal_compression))
        if frames != nearest:
            raise ValueError(
                f"a clip of {frames} frames; the VAE takes 1 + {self.temporal_compression}*k frames, the nearest is {nearest}"
            )
        for name, pixels in (("height", height), ("width", width)):
            legal = self.spatial_compression * max(1, round(pixels / self.spatial_compression))
            if pixels != legal:
                raise ValueError(
                    f"a clip of {name} {pixels}; the VAE takes multiples of {self.spatial_compression}, the nearest is {legal}"
                )
        compressed = 1 + (frames - 1) // self.temporal_compression
        return self.latent_channels, compressed, height // self.spatial_compression, width // self.spatial_compression


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(latents | clip): ``mean`` and ``logvar``, each [B, z, t, h, w]."""

    mean: Tensor
    logvar: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """The latents that the standard normal ``noise`` [B, z, t, h, w] stands for."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw [B, z, t, h, w]; its noise comes from the CPU in float32, so that it does not depend on the device."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32, device="cpu")
        return self.draw(noise.to(self.mean))

    def mode(self) -> Tensor:
        """The most likely latents [B, z, t, h, w]."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over each sample's elements: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution where there is one."""

    def __init__(self, blocks: Iterable[ResBlock], resample: Downsample | Upsample | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    def forward(self, x: Tensor, time: TimeContext, *, latents: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, time, latents=latents)
        return x if self.resample is None else self.resample(x, time)


class Encoder(nn.Module):
    """Clip [B, 3, T, H, W] -> mean and log-variance [B, 2z, t, h, w]; ``levels`` run from fine to coarse."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        block = partial(ResBlock, groups=config.norm_groups, eps=config.norm_eps)
        last = len(widths) - 1
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            ins = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block - 1)
            down = Downsample(width, in_time=2**i < config.temporal_compression) if i < last else None
            self.levels.append(Level([block(channels, width) for channels in ins], down))
        self.mid = Level([block(widths[-1], widths[-1]) for _ in range(2)])
        self.norm_out = NormSiLU(widths[-1], groups=config.norm_groups, eps=config.norm_eps)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, video: Tensor, time: TimeContext) -> Tensor:
        x = self.conv_in(with_past(video, time, conv=self.conv_in))
        for level in self.levels:
            x = level(x, time)
        return self.conv_out(self.norm_out(self.mid(x, time), time))


class Decoder(nn.Module):
    """Latents [B, z, t, h, w] -> clip [B, 3, T, H, W]; ``levels`` run from coarse to fine, one block more in each."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        block = partial(
            ResBlock, groups=config.norm_groups, eps=config.norm_eps, latent_channels=config.latent_channels
        )
        last = len(widths) - 1
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid = Level([block(widths[0], widths[0]) for _ in range(2)])
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            ins = [widths[max(i - 1, 0)]] + [width] * config.layers_per_block
            up = Upsample(width, in_time=2**i < config.temporal_compression) if i < last else None
            self.levels.append(Level([block(channels, width) for channels in ins], up))
        self.norm_out = NormSiLU(
            widths[-1], groups=config.norm_groups, eps=config.norm_eps, latent_channels=config.latent_channels
        )
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, latents: Tensor, time: TimeContext) -> Tensor:
        x = self.mid(self.conv_in(with_past(latents, time, conv=self.conv_in)), time, latents=latents)
        for level in self.levels:
            x = level(x, time, latents=latents)
        return self.conv_out(self.norm_out(x, time, latents=latents))


class VAE(nn.Module):
    """Encoder and decoder; pure, so where the frames stand comes in with each call."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def initial(self, name: str) -> Initial:
        """How parameter ``name`` starts: norms as the identity, convolutions and their biases uniform by fan-in.

        The posterior starts narrow (log-variance ``QUIET``): noise as large as the prior's would drown what an untrained
        encoder says, and hundreds of steps with it.
        """
        owner, _, kind = name.rpartition(".")
        module = self.get_submodule(owner)
        if name == "encoder.conv_out.bias":
            return lambda shape, generator: torch.tensor([0.0, QUIET]).repeat_interleave(shape[0] // 2)
        if kind == "bias" and owner.endswith((".scale", ".shift")):  # of a spatial norm
            return constant(1.0 if owner.endswith(".scale") else 0.0)
        if isinstance(module, NormSiLU):
            return constant(1.0 if kind == "weight" else 0.0)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            return fan_in_uniform(module.in_channels * math.prod(module.kernel_size))
        raise ValueError(f"the VAE has no start for parameter {name} of a {type(module).__name__}")

    def forward(self, video: Tensor, noise: Tensor, *, time: TimeContext = WHOLE) -> tuple[Tensor, Posterior]:
        """One pass of training: the reconstruction [B, 3, T, H, W] and the posterior that it was drawn from.

        ``video`` [B, 3, T, H, W] in [-1, 1]; ``noise`` [B, z, t, h, w] is the posterior's standard normal.
        """
        posterior = _posterior(self.encoder(video, time))
        return self.decoder(posterior.draw(noise), time), posterior

    def encode(self, video: Tensor, semantics: Semantics = "whole", *, tiling: Tiling | None = None) -> Posterior:
        """``video`` [B, 3, T, H, W] in [-1, 1] -> posterior over [B, z, t, h, w].

        Raises ValueError unless T = 1 + temporal_compression * k and H, W are multiples of spatial_compression.
        """
        check(video, "clip", channels=self.config.in_channels)
        self.config.latent_shape(video.shape[2:])
        return _posterior(self._encoding.run(video, semantics=semantics, tiling=tiling))

    def decode(self, latents: Tensor, semantics: Semantics = "whole", *, tiling: Tiling | None = None) -> Tensor:
        """``latents`` [B, z, t, h, w], unscaled -> [B, 3, 1 + temporal_compression * (t-1), H, W]."""
        check(latents, "latents", channels=self.config.latent_channels)
        return self._decoding.run(latents, semantics=semantics, tiling=tiling).contiguous()

    def encode_stream(
        self, frames: Iterable[Tensor], *, total: int | None = None, tiling: Tiling | None = None
    ) -> Iterator[Posterior]:
        """A clip in pieces [B, 3, any T, H, W] -> its posterior in pieces of two latent frames, the first one more.

        Memory does not grow with the clip. Bit by bit ``encode`` in "chunked" semantics if ``total``, the number of frames of
        the clip, is given. Without it the first chunk has 9 frames, which is the same for clips of 8k + 1 frames; one of
        8k + 5 then has its four frames over in the last chunk, not in the first.

        Raises ValueError, when the stream comes to it, for what ``encode`` refuses and where ``total`` is wrong.
        """
        channels = self.config.in_channels
        pieces = checked(frames, "clip", channels=channels, total=total, legal=self.config.latent_shape)
        for moments in self._encoding.stream(pieces, total=total, tiling=tiling):
            yield _posterior(moments)

    def decode_stream(
        self, latents: Iterable[Tensor], *, total: int | None = None, tiling: Tiling | None = None
    ) -> Iterator[Tensor]:
        """Latents in pieces [B, z, any t, h, w], unscaled -> their clip in pieces of eight frames, the first one more.

        As ``encode_stream``; ``total`` counts latent frames, and where it is left out even totals have their last latent frame
        alone in the last chunk.
        """
        channels = self.config.latent_channels
        pieces = checked(latents, "latents", channels=channels, total=total, legal=tuple)
        for video in self._decoding.stream(pieces, total=total, tiling=tiling):
            yield video.contiguous()

    @property
    def _encoding(self) -> Half:
        return Half(self.encoder, FRAME_CHUNK, (self.config.spatial_compression, 1))

    @property
    def _decoding(self) -> Half:
        return Half(self.decoder, LATENT_CHUNK, (1, self.config.spatial_compression))


def _posterior(moments: Tensor) -> Posterior:
    mean, logvar = moments.chunk(2, dim=1)
    return Posterior(mean.contiguous(), logvar.clamp(*LOGVAR_RANGE).contiguous())
