"""The machine under the ranks, for launch/doctor.py: shared memory, limits, CPUs and memory, ports, caches, the environment."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import resource
import shutil
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from launch.doctor_check import Finding, Status, amount, listed

SHARED_FOR_RANK = 64e6
"""Bytes of /dev/shm that NCCL takes for a rank at most, by its channels and neighbours."""

SHARED_ADVISED = 1e9
LEFT = ("deepspeed_allreduce_buffer_*", "nccl-*")
"""Segments that processes which were killed leave there."""

FILES_NEEDED, FILES_ADVISED = 1024, 4096
"""Open files of a process: shards, workers, connections to other ranks."""

STALE_S = 600.0
"""A compiler that has not ended by then is taken to be dead."""

MEMORY_FOR_RANK = 4e9
"""Without a configuration: what Python, torch, CUDA and a loader take."""


def shared_memory(ranks: int, *, gpus: bool, folder: Path = Path("/dev/shm")) -> list[Finding]:
    """``ranks``: on this node."""
    check, needed = "host: shared memory", SHARED_FOR_RANK * ranks if gpus else 0.0
    remedy = "docker run --shm-size=16g (or --ipc=host); elsewhere mount -o remount,size=16G /dev/shm, and remove what is left"
    expected = f"{amount(needed)} free for NCCL, {amount(SHARED_ADVISED)} advised" if gpus else "present"
    if not folder.is_dir():
        return [Finding(check, "fail" if gpus else "warn", f"{folder} is not there", expected, remedy)]
    size = shutil.disk_usage(folder)
    status: Status = "fail" if size.free < needed else "warn" if gpus and size.total < SHARED_ADVISED else "pass"
    found = f"{folder} has {amount(size.free)} of {amount(size.total)} free"
    return [Finding(check, status, found, expected, remedy if status != "pass" else ""), left_behind(folder)]


def left_behind(folder: Path = Path("/dev/shm"), processes: Path = Path("/proc")) -> Finding:
    """Buffers that no living process has mapped."""
    check, expected = "host: leaked buffers", "none"
    there = [path for pattern in LEFT for path in sorted(folder.glob(pattern))]
    used = _mapped(processes) if there else set()
    dead = [path for path in there if path.name not in used and path.stat().st_uid == os.getuid()]
    if dead:
        found = f"{len(dead)} in {folder} without an owner, {amount(sum(p.stat().st_size for p in dead))}: " + listed(
            [path.name for path in dead], 2
        )
        remedy = f"rm {folder}/{LEFT[0]} {folder}/{LEFT[1]} while no job of yours runs on this node"
        return Finding(check, "warn", found, expected, remedy)
    return Finding(check, "pass", f"none; {len(there)} in use or of other users" if there else "none", expected)


def _mapped(processes: Path) -> set[str]:
    """Names of files in shared memory that processes which we may look into have mapped."""
    found: set[str] = set()
    for maps in processes.glob("[0-9]*/maps"):
        try:
            found |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found


def limits(*, gpus: bool) -> list[Finding]:
    """Of this process, by its shell or service."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = 1 << 30 if files == resource.RLIM_INFINITY else files
    status: Status = "fail" if files < FILES_NEEDED else "warn" if files < FILES_ADVISED else "pass"
    findings = [
        Finding(
            "host: open files", status, f"{files:,} allowed", f"{FILES_ADVISED:,}, at least {FILES_NEEDED:,}",
            "" if status == "pass" else "ulimit -n 65536 in env.sh, or LimitNOFILE of the service that starts ranks",
        )
    ]  # fmt: skip
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    endless, cards = locked == resource.RLIM_INFINITY, Path("/sys/class/infiniband").is_dir()
    status = "pass" if endless or not (gpus and cards) else "fail"
    found = "unlimited" if endless else f"{amount(locked)} may be locked"
    expected = "unlimited where InfiniBand cards register memory" if not cards else "unlimited, for InfiniBand cards"
    remedy = "" if status == "pass" else "ulimit -l unlimited, or LimitMEMLOCK=infinity of slurmd"
    return [*findings, Finding("host: locked memory", status, found, expected, remedy)]


