"""What a run is told of the model that it starts from and of how much of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LINEARS = ("q", "k", "v", "out", "ff1", "ff2")
"""Linears of a block, by which most of its work is done; q, k and v are one product."""

OTHERS = ("modulation", "patch", "text", "time1", "time2", "ofs1", "ofs2", "head_modulation", "proj")
"""All other linears: a block's modulation, the two embeddings of tokens, those of the timestep, the last layer's."""


@dataclass(frozen=True)
class Init:
    """Starts a stage from the weights of another run of launch/train_dit.py, ``from``: the averaged ones or the last ones.

    ``positions`` says what becomes of positions where the stage's base size is another: ``extrapolate`` counts on beyond what
    the earlier run has seen, ``interpolate`` spreads a clip over the range that it has. Parameters that the earlier model lacks
    (an image condition's channels, ofs, learned positions) start from zero where ``widen`` allows it, and are listed.
    """

    from_: str
    weights: Literal["ema", "raw"] = "ema"
    positions: Literal["extrapolate", "interpolate"] | None = None
    widen: bool = False

    def __post_init__(self) -> None:
        if not self.from_.strip():
            raise ValueError("init.from must name a run's folder")


@dataclass(frozen=True)
class Target:
    """A linear whose adapter differs from the others'; what is left out is as for those."""

    target: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None


@dataclass(frozen=True)
class Adapter:
    """A low-rank update of one linear: ``weight + alpha / rank * b @ a`` (Hu et al. 2021, arXiv 2106.09685, sec. 4.1)."""

    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters, which alone are trained and saved; the model's own weights stay as they are.

    ``targets`` are linears of every block (q, k, v, out, ff1, ff2, modulation) and of the rest (patch, text, time1, time2,
    ofs1, ofs2, head_modulation, proj). ``special`` gives some of them, or further ones, a rank, alpha or dropout of their own.
    ``dropout`` acts on what an adapter reads.
    """

    rank: int = 128
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "out")
    special: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        adapters = self.adapters()
        if not adapters:
            raise ValueError("lora.targets must name at least one linear")
        for name, adapter in adapters.items():
            if name not in LINEARS + OTHERS:
                raise ValueError(f"lora.targets: {name!r} is none of {', '.join(LINEARS + OTHERS)}")
            if adapter.rank < 1 or adapter.alpha <= 0 or not 0 <= adapter.dropout < 1:
                raise ValueError(
                    f"lora: {name} has rank {adapter.rank}, alpha {adapter.alpha:g} and dropout {adapter.dropout:g}; rank must "
                    "be at least 1, alpha above 0, dropout in [0, 1)"
                )
            if adapter.dropout and name not in LINEARS:
                raise ValueError(f"lora.dropout acts on {', '.join(LINEARS)}; give {name} dropout 0 in lora.special")

    def adapters(self) -> dict[str, Adapter]:
        """Of every adapted linear."""
        found = {name: Adapter(self.rank, self.alpha, self.dropout) for name in self.targets}
        for own in self.special:
            base = found.get(own.target, Adapter(self.rank, self.alpha, self.dropout))
            found[own.target] = Adapter(
                base.rank if own.rank is None else own.rank,
                base.alpha if own.alpha is None else own.alpha,
                base.dropout if own.dropout is None else own.dropout,
            )
        return found
