"""Writing checkpoints: every rank its own pieces, beside the name, hashed and synced; then one rename, which is the commit.

    ckpt/.tmp-step-000400/   being written, never read
    ckpt/step-000400/        exists: committed
    ckpt/.del-step-000100/   being deleted, never read
    ckpt/latest              for people; never trusted
    ckpt/ledger.jsonl        what was committed when

A save is agreed on by all ranks, and an error of any of them ends it on all. The training stands still for the copy to the
host's memory; what follows happens beside it, in a thread of every rank, and ranks ask each other between steps how far
they are.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cogvideo_dist.config.schema import Checkpoint
from cogvideo_dist.engine import files
from cogvideo_dist.engine.checkpoint import ASIDE, DYING, PREFIX, checkpoints
from cogvideo_dist.engine.files import Written
from cogvideo_dist.engine.manifest import NAME, CheckpointError, Saved, SaveError, manifest_text, read_manifest
from cogvideo_dist.engine.pieces import Cut, Piece
from cogvideo_dist.engine.upload import Uploader
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object, gather_objects

SPARE = 64 << 20
"""Bytes that stay free on the disk beside a checkpoint."""


class Source(Protocol):
    """A model whose state is saved."""

    @property
    def model_name(self) -> str:
        """Empty for the task's own."""
        ...

    def kinds(self) -> Sequence[str]: ...

    def cuts(self) -> Mapping[str, Cut]:
        """Every tensor that is trained, on every rank alike."""
        ...

    def owned(self) -> Mapping[str, Piece]:
        """What this rank writes of them: every element is written by one rank."""
        ...

    def copy(self, into: Mapping[str, Tensor]) -> None:
        """What this rank owns of every kind, one tensor behind the other, float32 on the host."""
        ...


