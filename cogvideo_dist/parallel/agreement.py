"""What every rank must have alike before they work together: a difference is named, not computed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import gather_objects

SHOWN = 6
"""Differences that an error lists."""


def check_alike(facts: Mapping[str, str], axis: Axis) -> None:
    """Raise ``ConfigError`` on all ranks where some have other ``facts``, with each value and the ranks that have it."""
    digest = hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()
    if len(set(gather_objects(digest, axis))) == 1:
        return
    everyone = gather_objects(dict(facts), axis)
    keys = sorted({key for each in everyone for key in each})
    lines = []
    for key in keys:
        values: dict[str, list[int]] = {}
        for rank, each in zip(axis.ranks, everyone):
            values.setdefault(each.get(key, "nothing"), []).append(rank)
        if len(values) > 1:
            lines.append(f"{key}: " + ", ".join(f"{value[:80]} on {_ranks(ranks)}" for value, ranks in values.items()))
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    raise ConfigError(
        f"ranks differ in {'; '.join(lines[:SHOWN])}{more}; start all ranks from the same files, overrides and installation"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
