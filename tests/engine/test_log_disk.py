"""A disk that takes no logs does not end a run, and what could be written later is."""

from __future__ import annotations

import io
import json
import resource
from contextlib import redirect_stderr
from pathlib import Path

from cogvideo_dist.engine.log import RunLog
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.ranks import run_ranks


def logging(mesh: ParallelMesh, folder: Path) -> tuple[int, str]:
    """Log, with files that cannot grow from step 4 to 7; how many lines were there then, and what was said."""
    with redirect_stderr(io.StringIO()) as said:
        return written(folder), said.getvalue()


def written(folder: Path) -> int:
    log = RunLog(folder, first_step=0, steps=9, speaks=True)
    path, hard = folder / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    seen = 0
    for step in range(1, 10):
        if step == 4:
            log.board.writer.flush()  # type: ignore[union-attr]
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
        if step == 8:
            seen = path.read_text().count("\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        log.scalars(step, {f"figure {number}": 1.0 / step for number in range(1000)})  # much longer than what is said
    log.close()
    return seen


def test_lines_wait_for_room(tmp_path: Path) -> None:
    ((seen, said),) = run_ranks(logging, 1, tmp_path)
    assert seen == 3
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert said.count("warning: logs cannot be written") == 1
