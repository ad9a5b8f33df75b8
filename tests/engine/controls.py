"""Protections that a run can be told to do without, each by its name, to see that its loss is noticed."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvideo_dist.engine import files, restoring, saving
from cogvideo_dist.engine.checkpoint import PREFIX, checkpoints
from cogvideo_dist.engine.files import Written
from cogvideo_dist.engine.manifest import NAME, manifest_text
from cogvideo_dist.engine.saving import Saver


def in_place() -> None:
    """Files are written where they are read."""

    def begin(saver: Saver, step: int, bytes_here: int) -> Path:
        folder = saver.folder / f"{PREFIX}{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(content: Mapping[str, Any], *, aside: Path, final: Path) -> None:
        files.write_text(final / NAME, manifest_text(content))
        files.sync(final)
        files.sync(final.parent)

    Saver._begin = begin  # type: ignore[method-assign, assignment]
    saving.commit = commit


def without_the_others() -> None:
    """The first rank commits when it has written, whatever the others have."""
    saving.gather_objects = lambda value, axis: [value] * axis.size


def said_before_it_is_done() -> None:
    """A rank says that it has written while it begins to."""
    write = files.write_tensors

    def early(path: Path, names: Mapping[str, int], values: Tensor) -> Written:
        later = path.with_name(f"{path.name}.later")
        written, folder = write(later, names, values), path.parent

        def finish() -> None:
            time.sleep(0.3)
            place = folder if folder.exists() else folder.with_name(folder.name.removeprefix(".tmp-"))
            (place / later.name).rename(place / path.name)

        threading.Thread(target=finish).start()
        return written

    files.write_tensors = early


def latest_is_trusted() -> None:
    def names(folder: Path, wanted: str | None, until: int | None) -> list[str]:
        latest = folder / "latest"
        return [latest.read_text().strip()] if latest.exists() else []

    restoring._names = names


def pruned_before_the_commit() -> None:
    commit = saving.commit

    def late(content: Mapping[str, Any], *, aside: Path, final: Path) -> None:
        for old in checkpoints(final.parent):
            shutil.rmtree(old)
        commit(content, aside=aside, final=final)

    saving.commit = late


BROKEN: dict[str, Callable[[], None]] = {
    "in place": in_place,
    "without the others": without_the_others,
    "said before it is done": said_before_it_is_done,
    "latest is trusted": latest_is_trusted,
    "pruned before the commit": pruned_before_the_commit,
}
