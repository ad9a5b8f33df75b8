"""Worker processes that read samples ahead, into memory that is bounded and used again; a thread of their parent minds them.

A task is one sample. A worker that dies is replaced and its tasks are done again, so that what is read does not change; neither
does it with their number. A task whose decoder dies twice is a defect of its bytes; what is wrong with the storage is raised.
"""

from __future__ import annotations

import heapq
import json
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.data.index import Record
from cogvideo_dist.data.reading import Arena, ArenaFull, Content, Cut, expected_bytes, read_content
from cogvideo_dist.data.shards import DataError
from cogvideo_dist.data.storage import StorageError, Store
from cogvideo_dist.data.worker import PACKET, to_content, to_message

DEPTH = 2
"""Tasks that a worker has before it: the one that it is at, and the next."""

SLOWEST = 4
"""How many times its processor time a decoder may take on a busy machine."""

STARTING, START_SECONDS = "starting", 300.0
BLAMED = ("reading", "decoding", "silent while decoding")
"""What a worker was at when it died, where that may be the sample's fault."""

LEAST_SEGMENT = 2**20
WORKER_MEMORY = 4 * 2**30
FATAL = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGXCPU}
"""Signals by which a decoder dies of what it was given; others come from outside."""

Memory: TypeAlias = NDArray[np.uint8]


class WorkerError(RuntimeError):
    """Workers that die or hang for no reason that lies in the data."""


@dataclass(frozen=True)
class Limits:
    """``decode_seconds``: of processor time for a sample; ``silent_seconds``: that a worker says nothing while it reads bytes.
    ``deaths``: of workers in a row between which nothing was read."""

    decode_seconds: float = 30.0
    silent_seconds: float = 600.0
    deaths: int = 6


class Task(NamedTuple):
    """What is to be read, from which of the stores."""

    store: int
    record: Record
    cut: Cut


class Loaded(NamedTuple):
    """What was read; the arrays lie in ``memory``, which is used again when nothing refers to it any more."""

    content: Content
    memory: Memory


class Reads:
    """Reads tasks in this process, when they are asked for: what no workers are."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = stores
        self.tasks: dict[int, Task] = {}
        self.next = 0

    def submit(self, task: Task) -> int:
        return self.submit_all([task])[0]

    def submit_all(self, tasks: Sequence[Task]) -> list[int]:
        tickets = list(range(self.next, self.next + len(tasks)))
        self.tasks.update(zip(tickets, tasks))
        self.next += len(tasks)
        return tickets

    def result(self, ticket: int) -> Loaded:
        task = self.tasks.pop(ticket)
        size = expected_bytes(task.record, task.cut.size)
        while True:
            memory = np.empty(size, np.uint8)
            try:
                content = read_content(self.stores[task.store], task.record, arena=Arena(memory.data), cut=task.cut)
                return Loaded(content, memory)
            except ArenaFull as error:
                size = error.needed

    def discard(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            self.tasks.pop(ticket, None)

    def close(self) -> None:
        self.tasks.clear()


@dataclass
class _Job:
    """A task on its way. ``segment``: where it is read to, while a worker has it."""

    ticket: int
    task: Task
    size: int
    deaths: int = 0
    segment: _Segment = field(default_factory=lambda: _NOWHERE)
    outcome: Loaded | BaseException | None = None
    unwanted: bool = False


@dataclass
class _Segment:
    """Shared memory of a power of two bytes."""

    number: int
    size: int
    handle: int
    map: mmap.mmap


_NOWHERE: _Segment = _Segment(0, 0, -1, mmap.mmap(-1, 1))


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    link: socket.socket
    jobs: deque[_Job] = field(default_factory=deque)
    knows: set[int] = field(default_factory=set)
    phase: str = STARTING
    since: float = 0.0


class _Leased(np.ndarray[Any, np.dtype[np.uint8]]):
    """Memory of a segment; its views keep it alive, as a plain array's would not."""


