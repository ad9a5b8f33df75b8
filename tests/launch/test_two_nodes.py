"""Two nodes without Slurm: deepspeed over pdsh and ssh, to an sshd of our own on two loopback addresses, and torchrun."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.launch.commands import FREQUENT, ROOT, SCRIPT, environment
from tests.launch.slurm_cluster import PATH, until
from tests.launch.test_train import assert_same_losses
from tests.launch.world import World
from tests.ranks import free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

LIMIT_S = 400.0

PROGRAMS = ("pdsh", "ssh", "sshd", "ssh-keygen")
PACKAGES = "pdsh openssh-client openssh-server"
HOSTS = ("127.0.0.1", "127.0.0.2")

SSHD = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {root}/host
AuthorizedKeysFile {root}/user.pub
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
PidFile none
"""
SSH = """\
Host *
  Port {port}
  IdentityFile {root}/user
  IdentitiesOnly yes
  UserKnownHostsFile {root}/known
  StrictHostKeyChecking accept-new
  BatchMode yes
  LogLevel ERROR
"""


def lacking() -> str:
    """Why ssh cannot be tried here, and how it could."""
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"needs {', '.join(absent)}: apt-get install {PACKAGES}"
    if not Path("/run/sshd").is_dir() and os.getuid():
        return "needs the folder /run/sshd, which sshd wants to exist: sudo mkdir /run/sshd"
    return ""


@contextmanager
def secure_shell(root: Path) -> Iterator[dict[str, str]]:
    """An environment in which ``ssh HOST`` reaches both addresses; nothing of the user's own ~/.ssh is read or written."""
    Path("/run/sshd").mkdir(exist_ok=True)
    port = free_port()
    for name, text in (("sshd.conf", SSHD), ("ssh.conf", SSH)):
        (root / name).write_text(text.format(port=port, root=root))
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / key)], check=True)
    (root / "bin").mkdir()
    shim = root / "bin" / "ssh"
    shim.write_text(
        f'#!/bin/sh\nexec {shlex.quote(shutil.which("ssh", path=PATH) or "ssh")} -F "{root}/ssh.conf" "$@"\n'
    )
    shim.chmod(0o755)
    ours = {**environment(), "PDSH_RCMD_TYPE": "ssh"}
    ours["PATH"] = os.pathsep.join([str(root / "bin"), ours["PATH"], PATH])
    with (root / "sshd.log").open("wb") as log:
        command = [shutil.which("sshd", path=PATH) or "sshd", "-D", "-e", "-f", str(root / "sshd.conf")]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        for host in HOSTS:
            until(
                lambda host=host: answers(host, ours),
                what=f"ssh {host}",
                limit_s=20,
                also=(root / "sshd.log").read_text,
            )
        yield ours
    finally:
        server.terminate()
        server.wait()


def answers(host: str, ours: dict[str, str]) -> dict[str, str]:
    done = subprocess.run(["ssh", host, "true"], env=ours, capture_output=True, check=False, timeout=20)
    return {"answers": host} if done.returncode == 0 else {}


def finished(commands: Sequence[Sequence[str]], ours: dict[str, str], *, folder: Path, mark: Path) -> None:
    """Run them to their ends at the same time; afterwards nothing is left that has ``mark`` in its command line."""
    outputs, processes = [folder / f"{number}.out" for number in range(len(commands))], list[subprocess.Popen[bytes]]()
    try:
        for command, output in zip(commands, outputs):
            with output.open("wb") as out:
                processes.append(
                    subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=ours, start_new_session=True)
                )
        for process, output in zip(processes, outputs):
            assert process.wait(timeout=LIMIT_S) == 0, output.read_text(errors="replace")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # DeepSpeed answers others by ending ranks of strangers, too
                process.wait()
        for path in Path("/proc").glob("[0-9]*/cmdline"):  # ranks that sshd started
            with suppress(OSError):  # gone
                if str(mark).encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_deepspeed_starts_ranks_over_pdsh_and_ssh(world: World, whole: Path, tmp_path: Path) -> None:
    run = world.root / "over pdsh"
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    where = ["--hostfile", str(hostfile), "--master_addr", HOSTS[0], "--master_port", str(free_port())]
    command = [str(Path(sys.executable).parent / "deepspeed"), *where, SCRIPT, "--config", str(world.file)]
    with secure_shell(tmp_path) as ours:
        finished([[*command, *world.overrides(run, *FREQUENT)]], ours, folder=tmp_path, mark=run)
    assert_same_losses(run, whole)


def test_torchrun_joins_two_nodes(world: World, whole: Path, tmp_path: Path) -> None:
    run = world.root / "two torchruns"
    where = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", HOSTS[0], "--master_port", str(free_port())]
    launcher = [sys.executable, "-m", "torch.distributed.run", *where]
    command = [SCRIPT, "--config", str(world.file), *world.overrides(run, *FREQUENT)]
    nodes = [[*launcher, "--node_rank", str(node), *command] for node in range(2)]
    finished(nodes, environment(), folder=tmp_path, mark=run)
    assert_same_losses(run, whole)
