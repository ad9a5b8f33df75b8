"""What the two training commands share; apart from compose.py, because DeepSpeed takes seconds to import."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import digest, plain
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.ending import NoProgress
from cogvideo_dist.engine.inputs import DataLimits, Origin
from cogvideo_dist.engine.lease import Lease
from cogvideo_dist.engine.lineage import FILE, Lineage
from cogvideo_dist.engine.manifest import CheckpointError
from cogvideo_dist.engine.outside import Outside
from cogvideo_dist.engine.trainer import Trainer
from cogvideo_dist.evaluation.media import replacing
from cogvideo_dist.parallel.agreement import check_alike
from cogvideo_dist.parallel.mesh import ParallelMesh, Place
from cogvideo_dist.parallel.ops import broadcast_object
from cogvideo_dist.protocols import Task
from launch.attempts import STATUS, note_attempt
from launch.compose import RankData, data_facts, note_data, prepare_folder
from launch.environment import code_of, job_end, job_name, meeting_of, read_place, restarts
from launch.exhausted import explained
from launch.pulse import pulse_of_process
from launch.replay import replay
from launch.stopping import Stopping


@dataclass(frozen=True)
class Start:
    """How this start of a run differs from others: ``new_data`` allows data that is not what it began with, ``checkpoint`` is
    the one that it is to go on from instead of its newest, ``replay`` the step that is only looked at, ``job`` the scheduler's
    name for it, ``stopping`` whether it is to end early."""

    new_data: bool = False
    checkpoint: str | None = None
    replay: int | None = None
    job: str = ""
    stopping: Stopping = field(default_factory=Stopping)
    lineage: Lineage = field(default_factory=Lineage)


def start_of(options: argparse.Namespace) -> Start:
    """As the command line and the scheduler say; from now on signals are listened to."""
    stopping = Stopping(job_end())
    stopping.listen()
    return Start(options.new_data, options.checkpoint, options.replay, job_name(), stopping)


def watched_place(config: DiTRun | VAERun, *, replays: bool = False) -> Place:
    """This process's rank; from here on its supervisor is in touch with those of the others. One that ``replays`` leaves the
    run's folder alone: what is to be noted of it is noted beside."""
    place, folder = read_place(), Path(config.run.dir)
    folder = folder.with_name(f"{folder.name}.replay") if replays else folder
    pulse_of_process().join(place, folder, limits=config.watch, meeting=meeting_of(place))
    return place


def run_training(config: DiTRun | VAERun, task: Task, *, data: RankData, mesh: ParallelMesh, start: Start) -> None:
    """From the run's folder to its last step; or a look at one of its steps."""
    try:
        if start.replay is not None:
            replay(config, task, data=data, mesh=mesh, step=start.replay)
            return
        with (
            holding(Path(config.run.dir), mesh, job=start.job),
            noting_the_end(Path(config.run.dir), mesh, job=start.job),
        ):
            _run(config, task, data=data, mesh=mesh, start=start)
    except torch.OutOfMemoryError as error:
        total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
        raise explained(error, config, mesh=mesh, total=total) from error
    finally:
        data.loader.close()


def _run(config: DiTRun | VAERun, task: Task, *, data: RankData, mesh: ParallelMesh, start: Start) -> None:
    data_found = data_facts(config.data, data.plan.catalog)
    check_alike({f"the content of {each['shards']}": each["digest"][:16] for each in data_found}, mesh.world)
    prepare_folder(config, mesh, plan=data.plan, new_data=start.new_data)
    if mesh.is_first and start.lineage.ancestors:
        with replacing(Path(config.run.dir) / FILE) as temporary:
            temporary.write_text(json.dumps(start.lineage.plain(), indent=1), encoding="utf-8")
    limits = DataLimits(
        micro_steps=data.loader.micro_steps, tokens_per_pack=config.data.tokens_per_pack,
        max_bad_share=config.data.max_bad_share,
    )  # fmt: skip
    facts = {
        "configuration": json.loads(json.dumps(plain(config))),
        "configuration_sha256": digest(config),
        "data": data_found,
    }
    origin = Origin(start.lineage, start.checkpoint, facts)
    outside = Outside(start.stopping.reason, pulse_of_process().mark)
    Trainer(
        config, task, batches=data, mesh=mesh, data_limits=limits, origin=origin, outside=outside
    ).run()  # fmt: skip
    if mesh.is_first:
        note_data(config, data.plan, drawn=data.plan.seen(config.train.steps))


@contextmanager
def holding(folder: Path, mesh: ParallelMesh, *, job: str) -> Iterator[None]:
    """Within, no other job writes into the run's folder. An error of the first rank is that of all."""
    lease, taken, fruitless = None, "", ""
    if mesh.is_first:
        try:
            lease = Lease(folder, say=lambda text: print(text, file=sys.stderr, flush=True), job=job)
            note_attempt(folder, job=job, restart=restarts())
        except (CheckpointError, OSError) as error:  # or the others would wait for it
            taken = str(error)
        except NoProgress as error:
            fruitless = str(error)
    taken, fruitless = broadcast_object((taken, fruitless), mesh.world)
    try:
        if taken:
            raise CheckpointError(taken)
        if fruitless:
            raise NoProgress(fruitless)
        yield
    finally:
        if lease:
            lease.release()


@contextmanager
def noting_the_end(folder: Path, mesh: ParallelMesh, *, job: str) -> Iterator[None]:
    """Write how the block ends, with the command's exit code, to ``STATUS``; while it runs there is none."""
    if not mesh.is_first:
        yield
        return
    (folder / STATUS).unlink(missing_ok=True)
    code, reason = 0, "the run is at its end"
    try:
        yield
    except BaseException as error:
        code, reason = code_of(error), " ".join(str(error).split()) or type(error).__name__
        raise
    finally:
        status = {"code": code, "reason": reason, "job": job, "time": time.time()}
        with suppress(OSError), replacing(folder / STATUS) as temporary:  # a full disk has said so
            temporary.write_text(json.dumps(status), encoding="utf-8")
