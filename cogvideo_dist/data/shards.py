"""WebDataset shards with a sidecar index: plain tar files that anyone can stream, and random access with checksums.

A folder holds ``shard-000000.tar`` ..., ``index.jsonl`` (one JSON object per sample, see ``Record``) and
``rejected.jsonl`` (one per sample that could not be used). A sample's members lie side by side in one shard:
``<key>.mp4``, ``<key>.txt``, ``<key>.json``. Keys are plain; the file's own name is in ``source``.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError, with_config

from cogvideo_dist.config.schema import Size
from cogvideo_dist.data.decode import DecodeError, probe, probe_image
from cogvideo_dist.protocols import Defect

Kind = Literal["video", "image", "latent"]
Entry = tuple[str, Mapping[str, bytes], Mapping[str, Any]] | Defect
"""What is written: (key, members by extension, the record's other fields); or a sample that could not be used."""

INDEX, REJECTED = "index.jsonl", "rejected.jsonl"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.]{0,31}")
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.tar")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_CAPTION = 16 * 1024
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("mp4", "webm", "mov", "mkv"), "video"),
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), "image"),
}
"""What a file is, by its extension."""


class DataError(ValueError):
    """A sample that cannot be used, now or ever: its bytes are at fault, not the machine that reads them."""

    def __init__(self, key: str, source: str, reason: str) -> None:
        super().__init__(key, source, reason)
        self.key, self.source, self.reason = key, source, reason

    def __str__(self) -> str:
        return f"sample {self.key} ({shown(self.source)}): {self.reason}"


class Member(NamedTuple):
    """Where a member's bytes lie in its shard, and their SHA-256."""

    offset: int
    size: int
    sha256: str


@with_config(extra="forbid", allow_inf_nan=False)
@dataclass(frozen=True)
class Record:
    """One sample of the index.

    ``frames``, ``fps``, ``height``, ``width``: the clip as decoded and displayed; an image has one frame and fps 0.
    ``caption_length`` in characters. ``rotation``: degrees counterclockwise that the container asks for (already
    applied in height and width). A latent sample has the ``size`` in pixels that it stands for and its ``origin`` (what
    encoded it).
    """

    key: str
    source: str
    shard: str
    kind: Kind
    members: Mapping[str, Member]
    frames: int
    fps: float
    height: int
    width: int
    caption_length: int
    rotation: int = 0
    size: Size | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key):
            raise ValueError(f"key {self.key!r} must be 1 to 64 letters, digits, - or _")
        if not SHARD.fullmatch(self.shard):
            raise ValueError(f"shard {self.shard!r} must be the plain name of a .tar file")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r} must be one of {', '.join(get_args(Kind))}")
        if min(self.frames, self.height, self.width) < 1 or self.caption_length < 0 or self.fps < 0:
            raise ValueError("frames, height and width must be at least 1, fps and caption_length at least 0")
        if self.kind == "video" and self.fps == 0:
            raise ValueError("a video's fps must be above 0")
        if (self.kind == "latent") != (self.size is not None):
            raise ValueError("a latent sample has a size, and no other does")
        if not self.members:
            raise ValueError("members must list at least one")
        for extension, member in self.members.items():
            if min(member.offset, member.size) < 0 or not DIGEST.fullmatch(member.sha256):
                raise ValueError(f"member {extension!r} must be [offset, size, SHA-256 in hex]")

    @property
    def duration(self) -> float:
        """Seconds; only a video has one."""
        return self.frames / self.fps


def shown(name: str) -> str:
    """A file's name as one line: characters that are not printable are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def caption_of(data: bytes) -> str:
    """A caption file's text, stripped; raises ``DecodeError`` if it is no caption."""
    if len(data) > MAX_CAPTION:
        raise DecodeError(f"the caption has {len(data)} bytes, more than {MAX_CAPTION}")
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DecodeError(f"the caption is not UTF-8 (byte {error.start})") from None
    if not caption:
        raise DecodeError("the caption is empty")
    return caption


