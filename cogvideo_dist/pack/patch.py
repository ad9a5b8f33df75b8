"""Latents to patch tokens and back. Legend: t h w = patches, c = channels, o p q = latents within a patch in t, h, w."""

from __future__ import annotations

from torch import Tensor

Patch = tuple[int, int, int]


def grid_of(latent_shape: tuple[int, int, int], patch: Patch) -> tuple[int, int, int]:
    """The (t, h, w) grid of patches of a latent (T, H, W); refuses sizes that do not divide."""
    for name, size, part in zip(("frames", "height", "width"), latent_shape, patch):
        if size % part:
            raise ValueError(f"a latent of {size} {name} does not divide into patches of {part}")
    return latent_shape[0] // patch[0], latent_shape[1] // patch[1], latent_shape[2] // patch[2]


def patchify(latent: Tensor, patch: Patch) -> Tensor:
    """[..., T, C, H, W] -> [..., t*h*w, c*o*p*q], the order of the released patch embeddings."""
    *lead, frames, channels, height, width = latent.shape
    t, h, w = grid_of((frames, height, width), patch)
    o, p, q = patch
    x = latent.reshape(*lead, t, o, channels, h, p, w, q)
    d = len(lead)
    order = [*range(d), d, d + 3, d + 5, d + 2, d + 1, d + 4, d + 6]
    return x.permute(order).reshape(*lead, t * h * w, channels * o * p * q)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: Patch) -> Tensor:
    """[..., t*h*w, c*o*p*q] -> [..., T, C, H, W], the inverse of ``patchify``."""
    *lead, _, features = tokens.shape
    (t, h, w), (o, p, q) = grid, patch
    channels = features // (o * p * q)
    d = len(lead)
    x = tokens.reshape(*lead, t, h, w, channels, o, p, q)
    order = [*range(d), d, d + 4, d + 3, d + 1, d + 5, d + 2, d + 6]
    return x.permute(order).reshape(*lead, t * o, channels, h * p, w * q)
