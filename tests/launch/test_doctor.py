"""launch/doctor.py: every check fails where its fault is, and nothing that hangs or raises ends the others."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import doctor_device, doctor_files, doctor_kernels, doctor_versions, plan
from launch.doctor_board import Board, Meeting, joined
from launch.doctor_check import Finding, amount, examined, ranges
from launch.doctor_report import arguments, merged, plan_of, rows, table
from launch.plan_cluster import REACHED
from tests.launch.world import World
from tests.ranks import free_port

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


def test_a_check_that_raises_is_a_finding_with_its_place() -> None:
    def check() -> list[Finding]:
        raise KeyError("nothing")

    (found,) = examined("x", check, limit_s=10)
    assert (found.status, found.found) == ("fail", "KeyError: 'nothing'")
    assert "test_doctor.py:" in found.remedy


def test_a_check_that_hangs_is_named_with_its_place_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def check() -> list[Finding]:
        pipe.read_text()  # nobody writes
        return []

    begun = time.monotonic()
    (found,) = examined("x", check, limit_s=0.2)
    assert time.monotonic() - begun < 20
    assert found.status == "fail"
    assert "no answer in 0.2 s" in found.found
    assert "pipe.read_text()" in found.found
    pipe.open("w").close()  # let it go


def test_a_kernel_with_wrong_numbers_fails() -> None:
    backend = doctor_kernels.backend_for("cpu", device=CPU, dtype=torch.float32)
    assert doctor_kernels.attention("cpu", CPU, backend=backend)[0].status == "pass"

    class Broken:
        """One gradient is a thousandth too large."""

        attend = staticmethod(backend.attend)

        @staticmethod
        def attend_backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
            d_q, d_k, d_v = backend.attend_backward(*arguments, **named)
            return d_q, d_k * 1.001, d_v

    (found,) = doctor_kernels.attention("cpu", CPU, backend=Broken())  # type: ignore[arg-type]
    assert found.status == "fail"
    assert "wrong numbers: float32 off by" in found.found


def test_a_kernel_that_gives_no_numbers_fails() -> None:
    assert doctor_kernels.triton(CPU, lambda x, scale: x * scale + x)[0].status == "pass"
    assert doctor_kernels.triton(CPU, lambda x, scale: x * scale)[0].status == "fail"
    assert doctor_kernels.triton(CPU, lambda x, scale: x * float("nan"))[0].status == "fail"


def test_what_needs_a_gpu_is_skipped_without_one_and_never_passes() -> None:
    for name in ("efficient", "cudnn", "flash", "varlen", "flex"):
        (found,) = doctor_kernels.attention(name, CPU)
        assert (found.status, found.found) == ("skipped", "no GPU")
    assert doctor_kernels.triton(CPU)[0].status == "skipped"


TRITON = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from launch import doctor_kernels, doctor_triton

import os
if os.environ.get("TRITON_INTERPRET"):
    print(doctor_kernels.triton(torch.device("cpu"), doctor_triton.affine)[0].status)
else:
    types = {"x": "*bf16", "scale": "*bf16", "y": "*bf16", "count": "i32"}
    print("ptx" in compile(ASTSource(doctor_triton._affine, types), target=GPUTarget("cuda", 90, 32)).asm)
"""


@pytest.mark.parametrize(
    ("variables", "said"), [pytest.param({"TRITON_INTERPRET": "1"}, "pass", marks=pytest.mark.long), ({}, "True")]
)
def test_the_triton_kernel_is_right_when_interpreted_and_compiles_for_a_gpu(
    variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="torch on CPUs alone has no Triton (pip install triton)")
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    file = tmp_path / "program.py"
    file.write_text(TRITON)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, timeout=200)
    assert done.stdout.strip() == said, done.stderr


def test_a_kernel_that_ends_its_process_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (found,) = doctor_kernels.in_a_child(CPU, limit_s=60)
    assert found.status == "fail"
    assert "ended with code 1" in found.found


def test_a_device_that_computes_wrong_numbers_fails() -> None:
    def ill(a: Tensor, b: Tensor) -> Tensor:
        c = a @ b
        c[-1, 7] += 1.0
        return c

    assert statuses(doctor_device.products(CPU, size=64, peak_tflops=None))["device: arithmetic"] == "pass"
    assert statuses(doctor_device.products(CPU, size=64, peak_tflops=None, product=ill))["device: arithmetic"] == "fail"


def test_a_gpu_is_judged_by_its_peak() -> None:
    for flops, status in ((700e12, "pass"), (500e12, "warn"), (200e12, "fail")):
        found = doctor_device.fast(flops, device=torch.device("cuda"), peak_tflops=989)
        assert found.status == status


