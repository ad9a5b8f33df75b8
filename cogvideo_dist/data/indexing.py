"""Makes the index of shards that are there already, ours or from elsewhere: every shard is read once, from its beginning to its
end, and whatever cannot be used is named with the reason.

A sample's key is the path of its members up to the first dot of the last part, the rest in lower case is the extension, as
WebDataset has it; the members need not be neighbours. A shard with damage is refused as a whole, since what is behind the
damage cannot be told. Members that are no media, caption, JSON or tensors of safetensors are passed over, never looked into.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import xxhash
from pydantic import TypeAdapter, ValidationError

from cogvideo_dist.data.decode import DecodeError, Probe
from cogvideo_dist.data.index import KEY, Kind, Member, Record, check_shard
from cogvideo_dist.data.probing import Prober
from cogvideo_dist.data.reading import MAX_MEMBER, check_latent, tensors_in
from cogvideo_dist.data.shards import KINDS, MAX_CAPTION, caption_in, caption_of, shown
from cogvideo_dist.data.tars import Entry, TarError, TarReader

LATENT, TEXT = "latent.safetensors", "text.safetensors"
EXTENSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_JSON = 2**20
LARGEST = 2**31 - 1
OWN = ("source", "kind", "frames", "fps", "height", "width", "caption_length")
"""What a ``json`` member has, beside the ``key``, that this package wrote."""

FIELDS = {item.name for item in fields(Record)} - {"shard", "members"}
RECORD = TypeAdapter(Record)


@dataclass(frozen=True)
class Layout:
    """What the members of samples are, and what is asked of them.

    ``kinds``: media by extension. ``caption``: ``txt`` or ``json:<field>``; None: as the sample's own facts say, else ``txt``.
    ``scores``: fields of the member ``json`` by the score's name. ``allow_empty``: captions may be empty or missing.
    ``decode``: media are decoded whole, not only their headers and first frames.
    """

    kinds: Mapping[str, Kind] = field(default_factory=lambda: dict(KINDS))
    caption: str | None = None
    scores: Mapping[str, str] = field(default_factory=dict)
    allow_empty: bool = False
    decode: bool = False

    @property
    def read(self) -> set[str]:
        """Extensions of the members that are looked into."""
        return {*self.kinds, "txt", "json", LATENT, TEXT}


class Rejected(NamedTuple):
    """A sample, or with an empty ``key`` a whole shard, that cannot be used; ``code``: the kind of defect."""

    key: str
    source: str
    reason: str
    code: str


@dataclass
class Scan:
    """What a shard holds: samples in the order of their first members; members passed over, by extension."""

    samples: list[Record | Rejected] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class _Group:
    """A sample in the making. ``found``: what its members were found to hold; ``ignored``: extensions of those that were not
    looked into; ``defect``: why it cannot be used."""

    key: str
    source: str
    members: dict[str, Member] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    defect: DecodeError | None = None


Again = Callable[[Member], bytes]
"""Reads a member's bytes once more."""


def index_shards(
    shards: Sequence[str],
    pieces: Callable[[str], Iterable[bytes]],
    *,
    again: Callable[[str, Member], bytes],
    layout: Layout,
    workers: int = 1,
) -> Iterator[Scan]:
    """Scans of shards, in their order. ``pieces``: a shard's bytes from the beginning on; ``again``: those of one member.

    ``workers`` shards are read at once, and for each there is a process that looks into media. What is found does not depend
    on their number. A sample whose key is in several shards is still in the scans of all; see ``settle``.
    """
    probers, stopped = threading.local(), threading.Event()
    started: list[Prober] = []

    def watched(shard: str) -> Iterator[bytes]:
        for piece in pieces(shard):
            if stopped.is_set():
                raise InterruptedError
            yield piece

    def scan(shard: str) -> Scan:
        if not hasattr(probers, "own"):
            probers.own = Prober(decode=layout.decode)
            started.append(probers.own)
        return scan_shard(shard, watched(shard), again=lambda m: again(shard, m), layout=layout, prober=probers.own)

    executor = ThreadPoolExecutor(workers)
    try:
        yield from executor.map(scan, shards)
    finally:
        stopped.set()
        executor.shutdown(cancel_futures=True)
        for prober in started:
            prober.close()


