"""A model that learns, under its engine: its rate, and its state to be saved and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.checkpoint import Stored, check_shapes
from cogvideo_dist.engine.manifest import OtherRun, Saved
from cogvideo_dist.engine.optim import learning_rate, state_keys
from cogvideo_dist.engine.outside import Mark, unwatched
from cogvideo_dist.engine.pieces import Cut, Piece
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Batch, Learner, Loss, Task


@dataclass(frozen=True)
class Player:
    """A learner and its engine."""

    learner: Learner
    engine: Engine

    def learns(self, step: int) -> bool:
        """Whether it has begun to by then."""
        return step >= self.learner.start

    def rate(self, step: int) -> float:
        """Its learning rate in the run's step ``step``."""
        return learning_rate(self.learner.train, step - self.learner.start)

    def learn(self, batch: Batch, mark: Mark = unwatched) -> Loss:
        """Forward and backward of a micro-step, which ``end_micro_step`` or the step's update ends."""
        mark("forward", batch.plan.step + 1)
        with self.engine.keeping():
            loss = self.learner.loss(self.engine.forward, batch)
        mark("backward", batch.plan.step + 1)
        self.engine.backward(loss.total)
        return loss

    def end_micro_step(self) -> None:
        """Of one that is not the last of its step; nothing is updated."""
        self.engine.step(0.0)

    def updates(self, saved: Saved) -> int:
        """That it had had when ``saved`` was written: one in every step from its start on, but for those that were left out."""
        made: Mapping[str, int] = saved.numbers.get("updates", {})
        return made.get(self.learner.name, max(0, saved.step - self.learner.start))

    def state(self) -> State:
        """What is saved of it."""
        return self._state(self.engine.updates)

    def _state(self, updates: int) -> State:
        keys = state_keys(self.learner.train) if updates else ()
        return State(self.learner.name, self.engine, ("weights", *keys))

    def scaler(self) -> dict[str, float]:
        """The state of its loss scale, under names of its own."""
        return {self.learner.prefix + key: value for key, value in self.engine.scaler.items()}

    def check(self, stored: Stored) -> None:
        """Raise ``OtherRun`` if ``stored`` is of another model or of other settings."""
        name, expected = self.learner.name, self._state(self.updates(stored.saved)).kinds()
        found = {key: cut.shape for key, cut in stored.cuts(name).items()}
        if found:
            own = {key: cut.shape for key, cut in self.engine.cuts().items()}
            check_shapes(own, found, source=str(stored.path))
        if stored.kinds(name) != set(expected):
            whose = f"of the {name} " if name else ""
            raise OtherRun(
                f"{stored.path} holds {', '.join(sorted(stored.kinds(name))) or 'nothing'} {whose}instead of "
                f"{', '.join(sorted(expected))}; the run's settings were others when it was made (train.ema_decay, loss.critic)"
            )

    def restore(self, stored: Stored) -> None:
        """Become what it was when ``stored`` was written. Raises ``CheckpointError`` if that is damaged."""
        learner, name, cuts = self.learner, self.learner.name, self.engine.cuts()
        updates = self.updates(stored.saved)
        self.engine.restore(
            lambda kind, key, piece: stored.read(kind, key, piece=piece, cut=cuts[key], model=name),
            kinds=self._state(updates).kinds(),
            step=updates,
        )
        self.engine.overflows = stored.saved.numbers.get("overflows", {}).get(name, 0)
        scaler = stored.saved.scaler
        # a run that had another precision before begins with a fresh scale
        self.engine.scaler = {
            key: scaler[learner.prefix + key] for key in self.engine.scaler if learner.prefix + key in scaler
        }


def players_of(task: Task, train: Train, *, mesh: ParallelMesh, micro_steps: int) -> list[Player]:
    """The task's model and its rivals, each under an engine of its own."""
    learners = (Learner("", task.model, train, task.loss), *task.rivals(train))
    return [Player(each, Engine(each.model, each.train, mesh=mesh, micro_steps=micro_steps)) for each in learners]


@dataclass(frozen=True)
class State:
    """The state of a model, as ``Saver`` takes it."""

    model_name: str
    engine: Engine
    held: tuple[str, ...]

    def kinds(self) -> Sequence[str]:
        return self.held

    def cuts(self) -> Mapping[str, Cut]:
        return self.engine.cuts()

    def owned(self) -> Mapping[str, Piece]:
        return self.engine.owned()

    def copy(self, into: Mapping[str, Tensor]) -> None:
        self.engine.copy(into)
