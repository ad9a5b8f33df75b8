"""Classifier-free guidance (arXiv 2207.12598) and how its scale changes over the sampling steps."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

GuidanceKind = Literal["constant", "dynamic", "ramp"]


def guide(v_uncond: Tensor, v_cond: Tensor, *, scale: float) -> Tensor:
    """v_uncond + scale * (v_cond - v_uncond); a scale of 1 is the conditional prediction."""
    return v_uncond + scale * (v_cond - v_uncond)


def guidance_scale(kind: GuidanceKind, scale: float, *, step_index: int, timestep: int, steps: int) -> float:
    """The scale to use at sampling step ``step_index`` of ``steps``, which is at training timestep ``timestep``.

    * constant: ``scale``.
    * dynamic: 1 + scale * (1 - cos(pi * p^5)) / 2 with p = (steps - timestep) / steps of the raw training timestep
      (0..999), as the released samplers compute it. Over 50 steps it jumps about in [1, 1 + scale]; kept for
      parity with them.
    * ramp: the same curve over p = step_index / steps, which rises from 1 towards 1 + scale late in sampling.
    """
    if kind == "constant":
        return scale
    progress = {"dynamic": steps - timestep, "ramp": step_index}[kind] / steps
    return 1 + scale * (1 - math.cos(math.pi * progress**5)) / 2
