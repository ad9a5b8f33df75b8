"""Which rank a process is: by every launcher's word, and not where two of them contradict each other."""

from __future__ import annotations

import os

import pytest

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.parallel.mesh import Place
from launch.environment import read_place, read_worker
from launch.slurm.place import first_host, port_of

READ = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_")


@pytest.fixture(autouse=True)
def _unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(READ)]:
        monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, object]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def torchrun(rank: int, *, world: int, node: int, name: str = "LOCAL_WORLD_SIZE") -> dict[str, object]:
    return {
        "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % node, name: node, "MASTER_ADDR": "head", "MASTER_PORT": 29500,
    }  # fmt: skip


def srun(rank: int, *, nodes: int, per_node: int) -> dict[str, object]:
    """As Slurm 22.05 says it; tests/launch/test_slurm_cluster.py asks Slurm itself."""
    each = f"{per_node}(x{nodes})" if nodes > 1 else str(per_node)
    names = f"gpu[003-{nodes + 2:03}]" if nodes > 1 else "gpu003"
    return {
        "SLURM_JOB_ID": 4711, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": nodes * per_node, "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node, "SLURM_STEP_TASKS_PER_NODE": each,
        "SLURM_STEP_NODELIST": names, "SLURM_NTASKS": nodes * per_node,
    }  # fmt: skip


BATCH: dict[str, object] = {
    "SLURM_JOB_ID": 4711,
    "SLURM_NTASKS": 4,
    "SLURM_PROCID": 0,
    "SLURM_LOCALID": 0,
    "SLURM_NODEID": 0,
}
"""What a batch script has: not a word that srun had started it."""

ADDRESS = f"gpu003:{port_of(4711, 0, step=0)}"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place()),
        (BATCH, Place()),
        (torchrun(5, world=8, node=4), Place(5, 8, 1, "head:29500", 4)),
        (torchrun(5, world=8, node=4, name="LOCAL_SIZE"), Place(5, 8, 1, "head:29500", 4)),
        (srun(0, nodes=1, per_node=1), Place()),
        ({**srun(0, nodes=1, per_node=1), "MASTER_ADDR": "ib0-head"}, Place()),
        (srun(5, nodes=2, per_node=4), Place(5, 8, 1, ADDRESS, 4)),
        (srun(1, nodes=2, per_node=1), Place(1, 2, 0, ADDRESS, 1)),
        ({**srun(1, nodes=2, per_node=1), "MASTER_ADDR": "ib0-head", "MASTER_PORT": 29500}, Place(1, 2, 0, "ib0-head:29500")),
        ({**srun(1, nodes=2, per_node=1), "SLURM_RESTART_COUNT": 1}, Place(1, 2, 0, f"gpu003:{port_of(4711, 1, step=0)}")),
        # one torchrun a node, whose ranks are numbered by itself
        ({**srun(1, nodes=2, per_node=1), **torchrun(2, world=8, node=4)}, Place(2, 8, 2, "head:29500", 4)),
        # srun's numbers, exported by hand as many scripts do
        ({**srun(3, nodes=2, per_node=2), "RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 9},
         Place(3, 4, 1, "a:9", 1)),
    ],
)  # fmt: skip
def test_every_launcher_is_understood(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, object], expected: Place
) -> None:
    put(monkeypatch, variables)
    assert read_place() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": 0}, "the environment sets RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"MASTER_ADDR": "head"}, "the environment sets MASTER_ADDR but not RANK"),
        (torchrun(8, world=8, node=4), "RANK 8 is not below WORLD_SIZE 8"),
        ({**torchrun(0, world=2, node=2), "LOCAL_RANK": 4}, "LOCAL_RANK 4 is not below WORLD_SIZE 2"),
        ({**torchrun(0, world=2, node=2), "MASTER_PORT": 99999}, "MASTER_ADDR 'head' and MASTER_PORT 99999 are no address"),
        ({**torchrun(0, world=2, node=2), "MASTER_ADDR": ""}, "MASTER_ADDR '' and MASTER_PORT 29500 are no address"),
        ({**torchrun(0, world=2, node=2), "RANK": "first"}, "RANK must be an integer, found 'first'"),
        ({**srun(1, nodes=2, per_node=1), "RANK": 1}, "sets RANK but not WORLD_SIZE"),
        ({**srun(1, nodes=2, per_node=1), **torchrun(0, world=1, node=1)}, "WORLD_SIZE 1 does not divide over SLURM_STEP_NUM"),
        (
            {**srun(1, nodes=2, per_node=1), "RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 9},
            "RANK 0, WORLD_SIZE 2 and LOCAL_RANK 0 contradict SLURM_PROCID 1, SLURM_STEP_NUM_TASKS 2 and SLURM_LOCALID 0",
        ),
        ({"SLURM_STEP_NUM_TASKS": 4}, "sets SLURM_STEP_NUM_TASKS but not SLURM_PROCID"),
        ({**srun(1, nodes=2, per_node=2), "SLURM_NODEID": 1}, "SLURM_PROCID 1 is not what SLURM_NODEID 1 and"),
        ({**srun(1, nodes=2, per_node=1), "SLURM_STEP_TASKS_PER_NODE": "2,1"}, "2,1 is not 2 tasks in equal numbers"),
        ({**srun(1, nodes=2, per_node=1), "SLURM_STEP_TASKS_PER_NODE": "many"}, "many is not 2 tasks in equal numbers"),
        ({**srun(1, nodes=2, per_node=1), "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST must be a list of nodes"),
        ({"OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_RANK": 1}, "mpirun started 4 processes (OMPI_COMM_WORLD_SIZE)"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_their_names(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, object], message: str
) -> None:
    put(monkeypatch, variables)
    with pytest.raises(ConfigError) as caught:
        read_place()
    assert message in str(caught.value)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (2, 1), (3, 4)])
def test_the_ranks_of_a_step_are_each_one_of_all(monkeypatch: pytest.MonkeyPatch, nodes: int, per_node: int) -> None:
    places = []
    for rank in range(nodes * per_node):
        put(monkeypatch, srun(rank, nodes=nodes, per_node=per_node))
        places.append(read_place())
        assert read_worker(None, None) == (rank, nodes * per_node)
    assert [place.rank for place in places] == list(range(nodes * per_node))
    assert {place.local_rank for place in places} == set(range(per_node))
    assert len({(place.world, place.address, place.node) for place in places}) == 1


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login", "login"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-005,9],login", "gpu003"),
        ("rack[0-1]n[2,5-7]-ib,x", "rack0n2-ib"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("a[7],b", "a7"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_no_two_attempts_of_neighbouring_jobs_meet_at_one_port() -> None:
    for first in (1, 4711, 67_108_000):
        ports = [
            port_of(first + job, restart, step=step) for job in range(154) for restart in range(8) for step in range(8)
        ]
        assert len(set(ports)) == len(ports)
        assert 15_000 <= min(ports) <= max(ports) < 30_000
