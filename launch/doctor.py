"""Check a machine or an allocation before a job queues: python launch/doctor.py [--config FILE [key=value ...]]

One process for each rank (srun, torchrun or deepspeed) checks all nodes and what is between them; the first one prints a table.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config, read_merged
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.models.critic import Critic, CriticConfig
from cogvideo_dist.models.vae import VAE
from cogvideo_dist.parallel.mesh import Layout, Place, stop
from launch import doctor_device, doctor_files, doctor_host, doctor_kernels, doctor_links, doctor_versions
from launch.autoencoder import vae_config
from launch.cost import counted, states_of
from launch.doctor_board import Board, Meeting, alone, joined
from launch.doctor_check import Check, Finding, Hung, anything_hangs, examined, ranks_of, told, within
from launch.doctor_links import Nominal, Sizes
from launch.doctor_report import arguments, plan_of, rows, table, write_json
from launch.environment import FAILED, device_of, read_place, run_command, split_config

BASE = 2e9
"""Bytes of a rank's host memory beside what its configuration asks for: Python, torch, CUDA."""

SHORT_S, LONG_S, KERNELS_S = 30.0, 120.0, 600.0
"""What a check may take that asks the system, that moves bytes, and that compiles."""

ROUNDS = 20
"""Round trips by which clocks are compared."""


@dataclass(frozen=True)
class Asked:
    """What is to be checked: for which run, if any, in whose folder, how thoroughly, against which links."""

    config: DiTRun | VAERun | None = None
    folder: Path | None = None
    quick: bool = False
    nominal: Nominal = field(default_factory=Nominal)
    wait_s: float = 120.0

    @property
    def workers(self) -> int:
        return self.config.data.workers if self.config else 1

    @property
    def checkpoint(self) -> float | None:
        """Bytes of one: masters, moments and averages of all that learns, in float32."""
        if self.config is None:
            return None
        with torch.device("meta"):
            if isinstance(self.config, DiTRun):
                parameters, adapters = counted(self.config.model.transformer(), lora=self.config.lora)
                return float(states_of(self.config.train) * (adapters if self.config.lora else parameters))
            sizes = states_of(self.config.train) * _parameters(VAE(vae_config(self.config.model)))
            critic = self.config.loss.critic
            return float(sizes + (12 * _parameters(Critic(CriticConfig(channels=critic.channels))) if critic else 0))


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass
class Rank:
    """One rank at work. ``leads``: it is the first of its node, whose machine it checks for the others."""

    asked: Asked
    place: Place
    device: torch.device
    board: Board
    say: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        return self.place.rank == 0

    @property
    def leads(self) -> bool:
        return self.place.local_rank == 0

    @property
    def nodes(self) -> int:
        return -(-self.place.world // self.place.node)

    def check(self, name: str, check: Check, *, limit_s: float) -> None:
        self.at(name)
        self.findings += examined(name, check, limit_s=limit_s, device=self.device)

    def at(self, name: str) -> None:
        """Say what comes now: should this rank fall silent, the first one knows where."""
        self.say(name)
        self.board.put(f"at {self.place.rank}", name)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    asked = asked_of(options)
    place, findings = place_found()
    progress = tqdm(desc="meeting", unit=" checks", file=sys.stderr, disable=place.rank > 0)
    with ExitStack() as stack:
        board, met = meet(stack, place, asked=asked)
        rank = Rank(asked, place, device_found(place, findings), board, partial(_progress, progress), [*findings, *met])
        code = examine(rank, out=options.json)
    progress.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if anything_hangs():
        os._exit(code)  # Python would wait for what does not end
    sys.exit(code)


def _progress(progress: Any, name: str) -> None:
    progress.set_description(name, refresh=False)
    progress.update()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Check versions, kernels, devices, links, memory, file systems, clocks, ports and the environment of one "
        "machine, or of all nodes that srun, torchrun or deepspeed start it on, and say what to do where something is wrong.",
        epilog="examples:\n  python launch/doctor.py --config my.yaml\n  srun --nodes 2 --ntasks-per-node 8 python "
        "launch/doctor.py --config my.yaml --json doctor.json\nexit code: 0 if nothing failed, 1 otherwise",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = found.add_argument
    add(
        "--config", nargs="+", default=[], metavar="FILE.yaml | key.path=value",
        help="the run to come: its layout's links, its folder, its data, its checkpoints",
    )  # fmt: skip
    add("--run-dir", metavar="DIR", help="the folder to write into (default: run.dir of the configuration)")
    add("--json", metavar="OUT.json", help="write all figures there")
    add("--quick", action="store_true", help="small messages and files, and no kernels")
    add("--link", type=float, metavar="GB/S", help="that a GPU sends within its node by data sheet, to compare with")
    add("--network", type=float, metavar="GB/S", help="that a GPU sends to other nodes, likewise")
    add("--wait", type=float, default=120.0, metavar="SECONDS", help="for all ranks to start (default %(default)g)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    return found


def asked_of(options: argparse.Namespace) -> Asked:
    """Raises ``ConfigError`` for what cannot be asked."""
    for name in ("link", "network", "wait"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} must be above 0, found {value:g}")
    config = config_of(options.config) if options.config else None
    folder = options.run_dir or (config.run.dir if config else None)
    rates = (None if value is None else 1e9 * value for value in (options.link, options.network))
    return Asked(config, Path(folder) if folder else None, options.quick, Nominal(*rates), options.wait)


def config_of(items: Sequence[str]) -> DiTRun | VAERun:
    """Of the transformer if a preset is named, which an autoencoder has not."""
    split = split_config(items)
    merged, _ = read_merged(split["files"])
    model = merged.get("model")
    of_transformer = isinstance(model, dict) and "preset" in model
    of_transformer = of_transformer or any(item.startswith("model.preset=") for item in split["overrides"])
    return load_config(DiTRun, **split) if of_transformer else load_config(VAERun, **split)


def place_found() -> tuple[Place, list[Finding]]:
    """This process among others. Where launchers contradict each other, the first rank says so and goes on alone."""
    check, expected = "environment: launcher", "one launcher's variables, that agree"
    try:
        place = read_place()
    except ConfigError as error:
        if any(os.environ.get(name, "0") != "0" for name in ("RANK", "SLURM_PROCID")):
            raise
        remedy = "start with srun, torchrun, deepspeed or plain python alone, and unset what another one has left"
        return Place(), [Finding(check, "fail", told(error), expected, remedy)]
    said = f"rank {place.rank} of {place.world}, {place.node} on a node" if place.world > 1 else "one process"
    return place, [Finding(check, "pass", said, expected)] if place.rank == 0 else []


def device_found(place: Place, findings: list[Finding]) -> torch.device:
    try:
        device = within(LONG_S, partial(device_of, place))
    except (ConfigError, Hung, RuntimeError) as error:
        remedy = (
            "start a rank for each GPU that is seen, let ranks see all GPUs of their node, see that nvidia-smi answers"
        )
        findings.append(Finding("device: number", "fail", told(error), "a GPU for each rank", remedy))
        return torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.node))
    return device


