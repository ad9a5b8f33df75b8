"""Look at the data of a training configuration before it costs GPU-hours; see --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cogvideo_dist.data.plan import Plan
from cogvideo_dist.data.pool import WorkerError
from cogvideo_dist.data.shards import shown
from cogvideo_dist.evaluation.media import replacing
from data_tools.command import Parser
from data_tools.inspect_clips import Captions, pictures, read_captions
from data_tools.inspect_facts import Findings, as_data
from data_tools.inspect_lint import Lint
from data_tools.inspect_report import page, table
from data_tools.inspect_set import Inspected, load_run
from data_tools.inspect_steps import compare, ranks_of
from launch.environment import split_config

PAGE, NUMBERS = "report.html", "report.json"

DESCRIPTION = """\
Look at the data of a training configuration before it costs GPU-hours.

Reads what launch/train_dit.py or launch/train_vae.py would read, plans its first steps and writes a page with figures and
pictures (FOLDER/report.html, one file that needs no network) and all numbers (FOLDER/report.json). Needs no GPU.
"""

EXAMPLES = """\
examples:
  python data_tools/inspect_shards.py --config configs/demo/dit.yaml --out runs/demo/data
  python data_tools/inspect_shards.py --config my.yaml data.tokens_per_pack=40000 --out report --dp 8 64 --steps 1000
  python data_tools/inspect_shards.py --config my.yaml --out report --lint --captions all

--lint also writes FOLDER/lint.jsonl: a line for every sample that is dropped, cut, cropped, scaled, padded or played at
other frames per second, or whose caption is too long, empty or that of another sample.

exit code: 0 all is written; 1 written, but --lint found samples that would be dropped; 2 the report cannot be made.
"""


def caption_count(text: str) -> int | None:
    """How many captions are read; all: None."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of captions nor all")
    return int(text)


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def parser() -> Parser:
    options = Parser("inspect_shards", description=DESCRIPTION, epilog=EXAMPLES)
    add = options.add_argument
    add(
        "--config", nargs="+", required=True, metavar="FILE.yaml | key.path=value",
        help="configuration files, later ones win key by key, and overrides such as data.tokens_per_pack=40000",
    )  # fmt: skip
    add("--out", required=True, metavar="FOLDER", help="where the report goes")
    add(
        "--dp", nargs="+", type=at_least_one, default=[], metavar="N",
        help="numbers of data-parallel ranks to look at; left out, the largest that data.packs_per_step divides over",
    )  # fmt: skip
    add(
        "--steps", type=at_least_one, default=200, metavar="N",
        help="steps to plan, at most those of the run; default %(default)s",
    )  # fmt: skip
    add("--lint", action="store_true", help="also write a line for every sample that is not used as it is")
    add(
        "--captions", type=caption_count, default="5000", metavar="N",
        help="captions to read and count in tokens, evenly spaced, or all; default %(default)s",
    )  # fmt: skip
    return options


def track(items: Iterable[int], what: str) -> Iterable[int]:
    """With progress on stderr."""
    return tqdm(items, desc=what, file=sys.stderr)


def inspect(options: argparse.Namespace) -> int:
    """Write the report; the exit code."""
    found, out = Inspected.open(load_run(**split_config(options.config))), Path(options.out)
    ranks = ranks_of(found.data, options.dp)
    out.mkdir(parents=True, exist_ok=True)
    try:
        plan = Plan(found.catalog, found.data, seed=found.config.run.seed, geometry=found.geometry)
    except ValueError:
        if options.lint:  # nothing is left to train on: the remarks say why
            write_lint(Lint(found, captions=None, left_out=None), out)
        raise
    used = np.sort(np.append(plan.training, [slot.index for slot in plan.held_out]).astype(np.int64))
    captions = read_captions(found, used, most=options.captions, track=track)
    lint = make_lint(found, used, captions=captions, out=out) if options.lint else None
    modes = compare(found, plan, steps=min(options.steps, found.config.train.steps), ranks=ranks, track=track)
    given = Findings(found, plan, modes, captions, pictures(found, used, track=track), lint)
    data = as_data(given)
    for name, text in (
        (NUMBERS, json.dumps(data, indent=1, allow_nan=False) + "\n"),
        (PAGE, page(data, given.pictures)),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(table(data))
    print(f"inspect_shards: wrote {out / PAGE}")
    return 1 if lint is not None and lint.counts["dropped"] else 0


def make_lint(found: Inspected, used: np.ndarray, *, captions: Captions, out: Path) -> Lint:
    """The remarks on all samples that are used or dropped."""
    left_out = found.found >= 0
    left_out[used] = False
    lint = Lint(found, captions=captions, left_out=left_out)
    write_lint(lint, out)
    return lint


def write_lint(lint: Lint, out: Path) -> None:
    with tqdm(total=len(lint.found.catalog), desc="lint", unit="sample", file=sys.stderr) as bar:
        lint.write(out, bar.update)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return inspect(options)
    except (ValueError, OSError, WorkerError) as error:
        print(f"inspect_shards: error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
