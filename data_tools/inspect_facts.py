"""Everything that the data report says, as plain numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvideo_dist.data.index import KIND_NAMES
from cogvideo_dist.data.plan import Plan
from cogvideo_dist.data.remote import without_secrets
from cogvideo_dist.data.storage import is_remote
from data_tools.inspect_clips import Captions, Picture
from data_tools.inspect_lint import Lint, judged
from data_tools.inspect_set import VIDEO, Histogram, Inspected
from data_tools.inspect_steps import ModeFacts, epochs

EXAMPLES = 5
"""Samples that are named for each reason."""

MOST_SHAPES = 200
"""Different heights x widths above which they are counted in squares."""

SQUARE = 64


@dataclass(frozen=True)
class Findings:
    """What was looked at."""

    found: Inspected
    plan: Plan
    modes: Sequence[ModeFacts]
    captions: Captions
    pictures: Sequence[Picture]
    lint: Lint | None


def as_data(given: Findings) -> dict[str, Any]:
    """report.json."""
    found, plan = given.found, given.plan
    columns, packed = found.columns, given.modes[0]
    tokens = np.array(sorted(given.captions.tokens.values()), np.int64)
    fps = Counter(columns["fps"][columns["kind"] == VIDEO].round(2).tolist())
    return {
        "run": {"class": type(found.config).__name__, "dir": found.config.run.dir, "seed": found.config.run.seed},
        "data": dataclasses.asdict(found.data),
        "set": about_set(found),
        "sources": about_sources(given, per_step=packed.sources),
        "histograms": {
            "seconds": Histogram.of(found.durations[found.durations > 0])._asdict(),
            "caption_characters": Histogram.of(columns["caption_length"], whole=True)._asdict(),
            "caption_tokens": Histogram.of(tokens, whole=True)._asdict(),
            "wait_steps": {str(steps): count for steps, count in sorted(packed.waits.items())},
            "fps": {f"{rate:g}": count for rate, count in sorted(fps.items())},
        },
        "shapes": shapes(found),
        "sizes": about_sizes(found, plan),
        "captions": about_captions(given.captions),
        "packing": {
            "steps": packed.steps, "packs_per_step": plan.packs_per_step, "tokens_per_pack": plan.classes.budget,
            "modes": [mode.as_data() for mode in given.modes],
        },
        "unused": about_unused(found, plan),
        "pictures": [{"key": p.key, "source": p.source, "defect": p.defect} for p in given.pictures],
        "lint": None if given.lint is None else about_lint(given.lint, given.captions),
    }  # fmt: skip


def about_set(found: Inspected) -> dict[str, Any]:
    kind, size, seconds = found.columns["kind"], found.members.bytes, found.durations
    kinds = {
        name: {
            "samples": int((kind == number).sum()), "bytes": int(size[kind == number].sum()),
            "hours": float(seconds[kind == number].sum() / 3600),
        }
        for number, name in enumerate(KIND_NAMES) if (kind == number).any()
    }  # fmt: skip
    return {
        "samples": len(found.catalog), "bytes": int(size.sum()), "hours": float(seconds.sum() / 3600),
        "shards": sum(len(index.shards) for index in found.catalog.indexes), "digest": found.catalog.digest, "kinds": kinds,
    }  # fmt: skip


def about_sources(given: Findings, *, per_step: Sequence[float]) -> list[dict[str, Any]]:
    found, plan, sources = given.found, given.plan, list[dict[str, Any]]()
    starts, data = found.catalog.starts, found.data
    bounds = np.searchsorted(plan.training, starts)
    weights = sum(source.weight for source in data.all_sources)
    seen = epochs(found, plan, per_step=per_step)
    for number, (source, index) in enumerate(zip(data.all_sources, found.catalog.indexes)):
        part = slice(starts[number], starts[number + 1])
        sources.append({
            "shards": without_secrets(source.shards) if is_remote(source.shards) else source.shards,
            "share": source.weight / weights, "skip": source.skip, "samples": len(index), "shard_files": len(index.shards),
            "bytes": int(found.members.bytes[part].sum()), "hours": float(found.durations[part].sum() / 3600),
            "digest": index.digest, "usable": int((found.found[part] >= 0).sum()),
            "training": int(bounds[number + 1] - bounds[number]), "epochs": seen[number],
        })  # fmt: skip
    return sources


def about_sizes(found: Inspected, plan: Plan) -> list[dict[str, Any]]:
    """Of every legal size the samples that take it and what it makes of them."""
    places = np.flatnonzero(found.found >= 0)
    numbers, fate = found.found[places], found.fates(places)
    counts = np.bincount(numbers, minlength=len(found.data.sizes))
    tokens = counts * plan.classes.tokens
    costs = counts * plan.classes.costs.astype(float)
    sizes = []
    for number, size in enumerate(found.data.sizes):
        mine = numbers == number
        sizes.append({
            "size": list(size), "samples": int(counts[number]), "tokens": int(plan.classes.tokens[number]),
            "share_of_tokens": float(tokens[number] / tokens.sum()), "share_of_cost": float(costs[number] / costs.sum()),
            "cost": float(plan.classes.costs[number] / plan.classes.costs.max()),
            "pixels_kept": float(fate.kept[mine].mean()) if mine.any() else None,
            "scale": float(fate.scale[mine].mean()) if mine.any() else None,
            "seconds_cut": float(fate.lost[mine].mean()) if mine.any() else None,
        })  # fmt: skip
    return sizes


def shapes(found: Inspected) -> dict[str, Any]:
    """Heights x widths and how many samples have them; where there are many, by squares of so many pixels."""
    height, width = (found.columns[name].astype(np.int64) for name in ("height", "width"))
    pairs, counts = _counted(height, width)
    square = 1
    if len(pairs) > MOST_SHAPES:
        square = SQUARE
        pairs, counts = _counted(height // square * square, width // square * square)
    return {"square": square, "counts": [[*pair, count] for pair, count in zip(pairs, counts)]}


def _counted(height: Any, width: Any) -> tuple[list[tuple[int, int]], list[int]]:
    both, counts = np.unique(height << 32 | width, return_counts=True)
    return [(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in both], counts.tolist()


def about_captions(captions: Captions) -> dict[str, Any]:
    return {
        "read": captions.read, "counted": len(captions.tokens), "limit": captions.limit, "cut": len(captions.cut),
        "note": captions.note, "unreadable": [vars(defect) for defect in captions.defects[:EXAMPLES]],
        "unreadable_count": len(captions.defects),
    }  # fmt: skip


def about_unused(found: Inspected, plan: Plan) -> dict[str, Any]:
    """Samples that no step works on: without a size, left out by score, or held out."""
    reasons: dict[str, dict[str, Any]] = {}
    numbers = found.found[plan.dropped.places]
    for number in np.unique(numbers).tolist():
        mine = np.flatnonzero(numbers == number)
        examples = [plan.dropped[int(place)] for place in mine[:EXAMPLES]]
        name = examples[0].reason.split(":")[0]
        rows = [{"key": defect.key, "source": defect.source, "reason": defect.reason} for defect in examples]
        reasons[name] = {"count": len(mine), "examples": rows}
    usable = int((found.found >= 0).sum())
    empty = (found.columns["caption_length"] == 0) & (found.found >= 0)
    return {
        "dropped": len(plan.dropped), "reasons": reasons, "held_out": len(plan.held_out),
        "left_out_by_score": usable - len(plan.training) - len(plan.held_out),
        "empty_captions": 0 if found.data.empty_captions or found.data.source == "latents" else int(empty.sum()),
    }  # fmt: skip


def about_lint(lint: Lint, captions: Captions) -> dict[str, Any]:
    return {"samples": lint.samples, "remarks": dict(lint.counts), "reach": judged(lint.found, captions)}
