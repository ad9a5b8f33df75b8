"""Pack clips, images and their captions into WebDataset shards with an index; see --help."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from tqdm import tqdm

from cogvideo_dist.data.index import REJECTED
from cogvideo_dist.data.shards import shown
from cogvideo_dist.data.sources import Source, find_sources, read_manifest, take_in
from cogvideo_dist.data.writing import Entry, Written, write_shards
from cogvideo_dist.protocols import Defect
from cogvideo_dist.rng import fold
from data_tools.command import Parser, counted

DESCRIPTION = """\
Pack clips, images and their captions into WebDataset shards with an index.

SRC holds videos/ (mp4, webm, mov, mkv) and/or images/ (png, jpg, jpeg, webp), and labels/<same name>.txt with the
captions; sub-folders may be nested. Every file is decoded once. The original bytes are stored.
"""

EXAMPLES = """\
examples:
  python data_tools/make_shards.py clips shards/train
  python data_tools/make_shards.py clips shards/train --manifest clips/captions.csv --seed 1 --max-shard-size 500MB

A manifest is a CSV file with the header path,caption, or JSON Lines of {"path": ..., "caption": ...}.

exit code: 0 all written; 1 written, but some files were rejected (each has its line on stderr and in
DST/rejected.jsonl); 2 nothing written.
"""

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """500MB -> 500000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB, 1GB or 1GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parser() -> Parser:
    options = Parser("make_shards", description=DESCRIPTION, epilog=EXAMPLES)
    options.add_argument(
        "src", metavar="SRC", help="folder with videos/, images/ and labels/, or whatever the manifest lists"
    )
    options.add_argument("dst", metavar="DST", help="folder to make; appears only when it is complete")
    options.add_argument("--manifest", metavar="FILE", help=".csv or .jsonl of (path relative to SRC, caption)")
    options.add_argument("--max-shard-size", type=byte_count, default="1GB", metavar="SIZE", help="default %(default)s")
    options.add_argument(
        "--seed", type=int, help="shuffle the samples over the shards; left out, they keep their order"
    )
    options.add_argument(
        "--allow-empty-captions", action="store_true", help="take files whose caption is empty or missing"
    )
    options.add_argument("--overwrite", action="store_true", help="replace DST if it is a folder of shards")
    options.add_argument("--allow-rejects", action="store_true", help="exit with 0 although files were rejected")
    return options


def watched(entries: Iterable[Entry], total: int) -> Iterator[Entry]:
    """The entries, with progress and one line for each rejected one on stderr."""
    for entry in tqdm(entries, total=total, unit="file", file=sys.stderr):
        if isinstance(entry, Defect):
            tqdm.write(f"make_shards: rejected {shown(entry.source)}: {shown(entry.reason)}", file=sys.stderr)
        yield entry


def summary(written: Written, dst: str) -> str:
    rejected = f"rejected {written.rejected}, listed in {dst}/{REJECTED}" if written.rejected else "rejected none"
    wrote = f"wrote {counted(written.kinds)} ({written.bytes / 1e6:.1f} MB) in shards: {written.shards}"
    return f"make_shards: {wrote}, to {dst}; {rejected}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        sources: list[Source]
        sources = read_manifest(options.src, options.manifest) if options.manifest else find_sources(options.src)
        if options.seed is not None:
            order = torch.randperm(len(sources), generator=fold(options.seed, "shards"))
            sources = [sources[i] for i in order.tolist()]
        written = write_shards(
            options.dst,
            watched(take_in(sources, allow_empty=options.allow_empty_captions), len(sources)),
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"make_shards: error: {shown(str(error))}", file=sys.stderr)
        return 2
    print(summary(written, options.dst))
    return 1 if written.rejected and not options.allow_rejects else 0


if __name__ == "__main__":
    sys.exit(main())
