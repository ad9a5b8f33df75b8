"""The only source of randomness: generators folded from a seed and the identity of what is drawn.

A draw depends on what it is for (a parameter's name, an epoch and a sample, a step), never on a rank, a worker or on what
was drawn before. So every parallel layout draws the same numbers, and a run resumes from its seed and a few integers.
"""

from __future__ import annotations

import hashlib

import torch


def fold_seed(seed: int, *ids: int | str) -> int:
    """A 63-bit seed that depends on ``seed`` and every id, in order; 1 and "1" are different ids."""
    text = repr((int(seed), *ids)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def fold(seed: int, *ids: int | str) -> torch.Generator:
    """A CPU generator for one purpose, for example ``fold(seed, "noise", epoch, sample)``."""
    return torch.Generator().manual_seed(fold_seed(seed, *ids))