def settle(shards: Sequence[str], scans: Sequence[Scan]) -> Iterator[Record | Rejected]:
    """All samples, but for those whose key is in two shards: these are rejected in both."""
    first: dict[str, str] = {}
    twice: dict[str, list[str]] = {}
    for shard, scan in zip(shards, scans):
        for sample in scan.samples:
            if sample.key and first.setdefault(sample.key, shard) != shard:
                twice.setdefault(sample.key, [first[sample.key]]).append(shard)
    for shard, scan in zip(shards, scans):
        for sample in scan.samples:
            if sample.key in twice:
                others = ", ".join(other for other in twice[sample.key] if other != shard)
                source = f"{shard}/{sample.key}"
                yield Rejected(
                    sample.key, source, f"{shard}: key {sample.key!r} is also in {others}", "key in two shards"
                )
            else:
                yield sample


def scan_shard(shard: str, pieces: Iterable[bytes], *, again: Again, layout: Layout, prober: Prober) -> Scan:
    """The samples of one shard, a tar that comes in ``pieces``."""
    scan, groups = Scan(), dict[str, _Group]()
    try:
        check_shard(shard)
    except ValueError as error:
        scan.samples.append(Rejected("", shown(shard), shown(str(error)), "bad name"))
        return scan
    tar, count = TarReader(pieces), 0
    try:
        for entry in tar:
            count += 1
            _take(entry, tar, shard=shard, groups=groups, ignored=scan.ignored, layout=layout, prober=prober)
    except TarError as error:
        unused = f"; none of the {count} members before that is used" if count else ""
        scan.samples.append(Rejected("", shown(shard), f"{shown(shard)}: {error}{unused}", "damaged shard"))
        return scan
    for group in groups.values():
        try:
            scan.samples.append(_Sample(group, shard, layout=layout, prober=prober, again=again).record())
        except DecodeError as error:
            scan.samples.append(Rejected(group.key, shown(group.source), str(error), error.code))
    return scan


def _take(
    entry: Entry,
    tar: TarReader,
    *,
    shard: str,
    groups: dict[str, _Group],
    ignored: Counter[str],
    layout: Layout,
    prober: Prober,
) -> None:
    """Put a member into its group; its bytes are read if they are of use."""

    def refuse(reason: str, code: str) -> DecodeError:
        return DecodeError(f"{shown(shard)}: member {shown(entry.name)[:300]!r} at {entry.header}: {reason}", code)

    name = entry.name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, dot, rest = base.partition(".")
    key, extension = folder + slash + stem, rest.lower()
    if not stem or not dot or not KEY.fullmatch(key) or ".." in key or not EXTENSION.fullmatch(rest):
        reason = "its name is not a key of letters, digits, -, _ and /, with an extension"
        groups[f"\0{entry.header}"] = group = _Group("", f"{shard}/{name[:300]}")
        group.defect = refuse(entry.refusal or reason, "bad member" if entry.refusal else "bad name")
        return
    group = groups.setdefault(key, _Group(key, f"{shard}/{key}"))
    if entry.refusal is not None:
        group.defect = group.defect or refuse(entry.refusal, "bad member")
    elif extension in group.members or extension in group.ignored:
        group.defect = group.defect or refuse("the sample has a member of that extension already", "duplicate")
    elif extension not in layout.read:
        group.ignored.add(extension)
        ignored[extension] += 1
    else:
        digest, data = xxhash.xxh3_128(), bytearray()
        most = {"txt": MAX_CAPTION, "json": MAX_JSON}.get(extension, MAX_MEMBER)
        for piece in tar.content():
            digest.update(piece)
            if entry.size <= most:
                data += piece
        group.members[extension] = Member(entry.offset, entry.size, digest.hexdigest())
        if entry.size > most:
            group.defect = group.defect or refuse(
                f"{entry.size} bytes are more than the {most} that are read", "too large"
            )
        else:
            group.found[extension] = _look(group, extension, data=data, layout=layout, prober=prober)


