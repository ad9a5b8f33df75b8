"""From what ranks answered to what is wrong with a layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cogvideo_dist.parallel.mesh import Layout
from cogvideo_dist.parallel.volumes import Recompute, layer_bytes, layer_rounding


@dataclass(frozen=True)
class Tolerances:
    """Relative: of the loss, of a gradient to its largest element, of a weight to its largest, of a gradient norm."""

    loss: float = 1e-12
    gradient: float = 1e-12
    weight: float = 1e-6
    norm: float = 1e-5


TOLERANCES = {"cpu": Tolerances(), "cuda": Tolerances(loss=1e-5, gradient=1e-4, weight=1e-5, norm=1e-5)}
"""float64 gradients on CPUs, float32 on GPUs, whose fused attention does not add in a fixed order."""


@dataclass(frozen=True)
class Shapes:
    """What the formulas of traffic take: tokens are the mean of the packs."""

    tokens: float
    hidden: int
    heads: int
    layers: int
    packs: int
    element_size: int
    recompute: Recompute
    adapters: bool = False


@dataclass(frozen=True)
class Worst:
    """The largest error of many, where it is, and the first in the model's order that exceeds the tolerance."""

    error: float
    name: str
    first_wrong: str | None = None


@dataclass(frozen=True)
class Sent:
    """Bytes per layer, pack and rank; ``rounding`` is the largest excusable difference."""

    axis: str
    operation: str
    measured: float
    formula: float
    rounding: float

    @property
    def right(self) -> bool:
        return abs(self.measured - self.formula) <= self.rounding + 1e-9 * self.formula


@dataclass(frozen=True)
class Verdict:
    """One layout's comparison; what could not be compared is None. Passed if there are no ``problems``."""

    layout: str
    ranks: int
    seconds: float
    problems: tuple[str, ...]
    loss: float | None = None
    gradient: Worst | None = None
    weight: Worst | None = None
    norm: float | None = None
    sent: tuple[Sent, ...] = ()
    details: str = field(default="", repr=False)

    @property
    def passed(self) -> bool:
        return not self.problems


def judge(
    layout: Layout, answers: Sequence[Mapping[str, Any]], *, reference: Mapping[str, Any], shapes: Shapes,
    tolerances: Tolerances, seconds: float,
) -> Verdict:  # fmt: skip
    """``answers`` of the layout's ranks beside the single process's."""
    gradients = [answer["gradients"] for answer in answers]
    # Every rank compares, so that ranks which should hold the same and do not are found.
    gradient = worst({name: highest(g[name] for g in gradients) for name in gradients[0]}, tolerances.gradient)
    weight = worst(_weights(answers[0]["trained"]), tolerances.weight)
    loss = highest(relative(answer["loss"], reference["loss"]) for answer in answers)
    right_norms = next(iter(reference["trained"].values()))["norms"]
    norm = highest(
        relative(found, right)
        for answer in answers
        for stage in answer["trained"].values()
        for found, right in zip(stage["norms"], right_norms)
    )
    sent = traffic(layout, answers, shapes=shapes)
    problems = []
    if not loss <= tolerances.loss:
        problems.append(f"the loss differs by {loss:.1e}")
    problems += _wrong("gradient", gradient) + _wrong("weight", weight)
    if not norm <= tolerances.norm:
        problems.append(f"a gradient norm differs by {norm:.1e}")
    problems += [
        f"{s.axis} {s.operation} sent {s.measured:.0f} bytes a layer, the formula says {s.formula:.0f}"
        for s in sent
        if not s.right
    ]
    return Verdict(layout.name, layout.world, seconds, tuple(problems), loss, gradient, weight, norm, sent)


def failed(layout: Layout, message: str, *, seconds: float, details: str) -> Verdict:
    """Of a layout whose ranks did not answer."""
    return Verdict(layout.name, layout.world, seconds, (message,), details=details)


def _wrong(what: str, found: Worst) -> list[str]:
    if found.first_wrong is None:
        return []
    return [f"first wrong {what}: {found.first_wrong}; the worst, {found.error:.1e}, is in {found.name}"]


def _weights(stages: Mapping[str, Any]) -> dict[str, float]:
    """Of the first rank, which alone gets the whole state."""
    return {
        f"{name} ({kind}, ZeRO {stage})" if kind != "weights" else f"{name} (ZeRO {stage})": error
        for stage, answer in stages.items()
        for kind in ("weights", "ema")
        for name, error in answer.get(kind, {}).items()
    }


def worst(errors: Mapping[str, float], tolerance: float) -> Worst:
    """Of errors in the model's order; one that is no number is the worst."""
    name = max(errors, key=lambda each: _order(errors[each]))
    return Worst(errors[name], name, next((each for each, error in errors.items() if not error <= tolerance), None))


def highest(errors: Any) -> float:
    """The largest, or the first that is no number."""
    return max(errors, key=_order)


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error


def relative(found: float, right: float) -> float:
    return abs(found - right) / abs(right)


def traffic(layout: Layout, answers: Sequence[Mapping[str, Any]], *, shapes: Shapes) -> tuple[Sent, ...]:
    """The blocks' large messages, which are all on their axes apart from the small sums; means over all ranks. Of a run of
    adapters none: theirs are not in the formulas."""
    if shapes.adapters:
        return ()
    given = {
        "hidden": shapes.hidden, "heads": shapes.heads, "element_size": shapes.element_size, "recompute": shapes.recompute
    }  # fmt: skip
    formulas = layer_bytes(layout, tokens=shapes.tokens, **given)  # type: ignore[arg-type]
    roundings = layer_rounding(layout, **given)  # type: ignore[arg-type]
    each = layout.sample * shapes.layers * shapes.packs
    return tuple(
        Sent(
            *key, sum(answer["sent"].get(" ".join(key), 0) for answer in answers) / each, formula, roundings[key]
        )
        for key, formula in formulas.items()
    )  # fmt: skip
