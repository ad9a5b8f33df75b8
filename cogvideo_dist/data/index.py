"""The index of a set of shards: one row per sample, in columns that are mapped into memory and shared by all processes.

``index.arrow`` holds the rows (an uncompressed Arrow file that other tools read too), ``index.json`` where the shards are
and the checksum of the former. A row takes about 200 bytes, and nothing of it is read before it is asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from cogvideo_dist.config.schema import Size

Kind = Literal["video", "image", "latent"]
KIND_NAMES: tuple[Kind, ...] = get_args(Kind)

INDEX, ABOUT, REJECTED = "index.arrow", "index.json", "rejected.jsonl"
FORMAT = 1
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,254}")
SHARD = re.compile(r"[A-Za-z0-9][^\x00-\x1f\x7f]{0,1000}\.tar")
CHECKSUM = re.compile(r"[0-9a-f]{32}")
CHUNK = 2**24


class Member(NamedTuple):
    """Where a member's bytes lie in its shard, and their XXH3 checksum of 128 bits in hex."""

    offset: int
    size: int
    checksum: str


def checksum(data: bytes | memoryview) -> str:
    """XXH3, 128 bits, in hex: finds every accident at the speed of memory, and is no defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """Of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Record:
    """One sample of the index.

    ``frames``, ``fps``, ``height``, ``width``: the clip as decoded and displayed; an image has one frame and fps 0.
    ``caption_length`` in characters; ``caption`` is the member that holds it, ``json:text`` the field ``text`` of member
    ``json``. ``rotation``: degrees counterclockwise that the container asks for (already applied in height and width). A
    latent sample has the ``size`` in pixels that it stands for and its ``origin`` (what encoded it). ``scores``: numbers by
    which a part of the samples can be chosen.
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
    caption: str = "txt"
    scores: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key) or ".." in self.key or "." in self.key.rpartition("/")[2]:
            raise ValueError(
                f"key {self.key!r} must be 1 to 255 letters, digits, -, _ or /, with dots in folders' names alone, and no two"
            )
        check_shard(self.shard)
        if self.kind not in KIND_NAMES:
            raise ValueError(f"kind {self.kind!r} must be one of {', '.join(KIND_NAMES)}")
        if min(self.frames, self.height, self.width) < 1 or self.caption_length < 0 or not 0 <= self.fps < 1e6:
            raise ValueError("frames, height and width must be at least 1, fps and caption_length at least 0")
        if self.kind == "video" and self.fps == 0:
            raise ValueError("a video's fps must be above 0")
        if (self.kind == "latent") != (self.size is not None):
            raise ValueError("a latent sample has a size, and no other does")
        if not self.members:
            raise ValueError("members must list at least one")
        for extension, member in self.members.items():
            if min(member.offset, member.size) < 0 or not CHECKSUM.fullmatch(member.checksum):
                raise ValueError(f"member {extension!r} must be [offset, size, checksum of 32 hex digits]")

    @property
    def duration(self) -> float:
        """Seconds; only a video has one."""
        return self.frames / self.fps


def check_shard(name: str) -> None:
    """Refuse a shard's name that is not a path of a .tar file below the set's root."""
    if not SHARD.fullmatch(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"shard {name!r} must be the path of a .tar file below the set's folder")


class Index(Sequence[Record]):
    """A set's samples, in the order written. ``folder`` holds the index; ``root`` (a path or a URL) the shards.

    ``column(name)``: numbers of all rows, not copied. ``digest`` tells one set of bytes from another.
    """

    def __init__(self, table: Any, *, folder: Path, root: str, digest: str) -> None:
        self.table, self.folder, self.root, self.digest = table, folder, root, digest
        self._arrays: dict[str, Any] = {}
        self._numbers: dict[str, NDArray[Any]] = {}

    @classmethod
    def read(cls, folder: str | Path) -> Index:
        """Of a folder of shards; ``ValueError`` names the file and what is wrong with it."""
        import pyarrow as pa

        folder = Path(folder)
        path, about = folder / INDEX, _read_about(folder / ABOUT)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; make it again with data_tools/index_shards.py")
        if file_checksum(path) != about["digest"]:
            raise ValueError(
                f"{path} is not what {ABOUT} beside it describes; make both again with data_tools/index_shards.py"
            )
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all().combine_chunks()
            table.validate(full=True)
            _check_schema(table.schema)
            index = cls(table, folder=folder, root=about.get("root") or str(folder), digest=about["digest"])
            index._check_columns()
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read as an index: {error}") from None
        if not len(index):
            raise ValueError(f"{path}: lists no samples")
        return index

    @classmethod
    def of(cls, records: Iterable[Record]) -> Index:
        """Of samples that lie in no folder."""
        columns = IndexWriter()
        for record in records:
            columns.add(record)
        return cls(columns.table(), folder=Path(), root="", digest="")

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._record(place % len(self))

    def __iter__(self) -> Iterator[Record]:
        return map(self._record, range(len(self)))

    def column(self, name: str) -> NDArray[Any]:
        """``frames``, ``fps``, ``height``, ``width``, ``caption_length``, ``kind`` (position in ``KIND_NAMES``), ``shard``
        (position in ``shards``)."""
        if name not in self._numbers:
            self._numbers[name] = self._array(name).to_numpy(zero_copy_only=True)
        return self._numbers[name]

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """[samples, 3] pixels that a latent stands for; zeros for what is no latent."""
        flat = self._array("size").flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, 3)

    @cached_property
    def shards(self) -> list[str]:
        """The shards' names, in the order of their numbers."""
        return json.loads(self.table.schema.metadata[b"shards"])

    @cached_property
    def common(self) -> dict[str, Any]:
        """What the origins of all samples say alike."""
        return json.loads(self.table.schema.metadata[b"origin"])

    def origin_numbers(self, name: str) -> NDArray[np.float64]:
        """A whole number in every sample's origin, NaN where it has none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if name in self.common:
            return np.full(len(self), float(self.common[name]))
        found = pc.extract_regex(self._array("origin"), f'"{re.escape(name)}": (?P<number>[0-9]+)')
        return pc.struct_field(found, "number").cast(pa.float64()).to_numpy(zero_copy_only=False)

    def scores(self, name: str) -> NDArray[np.float64]:
        """A score of every sample, NaN where it has none; ``ValueError`` if no sample has it."""
        column = f"score.{name}"
        if column not in self.table.column_names:
            known = [c.removeprefix("score.") for c in self.table.column_names if c.startswith("score.")]
            raise ValueError(f"{self.folder / INDEX} has no score {name!r}, only {', '.join(known) or 'none'}")
        return self._array(column).to_numpy(zero_copy_only=True)

    def ends(self) -> dict[str, int]:
        """How many bytes of every shard its members need."""
        offsets, _, _, starts, sizes, _ = self._members
        needed = np.zeros(len(self.shards), np.int64)
        of = np.repeat(self.column("shard"), np.diff(offsets))
        np.maximum.at(needed, of, starts + sizes)
        return dict(zip(self.shards, needed.tolist()))

    def key(self, place: int) -> str:
        return str(self._array("key")[place])

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            column = self.table.column(name)
            self._arrays[name] = column.chunk(0) if column.num_chunks else column.combine_chunks()
        return self._arrays[name]

    @cached_property
    def _members(self) -> tuple[NDArray[np.int32], list[str], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        members = self._array("members")
        inner = members.values
        names = json.loads(self.table.schema.metadata[b"extensions"])
        return (
            members.offsets.to_numpy(zero_copy_only=True),
            names,
            *(inner.field(name).to_numpy(zero_copy_only=True) for name in ("extension", "offset", "size")),
            np.frombuffer(inner.field("checksum").buffers()[1], np.uint8).reshape(-1, 16),
        )

    def _record(self, place: int) -> Record:
        offsets, names, extensions, starts, sizes, sums = self._members
        members = {
            names[extensions[i]]: Member(int(starts[i]), int(sizes[i]), sums[i].tobytes().hex())
            for i in range(offsets[place], offsets[place + 1])
        }
        size = tuple(int(v) for v in self.sizes[place])
        kind = KIND_NAMES[self.column("kind")[place]]
        scores = {
            name.removeprefix("score."): float(self.column(name)[place])
            for name in self.table.column_names
            if name.startswith("score.") and not np.isnan(self.column(name)[place])
        }
        return Record(
            key=str(self._array("key")[place]), source=str(self._array("source")[place]),
            shard=self.shards[self.column("shard")[place]], kind=kind, members=members,
            **{name: int(self.column(name)[place]) for name in ("frames", "height", "width", "caption_length", "rotation")},
            fps=float(self.column("fps")[place]), size=size if kind == "latent" else None,  # type: ignore[arg-type]
            caption=str(self._array("caption")[place]), scores=scores,
            origin={**self.common, **json.loads(str(self._array("origin")[place]))},
        )  # fmt: skip

    def _check_columns(self) -> None:
        """Refuse values that no sample can have; the first row that has one is named."""
        import pyarrow.compute as pc

        columns = {
            name: self.column(name) for name in ("frames", "height", "width", "caption_length", "fps", "kind", "shard")
        }
        _, names, extensions, starts, sizes, _ = self._members
        latent = columns["kind"] == KIND_NAMES.index("latent")
        for bad, wrong in (
            (
                np.minimum(columns["frames"], np.minimum(columns["height"], columns["width"])) < 1,
                "frames, height or width below 1",
            ),
            (
                (columns["caption_length"] < 0) | ~((columns["fps"] >= 0) & (columns["fps"] < 1e6)),
                "an impossible caption or fps",
            ),
            ((columns["kind"] < 0) | (columns["kind"] >= len(KIND_NAMES)), "an unknown kind"),
            ((columns["shard"] < 0) | (columns["shard"] >= len(self.shards)), "an unknown shard"),
            (
                (columns["kind"] == KIND_NAMES.index("video")) & (columns["fps"] == 0),
                "a video without frames per second",
            ),
            (latent != (self.sizes.min(1) > 0), "a size that only a latent has"),
            (
                ~np.asarray(pc.match_substring_regex(self._array("key"), f"^{KEY.pattern}$")),
                "a key of other characters",
            ),
        ):
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(f"row {row} ({self.key(row)!r}): {wrong}")
        if ((starts < 0) | (sizes < 0) | (extensions < 0) | (extensions >= len(names))).any():
            raise ValueError("a member with an impossible place")
        for name in self.shards:
            check_shard(name)
        if pc.count_distinct(self._array("key")).as_py() < len(self):
            counts = self._array("key").value_counts()
            twice = next(str(item["values"]) for item in counts if item["counts"].as_py() > 1)
            raise ValueError(f"key {twice!r} is listed twice")


def _read_about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; a folder of shards is made by data_tools/make_shards.py, and data_tools/index_shards.py "
            "makes the index of shards from elsewhere"
        )
    try:
        about = json.loads(path.read_bytes())
        version, digest = about["format"], about["digest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version of cogvideo_dist reads format {FORMAT}")
    if not isinstance(digest, str) or not CHECKSUM.fullmatch(digest) or not isinstance(about.get("root", ""), str):
        raise ValueError(f"{path}: digest and root must be text, the first of 32 hex digits")
    return about


def _check_schema(schema: Any) -> None:
    """Refuse a table that lacks a column, or has one of another type than ``IndexWriter`` gives it."""
    for expected in IndexWriter().table().schema:
        if schema.get_field_index(expected.name) < 0 or schema.field(expected.name) != expected:
            raise ValueError(f"column {expected.name!r} is missing, twice there, or not {expected.type}")
    for name in ("shards", "extensions"):
        names = json.loads((schema.metadata or {})[name.encode()])
        if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
            raise ValueError(f"its {name} are no list of names")
    if not isinstance(json.loads(schema.metadata[b"origin"]), dict):
        raise ValueError("its origin is no object")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class IndexWriter:
    """An index in the making, in memory."""

    def __init__(self) -> None:
        self.key: list[str] = []
        self.plain: dict[str, list[Any]] = {name: [] for name in ("source", "caption", *_NUMBERS)}
        self.origins, self.common = list[Mapping[str, Any]](), dict[str, Any]()
        self.size: list[int] = []
        self.ends, self.members = (
            [0],
            dict[str, list[Any]]({name: [] for name in ("extension", "offset", "size", "checksum")}),
        )
        self.shards, self.extensions = dict[str, int](), dict[str, int]()
        self.scores: dict[str, dict[int, float]] = {}

    def add(self, record: Record) -> None:
        row = len(self.key)
        self.key.append(record.key)
        values = {
            **{name: getattr(record, name) for name in _NUMBERS}, "source": record.source, "caption": record.caption,
            "kind": KIND_NAMES.index(record.kind), "shard": self.shards.setdefault(record.shard, len(self.shards)),
        }  # fmt: skip
        self.origins.append(record.origin)
        self.common = dict(record.origin) if not row else {
            name: value for name, value in self.common.items() if record.origin.get(name, _NOTHING) == value
        }  # fmt: skip
        for name, value in values.items():
            self.plain[name].append(value)
        self.size += record.size or (0, 0, 0)
        for extension, member in record.members.items():
            number = self.extensions.setdefault(extension, len(self.extensions))
            for name, value in zip(self.members, (number, member.offset, member.size, bytes.fromhex(member.checksum))):
                self.members[name].append(value)
        self.ends.append(len(self.members["offset"]))
        for name, score in record.scores.items():
            self.scores.setdefault(name, {})[row] = score

    def __len__(self) -> int:
        return len(self.key)

    def write(self, folder: Path, *, root: str | None = None) -> None:
        """Write the index to ``folder`` and sync it: the same bytes for the same records. ``root``: where the shards
        are, if not there."""
        self.write_files(folder / INDEX, folder / ABOUT, root=root)

    def write_files(self, index: Path, about: Path, *, root: str | None = None) -> None:
        """As ``write``, under other names."""
        import pyarrow as pa

        table = self.table()
        with index.open("wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            _sync(file)
        facts = {"format": FORMAT, "samples": len(self.key), "digest": file_checksum(index)}
        with about.open("wb") as file:
            file.write(json.dumps({**facts, **({"root": root} if root else {})}, indent=1).encode() + b"\n")
            _sync(file)

    def table(self) -> Any:
        """The rows as an Arrow table."""
        import pyarrow as pa

        text = {name: pa.array(self.plain[name], pa.large_string()) for name in ("source", "caption")}
        own = ({name: value for name, value in origin.items() if name not in self.common} for origin in self.origins)
        text["origin"] = pa.array([_json(origin) for origin in own], pa.large_string())
        numbers = {name: pa.array(self.plain[name], getattr(pa, kind)()) for name, kind in _NUMBERS.items()}
        members = pa.StructArray.from_arrays(
            [
                pa.array(self.members["extension"], pa.int16()), pa.array(self.members["offset"], pa.int64()),
                pa.array(self.members["size"], pa.int64()), pa.array(self.members["checksum"], pa.binary(16)),
            ],
            names=list(self.members),
        )  # fmt: skip
        columns = {
            "key": pa.array(self.key, pa.large_string()), **text, **numbers,
            "size": pa.FixedSizeListArray.from_arrays(pa.array(self.size, pa.int32()), 3),
            "members": pa.ListArray.from_arrays(pa.array(self.ends, pa.int32()), members),
        }  # fmt: skip
        for name, scores in sorted(self.scores.items()):
            values = np.full(len(self.key), np.nan)
            values[list(scores)] = list(scores.values())
            columns[f"score.{name}"] = pa.array(values)
        about: dict[str, Any] = {"shards": list(self.shards), "extensions": list(self.extensions), "kinds": KIND_NAMES}
        about["origin"] = self.common
        table = pa.table(columns)
        return table.replace_schema_metadata({name: json.dumps(value) for name, value in about.items()})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


_NOTHING = object()

_NUMBERS = {
    "shard": "int32", "kind": "int8", "frames": "int32", "fps": "float64", "height": "int32", "width": "int32",
    "caption_length": "int32", "rotation": "int16",
}  # fmt: skip
