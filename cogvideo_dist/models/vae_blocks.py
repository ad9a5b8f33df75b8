"""The parts of the causal 3D VAE: convolution, normalisation, residual block, down- and upsampling.

Every part keeps the memory layout channels_last_3d, which is what convolutions run fastest on and what makes frames
contiguous. What happens to the first frame depends on ``time.first`` (frame 0 of the clip), never on a frame count.

Legend: B batch, C channels, G groups, T H W frames, height, width; t h w the same of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cogvideo_dist.parallel.frames import Line, TimeContext

LAYOUT = torch.channels_last_3d
PAST = 2  # frames that a causal convolution of three frames looks back
LARGEST_CONV = 2**30  # elements of one convolution's input or output; GPU kernels index with 32 bits


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution that sees the present and the two frames before it; zero padding in space."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, PAST+T, H, W], the past included (``with_past`` or ``NormSiLU``) -> [B, C', T, H, W]"""
        frames = x.shape[2] - PAST
        largest_frame = x[:, 0, 0].numel() * max(self.in_channels, self.out_channels)
        run = max(1, LARGEST_CONV // largest_frame - PAST)
        if run >= frames:
            return super().forward(x)
        pieces = [super(CausalConv3d, self).forward(x[:, :, i : i + run + PAST]) for i in range(0, frames, run)]
        return torch.cat(pieces, dim=2)


def with_past(x: Tensor, time: TimeContext, *, conv: CausalConv3d) -> Tensor:
    """``x`` [B, C, T, H, W] with the PAST frames that ``conv`` sees left of it, in this module's memory layout."""
    return time.recall(conv, WithPast.apply(x, time.first, time.line), width=PAST)


class WithPast(torch.autograd.Function):
    """x [B, C, T, H, W] -> [B, C, PAST+T, H, W]: on its left frame 0 repeated, or what the piece before lends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: bool, line: Line) -> Tensor:
        ctx.first, ctx.line = first, line
        padded = room_for(x)
        coming = line.lend(x[:, :, -PAST:], first=x[:, :, :1].expand(-1, -1, PAST, -1, -1))
        padded[:, :, PAST:] = x  # while the past is on its way
        padded[:, :, :PAST] = coming.wait()
        return padded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return WithoutPast.apply(grad, ctx.first, ctx.line), None, None


class WithoutPast(torch.autograd.Function):
    """The adjoint of ``WithPast``, and it the adjoint of this: gradients of gradients cross ranks too."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, first: bool, line: Line) -> Tensor:
        ctx.first, ctx.line = first, line
        coming = line.give_back(grad[:, :, :PAST])
        own = grad[:, :, PAST:].clone()
        if first:
            own[:, :, :1] += repeated(grad)
        lent = coming.wait()
        if line.lends:
            own[:, :, -PAST:] += lent
        return own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return WithPast.apply(grad, ctx.first, ctx.line), None, None


def room_for(x: Tensor) -> Tensor:
    """An empty [B, C, PAST+T, H, W] for x [B, C, T, H, W] and its past."""
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, PAST + frames, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)