def meet(stack: ExitStack, place: Place, *, asked: Asked) -> tuple[Board, list[Finding]]:
    """The board on which ranks tell each other what they find. The first rank goes on alone where it finds no place for it."""
    if place.world == 1:
        return alone(), []
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    job = "/".join([place.address, str(place.world), *(os.environ.get(name, "") for name in names)])
    meeting = Meeting(
        place.rank, place.world, place.address, hashlib.sha256(job.encode()).hexdigest(), place.node == place.world
    )
    check, expected = "ranks: started", f"all {place.world} within {asked.wait_s:g} s"
    try:
        board = stack.enter_context(joined(meeting, within_s=asked.wait_s))
    except OSError as error:
        if place.rank:
            raise
        return alone(), [Finding(check, "fail", told(error), expected, "use another MASTER_ADDR or MASTER_PORT")]
    missing = board.meet("started", within_s=asked.wait_s)
    if place.rank or not missing:
        return board, [] if place.rank else [Finding(check, "pass", f"all {place.world}", expected)]
    said = f"{ranks_of(missing)} did not come"
    remedy = "see their nodes: sinfo -N -l, their output, and whether they reach MASTER_ADDR"
    return board, [Finding(check, "fail", said, expected, remedy)]


def examine(rank: Rank, *, out: str | None) -> int:
    """All checks, and on the first rank what they say of all; the exit code."""
    machine(rank)
    if rank.place.world > 1:
        rank.board.meet("machine", within_s=KERNELS_S + LONG_S)  # what follows is measured, so that all do it at a time
    rates(rank)
    between(rank)
    board, number = rank.board, rank.place.rank
    board.put(f"report {number}", {"findings": [asdict(each) for each in rank.findings], "facts": rank.facts})
    board.meet("reports", within_s=LONG_S)
    if number:
        board.get("code", within_s=LONG_S)  # the first rank reads until then
        return 0
    rank.at("report")
    code = conclude(rank, out=out)
    board.put("code", code)
    return code


