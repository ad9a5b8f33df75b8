"""D4, D5: the loader against plain webdataset, bare reads and a bare PyAV loop, all with two processes over the same shards.

    python -m bench.loader        # about 90 s on two quiet cores

D4  Latents of 49 x 480 x 720 with text features, 6.3 MB a sample in bfloat16, checksums on; shards in the page cache. Peers:
    webdataset with safetensors' decoder (in one process or in two workers of torch's DataLoader, whichever is faster), and
    processes that read the same members and do nothing with them. Then the share of a 200 ms step that waits for the loader,
    and resident memory over 20,000 small samples.
D5  H.264 clips of 49 x 256 x 384, decoded whole. The peer: processes that decode the same clips with PyAV to RGB arrays.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from safetensors.torch import load, save

from bench.measure import interleaved
from bench.record import Row
from cogvideo_dist.config.schema import Data, Size
from cogvideo_dist.data.loader import Loader, open_sources
from cogvideo_dist.data.plan import Plan
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.data.writing import Entry, write_shards
from cogvideo_dist.pack.layout import Clip
from cogvideo_dist.rng import fold

PROCESSES = 2
LARGE: Size = (49, 480, 720)
SMALL: Size = (5, 32, 32)
VIDEO: Size = (49, 256, 384)
STEP_S = 0.2
STEPS = 5
"""Optimizer steps over the latents: planned for each are as many clips as a small training step has."""


class OnePerPack:
    """A clip is a token."""

    def __call__(self, size: Size) -> Clip:
        return Clip(0, (1, 1, 1))

    def cost(self, clip: Clip) -> float:
        return 1.0


def latents(size: Size, count: int, *, text: tuple[int, int]) -> Iterator[Entry]:
    frames, height, width = size
    shape = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
    generator = fold(0, "bench loader")
    noise = torch.randn(shape, generator=generator).bfloat16()
    facts = {
        "source": "bench", "kind": "latent", "frames": frames, "fps": 8.0, "height": height, "width": width,
        "caption_length": 9, "size": size,
    }  # fmt: skip
    for number in range(count):
        moments = {"mean": noise + number, "logvar": noise}
        features = {"text": torch.full(text, number, dtype=torch.bfloat16)}
        members = {"latent.safetensors": save(moments), "text.safetensors": save(features), "txt": b"A caption"}
        yield f"{number:08d}", members, facts


def videos(size: Size, count: int) -> Iterator[Entry]:
    """Clips of moving noise, which compress like footage."""
    frames, height, width = size
    generator = np.random.default_rng(0)
    for number in range(count):
        file, still = io.BytesIO(), generator.integers(0, 255, (height // 8 + 60, width // 8 + 60, 3), np.uint8)
        with av.open(file, "w", format="mp4") as output:
            stream = output.add_stream("libx264", rate=Fraction(8))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for at in range(frames):
                piece = np.kron(still[at : at + height // 8, at : at + width // 8], np.ones((8, 8, 1), np.uint8))
                output.mux(stream.encode(av.VideoFrame.from_ndarray(piece, format="rgb24")))
            output.mux(stream.encode())
        facts = {
            "source": "bench", "kind": "video", "frames": frames, "fps": 8.0, "height": height, "width": width,
            "caption_length": 9,
        }  # fmt: skip
        yield f"{number:08d}", {"mp4": file.getvalue(), "txt": b"A caption"}, facts


def loader(folder: Path, size: Size, *, source: Any, pack: int, packs: int = 1) -> Loader:
    data = Data(source, (size,), 8.0, pack, packs, shards=str(folder), workers=PROCESSES, crop="center")
    catalog, stores = open_sources(data)
    plan = Plan(catalog, data, seed=0, geometry=OnePerPack())
    return Loader(plan, stores, data=data, geometry=OnePerPack(), dp_rank=0, dp_size=1)


def each_in_processes(work: Callable[[Path, int], None], folder: Path) -> Callable[[], None]:
    """``work`` on every second sample, in each of two processes."""

    def run() -> None:
        context = multiprocessing.get_context("fork")
        running = [context.Process(target=work, args=(folder, number)) for number in range(PROCESSES)]
        for process in running:
            process.start()
        for process in running:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a process of the peer ended with {process.exitcode}")

    return run


def read_raw(folder: Path, number: int) -> None:
    reader = ShardReader(folder)
    for record in reader.records[number::PROCESSES]:
        with (folder / record.shard).open("rb", buffering=0) as file:
            for member in record.members.values():
                os.pread(file.fileno(), member.size, member.offset)


def decode_bare(folder: Path, number: int) -> None:
    reader = ShardReader(folder)
    for record in reader.records[number::PROCESSES]:
        member = record.members["mp4"]
        with (folder / record.shard).open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        np.stack(frames)


def decoded_by_webdataset(folder: Path) -> Any:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    tensors = webdataset.handle_extension("safetensors", load)
    return webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode(tensors)


def webdataset_alone(folder: Path) -> None:
    for _ in decoded_by_webdataset(folder):
        pass


def webdataset_workers(folder: Path) -> None:
    dataset = decoded_by_webdataset(folder)
    for _ in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=PROCESSES):
        pass


def taking(mine: Loader, steps: int) -> Callable[[], None]:
    """So many steps of a loader whose workers run already, as in training: nothing is read before the time begins, and nothing
    that is not taken."""

    def run() -> None:
        for _ in mine.iterate(0, steps=steps):
            pass

    return run


def bench_latents(folder: Path, count: int, *, limit: float) -> dict[str, Any]:
    write_shards(folder, latents(LARGE, count, text=(226, 4096)), max_shard_size=200_000_000)
    mine = loader(folder, LARGE, source="latents", pack=2, packs=count // 2 // STEPS)
    sides = {
        "ours": taking(mine, STEPS), "raw": each_in_processes(read_raw, folder),
        "webdataset": lambda: webdataset_alone(folder), "webdataset workers": lambda: webdataset_workers(folder),
    }  # fmt: skip
    times, quiet = interleaved(sides, repeats=5, limit=limit)
    mine.close()
    return {"samples": count, "seconds": times, "undisturbed": quiet, "wait": waiting(folder)}


def waiting(folder: Path) -> float:
    """Share of the time that a trainer with steps of ``STEP_S`` waits for its loader."""
    mine = loader(folder, LARGE, source="latents", pack=4)
    stream = mine.iterate(0)
    next(stream)
    waited, begun = 0.0, time.perf_counter()
    for _ in range(25):
        time.sleep(STEP_S)
        at = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - at
    mine.close()
    return waited / (time.perf_counter() - begun)


def resident(processes: Sequence[int]) -> int:
    """Bytes that only these processes hold, and their share of what they hold together."""
    lines = [Path(f"/proc/{number}/smaps_rollup").read_text().splitlines() for number in processes]
    return sum(1024 * int(line.split()[1]) for text in lines for line in text if line.startswith("Pss:"))


def bench_memory(folder: Path, samples: int) -> dict[str, Any]:
    """Resident memory of trainer and workers while they go through so many small samples."""
    write_shards(folder, latents(SMALL, 500, text=(4, 8)))
    mine = loader(folder, SMALL, source="latents", pack=50)
    stream, found = mine.iterate(0), {}
    for number in range(samples // 50):
        next(stream)
        if (number + 1) * 50 in (samples // 10, samples):
            gc.collect()
            pool = cast(Any, mine.reads)
            found[(number + 1) * 50] = resident([os.getpid(), *pool.processes])
    mine.close()
    return {"samples": list(found), "bytes": list(found.values())}


def bench_videos(folder: Path, count: int, *, limit: float) -> dict[str, Any]:
    write_shards(folder, videos(VIDEO, count))
    mine = loader(folder, VIDEO, source="pixels", pack=1)
    sides = {"ours": taking(mine, count), "bare": each_in_processes(decode_bare, folder)}
    times, quiet = interleaved(sides, repeats=5, limit=limit)
    mine.close()
    return {"clips": count, "seconds": times, "undisturbed": quiet}


def bench_loader(*, samples: int = 150, clips: int = 48, small: int = 20_000, limit: float = 60.0) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        memory = bench_memory(folder / "small", small)
        found = {
            "latents": bench_latents(folder / "latents", samples, limit=limit),
            "videos": bench_videos(folder / "videos", clips, limit=limit),
        }
    undisturbed = all(part["undisturbed"] for part in found.values())
    return {**found, "memory": memory, "undisturbed": undisturbed}


def rows(result: dict[str, Any]) -> list[Row]:
    times = {name: float(np.median(runs)) for name, runs in result["latents"]["seconds"].items()}
    count, clips = result["latents"]["samples"], result["videos"]["clips"]
    rate = {name: count / seconds for name, seconds in times.items()}
    best = max(rate["webdataset"], rate["webdataset workers"])
    frames = {name: clips * VIDEO[0] / float(np.median(runs)) for name, runs in result["videos"]["seconds"].items()}
    before, after = result["memory"]["bytes"]
    growth = f"resident memory after {result['memory']['samples'][1]} samples vs after {result['memory']['samples'][0]}"
    return [
        Row("D4", "latents vs webdataset", "/s", rate["ours"], best, rate["ours"] / best, at_least=4),
        Row("D4", "latents vs bare reads", "/s", rate["ours"], rate["raw"], rate["ours"] / rate["raw"], at_least=0.5),
        Row("D4", f"latents: wait of a trainer with steps of {STEP_S:g} s", "%", 100 * result["latents"]["wait"], at_most=2),
        Row("D4", growth, "MB", after / 1e6, before / 1e6, after / before, at_most=1.05),
        Row(
            "D5", "videos vs a bare PyAV loop, frames", "/s", frames["ours"], frames["bare"],
            frames["ours"] / frames["bare"], at_least=0.9,
        ),
    ]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print(json.dumps(bench_loader()))


if __name__ == "__main__":
    main()
