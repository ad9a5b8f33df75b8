"""make bench: the transformer and the VAE against diffusers, and parallelism against DeepSpeed and torch, on the CPU.

    python bench/run.py [--only dit zero] [--out docs/benchmarks]        # under 15 minutes on two quiet cores

Writes cpu.json (everything measured) and cpu.md (the table, the machine and the versions).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import dit, loader, packing, parallel, parallel_block, saving, vae, vae_cp, zero
from bench.record import FOLDER, QUIET_LOAD, ROOT, Report, environment, table, write

BENCHMARKS = {
    "dit": dit.rows, "vae": vae.rows, "vae_cp": vae_cp.rows, "parallel": parallel.rows,
    "parallel_block": parallel_block.rows, "zero": zero.rows, "packing": packing.rows, "loader": loader.rows,
    "saving": saving.rows,
}  # fmt: skip
# Otherwise the time of a step depends on which blocks the C library gave back to the kernel before it, ours or the peer's.
KEEP_FREED_BLOCKS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
ENVIRONMENT: dict[str, dict[str, str]] = {"dit": KEEP_FREED_BLOCKS}

METHOD = (
    "times: medians, the sides in turn (the transformer's: of runs that no other process disturbed); above 1x is faster",
    "saved activations: every storage that autograd keeps from forward to backward, once and whole, without parameters",
    "peak resident memory: the kernel's high-water mark in a fresh process, less what was resident before the call",
    "gradient error: max |a - b| / max |b|, the worst parameter; of the whole gradient (B5) |a - b| / |b|",
    "VAE over ranks: channels a quarter of the released ones; the released scheme cuts the gradient of frames that it passes "
    "on and gathers activations for group norms, and is written here",
    "parallel: every rank has one thread; a run lasts as long as its slowest rank; N ranks, X bytes of one activation of all "
    "tokens; bytes are counted by the ledger or from torch's collectives, as bandwidth-optimal algorithms send them",
    "packing: the budget of every pack counts as total; costs are those of the 5B model; rivals on a tenth of the clips; the "
    "figure is packing.png",
    "loader: two processes a side; its own are running already, as in training, and the peers' start with the run",
    "checkpoints: the second of two saves of each side, in one process; ours are hashed and synced, torch's are synced",
    "nine tenths of the transformer's step are matrix products and attention that both sides share, and a quarter of the "
    "checkpointed peer's is made a second time, of which ours repeats the linears alone: its ratios stay near 1 and 1.2",
)


def measure(name: str) -> Any:
    """The benchmark's figures, taken in a process of its own."""
    command, variables = [sys.executable, "-m", f"bench.{name}"], os.environ | ENVIRONMENT.get(name, {})
    done = subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="these alone")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of cpu.json and cpu.md (docs/benchmarks)")
    args = parser.parse_args()
    machine, notes, raw, rows = environment(), list(METHOD), {}, []
    if machine["load_before"] > QUIET_LOAD:
        notes.append(f"the machine was busy before the start: load {machine['load_before']} > {QUIET_LOAD}")
    for index, name in enumerate(args.only, start=1):
        print(f"[{index}/{len(args.only)}] {name} ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        raw[name] = measure(name)
        rows += BENCHMARKS[name](raw[name])
        if not raw[name].get("undisturbed", True):
            notes.append(f"other processes disturbed {name} all along: its times and their ratios say little")
        print(f"[{index}/{len(args.only)}] {name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(rows), *(f"- {note}" for note in notes), sep="\n")
    write(
        Report("CPU benchmarks: ours against diffusers, DeepSpeed and torch", machine, rows, notes, raw),
        args.out,
        "cpu",
    )


if __name__ == "__main__":
    main()