def machine(rank: Rank) -> None:
    """What one rank, or the first of a node, finds out by itself."""
    place, gpus, asked = rank.place, rank.device.type == "cuda", rank.asked
    caches = {name: os.environ[name] for name in doctor_host.CACHES if name in os.environ}
    interfaces = {name: os.environ[name] for name in doctor_host.INTERFACES if name in os.environ}
    slowing = {
        name: os.environ[name]
        for name in (*(n for n, _ in doctor_host.HURTFUL), "OMP_NUM_THREADS")
        if name in os.environ
    }
    rank.facts |= {"environment": doctor_versions.environment(), **doctor_host.identity()}
    quick: list[tuple[str, Check]] = [
        ("versions", partial(_note, rank, "versions", doctor_versions.versions)),
        ("code", partial(_note, rank, "code", doctor_versions.code)),
        ("environment: settings", lambda: [doctor_host.hurtful(slowing, ranks=place.node)]),
        ("versions: CUDA", doctor_versions.gpu_software),
        ("device: memory", lambda: doctor_device.memory(rank.device)),
        ("device: health", lambda: doctor_device.health(rank.device)),
        ("host: limits", lambda: doctor_host.limits(gpus=gpus)),
    ]
    if rank.leads:
        needed = None if asked.checkpoint is None or asked.config is None else (
            BASE + asked.config.data.memory_gb * 2**30 + asked.checkpoint / place.world
        )  # fmt: skip
        quick += [
            ("versions: pinned", doctor_versions.pinned),
            ("host: shared memory", lambda: doctor_host.shared_memory(place.node, gpus=gpus)),
            ("host: CPUs", lambda: [doctor_host.processors(place.node, asked.workers)]),
            ("host: memory", lambda: [doctor_host.memory(place.node, needed)]),
            ("ports: interfaces", lambda: [doctor_host.interfaces(interfaces)]),
            ("caches", lambda: doctor_host.compiled(caches)),
        ]
    if rank.first and place.world > 1:
        ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        quick.append(("ports", lambda: doctor_host.port(place.address, ours=ours, nodes=rank.nodes)))
    for name, check in quick:
        rank.check(name, check, limit_s=SHORT_S)
    if rank.leads:
        files(rank)
        if not asked.quick:
            child = partial(doctor_kernels.in_a_child, rank.device, limit_s=KERNELS_S)
            rank.check("kernels", child, limit_s=KERNELS_S + SHORT_S)


def _note(rank: Rank, kind: str, facts: Callable[[], Any]) -> list[Finding]:
    """For the first rank to compare."""
    rank.facts[kind] = facts()
    return []


def files(rank: Rank) -> None:
    """The run's folder and its data, seen from one rank of a node."""
    asked = rank.asked
    size = 8 << 20 if asked.quick else 64 << 20
    if (folder := asked.folder) is None:
        rank.findings.append(Finding("files: run folder", "skipped", "neither --config nor --run-dir was given"))
    else:
        keep = asked.config.checkpoint.keep if asked.config else 1
        rank.check("files: run folder", lambda: doctor_files.writable(folder), limit_s=SHORT_S)
        rank.check("files: space", lambda: doctor_files.room(folder, asked.checkpoint, keep=keep), limit_s=SHORT_S)
        rank.check("files: writing", lambda: doctor_files.written(folder, size), limit_s=LONG_S)
        rank.check("files: renaming", lambda: doctor_files.renamed(folder), limit_s=SHORT_S)
        rank.check("files: locks", lambda: doctor_files.locked(folder), limit_s=SHORT_S)
    if (config := asked.config) is not None:
        rank.check("files: shards", lambda: doctor_files.shards(config.data, size), limit_s=LONG_S)


def rates(rank: Rank) -> None:
    """What a device does in a second, all ranks at a time, as in training."""
    gpu, asked, device = rank.device.type == "cuda", rank.asked, rank.device
    peak = asked.config.log.peak_tflops if asked.config else None
    size = (8192 if gpu else 1024) // (2 if asked.quick else 1)
    rank.check("device: products", lambda: doctor_device.products(device, size=size, peak_tflops=peak), limit_s=LONG_S)
    moved = (256 << 20 if gpu else 32 << 20) // (8 if asked.quick else 1)
    rank.check("device: copies", lambda: doctor_device.copies(device, size=moved), limit_s=LONG_S)