def processors(ranks: int, workers: int) -> Finding:
    """CPUs of this node's ranks against what they start. ``workers``: of a rank's loader."""
    allowed, quota, threads = len(os.sched_getaffinity(0)), cpu_quota(), torch.get_num_threads()
    usable = min(float(allowed), quota or float(allowed))
    share = usable / ranks
    found = f"{usable:g} CPUs for {ranks} ranks, {threads} threads each"
    if quota is not None and quota < allowed:
        found += f" (the cgroup allows {quota:g} of {allowed})"
    expected = f"{1 + workers} a rank: its own and one for each of {workers} workers"
    status: Status = "fail" if share < 1 else "warn" if share < 1 + workers or threads > max(1.0, share) else "pass"
    remedy = "ask for more (--cpus-per-rank of launch/slurm/render.py), or set data.workers and OMP_NUM_THREADS lower"
    return Finding("host: CPUs", status, found, expected, "" if status == "pass" else remedy, {"cpus_of_rank": share})


def memory(ranks: int, needed: float | None) -> Finding:
    """``needed``: bytes of a rank, as its configuration says."""
    limit, free = memory_limit(), available()
    wanted = ranks * (needed or MEMORY_FOR_RANK)
    room = min(free, limit) if limit is not None else free
    said = f"{amount(free)} available" + (f", {amount(limit)} left by the cgroup" if limit is not None else "")
    basis = "loader's packs and a copy of the checkpoint" if needed else "no configuration given"
    status: Status = "warn" if room < wanted else "pass"
    remedy = "ask for more memory (--mem), or lower data.memory_gb" if status != "pass" else ""
    expected = f"{amount(wanted)} for {ranks} rank{'s' * (ranks > 1)} ({basis})"
    return Finding("host: memory", status, said, expected, remedy, {"total_bytes": min(total(), limit or total())})


def total() -> float:
    """Bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def available(file: Path = Path("/proc/meminfo")) -> float:
    found = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text())
    return 1024.0 * int(found[1]) if found else float("inf")


def memory_limit(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Bytes that the cgroup leaves this process, if it says so, in either version of them."""
    found = []
    for group in _groups(own, root, "memory"):
        v1 = (group / "memory.limit_in_bytes").exists()
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        numbers = [_number(group / name) for name in names]
        if numbers[0] is not None and numbers[0] < 2**60:
            found.append(numbers[0] - (numbers[1] or 0.0))
    return min(found, default=None)


