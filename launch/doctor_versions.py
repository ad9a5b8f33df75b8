"""Which software every rank runs, for launch/doctor.py: what is pinned, and what must be the same everywhere."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from launch.doctor_check import OWN, Finding, listed, ranks_of

Facts = Mapping[str, str]

SHOWN = 16
"""Columns and rows of a table of differences."""

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)\s*(?:;\s*python_version\s*(>=|<)\s*[\"'](\d+)\.(\d+)[\"'])?\s*$")
"""A line of constraints.txt, which has no other kinds of markers."""


def versions() -> dict[str, str]:
    """Of what computes, by name. ``-`` is absent."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "-",
        "driver": driver(),
        "cudnn": str(torch.backends.cudnn.version() or "-"),
        "nccl": "-",
    }
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {name: installed(name) for name in ("deepspeed", "triton", "numpy")}


def installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Of NVIDIA's kernel module."""
    try:
        found = re.search(r"(?:Kernel Module|Kernel Module for \S+)\s+(\d[\d.]+)", file.read_text())
    except OSError:
        return "-"
    return found[1] if found else "-"


def pins(text: str) -> dict[str, str]:
    """Package -> version, as constraints.txt pins them for this Python."""
    found = {}
    for line in text.splitlines():
        match = PIN.match(line)
        if not match:
            continue
        name, version, sign, major, minor = match.groups()
        newer = sign is None or sys.version_info[:2] >= (int(major), int(minor))
        if newer == (sign != "<"):
            found[name.lower()] = version
    return found


def pinned(file: Path = OWN / "constraints.txt") -> list[Finding]:
    """What is installed, against what the tests passed with."""
    check, expected = "versions: pinned", "those of constraints.txt"
    if not file.exists():
        return [Finding(check, "skipped", f"{file.name} does not lie beside the code", expected)]
    wanted = pins(file.read_text(encoding="utf-8"))
    found = {name: installed(name) for name in wanted}
    wrong = [f"{n} {found[n]} (not {v})" for n, v in wanted.items() if found[n] not in ("-", _local(found[n], v))]
    present = sum(version != "-" for version in found.values())
    if wrong:
        remedy = f"pip install -c {file.name} -e '.[all]' with this interpreter"
        return [Finding(check, "warn", f"{len(wrong)} of {present} packages differ: {listed(wrong)}", expected, remedy)]
    return [Finding(check, "pass", f"{present} packages as pinned", expected)]


def _local(found: str, version: str) -> str:
    """2.15.0+cu132 is 2.15.0."""
    return found if found.split("+")[0] == version else version


def gpu_software() -> list[Finding]:
    """Whether torch can use the GPUs that are there."""
    check = "versions: CUDA"
    present = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return [Finding(check, "pass", f"{torch.cuda.device_count()} x {name}, CUDA {torch.version.cuda}")]
    if not present:
        return [Finding(check, "skipped", "no GPU")]
    why = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    return [
        Finding(
            check, "fail", f"{len(present)} GPUs that torch cannot use ({why}, driver {driver()})", "torch sees them",
            "install a driver that is new enough, or torch for the driver's CUDA; see that CUDA_VISIBLE_DEVICES is not empty",
        )
    ]  # fmt: skip


def code(root: Path = OWN) -> dict[str, str]:
    """Source file -> digest of its bytes."""
    files = [file for folder in ("cogvideo_dist", "launch") for file in sorted((root / folder).rglob("*.py"))]
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}


ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_DEBUG",
    "NCCL_ALGO", "NCCL_PROTO", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_LAUNCH_BLOCKING",
)  # fmt: skip
"""The only variables whose values are told to anybody."""

DIFFERS = ("CUDA_VISIBLE_DEVICES",)
"""Of these, what may well differ from rank to rank."""


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def equal(facts: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Finding]:
    """Versions, code and environment of all ranks against each other. ``facts``: rank -> kind -> name -> value."""
    remedies = {
        "versions": "run all ranks with one interpreter on a shared file system, or in one container",
        "code": "let all nodes see one folder, or copy it to all of them; a stale copy trains another model",
        "environment": "export them in env.sh, which all ranks get",
    }
    found = []
    for kind, remedy in remedies.items():
        values = {rank: each[kind] for rank, each in facts.items() if kind in each}
        if not values:  # whose checks say why
            continue
        keys = sorted({key for each in values.values() for key in each} - {*DIFFERS})
        unlike = [key for key in keys if len({each.get(key, "-") for each in values.values()}) > 1]
        check, status, expected = f"{kind}: equal", "warn" if kind == "environment" else "fail", "the same on all ranks"
        if unlike:
            table = differences(values, unlike, hosts=hosts)
            said = f"{listed(unlike)} differ{'s' * (len(unlike) == 1)} between ranks"
            found.append(Finding(check, status, said, expected, remedy, details=table))  # type: ignore[arg-type]
        else:
            found.append(Finding(check, "pass", f"{_told(kind, values)} on {ranks_of(list(values))}", expected))
    return found


def _told(kind: str, values: Mapping[int, Facts]) -> str:
    first = next(iter(values.values()))
    if kind == "versions":
        return ", ".join(f"{name} {version}" for name, version in first.items() if version != "-")
    if kind == "code":
        return f"{len(first)} files, {hashlib.sha256(str(sorted(first.items())).encode()).hexdigest()[:12]}"
    return ", ".join(f"{name}={value}" for name, value in first.items()) or "no variable of interest"


def differences(values: Mapping[int, Facts], keys: Sequence[str], *, hosts: Mapping[int, str]) -> tuple[str, ...]:
    """A table of ranks and keys; ranks with the same values share a row."""
    shown = list(keys[:SHOWN])
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, each in values.items():
        alike[tuple(each.get(key, "-") for key in shown)].append(rank)
    rows = [("ranks", "hosts", *shown)]
    for row, ranks in sorted(alike.items(), key=lambda item: item[1])[:SHOWN]:
        rows.append((ranks_of(ranks), listed(sorted({hosts[rank] for rank in ranks}), 2), *row))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return tuple("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
