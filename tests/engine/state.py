"""Whole states in memory, as an engine reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from cogvideo_dist.engine.pieces import Piece
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.parallel.split import own_slice


def reader(engine: Engine, state: Mapping[str, Mapping[str, Tensor]]) -> Callable[[str, str, Piece], Tensor]:
    """What ``Engine.restore`` asks for, sliced from whole tensors as models slice them."""

    def read(kind: str, name: str, piece: Piece) -> Tensor:
        return own_slice(engine.model, name, state[kind][name]).flatten()[piece.start : piece.stop]

    return read
