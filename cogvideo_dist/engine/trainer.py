"""The loop: read a pack, add its share of the loss, step; log, judge and save when due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo_dist.engine.checkpoint import Stored, checkpoints
from cogvideo_dist.engine.ending import Rewind, Stopped
from cogvideo_dist.engine.flops import peak_flops
from cogvideo_dist.engine.inputs import Batches, DataLimits, Origin, Settings
from cogvideo_dist.engine.log import Meter, RunLog, means, peak_memory
from cogvideo_dist.engine.manifest import Saved, check_about
from cogvideo_dist.engine.numbers import Numbers, update
from cogvideo_dist.engine.outside import Outside
from cogvideo_dist.engine.player import Player, players_of
from cogvideo_dist.engine.probing import examine
from cogvideo_dist.engine.restoring import restore_newest
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.engine.spikes import Spikes
from cogvideo_dist.engine.stragglers import Laps, Stragglers
from cogvideo_dist.engine.zero import DEEPSPEED
from cogvideo_dist.parallel.ballot import Ballot
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object, gather_objects
from cogvideo_dist.parallel.waiting import counting
from cogvideo_dist.protocols import Batch, Defect, Task, TooManyDefects

SLACK_S = 5.0
"""That a save must be ready before a kill."""

ELAPSED, LISTED = "elapsed", "listed"
"""Among what is not reported yet: seconds of steps, and samples that were replaced and used in part."""

Figure = tuple[str, Tensor | float, Tensor | float]
"""Name, value and weight of what is to be metered."""


class Trainer:
    """One run of one task on one mesh, from its newest checkpoint (or from the start) to its last step."""

    def __init__(
        self, settings: Settings, task: Task, *, batches: Batches, mesh: ParallelMesh, data_limits: DataLimits,
        origin: Origin | None = None, outside: Outside | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.task, self.batches, self.mesh = settings, task, batches, mesh
        self.origin, self.samples = origin or Origin(), 0
        self.limits, self.outside = data_limits, outside or Outside()
        self.folder = Path(settings.run.dir)
        self.players = players_of(task, settings.train, mesh=mesh, micro_steps=data_limits.micro_steps)
        self.engine = self.players[0].engine
        self.laps, self.stragglers = Laps(self.engine.device), Stragglers(mesh.world)
        self.meter = Meter()
        self.spikes = Spikes(settings.log.spikes)
        self.unreported: Mapping[str, Sequence[float]] = {}  # by an earlier start, which was stopped
        self.mark("load")
        self.numbers = Numbers(self.folder, settings.train, mesh=mesh)
        self.first_step, problems = self._restore(self.origin.checkpoint)
        self.log = RunLog(self.folder, first_step=self.first_step, steps=settings.train.steps, speaks=mesh.is_first)
        for problem in problems:
            self.log.say(f"warning: going on from step {self.first_step}: {problem}")
        self.saver = Saver(self.folder / "ckpt", settings.checkpoint, mesh=mesh, say=self.log.say)
        self.ballot = Ballot(mesh.world, self.engine.device)
        self.longest_s, self.warned = 0.0, False  # of all steps; whether it was said that a save takes too long
        self.held_out: dict[str, float] = {}
        self.judged = -1  # after which step
        self.defects: list[Defect] = []  # samples that others replaced
        self.noticed: list[Defect] = []
        self.peak = peak_flops(self.engine.device, settings.log.peak_tflops) * mesh.world.size
        self.speaks_for_sample = mesh.sample.rank == 0

    def run(self) -> None:
        """Train to the end. Held-out loss is taken before the first step, when due, and after the last.

        Raises ``Stopped`` after the step in which all ranks know that one of them is to stop, once that step is saved.
        """
        ended = False
        try:
            with counting(self.laps.waits):
                self._run()
            self.mark("save")
            self.saver.end()
            ended = True
        except FloatingPointError:  # on all ranks, since it is found in sums over them
            self.saver.finish()
            raise
        finally:
            self.mark("end")
            self.saver.close(wait=ended)
            self.log.close()

    def mark(self, phase: str, step: int = 0) -> None:
        """What this rank is at from now on."""
        self.laps.mark(phase)
        self.outside.mark(phase, step)

    def _run(self) -> None:
        if self.first_step == 0:
            self.validate(0)
        first: int | None = self.first_step
        while first is not None:
            first = self._run_from(first)

    def _run_from(self, first: int) -> int | None:
        """Train from a step to the end, or until the run goes back to another one."""
        steps = self.settings.train.steps
        batches = self.batches.iterate(first)
        self.since = time.monotonic() - self.unreported.get(ELAPSED, (0.0,))[0]
        for step in range(first, steps):
            began = time.monotonic()
            try:
                self._step(step, batches)
            except Rewind as why:
                return self._go_back(str(why))
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.saver.poll()
            self._warn_of_grace()
            done = step + 1
            (stopping,) = self.ballot.turn((bool(self._stop_reason()),))
            last = done == steps
            saving = last or stopping or done % self.settings.checkpoint.every == 0
            # What is saved has been seen to be finite, and an interrupted run reports over the same steps as a whole one.
            unreported: dict[str, tuple[float, float]] = {}
            if last or done % self.settings.checkpoint.every == 0 or done % self.settings.log.every == 0:
                self._report(done)
            elif stopping:
                unreported = self._unreported()
            begun = time.monotonic()
            if last or _due(done, self.settings.validation.every):
                self.validate(done)
            if last or _due(done, self.settings.validation.samples_every):
                self.show(done)
            if saving:
                self.mark("save", done)
            if last or stopping:
                self.saver.finish()  # the last one is not skipped because another is being written
            if saving:
                self.save(done, unreported)
            self.since += time.monotonic() - begun  # judging and saving are no part of the steps' time
            if stopping and not last:
                self.saver.end()
                reason = self._stop_reason() or "another rank was told to"
                raise Stopped(
                    f"stopped after step {done}, which is saved: {reason}; the same command goes on from there"
                )
        return None

    def _go_back(self, why: str) -> int:
        """Become what the newest checkpoint has, and go on from there."""
        self.meter.sums, self.defects, self.noticed, self.spikes.fed = {}, [], [], []
        self.mark("load")
        first, problems = self._restore(None)
        self.log.rewind(first)
        for text in (why, *problems):
            self.log.say(f"warning: going back to step {first}: {text}")
        return first

    def _stop_reason(self) -> str:
        return self.outside.stop(pace_s=self.longest_s + self.saver.took_s)

    def _warn_of_grace(self) -> None:
        """Once it is known how long a save takes."""
        pace, grace = self.longest_s + self.saver.took_s, self.outside.grace_s
        if self.saver.took_s and not self.warned and pace > grace - SLACK_S:
            self.warned = True
            self.log.say(
                f"warning: a step and a save take {pace:.0f} s, too long for a scheduler that kills {grace:.0f} s after its "
                "SIGTERM: what was computed since the last checkpoint would be lost; let it signal earlier (KillWait, --signal)"
            )

    def _restore(self, wanted: str | None) -> tuple[int, list[str]]:
        """Take up the state of the checkpoint that the run goes on from; its step, and what was wrong with newer ones."""
        stored, problems = restore_newest(self.folder / "ckpt", self.mesh, restore=self._take_up, wanted=wanted)
        if stored is None:
            return 0, []
        self.limits.bad, self.unreported = stored.saved.bad, stored.saved.meter
        self.meter.restore(
            {name: pair for name, pair in self.unreported.items() if name not in (ELAPSED, LISTED)},
            mine=self.mesh.is_first,
        )
        self.numbers.restore(stored.saved.numbers)
        self.spikes.restore(stored.saved.numbers.get("reported", {}))
        self.samples = self.limits.samples = stored.saved.samples - self._carried("samples")
        return stored.saved.step, problems

    def _take_up(self, stored: Stored) -> None:
        for player in self.players:
            player.check(stored)
        check_about(self._about(), stored.saved.about, source=str(stored.path))
        for player in self.players:
            player.restore(stored)

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        """All micro-steps of a step, and its update; or neither, where it is to be left out."""
        packs: list[Batch] = []
        learned: list[Figure] = []
        for micro in range(self.limits.micro_steps):
            self.mark("data", step + 1)
            waited = time.monotonic()
            batch = next(batches)
            self.meter.add("time/loader_wait", time.monotonic() - waited)
            packs.append(batch)
            if step + 1 not in self.numbers.left_out:
                learned += self._learn(batch)
                if micro + 1 == self.limits.micro_steps:
                    self._update(step, packs)
            self._count(batch)
        if step + 1 not in self.numbers.left_out:
            for name, value, weight in learned:
                self.meter.add(name, value, weight=weight)
        self.laps.mark("between steps")
        self.numbers.taken(step + 1)
        self.numbers.check_alike(self.players, step + 1)
        self.meter.add("steps", 1.0)

    def _learning(self, step: int) -> list[Player]:
        """Those that learn in a step."""
        return [player for player in self.players if player.learns(step)]

    def _learn(self, batch: Batch) -> list[Figure]:
        """One micro-step of every model but for the update, and what is to be metered of it."""
        players = self._learning(batch.plan.step)
        found: list[Figure] = []
        # Losses are shares of every rank: their sum over ranks and micro-steps is that of a step.
        share = 1 / (self.mesh.world.size * self.limits.micro_steps)
        for player in players:
            loss = player.learn(batch, self.mark)
            found.append((f"{player.learner.tag}loss", loss.total.detach(), share))
            found += [(name, value, weight) for name, (value, weight) in loss.metrics.items()]
        for player in players:
            if not player.engine.at_boundary:
                player.end_micro_step()
        return found

    def _update(self, step: int, packs: Sequence[Batch]) -> None:
        """Of all models or, where anything of any of them is not finite on any rank, of none."""
        players = self._learning(step)
        self.mark("update", step + 1)
        if update(players, step, world=self.mesh.world):
            return
        sound = all(player.engine.loss_is_finite for player in players)
        for player in players:
            player.engine.discard()
        accounts = examine(players, packs, mesh=self.mesh, describe=self.task.describe, mark=self.mark)
        for account, finite in zip(accounts, gather_objects(sound, self.mesh.world)):
            account["loss_was_finite"] = finite
        self.numbers.wrong(step + 1, accounts, can_go_back=self._can_go_back())

    def _can_go_back(self) -> bool:
        """Whether there is a checkpoint; one that is being written is waited for."""
        if self.settings.train.non_finite != "rewind":
            return False
        self.saver.finish()
        return bool(broadcast_object(bool(checkpoints(self.folder / "ckpt")), self.mesh.world))

    def _count(self, batch: Batch) -> None:
        """What the ranks of a sample know alike, one of them counts."""
        share = float(self.speaks_for_sample)
        self.meter.add("tokens", share * batch.layout.tokens, weight=share * self.limits.tokens_per_pack)
        self.meter.add("samples", share * len(batch.samples))
        self.meter.add("flops", share * self.task.flops(batch.layout))
        self.defects += batch.defects
        if self.speaks_for_sample:
            self.spikes.fed += [(batch.plan.step + 1, sample.key) for sample in batch.samples]

    def _report(self, done: int) -> None:
        """Reduce and write what was metered since the last report."""
        device = self.engine.device
        sums = self.meter.reduce(self.mesh.world, device)
        elapsed = time.monotonic() - self.since
        self.since = time.monotonic()
        steps = sums.pop("steps")[0] / self.mesh.world.size
        tokens, samples = sums.pop("tokens"), sums.pop("samples")
        flops, wait = sums.pop("flops")[0], sums.pop("time/loader_wait")[0]
        self.samples += int(samples[0])
        replaced, partial = map(sum, zip(self._list_defects(), map(int, self.unreported.get(LISTED, (0, 0)))))
        averages = means(sums)
        values = {
            **self._learned(done, averages),
            "throughput/tokens_per_s": tokens[0] / elapsed,
            "throughput/samples_per_s": samples[0] / elapsed,
            "throughput/mfu": flops / elapsed / self.peak,
            "throughput/step_s": elapsed / steps,
            "data/padding_share": 1 - tokens[0] / tokens[1],
            "data/loader_wait_share": wait / self.mesh.world.size / elapsed,
            "data/samples": samples[0],
            "lineage/steps": self.origin.lineage.steps + done,
            "lineage/samples": self.origin.lineage.samples + self.samples,
            "data/replaced_samples": replaced,
            "data/partial_samples": partial,
            "memory/peak_gib": max(gather_objects(peak_memory(device), self.mesh.world)) / 2**30,
            **self._waited_for(done),
            **self._traffic(steps - self._carried("steps") / self.mesh.world.size),
            **averages,
        }
        self.unreported = {}
        self.log.scalars(done, values)
        self.log.progress(
            done,
            loss=f"{values.get('loss', math.nan):.4f}",
            norm=f"{values.get('gradient_norm', math.nan):.3f}",
            mfu=f"{values['throughput/mfu']:.0%}",
        )
        self._tell_spikes(done, values)
        self._check_data(int(samples[0]), replaced)

    def _waited_for(self, done: int) -> dict[str, float]:
        """How far ranks are apart, and a warning and an incident for each that has become slow."""
        figures, slow = self.stragglers.judge(self.laps.take())
        for straggler in slow:
            self.log.say(f"warning: step {done}: {straggler}")
            self.numbers.note(done, {"kind": "straggler", **straggler._asdict(), "action": "none"})
        return figures

    def _tell_spikes(self, done: int, values: Mapping[str, float]) -> None:
        """A warning and an incident for each loss or gradient norm that leaps, with the samples that it may be from."""
        names = [player.learner.tag + kind for player in self.players for kind in ("loss", "gradient_norm")]
        leaps = self.spikes.judge(done, {name: values[name] for name in names if name in values}, world=self.mesh.world)
        for text, entry in leaps:
            self.log.say(f"warning: step {done}: {text}")
            self.numbers.note(done, entry)

    def _carried(self, name: str) -> int:
        """What an earlier start had metered and not reported."""
        return int(self.unreported.get(name, (0.0, 0.0))[0])

    def _unreported(self) -> dict[str, tuple[float, float]]:
        """What was metered since the last report, over all ranks, for whoever goes on from here."""
        sums = self.meter.reduce(self.mesh.world, self.engine.device)
        self.samples += int(sums["samples"][0])
        replaced, partial = self._list_defects()
        return {**sums, ELAPSED: (time.monotonic() - self.since, 0.0), LISTED: (replaced, partial)}

    def _learned(self, done: int, averages: dict[str, float]) -> dict[str, float]:
        """Each model's loss, learning rate and gradient norm; what was left out has none."""
        values = {"numbers/left_out": float(self.numbers.total)} if self.numbers.total else {}
        for player in self.players:
            tag = player.learner.tag
            if done <= player.learner.start:
                continue
            if f"{tag}loss" in averages:
                values[f"{tag}loss"] = averages.pop(f"{tag}loss")
            values[f"{tag}learning_rate"] = player.rate(done - 1)
            norm = float(player.engine.grad_norm or 0.0)
            if done not in self.numbers.left_out and math.isfinite(norm):
                values[f"{tag}gradient_norm"] = norm
            if player.engine.scaler:
                values[f"{tag}loss_scale"] = player.engine.scaler["cur_scale"]
        return values

    def _traffic(self, steps: float) -> dict[str, float]:
        """What this rank sent in a step, in megabytes, by axis and collective; DeepSpeed's own is not in it."""
        taken = self.mesh.ledger.take()
        return {f"communication/{axis}_{op}_mb": t.bytes / 1e6 / steps for (axis, op), t in sorted(taken.items())}

    def _list_defects(self) -> tuple[int, int]:
        """List the samples that were replaced, and those that are used in part, since the last report; how many they are."""
        mine = (self.defects, self.noticed + self.task.notices()) if self.speaks_for_sample else ([], [])
        gathered = gather_objects(mine, self.mesh.world)
        self.defects, self.noticed = [], []
        replaced = [defect for defects, _ in gathered for defect in defects]
        partial = [notice for _, noticed in gathered for notice in noticed]
        self.log.defects(replaced)
        return len(replaced), self.log.notices(partial)

    def _check_data(self, samples: int, replaced: int) -> None:
        """Stop where too many samples were replaced. Every rank comes to the same verdict."""
        self.limits.samples += samples
        self.limits.bad += replaced
        if (
            self.limits.samples >= self.limits.judged_after
            and self.limits.bad > self.limits.max_bad_share * self.limits.samples
        ):
            raise TooManyDefects(
                f"{self.limits.bad} of {self.limits.samples} samples could not be read, more than data.max_bad_share "
                f"{self.limits.max_bad_share}; they are listed in {self.folder / 'data_report.jsonl'}"
            )

    def validate(self, done: int) -> None:
        """Held-out losses, over all ranks' shares of the held-out clips."""
        meter = Meter()
        self.engine.model.eval()
        self.mark("judge", done)
        for batch, weight in self.batches.held_out():
            self.mark("judge", done)
            self.noticed += batch.defects
            for name, (value, count) in self.task.held_out_loss(self.engine.forward, batch).items():
                meter.add(name, value * weight, weight=count * weight)
        self.engine.model.train()
        values = self.held_out = means(meter.reduce(self.mesh.world, self.engine.device))
        self.judged = done
        policy = self.settings.checkpoint
        if values and policy.keep_best and policy.best_by not in values:
            raise ValueError(
                f"checkpoint.best_by: {policy.best_by} is no figure of this run; it has {', '.join(values)}"
            )
        if values:
            self.log.scalars(done, values)
            self.log.say(f"step {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def show(self, done: int) -> None:
        """Pictures from the averaged weights."""
        if not self.settings.validation.samples_every:
            return
        self.mark("judge", done)
        self.engine.model.eval()
        with self.engine.averaged():
            self.log.pictures(done, self.task.pictures(self.engine.forward))
        self.engine.model.train()

    def save(self, done: int, unreported: Mapping[str, tuple[float, float]]) -> None:
        """``unreported``: what was metered since the last report."""
        scaler: dict[str, float] = {}
        for player in self.players:
            scaler |= player.scaler()
        saved = Saved(
            done, self.settings.run.seed, self._about(), scaler, samples=self.samples, bad=self.limits.bad,
            lineage=self.origin.lineage.plain(), meter=unreported, facts=self._facts(done), numbers=self._remembered(),
        )  # fmt: skip
        self.saver.save(saved, [player.state() for player in self.players])

    def _remembered(self) -> dict[str, Any]:
        """What watching the numbers goes on from."""
        engines = {player.learner.name: player.engine for player in self.players}
        return {
            "updates": {name: engine.updates for name, engine in engines.items()},
            "overflows": {name: engine.overflows for name, engine in engines.items()},
            **self.numbers.state(),
            "reported": self.spikes.state(),
        }

    def _facts(self, done: int) -> dict[str, Any]:
        """What a checkpoint tells whoever looks at it; nothing of it decides how the run goes on."""
        train, mesh = self.settings.train, self.mesh
        axes = (mesh.world, mesh.dp, mesh.ring, mesh.ulysses, mesh.tp, mesh.cp)
        return {
            **self.origin.facts,
            "versions": {"torch": torch.__version__, "deepspeed": DEEPSPEED},
            "layout": {axis.name: axis.size for axis in axes}
            | {"zero_stage": train.zero_stage, "precision": train.precision},
            "held_out": self.held_out if self.judged == done else {},
        }

    def _about(self) -> dict[str, Any]:
        return {"seed": self.settings.run.seed, **self.task.fingerprint()}


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
