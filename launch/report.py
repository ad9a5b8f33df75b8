"""One page of one or several runs, which opens without a network: python launch/report.py RUN [RUN ...] --out report.html"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.data.shards import shown
from cogvideo_dist.evaluation.media import replacing
from launch.environment import run_command
from launch.report_films import embedded
from launch.report_page import page
from launch.report_read import labels, read_run

VIDEOS_MB = 32.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    out = Path(options.out)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name the page, for example {out / 'report.html'}")
    if not 0 <= options.videos < 1e6:
        raise ConfigError(f"--videos {options.videos}: megabytes from 0 up")
    runs = [read_run(Path(folder), label=label) for folder, label in zip(options.runs, labels(options.runs))]
    films = embedded(runs, limit=int(1e6 * options.videos))
    with replacing(out) as temporary:
        temporary.write_text(page(runs, films), encoding="utf-8")
    for problem in (problem for run in runs for problem in run.problems):
        sys.stdout.write(f"warning: {shown(problem)}\n")
    sys.stdout.write(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)\n")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Write one page of what runs have logged: losses, speed, memory, communication, checkpoints, starts, "
        "defects of the data, samples as videos, configuration. It opens in a browser without a network. Runs that are "
        "still going may be looked at; several lie over each other.",
        epilog="example:\n  python launch/report.py runs/stage1 runs/stage2 --out report.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder (its run.dir)")
    found.add_argument("--out", default="report.html", help="the page (report.html)")
    found.add_argument(
        "--videos", type=float, default=VIDEOS_MB, metavar="MB",
        help=f"megabytes of videos that it holds at most, in all ({VIDEOS_MB:g}); 0: none",
    )  # fmt: skip
    return found


if __name__ == "__main__":
    run_command("report", main)
