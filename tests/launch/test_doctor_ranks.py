"""launch/doctor.py over several ranks: links, shared folders, what differs between ranks, and ranks that hang or are lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_dist.parallel.mesh import ParallelMesh, Place, build_mesh
from launch import doctor, doctor_device, doctor_files, doctor_links, doctor_versions
from launch.doctor_board import Meeting, joined
from launch.doctor_links import Measured, Nominal, Sizes, judge, pairs, rounds
from tests.launch.commands import environment
from tests.launch.world import World, outcome
from tests.ranks import free_port, run_ranks

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SMALL = Sizes(message=1 << 16, repeats=2, small=2)


def silent(_: str) -> None:
    """Nothing is shown."""


def links(
    mesh: ParallelMesh, *, limit_s: float = 60.0, sizes: Sizes = SMALL
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    found, seconds = doctor_links.links(
        mesh, device=CPU, sizes=sizes, nominal=Nominal(), node=1, say=silent, limit_s=limit_s
    )
    return [{"check": each.check, "status": each.status, "found": each.found} for each in found], seconds


def every_axis(mesh: ParallelMesh) -> list[str]:
    layout = doctor_links.layout_of(None, Place(mesh.world.rank, 4, mesh.world.rank % 2, node=2))
    found, seconds = links(build_mesh(layout, rank=mesh.world.rank))
    assert all(each["status"] == "pass" for each in found), found
    assert all(value > 0 for each in seconds.values() for value in each.values())
    return [each["check"] for each in found] + sorted(pair for each in seconds.values() for pair in each)


def test_links_within_and_between_nodes_and_of_everyone_are_measured() -> None:
    """Two nodes of two ranks: 0 and 1, 2 and 3 share a node; 0 and 2, 1 and 3 have the same number on theirs."""
    axes = ["links: dp", "links: ulysses", "links: world"]
    assert run_ranks(every_axis, 4)[1] == [*axes, "0-1", "0-1", "1-2", "1-3"]


def hanging_axis(mesh: ParallelMesh) -> list[dict[str, str]]:
    if mesh.world.rank == 1:
        time.sleep(2.0)  # in no collective
        return []
    return links(mesh, limit_s=0.5)[0]


def test_a_link_that_does_not_answer_is_named_within_its_limit() -> None:
    (found,) = run_ranks(hanging_axis, 2)[0]
    assert (found["check"], found["status"]) == ("links: dp", "fail")
    assert "no answer in 0.5 s, it is at " in found["found"]


def slow_rank(mesh: ParallelMesh) -> dict[str, float]:
    if mesh.world.rank == 2:
        real = doctor_links.shift

        def slow(*arguments: Any, **named: Any) -> Any:
            time.sleep(0.3)
            return real(*arguments, **named)

        doctor_links.shift = slow  # type: ignore[assignment]
    return links(mesh, sizes=SMALL._replace(repeats=1))[1]["dp"]


def test_the_slowest_pair_is_named() -> None:
    seconds: dict[str, float] = {}
    for each in run_ranks(slow_rank, 3):
        seconds |= {pair: max(value, seconds.get(pair, 0.0)) for pair, value in each.items()}
    assert seconds.keys() == {"0-1", "1-2", "2-0"}
    assert seconds["0-1"] < 0.15 < min(seconds["1-2"], seconds["2-0"])
    (found,) = pairs({"dp": seconds}, node=8, hosts=dict.fromkeys(range(3), "h"))
    assert found.status == "warn"
    assert "rank 2 (h)" in found.found


def test_pairs_are_compared_with_their_like() -> None:
    hosts = {rank: f"n{rank // 2}" for rank in range(4)}
    alike = {"world": {"0-1": 1.0, "1-2": 9.0, "2-3": 1.1, "3-0": 9.5}}  # the network is slower than a node
    assert pairs(alike, node=2, hosts=hosts)[0].status == "pass"
    one = {"world": {**alike["world"], "3-0": 30.0}}
    (found,) = pairs(one, node=2, hosts=hosts)
    assert found.found == "world: rank 3 (n1) and rank 0 (n0) take 3.3 times as long as the fastest pair"


@pytest.mark.parametrize("size", range(2, 10))
def test_in_a_round_nobody_has_two_partners_and_all_neighbours_meet(size: int) -> None:
    found = rounds(size)
    for each in found:
        places = [place for pair in each for place in pair]
        assert len(places) == len(set(places))
    met = {frozenset(pair) for each in found for pair in each}
    assert met == {frozenset((place, (place + 1) % size)) for place in range(size)}


def test_a_link_is_judged_by_what_its_data_sheet_says() -> None:
    found = Measured("dp", (0, 1), message=100, latency=1e-5, reduced=1.0, exchanged=1.0, shifted=1.0)
    assert judge(found, nominal=Nominal(), node=2).status == "pass"
    assert judge(found, nominal=Nominal(link=200, network=1e12), node=2).status == "pass"
    assert judge(found, nominal=Nominal(link=300), node=2).status == "warn"
    assert judge(found, nominal=Nominal(link=1, network=300), node=1).status == "warn"


def test_bandwidths_are_those_of_nccls_tests() -> None:
    rates = Measured("dp", (0, 1, 2, 3), 100, latency=1.0, reduced=2.0, exchanged=4.0, shifted=5.0).rates()
    assert rates == {
        "sum_algorithm_bytes_per_s": 50.0, "sum_bus_bytes_per_s": 75.0, "all_to_all_algorithm_bytes_per_s": 25.0,
        "all_to_all_bus_bytes_per_s": 18.75, "neighbour_bytes_per_s": 20.0,
    }  # fmt: skip


def shared(mesh: ParallelMesh, address: str, folders: list[str]) -> dict[str, tuple[str, str]]:
    rank = mesh.world.rank
    doctor_files.VISIBLE_S = 1.0
    with joined(Meeting(rank, 2, address, "token", True), within_s=60) as board:
        marker = doctor_files.Marker(Path(folders[rank]), ".doctor-x", board, rank == 0, rank == 1)
        found = {each.check: (each.status, each.found) for each in doctor_files.shared(marker)}
        board.meet("end", within_s=60)
        return found


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("one", "one"), {"files: shared": "pass", "files: locks of other nodes": "pass"}),
        (("one", "another"), {"files: shared": "fail"}),
    ],
)
def test_a_rename_and_a_lock_of_one_node_hold_for_another(
    folders: tuple[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(exist_ok=True)
    places = [str(tmp_path / folder) for folder in folders]
    found = run_ranks(shared, 2, f"127.0.0.1:{free_port()}", places)[1]
    assert {check: status for check, (status, _) in found.items()} == expected
    assert not [path for folder in folders for path in (tmp_path / folder).iterdir()]


def nothing(rank: int, folder: Path) -> None:
    """No fault."""


def differing(rank: int, folder: Path) -> None:
    """Another torch, a stale copy of the code, a wrong clock, a device that takes longer."""
    if rank == 1:
        versions, code, clock, waits = doctor_versions.versions, doctor_versions.code, time.time, doctor_device.wait_for
        doctor_versions.versions = lambda: {**versions(), "torch": "1.0"}
        doctor_versions.code = lambda: {**code(), "launch/doctor.py": "0123"}
        time.time = lambda: clock() + 3
        doctor_device.wait_for = lambda device: (time.sleep(0.05), waits(device))[1]  # type: ignore[func-returns-value]


def hanging_file_system(rank: int, folder: Path) -> None:
    doctor.SHORT_S = 1.0
    if rank == 1:
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        doctor_versions.code = lambda: {"a": pipe.read_text()}


def lost_rank(rank: int, folder: Path) -> None:
    doctor.KERNELS_S = doctor.LONG_S = 10.0
    if rank == 1:

        def leave(_: Any) -> None:
            raise ConnectionError("gone")

        doctor.rates = leave


Fault = Callable[[int, Path], None]


def whole(mesh: ParallelMesh, address: str, folder: str, fault: Fault) -> tuple[int, str]:
    """The command on forked ranks, which have a process group already: its code and what it says. Each rank is a node."""
    rank = mesh.world.rank
    doctor_links.joined = lambda place, layout, *, device: build_mesh(layout, rank=place.rank)
    fault(rank, Path(folder))
    place = Place(rank, 2, 0, address, 1)
    asked = doctor.Asked(folder=Path(folder) / "run", quick=True, wait_s=60)
    said = StringIO()
    with ExitStack() as stack, redirect_stdout(said):
        board, met = doctor.meet(stack, place, asked=asked)
        try:
            code = doctor.examine(doctor.Rank(asked, place, CPU, board, silent, met), out=f"{folder}/doctor.json")
        except ConnectionError:
            code = 99
    return code, said.getvalue()


FAULTS: dict[str, tuple[Fault, int, tuple[str, ...]]] = {
    "none": (nothing, 0, ("pass     ranks: started", "pass     files: shared", "pass     links: dp", " 0 fail")),
    "differing": (
        differing,
        1,
        (
            "fail     versions: equal",
            "torch differs between ranks",
            "rank 1  ",
            "fail     code: equal",
            "launch/doctor.py differs between ranks",
            "warn     clocks: skew",
            "rank 1 (",
            ") is 3.00 s ahead of rank 0 (",
            "warn     device: copies",
            "times as slow as rank 0 (",
        ),
    ),
    "hang": (hanging_file_system, 1, ("fail     code  ", "no answer in 1 s", "pipe.read_text()")),
    "lost": (lost_rank, 1, ("fail     links  ", "rank 1 did not come", "rank 1 was last at: files: locks")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_rank_is_named_by_the_first(name: str, tmp_path: Path) -> None:
    fault, code, words = FAULTS[name]
    (found, said), other = run_ranks(whole, 2, f"127.0.0.1:{free_port()}", str(tmp_path), fault)
    assert [word for word in words if word not in said] == [], said
    assert found == code, said
    assert other[1] == ""  # the first rank alone prints
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert (written["code"], written["ranks"], written["plan"]) == (code, 2, None)
    checks = {each["check"]: each for each in written["findings"]}
    if name == "none":
        assert checks["links: dp"]["figures"]["1"]["sum_bus_bytes_per_s"] > 0
        assert not (tmp_path / "run").exists()


def absent(mesh: ParallelMesh, address: str) -> tuple[int, str]:
    """Two of three ranks."""
    place, said = Place(mesh.world.rank, 3, 0, address, 1), StringIO()
    asked = doctor.Asked(quick=True, wait_s=2)
    with ExitStack() as stack, redirect_stdout(said):
        board, met = doctor.meet(stack, place, asked=asked)
        return doctor.examine(doctor.Rank(asked, place, CPU, board, silent, met), out=None), said.getvalue()


def test_a_rank_that_does_not_start_is_named_and_waited_for_once() -> None:
    code, said = run_ranks(absent, 2, f"127.0.0.1:{free_port()}")[0]
    assert code == 1
    assert "fail     ranks: started" in said
    assert "rank 2 did not come" in said
    assert "rank 2 was last at: not there at all" in said
    assert "pass     code: equal" in said  # of those that are there


def run(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """(code, stdout, stderr) of the command as users start it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "doctor.py"), *arguments], capture_output=True, text=True, timeout=200,
        env={**environment(), **variables},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_checks_this_machine_for_a_run(world: World, tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    secret = {"AWS_SECRET_ACCESS_KEY": "hunter2", "NCCL_DEBUG": "TRACE"}
    arguments = ["--config", str(world.file), f"run.dir={tmp_path / 'run'}", "--json", str(out)]
    code, said, told = run(*arguments, **secret)
    assert code == 0, said + told
    for check in (
        "kernels: attention cpu",
        "kernels: transformer",
        "files: shards",
        "device: arithmetic",
        "code: equal",
    ):
        assert any(line.split("  ")[0] == "pass" and f" {check} " in line for line in said.splitlines()), said
    assert "warn     environment: settings" in said
    assert f"report: {out}" in said
    assert "hunter2" not in said + told + out.read_text()
    findings = {each["check"]: each for each in json.loads(out.read_text())["findings"]}
    assert findings["device: products"]["figures"]["0"]["flop_per_s"] > 0
    assert "checkpoints of" in findings["files: space"]["expected"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
    return outcome("doctor", doctor.main)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["--link", "-1"], "--link must be above 0"),
        (["--wait", "nan"], "--wait must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    code, _, told = command(monkeypatch, *arguments)
    assert code == 78
    assert said in told


def test_launchers_that_contradict_each_other_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said, _ = command(monkeypatch, "--quick")
    assert code == 1
    assert "fail     environment: launcher" in said
    assert "the environment sets WORLD_SIZE but not" in said


def test_a_layout_that_the_ranks_cannot_run_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path
) -> None:
    code, said, _ = command(monkeypatch, "--quick", "--config", str(world.file), f"run.dir={tmp_path}", "parallel.tp=2")
    assert code == 1
    assert "fail     configuration: layout" in said