def cpu_quota(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that the cgroup grants, if it limits them."""
    found = []
    for group in _groups(own, root, "cpu"):
        words = (_text(group / "cpu.max") or "").split()
        if len(words) == 2 and words[0] != "max":
            found.append(float(words[0]) / float(words[1]))
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            found.append(quota / period)
    return min(found, default=None)


def _groups(own: Path, root: Path, controller: str) -> list[Path]:
    """This process's control group and those around it, which bind it as well; in a container its own root."""
    for line in (_text(own) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        mounted = root / controller if controller in controllers.split(",") else root
        if (controller in controllers.split(",") or not controllers) and mounted.is_dir():
            place = Path(path.lstrip("/"))
            folders = [mounted / place, *(mounted / parent for parent in place.parents), mounted]
            return list(dict.fromkeys(folder for folder in folders if folder.is_dir()))
    return []


def _text(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def _number(file: Path) -> float | None:
    text = (_text(file) or "").strip()
    return float(text) if re.fullmatch(r"-?\d+", text) else None


def port(address: str, *, ours: bool, nodes: int) -> list[Finding]:
    """The rendezvous, seen from the first rank. ``ours``: its port is for this rank to open, no launcher's has."""
    host, _, number = address.rpartition(":")
    findings = [reachable(host.strip("[]"), nodes)]
    if not ours:
        return [*findings, Finding("ports: rendezvous", "pass", f"port {number} is the launcher's own", "open")]
    try:
        with socket.create_server(("", int(number))):
            pass
    except OSError as error:
        busy = error.errno == errno.EADDRINUSE
        found = f"port {number} is {'in use' if busy else f'not to be had: {error.strerror}'}"
        remedy = f"see `ss -ltnp sport = :{number}` for who has it, or set another MASTER_PORT"
        return [*findings, Finding("ports: rendezvous", "fail", found, "free for the first rank", remedy)]
    return [*findings, Finding("ports: rendezvous", "pass", f"port {number} is free", "free for the first rank")]


def reachable(host: str, nodes: int) -> Finding:
    """Whether the address that ranks meet at is a private one that other nodes can have."""
    check, expected = "ports: address", "private" + (", and not of one machine alone" if nodes > 1 else "")
    try:
        address = ipaddress.ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return Finding(
            check, "fail", f"{host} cannot be resolved: {error}", expected, "set MASTER_ADDR to a name or address"
        )
    found = f"{host} is {address}" if str(address) != host else host
    if address.is_global:
        remedy = (
            "set MASTER_ADDR to a private one: what ranks say is not encrypted, and whoever reaches the port takes part"
        )
        return Finding(check, "warn", f"{found}, a public address", expected, remedy)
    if address.is_loopback and nodes > 1:
        remedy = "set MASTER_ADDR to an address between nodes, or take the host's name off 127.0.1.1 in /etc/hosts"
        return Finding(check, "warn", f"{found}, which means another machine on every node", expected, remedy)
    return Finding(check, "pass", found, expected)


INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def interfaces(variables: Mapping[str, str], present: Sequence[str] | None = None) -> Finding:
    """Those that variables name must exist."""
    check = "ports: interfaces"
    there = [name for _, name in socket.if_nameindex()] if present is None else list(present)
    named = {variable: variables[variable] for variable in INTERFACES if variables.get(variable)}
    wrong = [f"{variable}={text} is not there" for variable, text in named.items() if not _fits(variable, text, there)]
    expected = f"of {', '.join(there)}"
    if wrong:
        return Finding(
            check, "fail", "; ".join(wrong), expected, "name an interface of every node, or unset the variable"
        )
    said = ", ".join(f"{variable}={text}" for variable, text in named.items())
    return Finding(check, "pass", said or "left to NCCL and gloo", expected)


def _fits(variable: str, text: str, there: Sequence[str]) -> bool:
    """gloo takes names. NCCL takes beginnings of names, exact ones behind ``=`` and, behind ``^``, what not to take."""
    names = [name.partition(":")[0] for name in text.lstrip("^=").split(",") if name]
    if variable.startswith("GLOO"):
        return all(name in there for name in names)
    if text.startswith("="):
        return any(name in there for name in names)
    begun = [name.startswith(tuple(names)) for name in there]
    return not all(begun) if text.startswith("^") else any(begun)


CACHES = {
    "TORCH_EXTENSIONS_DIR": "~/.cache/torch_extensions",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "",
}
"""Where compiled code is kept, which is run unseen -> where it is if nothing else is said."""


def compiled(variables: Mapping[str, str]) -> list[Finding]:
    """Caches that others can write to, and locks of compilers that have been killed, which torch waits for without an end."""
    folders = [Path(variables.get(name) or default).expanduser() for name, default in CACHES.items()
               if variables.get(name) or default]  # fmt: skip
    there = [folder for folder in folders if folder.is_dir()]
    return [owned(there), locks(folders[0])]


def owned(folders: Sequence[Path]) -> Finding:
    check, expected = "caches: owner", "of this user, writable for nobody else"
    wrong = []
    for folder in folders:
        about = folder.stat()
        if about.st_uid not in (os.getuid(), 0):
            wrong.append(f"{folder} belongs to user {about.st_uid}")
        elif about.st_mode & stat.S_IWOTH:
            wrong.append(f"{folder} is writable for everyone (mode {stat.S_IMODE(about.st_mode):o})")
    if wrong:
        remedy = "what lies there is run: chmod go-w it, or name one of your own in TORCH_EXTENSIONS_DIR and TRITON_CACHE_DIR"
        return Finding(check, "fail", "; ".join(wrong), expected, remedy)
    return Finding(check, "pass", listed(folders) or "no cache yet", expected)


def locks(folder: Path, now: float | None = None) -> Finding:
    check, expected = "caches: locks", "none"
    found = sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]) if folder.is_dir() else []
    ages = {path: (time.time() if now is None else now) - path.stat().st_mtime for path in found}
    if not ages:
        return Finding(check, "pass", "none", expected)
    said = listed([f"{path}, {age:,.0f} s old" for path, age in ages.items()], 2)
    stale = any(age > STALE_S for age in ages.values())
    remedy = f"delete it if nothing compiles: rm {next(iter(ages))}; every start waits for it without an end"
    return Finding(check, "fail" if stale else "warn", said, expected, remedy)


HURTFUL = {
    ("NCCL_DEBUG", "TRACE"): ("writes a line for every call", "unset it, or take WARN"),
    ("CUDA_LAUNCH_BLOCKING", "1"): ("makes every kernel wait", "unset it when you have found the error"),
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"): ("checks every collective with another one", "unset it, or take INFO"),
    ("NCCL_P2P_DISABLE", "1"): ("sends through the host what NVLink could", "unset it"),
    ("NCCL_SHM_DISABLE", "1"): ("sends through the network what memory could", "unset it"),
    ("NCCL_IB_DISABLE", "1"): ("sends over TCP what InfiniBand could", "unset it where the nodes have InfiniBand"),
    ("TORCH_NCCL_BLOCKING_WAIT", "1"): ("makes the host wait for every collective", "unset it"),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"): ("asks the driver for every tensor", "unset it"),
}
"""Variable and value -> what it does, and what to do."""


def hurtful(variables: Mapping[str, str], *, ranks: int) -> Finding:
    """Settings left from a search for an error. ``ranks``: on this node."""
    check, expected = "environment: settings", "none that slows a run down"
    found = [
        (f"{name}={value} {does}", remedy)
        for (name, value), (does, remedy) in HURTFUL.items()
        if variables.get(name, "").upper() == value
    ]
    if ranks > 1 and not variables.get("OMP_NUM_THREADS"):
        found.append((
            f"OMP_NUM_THREADS is not set for {ranks} ranks on a node, whose libraries may each take all CPUs",
            f"export OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // ranks)}",
        ))  # fmt: skip
    if found:
        remedies = dict.fromkeys(remedy for _, remedy in found)
        return Finding(check, "warn", "; ".join(said for said, _ in found), expected, "; ".join(remedies))
    return Finding(check, "pass", "none", expected)


def same_machine(facts: Mapping[int, Mapping[str, str]], node: int) -> Finding:
    """``facts``: rank -> host and boot; ranks of a node are neighbours, ``node`` of them."""
    check, expected = "hosts: names", f"one for each {node} ranks, each another one"
    remedy = "give every machine a name of its own; leases, logs and the launchers tell nodes apart by it"
    of: dict[int, set[str]] = {}
    for rank, fact in facts.items():
        of.setdefault(rank // node, set()).add(fact["host"])
    mixed = [place for place, names in of.items() if len(names) > 1]
    if mixed:
        found = f"node {mixed[0]} has ranks on {listed(sorted(of[mixed[0]]))}"
        return Finding(check, "fail", found, expected, "neighbouring ranks must share a node: --distribution=block")
    names = [next(iter(each)) for each in of.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        boots = {facts[rank]["boot"] for rank in facts if facts[rank]["host"] in twice}
        if len(boots) > 1:
            return Finding(check, "fail", f"{listed(twice)} is the name of several machines", expected, remedy)
        found = f"{listed(twice)} is {names.count(twice[0])} nodes of one machine"
        return Finding(check, "warn", found, expected, "start one launcher on each machine, unless it is a trial")
    return Finding(check, "pass", f"{len(names)} node{'s' * (len(names) > 1)}: {listed(names)}", expected)


def identity() -> dict[str, str]:
    """Of this machine: its name, and a number that it drew as it started."""
    boot = _text(Path("/proc/sys/kernel/random/boot_id")) or ""
    return {"host": socket.gethostname(), "boot": boot.strip()}


def clocks(offsets: Mapping[int, tuple[float, float]], hosts: Mapping[int, str], *, most: float = 0.5) -> Finding:
    """``offsets``: rank -> seconds ahead of the first rank, and their uncertainty."""
    check, expected = "clocks: skew", f"within {most:g} s of each other; time zones do not matter"
    early = min(offsets, key=lambda rank: offsets[rank][0])
    late = max(offsets, key=lambda rank: offsets[rank][0])
    skew = offsets[late][0] - offsets[early][0]
    doubt = offsets[late][1] + offsets[early][1]
    found = f"{skew:.3f} s at most, known to {1e3 * doubt:.2g} ms"
    figures = {"skew_s": skew, "known_to_s": doubt}
    if skew - doubt > most:
        said = f"rank {late} ({hosts[late]}) is {skew:.2f} s ahead of rank {early} ({hosts[early]})"
        remedy = (
            "chronyc tracking on both: set the clocks by NTP; leases and logs of several nodes are compared by them"
        )
        return Finding(check, "warn", said, expected, remedy, figures)
    return Finding(check, "pass", found, expected, figures=figures)
