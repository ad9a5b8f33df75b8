"""The critic of adversarial training: a discriminator of patches (Isola et al. 2017, arXiv 1611.07004), in 3D and causal.

Time is never strided and what a convolution sees of it lies on its left, so a clip may be split in time wherever the
autoencoder's may, and one frame is a clip. The normalisation is that of each place over its channels (Karras et al. 2018,
arXiv 1710.10196, section 4.2): statistics over a frame or a clip would have to be merged over ranks, twice differentiably
for a gradient penalty, and would let a logit see more than its patch.

Legend: B batch, C channels, T H W frames, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo_dist.models.init import Initial, constant, fan_in_uniform
from cogvideo_dist.models.vae_blocks import PAST, CausalConv3d, with_past
from cogvideo_dist.parallel.frames import TimeContext, Whole

SLOPE = 0.2
WHOLE = Whole()


@dataclass(frozen=True)
class CriticConfig:
    """``channels`` of the layers; all but the last halve height and width. The defaults see 54x54 pixels of 11 frames."""

    channels: tuple[int, ...] = (64, 128, 256, 512)
    in_channels: int = 3
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) <= 0:
            raise ValueError(f"the critic's channels are {self.channels}; give one positive number for each layer")
        for name in ("in_channels", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"the critic's {name} is {getattr(self, name)}; it must be positive")

    def logits(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Frames, height and width of the logits of a clip of ``size`` (frames, height, width), whatever that is."""
        frames, height, width = size
        stride = 1 << (len(self.channels) - 1)
        return frames, math.ceil(height / stride), math.ceil(width / stride)


class PatchConv3d(CausalConv3d):
    """3x4x4 convolution, causal in time, that halves height and width, rounding up.

    The kernel is a multiple of the stride, so that every pixel has the same weight in what is judged.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        nn.Conv3d.__init__(self, in_channels, out_channels, (PAST + 1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, PAST+T, H, W], the past included (``with_past``) -> [B, C', T, H/2, W/2]"""
        return super().forward(F.pad(x, (0, x.shape[4] % 2, 0, x.shape[3] % 2)))


class ChannelNorm(nn.Module):
    """x / sqrt(mean over channels of x^2), times a gain for each channel. Of plain operations, so twice differentiable."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W], the same"""
        dtype = torch.promote_types(x.dtype, torch.float32)
        power = x.square().mean(1, keepdim=True, dtype=dtype)
        return x * (power + self.eps).rsqrt().to(x.dtype) * self.weight[:, None, None, None]


class Layer(nn.Module):
    """Convolution, norm and leaky ReLU."""

    def __init__(self, conv: CausalConv3d, norm: ChannelNorm | None) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor, time: TimeContext) -> Tensor:
        x = self.conv(with_past(x, time, conv=self.conv))
        return F.leaky_relu(x if self.norm is None else self.norm(x), SLOPE)


class Critic(nn.Module):
    """Real or made? One logit for each patch of each frame; positive means real."""

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        for i, width in enumerate(config.channels):
            conv = PatchConv3d if i < len(config.channels) - 1 else CausalConv3d
            # The first layer goes without a norm, as in the paper: it alone sees how bright a picture is.
            norm = ChannelNorm(width, eps=config.norm_eps) if i else None
            self.layers.append(Layer(conv(config.channels[i - 1] if i else config.in_channels, width), norm))
        self.conv_out = CausalConv3d(config.channels[-1], 1)

    def initial(self, name: str) -> Initial:
        """How parameter ``name`` starts: gains of one, convolutions and their biases uniform by fan-in."""
        module = self.get_submodule(name.rpartition(".")[0])
        if isinstance(module, ChannelNorm):
            return constant(1.0)
        if isinstance(module, nn.Conv3d):
            return fan_in_uniform(module.in_channels * math.prod(module.kernel_size))
        raise ValueError(f"the critic has no start for parameter {name} of a {type(module).__name__}")

    def forward(self, video: Tensor, *, time: TimeContext = WHOLE) -> Tensor:
        """``video`` [B, 3, T, H, W] in [-1, 1] -> logits [B, 1, T, H', W'], sized as ``config.logits`` says."""
        x = video
        for layer in self.layers:
            x = layer(x, time)
        return self.conv_out(with_past(x, time, conv=self.conv_out))
