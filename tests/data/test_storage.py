from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import boto3
import fsspec
import pytest

from cogvideo_dist.config.schema import Remote
from cogvideo_dist.data.index import ABOUT, INDEX, Index, IndexWriter, Member, Record
from cogvideo_dist.data.remote import PIECE, STALL, without_secrets
from cogvideo_dist.data.storage import StorageError, Store, is_remote
from tests.data.servers import Fault, WebServer, s3_server, web_server

FIRST, SECOND = "shard-000000.tar", "deep/shard 000001.tar"
SHARDS = {FIRST: random.Random(0).randbytes(70_000), SECOND: random.Random(1).randbytes(50_000)}
HOSTILE = (
    "a b.tar",
    "a#b.tar",
    "a?b=c.tar",
    "a;b.tar",
    "a::b.tar",
    "a{0..1}b.tar",
    "a%20b.tar",
    "a&amp;b.tar",
    "a*[b]é'.tar",
)
PLACES = ("folder", "web", "web, whole", "web without ranges", "web refusing 416", "web refusing 501", "web, no sizes",
          "s3", "s3, whole", "memory")  # fmt: skip


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as server:
        server.files.update({f"/set/{name}": data for name, data in SHARDS.items()})
        yield server


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points S3's clients to an address."""

    def point(url: str) -> None:
        names = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
        for name, value in names.items():
            monkeypatch.setenv(f"AWS_{name}", value)

    return point