@pytest.mark.parametrize(
    ("row", "status", "said"),
    [
        (["GPU-x", "0", "0x0000000000000004", "55"], "pass", "no uncorrected errors, 55 C"),
        (["GPU-x", "3", "0x0000000000000000", "55"], "fail", "3 uncorrected errors of memory, 55 C"),
        (["GPU-x", "0", "0x0000000000000048", "92"], "warn", "held down: hardware slowdown, heat (hardware), 92 C"),
        (["GPU-x", "[N/A]", "[N/A]", "[N/A]"], "pass", "errors are not counted"),
    ],
)
def test_what_nvidia_smi_says_is_judged(row: list[str], status: str, said: str) -> None:
    found = doctor_device.well(doctor_device.told_of(row))
    assert found.status == status
    assert said in found.found


def test_what_is_installed_is_compared_with_what_is_pinned(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    torch_version = torch.__version__.split("+")[0]
    file.write_text(f'torch=={torch_version}\nnot-there==1.0\nnumpy==0.0.1 ; python_version < "3.4"\n')
    assert doctor_versions.pinned(file)[0].status == "pass"
    file.write_text('torch==0.0.1 ; python_version >= "3.4"\n')
    (found,) = doctor_versions.pinned(file)
    assert found.status == "warn"
    assert f"torch {doctor_versions.installed('torch')} (not 0.0.1)" in found.found


def test_every_line_of_the_projects_pins_is_understood() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not doctor_versions.PIN.match(line)] == []


def test_ranks_with_other_versions_or_code_are_shown_in_a_table() -> None:
    alike = {"versions": {"torch": "2.15.0", "nccl": "2.27"}, "code": {"a.py": "1"}, "environment": {}}
    other = {**alike, "versions": {"torch": "2.11.0", "nccl": "2.27"}}
    hosts = {0: "a", 1: "a", 2: "b"}
    found = doctor_versions.equal({0: alike, 1: alike, 2: other}, hosts)
    assert statuses(found) == {"versions: equal": "fail", "code: equal": "pass", "environment: equal": "pass"}
    assert found[0].details == ("ranks      hosts  torch", "ranks 0-1  a      2.15.0", "rank 2     b      2.11.0")


def test_a_folder_that_cannot_be_written_into_fails(tmp_path: Path) -> None:
    assert doctor_files.writable(tmp_path / "not" / "yet")[0].status == "pass"
    assert list(tmp_path.iterdir()) == []  # and nothing is left there
    (tmp_path / "file").touch()
    assert doctor_files.writable(tmp_path / "file")[0].status == "fail"
    (found,) = doctor_files.writable(Path("/proc/run"))  # not even for root
    assert found.status == "fail"
    assert "nothing can be written into /proc" in found.found