def between(rank: Rank) -> None:
    """Clocks, a shared file system and links: what takes several ranks."""
    place, board, asked = rank.place, rank.board, rank.asked
    layout = layout_found(rank)
    if place.world == 1:
        return
    rank.at("clocks")
    rank.facts["offset"] = board.offset(rounds=ROUNDS, clock=time.time) if not rank.first else (0.0, 0.0)
    if rank.nodes > 1 and asked.folder is not None:
        rank.at("files: shared")
        token = hashlib.sha256(f"{place.address} {os.getpid()} {time.time_ns()}".encode()).hexdigest()[:12]
        if rank.first:
            board.put("marker", f".doctor-{token}")
        name = str(board.get("marker", within_s=SHORT_S))
        marker = doctor_files.Marker(asked.folder, name, board, rank.first, rank.leads and not rank.first)
        rank.findings += doctor_files.shared(marker)
    if missing := board.meet("links", within_s=LONG_S):
        said = f"not tried: {ranks_of(missing)} did not come"
        rank.findings.append(Finding("links", "fail", said, "all ranks", "see the rows about these ranks"))
        return
    rank.at("links: process group")
    try:
        mesh = doctor_links.joined(place, layout, device=rank.device)
    except Exception as error:  # hung, or what torch, gloo or NCCL have to say
        remedy = "see MASTER_ADDR, firewalls, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO tells more"
        rank.findings.append(Finding("links: process group", "fail", told(error), "all ranks join", remedy))
        return
    found, pairs = doctor_links.links(
        mesh, device=rank.device, sizes=Sizes.of(rank.device, quick=asked.quick), nominal=asked.nominal, node=place.node,
        say=rank.at,
    )  # fmt: skip
    rank.findings += found
    rank.facts["pairs"] = pairs
    if not board.meet("links: done", within_s=LONG_S) and all(each.status != "fail" for each in found):
        within(SHORT_S, stop)


def layout_found(rank: Rank) -> Layout:
    """The configuration's; where it has none for these ranks, that of no configuration."""
    check, expected = "configuration: layout", "one that these ranks can run"
    try:
        layout = doctor_links.layout_of(rank.asked.config, rank.place)
    except ValueError as error:
        layout = doctor_links.layout_of(None, rank.place)
        remedy = "change the number of ranks or the parallel section; launch/plan.py tells what fits"
        rank.findings.append(Finding(check, "fail", told(error), expected, remedy))
        return layout
    if rank.asked.config and rank.first:
        rank.findings.append(Finding(check, "pass", layout.name, expected))
    return layout


def conclude(rank: Rank, *, out: str | None) -> int:
    """The first rank's last word: everybody's report, compared, shown and written."""
    world, node = rank.place.world, rank.place.node
    reports, facts = {0: list(rank.findings)}, {0: rank.facts}
    silent = []
    for each in range(1, world):
        report = rank.board.get(f"report {each}", within_s=0.0)
        if report is None:
            silent.append(each)
            continue
        reports[each] = [Finding.of(finding) for finding in report["findings"]]
        facts[each] = report["facts"]
    hosts = {each: facts[each]["host"] if each in facts else "unknown" for each in range(world)}
    reports[0] += together(facts, hosts, node=node)
    if silent:
        last = {each: rank.board.get(f"at {each}", within_s=0.0) or "not there at all" for each in silent}
        said = "; ".join(f"rank {each} was last at: {what}" for each, what in last.items())
        remedy = "see these ranks' processes and nodes: they are stopped, hang or are dead"
        reports[0].append(Finding("ranks: reports", "fail", said, "one from every rank", remedy))
    found = rows(reports, hosts)
    code = FAILED if any(row.finding.status == "fail" for row in found) else 0
    plan = plan_of(found, nodes=rank.nodes, ranks=node)
    sys.stdout.write(f"{table(found)}\n")
    if plan:
        sys.stdout.write(f"for launch/plan.py: {arguments(plan)}\n")
    if out is not None:
        told_of = {each: {**fact, "code": ""} for each, fact in facts.items()}
        about = {"code": code, "ranks": world, "ranks_per_node": node, "plan": plan, "facts": told_of}
        within(SHORT_S, partial(write_json, Path(out), found, about=about))
        sys.stdout.write(f"report: {out}\n")
    return code


def together(facts: dict[int, dict[str, Any]], hosts: dict[int, str], *, node: int) -> list[Finding]:
    """What shows only when ranks are compared."""
    found = doctor_versions.equal(facts, hosts)
    if len(facts) == 1:
        return found
    found.append(doctor_host.same_machine(facts, node))
    offsets = {each: (fact["offset"][0], fact["offset"][1]) for each, fact in facts.items() if "offset" in fact}
    if offsets:
        found.append(doctor_host.clocks(offsets, hosts))
    seconds: dict[str, dict[str, float]] = {}
    for fact in facts.values():
        for axis, pairs in fact.get("pairs", {}).items():
            for pair, value in pairs.items():
                both = seconds.setdefault(axis, {})
                both[pair] = max(value, both.get(pair, 0.0))
    return [*found, *doctor_links.pairs(seconds, node=node, hosts=hosts)]


if __name__ == "__main__":
    run_command("doctor", main)
