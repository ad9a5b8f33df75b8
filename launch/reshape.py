"""The bodies of launch/convert.py reshape and check: a checkpoint of ours in other pieces, and whether one is whole."""

from __future__ import annotations

import argparse
from pathlib import Path

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.engine.checkpoint import PREFIX, Stored
from cogvideo_dist.engine.reshaping import reshape


def add_reshape(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a checkpoint, such as runs/demo/dit/ckpt/step-000020")
    command.add_argument("out", help="the folder to write it into, under the same name")
    command.add_argument("--ranks", type=int, default=1, metavar="N", help="that share its elements (%(default)s)")
    command.add_argument("--tp", type=int, default=1, metavar="N", help="of them, how many slice tensors (%(default)s)")


def add_check(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a checkpoint, such as runs/demo/dit/ckpt/step-000020")


def reshape_checkpoint(options: argparse.Namespace) -> None:
    if options.tp < 1 or options.ranks < 1 or options.ranks % options.tp:
        raise ConfigError(f"--tp {options.tp} does not divide --ranks {options.ranks}")
    stored = opened(options.source)
    print(reshape(stored, Path(options.out), tp=options.tp, replicas=options.ranks // options.tp))


def check_checkpoint(options: argparse.Namespace) -> None:
    """Read and hash every byte; say what it is."""
    stored = opened(options.source)
    stored.verify()
    saved, files = stored.saved, stored.manifest["files"]
    models = ", ".join(
        f"{name or 'model'}: {len(cuts := stored.cuts(name))} tensors, {sum(cut.count for cut in cuts.values()):,} elements of "
        f"{', '.join(sorted(stored.kinds(name)))}"
        for name in stored.manifest["tensors"]
    )
    size = sum(facts["size"] for facts in files.values())
    print(
        f"{stored.path}: step {saved.step}, {saved.samples} clips; {models}; {len(files)} files, {size / 1e6:.1f} MB: whole"
    )


def opened(source: str) -> Stored:
    path = Path(source)
    if not path.name.startswith(PREFIX) or not path.is_dir():
        raise ConfigError(f"{source} is no checkpoint; expected a folder {PREFIX}N of a run's ckpt")
    return Stored.open(path)


COMMANDS = {
    "reshape": (
        add_reshape,
        reshape_checkpoint,
        "a checkpoint -> one in the pieces of other ranks, which no run needs",
    ),
    "check": (add_check, check_checkpoint, "hash every byte of a checkpoint and say what it is"),
}
"""Name -> its options, its body and what it does."""
