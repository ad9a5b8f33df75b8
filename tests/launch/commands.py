"""The real commands, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "train_dit.py")
LAUNCHERS = {
    "python": (sys.executable,),
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"),
    "deepspeed": (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port"),
}
TIMEOUT_S = 120
FREQUENT = ("checkpoint.every=3", "data.workers=1")


def environment() -> dict[str, str]:
    """This process's, without what a launcher would say, and one thread a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(launcher: str, arguments: Sequence[str], *, script: Sequence[str] = (SCRIPT,)) -> subprocess.Popen[str]:
    command = list(LAUNCHERS[launcher])
    if launcher != "python":
        command.append(str(free_port()))
    return subprocess.Popen(
        [*command, *script, "--config", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=environment(), start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise AssertionError(f"{process.args} did not end in {TIMEOUT_S} s: {process.communicate()[1]}") from None
    return process.returncode, stdout, stderr


def last_step(run: Path) -> int:
    """The last whole line's step in a run's log, -1 without one."""
    path = run / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(lines[-1].split(",")[0].removeprefix('{"step": ')) if lines else -1