@pytest.fixture
def small_files() -> Iterator[None]:
    """This process may write files of 4 kB at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_bytes_fails(tmp_path: Path, small_files: None) -> None:
    (found,) = examined("files: writing", lambda: doctor_files.written(tmp_path, 1 << 20), limit_s=60)
    assert found.status == "fail"
    assert os.strerror(errno.EFBIG) in found.found
    assert list(tmp_path.iterdir()) == []


def test_room_is_measured_against_checkpoints(tmp_path: Path) -> None:
    assert doctor_files.room(tmp_path, None)[0].status == "pass"
    assert doctor_files.room(tmp_path, 1e3)[0].status == "pass"
    assert doctor_files.room(tmp_path, 1e18)[0].status == "fail"
    free = doctor_files.room(tmp_path, None)[0].figures["free_bytes"]
    assert doctor_files.room(tmp_path, free / 2, keep=3)[0].status == "warn"


def test_locks_that_keep_nobody_out_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_files.locked(tmp_path)[0].status == "pass"
    monkeypatch.setattr(doctor_files.fcntl, "flock", lambda *_: None)  # as nolock mounts have it
    assert doctor_files.locked(tmp_path)[0].status == "warn"

    def without(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(doctor_files.fcntl, "flock", without)
    assert "No locks available" in doctor_files.locked(tmp_path)[0].found


def test_shards_are_read(world: World, tmp_path: Path) -> None:
    data = world.config(tmp_path).data
    (found,) = doctor_files.shards(data, 1 << 20)
    assert found.status == "pass"
    assert found.figures["read_bytes_per_s"] > 0
    missing = world.config(tmp_path, f"data.shards={tmp_path}").data
    assert examined("files: shards", lambda: doctor_files.shards(missing, 1 << 20), limit_s=60)[0].status == "fail"


def in_threads(world: int, work: Callable[[int, Board], Any], *, alone: bool = True) -> dict[int, Any]:
    """``work`` on ranks that are threads and meet over sockets; those above 0 that raise have no answer."""
    address, found = f"127.0.0.1:{free_port()}", {}
    done = threading.Event()

    def run(rank: int) -> None:
        try:
            with joined(Meeting(rank, world, address, "token", alone), within_s=60) as board:
                found[rank] = work(rank, board)
                if rank == 0:
                    done.wait(60)
        except OSError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join(60)
    done.set()
    threads[0].join(60)
    return found


def test_a_value_reaches_every_rank_and_what_nobody_says_is_none() -> None:
    def work(rank: int, board: Board) -> Any:
        if rank == 1:
            board.put("word", {"of": [1, 2.5, "x\n"]})
        return board.get("word", within_s=60), board.get("nothing", within_s=0.01)

    assert set(map(str, in_threads(3, work).values())) == {"({'of': [1, 2.5, 'x\\n']}, None)"}


def test_those_who_do_not_come_are_named_to_all_alike() -> None:
    def work(rank: int, board: Board) -> list[int]:
        if rank == 2:
            return []
        return board.meet("here", within_s=60)  # rank 2 has left: it is not waited for

    begun = time.monotonic()
    assert in_threads(3, work) == {0: [2], 1: [2], 2: []}
    assert time.monotonic() - begun < 50


def test_a_silent_rank_is_waited_for_no_longer_than_asked() -> None:
    def work(rank: int, board: Board) -> list[int]:
        if rank == 1:
            board.get("end", within_s=60)
            return board.meet("here", within_s=60)
        missing = board.meet("here", within_s=0.1)
        assert board.meet("there", within_s=1e6) == [1]  # whoever did not come once is not waited for again
        board.put("end", True)
        return missing

    assert in_threads(2, work) == {0: [1], 1: [1]}  # it comes too late, and is told so


def test_a_stranger_is_not_heard() -> None:
    address = f"127.0.0.1:{free_port()}"
    with joined(Meeting(0, 2, address, "token", True), within_s=5) as board:
        with pytest.raises(TimeoutError, match="did not reach the first rank"):  # noqa: SIM117
            with joined(Meeting(1, 2, address, "another", True), within_s=1.0):
                pass
        assert board.meet("here", within_s=0.01) == [1]


def test_the_worst_rank_speaks_for_all() -> None:
    hosts = {0: "a", 1: "b", 2: "c"}
    good, bad = Finding("x", "pass", "fine"), Finding("x", "fail", "broken", "whole", "mend it")
    assert merged({0: good, 1: good}, hosts) == good
    found = merged({0: good, 1: bad, 2: Finding("x", "skipped", "no GPU")}, hosts)
    assert (found.status, found.found, found.remedy) == ("fail", "rank 1 (b): broken", "mend it")


def test_a_slow_rank_is_named() -> None:
    hosts = {0: "a", 1: "b", 2: "c"}
    rates = {rank: Finding("x", "pass", f"{v:g}", figures={"flop_per_s": v}) for rank, v in enumerate((9.0, 4.0, 10.0))}
    found = merged(rates, hosts)
    assert found.status == "warn"
    assert "rank 1 (b) is 2.5 times as slow as rank 2 (c)" in found.found
    even = {rank: Finding("x", "pass", f"{v:g}", figures={"flop_per_s": v}) for rank, v in enumerate((9.0, 8.0, 10.0))}
    assert merged(even, hosts).status == "pass"


def test_the_table_says_what_to_do_about_what_is_wrong_alone() -> None:
    found = rows(
        {0: [Finding("a", "pass", "fine", "whole"), Finding("bc", "fail", "bro\x1bken", "whole", "mend it")]}, {0: "h"}
    )
    assert table(found).splitlines() == [
        "pass     a   fine",
        "fail     bc  bro?ken",
        "             expected  whole",
        "             remedy    mend it",
        "",
        "1 pass, 0 warn, 1 fail, 0 skipped: do not start before this is mended: bc",
    ]


def test_what_was_measured_is_what_plan_takes() -> None:
    """plan reckons with REACHED of a rate; of a ring over nodes all cards of a node carry a part."""
    bus = {"ulysses": (360e9, 1.0, 8.0), "world": (320e9, 2.0, 16.0)}
    links = [
        Finding(f"links: {axis}", "pass", "", figures={"sum_bus_bytes_per_s": value, "nodes": nodes, "ranks": ranks})
        for axis, (value, nodes, ranks) in bus.items()
    ]
    memory = Finding("device: memory", "pass", "", figures={"total_bytes": 141e9})
    options = plan_of(rows({0: [memory, *links], 1: [memory]}, {0: "a", 1: "a"}), nodes=2, ranks=8)
    assert options is not None
    cluster = plan.cluster_of(plan.parser().parse_args(["--config", "x.yaml", *arguments(options).split()]))
    assert (cluster.nodes, cluster.gpus_per_node, cluster.memory) == (2, 8, 141e9)
    assert REACHED * cluster.link == pytest.approx(360e9)
    assert REACHED * cluster.network * 8 == pytest.approx(320e9)
    assert plan_of(rows({0: links}, {0: "a"}), nodes=2, ranks=8) is None  # no GPUs, no plan


def test_numbers_are_short() -> None:
    assert [amount(v) for v in (12, 1234, 999.6e6, 1.5e9)] == ["12 bytes", "1.23 kB", "1 GB", "1.5 GB"]
    assert ranges([3, 0, 1, 5, 2]) == "0-3, 5"
