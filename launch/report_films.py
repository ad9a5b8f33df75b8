"""The videos of a report: which of a run's samples are embedded, so that the page stays small enough to send."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from launch.report_read import Film, RunFacts

EARLIER, NAMES = 3, 12
"""Steps shown beside the newest, and videos of a step."""


@dataclass(frozen=True)
class Shown:
    """A film with its bytes, or why it is not embedded."""

    film: Film
    content: bytes = b""
    why: str = ""

    @property
    def url(self) -> str:
        return f"data:video/mp4;base64,{base64.b64encode(self.content).decode()}"


def steps_shown(films: Sequence[Film]) -> list[int]:
    """The newest step first, then a few earlier ones: the first, and some evenly between."""
    steps = sorted({film.step for film in films}, reverse=True)
    if len(steps) <= EARLIER + 1:
        return steps
    return [steps[round(place * (len(steps) - 1) / EARLIER)] for place in range(EARLIER + 1)]


def embedded(runs: Sequence[RunFacts], *, limit: int) -> list[list[Shown]]:
    """Of every run, in ``limit`` bytes for all: the newest step of each before the earlier ones of any."""
    chosen = [steps_shown(run.films) for run in runs]
    found: list[list[Shown]] = [[] for _ in runs]
    left = limit
    for rank in range(EARLIER + 1):
        for run, steps, mine in zip(runs, chosen, found):
            films = [film for film in run.films if rank < len(steps) and film.step == steps[rank]]
            for film in films[:NAMES]:
                shown = _embed(film, left)
                left -= len(shown.content)
                mine.append(shown)
    return found


def _embed(film: Film, left: int) -> Shown:
    try:
        size = film.path.stat().st_size
        if size > left:
            return Shown(film, why=f"{size / 1e6:.1f} MB, more than is left for videos (--videos)")
        content = film.path.read_bytes()
    except OSError as error:
        return Shown(film, why=str(error))
    # whatever a file is named, only a video leaves its folder in a page that others are given
    return Shown(film, content) if content[4:8] == b"ftyp" else Shown(film, why="this is no mp4")
