"""Sizes of the released transformers, and tiny ones of the same kinds for tests and first runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Positions = Literal["sincos", "rope"]
RopeGrid = Literal["fit_base", "extrapolate"]


@dataclass(frozen=True)
class DiTConfig:
    """What changes a transformer's weights or mathematics. Sizes of the sample are in latents, text in tokens."""

    layers: int
    heads: int
    head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    positions: Positions = "rope"
    rope_grid: RopeGrid = "fit_base"
    """``fit_base`` stretches spatial positions over the base sample as diffusers does for 1.0; ``extrapolate`` counts them."""
    learned_positions: bool = False
    ofs: bool = False
    time_embed_dim: int = 512
    text_dim: int = 4096
    text_length: int = 226
    sample_frames: int = 13
    sample_height: int = 60
    sample_width: int = 90
    spatial_interpolation: float = 1.875
    temporal_interpolation: float = 1.0
    norm_eps: float = 1e-5
    head_norm_eps: float = 1e-6
    out_norm_eps: float = 1e-5
    """1e-5 is what diffusers computes with; SAT used 1e-6."""

    def __post_init__(self) -> None:
        if min(self.layers, self.heads) < 1:
            raise ValueError(f"a transformer needs layers and heads >= 1, found {self.layers} and {self.heads}")
        if self.head_dim % 16:
            raise ValueError(f"head_dim {self.head_dim} does not split into t:h:w = 2:3:3 pairs; use a multiple of 16")
        if self.learned_positions and self.positions != "rope":
            raise ValueError("learned_positions go with positions: rope (the released 5B-I2V); sincos has none")

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def patch_features_in(self) -> int:
        return self.in_channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def patch_features_out(self) -> int:
        return self.out_channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def sample_grid(self) -> tuple[int, int, int]:
        """Patches of the base sample in t, h, w; an odd number of latent frames is padded to whole patches."""
        t, h, w = self.patch
        return -(-self.sample_frames // t), self.sample_height // h, self.sample_width // w

    @property
    def image_channels(self) -> int:
        """Channels of the image condition that is concatenated to the noisy latent: 0 for text-to-video."""
        return self.in_channels - self.out_channels


_5B = DiTConfig(layers=42, heads=48)
_15_5B = replace(
    _5B, patch=(2, 2, 2), rope_grid="extrapolate", text_length=224, sample_frames=21, sample_height=96, sample_width=170
)

RELEASED: dict[str, DiTConfig] = {
    "cogvideox-2b": DiTConfig(layers=30, heads=30, positions="sincos"),
    "cogvideox-5b": _5B,
    "cogvideox-5b-i2v": replace(_5B, in_channels=32, learned_positions=True),
    "cogvideox1.5-5b": _15_5B,
    "cogvideox1.5-5b-i2v": replace(_15_5B, in_channels=32, ofs=True),
}

LATENT_SCALE: dict[str, float] = {name: 1.15258426 if name.endswith("2b") else 0.7 for name in RELEASED}
"""Factor between the VAE's latents and those the transformer sees."""

SNR_SHIFT: dict[str, float] = {name: 3.0 if name.endswith("2b") else 1.0 for name in RELEASED}


def tiny(name: str) -> DiTConfig:
    """The released model ``name`` at toy size: the same kinds of layers, positions and patches."""
    full = RELEASED[name]
    return replace(
        full, layers=2, heads=3, head_dim=16, time_embed_dim=24, text_dim=20, text_length=6,
        in_channels=full.in_channels // 4, out_channels=4, sample_frames=3 + full.patch[0] % 2, sample_height=12,
        sample_width=16,
    )  # fmt: skip


PRESETS: dict[str, DiTConfig] = RELEASED | {f"tiny-{name}": tiny(name) for name in RELEASED}