def repeated(grad: Tensor) -> Tensor:
    """The gradient [B, C, 1, H, W] that frame 0 has from being its own past, of one [B, C, PAST+T, H, W]."""
    return grad[:, :, :PAST].sum(2, keepdim=True)


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
    def backward(ctx: Any, grad_mean: Tensor, grad_m2: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        count = x[0].numel() // mean.shape[1]
        # d mean / dx = 1/n, d m2 / dx = 2 (x - mean)
        offset, slope = grad_mean / count - 2 * grad_m2 * mean, 2 * grad_m2
        return torch.addcmul(per_channel(offset, x).to(x.dtype), x, per_channel(slope, x).to(x.dtype)), None


def per_channel(groups: Tensor, x: Tensor) -> Tensor:
    """Values per group [B, G] -> [B, C, 1, 1, 1] for the channels of ``x``."""
    return groups.repeat_interleave(x.shape[1] // groups.shape[1], dim=1)[:, :, None, None, None]


class ModulateSiLU(torch.autograd.Function):
    """silu(x * scale + shift) with the past on its left (``WithPast``) -> [B, C, PAST+T, H, W].

    ``scale`` and ``shift`` [B, C, t, h, w] are nearest-upsampled to x [B, C, T, H, W] on the fly. Backward recomputes the
    product from x, so that neither it nor an upsampled scale is ever kept. The frames that are lent are made first, and their
    gradient is used last: they travel while the others are worked on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, first: bool, line: Line) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.first, ctx.line = first, line
        padded = room_for(x)
        out = padded[:, :, PAST:]

        def make(frame: slice, cell: slice) -> None:
            gain, offset = (broadcast(cells[:, :, cell], x) for cells in (scale, shift))
            torch.addcmul(offset, tile(x[:, :, frame], gain), gain, out=tile(out[:, :, frame], gain))
            F.silu(out[:, :, frame], inplace=True)

        *kept, lent = matching_frames(x, scale, first=first, lent=PAST * line.shared)
        make(*lent)
        coming = line.lend(padded[:, :, -PAST:], first=out[:, :, :1].expand(-1, -1, PAST, -1, -1))
        for run in kept:
            make(*run)
        padded[:, :, :PAST] = coming.wait()
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, scale, shift = ctx.saved_tensors
        coming = ctx.line.give_back(grad[:, :, :PAST])
        grad_x, grad_scale, grad_shift = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(shift)
        for frame, cell in matching_frames(x, scale, first=ctx.first, lent=PAST * ctx.line.shared):
            own = grad[:, :, PAST:][:, :, frame]
            if ctx.first and frame.start == 0:
                own = own.clone()
                own[:, :, :1] += repeated(grad)
            if frame.stop == x.shape[2]:
                given_back = coming.wait()
                if ctx.line.lends:
                    own = own.clone()
                    own[:, :, -PAST:] += given_back
            gain, offset = (broadcast(cells[:, :, cell], x) for cells in (scale, shift))
            tiles = tile(x[:, :, frame], gain)
            slope = torch.ops.aten.silu_backward(tile(own, gain), torch.addcmul(offset, tiles, gain))
            torch.mul(slope, gain, out=tile(grad_x[:, :, frame], gain))
            grad_shift[:, :, cell] += slope.sum((3, 5, 7), dtype=shift.dtype)
            grad_scale[:, :, cell] += slope.mul_(tiles).sum((3, 5, 7), dtype=scale.dtype)
        return grad_x, grad_scale, grad_shift, None, None


def matching_frames(x: Tensor, cells: Tensor, *, first: bool, lent: int) -> list[tuple[slice, slice]]:
    """Runs of frames of x [B, C, T, H, W] and the ``cells`` [B, C, t, h, w] that cover them, from left to right.

    Frame 0 of a clip has a cell of its own, and the last run is no longer than ``lent`` frames and their cells are.
    """
    frames, count = x.shape[2], cells.shape[2]
    head = int(first and count > 1)
    each = (frames - head) // (count - head) if count > 1 else 1
    last = max(0, frames - math.ceil(lent / each) * each) if lent else int(first and frames > 1)
    starts = sorted({0, min(int(first), last), last})
    runs = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], frames])]
    if count == 1:
        return [(run, slice(None)) for run in runs]
    return [(run, slice(*(head + (end - head) // each for end in (run.start, run.stop)))) for run in runs]


def broadcast(cells: Tensor, x: Tensor) -> Tensor:
    """[B, C, t, h, w] -> [B, C, t, 1, h, 1, w, 1], to meet ``tile``; in the precision of ``x``, channels next to each other."""
    return cells.to(x.dtype, memory_format=LAYOUT)[:, :, :, None, :, None, :, None]


def tile(x: Tensor, cells: Tensor) -> Tensor:
    """A view [B, C, t, T/t, h, H/h, w, W/w] of ``x`` [B, C, T, H, W] for cells [B, C, t, 1, h, 1, w, 1]."""
    t, h, w = cells.shape[2::2]
    return x.unflatten(2, (t, -1)).unflatten(4, (h, -1)).unflatten(6, (w, -1))


class NormSiLU(nn.Module):
    """SiLU of a group norm over the clip, in the decoder conditioned on the latents (spatial norm, arXiv 2209.09002 eq. 2).

    The spatial norm's 1x1x1 convolutions and its nearest upsampling commute, so they run at the latents' size and the
    affine map reaches the activation as one scale and one shift per latent cell.
    """

    def __init__(self, channels: int, *, groups: int, eps: float, latent_channels: int | None = None) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = None if latent_channels is None else nn.Conv3d(latent_channels, channels, 1)
        self.shift = None if latent_channels is None else nn.Conv3d(latent_channels, channels, 1)

    def forward(self, x: Tensor, time: TimeContext, *, latents: Tensor | None = None) -> Tensor:
        """``x`` [B, C, T, H, W], latents [B, z, t, h, w] -> [B, C, PAST+T, H, W], the input of a ``CausalConv3d``."""
        mean, m2 = Moments.apply(x, self.groups)
        mean, variance = time.moments(mean, m2, count=x[0].numel() // self.groups)
        scale = per_channel((variance + self.eps).rsqrt(), x) * self.weight[:, None, None, None]
        shift = self.bias[:, None, None, None] - per_channel(mean, x) * scale
        if self.scale is not None and self.shift is not None:
            gain = self.scale(latents)
            scale, shift = scale * gain, shift * gain + self.shift(latents)
        return time.recall(self, ModulateSiLU.apply(x, scale, shift, time.first, time.line), width=PAST)


class ResBlock(nn.Module):
    """Two (norm, SiLU, causal convolution) and a skip, which is a 1x1x1 convolution where the channels change."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, latent_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels, groups=groups, eps=eps, latent_channels=latent_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = NormSiLU(out_channels, groups=groups, eps=eps, latent_channels=latent_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: TimeContext, *, latents: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]"""
        # One expression, so that no name keeps an activation alive while the next one is made.
        out = self.conv2(self.norm2(self.conv1(self.norm1(x, time, latents=latents)), time, latents=latents))
        return out + self.shortcut(x)


class Downsample(nn.Conv2d):
    """Halves height and width by a strided convolution per frame, and with ``in_time`` first averages pairs of frames.

    Frame 0 of a clip has no partner and stays: 1+2k frames become 1+k.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__(channels, channels, 3, stride=2)
        self.in_time = in_time

    def forward(self, x: Tensor, time: TimeContext) -> Tensor:  # type: ignore[override]
        """[B, C, T, H, W] -> [B, C, T', H/2, W/2]"""
        if self.in_time:
            head, pairs = x[:, :, : int(time.first)], x[:, :, int(time.first) :]
            x = torch.cat([head, (pairs[:, :, 0::2] + pairs[:, :, 1::2]).mul_(0.5)], dim=2)
        padded = F.pad(frames_as_batch(x), (0, 1, 0, 1))
        return super().forward(padded).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Upsample(nn.Conv2d):
    """Doubles height and width (nearest, then a 3x3 convolution per frame), with ``in_time`` also all frames but frame 0.

    A 3x3 kernel on a nearest-upsampled image meets only 2x2 different pixels, so each of the four output phases is a 2x2
    convolution of the small image, and repeated frames are convolved once: 4/9 and 2/9 of the products.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.in_time = in_time

    def forward(self, x: Tensor, time: TimeContext) -> Tensor:  # type: ignore[override]
        """[B, C, T, H, W] -> [B, C, T', 2H, 2W]"""
        kernel = phase_kernels(phase_kernels(self.weight, 2), 4)  # [x phase, y phase, C, C, 2, 2]
        bias = self.bias.repeat(4)  # type: ignore[union-attr]
        corners = F.conv2d(frames_as_batch(x), kernel.flatten(0, 2), bias, padding=1)
        # [B*T, 4C, H+1, W+1] -> [x phase, y phase, B, C, T, H+1, W+1]
        corners = corners.unflatten(1, (2, 2, -1)).unflatten(0, (x.shape[0], -1)).permute(2, 3, 0, 4, 1, 5, 6)
        return Interleave.apply(corners, int(time.first) if self.in_time else x.shape[2])


def phase_kernels(kernel: Tensor, dim: int) -> Tensor:
    """Taps (a, b, c) along ``dim`` on a doubled signal -> taps on the signal: (a, b+c) for even, (a+b, c) for odd places."""
    a, b, c = kernel.unbind(dim)
    return torch.stack([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)])


class Interleave(torch.autograd.Function):
    """Phases [x phase, y phase, B, C, T, H+1, W+1] -> [B, C, T', 2H, 2W]; frames after the first ``single`` come twice.

    The even phase of a row or column starts at corner 0, the odd one at corner 1.
    """

    @staticmethod
    def forward(ctx: Any, corners: Tensor, single: int) -> Tensor:
        ctx.single = single
        batch, channels, frames, height, width = corners.shape[2:]
        shape = (batch, channels, 2 * frames - single, 2 * height - 2, 2 * width - 2)
        out = torch.empty(shape, dtype=corners.dtype, device=corners.device, memory_format=LAYOUT)
        for part, corner in Interleave.parts(out, corners, single=single):
            part.copy_(corner.expand_as(part))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        batch, channels, frames, height, width = grad.shape
        shape = (batch, (frames + ctx.single) // 2, height // 2 + 1, width // 2 + 1, 2, 2, channels)
        corners = grad.new_zeros(shape).permute(4, 5, 0, 6, 1, 2, 3)
        for part, corner in Interleave.parts(grad, corners, single=ctx.single):
            torch.sum(part, 3, keepdim=True, out=corner)
        return corners, None

    @staticmethod
    def parts(out: Tensor, corners: Tensor, *, single: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Views [B, C, frames, repeats, H, W] of ``out`` and [B, C, frames, 1, H, W] of ``corners`` that belong together."""
        height, width = corners.shape[-2] - 1, corners.shape[-1] - 1
        doubled = corners.shape[4] - single
        for q, p in ((0, 0), (0, 1), (1, 0), (1, 1)):
            part = out[..., p::2, q::2]
            corner = corners[q, p, ..., p : p + height, q : q + width].unsqueeze(3)
            yield part[:, :, :single].unsqueeze(3), corner[:, :, :single]
            yield part[:, :, single:].unflatten(2, (doubled, 2)), corner[:, :, single:]


def frames_as_batch(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W], a view in this module's memory layout."""
    return x.transpose(1, 2).flatten(0, 1)
