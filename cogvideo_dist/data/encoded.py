"""What an encoded shard set consists of: clips, what each is made into, and under which address that is kept.

An item (a clip's latents, a caption's features, or the reason why there are none) has as its address the SHA-256 of all that
its bytes depend on. So whoever made it, whenever, under whatever configuration: the same address holds the same bytes, and
what has its address already is never made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data.index import INDEX, REJECTED, Index, Record
from cogvideo_dist.data.shards import DataError, read_member
from cogvideo_dist.data.storage import Store
from cogvideo_dist.data.writing import json_line, shard_name

ADDRESSES = "addresses"
"""Where a record's origin and a line of ``rejected.jsonl`` keep the addresses by role."""


class Role(NamedTuple):
    """A thing that every clip is made into: its members in the shard, and what it adds to the record's origin."""

    name: str
    members: tuple[str, ...]
    facts: tuple[str, ...] = ()


class Item(NamedTuple):
    """A role's members and facts, or the ``reason`` why the clip cannot be used.

    ``lasting``: the reason lies in the bytes that the address names; else in the storage, and may be gone when asked again.
    """

    members: Mapping[str, bytes] = {}
    facts: Mapping[str, Any] = {}
    reason: str | None = None
    lasting: bool = True


@dataclass(frozen=True)
class Clip:
    """A clip of the set: the fields of its record but for shard and members, and the addresses by role, in the roles' order.

    ``refusal``: why it cannot be used, where that is known without its bytes.
    """

    key: str
    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    refusal: str | None = None


@dataclass(frozen=True)
class SetPlan:
    """All that decides the bytes of a set: shard k holds those of clips k * ``per_shard`` and following that can be used."""

    clips: Sequence[Clip]
    roles: tuple[Role, ...]
    per_shard: int

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise ValueError(f"a shard must hold at least 1 clip, found {self.per_shard}")

    @property
    def shards(self) -> int:
        return -(-len(self.clips) // self.per_shard)

    def clips_of(self, shard: int) -> range:
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, len(self.clips)))

    def shard_of(self, clip: int) -> int:
        return clip // self.per_shard

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan."""
        digest = hashlib.sha256(json_line({"per_shard": self.per_shard, "roles": self.roles}))
        for clip in self.clips:
            digest.update(json_line(vars(clip)))
        return digest.hexdigest()

    @cached_property
    def users(self) -> dict[str, list[int]]:
        """The clips of every address that several have."""
        first, users = dict[str, int](), dict[str, list[int]]()
        for number, clip in enumerate(self.clips):
            for address in clip.addresses.values():
                if first.setdefault(address, number) != number:
                    users.setdefault(address, [first[address]]).append(number)
        return users

    def shards_of(self, address: str, clip: int) -> set[int]:
        """Where the item at ``address`` goes, which is one of ``clip``'s."""
        return {self.shard_of(user) for user in self.users.get(address, [clip])}


def address_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of canonical JSON."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def pack(item: Item, address: str) -> bytes:
    """An object's bytes: their checksum, a line that describes them, and the members one after the other."""
    sizes = {name: len(data) for name, data in item.members.items()}
    about = {
        "address": address, "facts": item.facts, "sizes": sizes, "reason": item.reason, "lasting": item.lasting,
    }  # fmt: skip
    body = b"".join([json_line(about), *item.members.values()])
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack(data: bytes, address: str) -> Item | None:
    """What ``pack`` was given; nothing if a byte is not as it was or the object is another address's."""
    checksum, _, body = data.partition(b"\n")
    if checksum.decode("latin-1") != hashlib.sha256(body).hexdigest():
        return None
    line, _, rest = body.partition(b"\n")
    about = json.loads(line)
    if about["address"] != address:
        return None
    members, start = {}, 0
    for name, size in about["sizes"].items():
        members[name] = rest[start : start + size]
        start += size
    return Item(members, about["facts"], about["reason"], about["lasting"])


@dataclass(frozen=True)
class EncodedSet:
    """A finished set as its index tells."""

    folder: Path
    records: Sequence[Record]
    rejected: Sequence[Mapping[str, Any]]


def read_set(folder: Path) -> EncodedSet | None:
    """The encoded set of a folder, nothing if there is no such folder; ``ValueError`` if it is something else.

    Another worker may put a new set in its place at any time: what is read is the one or the other.
    """
    while True:
        before = identity(folder)
        if before is None:
            return None
        try:
            found = _read_set(folder)
        except (ValueError, OSError):
            if identity(folder) == before:
                raise
        else:
            if identity(folder) == before:
                return found


def identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that takes its place."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _read_set(folder: Path) -> EncodedSet:
    refusal = f"{folder} already exists and is no set of encoded clips that could be brought up to date"
    if not (folder / INDEX).is_file():
        raise ValueError(f"{refusal} (it has no {INDEX}); choose another folder")
    records = Index.read(folder)
    strange = next((record for record in records if ADDRESSES not in record.origin), None)
    if strange is not None:
        raise ValueError(f"{refusal} (sample {strange.key} has no addresses in its origin); choose another folder")
    lines = (folder / REJECTED).read_text(encoding="utf-8").splitlines() if (folder / REJECTED).exists() else []
    return EncodedSet(folder, records, [json.loads(line) for line in lines])


def parse_lines(folder: Path, lines: Iterable[bytes]) -> EncodedSet:
    """Lines of an index, and of those that were rejected, as a set."""
    reader, records, rejected = TypeAdapter(Record), list[Record](), list[dict[str, Any]]()
    for line in lines:
        about = json.loads(line)
        if "reason" in about:
            rejected.append(about)
        else:
            records.append(reader.validate_json(line, strict=True))
    return EncodedSet(folder, records, rejected)


class Stock:
    """Items that lie in finished shards, by address; and clips of which they say that they cannot be used."""

    def __init__(self, roles: tuple[Role, ...]) -> None:
        self.roles = {role.name: role for role in roles}
        self.places: dict[str, tuple[Path, Record, Role]] = {}
        self.refused: dict[tuple[str, ...], str] = {}

    def add(self, found: EncodedSet) -> list[str]:
        """Take in a set but for shards that are missing or cut short, whose names are returned."""
        ends: dict[str, int] = {}
        for record in found.records:
            ends[record.shard] = max(ends.get(record.shard, 0), *(m.offset + m.size for m in record.members.values()))
        lost = [name for name, end in ends.items() if _size(found.folder / name) < end]
        for record in found.records:
            if record.shard not in lost:
                for name, address in record.origin[ADDRESSES].items():
                    if name in self.roles:
                        self.places.setdefault(address, (found.folder, record, self.roles[name]))
        for line in found.rejected:
            if ADDRESSES in line:
                self.refused[tuple(line[ADDRESSES].values())] = line["reason"]
        return lost

    def refusal(self, clip: Clip) -> str | None:
        """Why a clip with these addresses could not be used."""
        return self.refused.get(tuple(clip.addresses.values()))

    def read(self, address: str) -> Item | None:
        """The item, its bytes checked; nothing, and never again, if they are damaged or gone."""
        if address not in self.places:
            return None
        folder, record, role = self.places[address]
        try:
            store = Store(str(folder), Remote())
            members = {name: read_member(store, record, extension=name) for name in role.members}
        except (DataError, FileNotFoundError):
            del self.places[address]
            return None
        return Item(members, {name: record.origin[name] for name in role.facts})


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def is_made(plan: SetPlan, found: EncodedSet, *, stock: Stock) -> bool:
    """Whether a set is what the plan asks for, as far as its index tells."""
    facts = {name for role in plan.roles for name in role.facts}
    rejected, expected = list[Mapping[str, Any]](), list[tuple[int, Clip]]()
    for number, clip in enumerate(plan.clips):
        reason = clip.refusal or stock.refusal(clip)
        if reason is None:
            expected.append((plan.shard_of(number), clip))
        else:
            rejected.append(rejected_line(clip, reason, addressed=clip.refusal is None))
    if rejected != list(found.rejected) or len(expected) != len(found.records):
        return False
    for (shard, clip), record in zip(expected, found.records):
        origin = {name: value for name, value in record.origin.items() if name not in facts}
        wanted = {"key": clip.key, "shard": shard_name(shard), **record_facts(clip)}
        if {name: getattr(record, name) for name in wanted} | {"origin": origin} != wanted:
            return False
    return True


def record_facts(clip: Clip, items: Iterable[Item] = ()) -> dict[str, Any]:
    """The record's fields but for shard and members: the plan's, and in its origin the addresses and the items' facts."""
    added = {name: value for item in items for name, value in item.facts.items()}
    origin = {**clip.facts.get("origin", {}), **added, ADDRESSES: dict(clip.addresses)}
    return {"source": clip.source, **clip.facts, "origin": origin}


def rejected_line(clip: Clip, reason: str, *, addressed: bool) -> dict[str, Any]:
    """What ``rejected.jsonl`` says; with the addresses, where they are why."""
    line: dict[str, Any] = {"key": clip.key, "source": clip.source, "reason": reason}
    return {**line, ADDRESSES: dict(clip.addresses)} if addressed else line
