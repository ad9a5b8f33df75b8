"""The parts of the causal 3D VAE: convolution, normalisation, residual block, down- and upsampling.

Every part keeps the memory layout channels_last_3d, which is what convolutions run fastest on and what makes frames
contiguous. What happens to the first frame depends on ``time.first`` (frame 0 of the clip), never on a frame count.

Legend: B batch, C channels, G groups, T H W frames, height, width; t h w the same of the latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cogvideo_dist.parallel.frames import TimeContext

LAYOUT = torch.channels_last_3d
ROOM = 2  # frames that a causal convolution of three frames looks back
LARGEST_CONV = 2**30  # elements of one convolution's input or output; GPU kernels index with 32 bits


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution that sees the present and the two frames before it; zero padding in space."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def forward(self, x: Tensor, time: TimeContext) -> Tensor:  # type: ignore[override]
        """``x`` [B, C, ROOM+T, H, W] -> [B, C', T, H, W]. The first ROOM frames of ``x`` are room: they are filled here."""
        x[:, :, :ROOM] = time.left(self, x[:, :, ROOM:], ROOM)
        frames = x.shape[2] - ROOM
        largest_frame = x[:, 0, 0].numel() * max(self.in_channels, self.out_channels)
        run = max(1, LARGEST_CONV // largest_frame - ROOM)
        pieces = [self._run(x[:, :, start : start + run + ROOM]) for start in range(0, frames, run)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def _run(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight, self.bias, padding=(0, 1, 1))


def with_room(x: Tensor) -> Tensor:
    """A copy of ``x`` [B, C, T, H, W] with ROOM frames of room in front, for ``CausalConv3d``."""
    return F.pad(x, (0, 0, 0, 0, ROOM, 0)).contiguous(memory_format=LAYOUT)


class Moments(torch.autograd.Function):
    """x [B, C, T, H, W] -> mean and sum of squared deviations [B, G], at least float32; keeps only x for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        count = x[0].numel() // groups
        mean = x.sum((2, 3, 4), dtype=dtype).unflatten(1, (groups, -1)).sum(2) / count
        # Two passes: the square of a mean far from zero would swallow the variance in float32.
        m2 = (x - per_channel(mean, x)).square_().sum((2, 3, 4)).unflatten(1, (groups, -1)).sum(2)
        ctx.save_for_backward(x, mean)
        return mean, m2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_m2: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        count = x[0].numel() // mean.shape[1]
        # d mean / dx = 1/n, d m2 / dx = 2 (x - mean)
        offset, slope = grad_mean / count - 2 * grad_m2 * mean, 2 * grad_m2
        return torch.addcmul(per_channel(offset, x).to(x.dtype), x, per_channel(slope, x).to(x.dtype)), None


def per_channel(groups: Tensor, x: Tensor) -> Tensor:
    """Values per group [B, G] -> [B, C, 1, 1, 1] for the channels of ``x``."""
    return groups.repeat_interleave(x.shape[1] // groups.shape[1], dim=1)[:, :, None, None, None]


class ModulateSiLU(torch.autograd.Function):
    """silu(x * scale + shift) -> [B, C, ROOM+T, H, W], with ROOM uninitialised frames in front for ``CausalConv3d``.

    ``scale`` and ``shift`` [B, C, t, h, w] are nearest-upsampled to x [B, C, T, H, W] on the fly. Backward recomputes the
    product from x, so that neither it nor an upsampled scale is ever kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, first: bool) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.first = first
        batch, channels, frames, height, width = x.shape
        padded = x.new_empty((batch, channels, ROOM + frames, height, width), memory_format=LAYOUT)
        out = padded[:, :, ROOM:]
        for frame, cell in matching_frames(x, scale, first):
            tiled = tile(out[:, :, frame], scale[:, :, cell])
            torch.addcmul(
                broadcast(shift[:, :, cell].to(x.dtype)),
                tile(x[:, :, frame], scale[:, :, cell]),
                broadcast(scale[:, :, cell].to(x.dtype)),
                out=tiled,
            )
        F.silu(out, inplace=True)
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, scale, shift = ctx.saved_tensors
        grad_x, grad_scale, grad_shift = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift)
        for frame, cell in matching_frames(x, scale, ctx.first):
            gain = broadcast(scale[:, :, cell].to(x.dtype))
            tiled = tile(x[:, :, frame], scale[:, :, cell])
            before = torch.addcmul(broadcast(shift[:, :, cell].to(x.dtype)), tiled, gain)
            out = tile(grad[:, :, ROOM:][:, :, frame], scale[:, :, cell])
            slope = torch.ops.aten.silu_backward(out, before)
            torch.mul(slope, gain, out=tile(grad_x[:, :, frame], scale[:, :, cell]))
            grad_shift[:, :, cell] = slope.sum((3, 5, 7), dtype=shift.dtype)
            grad_scale[:, :, cell] = slope.mul_(tiled).sum((3, 5, 7), dtype=scale.dtype)
        return grad_x, grad_scale, grad_shift, None


def matching_frames(x: Tensor, cells: Tensor, first: bool) -> Iterator[tuple[slice, slice]]:
    """Frames of ``x`` and of the coarser ``cells`` that belong together; frame 0 of a clip has a cell of its own."""
    if first and cells.shape[2] > 1:
        yield slice(0, 1), slice(0, 1)
        yield slice(1, None), slice(1, None)
    else:
        yield slice(None), slice(None)


def tile(x: Tensor, cells: Tensor) -> Tensor:
    """A view [B, C, t, T/t, h, H/h, w, W/w] of ``x`` [B, C, T, H, W] for cells [B, C, t, h, w]."""
    t, h, w = cells.shape[2:]
    return x.unflatten(2, (t, -1)).unflatten(4, (h, -1)).unflatten(6, (w, -1))


def broadcast(cells: Tensor) -> Tensor:
    """[B, C, t, h, w] -> [B, C, t, 1, h, 1, w, 1], to meet ``tile``."""
    return cells[:, :, :, None, :, None, :, None]


class NormSiLU(nn.Module):
    """SiLU of a group norm over the clip, in the decoder conditioned on the latents (spatial norm, arXiv 2209.09002 eq. 2).

    The spatial norm's 1x1x1 convolutions and its nearest upsampling commute, so they run at the latents' size and the
    affine map reaches the activation as one scale and one shift per latent cell.
    """

    def __init__(self, channels: int, groups: int, eps: float, latent_channels: int | None = None) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = None if latent_channels is None else nn.Conv3d(latent_channels, channels, 1)
        self.shift = None if latent_channels is None else nn.Conv3d(latent_channels, channels, 1)

    def forward(self, x: Tensor, time: TimeContext, latents: Tensor | None) -> Tensor:
        """``x`` [B, C, T, H, W], latents [B, z, t, h, w] -> [B, C, ROOM+T, H, W], see ``ModulateSiLU``."""
        mean, m2 = Moments.apply(x, self.groups)
        mean, variance = time.moments(x[0].numel() // self.groups, mean, m2)
        scale = per_channel((variance + self.eps).rsqrt(), x) * self.weight[:, None, None, None]
        shift = self.bias[:, None, None, None] - per_channel(mean, x) * scale
        if self.scale is not None and self.shift is not None:
            gain = self.scale(latents)
            scale, shift = scale * gain, shift * gain + self.shift(latents)
        return ModulateSiLU.apply(x, scale, shift, time.first)


class ResBlock(nn.Module):
    """Two (norm, SiLU, causal convolution) and a skip, which is a 1x1x1 convolution where the channels change."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, latent_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels, groups, eps, latent_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = NormSiLU(out_channels, groups, eps, latent_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: TimeContext, latents: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]"""
        # One expression, so that no name keeps an activation alive while the next one is made.
        out = self.conv2(self.norm2(self.conv1(self.norm1(x, time, latents), time), time, latents), time)
        return out.add_(self.shortcut(x))


class Downsample(nn.Conv2d):
    """Halves height and width by a strided convolution per frame, and with ``in_time`` first averages pairs of frames.

    Frame 0 of a clip has no partner and stays: 1+2k frames become 1+k.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__(channels, channels, 3, stride=2)
        self.in_time = in_time

    def forward(self, x: Tensor, time: TimeContext) -> Tensor:  # type: ignore[override]
        """[B, C, T, H, W] -> [B, C, T' , H/2, W/2]"""
        if self.in_time:
            head, pairs = x[:, :, : int(time.first)], x[:, :, int(time.first) :]
            x = torch.cat([head, (pairs[:, :, 0::2] + pairs[:, :, 1::2]).mul_(0.5)], dim=2)
        padded = F.pad(frames_as_batch(x), (0, 1, 0, 1))
        return super().forward(padded).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Upsample(nn.Conv2d):
    """Doubles height and width (nearest, then a 3x3 convolution per frame), with ``in_time`` also the frames but frame 0.

    A 3x3 kernel on a nearest-upsampled image meets only 2x2 different pixels, so each of the four output phases is a 2x2
    convolution of the small image; repeated frames are convolved once. Both are exact, for 4/9 and 2/9 of the products.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.in_time = in_time

    def forward(self, x: Tensor, time: TimeContext) -> Tensor:  # type: ignore[override]
        """[B, C, T, H, W] -> [B, C, T', 2H, 2W]"""
        batch, channels, _, height, width = x.shape
        kernel = phases(phases(self.weight, 2), 4)  # [C, C, 3, 3] -> [x phase, y phase, C, C, 2, 2]
        bias = self.bias.repeat(4)  # type: ignore[union-attr]
        corners = F.conv2d(frames_as_batch(x), kernel.flatten(0, 2), bias, padding=1)
        corners = corners.unflatten(1, (2, 2, channels)).unflatten(0, (batch, -1))  # [B, T, 2, 2, C, H+1, W+1]
        rows = [
            torch.stack([corners[:, :, q, p, :, p : p + height, q : q + width] for q in (0, 1)], dim=-1) for p in (0, 1)
        ]
        return torch.stack(rows, dim=-3)
