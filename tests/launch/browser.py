"""Headless Chromium, spoken to over two pipes: no port, no package."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
MISSING = "chromium is missing: apt-get install -y --no-install-recommends chromium"
PATIENCE_S = 90


class Browser:
    """One page. ``requests``: URLs that it has asked for; ``complaints``: what its console says of errors."""

    def __init__(self, profile: Path, *, width: int = 1280, height: int = 900) -> None:
        (read, their_write), (their_read, write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (their_read, their_write)]
        flags = (
            "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run --disable-background-networking "
            f"--disable-component-update --window-size={width},{height}"
        )
        # the protocol's pipes are descriptors 3 and 4
        command = f"exec {CHROMIUM} {flags} --user-data-dir={profile} about:blank 3<&{theirs[0]} 4>&{theirs[1]}"
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=theirs, start_new_session=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (their_read, their_write, *theirs):
            os.close(end)
        self.read, self.write, self.buffer, self.count = read, write, b"", 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded: set[str] = set()
        """Of documents, by the protocol's name for them."""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self.session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def open(self, path: Path) -> None:
        """Until all of it is loaded, and not the page before it, which may say so as late."""
        self.requests, self.complaints = [], []
        document = self.call("Page.navigate", url=path.as_uri())["loaderId"]
        while document not in self.loaded:
            self._receive()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._call(method, parameters, session=self.session)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, *, clicks: int = 1) -> None:
        held = 0 if kind == "mouseReleased" else 1
        more = {"button": "left", "buttons": held, "clickCount": clicks} if kind != "mouseMoved" else {"button": "none"}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def place(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """Where an element, which is brought into view, is in the window."""
        found = self.evaluate(
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]})()"
        )
        return found[0] + across * found[2], found[1] + down * found[3]

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read)
        os.close(self.write)

    def _call(self, method: str, parameters: dict[str, Any], *, session: str = "") -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self.write, json.dumps(message).encode() + b"\0")
        number = self.count
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.read, 1 << 20) if ready else b""
            assert data, "chromium has fallen silent"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, said: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event == "Page.lifecycleEvent" and said["name"] == "load":
            self.loaded.add(said["loaderId"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(said["entry"]["text"])
