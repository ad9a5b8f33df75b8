"""A step of a run computed once more from the checkpoint before it, to look at its numbers; the run itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.inputs import Batches, Settings
from cogvideo_dist.engine.manifest import check_about
from cogvideo_dist.engine.numbers import left_out_steps, update
from cogvideo_dist.engine.outside import Mark, unwatched
from cogvideo_dist.engine.player import Player, players_of
from cogvideo_dist.engine.probing import Account, examine
from cogvideo_dist.engine.restoring import restore_newest
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Batch, Task


class Replay:
    """``settings`` are the run's; ``micro_steps``: packs of this rank in a step. Writes nothing."""

    def __init__(
        self,
        settings: Settings,
        task: Task,
        *,
        batches: Batches,
        mesh: ParallelMesh,
        micro_steps: int,
        mark: Mark = unwatched,
    ) -> None:
        self.settings, self.task, self.batches, self.mesh = settings, task, batches, mesh
        self.mark = mark
        self.folder, self.micro_steps = Path(settings.run.dir), micro_steps
        self.players = players_of(task, settings.train, mesh=mesh, micro_steps=micro_steps)
        self.left_out = left_out_steps(self.folder, mesh)

    def look(self, done: int) -> tuple[int, list[Account]]:
        """Take the steps up to ``done``, counted from 1, from the newest checkpoint before it, and look at that one; at an
        earlier one if that is not finite already. Which it was, and every rank's account of it."""
        first = self._restore(done - 1)
        batches = self.batches.iterate(first)
        for step in range(first, done - 1):
            packs = self._packs(batches, step)
            if step + 1 not in self.left_out and not self._take(step, packs):
                return step + 1, self._examine(step, packs)
        return done, self._examine(done - 1, self._packs(batches, done - 1))

    def _restore(self, until: int) -> int:
        self.mark("load")
        stored, _ = restore_newest(self.folder / "ckpt", self.mesh, restore=self._take_up, until=until)
        return stored.saved.step if stored else 0

    def _take_up(self, stored: Stored) -> None:
        for player in self.players:
            player.check(stored)
        about = {"seed": self.settings.run.seed, **self.task.fingerprint()}
        check_about(about, stored.saved.about, source=str(stored.path))
        for player in self.players:
            player.restore(stored)

    def _packs(self, batches: Iterator[Batch], step: int) -> list[Batch]:
        self.mark("data", step + 1)
        return [next(batches) for _ in range(self.micro_steps)]

    def _learning(self, step: int) -> list[Player]:
        return [player for player in self.players if player.learns(step)]

    def _take(self, step: int, packs: Sequence[Batch]) -> bool:
        """A step as the run takes it; whether it was finite."""
        players = self._learning(step)
        for number, batch in enumerate(packs):
            for player in players:
                player.learn(batch, self.mark)
            if number + 1 < len(packs):
                for player in players:
                    player.end_micro_step()
        if update(players, step, world=self.mesh.world):
            return True
        for player in players:
            player.engine.discard()
        return False

    def _examine(self, step: int, packs: Sequence[Batch]) -> list[Account]:
        return examine(self._learning(step), packs, mesh=self.mesh, describe=self.task.describe, mark=self.mark)
