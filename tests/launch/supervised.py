"""A training on supervised ranks, forked, with a fault in one of them; and how it ended."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.config.watch import Watch
from cogvideo_dist.engine.inputs import DataLimits
from cogvideo_dist.engine.outside import Outside
from cogvideo_dist.engine.trainer import Trainer
from cogvideo_dist.parallel.agreement import check_alike
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh, Place, start
from cogvideo_dist.parallel.ops import broadcast_object, reduce_sum
from launch.environment import run_command
from launch.pulse import Pulse, pulse_of_process
from launch.stopping import Stopping
from launch.supervise import SUPERVISED, Supervisor
from launch.training import holding, noting_the_end
from tests.engine.test_trainer import PACKS, Slope, ToBe, settings
from tests.ranks import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])

QUICK = Watch(init_s=8, build_s=20, load_s=20, first_step_s=3, step_s=3, data_s=3, save_s=3, judge_s=3, end_s=10)
"""Limits under which a hang is seen within seconds; work in these tests takes milliseconds."""


@dataclass(frozen=True)
class Fault:
    """``action`` on ``rank`` as it begins ``phase`` of ``step``; rank -1: on none."""

    action: str
    rank: int
    phase: str = "forward"
    step: int = 3


@dataclass(frozen=True)
class Scene:
    """A training of ``steps`` steps on ``ranks`` ranks in ``folder``."""

    folder: Path
    ranks: int = 2
    steps: int = 6
    fault: Fault = Fault("none", -1)
    limits: Watch = QUICK
    pace_s: float = 0.0
    """That every forward takes longer."""
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")


@dataclass(frozen=True)
class Outcome:
    """Exit codes by rank, what was said on all ranks' stderr, the ids of the ranks' processes, and how many seconds after the
    fault everything was over (0 without one)."""

    codes: list[int]
    said: str
    pids: list[int]
    seconds: float

    @property
    def lines(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("train: ")]


def play(scene: Scene, *, meanwhile: Callable[[Scene], None] | None = None, timeout_s: float = 100.0) -> Outcome:
    """Run it to its end. ``meanwhile`` is called while it runs."""
    scene.folder.mkdir(parents=True, exist_ok=True)
    for old in [*scene.folder.glob("running-*"), *scene.folder.glob("pid-*"), *scene.folder.glob("stderr-*")]:
        old.unlink()
    processes = [_context.Process(target=_supervisor, args=(scene, rank), daemon=False) for rank in range(scene.ranks)]
    for process in processes:
        process.start()
    try:
        if meanwhile:
            meanwhile(scene)
        end = time.monotonic() + timeout_s
        for rank, process in enumerate(processes):
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, f"the supervisor of rank {rank} did not end: {_said(scene)}"
        over = time.monotonic()
    finally:
        for process in processes:
            process.kill()
            process.join()
    mark = scene.folder / "fault"
    pids = [int(path.read_text()) for path in sorted(scene.folder.glob("pid-*"))]
    seconds = over - float(mark.read_text()) if mark.exists() else 0.0
    return Outcome([process.exitcode or 0 for process in processes], _said(scene), pids, seconds)


def alive(outcome: Outcome) -> list[int]:
    """Of the ranks' processes and what they had started, those that still run."""
    return [pid for pid in outcome.pids if Path(f"/proc/{pid}").exists()]


def status(scene: Scene) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((scene.folder / "exit_status.json").read_text())
    return found


def _said(scene: Scene) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(scene.folder.glob("stderr-*")))


def _supervisor(scene: Scene, rank: int) -> None:
    """What the process does that a launcher starts."""
    errors = os.open(scene.folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(errors, "w", buffering=1)
    (scene.folder / f"supervisor-{rank}").write_text(str(os.getpid()))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(scene.ranks))

    def spawn(descriptors: tuple[int, int, int]) -> int:
        pid = os.fork()
        if pid == 0:
            for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
                if descriptor > 2 and descriptor not in descriptors:
                    with suppress(OSError):
                        os.close(descriptor)
            os.environ[SUPERVISED] = ",".join(map(str, descriptors))
            code = 1
            try:
                run_command("train", lambda: _rank(scene, rank))
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)
        return pid

    code = Supervisor("train", spawn).run()
    sys.stderr.flush()
    os._exit(code)


def _rank(scene: Scene, rank: int) -> None:
    torch.set_num_threads(1)
    os.setsid()
    helper = subprocess.Popen(["sleep", "1000"])  # such as a worker that reads data
    (scene.folder / f"pid-{rank}-{os.getpid()}").write_text(str(os.getpid()))
    (scene.folder / f"pid-{rank}-{helper.pid}").write_text(str(helper.pid))
    pulse = pulse_of_process()
    faulty = Faulty(scene, pulse)
    place = Place(rank, scene.ranks, rank, scene.address, scene.ranks)
    pulse.join(place, scene.folder, limits=scene.limits, meeting=scene.address.rpartition(":")[2])
    faulty("init")
    config = settings(scene.folder, steps=scene.steps, save=2)
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))
    rate = config.train.learning_rate * (2 if faulty.other else 1)
    facts = {"train.learning_rate": json.dumps(rate), "train.steps": json.dumps(scene.steps)}
    stopping = Stopping()
    stopping.listen()
    mesh = start(place, device=torch.device("cpu"), timeout_s=1000, check=partial(check_alike, facts))
    faulty.mesh = mesh
    (scene.folder / f"running-{rank}").touch()
    faulty("build")
    limits = DataLimits(micro_steps=PACKS // mesh.dp.size, tokens_per_pack=2, max_bad_share=0.9)
    with holding(scene.folder, mesh, job=""), noting_the_end(scene.folder, mesh, job=""):
        Trainer(
            config, Slope(), batches=ToBe(mesh), mesh=mesh, data_limits=limits, outside=Outside(stopping.reason, faulty)
        ).run()  # fmt: skip


class Faulty:
    """Marks phases, and does what the scene's fault says."""

    def __init__(self, scene: Scene, pulse: Pulse) -> None:
        self.scene, self.fault, self.pulse = scene, scene.fault, pulse
        self.mesh: ParallelMesh | None = None
        self.rank = int(os.environ["RANK"])
        self.other = False

    def __call__(self, phase: str, step: int = 0) -> None:
        self.pulse.mark(phase, step)
        if phase == "forward":
            time.sleep(self.scene.pace_s)
        fault = self.fault
        if (fault.rank, fault.phase) == (self.rank, phase) and step in (0, fault.step):
            (self.scene.folder / "fault").write_text(str(time.monotonic()))
            getattr(self, fault.action)()

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(self) -> None:
        os._exit(0)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def sleep(self) -> None:
        time.sleep(1000)

    def loop(self) -> None:
        while True:
            pass

    def hold(self) -> None:
        """A call into C that lets no other thread run."""
        call = ctypes.PyDLL(None).sleep
        while True:
            call(1000)  # which a signal ends early

    def fault_of_ours(self) -> None:
        raise KeyError("an error that nobody foresaw")

    def bad_input(self) -> None:
        raise ValueError("the input is bad\nin two lines")

    def allocate(self) -> None:
        torch.empty(2**50)

    def other_rate(self) -> None:
        self.other = True

    def another_order(self) -> None:
        """A collective that the other ranks do not do here."""
        reduce_sum(torch.zeros(3), self._world)

    def another_collective(self) -> None:
        broadcast_object("text", self._world)

    @property
    def _world(self) -> Axis:
        assert self.mesh is not None
        return self.mesh.world
