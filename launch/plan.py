"""Plan a run: python launch/plan.py --config FILE [key=value ...] --nodes 32 --gpus-per-node 8 --memory 80

Every legal layout of a configuration on a cluster, what each takes by the cost model, and which one to run. Nothing is loaded.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from launch.environment import FAILED, config_parser, run_command, split_config
from launch.plan_cluster import Cluster
from launch.plan_dry import DryRun, dry_run
from launch.plan_layouts import Survey, survey
from launch.plan_report import scaling, table, write_report
from launch.plan_scaling import curve


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    config = load_config(DiTRun, **split_config(options.config))
    cluster = cluster_of(options)
    found = survey(config, cluster)
    curves = [curve(config, cluster, strong=strong) for strong in (True, False)]
    dry = dried(found) if options.dry_run else None
    out = Path(options.out or Path(config.run.dir) / "plan")
    write_report(out, found, curves=curves, dry=vars(dry) if dry else None)
    sys.stdout.write(f"{table(found)}\n\n{scaling(curves)}\n\n")
    if dry:
        sys.stdout.write(told(dry) + "\n\n")
    sys.stdout.write(f"report: {out / 'plan.json'}, {out / 'plan.png'}\n")
    if found.recommended is None or (dry and dry.problems):
        sys.exit(FAILED)


def parser() -> argparse.ArgumentParser:
    found = config_parser(
        "Every legal layout of a training configuration on a cluster: memory of a GPU by part, traffic by axis, time of a step "
        "and MFU, on paper, and which one to run and why.",
        "python launch/plan.py --config configs/cogvideox-5b/base.yaml --nodes 32 --gpus-per-node 8 --memory 80",
    )
    add = found.add_argument
    add("--nodes", type=int, required=True, help="how many")
    add("--gpus-per-node", type=int, required=True, help="GPUs of each")
    add("--memory", type=float, required=True, metavar="GB", help="of a GPU; a tenth is left free")
    add(
        "--host-memory",
        type=float,
        default=1000.0,
        metavar="GB",
        help="of a node, for what is offloaded (%(default)g)",
    )
    add(
        "--link",
        type=float,
        default=450.0,
        metavar="GB/S",
        help="that a GPU sends within its node (default %(default)g)",
    )
    add(
        "--network",
        type=float,
        default=50.0,
        metavar="GB/S",
        help="that a GPU sends to other nodes (default %(default)g)",
    )
    add(
        "--dry-run", action="store_true",
        help="build the model of every rank of the recommended layout without memory, and check that the ranks' pieces are all "
        "of it",
    )  # fmt: skip
    add("--out", help="folder of plan.json and plan.png (default: plan in the run's folder)")
    return found


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Raises ``ConfigError`` for numbers that are none of a cluster."""
    for name in ("nodes", "gpus_per_node", "memory", "host_memory", "link", "network"):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, found {value:g}")
    return Cluster(
        options.nodes, options.gpus_per_node, memory=1e9 * options.memory, host_memory=1e9 * options.host_memory,
        link=1e9 * options.link, network=1e9 * options.network,
    )  # fmt: skip


def dried(found: Survey) -> DryRun:
    """Of the recommended layout, or of the smallest where none fits."""
    chosen = found.recommended or found.leanest
    return dry_run(chosen.share.config, chosen.layout, stage=chosen.share.stage)


def told(dry: DryRun) -> str:
    ranks: dict[str, Any] = {"keeps": dry.held, "updates": dry.updated}
    parts = "; ".join(f"{what} {min(counts):,} to {max(counts):,}" for what, counts in ranks.items())
    lines = [
        f"dry run: {len(dry.held):,} ranks of {dry.parameters:,} parameters, {dry.trained:,} trained; a rank {parts}"
    ]
    lines += dry.problems or ["the ranks' pieces are the whole model, each element once"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command("plan", main)
