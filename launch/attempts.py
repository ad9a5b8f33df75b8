"""The starts of a run and how they ended: a job that is restarted again and again and gets nowhere is ended for good."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideo_dist.engine import files
from cogvideo_dist.engine.checkpoint import PREFIX, checkpoints
from cogvideo_dist.engine.ending import NoProgress

FILE = "attempts.jsonl"
"""In a run's folder: a line for each start, with its job, its number among that job's starts, and the step it began from."""

STATUS = "exit_status.json"
"""In a run's folder: how its last start ended, since launchers lose exit codes."""

FRUITLESS = 3
"""Restarts in a row without a new checkpoint, after which somebody has to look."""


def note_attempt(folder: Path, *, job: str, restart: int) -> None:
    """Write down that a start begins, the ``restart``-th again of ``job``, and how the last one ended.

    Raises ``NoProgress`` if the job's last ``FRUITLESS`` restarts have committed no step, with what ended them.
    """
    step = max((int(path.name[len(PREFIX) :]) for path in checkpoints(folder / "ckpt")), default=0)
    before = _read(folder / FILE)
    own = [each for each in before if each.get("job") == job and each.get("restart", 0) < restart]
    ended = _status(folder)
    entry = {"time": time.time(), "job": job, "restart": restart, "step": step, "last": ended}
    with suppress(OSError):  # a full disk says so where checkpoints are written
        files.append_line(folder / FILE, json.dumps(entry))
    fruitless = [each for each in own[-FRUITLESS:] if each.get("step") == step]
    if restart >= FRUITLESS and len(fruitless) == FRUITLESS:
        causes = [each.get("last", "") for each in fruitless[1:]] + [ended]
        said = "; ".join(f"{number}. {cause or 'without a word'}" for number, cause in enumerate(causes, 1))
        raise NoProgress(
            f"{FRUITLESS} starts of job {job} in a row have ended without a new checkpoint, all at step {step}: {said}; put "
            f"right what ended them (see {folder / 'logs'}) and submit the job anew"
        )


def _status(folder: Path) -> str:
    """How the last start ended, in a few words; empty if it did not come to say."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        return f"exit code {found['code']}, {str(found['reason'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a torn last line
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
