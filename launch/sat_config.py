"""The body of launch/convert.py sat-config: SAT's configuration files -> ours, and what became of each key."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.convert.sat_config import Situation, translate


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "files", nargs="+", metavar="FILE.yaml", help="as SAT's --base has them: later ones win, key by key"
    )
    command.add_argument("--out", metavar="FILE", help="the new file; left out, it goes to stdout")
    command.add_argument("--run-dir", metavar="DIR", help="run.dir; left out, SAT's save and experiment_name")
    command.add_argument(
        "--gpus", type=int, default=Situation.gpus, metavar="N",
        help="that SAT ran on, which its files do not say; they make its batch (%(default)s)",
    )  # fmt: skip


def translate_files(options: argparse.Namespace) -> None:
    """Write the configuration to ``--out`` or stdout, the account of SAT's keys to stderr."""
    out = Path(options.out) if options.out else None
    if out is not None and out.exists():
        raise ConfigError(f"{out} is there already; remove it or give another --out")
    situation = Situation(options.gpus, options.run_dir, options.out or Situation.out)
    translation = translate(options.files, situation)
    sys.stderr.write(translation.table)
    if out is None:
        sys.stdout.write(translation.yaml)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(translation.yaml, encoding="utf-8")
    print(out)