class Pool:
    """``workers`` processes that read from ``stores``; what is ready or being read takes at most ``memory`` bytes, except what
    is waited for.

    ``submit`` gives a ticket for ``result``, which returns what was read, or raises ``DataError`` (the bytes are at fault),
    ``StorageError`` (the storage is) or ``WorkerError``.
    """

    def __init__(self, stores: Sequence[Store], *, workers: int, memory: int, limits: Limits | None = None) -> None:
        self.places = [(store.root, asdict(store.remote)) for store in stores]
        self.cap, self.limits = memory, limits or Limits()
        self._lock = threading.Condition()
        self._jobs: dict[int, _Job] = {}
        self._waiting: list[tuple[int, _Job]] = []
        self._wanted = -1
        self._next = self._deaths = self._held = 0
        self._free: dict[int, list[_Segment]] = {}
        self._returned: deque[_Segment] = deque()
        self._segments = 0
        self._closed = self._short = False
        self._end_of_all: BaseException | None = None
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._start()
        self._thread = threading.Thread(target=self._run, name="data pool", daemon=True)
        self._thread.start()

    @property
    def processes(self) -> list[int]:
        """Their numbers, as the system has them."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, task: Task) -> int:
        return self.submit_all([task])[0]

    def submit_all(self, tasks: Sequence[Task]) -> list[int]:
        jobs = [_Job(self._next + n, t, expected_bytes(t.record, t.cut.size)) for n, t in enumerate(tasks)]
        with self._lock:
            self._next += len(jobs)
            for job in jobs:
                self._jobs[job.ticket] = job
                job.outcome = self._end_of_all
                heapq.heappush(self._waiting, (job.ticket, job))
        self._ring()
        return [job.ticket for job in jobs]

    def result(self, ticket: int) -> Loaded:
        with self._lock:
            job = self._jobs[ticket]
            if job.outcome is None:
                self._wanted = max(self._wanted, ticket)
                self._ring()
            while job.outcome is None:
                self._lock.wait()
            del self._jobs[ticket]
        if isinstance(job.outcome, BaseException):
            raise job.outcome
        return job.outcome

    def discard(self, tickets: Iterable[int]) -> None:
        """What nobody will ask for any more; its memory is free once it has been read."""
        with self._lock:
            for ticket in tickets:
                if (job := self._jobs.pop(ticket, None)) is not None:
                    job.unwanted = True
                    job.outcome = None

    def close(self) -> None:
        """End the workers and give their memory back."""
        if not self._closed:
            self._closed = True
            self._ring()
            self._thread.join()

    def _ring(self) -> None:
        with suppress(OSError):  # it rings already, or nobody listens any more
            self._bell.send(b"!")

    def _run(self) -> None:
        try:
            while not self._closed:
                for key, _ in self._selector.select(self._patience()):
                    if key.fileobj is self._ear:
                        self._ear.recv(PACKET)
                    else:
                        self._hear(key.data)
                self._watch()
                self._dispatch()
        except BaseException as error:
            self._fail(error)
        self._fail(WorkerError("the data workers were ended"))
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        while self._returned:
            self._put_back(self._returned.popleft())
        for segment in (segment for segments in self._free.values() for segment in segments):
            os.close(segment.handle)
        self._free.clear()
        for resource in (self._selector, self._bell, self._ear):
            resource.close()

    def _fail(self, error: BaseException) -> None:
        """Whoever waits learns why nothing comes."""
        with self._lock:
            self._end_of_all = self._end_of_all or error
            for job in self._jobs.values():
                job.outcome = job.outcome or error
            self._lock.notify_all()

    # workers

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = f"import sys; sys.path[:] = {sys.path!r}; from cogvideo_dist.data.worker import main; main()"
        command = [sys.executable, "-c", program, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        about = {"stores": self.places, "memory": WORKER_MEMORY, "seconds": self.limits.decode_seconds}
        with suppress(OSError):  # it has died at once, which its link will tell
            ours.send(json.dumps(about).encode())
        worker = _Worker(process, ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _end(self, worker: _Worker) -> None:
        self._selector.unregister(worker.link)
        worker.link.close()
        worker.process.kill()
        worker.process.wait()

    def _patience(self) -> float | None:
        """Seconds until some worker will have been silent for too long."""
        busy = [worker.since + self._allowed(worker) - time.monotonic() for worker in self._workers if worker.jobs]
        return max(0.0, min(busy)) if busy else None

    def _allowed(self, worker: _Worker) -> float:
        if worker.phase == STARTING:
            return START_SECONDS
        return SLOWEST * self.limits.decode_seconds if worker.phase == "decoding" else self.limits.silent_seconds

    def _watch(self) -> None:
        for worker in self._workers:
            if worker.jobs and time.monotonic() > worker.since + self._allowed(worker):
                worker.phase = f"silent while {worker.phase or 'waiting'}"
                worker.process.kill()
                worker.since = time.monotonic()

    def _hear(self, worker: _Worker) -> None:
        packet = b""
        with suppress(ConnectionError):
            try:
                packet = worker.link.recv(PACKET)
            except (
                ConnectionError
            ):  # said once of a worker that died with work before it; what it sent before is still there
                packet = worker.link.recv(PACKET)
        if not packet:
            self._bury(worker)
            return
        message = json.loads(packet)
        worker.since = time.monotonic()
        if "begun" in message:
            worker.phase = message["begun"]
            return
        if "ready" not in message:
            self._settle(worker.jobs.popleft(), message)
        worker.phase = "reading" if worker.jobs else ""

    def _settle(self, job: _Job, message: dict[str, Any]) -> None:
        """What a worker said of a task."""
        self._deaths = 0
        record = job.task.record
        if "content" in message:
            self._deliver(job, Loaded(to_content(message["content"]), self._leased(job.segment)))
            return
        self._retire(job)
        if "defect" in message:
            about = message["defect"]
            self._deliver(job, DataError(record.key, record.source, about["reason"], about["code"]))
        elif "needed" in message:
            job.size = message["needed"]
            heapq.heappush(self._waiting, (job.ticket, job))
        elif "storage" in message:
            self._deliver(job, StorageError(f"sample {record.key}: {message['storage']}", missing=message["missing"]))
        else:
            self._deliver(job, WorkerError(f"a data worker failed at sample {record.key}:\n{message['bug']}"))

    def _bury(self, worker: _Worker) -> None:
        """A worker is gone: another takes its place, and its tasks are done again."""
        self._selector.unregister(worker.link)
        worker.link.close()
        code = worker.process.wait()
        self._workers.remove(worker)
        self._deaths += 1
        if self._deaths > self.limits.deaths:
            raise WorkerError(
                f"{self._deaths} data workers in a row died without reading anything, the last with {_ending(code)}"
                + (f" at sample {worker.jobs[0].task.record.key}" if worker.jobs else "")
            )
        self._start()
        if worker.jobs and worker.phase in BLAMED:
            running = worker.jobs[0]
            own = -code in FATAL or worker.phase == "silent while decoding"
            running.deaths += own
            if running.deaths >= 2:
                record = worker.jobs.popleft().task.record
                self._retire(running)
                reason = f"its decoder died twice ({_ending(code)}, {worker.phase})"
                self._deliver(running, DataError(record.key, record.source, reason, "decoder died"))
        for job in worker.jobs:
            self._retire(job)
            heapq.heappush(self._waiting, (job.ticket, job))

    def _deliver(self, job: _Job, outcome: Loaded | BaseException) -> None:
        with self._lock:
            job.outcome = None if job.unwanted else outcome
            self._lock.notify_all()

    # memory

    def _dispatch(self) -> None:
        """Give out waiting tasks, in their order, as far as workers and memory go."""
        while True:
            while self._returned:
                self._put_back(self._returned.popleft())
            self._short = False
            worker = min(self._workers, key=lambda w: len(w.jobs))
            with self._lock:
                while self._waiting and self._waiting[0][1].unwanted:
                    heapq.heappop(self._waiting)
                if not self._waiting or len(worker.jobs) >= DEPTH:
                    return
                ticket, job = self._waiting[0]
                size = max(LEAST_SEGMENT, 1 << (job.size - 1).bit_length())
                if self._held and self._held + size > self.cap and ticket > self._wanted:
                    self._short = True  # what comes back from here on rings; what came back just now is looked at again
                    if self._returned:
                        continue
                    return
                heapq.heappop(self._waiting)
            job.segment = self._segment(size)
            if not worker.jobs:
                worker.since = time.monotonic()
                worker.phase = worker.phase or "reading"
            worker.jobs.append(job)
            try:
                self._send(worker, job)
            except OSError:
                return  # it has died, which its link will tell

    def _send(self, worker: _Worker, job: _Job) -> None:
        segment = job.segment
        if segment.number not in worker.knows:
            about = json.dumps({"segment": segment.number, "size": segment.size}).encode()
            socket.send_fds(worker.link, [about], [segment.handle])
            worker.knows.add(segment.number)
        task = job.task
        message = {
            "id": job.ticket, "store": task.store, "into": segment.number, "record": to_message(task.record),
            "cut": vars(task.cut),
        }  # fmt: skip
        worker.link.send(json.dumps(message).encode())

    def _segment(self, size: int) -> _Segment:
        """A free one, or a new one; ones of other sizes go where they stand in the way of the bound."""
        self._held += size
        if self._free.get(size):
            return self._free[size].pop()
        for sizes in sorted(self._free):
            while self._free[sizes] and self._allotted() + size > self.cap:
                self._destroy(self._free[sizes].pop())
        handle = os.memfd_create("cogvideo_dist")
        os.ftruncate(handle, size)
        self._segments += 1
        return _Segment(self._segments, size, handle, mmap.mmap(handle, size))

    def _allotted(self) -> int:
        return self._held + sum(size * len(segments) for size, segments in self._free.items())

    def _destroy(self, segment: _Segment) -> None:
        os.close(segment.handle)
        for worker in self._workers:
            if segment.number in worker.knows:
                worker.knows.discard(segment.number)
                with suppress(OSError):  # it has died
                    worker.link.send(json.dumps({"forget": segment.number}).encode())

    def _leased(self, segment: _Segment) -> Memory:
        memory = np.frombuffer(segment.map, np.uint8).view(_Leased)
        weakref.finalize(memory, _give_back, weakref.ref(self), segment).atexit = False
        return memory

    def _retire(self, job: _Job) -> None:
        """A task's memory is free again."""
        self._put_back(job.segment)
        job.segment = _NOWHERE

    def _put_back(self, segment: _Segment) -> None:
        self._held -= segment.size
        self._free.setdefault(segment.size, []).append(segment)


def _give_back(pool: weakref.ref[Pool], segment: _Segment) -> None:
    """Called wherever the last view of a segment went, so nothing may wait here."""
    if (alive := pool()) is not None:
        alive._returned.append(segment)
        if alive._short:
            alive._ring()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name
