"""Which timestep each clip of a training step is noised to: a pure function of (seed, step), the same on every rank.

Stratified sampling is the explicit uniform sampling of CogVideoX (arXiv 2408.06072): the clips of one global step
share the range of timesteps out among them, which steadies the loss. The strata belong to the clips of the step, so the
result does not depend on how many data-parallel ranks share those clips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from cogvideo_dist.rng import fold

TimestepSampling = Literal["stratified", "uniform"]

_BITS = 53


def stratified_timesteps(seed: int, step: int, *, clips: int, timesteps: int = 1000) -> list[int]:
    """One timestep per clip, of which exactly one lies in each of ``clips`` equal parts of [0, timesteps).

    Clip i draws from stratum j = permutation[i]: floor((j + u) / clips * timesteps) with u uniform in [0, 1). The parts
    are real intervals, so every timestep has probability 1 / timesteps also where ``clips`` does not divide them.
    """
    _check(clips, timesteps)
    strata = torch.randperm(clips, generator=fold(seed, "strata", step)).tolist()
    return [_locate(stratum, clips, draw=_draw(seed, step, index=stratum), timesteps=timesteps) for stratum in strata]


def uniform_timesteps(seed: int, step: int, *, clips: int, timesteps: int = 1000) -> list[int]:
    """One independent uniform timestep in [0, timesteps) per clip."""
    _check(clips, timesteps)
    return [_locate(0, 1, draw=_draw(seed, step, index=clip), timesteps=timesteps) for clip in range(clips)]


TIMESTEP_SAMPLING: dict[TimestepSampling, Callable[..., list[int]]] = {
    "stratified": stratified_timesteps,
    "uniform": uniform_timesteps,
}


def _check(clips: int, timesteps: int) -> None:
    if clips < 1 or timesteps < 1:
        raise ValueError(f"{clips} clips and {timesteps} timesteps; both must be at least 1")


def _draw(seed: int, step: int, *, index: int) -> int:
    """u * 2**53 for u uniform in [0, 1)."""
    return int(torch.randint(2**_BITS, (), generator=fold(seed, "timestep", step, index)).item())


def _locate(stratum: int, strata: int, *, draw: int, timesteps: int) -> int:
    """floor((stratum + draw / 2**53) / strata * timesteps), in integers: a float can round up to ``timesteps``."""
    return ((stratum << _BITS) + draw) * timesteps // (strata << _BITS)