@dataclass
class Flight:
    """A save that is under way."""

    saved: Saved
    aside: Path
    began: float
    tensors: dict[str, Any]
    work: Future[dict[str, Any]]
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Of all ranks, once all have written; then the first rank commits."""


class Saver:
    """Writes the checkpoints of a run into ``folder`` as ``policy`` says. All methods but ``close`` are collective."""

    def __init__(self, folder: Path, policy: Checkpoint, *, mesh: ParallelMesh, say: Callable[[str], None]) -> None:
        self.folder, self.policy, self.mesh, self.say = folder, policy, mesh, say
        self.flying: Flight | None = None
        self.failures = 0
        self.stall_s = self.took_s = 0.0  # of the last save: until the training could go on, until it was committed
        self.host: dict[str, Tensor] = {}  # kept from save to save: memory's first touch costs as much as the copy
        self.hands = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        uploads = policy.upload is not None and mesh.is_first
        self.uploader = Uploader(folder, policy.upload, say=say) if uploads and policy.upload else None
        if mesh.is_first:
            with suppress(OSError):  # a disk that fails says so at the next save
                self._clear()

    def save(self, saved: Saved, sources: Sequence[Source]) -> None:
        """Begin to write ``saved.step``; with ``policy.asynchronous`` the rest happens beside the next steps."""
        began = time.monotonic()
        if self.flying and self.policy.while_busy == "skip":
            self._advance()
            if self.flying:
                self.say(
                    f"checkpoint of step {saved.step} skipped: that of step {self.flying.saved.step} is being written"
                )
                return
        self.finish()
        bytes_here = sum(4 * piece.count * len(each.kinds()) for each in sources for piece in each.owned().values())
        aside = self._begin(saved.step, bytes_here)
        if aside is None:
            return
        snapshots = [self._snapshot(source) for source in sources]
        pieces = {each.model_name: _numbered(each) for each in sources}
        tensors = {each.model_name: {name: _shape(cut) for name, cut in each.cuts().items()} for each in sources}
        work = self.hands.submit(self._write, aside, [job for jobs in snapshots for job in jobs], pieces)
        self.flying = Flight(saved, aside, began, tensors, work)
        self.stall_s = time.monotonic() - began
        if not self.policy.asynchronous:
            self.finish()
            self.stall_s = time.monotonic() - began

    def poll(self) -> None:
        """Between two steps: go on with the save that is under way, if every rank is ready to."""
        if self.flying:
            self._advance()

    def finish(self) -> None:
        """Wait until nothing is under way."""
        while self.flying:
            self._next()

    def end(self) -> None:
        """At the end of the run, whose last checkpoint must be there."""
        self.finish()
        if self.failures:
            raise SaveError(
                f"the run is at its end, but its last checkpoint could not be written; the last committed one in {self.folder} "
                "stands: make room and start the same command again"
            )

    def close(self, *, wait: bool = True) -> None:
        """End the threads; uploads are waited for if ``wait``."""
        self.hands.shutdown()
        if self.uploader:
            self.uploader.close(wait=wait)

    def _advance(self) -> None:
        flight = self.flying
        if flight and all(gather_objects(flight.work.done(), self.mesh.world)):
            self._next()

    def _next(self) -> None:
        """The end of what every rank does now, and the beginning of what follows."""
        flight = self.flying
        if flight is None:
            return
        outcomes = gather_objects(_outcome(flight.work), self.mesh.world)
        failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if "error" in outcome]
        if failed:
            rank, outcome = failed[0]
            self._failed(flight, f"rank {rank}: {outcome['error']}", bug=any(o["bug"] for _, o in failed))
        elif not flight.reports:
            flight.reports = outcomes
            job = self._commit if self.mesh.is_first else _nothing
            flight.work = self.hands.submit(job, flight)
        else:
            self.flying, self.failures, self.took_s = None, 0, time.monotonic() - flight.began
            for warning in outcomes[0]["warnings"]:
                self.say(f"warning: {warning}")
            if self.uploader:
                self.uploader.add(self.folder / f"{PREFIX}{flight.saved.step:06d}")

    def _failed(self, flight: Flight | None, why: str, *, bug: bool = False) -> None:
        """A save has failed on all ranks, because it did on one."""
        self.flying, self.failures = None, self.failures + 1
        if flight and self.mesh.is_first:
            shutil.rmtree(flight.aside, ignore_errors=True)
        if bug:
            raise RuntimeError(f"saving a checkpoint: {why}")
        if self.failures >= self.policy.failures:
            raise SaveError(
                f"{self.failures} checkpoints in a row could not be written, the last because of {why}; the last committed "
                f"one in {self.folder} stands"
            )
        self.say(f"warning: no checkpoint was written: {why}; the run goes on and tries again when the next one is due")

    def _begin(self, step: int, bytes_here: int) -> Path | None:
        """A fresh folder to write into, or none if it cannot be had."""
        needed, found = sum(gather_objects(bytes_here, self.mesh.world)), ""
        aside = self.folder / f"{ASIDE}{PREFIX}{step:06d}"
        if self.mesh.is_first:
            try:
                self._make_room(aside, needed)
            except OSError as error:
                found = _named(error)
        found = broadcast_object(found, self.mesh.world)
        if found:
            self._failed(None, found)
            return None
        return aside

    def _make_room(self, aside: Path, needed: int) -> None:
        files.keep_folder(self.folder)
        self._clear()
        free = shutil.disk_usage(self.folder).free
        if free < needed + SPARE:
            raise OSError(f"{self.folder} has {free / 2**20:.0f} MiB free, a checkpoint takes {needed / 2**20:.0f} MiB")
        files.make_folder(aside)

    def _clear(self) -> None:
        """Delete what a start that was killed left behind."""
        for leftover in [*self.folder.glob(f"{ASIDE}*"), *self.folder.glob(f"{DYING}*")]:
            (files.remove_folder if leftover.is_dir() else files.remove_file)(leftover)

    def _snapshot(self, source: Source) -> list[tuple[str, str, Mapping[str, int], Tensor]]:
        """(model, kind, elements by tensor, values) of what this rank owns of a model, on the host."""
        counts = {name: piece.count for name, piece in source.owned().items() if piece.count}
        buffers = {}
        for kind in source.kinds() if counts else ():
            key = f"{source.model_name}.{kind}"
            if key not in self.host:
                self.host[key] = torch.empty(sum(counts.values()), pin_memory=torch.cuda.is_available())
            buffers[kind] = self.host[key]
        source.copy(buffers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [(source.model_name, kind, counts, values) for kind, values in buffers.items()]

    def _write(
        self, aside: Path, jobs: Sequence[tuple[str, str, Mapping[str, int], Tensor]], pieces: Mapping[str, Any]
    ) -> dict[str, Any]:
        """In the thread: this rank's files. What the manifest says of them and of this writer."""
        rank, facts = self.mesh.world.rank, {}
        for model, kind, counts, values in jobs:
            name = f"{model}.{kind}" if model else kind
            path = aside / f"{name}-{rank:05d}.safetensors"
            written = files.write_tensors(path, counts, values)
            facts[path.name] = {"model": model, "kind": kind, "writer": rank, **file_facts(written)}
        return {"files": facts, "writer": {"slice": [self.mesh.tp.rank, self.mesh.tp.size], "pieces": pieces}}

    def _commit(self, flight: Flight) -> dict[str, Any]:
        """In the first rank's thread, when all have written: the manifest and the rename; then what may fail."""
        final = self.folder / f"{PREFIX}{flight.saved.step:06d}"
        found: dict[str, Any] = {}
        for report in flight.reports:
            found |= report["files"]
        writers = [report["writer"] for report in flight.reports]
        content = {**flight.saved.plain(), "tensors": flight.tensors, "writers": writers, "files": found}
        commit(content, aside=flight.aside, final=final)
        warnings = []
        for follow in (self._note, self._prune):
            try:
                follow(flight, found)
            except OSError as error:  # it is committed, whatever becomes of the rest
                warnings.append(f"{final} is written, but: {_named(error)}")
        return {"warnings": warnings}

    def _note(self, flight: Flight, found: Mapping[str, Any]) -> None:
        """For people: which is the newest, and what was written when."""
        name = f"{PREFIX}{flight.saved.step:06d}"
        files.replace_text(self.folder / "latest", name + "\n")
        entry = {
            "step": flight.saved.step, "name": name, "time": time.time(), "files": len(found),
            "bytes": sum(facts["size"] for facts in found.values()), "seconds": round(time.monotonic() - flight.began, 3),
        }  # fmt: skip
        files.append_line(self.folder / "ledger.jsonl", json.dumps(entry))

    def _prune(self, flight: Flight, found: Mapping[str, Any]) -> None:
        """Delete what the policy does not keep. What is not whole does not count, and the newest is never deleted."""
        for old in superfluous(self.folder, self.policy):
            if not (self.uploader and self.uploader.wants(old)):
                files.rename(old, self.folder / f"{DYING}{old.name}")
        dying = list(self.folder.glob(f"{DYING}*"))
        if dying:
            files.sync(self.folder)
        for each in dying:
            files.remove_folder(each)


