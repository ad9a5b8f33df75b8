"""make bench-gpu: every GPU measurement in one command.

    python bench/gpu.py [--minutes 8] [--only NAME ...] [--out docs/benchmarks]
    python bench/gpu.py --smoke          # the same code on a CPU at toy size, half a minute; its figures mean nothing

Needs torch alone; diffusers is measured beside ours where it is installed. A measurement that no longer fits into the time
is left out, by name. Results are appended to gpu-<device>.json and .md. Ends with 2 on a machine without a CUDA device, with
1 if a measurement failed.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import correctness, gpu_vae, rates, training
from bench.measure import Setting
from bench.peers import diffusers_installed
from bench.record import FOLDER, Report, Row, append, environment, table

LENGTHS = (17_776, 45_104)  # tokens of a 480x720x49 clip of the 5B and of a 768x1360x81 clip of the 1.5-5B
TOY_LENGTH = 96
CLOSING_SECONDS = 5.0


@dataclass(frozen=True)
class Measurement:
    """``seconds``: about how long it takes; it is not begun with less time left."""

    name: str
    seconds: float
    run: Callable[[Setting], list[Row]]


def measurements(setting: Setting) -> list[Measurement]:
    """In the order of what would change the plan most."""
    found = []
    for length in (TOY_LENGTH,) if setting.toy else LENGTHS:
        for backend in ("default", "flash") if setting.toy else rates.BACKENDS:
            run = partial(rates.attention, length=length, backend=backend)
            found.append(Measurement(f"attention-{backend}-{length}", 10, run))
    back_ends = rates.back_ends(setting)
    for lengths in ((TOY_LENGTH, TOY_LENGTH),) if setting.toy else ((LENGTHS[0],), (LENGTHS[1],) * 2):
        for name in back_ends:
            what = f"back-end-{name}-{len(lengths)}x{lengths[0]}"
            found.append(Measurement(what, 12, partial(rates.our_attention, backend=name, lengths=lengths)))
    return [
        *found,
        Measurement("head-norm", 5, rates.head_norm),
        Measurement("matrix-products", 5, rates.products),
        Measurement("convolution", 10, rates.convolution),
        *(Measurement(f"gate-{name}", 5, partial(correctness.back_end_gate, name=name)) for name in back_ends),
        Measurement("gate-block", 10, correctness.block_gate),
        Measurement("block", 30, rates.block),
        Measurement("fine-tune-5b", 90 if diffusers_installed() else 50, training.fine_tune_5b),
        Measurement("fine-tune-2b", 50 if diffusers_installed() else 25, training.fine_tune_2b),
        *(Measurement(*each) for each in gpu_vae.measured(setting)),
    ]


def run_all(chosen: Sequence[Measurement], setting: Setting, seconds: float) -> tuple[list[Row], list[str], bool]:
    """Rows, notes on what was left out or failed, and whether anything failed."""
    end = time.monotonic() + seconds - CLOSING_SECONDS
    rows: list[Row] = []
    notes = [] if diffusers_installed() else ["peers are left out: diffusers is not installed"]
    failed = False
    for index, measurement in enumerate(chosen, start=1):
        left = end - time.monotonic()
        if measurement.seconds > left:
            notes.append(
                f"{measurement.name} is left out: it takes about {measurement.seconds:g} s, {left:.0f} s were left"
            )
            continue
        start = time.monotonic()
        try:
            rows += measurement.run(setting)
            outcome = "done"
        except Exception as error:  # a device is lent for minutes: one failure must not take the others with it
            failed, outcome = True, "FAILED"
            notes.append(f"{measurement.name} failed: {type(error).__name__}: {error}")
            traceback.print_exc()
        gc.collect()
        torch.cuda.empty_cache()
        spent = time.monotonic() - start
        print(f"[{index}/{len(chosen)}] {measurement.name}: {outcome}, {spent:.1f} s", file=sys.stderr, flush=True)
    return rows, notes, failed


def device_facts(setting: Setting) -> dict[str, object]:
    if setting.device.type != "cuda":
        return {"device": "CPU at toy size: its figures mean nothing"}
    properties = torch.cuda.get_device_properties(setting.device)
    return {
        "device": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it (default 8)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these measurements alone")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results (docs/benchmarks)")
    parser.add_argument(
        "--smoke", action="store_true", help="toy size on the CPU, nothing written unless --out is given"
    )
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("no CUDA device here; --smoke tries the same code on the CPU at toy size")
        return 2
    setting = Setting(torch.device("cpu" if args.smoke else "cuda"), toy=args.smoke)
    every = measurements(setting)
    unknown = set(args.only or ()) - {measurement.name for measurement in every}
    if unknown:
        parser.error(f"no measurement {sorted(unknown)[0]!r}; there are {', '.join(m.name for m in every)}")
    chosen = [measurement for measurement in every if not args.only or measurement.name in args.only]
    facts = environment() | device_facts(setting)
    rows, notes, failed = run_all(chosen, setting, 60 * args.minutes)
    print(table(rows), *(f"- {note}" for note in notes), sep="\n")
    if not args.smoke or args.out != FOLDER:
        name = "smoke" if args.smoke else re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
        append(Report(f"Run of {facts['date']}", facts, rows, notes), args.out, f"gpu-{name}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