def _look(group: _Group, extension: str, *, data: bytearray, layout: Layout, prober: Prober) -> Any:
    """What a member's bytes hold, or the ``DecodeError`` that says why it is nothing."""
    try:
        if extension == "txt":
            return len(caption_of(bytes(data), allow_empty=True))
        if extension == "json":
            return _read_json(group.key, bytes(data), layout)
        if extension in (LATENT, TEXT):
            return {name: array.shape for name, array in tensors_in(memoryview(data), 0).items()}
        return prober.probe(data, kind=layout.kinds[extension])
    except DecodeError as error:
        return error
    except RecursionError:
        return DecodeError(f"{extension}: nested too deeply", "wrong json")


class _Json(NamedTuple):
    """Of a member ``json``: this package's facts, if it is one of its; the caption's length and the scores asked for."""

    facts: Mapping[str, Any] | None
    caption: int | DecodeError | None
    scores: Mapping[str, float]


def _read_json(key: str, data: bytes, layout: Layout) -> _Json:
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"json: not valid JSON ({error})", "wrong json") from None
    is_object = isinstance(about, dict)
    facts = about if is_object and about.get("key") == key and all(name in about for name in OWN) else None
    if facts is not None:
        if not isinstance(facts.get("scores", {}), dict):
            raise DecodeError("json: scores is no object", "wrong json")
        _check_plain(facts, "json")
        if unknown := sorted(set(facts) - FIELDS):
            raise DecodeError(f"json: unknown field {unknown[0]!r}", "wrong json")
    place = layout.caption or (facts or {}).get("caption", "txt")
    caption: int | DecodeError | None = None
    if isinstance(place, str) and place.startswith("json:"):
        try:
            caption = len(caption_in(data, place, allow_empty=True))
        except DecodeError as error:
            caption = error
    scores = {
        name: _score(about[item], item) for name, item in layout.scores.items() if is_object and item in about
    }  # fmt: skip
    return _Json(facts, caption, scores)


