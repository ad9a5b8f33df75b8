"""Real servers on this machine: a web server that can be told to fail, and S3 as moto serves it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote, urlsplit

Fault = Literal["cut", "error", "stall", "short", "flip"]
"""The connection is cut in the middle of a body; status 503; nothing comes after the middle; a body ends in the middle, as its
head says; one bit of the body is wrong."""


class Request(NamedTuple):
    """What was asked for, and how many bytes were sent. ``part``: the header Range."""

    method: str
    path: str
    part: str
    sent: int


class WebServer(ThreadingHTTPServer):
    """Serves ``files`` (path -> bytes). The next answers have the faults of ``faults``, or each has ``always``; but not
    those to a question for the first byte alone. The next ``busy`` answers, of whatever kind, are status 503."""

    daemon_threads = True

    def __init__(self, *, ranges: bool = True, refuse: int | None = None, sizes: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges, self.refuse, self.sizes = ranges, refuse, sizes
        self.busy = 0
        self.files: dict[str, bytes] = {}
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.requests: list[Request] = []
        self.ending = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, path: str) -> int:
        """Bytes of a file's bodies."""
        return sum(request.sent for request in self.requests if request.path == path)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Requests are noted in the server."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.server.busy:
            self.server.busy -= 1
            self._send(503, {}, b"")
            return
        path = unquote(urlsplit(self.path).path)
        data, part = self.server.files.get(path), self.headers.get("Range", "")
        if data is None:
            self._list(path)
            return
        begin, end, status = 0, len(data), 200
        if part and self.server.refuse:
            self._send(self.server.refuse, {}, b"")
            return
        if part and self.server.ranges:
            first, _, last = part.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(int(last) + 1 if last else end, end), 206
            if begin >= len(data):
                self._send(416, {}, b"")
                return
        body = data[begin:end]
        headers = {"ETag": f'"{hash(data):x}"'}
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._send(status, headers, body, self._fault())

    def _fault(self) -> Fault | None:
        if self.command != "GET" or self.headers.get("Range") == "bytes=0-0":
            return None
        return self.server.always or (self.server.faults.popleft() if self.server.faults else None)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None) -> None:
        half = len(body) // 2
        if fault == "error":
            status, headers, body = 503, {}, b""
        elif fault == "short":
            body = body[:half]
        elif fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        self.send_response(status)
        about = {"Content-Length": str(len(body))} if self.server.sizes else {"Transfer-Encoding": "chunked"}
        for name, value in {**headers, **about}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = body[:half] if fault in ("cut", "stall") else body
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(
            Request(self.command, path, self.headers.get("Range", ""), len(sent) if self.command == "GET" else 0)
        )
        if self.command == "GET":
            self.wfile.write(sent if self.server.sizes else b"%x\r\n%b\r\n0\r\n\r\n" % (len(sent), sent))
        if fault == "stall":
            self.server.ending.wait()
        if fault in ("cut", "stall"):
            self.close_connection = True

    def _list(self, path: str) -> None:
        """A page of links to what lies in a folder."""
        folder = path.rstrip("/") + "/"
        below = {name[len(folder) :].partition("/") for name in self.server.files if name.startswith(folder)}
        links = sorted({quote(first) + slash for first, slash, _ in below})
        page = "".join(f'<a href="{link}">{link}</a>\n' for link in links).encode()
        self._send(200 if links else 404, {"Content-Type": "text/html"}, page)


@contextmanager
def web_server(*, ranges: bool = True, refuse: int | None = None, sizes: bool = True) -> Iterator[WebServer]:
    """``ranges``: whether it heeds the header Range; ``refuse``: the status with which it answers such requests instead;
    ``sizes``: whether it tells how long an answer is."""
    server = WebServer(ranges=ranges, refuse=refuse, sizes=sizes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """Its address; buckets are made, and keys written, with boto3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
