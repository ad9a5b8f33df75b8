"""Where the samples of shards come from: files of a folder with their captions, each decoded once and described."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cogvideo_dist.data.probing import Prober
from cogvideo_dist.data.shards import KINDS, caption_of
from cogvideo_dist.data.writing import Entry
from cogvideo_dist.protocols import Defect


class Source(NamedTuple):
    """A clip or image to put into shards: its ``name`` relative to the folder, and its caption or where that is.

    ``rival``: another file that claims the same caption.
    """

    name: str
    path: Path
    caption: Path | str
    rival: str | None = None


def find_sources(folder: str | Path) -> list[Source]:
    """Every file of ``videos/`` and ``images/``, with ``labels/<same name>.txt``, in the order of their names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sources = []
    for branch in ("videos", "images"):
        for path in (folder / branch).rglob("*"):
            inner = path.relative_to(folder / branch)
            if path.is_file() and not any(part.startswith(".") for part in inner.parts):
                caption = folder / "labels" / inner.parent / f"{inner.stem}.txt"
                sources.append(Source(_name(Path(branch) / inner), path, caption))
    if not sources:
        raise ValueError(f"{folder}: no files in {folder / 'videos'} or {folder / 'images'}; or pass a manifest")
    claims: dict[Path | str, list[str]] = {}
    for source in sources:
        claims.setdefault(source.caption, []).append(source.name)
    return sorted(
        source._replace(rival=next((name for name in claims[source.caption] if name != source.name), None))
        for source in sources
    )


def read_manifest(folder: str | Path, manifest: str | Path) -> list[Source]:
    """The rows (path, caption), relative to ``folder``, of a CSV file with a header or of a JSON Lines file."""
    folder, manifest = Path(folder), Path(manifest)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if manifest.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{manifest}: a manifest's name must end in .csv or .jsonl")
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{manifest}: cannot be read as UTF-8 text ({error})") from None
    sources = []
    for line, row in (_csv_rows if manifest.suffix == ".csv" else _jsonl_rows)(text, manifest):
        path, caption = (row.get(name) if isinstance(row, dict) else None for name in ("path", "caption"))
        if not isinstance(path, str) or not isinstance(caption, str) or not path:
            raise ValueError(f"{manifest}:{line}: expected path and caption, both text")
        sources.append(Source(_name(Path(path)), folder / path, caption))
    if not sources:
        raise ValueError(f"{manifest}: lists no files")
    return sources


def _csv_rows(text: str, manifest: Path) -> Iterator[tuple[int, Any]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{manifest}:{rows.line_num}: not valid CSV ({error})") from None


def _jsonl_rows(text: str, manifest: Path) -> Iterator[tuple[int, Any]]:
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except json.JSONDecodeError as error:
                raise ValueError(f"{manifest}:{line}: not valid JSON ({error.msg})") from None


def _name(path: Path) -> str:
    """A path as text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def take_in(sources: Iterable[Source], *, allow_empty: bool = False) -> Iterator[Entry]:
    """Read, decode and describe every source, in order; one that cannot be used becomes a ``Defect``.

    ``allow_empty``: a caption may be empty or missing.
    """
    prober = Prober(decode=True)
    try:
        for number, source in enumerate(sources):
            key = f"{number:08d}"
            try:
                yield key, *_examine(source, prober, allow_empty=allow_empty)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                yield Defect(key, source.name, " ".join(reason.split()))
    finally:
        prober.close()


def _examine(source: Source, prober: Prober, *, allow_empty: bool) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(members, facts) of a source; raises ``ValueError`` or ``OSError`` with the reason why it cannot be used."""
    extension = source.path.suffix[1:].lower()
    kind = KINDS.get(extension)
    if kind is None:
        raise ValueError(f"not one of {', '.join(KINDS)}")
    if ".." in Path(source.name).parts or Path(source.name).is_absolute():
        raise ValueError("its path leads out of the folder")
    data = source.path.read_bytes()
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    if isinstance(source.caption, str):
        text = source.caption.encode()
    elif source.rival is not None:
        raise ValueError(
            f"its caption {source.caption.name} is also that of {source.rival}; rename one, or use a manifest"
        )
    elif source.caption.is_file():
        text = source.caption.read_bytes()
    elif allow_empty:
        text = b""
    else:
        raise ValueError(f"no caption: {source.caption} does not exist")
    caption = caption_of(text, allow_empty=allow_empty)
    found = prober.probe(data, kind=kind)
    facts = {"source": source.name, "kind": kind, **found._asdict(), "caption_length": len(caption)}
    return {extension: data, "txt": text}, facts