def read_index(folder: str | Path) -> list[Record]:
    """The samples of a folder of shards, in the order written; ``ValueError`` names the file and line that is wrong."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a folder of shards is made by data_tools/make_shards.py")
    reader = TypeAdapter(Record)
    records: list[Record] = []
    keys: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = reader.validate_json(line, strict=True)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                place = ".".join(str(part) for part in problem["loc"])
                raise ValueError(f"{path}:{number}: {place + ': ' if place else ''}{problem['msg']}") from None
            if record.key in keys:
                raise ValueError(f"{path}:{number}: key {record.key} is listed twice")
            keys.add(record.key)
            records.append(record)
    if not records:
        raise ValueError(f"{path}: lists no samples")
    return records


class ShardReader:
    """Random access to the samples of ``folder``; ``records`` is its index.

    Opens a shard for every read and keeps nothing, so it may be forked, pickled and shared. Raises ``ValueError`` at
    once if a shard is missing or shorter than its index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.records = read_index(folder)
        ends: dict[str, int] = {}
        for record in self.records:
            ends[record.shard] = max(ends.get(record.shard, 0), *(m.offset + m.size for m in record.members.values()))
        for shard, end in ends.items():
            path = self.folder / shard
            if not path.is_file():
                raise ValueError(f"{path}: no such shard, but {self.folder / INDEX} lists it")
            if path.stat().st_size < end:
                found = path.stat().st_size
                raise ValueError(f"{path}: has {found} bytes, its index needs {end}; copy the shard again")

    def read(self, record: Record, extension: str) -> bytes:
        """One member's bytes, checked; raises ``DataError`` if they are not the bytes that were written."""
        member = record.members.get(extension)
        if member is None:
            raise DataError(record.key, record.source, f"has no member {extension!r}, only {', '.join(record.members)}")
        with (self.folder / record.shard).open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
            raise DataError(
                record.key,
                record.source,
                f"{record.shard}: the {member.size} bytes of {record.key}.{extension} at {member.offset} are damaged "
                "(their SHA-256 is not the index's)",
            )
        return data


@dataclass
class Written:
    """What ``write_shards`` wrote: samples by kind, shards, bytes of members; and how many samples were rejected."""

    kinds: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    rejected: int = 0

    @property
    def samples(self) -> int:
        return sum(self.kinds.values())


def write_shards(
    folder: str | Path, entries: Iterable[Entry], *, max_shard_size: int = 10**9, overwrite: bool = False
) -> Written:
    """Write ``entries`` as shards of about ``max_shard_size`` bytes with their index; all or nothing.

    The same entries give the same bytes. Members ``json`` (the record's facts) are added here. ``folder`` must not
    exist, or be a folder of shards and ``overwrite`` be set; it appears when complete. Raises ``ValueError`` if there
    is no sample.
    """
    with _fresh(Path(folder), overwrite=overwrite) as temporary, ExitStack() as files:
        writer = _Writer(temporary, max_shard_size, files)
        files.callback(writer.close)
        for entry in entries:
            if isinstance(entry, Defect):
                writer.reject(entry)
            else:
                writer.add(*entry)
        if not writer.written.samples:
            raise ValueError(f"no sample to write ({writer.written.rejected} rejected); {folder} is left as it was")
        writer.finish()
    return writer.written


