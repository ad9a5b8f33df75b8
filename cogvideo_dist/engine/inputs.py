"""What a trainer is given: settings, batches, where the run comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cogvideo_dist.config.schema import Checkpoint, Log, Run, Train, Validation
from cogvideo_dist.engine.lineage import Lineage
from cogvideo_dist.protocols import Batch


class Batches(Protocol):
    """This rank's share of the data. ``held_out`` yields as many batches on every rank; a pack of weight 0 fills up."""

    def iterate(self, first_step: int) -> Iterator[Batch]: ...

    def held_out(self) -> Iterator[tuple[Batch, float]]: ...


class Settings(Protocol):
    """The sections of a run's configuration that the trainer reads."""

    @property
    def run(self) -> Run: ...
    @property
    def train(self) -> Train: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def log(self) -> Log: ...
    @property
    def validation(self) -> Validation: ...


@dataclass(frozen=True)
class Origin:
    """Where a run comes from: the stages before it, the checkpoint that it is to go on from (None: the newest), and facts that
    its checkpoints tell, such as its configuration and data."""

    lineage: Lineage = field(default_factory=Lineage)
    checkpoint: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class DataLimits:
    """What the trainer must know of the data: packs per rank and step, the token budget, and how much may be bad."""

    judged_after = 100

    def __init__(self, *, micro_steps: int, tokens_per_pack: int, max_bad_share: float) -> None:
        self.micro_steps, self.tokens_per_pack, self.max_bad_share = micro_steps, tokens_per_pack, max_bad_share
        self.samples = self.bad = 0
