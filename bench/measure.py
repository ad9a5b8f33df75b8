"""How times, saved activations and attention calls are measured, alike for ours and for a peer."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")
WARM_UPS = 2
DISTURBANCE = 0.1
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Setting:
    """Where a GPU measurement runs. ``toy`` takes the same path at a size that a CPU does at once, to try the code."""

    device: torch.device
    toy: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, but float32 on a CPU, whose products of 16 bits are hundreds of times slower."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


def interleaved(
    sides: Mapping[str, Callable[[], object]], *, repeats: int, warm_ups: int = WARM_UPS, limit: float = 75.0
) -> tuple[dict[str, list[float]], bool]:
    """Seconds of ``repeats`` undisturbed runs of every side, and whether there were that many within ``limit`` seconds; if
    not, those of all runs.

    The sides take turns, in an order that turns too. A run is disturbed if other processes took more than ``DISTURBANCE``
    of a core while it lasted.
    """
    from tqdm import tqdm  # not needed by the GPU benchmark, which is to run with torch alone

    names = list(sides)
    every, kept = ({name: list[float]() for name in names} for _ in range(2))
    for name in names * warm_ups:
        sides[name]()
    end = time.monotonic() + limit
    with tqdm(total=repeats * len(names), desc="undisturbed runs", leave=False) as progress:
        turn = 0
        while waiting := [name for name in names if len(kept[name]) < repeats]:
            if time.monotonic() > end and min(map(len, every.values())) >= repeats:
                return every, False
            first = turn % len(waiting)
            for name in waiting[first:] + waiting[:first]:
                seconds, disturbed = timed(sides[name])
                every[name].append(seconds)
                if not disturbed:
                    kept[name].append(seconds)
                    progress.update()
            turn += 1
    return kept, True


def timed(run: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of a run and whether other processes disturbed it."""
    busy, own, start = machine_seconds(), time.process_time(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    others = machine_seconds() - busy - (time.process_time() - own)
    return seconds, others > DISTURBANCE * seconds + 2 * TICK


def machine_seconds() -> float:
    """Processor time that the whole machine has spent on anything since its start."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _waiting, irq, soft_irq, steal = fields[:8]
    return (user + nice + system + irq + soft_irq + steal) * TICK


def saved_bytes(forward: Callable[[], Tensor], *, parameters: Iterator[nn.Parameter]) -> int:
    """Bytes that autograd keeps between forward and backward: the storages of all saved tensors, each counted once and
    whole, without those of parameters. What a checkpoint saves inside itself during its backward is not among them."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage  # held, so that no later storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in own)


class AttentionCalls(TorchDispatchMode):
    """Counts forward calls of fused attention kernels, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        self.count += "_attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def attention_calls(step: Callable[[], Result]) -> tuple[int, Result]:
    """How often ``step`` calls a forward attention kernel, and what it returns."""
    with AttentionCalls() as calls:
        result = step()
    return calls.count, result


def worst_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    """The tensor that differs most, and by how much: max |a - b| / max |b|.

    A gradient that is zero in exact arithmetic is held to the rounding of the others: the divisor is at least a millionth
    of the largest element of all.
    """
    floor = 1e-6 * max(tensor.abs().max().item() for tensor in expected.values())
    errors = {
        name: (found[name] - tensor).abs().max().item() / max(tensor.abs().max().item(), floor)
        for name, tensor in expected.items()
    }
    return max(errors.items(), key=lambda item: item[1])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of ``run``: Triton's do_bench on a GPU, three plain runs on a CPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=25, rep=100, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Bytes allocated at most inside the block, above those before it, as ``["bytes"]``; 0 on a CPU."""
    found = {"bytes": 0}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    torch.cuda.synchronize(device)
    found["bytes"] = torch.cuda.max_memory_allocated(device) - before