class _Writer:
    """The files of a folder in the making."""

    def __init__(self, folder: Path, max_shard_size: int, files: ExitStack) -> None:
        self.folder, self.max_shard_size, self.written = folder, max_shard_size, Written()
        self.index, self.rejected = (files.enter_context((folder / name).open("xb")) for name in (INDEX, REJECTED))
        self.keys: set[str] = set()
        self.shard: _Shard | None = None

    def reject(self, defect: Defect) -> None:
        self.written.rejected += 1
        self.rejected.write(_line({"key": defect.key, "source": defect.source, "reason": defect.reason}))

    def add(self, key: str, members: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        if key in self.keys:
            raise ValueError(f"key {key!r} is given twice")
        self.keys.add(key)
        members = {**members, "json": _line({"key": key, **facts})}
        size = sum(map(len, members.values()))
        if self.shard is not None and self.shard.bytes + size > self.max_shard_size:
            self.shard.finish(self.index)
            self.shard = None
        if self.shard is None:
            self.shard = _Shard(self.folder / f"shard-{self.written.shards:06d}.tar")
            self.written.shards += 1
        self.shard.add(key, members, facts)
        self.written.kinds[facts["kind"]] = self.written.kinds.get(facts["kind"], 0) + 1
        self.written.bytes += size

    def finish(self) -> None:
        if self.shard is not None:
            self.shard.finish(self.index)
        for file in (self.index, self.rejected):
            _sync(file)

    def close(self) -> None:
        if self.shard is not None:
            self.shard.close()


class _Shard:
    """One tar file in the making."""

    def __init__(self, path: Path) -> None:
        from webdataset import TarWriter  # reading needs no webdataset

        self.path, self.bytes = path, 0
        self.file = path.open("xb")
        self.tar = TarWriter(self.file, user="", group="", compress=False, encoder=False, mtime=0)
        self.waiting: list[tuple[str, dict[str, str], Mapping[str, Any]]] = []

    def add(self, key: str, members: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        for extension in members:
            if not EXTENSION.fullmatch(extension):
                raise ValueError(f"sample {key}: {extension!r} is not an extension of lower-case letters and digits")
        self.tar.write({"__key__": key, **members})
        self.bytes += sum(map(len, members.values()))
        digests = {extension: hashlib.sha256(members[extension]).hexdigest() for extension in sorted(members)}
        self.waiting.append((key, digests, facts))

    def finish(self, index: BinaryIO) -> None:
        """Complete the tar and append its samples to the index; offsets are read back from the file itself."""
        self.tar.close()
        _sync(self.file)
        self.close()
        with tarfile.open(self.path, "r:") as tar:
            places = {info.name: (info.offset_data, info.size) for info in tar}
        for key, digests, facts in self.waiting:
            members = {ext: Member(*places[f"{key}.{ext}"], digest) for ext, digest in digests.items()}
            record = Record(key=key, shard=self.path.name, members=members, **facts)
            values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
            index.write(_line({name: value for name, value in values.items() if value is not None and value != {}}))

    def close(self) -> None:
        self.tar.close()
        self.file.close()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextmanager
def _fresh(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` if the block succeeds, and vanishes if it does not."""
    folder = folder.resolve()
    if folder.exists():
        if not overwrite:
            raise ValueError(f"{folder} already exists; choose another folder, or overwrite it (--overwrite)")
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} is not a folder of shards (it has no {INDEX}), so it is not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    temporary, old = (folder.with_name(f".{folder.name}.{role}-{mark}") for role in ("partial", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _sync_folder(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _sync_folder(folder.parent)
        if old.exists():
            shutil.rmtree(old)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def take_in(sources: Iterable[Source]) -> Iterator[Entry]:
    """Read, decode and describe every source, in order; one that cannot be used becomes a ``Defect``."""
    for number, source in enumerate(sources):
        key = f"{number:08d}"
        try:
            yield key, *_examine(source)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            yield Defect(key, source.name, " ".join(reason.split()))


def _examine(source: Source) -> tuple[dict[str, bytes], dict[str, Any]]:
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
    else:
        raise ValueError(f"no caption: {source.caption} does not exist")
    caption = caption_of(text)
    found = probe(data) if kind == "video" else probe_image(data)
    facts = {"source": source.name, "kind": kind, **found._asdict(), "caption_length": len(caption)}
    return {extension: data, "txt": text}, facts
