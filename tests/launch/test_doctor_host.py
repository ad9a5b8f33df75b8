"""Every check of the machine fails where its fault is there, and passes where it is not."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import time
from pathlib import Path

import pytest

from launch import doctor_host
from launch.doctor_check import Finding


def test_a_stale_lock_of_a_compiler_is_named_with_its_age(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    assert doctor_host.locks(tmp_path).status == "pass"
    lock.touch()
    assert doctor_host.locks(tmp_path).status == "warn"  # somebody may compile
    os.utime(lock, (time.time() - 4000, time.time() - 4000))
    found = doctor_host.locks(tmp_path)
    assert found.status == "fail"
    assert f"{lock}, 4,000 s old" in found.found
    assert f"rm {lock}" in found.remedy


def test_a_cache_that_everyone_can_write_to_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert [found.status for found in doctor_host.compiled(variables)] == ["pass", "pass"]
    tmp_path.chmod(0o777)
    found = doctor_host.compiled(variables)[0]
    assert found.status == "fail"
    assert "mode 777" in found.found


def test_an_occupied_port_fails_and_a_free_one_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        occupied = doctor_host.port(address, ours=True, nodes=1)[1]
        assert occupied.status == "fail"
        assert "in use" in occupied.found
        assert doctor_host.port(address, ours=False, nodes=1)[1].status == "pass"  # the launcher's own
    assert doctor_host.port(address, ours=True, nodes=1)[1].status == "pass"


def test_an_address_is_private_and_not_of_one_machine_alone() -> None:
    assert doctor_host.reachable("10.1.2.3", 2).status == "pass"
    assert doctor_host.reachable("127.0.0.1", 1).status == "pass"
    assert doctor_host.reachable("127.0.1.1", 2).status == "warn"
    assert doctor_host.reachable("8.8.8.8", 2).status == "warn"
    assert doctor_host.reachable("no.such.host.invalid", 2).status == "fail"


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "pass"),
        ("NCCL_SOCKET_IFNAME", "=eth", "fail"),
        ("NCCL_SOCKET_IFNAME", "=eth0", "pass"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", "pass"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", "fail"),
        ("NCCL_SOCKET_IFNAME", "ib", "fail"),
        ("GLOO_SOCKET_IFNAME", "eth0", "pass"),
        ("GLOO_SOCKET_IFNAME", "eth", "fail"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", "fail"),
    ],
)
def test_an_interface_is_named_as_nccl_and_gloo_read_it(variable: str, value: str, status: str) -> None:
    assert doctor_host.interfaces({variable: value}, ["lo", "eth0"]).status == status


def test_an_interface_of_this_machine_passes() -> None:
    name = socket.if_nameindex()[0][1]
    assert doctor_host.interfaces({"GLOO_SOCKET_IFNAME": name}).status == "pass"
    assert doctor_host.interfaces({"GLOO_SOCKET_IFNAME": "nothing0"}).status == "fail"


def test_leaked_buffers_are_those_that_no_process_has_mapped(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    leaked, used = (shared / f"deepspeed_allreduce_buffer_doctor_{os.getpid()}_{each}" for each in ("a", "b"))
    try:
        leaked.write_bytes(bytes(4096))
        used.write_bytes(bytes(4096))
        with used.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            found = doctor_host.left_behind()
        assert found.status == "warn"
        assert leaked.name in found.found
        assert used.name not in found.found
    finally:
        leaked.unlink()
        used.unlink()
    assert doctor_host.left_behind(tmp_path).status == "pass"


def test_shared_memory_is_measured_against_what_nccl_takes(tmp_path: Path) -> None:
    assert doctor_host.shared_memory(8, gpus=True, folder=tmp_path / "none")[0].status == "fail"
    assert doctor_host.shared_memory(10**9, gpus=True, folder=tmp_path)[0].status == "fail"
    assert doctor_host.shared_memory(10**9, gpus=False, folder=tmp_path)[0].status == "pass"


def test_few_open_files_fail() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert doctor_host.limits(gpus=False)[0].status == "fail"
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
        assert doctor_host.limits(gpus=False)[0].status == "warn"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_limits_of_a_control_group_are_read_in_both_versions(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    new, old = tmp_path / "new", tmp_path / "old"
    (new / "job" / "step").mkdir(parents=True)
    (new / "job" / "memory.max").write_text("3000\n")
    (new / "job" / "memory.current").write_text("1000\n")
    (new / "job" / "step" / "memory.max").write_text("max\n")
    (new / "job" / "step" / "cpu.max").write_text("150000 100000\n")
    own.write_text("0::/job/step\n")
    assert doctor_host.memory_limit(own, new) == 2000
    assert doctor_host.cpu_quota(own, new) == 1.5
    for controller in ("memory", "cpu,cpuacct"):
        (old / controller.split(",")[0] / "job").mkdir(parents=True)
    (old / "memory" / "job" / "memory.limit_in_bytes").write_text("5000\n")
    (old / "cpu" / "job" / "cpu.cfs_quota_us").write_text("50000\n")
    (old / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    own.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n")
    assert doctor_host.memory_limit(own, old) == 5000
    assert doctor_host.cpu_quota(own, old) == 0.5


def test_more_ranks_than_cpus_fail_and_too_few_for_workers_warn() -> None:
    cpus = len(os.sched_getaffinity(0))
    assert doctor_host.processors(100 * cpus, 0).status == "fail"
    assert doctor_host.processors(1, 1000).status == "warn"
    assert doctor_host.memory(1, 1e18).status == "warn"
    assert doctor_host.memory(1, 1.0).status == "pass"


def test_settings_that_slow_a_run_down_are_named_and_others_are_not() -> None:
    found = doctor_host.hurtful({"NCCL_DEBUG": "trace", "CUDA_LAUNCH_BLOCKING": "1"}, ranks=1)
    assert found.status == "warn"
    assert "NCCL_DEBUG=TRACE" in found.found
    assert "CUDA_LAUNCH_BLOCKING=1" in found.found
    assert doctor_host.hurtful({"NCCL_DEBUG": "WARN"}, ranks=1).status == "pass"
    assert "OMP_NUM_THREADS" in doctor_host.hurtful({}, ranks=8).found


def facts(*hosts: str, boot: str = "") -> dict[int, dict[str, str]]:
    return {rank: {"host": host, "boot": boot or host} for rank, host in enumerate(hosts)}


def test_nodes_have_names_of_their_own() -> None:
    assert doctor_host.same_machine(facts("a", "a", "b", "b"), 2).status == "pass"
    assert doctor_host.same_machine(facts("a", "b", "a", "b"), 2).status == "fail"  # dealt in turn
    assert doctor_host.same_machine(facts("a", "a", boot="x"), 1).status == "warn"  # two launchers on one machine
    twins = {0: {"host": "node", "boot": "x"}, 1: {"host": "node", "boot": "y"}}
    found = doctor_host.same_machine(twins, 1)
    assert found.status == "fail"
    assert "several machines" in found.found


def test_a_skewed_clock_is_named() -> None:
    hosts = {0: "a", 1: "b", 2: "c"}
    assert doctor_host.clocks({0: (0.0, 0.0), 1: (0.4, 1e-3), 2: (0.0, 1e-3)}, hosts).status == "pass"
    found: Finding = doctor_host.clocks({0: (0.0, 0.0), 1: (0.1, 1e-3), 2: (-0.6, 1e-3)}, hosts)
    assert found.status == "warn"
    assert found.found == "rank 1 (b) is 0.70 s ahead of rank 2 (c)"
    # what lies within the uncertainty of the measurement is no skew
    assert doctor_host.clocks({0: (0.0, 0.0), 1: (0.7, 0.3)}, {0: "a", 1: "b"}).status == "pass"
