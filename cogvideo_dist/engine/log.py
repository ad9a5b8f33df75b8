"""What a run tells: a progress line, TensorBoard, ``log.jsonl``, its starts, the data report and pictures. Only the first
rank tells."""

from __future__ import annotations

import io
import json
import math
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cogvideo_dist.evaluation.media import gif_bytes, replacing, write_contact_sheet, write_mp4
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import reduce_sum
from cogvideo_dist.protocols import Defect, Picture

TROUBLE_S, RETRY_S = 600.0, 60.0
"""Between two words about logs that cannot be written, and before event files are tried again."""


class Meter:
    """Sums of (value, weight) pairs by name; those of tensors stay on their device until they are due."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor | float]] = {}

    def add(self, name: str, value: Tensor | float, *, weight: Tensor | float = 0.0) -> None:
        pair = [item.detach().double() if isinstance(item, Tensor) else float(item) for item in (value, weight)]
        held = self.sums.get(name, [0.0, 0.0])
        self.sums[name] = [held[0] + pair[0], held[1] + pair[1]]

    def restore(self, sums: Mapping[str, Sequence[float]], *, mine: bool) -> None:
        """Go on from ``sums`` that were reduced; one rank has them (``mine``), others none, under the same names."""
        self.sums = {name: [float(value) * mine, float(weight) * mine] for name, (value, weight) in sums.items()}

    def reduce(self, axis: Axis, device: torch.device) -> dict[str, tuple[float, float]]:
        """(sum, weight) by name over all ranks, each of which must have added the same names; empties the meter."""
        names = sorted(self.sums)
        if not names:
            return {}
        flat = [torch.as_tensor(item, dtype=torch.float64, device=device) for name in names for item in self.sums[name]]
        total = reduce_sum(torch.stack(flat), axis).cpu().view(-1, 2)
        self.sums = {}
        return {name: (float(pair[0]), float(pair[1])) for name, pair in zip(names, total)}


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Quotients of the sums; names without weight are left out."""
    return {name: value / weight for name, (value, weight) in sums.items() if weight}


