"""D1, D2: how full packs are, and how even the ranks of a step, on a million clips of three mixes; against what others do.

    python -m bench.packing [--clips 1000000]        # about 3 minutes on a quiet core

A pack's budget counts as total, so what it leaves empty is waste. Cost is launch/compose.py's for the 5B model. The rivals:
``bucket`` (one size to a pack), ``pad`` (as many clips as fit when all are as long as the longest) and plain first fit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.mixes import MIXES, packed
from bench.record import FOLDER, Row

OURS = ((8, 72_000, 1), (64, 72_000, 1), (256, 72_000, 1), (8, 36_000, 4), (64, 36_000, 4))
"""(ranks, tokens per pack, packs to a rank and step)."""

RIVALS = ("bucket", "pad", "first fit")


def bench_packing(clips: int) -> dict[str, Any]:
    """Figures of every mix, layout and policy; rivals on a tenth of the clips, at 8 ranks."""
    found = []
    work = [(mix, layout, "pack") for mix in MIXES for layout in OURS]
    work += [(mix, OURS[0], mode) for mix in MIXES for mode in RIVALS]
    for mix, (ranks, budget, micro), mode in tqdm(work, desc="packing", leave=False):
        figures = packed(
            mix, clips=clips if mode == "pack" else clips // 10, ranks=ranks, budget=budget, micro=micro, mode=mode
        )
        found.append(
            {"mix": mix.name, "ranks": ranks, "budget": budget, "micro": micro, "mode": mode, **figures._asdict()}
        )
    return {"clips": clips, "packed": found}


def rows(result: dict[str, Any]) -> list[Row]:
    figures = []
    for one in result["packed"]:
        ours = one["mode"] == "pack"
        where = (
            f"{one['mix']}, {one['ranks']} ranks, {one['budget'] // 1000}k tokens, {one['micro']} packs: {one['mode']}"
        )
        bound = 1.01 if one["micro"] == 1 else 1.03
        figures += [
            Row("D1", f"{where}: useful tokens", "%", 100 * one["fill"], at_least=98.5 if ours else None),
            Row("D2", f"{where}: worst rank / mean", "", one["ratio"], at_most=bound if ours else None),
            Row(
                "D2", f"{where}: worst rank / mean, 95th percentile", "", one["ratio95"], at_most=1.05 if ours else None
            ),
        ]
        if ours:
            figures.append(
                Row("D1", f"{where}: clips planned per second", "/s", one["clips_per_second"], at_least=50_000)
            )
    draw(result, FOLDER / "packing.png")
    return figures


def draw(result: dict[str, Any], path: Path) -> None:
    """Fill and imbalance of every policy at 8 ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [one for one in result["packed"] if (one["ranks"], one["budget"]) == (8, 72_000)]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    mixes, modes = list(dict.fromkeys(one["mix"] for one in chosen)), list(dict.fromkeys(one["mode"] for one in chosen))
    for number, mode in enumerate(modes):
        mine = [next(one for one in chosen if (one["mix"], one["mode"]) == (mix, mode)) for mix in mixes]
        places = [place + 0.2 * (number - 1.5) for place in range(len(mixes))]
        axes[0].bar(places, [100 * one["fill"] for one in mine], 0.2, label=mode)
        axes[1].bar(places, [100 * (one["ratio"] - 1) for one in mine], 0.2, label=mode)
    for axis, title in zip(axes, ("useful tokens, % of the budget", "worst rank's cost above the mean, %")):
        axis.set_xticks(range(len(mixes)), mixes)
        axis.set_title(title, fontsize=10)
    axes[1].set_yscale("symlog", linthresh=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(modes))
    figure.suptitle(f"8 ranks, 72,000 tokens to a pack, {result['clips']:,} clips", fontsize=11)
    with tempfile.NamedTemporaryFile(suffix=".png") as aside:
        figure.savefig(aside.name, dpi=130)
        path.write_bytes(Path(aside.name).read_bytes())
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    print(json.dumps(bench_packing(parser.parse_args().clips)))


if __name__ == "__main__":
    main()
