"""C7: what a checkpoint costs the training: ours at once and beside the next steps, and torch.distributed.checkpoint's.

    python -m bench.saving        # about two minutes and 5 GB of disk on two quiet cores

The demo's transformer with 300 million parameters, its two moments and its averaged weights, float32, one process. A save's
stall is the time until the training may go on. Every side saves twice and the second time counts, when its buffers are
there. torch's does not hash and does not look at what it reads; ours does both.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bench.record import Row, faster
from cogvideo_dist.config.schema import Checkpoint, Train
from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.manifest import Saved
from cogvideo_dist.engine.player import Player
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.parallel.mesh import ParallelMesh, Place, start
from cogvideo_dist.protocols import Learner

CONFIG = DiTConfig(layers=15, heads=16, head_dim=64, time_embed_dim=512, text_dim=64, text_length=16)
SAVES = 2
STALL = 0.05
"""Of a save that is waited for, which one that is not may take of the training's time."""


def trained(config: DiTConfig, mesh: ParallelMesh) -> Player:
    """After a first update, as far as its state is concerned."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model, train = DiT(config), Train(steps=2, learning_rate=1e-4, precision="fp32", zero_stage=0)
    draw_parameters(model, 0)
    engine = Engine(model, train, mesh=mesh, micro_steps=1)
    weights = {name: p.detach().clone() for name, p in engine.names.items()}
    kinds = ("weights", "exp_avg", "exp_avg_sq", "ema")
    engine.restore(lambda kind, name, piece: weights[name].flatten()[piece.start : piece.stop], kinds=kinds, step=1)
    return Player(Learner("", model, train, lambda *_: NotImplemented), engine)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(reset: bool = False) -> int:
    """The most bytes that were in memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def ours(player: Player, mesh: ParallelMesh, folder: Path, *, asynchronous: bool) -> dict[str, float]:
    """Seconds until the training may go on and until all is on the disk, and the memory that it took."""
    policy = Checkpoint(1, keep=1, asynchronous=asynchronous)
    saver = Saver(folder, policy, mesh=mesh, say=lambda _: None)
    before, found = resident(), {}
    peak(reset=True)
    for step in range(1, SAVES + 1):
        begun = time.perf_counter()
        saver.save(Saved(step, 0, {}, {}), [player.state()])
        stall = time.perf_counter() - begun
        saver.finish()
        found = {"stall": stall, "total": time.perf_counter() - begun}
    found["memory"] = peak() - before
    saver.close()
    Stored.open(folder / f"step-{SAVES:06d}").verify()
    shutil.rmtree(folder)
    return found


def theirs(state: dict[str, dict[str, Tensor]], folder: Path, *, asynchronous: bool) -> dict[str, float]:
    found = {}
    for _ in range(SAVES):
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.perf_counter()
        if asynchronous:
            saving = dcp.async_save(state, checkpoint_id=folder)
            stall = time.perf_counter() - begun
            assert isinstance(saving, Future)
            saving.result()
        else:
            dcp.save(state, checkpoint_id=folder)
            stall = time.perf_counter() - begun
        found = {"stall": stall, "total": time.perf_counter() - begun}
    shutil.rmtree(folder)
    return found


def bench_saving(config: DiTConfig, folder: Path, *, mesh: ParallelMesh) -> dict[str, Any]:
    """Ready for JSON."""
    player = trained(config, mesh)
    count = sum(p.numel() for p in player.engine.names.values())
    state: dict[str, dict[str, Tensor]] = {
        kind: {name: player.engine._fragment(p, kind) for name, p in player.engine.names.items()}
        for kind in player.state().kinds()
    }
    return {
        "parameters": count,
        "bytes": 4 * count * len(state),
        "ours": ours(player, mesh, folder / "ours", asynchronous=False),
        "ours beside": ours(player, mesh, folder / "beside", asynchronous=True),
        "dcp": theirs(state, folder / "dcp", asynchronous=False),
        "dcp beside": theirs(state, folder / "dcp-beside", asynchronous=True),
    }


def rows(result: dict[str, Any]) -> list[Row]:
    what = f"checkpoint of {result['parameters'] / 1e6:.0f}M parameters ({result['bytes'] / 1e9:.1f} GB)"
    at_once, beside = result["ours"], result["ours beside"]
    return [
        Row("C7", f"{what}: stall of the save beside the steps, of one at once ({at_once['total']:.1f} s)", "",
            beside["stall"] / at_once["total"], at_most=STALL),
        faster("C7", f"{what}: stall beside the steps vs torch.distributed.checkpoint.async_save",
               ours=beside["stall"], peer=result["dcp beside"]["stall"]),
        faster("C7", f"{what}: all on the disk, with hashes, vs torch.distributed.checkpoint.save, without",
               ours=at_once["total"], peer=result["dcp"]["total"]),
        Row("C7", f"{what}: host memory beside the state, in copies of it", "", beside["memory"] / result["bytes"],
            at_most=1.05),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured; left out, the temporary one")
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    mesh = start(Place(), device=torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(json.dumps(bench_saving(CONFIG, Path(folder), mesh=mesh)))


if __name__ == "__main__":
    main()