class RunLog:
    """Files of one run; ``first_step`` is where this start of it begins: what a killed start logged later is dropped."""

    def __init__(self, folder: Path, *, first_step: int, steps: int, speaks: bool) -> None:
        self.folder, self.speaks, self.noticed = folder, speaks, False
        if not speaks:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stderr, dynamic_ncols=True)
        self.troubled = -math.inf
        logged = _drop_after(folder / "log.jsonl", first_step)
        self.report = folder / "data_report.jsonl"
        self.listed = set(self.report.read_text(encoding="utf-8").splitlines()) if self.report.exists() else set()
        self.lines = Lines(folder / "log.jsonl", self._trouble)
        self.reported = Lines(self.report, self._trouble)
        self.board = Board(folder / "tensorboard", first_step=first_step, trouble=self._trouble)
        self._note_start(first_step, lost=max(0, logged - first_step))

    def _trouble(self, error: OSError) -> None:
        """A disk that takes no logs does not end a run; it is said now and then."""
        if time.monotonic() - self.troubled > TROUBLE_S:
            self.troubled = time.monotonic()
            self.say(
                f"warning: logs cannot be written ({error}); the run goes on, and lines are kept until they can be"
            )

    def rewind(self, step: int) -> None:
        """Drop what was logged after ``step``, from which the run goes on once more."""
        if not self.speaks:
            return
        self.lines.close()
        self.board.close()
        logged = _drop_after(self.folder / "log.jsonl", step)
        self._note_start(step, lost=max(0, logged - step))
        self.lines = Lines(self.folder / "log.jsonl", self._trouble)
        self.board = Board(self.folder / "tensorboard", first_step=step, trouble=self._trouble)
        self.progress(step)

    def _note_start(self, first_step: int, *, lost: int) -> None:
        """A line of ``starts.jsonl``, which no start drops; ``lost``: steps that an earlier one logged and this one makes
        again."""
        entry = {"step": first_step, "time": time.time(), "host": socket.gethostname(), "lost": lost}
        starts = Lines(self.folder / "starts.jsonl", self._trouble)
        starts.add(json.dumps(entry))
        starts.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """``values`` after ``step`` updates."""
        if not self.speaks:
            return
        for name, value in values.items():
            self.board.scalar(name, value, step=step)
        self.lines.add(json.dumps({"step": step, **values}))

    def progress(self, step: int, **shown: str) -> None:
        if self.speaks:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        if self.speaks:
            self.bar.write(text, file=sys.stderr)

    def pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """mp4s, their captions and one contact sheet on disk, moving pictures in TensorBoard."""
        if not self.speaks or not pictures:
            return
        try:
            self._write_pictures(step, pictures)
        except OSError as error:
            self._trouble(error)

    def _write_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        folder = self.folder / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            write_mp4(folder / f"{picture.name}.mp4", picture.frames, picture.fps)
            self.board.summary(_moving(f"samples/{picture.name}", picture), step=step)
        with replacing(folder / "captions.json") as temporary:
            captions = {picture.name: picture.caption for picture in pictures}
            temporary.write_text(json.dumps(captions, ensure_ascii=False, indent=1), encoding="utf-8")
        rows = [(picture.caption, picture.frames) for picture in pictures]
        wide = max(
            1, round(max(frames.shape[2] / frames.shape[1] for _, frames in rows))
        )  # several pictures side by side
        write_contact_sheet(folder / "contact-sheet.png", rows, columns=max(2, 8 // wide), cell=160 * wide)

    def defects(self, defects: Iterable[Defect]) -> None:
        """Append to the data report and say it; every time that a sample was not used as planned is one line of it."""
        if not self.speaks:
            return
        for defect in defects:
            self._list(report_line(defect))
            self.say(f"data: {defect.source}: {defect.reason}; used {defect.replaced_by} instead")

    def notices(self, notices: Iterable[Defect]) -> int:
        """Append each to the data report once, and say the first; returns how many are new."""
        if not self.speaks:
            return 0
        fresh = [notice for notice in notices if report_line(notice) not in self.listed]
        if fresh and not self.noticed:
            self.noticed = True
            self.say(
                f"data: {fresh[0].source}: {fresh[0].reason}; this one and others alike are listed in {self.report}"
            )
        lines = dict.fromkeys(map(report_line, fresh))  # two ranks may have met the same
        for line in lines:
            self._list(line)
        return len(lines)

    def _list(self, line: str) -> None:
        self.listed.add(line)
        self.reported.add(line)

    def close(self) -> None:
        if self.speaks:
            self.bar.close()
            self.lines.close()
            self.reported.close()
            self.board.close()


class Lines:
    """Lines at the end of a file. Those that cannot be written wait for the next ones; ``trouble`` is told."""

    def __init__(self, path: Path, trouble: Callable[[OSError], None]) -> None:
        self.path, self.trouble, self.waiting = path, trouble, b""
        self.file: io.FileIO | None = None

    def add(self, line: str) -> None:
        self.waiting += line.encode() + b"\n"
        self._write()

    def close(self) -> None:
        self._write()
        if self.file:
            self.file.close()

    def _write(self) -> None:
        try:
            self.file = self.file or io.FileIO(self.path, "a")
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            self.trouble(error)


class Board:
    """TensorBoard's event files. One that cannot be written is given up, and a new one begun some time later."""

    def __init__(self, folder: Path, *, first_step: int, trouble: Callable[[OSError], None]) -> None:
        self.folder, self.trouble, self.since = folder, trouble, -math.inf
        self.writer: SummaryWriter | None = None
        self.first_step: int | None = first_step
        self._try(self._open)

    def scalar(self, name: str, value: float, *, step: int) -> None:
        self._try(lambda: self._open().add_scalar(name, value, step))

    def summary(self, summary: Summary, *, step: int) -> None:
        self._try(lambda: self._open()._get_file_writer().add_summary(summary, step))

    def close(self) -> None:
        if self.writer:
            self._try(self.writer.close)

    def _open(self) -> SummaryWriter:
        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), purge_step=self.first_step)
            self.first_step = None  # a later file hides nothing
        return self.writer

    def _try(self, write: Callable[[], object]) -> None:
        if time.monotonic() - self.since < RETRY_S:
            return
        try:
            write()
        except OSError as error:
            self.writer, self.since = None, time.monotonic()
            self.trouble(error)


def report_line(defect: Defect) -> str:
    """One line of a data report."""
    return json.dumps(vars(defect), ensure_ascii=False)


def _drop_after(path: Path, step: int) -> int:
    """Keep the lines of ``log.jsonl`` up to ``step``, none if the run begins anew; a torn last line goes too. The last step
    that had a line, 0 without any."""
    if not path.exists():
        return 0
    kept, last = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        last = entry["step"]
        if last <= step and step > 0:
            kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return last


def _moving(tag: str, picture: Picture) -> Summary:
    data = gif_bytes(picture.frames, picture.fps)
    width, height = Image.open(io.BytesIO(data)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA's allocator held, or this process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
