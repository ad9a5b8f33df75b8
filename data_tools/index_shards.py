"""Make the index of WebDataset shards that are there already; see --help."""

from __future__ import annotations

import argparse
import re
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from cogvideo_dist.data.checking import ShardFiles, check_set
from cogvideo_dist.data.index import ABOUT, INDEX, REJECTED, Index, IndexWriter, Kind
from cogvideo_dist.data.indexing import Layout, Rejected, Scan, index_shards, settle
from cogvideo_dist.data.shards import KINDS, shown
from cogvideo_dist.data.storage import is_remote
from cogvideo_dist.data.writing import json_line, sync, sync_folder
from data_tools.command import Parser, counted

DESCRIPTION = """\
Make the index of WebDataset shards that are there already: plain .tar files in a folder or behind a URL.

Every shard is read once. A sample is one video or image (mp4, webm, mov, mkv; png, jpg, jpeg, webp) and a caption, or what
launch/encode.py wrote. Members of other extensions are passed over, and none is ever unpacked or executed. What cannot be used
is named with the reason.
"""

EXAMPLES = """\
examples:
  python data_tools/index_shards.py shards/train --workers 8
  python data_tools/index_shards.py shards/laion --caption json:caption --score aesthetic=json:aesthetic_score
  python data_tools/index_shards.py s3://bucket/shards --out indexes/bucket
  python data_tools/index_shards.py shards/train --check

A field is one of the object in the member <key>.json.

exit code: 0 all indexed, or nothing damaged; 1 indexed, but some samples were rejected (each has its line in
rejected.jsonl), or --check found damage (each has its line on stdout); 2 nothing written.
"""

SHOWN = 20
"""Rejected samples that are shown on stderr."""

FIELD = re.compile(r"json:(.+)")
SCORE = re.compile(r"([A-Za-z0-9_.-]+)=json:(.+)")
EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def caption_place(text: str) -> str:
    if text != "txt" and not FIELD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither txt nor json:FIELD")
    return text


def score_place(text: str) -> tuple[str, str]:
    """aesthetic=json:score -> (aesthetic, score)."""
    match = SCORE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=json:FIELD with a name of letters, digits, -, _ and .")
    return match[1], match[2]


def extension(text: str) -> str:
    if not EXTENSION.fullmatch(text.lower().removeprefix(".")):
        raise argparse.ArgumentTypeError(f"{text!r} is not an extension such as mp4 or clip.mp4")
    return text.lower().removeprefix(".")


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def parser() -> Parser:
    options = Parser("index_shards", description=DESCRIPTION, epilog=EXAMPLES)
    add = options.add_argument
    add("shards", metavar="SHARDS", help="folder or URL of .tar files")
    add("--out", metavar="FOLDER", help="where the index goes; left out, beside the shards")
    for kind in ("video", "image"):
        add(
            f"--{kind}", nargs="+", type=extension, default=[], metavar="EXT", help=f"other extensions that are {kind}s"
        )
    add("--caption", type=caption_place, metavar="PLACE", help="txt (the default) or json:FIELD")
    add(
        "--score",
        nargs="+",
        type=score_place,
        default=[],
        metavar="NAME=json:FIELD",
        help="numbers to choose samples by",
    )
    add("--allow-empty-captions", action="store_true", help="take samples whose caption is empty or missing")
    add("--decode", action="store_true", help="decode all of every clip and image, not only its beginning")
    add("--check", action="store_true", help="read what is indexed once more and compare the checksums")
    add("--overwrite", action="store_true", help="replace an index, and its list of what was rejected")
    add("--workers", type=at_least_one, default=1, metavar="N", help="shards read at once, default %(default)s")
    add("--allow-rejects", action="store_true", help="exit with 0 although samples were rejected")
    return options


def layout_of(options: argparse.Namespace) -> Layout:
    kinds: dict[str, Kind] = {**KINDS, **dict.fromkeys(options.video, "video"), **dict.fromkeys(options.image, "image")}
    wrong = sorted({*options.video} & {*options.image} | {"txt", "json"} & {*options.video, *options.image})
    if wrong:
        raise ValueError(f"extension {wrong[0]} cannot be a video or image and something else at once")
    scores = dict(options.score)
    if len(scores) < len(options.score):
        raise ValueError("--score gives one name twice")
    return Layout(kinds, options.caption, scores, options.allow_empty_captions, options.decode)


class Progress:
    """A bar over the bytes of all shards."""

    def __init__(self, total: int) -> None:
        self.bar, self.lock = tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr), Lock()

    def seen(self, count: int) -> None:
        with self.lock:
            self.bar.update(count)


