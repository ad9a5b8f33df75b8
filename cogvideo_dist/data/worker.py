"""A process that reads one sample after the other into memory that its parent owns, and keeps nothing.

It may be killed at any time: what it was at is asked of another. Decoders of foreign files crash and run away, so they run
here, under limits of memory and processor time. Started by ``data/pool.py``; messages are JSON, one to a packet.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data.decode import Place
from cogvideo_dist.data.index import Member, Record
from cogvideo_dist.data.reading import DTYPES, Arena, ArenaFull, Array, Content, Cut, read_content
from cogvideo_dist.data.shards import DataError
from cogvideo_dist.data.storage import Store

PACKET = 2**18
"""Bytes of the longest message."""


def main() -> None:
    """Serve the socket whose number is the first argument until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent, which ends its workers
    link = socket.socket(fileno=int(sys.argv[1]))
    about = json.loads(link.recv(PACKET))
    limit = int(about["memory"])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stores = [Store(root, Remote(**remote)) for root, remote in about["stores"]]
    segments: dict[int, mmap.mmap] = {}
    link.send(json.dumps({"ready": True}).encode())
    while True:
        packet, handles, _, _ = socket.recv_fds(link, PACKET, 1)
        if not packet:
            return
        message = json.loads(packet)
        if "segment" in message:
            segments[message["segment"]] = mmap.mmap(handles[0], message["size"])
            os.close(handles[0])  # the mapping keeps the memory
        elif "forget" in message:
            del segments[message["forget"]]
        else:
            _serve(message, link, stores=stores, segments=segments, seconds=about["seconds"])


def _serve(
    message: Mapping[str, Any],
    link: socket.socket,
    *,
    stores: list[Store],
    segments: Mapping[int, mmap.mmap],
    seconds: float,
) -> None:
    """Read what a message asks for and say how it went."""

    def say(**facts: Any) -> None:
        link.send(json.dumps({"id": message["id"], **facts}).encode())

    _limit_time(seconds)
    try:
        say(**_answer(message, stores=stores, segments=segments, decoding=lambda: say(begun="decoding")))
    finally:
        _limit_time(None)


def _answer(
    message: Mapping[str, Any], *, stores: list[Store], segments: Mapping[int, mmap.mmap], decoding: Callable[[], None]
) -> dict[str, Any]:
    try:
        content = read_content(
            stores[message["store"]], to_record(message["record"]), arena=Arena(memoryview(segments[message["into"]])),
            cut=to_cut(message["cut"]), decoding=decoding,
        )  # fmt: skip
        return {"content": {"caption": content.caption, "arrays": content.arrays}}
    except DataError as error:
        return {"defect": {"reason": error.reason, "code": error.code}}
    except ArenaFull as error:
        return {"needed": error.needed}
    except MemoryError:
        return {"defect": {"reason": "decoding it takes more memory than a worker may use", "code": "too large"}}
    except OSError as error:
        return {"storage": str(error) or type(error).__name__, "missing": getattr(error, "missing", False)}
    except Exception:  # the parent raises it, with its traceback
        return {"bug": traceback.format_exc()[-PACKET // 4 :]}


def to_message(record: Record) -> dict[str, Any]:
    """What of a record is needed to read it."""
    return {
        "key": record.key, "source": record.source, "shard": record.shard, "kind": record.kind, "members": record.members,
        "frames": record.frames, "fps": record.fps, "height": record.height, "width": record.width,
        "caption_length": record.caption_length, "size": record.size, "caption": record.caption,
    }  # fmt: skip


def to_record(message: Mapping[str, Any]) -> Record:
    members = {extension: Member(*member) for extension, member in message["members"].items()}
    size = message["size"] and tuple(message["size"])
    return Record(**{**message, "members": members, "size": size})


def to_cut(message: Mapping[str, Any]) -> Cut:
    return Cut(**{**message, "size": tuple(message["size"]), "place": Place(*message["place"])})


def to_content(message: Mapping[str, Any]) -> Content:
    """What a worker says it has read; raises ``ValueError`` for what no worker of ours says."""
    arrays = {}
    for name, (dtype, shape, offset) in message["arrays"].items():
        if dtype not in DTYPES or any(type(n) is not int or n < 0 for n in (*shape, offset)):
            raise ValueError(f"a data worker answered with an array {dtype} {shape} at {offset}")
        arrays[name] = Array(dtype, tuple(shape), offset)
    return Content(str(message["caption"]), arrays)


def _limit_time(seconds: float | None) -> None:
    """Have the process killed after so much more processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = resource.RLIM_INFINITY if seconds is None else math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
