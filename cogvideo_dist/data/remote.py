"""The files of an object store or a web server, through fsspec: facts, ranges, streams, and which of their errors may pass.

Paths are handed to the file system itself and never to fsspec's URLs, whose ``::`` and ``?`` have meanings of their own.
Credentials are what fsspec and the cloud's library find in the environment and in their own files.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit, urlunsplit

PIECE = 2**24
"""Bytes that are asked for at a time."""

STALL = 60.0
"""Seconds after which a server that sends nothing, or less than a piece, has failed."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")
PLAIN = {"Accept-Encoding": "identity"}
"""Asks a web server for the bytes as they lie there."""

NO_RANGES = (200, 400, 405, 416, 501)
"""How a web server answers that sends whole files only."""

TAGS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "created",
)

_WRONG_USE = (TypeError, AttributeError, NameError, LookupError, NotImplementedError, ImportError, MemoryError)
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\")]*)?")


class Facts(NamedTuple):
    """What a server says of a file: bytes, if it tells, and a word that changes when the file does, if it has one."""

    size: int | None
    tag: str


def is_remote(root: str) -> bool:
    """Whether a set's place is a URL."""
    return URL.match(root) is not None


def without_secrets(text: str) -> str:
    """A text whose URLs have no user, password and query."""
    return _IN_TEXT.sub(r"\1\2", text)


def is_wrong_use(error: Exception) -> bool:
    """Whether an error is a fault of the program or of its user, which says so itself, and none of the storage."""
    return isinstance(error, _WRONG_USE) or type(error) is ValueError


def is_lasting(error: Exception) -> bool:
    """Whether it would come again, however often one asks: no such file, no permission, a request that is refused."""
    if isinstance(error, TimeoutError):
        return False
    # fsspec says that a file is not there whatever went wrong when it asked a web server for it.
    cause = error.__cause__ if isinstance(error, OSError) and isinstance(error.__cause__, Exception) else error
    status = _status(cause)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(cause, _LASTING)


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of aiohttp, gcsfs or botocore stands for."""
    response = getattr(error, "response", None)
    about = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    for found in (getattr(error, "status", None), getattr(error, "code", None), about.get("HTTPStatusCode")):
        if isinstance(found, int) and found:
            return found
    return None


@functools.cache
def file_system(root: str, *, stall: float, pid: int) -> Any:
    """The file system of a URL, for one process: connections do not survive a fork.

    It lives as long as the process, the parent's also in a child: closed there it would disturb the parent's connections.
    """
    protocol = root.partition("://")[0].lower()
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(protocol)
        options = {**kind._get_kwargs_from_urls(root), **_options(protocol, stall)}
        system = kind(skip_instance_cache=True, **options)
    except ImportError as error:
        raise ValueError(
            f"{without_secrets(root)}: {error}; pip install 'cogvideo_dist[remote]', for gs:// gcsfs"
        ) from None
    if protocol in ("s3", "s3a"):
        system.retries = 1  # who calls counts the tries
    return system


def _options(protocol: str, stall: float) -> dict[str, Any]:
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, connect=stall, sock_connect=stall, sock_read=stall)
        return {"encoded": True, "headers": PLAIN, "client_kwargs": {"timeout": timeout}}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": stall, "read_timeout": stall, "retries": {"max_attempts": 0}}
        return {"config_kwargs": limits, "use_listings_cache": False}
    return {}


class Server:
    """The files below a URL. Blocking; may be used by several threads, and by the children of a process that has used it."""

    def __init__(self, root: str, *, stall: float = STALL) -> None:
        protocol, _, place = root.partition("://")
        if "::" in protocol or not place:
            raise ValueError(
                f"{without_secrets(root)}: give the plain URL of a folder of shards, without a chain of ::"
            )
        self.root, self.stall, self.web = root, stall, protocol.lower() in ("http", "https")
        self.versions = protocol.lower() in ("s3", "s3a")

    def connect(self) -> Any:
        """This process's file system; ``ValueError`` if its library is missing."""
        return file_system(self.root, stall=self.stall, pid=os.getpid())

    def path(self, name: str) -> str:
        """Of a file, as the file system takes it."""
        if self.web:
            parts = urlsplit(self.root)
            folder = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
            return urlunsplit(parts._replace(path=f"{folder}/{quote(name)}", fragment=""))
        if self.versions and "?versionId=" in name:
            raise ValueError(
                f"{name!r}: a file's name in S3 cannot hold ?versionId=, which stands for a version; rename it"
            )
        return f"{self.connect()._strip_protocol(self.root).rstrip('/')}/{name}"

    def facts(self, name: str) -> Facts:
        """Asked for anew."""
        info = self._call("info", self.path(name))
        if info.get("type") == "directory":
            raise FileNotFoundError(name)
        tag = next((f"{word} {info[word]}" for word in TAGS if info.get(word)), "")
        return Facts(None if info.get("size") is None else int(info["size"]), tag)

    def piece(self, name: str, start: int, *, size: int) -> bytes:
        """``size`` bytes from ``start`` on; ``OSError`` if it were more or fewer."""
        data: bytes = self._call("cat_file", self.path(name), start=start, end=start + size)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came where {size} were asked for")
        return data

    def has_ranges(self, name: str) -> bool:
        """Whether it sends a part of a file, as this one, if asked for it."""
        if not self.web:
            return True
        try:
            with self._stream(name, {"Range": "bytes=0-0"}) as file:
                return bool(file.r.status == 206)
        except Exception as error:
            if _status(error) in NO_RANGES:
                return False
            raise

    def stream(self, name: str) -> Iterator[bytes]:
        """A whole file of a web server, in one request."""
        with self._stream(name, {}) as file:
            while data := file.read(PIECE, timeout=self.stall):
                yield data

    def names(self) -> list[str]:
        """Of all files, those in folders too; of a web server what its pages link to."""
        system, folder = self.connect(), self.path("")
        system.invalidate_cache()
        options = {"on_error": "raise"} if self.web else {}
        found = self._call("find", folder if self.web else folder.rstrip("/"), **options)
        system.invalidate_cache()
        below = [path[len(folder) :] for path in found if path.startswith(folder)]
        return [unquote(name) for name in below] if self.web else below

    def _stream(self, name: str, headers: dict[str, str]) -> Any:
        # A block size of zero is fsspec's word for "as it comes"; a size keeps it from asking for the file's facts first.
        return self.connect().open(self.path(name), block_size=0, size=1, headers={**PLAIN, **headers})

    def _call(self, method: str, path: str, **options: Any) -> Any:
        system = self.connect()
        limit = {"timeout": self.stall} if system.async_impl else {}
        return getattr(system, method)(path, **options, **limit)