def commit(content: Mapping[str, Any], *, aside: Path, final: Path) -> None:
    """Give what lies in ``aside`` its manifest and, when all of it is durable, its name."""
    files.write_text(aside / NAME, manifest_text(content))
    files.sync(aside)
    if final.exists():  # a run that fell back to an older checkpoint comes by here again
        files.rename(final, final.with_name(f"{DYING}{final.name}"))
    files.rename(aside, final)
    files.sync(final.parent)


def superfluous(folder: Path, policy: Checkpoint) -> list[Path]:
    """Checkpoints that ``policy`` does not keep: not among its newest, its every k-th or its best."""
    whole: dict[Path, float | None] = {}
    for path in checkpoints(folder):
        try:
            manifest = read_manifest(path)
            if all((path / name).stat().st_size == facts["size"] for name, facts in manifest["files"].items()):
                whole[path] = manifest["facts"].get("held_out", {}).get(policy.best_by)
        except (CheckpointError, OSError):
            continue  # it is not counted and, as somebody may want to look at it, not deleted
    newest = list(whole)[-policy.keep :]
    judged = sorted((value, path) for path, value in whole.items() if value is not None)
    best = [path for _, path in judged[: policy.keep_best]]
    often = [p for p in whole if policy.keep_every and int(p.name[len(PREFIX) :]) % policy.keep_every == 0]
    return [path for path in whole if path not in {*newest, *best, *often}]


def _numbered(source: Source) -> list[list[int]]:
    """This rank's pieces for the manifest."""
    numbers = {name: number for number, name in enumerate(source.cuts())}
    return [[numbers[name], piece.start, piece.stop] for name, piece in source.owned().items() if piece.count]


def _shape(cut: Cut) -> list[Any]:
    return [list(cut.shape), [cut.split.dim, cut.split.stacked] if cut.split else None]


def file_facts(written: Written) -> dict[str, Any]:
    """What a manifest says of it, beside whose it is."""
    return {"size": written.size, "sha256": written.sha256, "blocks": list(written.blocks)}


def _nothing(flight: Flight) -> dict[str, Any]:
    return {}


def _outcome(work: Future[dict[str, Any]]) -> dict[str, Any]:
    """What a thread has done; an error of the disk, or of ours, in words."""
    try:
        return work.result()
    except OSError as error:
        return {"error": _named(error), "bug": False}
    except Exception as error:  # every rank must know before any of them stops
        return {"error": f"{type(error).__name__}: {error}", "bug": True}


def _named(error: OSError) -> str:
    """With the file's name, which an error of a write lacks."""
    return " ".join(str(error).split()) or type(error).__name__
