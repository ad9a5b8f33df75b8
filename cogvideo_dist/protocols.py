"""What the plan, the loader, the tasks and the trainer agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from cogvideo_dist.config.schema import Size, Train
from cogvideo_dist.pack.layout import Clip, PackLayout


@dataclass(frozen=True, order=True)
class Slot:
    """One clip's place in the run: which visit (epoch) of which sample (its position in the index), at which size."""

    epoch: int
    index: int
    size: Size


@dataclass(frozen=True)
class StepPlan:
    """Everything the whole world does in one optimizer step: all packs, and the global totals that losses are divided by.

    ``elements`` counts vision tokens over all clips of the step. ``costs``: of every pack, in one unit.
    """

    step: int
    packs: tuple[tuple[Slot, ...], ...]
    clips: int
    elements: int
    costs: tuple[int, ...] = ()


class TooManyDefects(ValueError):
    """More of the data cannot be used than a run puts up with."""


@dataclass(frozen=True)
class Defect:
    """A sample that could not be used as planned, or not whole: what was wrong and, if something took its place, what.

    ``code``: the kind of defect, in one or two words.
    """

    key: str
    source: str
    reason: str
    replaced_by: str | None = None
    code: str = ""


@dataclass(frozen=True)
class Sample:
    """One clip as read: pixels uint8 [T, H, W, 3], or the posterior's mean and logvar [C, t, h, w], text features [L, dim] and,
    for image-to-video models, its first frame uint8 [H, W, 3].

    ``source`` is the file that it was made from.
    """

    slot: Slot
    key: str
    source: str
    caption: str
    pixels: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    text: Tensor | None = None
    image: Tensor | None = None

    @property
    def first_frame(self) -> Tensor | None:
        """uint8 [H, W, 3], if it is there."""
        return self.image if self.pixels is None else self.pixels[0]


@dataclass(frozen=True)
class Batch:
    """One pack of a step, as one data-parallel rank works on it in one micro-step.

    ``first`` is the position of its first clip among all clips of the step, so that what is drawn per step and clip (the
    stratum of a timestep) does not depend on who works on it.
    """

    plan: StepPlan
    pack: int
    first: int
    layout: PackLayout
    samples: tuple[Sample, ...]
    defects: tuple[Defect, ...] = ()


class Geometry(Protocol):
    """How a model sees a clip of a given size: the tokens of its text and the grid of its patches; and what it costs."""

    def __call__(self, size: Size) -> Clip: ...

    def cost(self, clip: Clip) -> float:
        """Of forward and backward on a clip, in any unit."""
        ...


@dataclass(frozen=True)
class Loss:
    """``total``: this rank's share of the step's loss, already divided by the step's global denominator, so shares are summed.

    ``metrics``: name -> (sum, weight) pairs of this rank, whose sums over all ranks and micro-steps are divided.
    """

    total: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Learner:
    """A model that is trained with an optimizer of its own, from step ``start`` on; ``train`` says how.

    ``loss`` takes the model, as the engine wraps it, and a batch. ``name`` is in the log and in checkpoints; that of the
    task's own model is empty.
    """

    name: str
    model: nn.Module
    train: Train
    loss: Callable[[nn.Module, Batch], Loss]
    start: int = 0

    @property
    def prefix(self) -> str:
        """Of the kinds of its state; the task's own model has neither name nor prefix."""
        return f"{self.name}." if self.name else ""

    @property
    def tag(self) -> str:
        """Before the names of its figures."""
        return f"{self.name}/" if self.name else ""


@dataclass(frozen=True)
class Picture:
    """A short video to look at: uint8 [T, H, W, 3] with its caption; ``name`` is a file's stem."""

    name: str
    caption: str
    frames: Tensor
    fps: float


class Task(Protocol):
    """What is trained: a model and the way from a batch to its loss. Knows nothing of ranks, optimizers or checkpoints."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss: ...

    def rivals(self, train: Train) -> Sequence[Learner]:
        """Models that learn beside the task's own, whose settings are ``train``: each is asked for its loss on a batch right
        after the task."""
        ...

    def held_out_loss(self, model: nn.Module, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]: ...

    def pictures(self, model: nn.Module) -> list[Picture]:
        """What a person looks at to judge the run. Every rank makes them, since the model may be sharded."""
        ...

    def describe(self, batch: Batch) -> Sequence[Mapping[str, Any]]:
        """What was drawn for each sample of a batch (its timestep, say), to be told where something is wrong with it."""
        ...

    def notices(self) -> list[Defect]:
        """Samples that are used, but not whole, as met since this was last asked."""
        ...

    def flops(self, layout: PackLayout) -> float:
        """Floating-point operations of forward and backward on one pack, without recomputation."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """What a checkpoint must agree on to be this task's."""
        ...