def _score(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or math.isnan(value):
        raise DecodeError(f"json: field {name!r} is {str(value)[:50]!r}, not a number", "wrong json")
    return float(value)


def _check_plain(value: Any, place: str) -> None:
    """Refuse what no index can hold: NaN, infinities, numbers of more than 32 bits, text that is not Unicode."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(name, place)
            _check_plain(item, f"{place}.{name}")
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, place)
    elif (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) > LARGEST):
        raise DecodeError(f"{shown(place)} is {str(value)[:30]}, not a usable number", "wrong json")
    elif isinstance(value, str) and value.encode("utf-8", "replace") != value.encode("utf-8", "surrogatepass"):
        raise DecodeError(f"{shown(place)} is text with half a character", "wrong json")


class _Sample:
    """A complete group -> its record."""

    def __init__(self, group: _Group, shard: str, *, layout: Layout, prober: Prober, again: Again) -> None:
        self.group, self.shard, self.layout, self.prober, self.again = group, shard, layout, prober, again

    def record(self) -> Record:
        """Raises ``DecodeError`` with the reason why there is none."""
        group = self.group
        if group.defect is not None:
            raise group.defect
        about = self._of("json") if "json" in group.members else _Json(None, None, {})
        media = [extension for extension in group.members if extension in self.layout.kinds or extension == LATENT]
        if len(media) != 1:
            names = ", ".join(media or sorted({*group.members, *group.ignored}))
            found, code = (names, "several media") if media else (f"no known media, only {names}", "no media")
            raise DecodeError(f"has {found}; a sample is one video, image or latent", code)
        values = self._own(about.facts, media[0]) if about.facts is not None else self._foreign(media[0])
        place = self.layout.caption or values.get("caption", "txt")
        values["caption"] = place
        length = self._caption_length(place, about, stated=values.get("caption_length"))
        if values.setdefault("caption_length", length) != length:
            raise DecodeError(
                f"json: caption_length is {values['caption_length']}, the caption's is {length}", "wrong facts"
            )
        if about.scores:
            values["scores"] = {**values.get("scores", {}), **about.scores}
        members = {name: group.members[name] for name in sorted(group.members)}
        if about.facts is None:
            members = {name: member for name, member in members.items() if name in ("txt", "json", media[0])}
        return _record({**values, "key": group.key, "shard": self.shard, "members": members})

    def _of(self, extension: str) -> Any:
        found = self.group.found[extension]
        if isinstance(found, DecodeError):
            raise found
        return found

    def _foreign(self, media: str) -> dict[str, Any]:
        if media == LATENT:
            raise DecodeError(f"{LATENT} without a member json that tells its size in pixels", "no facts")
        found: Probe = self._of(media)
        return {"source": f"{self.shard}/{self.group.key}.{media}", "kind": self.layout.kinds[media], **found._asdict()}

    def _own(self, facts: Mapping[str, Any], media: str) -> dict[str, Any]:
        """The facts as they were written, compared with what is there."""
        values = dict(facts)
        kind = "latent" if media == LATENT else self.layout.kinds[media]
        if values["kind"] != kind:
            raise DecodeError(f"json: kind is {str(values['kind'])[:50]!r}, the sample is a {kind}", "wrong facts")
        if kind == "latent":
            self._check_latent(values.get("size"))
            return values
        found: Probe = self._of(media)
        if not self._agrees(values, found):
            # what was written there was found by decoding the whole
            found = self.prober.probe(self.again(self.group.members[media]), kind=kind, decode=True)
        if not self._agrees(values, found):
            name = next(name for name, value in found._asdict().items() if values.get(name, 0) != value)
            stated, is_there = str(values.get(name, 0))[:50], getattr(found, name)
            raise DecodeError(f"json: {name} is {stated}, the {kind}'s is {is_there}", "wrong facts")
        return values

    def _agrees(self, values: Mapping[str, Any], found: Probe) -> bool:
        return all(values.get(name, 0) == value for name, value in found._asdict().items())

    def _check_latent(self, size: Any) -> None:
        if TEXT not in self.group.members:
            raise DecodeError(f"{LATENT} without {TEXT}", "no media")
        if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
            raise DecodeError(f"json: size is {str(size)[:50]}, not three numbers above 0", "wrong facts")
        check_latent({**self._of(LATENT), **self._of(TEXT)}, (size[0], size[1], size[2]))

    def _caption_length(self, place: Any, about: _Json, *, stated: int | None) -> int:
        """The caption's; of a latent whose text is there as features only, what is ``stated``."""
        if place == "txt":
            length = self._of("txt") if "txt" in self.group.members else None
        else:
            length = about.caption
        optional = self.layout.allow_empty or LATENT in self.group.members
        if isinstance(length, DecodeError) and not (optional and length.code == "caption missing"):
            raise length
        if not isinstance(length, int):
            if not optional:
                raise DecodeError(f"no caption: no member {place}", "no caption")
            length = stated or 0
        elif length == 0 and not optional:
            raise DecodeError("the caption is empty", "caption empty")
        return length


def _record(values: Mapping[str, Any]) -> Record:
    try:
        return RECORD.validate_json(json.dumps(values), strict=True)
    except RecursionError:
        raise DecodeError("json: nested too deeply", "wrong json") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "sample"
        raise DecodeError(f"{place}: {first['msg'].removeprefix('Value error, ')}", "wrong facts") from None