def make_index(options: argparse.Namespace) -> int:
    """Index the shards; the exit code."""
    if is_remote(options.shards) and options.out is None:
        raise ValueError(f"{options.shards} is not on this machine; say with --out where its index is to go")
    out = Path(options.out or options.shards)
    if (out / INDEX).exists() and not options.overwrite:
        raise ValueError(f"{out} has an index already; --check it, or replace it (--overwrite)")
    layout, files = layout_of(options), ShardFiles(options.shards)
    progress = Progress(sum(map(files.store.size, files.names)))
    scans = list(
        index_shards(
            files.names,
            lambda shard: files.pieces(shard, progress.seen),
            again=files.again, layout=layout, workers=options.workers,
        )
    )  # fmt: skip
    progress.bar.close()
    records, rejected = IndexWriter(), list[Rejected]()
    kinds, codes, size = Counter[str](), Counter[str](), 0
    for name in files.packed:
        reason = f"{shown(name)}: a packed archive; unpack it to plain .tar files"
        rejected.append(Rejected("", shown(name), reason, "damaged shard"))
    for sample in settle(files.names, scans):
        if isinstance(sample, Rejected):
            rejected.append(sample)
        else:
            records.add(sample)
            kinds[sample.kind] += 1
            size += sum(member.size for member in sample.members.values())
    tell_rejected(rejected)
    codes.update(item.code for item in rejected)
    if not len(records):
        first = f"; the first: {rejected[0].reason}" if rejected else ""
        raise ValueError(f"no sample to index ({len(rejected)} rejected{first})")
    write(out, records, rejected=rejected, root=root_of(options.shards, out))
    why = ", ".join(f"{count} {code}" for code, count in codes.most_common())
    print(
        f"index_shards: indexed {counted(kinds)} ({size / 1e6:.1f} MB) of shards: {len(files.names)}, to {out}; "
        + (f"rejected {len(rejected)} ({why}), listed in {out / REJECTED}" if rejected else "rejected none")
        + passed_over(scans)
    )
    return 1 if rejected and not options.allow_rejects else 0


def tell_rejected(rejected: Sequence[Rejected]) -> None:
    for item in rejected[:SHOWN]:
        print(f"index_shards: rejected {item.source}: {shown(item.reason)}", file=sys.stderr)
    if len(rejected) > SHOWN:
        print(f"index_shards: and {len(rejected) - SHOWN} more rejected", file=sys.stderr)


def passed_over(scans: Sequence[Scan]) -> str:
    """The extensions of members that were not looked into, each once."""
    ignored = sum((scan.ignored for scan in scans), Counter[str]())
    if not ignored:
        return ""
    names = ", ".join(f"{count} .{name}" for name, count in ignored.most_common(SHOWN))
    return f"; passed over {names}" + (" and others" if len(ignored) > SHOWN else "")


def root_of(shards: str, out: Path) -> str | None:
    """What the index says of where the shards are, if they are not beside it."""
    if is_remote(shards):
        return shards
    folder = Path(shards).resolve()
    return None if folder == out.resolve() else str(folder)


def write(out: Path, records: IndexWriter, *, rejected: Sequence[Rejected], root: str | None) -> None:
    """Write the index aside, then put its files in their place, the index itself last."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        aside = {name: out / f".{name}.{secrets.token_hex(8)}" for name in (REJECTED, ABOUT, INDEX)}
        for path in aside.values():
            files.callback(path.unlink, missing_ok=True)
        with aside[REJECTED].open("xb") as file:
            for item in rejected:
                file.write(json_line(item._asdict()))
            sync(file)
        records.write_files(aside[INDEX], aside[ABOUT], root=root)
        for name, path in aside.items():
            path.rename(out / name)
        sync_folder(out)


def check(options: argparse.Namespace) -> int:
    """Compare what is indexed with its checksums; the exit code."""
    index = Index.read(options.out or options.shards)
    files = ShardFiles(options.shards)
    progress = Progress(sum(files.store.size(shard) for shard in index.shards if shard in set(files.names)))
    damages = 0
    for line in check_set(index, files, workers=options.workers, seen=progress.seen):
        damages += 1
        tqdm.write(f"index_shards: {line}", file=sys.stdout)
    progress.bar.close()
    print(f"index_shards: checked {len(index)} samples of shards: {len(index.shards)}; damages: {damages}")
    return 1 if damages else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return check(options) if options.check else make_index(options)
    except (ValueError, OSError) as error:
        print(f"index_shards: error: {shown(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