class Pauses(list[float]):
    """Stands in for sleep, and notes how long."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def store_of(
    root: str | Path,
    cache: Path,
    *,
    whole: bool = False,
    retries: int = 2,
    gigabytes: float = 1,
    pauses: Pauses | None = None,
) -> Store:
    remote = Remote(cache=str(cache / "cache"), whole_shards=whole, retries=retries, gigabytes=gigabytes)
    return Store(str(root), remote, sleep=Pauses() if pauses is None else pauses)


def read(store: Store, shard: str, offset: int, *, size: int, afresh: bool = False) -> bytes:
    out = bytearray(size)
    assert store.read_into(shard, offset, out=memoryview(out), afresh=afresh)
    return bytes(out)


def in_child(what: Callable[[], object]) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=what)
    process.start()
    return process


def put(url: str, bucket: str, files: dict[str, bytes]) -> str:
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=bucket)
    for name, data in files.items():
        client.put_object(Bucket=bucket, Key=f"some/set/{name}", Body=data)
    return f"s3://{bucket}/some/set"


def placed(
    place: str, files: dict[str, bytes], *, tmp_path: Path, stack: ExitStack, s3: str, aws: Callable[[str], None]
) -> Store:
    """A store of files that lie in a place of that kind."""
    kind, whole = place.removesuffix(", whole"), place.endswith("whole")
    if kind == "folder":
        for name, data in files.items():
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(data)
        return store_of(tmp_path / "set", tmp_path)
    if kind == "memory":
        system, root = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/set"
        for name, data in files.items():
            system.pipe_file(f"/{tmp_path.name}/set/{name}", data)
        return store_of(root, tmp_path)
    if kind == "s3":
        aws(s3)
        return store_of(put(s3, tmp_path.name.replace("_", "-").lower(), files), tmp_path, whole=whole)
    refuse = int(kind[-3:]) if "refusing" in kind else None
    server = stack.enter_context(web_server(ranges="without" not in kind, refuse=refuse, sizes="no sizes" not in kind))
    server.files.update({f"/set/{name}": data for name, data in files.items()})
    return store_of(f"{server.url}/set/", tmp_path, whole=whole)


@pytest.mark.parametrize("place", PLACES)
def test_the_bytes_are_the_same_wherever_they_are(
    place: str, tmp_path: Path, s3: str, aws: Callable[[str], None]
) -> None:
    with ExitStack() as stack:
        store = placed(place, SHARDS, tmp_path=tmp_path, stack=stack, s3=s3, aws=aws)
        assert store.list() == sorted(SHARDS)
        for name, data in SHARDS.items():
            assert store.size(name) == len(data)
            assert b"".join(store.stream(name)) == data
            for offset, size in ((0, 512), (12_345, 6_789), (len(data) - 10, 10), (0, len(data)), (5, 0)):
                assert read(store, name, offset, size=size) == data[offset : offset + size]
                assert read(store, name, offset, size=size, afresh=True) == data[offset : offset + size]
            assert not store.read_into(name, len(data) - 10, out=memoryview(bytearray(11)))
            assert not store.read_into(name, len(data) + 10, out=memoryview(bytearray(11)))


@pytest.mark.parametrize("place", ["folder", "web", "web, whole", "web without ranges", "s3", "s3, whole", "memory"])
def test_a_name_means_its_file_whatever_is_in_it(
    place: str, tmp_path: Path, s3: str, aws: Callable[[str], None]
) -> None:
    files = {name: name.encode() * 9 for name in HOSTILE}
    with ExitStack() as stack:
        store = placed(place, files, tmp_path=tmp_path, stack=stack, s3=s3, aws=aws)
        for name, data in files.items():
            assert read(store, name, 0, size=len(data)) == data
        assert store.list() == sorted(files)


def test_a_folders_name_means_that_folder(tmp_path: Path) -> None:
    for name in ("a::b", "x%20y#z?q=1", "{a,b}", "odd:/path"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / FIRST).write_bytes(b"here")
        assert read(store_of(folder, tmp_path), FIRST, 0, size=4) == b"here"
    assert not is_remote("/data/odd://name")


def test_what_a_library_would_mangle_is_refused_by_name(tmp_path: Path) -> None:
    for root in ("simplecache::s3://bucket/set", "zip::https://host/set.zip"):
        with pytest.raises(ValueError, match="without a chain of ::"):
            store_of(root, tmp_path)
    with pytest.raises(ValueError, match=r"stands for a version; rename it"):
        store_of("s3://bucket/set", tmp_path).size("a?versionId=7.tar")
    with pytest.raises(ValueError, match="nosuch"):
        store_of("nosuch://bucket/set", tmp_path).size(FIRST)


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs://bucket/set: .*pip install 'cogvideo_dist\[remote\]', for gs:// gcsfs"):
        store_of("gs://bucket/set", tmp_path).size(FIRST)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(web: WebServer, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere.*listing failed, try 1 of 3"):
        store_of(f"{web.url}/nowhere", tmp_path).list()


def test_only_the_bytes_of_a_member_are_asked_for(web: WebServer, tmp_path: Path) -> None:
    store = store_of(f"{web.url}/set", tmp_path)
    read(store, FIRST, 100, size=1000)
    read(store, FIRST, 5000, size=10)
    assert web.sent(f"/set/{FIRST}") == 1 + 1000 + 10, "one byte, to see that a part can be asked for"
    assert not (tmp_path / "cache").exists(), "and nothing is kept"


def test_what_is_larger_than_a_piece_is_put_together(web: WebServer, tmp_path: Path) -> None:
    web.files["/set/big.tar"] = data = random.Random(2).randbytes(64) * (2 * PIECE // 64) + b"the end"
    store = store_of(f"{web.url}/set", tmp_path)
    assert read(store, "big.tar", 3, size=len(data) - 3) == data[3:]
    assert b"".join(store.stream("big.tar")) == data


KINDS = ("web", "web, whole", "web without ranges", "s3", "s3, whole")


@contextmanager
def faulty(
    kind: str, cache: Path, *, aws: Callable[[str], None], stall: float = STALL
) -> Iterator[tuple[WebServer, Store, Pauses]]:
    """A server of the first shard. What S3 asks for is understood by a web server."""
    with web_server(ranges="without" not in kind) as server:
        folder, pauses = f"set{server.server_port}", Pauses()  # of its own: a process keeps one client for a root
        server.files[f"/{folder}/{FIRST}"] = SHARDS[FIRST]
        aws(server.url)
        root = f"{server.url}/{folder}" if kind.startswith("web") else f"s3://{folder}"
        remote = Remote(cache=str(cache / "cache"), whole_shards=kind.endswith("whole"))
        yield server, Store(root, remote, sleep=pauses, stall=stall), pauses


@pytest.mark.parametrize("fault", ["cut", "error", "short"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_may_pass_is_tried_again(kind: str, fault: Fault, tmp_path: Path, aws: Callable[[str], None]) -> None:
    with faulty(kind, tmp_path, aws=aws) as (server, store, pauses):
        server.faults.extend([fault, fault])
        assert read(store, FIRST, 1000, size=60_000) == SHARDS[FIRST][1000:61_000]
        assert len(pauses) == 2 and 0.5 <= pauses[0] < pauses[1] <= 1.5
        server.faults.append(fault)
        assert b"".join(store.stream(FIRST)) == SHARDS[FIRST] and len(pauses) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_server_is_asked_again_for_a_files_size(kind: str, tmp_path: Path, aws: Callable[[str], None]) -> None:
    with faulty(kind, tmp_path, aws=aws) as (server, store, pauses):
        server.busy = 3
        assert store.size(FIRST) == len(SHARDS[FIRST])
        assert pauses and not server.busy


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_falls_silent_is_left(kind: str, tmp_path: Path, aws: Callable[[str], None]) -> None:
    with faulty(kind, tmp_path, aws=aws, stall=0.5) as (server, store, pauses):
        server.faults.append("stall")
        assert read(store, FIRST, 1000, size=60_000) == SHARDS[FIRST][1000:61_000]
        assert pauses and not server.faults


@pytest.mark.parametrize("whole", [False, True])
def test_what_does_not_pass_is_an_error_that_tells_all_but_secrets(web: WebServer, tmp_path: Path, whole: bool) -> None:
    pauses = Pauses()
    root = f"{web.url.replace('//', '//user:secret@')}/set?token=hidden"
    store = store_of(root, tmp_path, whole=whole, retries=3, pauses=pauses)
    web.always = "cut"
    with pytest.raises(StorageError) as failure:
        read(store, FIRST, 1000, size=60_000)
    message = str(failure.value)
    for word in (
        f"{web.url}/set/{FIRST}",
        "try 4 of 4",
        *(["0"] if whole else ["60000 bytes at 1000"]),
        "ClientPayloadError",
    ):
        assert word in message
    assert not any(secret in message for secret in ("user", "secret", "token", "hidden"))
    assert len(pauses) == 3 and pauses == sorted(pauses)
    web.always = "error"
    with pytest.raises(StorageError, match="503") as failure:
        list(store.stream(FIRST))
    assert not any(secret in str(failure.value) for secret in ("user", "secret", "token", "hidden"))
    assert not list(tmp_path.rglob("*.partial"))


def test_secrets_are_cut_out_of_any_text() -> None:
    told = "404, url='https://me:p@ss@host/a.tar?sig=abc&x=1' and s3://key:word@bucket/x?y"
    assert without_secrets(told) == "404, url='https://host/a.tar' and s3://bucket/x"


@pytest.mark.parametrize("place", ["folder", "web", "web, whole", "web without ranges", "s3", "s3, whole", "memory"])
def test_a_shard_that_is_not_there_is_not_asked_for_again(
    place: str, tmp_path: Path, s3: str, aws: Callable[[str], None]
) -> None:
    with ExitStack() as stack:
        store = placed(place, SHARDS, tmp_path=tmp_path, stack=stack, s3=s3, aws=aws)
        with pytest.raises(StorageError, match=r"lost\.tar: .* failed, try 1 of 3; FileNotFoundError") as failure:
            read(store, "lost.tar", 0, size=1)
        assert failure.value.missing


def test_a_disk_that_fails_once_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(SHARDS[FIRST])
    shard = tmp_path / FIRST
    shard.symlink_to("/proc/self/mem")  # whose first bytes are an input/output error

    class Repair(Pauses):
        def __call__(self, seconds: float) -> None:
            super().__call__(seconds)
            if len(self) == 2:
                shard.unlink()
                shard.symlink_to("good")

    pauses = Repair()
    store = store_of(tmp_path, tmp_path, retries=2, pauses=pauses)
    assert read(store, FIRST, 10, size=100) == SHARDS[FIRST][10:110]
    assert len(pauses) == 2
    (tmp_path / "bad.tar").symlink_to("/proc/self/mem")
    with pytest.raises(
        StorageError, match=r"bad\.tar: reading 100 bytes at 10 failed, try 3 of 3; OSError.*Input/output"
    ):
        read(store_of(tmp_path, tmp_path), "bad.tar", 10, size=100)


def test_a_server_without_ranges_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with web_server(ranges=False) as server, caplog.at_level(logging.WARNING):
        server.files.update({f"/set/{name}": data for name, data in SHARDS.items()})
        store = store_of(f"{server.url}/set", tmp_path)
        for name, data in SHARDS.items():
            for offset in (0, 100, 200):
                assert read(store, name, offset, size=10) == data[offset : offset + 10]
        assert [record.getMessage() for record in caplog.records] == [
            f"{server.url}/set: this server sends no parts of files; every shard that is read is fetched whole, and kept in "
            f"{tmp_path / 'cache'}"
        ]


def test_threads_and_children_may_use_what_their_process_has_used(web: WebServer, tmp_path: Path) -> None:
    stores = [store_of(f"{web.url}/set", tmp_path, whole=whole) for whole in (False, True)]

    def right(number: int) -> bool:
        name, offset = (FIRST, SECOND)[number % 2], 37 * number
        return read(stores[number // 2 % 2], name, offset, size=500) == SHARDS[name][offset : offset + 500]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(right, range(200)))
    children = [in_child(lambda: sys.exit(not all(map(right, range(20))))) for _ in range(2)]
    assert all(map(right, range(20)))
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert all(map(right, range(20)))


def test_processes_of_a_machine_fetch_a_shard_once(web: WebServer, tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork").Barrier(4)

    def fetch() -> None:
        store = store_of(f"{web.url}/set", tmp_path, whole=True)
        start.wait(20)
        sys.exit(any(read(store, name, 5, size=1000) != data[5:1005] for name, data in SHARDS.items()))

    children = [in_child(fetch) for _ in range(4)]
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    for name, data in SHARDS.items():
        bodies = [request for request in web.requests if request.path == f"/set/{name}" and request.sent > 1]
        assert [request.sent for request in bodies] == [len(data)]


@pytest.mark.parametrize("again", [FIRST, SECOND])
def test_a_process_that_is_killed_leaves_neither_lock_nor_pieces(web: WebServer, tmp_path: Path, again: str) -> None:
    web.faults.append("stall")
    remote = Remote(cache=str(tmp_path / "cache"), whole_shards=True)
    child = in_child(lambda: read(Store(f"{web.url}/set", remote), FIRST, 0, size=1))
    deadline = time.monotonic() + 20
    while not any(request.sent > 1 for request in list(web.requests)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.rglob("*.partial")), "it is in the middle"
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(20)
    store = store_of(f"{web.url}/set", tmp_path, whole=True)
    assert read(store, again, 0, size=100) == SHARDS[again][:100]
    assert not list(tmp_path.rglob("*.partial"))


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path: Path) -> None:
    files = {f"{number}.tar": random.Random(number).randbytes(40_000) for number in range(6)}
    with web_server() as server:
        server.files.update({f"/set/{name}": data for name, data in files.items()})

        def use(name: str) -> None:
            store = store_of(f"{server.url}/set", tmp_path, whole=True, gigabytes=100_000 / 1e9)
            assert read(store, name, 7, size=99) == files[name][7:106]
            assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.*")) <= 100_000

        for name in ("0.tar", "1.tar", "0.tar", "2.tar", "0.tar", "3.tar", "0.tar"):
            use(name)
        fetched = [request.path for request in server.requests if request.sent > 1]
        assert fetched == [f"/set/{name}.tar" for name in (0, 1, 2, 3)]
        use("1.tar")
        assert server.sent("/set/1.tar") > 80_000, "it had to go, and is fetched again"


def test_a_shard_that_was_deleted_while_open_is_still_read(web: WebServer, tmp_path: Path) -> None:
    store = store_of(f"{web.url}/set", tmp_path, whole=True)
    read(store, FIRST, 0, size=1)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    assert read(store, FIRST, 7, size=1000) == SHARDS[FIRST][7:1007]
    assert web.sent(f"/set/{FIRST}") <= len(SHARDS[FIRST]) + 1


def test_files_that_others_have_deleted_take_no_room_for_long(tmp_path: Path) -> None:
    files = {f"{number}.tar": random.Random(number).randbytes(40_000) for number in range(6)}
    with web_server() as server:
        server.files.update({f"/set/{name}": data for name, data in files.items()})
        store = store_of(f"{server.url}/set", tmp_path, whole=True, gigabytes=100_000 / 1e9)
        for name in files:
            read(store, name, 0, size=10)
        links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert not [link for link in links if str(tmp_path) in link and link.endswith("(deleted)")]


def test_a_shard_that_has_no_room_is_named(web: WebServer, tmp_path: Path) -> None:
    store = store_of(f"{web.url}/set", tmp_path, whole=True, gigabytes=1e-5)
    with pytest.raises(ValueError, match="data.remote.gigabytes is 1e-05, less than a shard of 7e-05 GB"):
        read(store, FIRST, 0, size=1)


@pytest.mark.parametrize("whole", [False, True])
def test_a_shard_that_has_changed_is_not_mistaken(web: WebServer, tmp_path: Path, whole: bool) -> None:
    root = f"{web.url}/set"
    assert read(store_of(root, tmp_path, whole=whole), FIRST, 0, size=100) == SHARDS[FIRST][:100]
    web.files[f"/set/{FIRST}"] = changed = SHARDS[FIRST][::-1]
    assert read(store_of(root, tmp_path, whole=whole), FIRST, 0, size=100) == changed[:100]


def test_a_copy_in_doubt_is_fetched_again_but_only_once(web: WebServer, tmp_path: Path) -> None:
    store = store_of(f"{web.url}/set", tmp_path, whole=True)
    web.faults.append("flip")
    whole = len(SHARDS[FIRST])
    assert read(store, FIRST, 0, size=whole) != SHARDS[FIRST]
    assert read(store, FIRST, 0, size=whole, afresh=True) == SHARDS[FIRST]
    for _ in range(3):
        assert read(store, FIRST, 0, size=whole, afresh=True) == SHARDS[FIRST]
    assert web.sent(f"/set/{FIRST}") == 2 * whole + 1


def write_index(web: WebServer, folder: Path, count: int) -> None:
    """An index of that many samples, on the server."""
    writer = IndexWriter()
    for number in range(count):
        members = {"mp4": Member(512, 100, "0" * 32)}
        writer.add(Record(f"key{number}", "source", FIRST, "video", members, 9, 8.0, 16, 16, 5))
    folder.mkdir(exist_ok=True)
    writer.write(folder)
    web.files.update({f"/set/{name}": (folder / name).read_bytes() for name in (INDEX, ABOUT)})


def test_an_index_is_fetched_when_it_has_changed(web: WebServer, tmp_path: Path) -> None:
    root = f"{web.url}/set"
    write_index(web, tmp_path / "index", 3)
    first = store_of(root, tmp_path).local_index()
    assert len(Index.read(first)) == 3
    size = len(web.files[f"/set/{INDEX}"])
    assert store_of(root, tmp_path).local_index() == first and web.sent(f"/set/{INDEX}") == size
    (first / INDEX).write_bytes(b"damaged")
    assert len(Index.read(store_of(root, tmp_path).local_index())) == 3 and web.sent(f"/set/{INDEX}") == 2 * size
    write_index(web, tmp_path / "index", 5)
    assert len(Index.read(store_of(root, tmp_path).local_index())) == 5
    assert len(Index.read(first)) == 3, "who reads the old one is not disturbed"


def test_an_index_that_cannot_be_used_is_named(web: WebServer, tmp_path: Path) -> None:
    store = store_of(f"{web.url}/set", tmp_path)
    with pytest.raises(ValueError, match=r"set has no index .* data_tools/index_shards\.py"):
        store.local_index()
    web.files[f"/set/{ABOUT}"] = b"<html>"
    with pytest.raises(ValueError, match=r"index\.json is no index of this package"):
        store.local_index()
    write_index(web, tmp_path / "index", 2)
    web.files[f"/set/{INDEX}"] += b"!"
    with pytest.raises(ValueError, match=r"index\.arrow is not what index\.json beside it describes"):
        store.local_index()
    del web.files[f"/set/{INDEX}"]
    with pytest.raises(ValueError, match="has no index"):
        store.local_index()


def test_a_worker_need_not_load_torch() -> None:
    program = (
        "import sys, cogvideo_dist.data.storage; sys.exit(bool({'torch', 'fsspec', 'aiohttp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 0
