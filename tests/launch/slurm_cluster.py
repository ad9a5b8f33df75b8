"""A real Slurm cluster of two nodes on loopback: munged, slurmctld and two slurmd of our own in a folder of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.launch.commands import environment
from tests.ranks import free_port

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where Debian keeps the daemons
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = ("127.0.0.1", "127.0.0.2")
"""Names that resolve without /etc/hosts. Both daemons listen on 127.0.0.1, at ports of their own."""

START_S, JOB_S = 30.0, 200.0

CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=15
JobRequeue=1
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:2 RealMemory=4096 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:2 RealMemory=4096 State=UNKNOWN
PartitionName=test Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, and how there could be; empty if there can."""
    lacking = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    return f"needs {', '.join(lacking)}: apt-get install {PACKAGES}" if lacking else ""


@dataclass(frozen=True)
class Cluster:
    """``root`` holds its configuration, keys, state and logs."""

    root: Path

    def environment(self) -> dict[str, str]:
        """That of a user who logs in: no job and no launcher around him."""
        kept = {name: value for name, value in environment().items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = os.pathsep.join([kept["PATH"], PATH])
        # Both nodes have the same cores: a thread that spins while it waits takes them from the other one's ranks.
        return {**kept, "PATH": path, "SLURM_CONF": str(self.root / "slurm.conf"), "OMP_WAIT_POLICY": "PASSIVE"}

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's, which answers or fails in a bounded time."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            env=self.environment(),
            cwd=cwd or self.root,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done

    def submit(self, script: Path) -> str:
        """The number of the job. What it prints goes to ``output``."""
        return self.run("sbatch", "--parsable", str(script), cwd=script.parent).stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` knows, such as JobState, Restarts and ExitCode."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, restarts: int = 0) -> dict[str, str]:
        """The job's facts once it is in one of ``states`` after that many restarts."""

        def reached() -> dict[str, str]:
            facts = self.facts(job)
            return facts if facts["JobState"] in states and int(facts["Restarts"]) >= restarts else {}

        return until(
            reached, what=f"job {job} {' or '.join(states)} ({restarts} restarts)", also=lambda: self.facts(job)
        )

    def start_soon(self, job: str) -> None:
        """Instead of the two minutes that a requeued job waits. In the second of its end, its start would be refused."""
        self.wait(job, "PENDING", restarts=1)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def lose(self, node: str) -> None:
        """Its jobs' processes die without a word, and the controller holds it for down."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        for process in self.processes():
            if b"SLURMD_NODENAME=" + node.encode() in _read(process, "environ").split(b"\0"):
                _kill(process)

    def bring_back(self, node: str) -> None:
        """When nothing is left on it: where an earlier step registers again, Slurm ends that of the job's next attempt, too."""
        spool = self.root / f"spool-{node}"
        until(lambda: {} if [*spool.glob(f"{node}_*")] else {"empty": "yes"}, what=f"no steps on {node}")
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def processes(self, *parts: str) -> list[int]:
        """Processes of this cluster whose command line holds all ``parts``."""
        mark, found = f"SLURM_CONF={self.root / 'slurm.conf'}".encode(), []
        for process in [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]:
            line = _read(process, "cmdline").decode(errors="replace")
            if mark in _read(process, "environ").split(b"\0") and all(part in line for part in parts):
                found.append(process)
        return found


def _read(process: int, name: str) -> bytes:
    """A file of /proc; nothing where the process is gone, or somebody else's."""
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def until(
    holds: Callable[[], dict[str, str]], *, what: str, limit_s: float = JOB_S, also: Callable[[], object] = str
) -> dict[str, str]:
    """The first true answer."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if answer := holds():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {limit_s:.0f} s; {also()}")


@contextmanager
def running_cluster(root: Path) -> Iterator[Cluster]:
    """Two idle nodes, and afterwards nothing of them."""
    cluster, daemons = Cluster(root), list[subprocess.Popen[bytes]]()
    _write(root)
    try:
        daemons.append(_munged(root, cluster))
        commands = [("slurmctld", "-D", "-i"), *(("slurmd", "-D", "-N", node) for node in NODES)]
        daemons += [_daemon(cluster, command) for command in commands]
        logs = [root / "log" / name for name in ("slurmctld.log", *(f"slurmd-{node}.log" for node in NODES))]
        until(
            lambda: {"idle": "2"} if _idle(cluster) == set(NODES) else {},
            what="two idle nodes", limit_s=START_S, also=lambda: "\n".join(map(_tail, logs)),
        )  # fmt: skip
        try:
            yield cluster
        finally:
            _cancel_all(cluster)
    finally:
        _stop(cluster, daemons)


def _write(root: Path) -> None:
    for name in ("state", "log", "run", "munge", *(f"spool-{node}" for node in NODES)):
        (root / name).mkdir(parents=True)
    (root / "munge").chmod(0o700)
    key = root / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    ports = [free_port() for _ in range(3)]
    text = CONF.format(host=socket.gethostname().split(".")[0], ports=ports, user=user, root=root, nodes=NODES)
    (root / "slurm.conf").write_text(text)
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    # Any character device passes for a GPU.
    gpus = [f"NodeName={node} Name=gpu File=/dev/{device}\n" for node in NODES for device in ("null", "zero")]
    (root / "gres.conf").write_text("".join(gpus))


def _daemon(cluster: Cluster, command: Sequence[str]) -> subprocess.Popen[bytes]:
    with (cluster.root / "log" / f"{command[0]}.out").open("ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cluster.root, start_new_session=True,
            env=cluster.environment(),
        )  # fmt: skip


def _munged(root: Path, cluster: Cluster) -> subprocess.Popen[bytes]:
    options = [f"--{name}={root}/{path}" for name, path in (
        ("key-file", "munge/key"), ("socket", "run/munge.sock"), ("pid-file", "munge/pid"), ("log-file", "munge/log"),
        ("seed-file", "munge/seed"),
    )]  # fmt: skip
    # --force: pytest's folders are its user's alone, as the daemons here are.
    daemon = _daemon(cluster, ["munged", "-F", "--force", "--num-threads=2", *options])
    socket_file = root / "run" / "munge.sock"
    until(
        lambda: {"socket": "yes"} if socket_file.exists() else {},
        what="munged", limit_s=START_S, also=lambda: _tail(root / "log" / "munged.out"),
    )  # fmt: skip
    return daemon


def _idle(cluster: Cluster) -> set[str]:
    return set(cluster.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).stdout.split())


def _tail(path: Path) -> str:
    return f"{path.name}: {path.read_text(errors='replace')[-600:]}" if path.exists() else f"{path.name}: none"


def _cancel_all(cluster: Cluster) -> None:
    cluster.run("scancel", "--me", "--signal=KILL", "--full", check=False)
    cluster.run("scancel", "--me", check=False)
    end = time.monotonic() + 10
    while time.monotonic() < end and cluster.run("squeue", "-h", check=False).stdout.strip():
        time.sleep(0.1)


def _stop(cluster: Cluster, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    """The daemons, and what a killed one has left."""
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(timeout=5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    while left := cluster.processes():
        for process in left:
            _kill(process)
        time.sleep(0.02)
