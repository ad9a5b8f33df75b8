"""A rank's device, for launch/doctor.py: who else uses it, whether it is well, and how fast it computes and copies."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.engine.flops import peak_flops
from launch.doctor_check import Finding, Status, amount, judged, rate, told

REACHED, POOR = 0.6, 0.3
"""Of the peak, what a large product should reach, and what no sound device falls below."""

COPIED, SLOW = 10e9, 3e9
"""Bytes a second between pinned memory and a GPU: below PCIe 3.0 of 16 lanes, and hardly any lanes."""

ROUNDING = 2e-2
"""Of a product in bfloat16, relative to its largest element."""

OTHERS = 2e9
"""Bytes of a GPU's memory in use before this command takes any; a context of CUDA takes half a GB."""

THROTTLED = {0x8: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Bits of NVML's reasons for a lower clock that are no ordinary work."""

QUERY = ("uuid", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active", "temperature.gpu")
SMI_S = 20.0


class Told(NamedTuple):
    """A GPU by nvidia-smi: uncorrected errors since the driver began, reasons for a lower clock, degrees."""

    errors: int | None
    reasons: int
    degrees: int | None


def timed(work: Callable[[], object], *, device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of several, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        wait_for(device)
        begun = time.perf_counter()
        work()
        wait_for(device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> list[Finding]:
    """Of a GPU, before anything of this process lies there."""
    check = "device: memory"
    if device.type != "cuda":
        return [Finding(check, "skipped", "no GPU")]
    free, total = torch.cuda.mem_get_info(device)
    used = total - free
    found, expected = f"{amount(free)} of {amount(total)} free", f"at most {amount(OTHERS)} in use"
    figures = {"free_bytes": float(free), "total_bytes": float(total)}
    if used > OTHERS:
        others = users(str(torch.cuda.get_device_properties(device).uuid))
        found += f"; {amount(used)} in use" + (f" by {others}" if others else "")
        return [Finding(check, "warn", found, expected, "end what is left there, or ask for GPUs of your own", figures)]
    return [Finding(check, "pass", found, expected, figures=figures)]


def users(uuid: str) -> str:
    """Processes that have memory of a GPU."""
    rows = smi(["--query-compute-apps=gpu_uuid,pid,used_memory"]) or []
    return ", ".join(f"process {row[1]} ({row[2]} MiB)" for row in rows if len(row) == 3 and uuid in row[0])


def smi(arguments: Sequence[str]) -> list[list[str]] | None:
    """Rows of nvidia-smi's answer; None where there is no such program or it does not answer."""
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def health(device: torch.device) -> list[Finding]:
    """Uncorrected errors of its memory, and a clock that is held down."""
    check = "device: health"
    if device.type != "cuda":
        return [Finding(check, "skipped", "no GPU")]
    rows = smi([f"--query-gpu={','.join(QUERY)}"])
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    own = [row for row in rows or [] if uuid in row[0]]
    return [well(told_of(own[0]))] if own else [Finding(check, "skipped", "nvidia-smi does not tell")]


def told_of(row: Sequence[str]) -> Told:
    """A row of ``QUERY``; what a GPU does not have is ``[N/A]``."""
    errors, reasons, degrees = row[1:4]
    return Told(
        int(errors) if errors.isdecimal() else None, int(reasons, 16) if reasons.startswith("0x") else 0,
        int(degrees) if degrees.isdecimal() else None,
    )  # fmt: skip


def well(found: Told) -> Finding:
    check, expected = "device: health", "no uncorrected errors, no slowdown"
    degrees = "" if found.degrees is None else f", {found.degrees} C"
    if found.errors:
        said = f"{found.errors} uncorrected errors of memory{degrees}"
        return Finding(check, "fail", said, expected, "have the node drained and the GPU reset or replaced")
    held = [name for bit, name in THROTTLED.items() if found.reasons & bit]
    if held:
        remedy = "see cooling and power of the node: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
        return Finding(check, "warn", f"its clock is held down: {', '.join(held)}{degrees}", expected, remedy)
    errors = "errors are not counted" if found.errors is None else "no uncorrected errors"
    return Finding(check, "pass", errors + degrees, expected)


Product = Callable[[Tensor, Tensor], Tensor]


def products(
    device: torch.device, *, size: int, peak_tflops: float | None, repeats: int = 5, product: Product = torch.mm
) -> list[Finding]:
    """A square product of ``size``: bfloat16 on a GPU, float32 on CPUs; its rate, and whether it is right."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = timed(lambda: product(a, b), device=device, repeats=repeats)
    return [right(a, b, found=product(a, b)), fast(2 * size**3 / seconds, device=device, peak_tflops=peak_tflops)]


def right(a: Tensor, b: Tensor, *, found: Tensor) -> Finding:
    """Rows of the product, spread over it, against float64."""
    rows = torch.linspace(0, len(a) - 1, min(16, len(a)), device=a.device).long()
    expected = a[rows].double() @ b.double()
    error = ((found[rows].double() - expected).abs().max() / expected.abs().max()).item()
    bound = ROUNDING if a.dtype == torch.bfloat16 else 1e-4
    good = error <= bound  # not if it is not a number
    remedy = "" if good else "take the device out: it computes wrong numbers"
    said = f"a product in {str(a.dtype).removeprefix('torch.')} is off by {error:.1e} of its largest element"
    return Finding("device: arithmetic", "pass" if good else "fail", said, f"at most {bound:g}", remedy)


def fast(flops: float, *, device: torch.device, peak_tflops: float | None) -> Finding:
    check, figures = "device: products", {"flop_per_s": flops}
    said = f"{flops / 1e12:.3g} TFLOP/s"
    if device.type != "cuda":
        return Finding(check, "pass", f"{said} in float32", "reported only", figures=figures)
    try:
        peak = peak_flops(device, peak_tflops)
    except ValueError as error:
        return Finding(check, "pass", f"{said} in bfloat16", f"no peak is known: {told(error)}", figures=figures)
    status: Status = judged(flops, warn=REACHED * peak, fail=POOR * peak)
    remedy = "see its clock, power limit, heat and other processes: nvidia-smi -q -d CLOCK,POWER,PERFORMANCE"
    said = f"{said} in bfloat16, {flops / peak:.0%} of {peak / 1e12:.0f}"
    return Finding(check, status, said, f"{REACHED:.0%} of its peak", "" if status == "pass" else remedy, figures)


def copies(device: torch.device, *, size: int, repeats: int = 5) -> list[Finding]:
    """``size`` bytes from pinned memory to a GPU and back; on CPUs from memory to memory."""
    check, cuda = "device: copies", device.type == "cuda"
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
    there = torch.zeros(size, dtype=torch.uint8, device=device)
    into = size / timed(lambda: there.copy_(host, non_blocking=cuda), device=device, repeats=repeats)
    if not cuda:
        figures = {"copied_bytes_per_s": into}
        return [Finding(check, "pass", f"{rate(into)} from memory to memory", "reported only", figures=figures)]
    back = size / timed(lambda: host.copy_(there, non_blocking=True), device=device, repeats=repeats)
    status = judged(min(into, back), warn=COPIED, fail=SLOW)
    remedy = "see the lanes that it has (nvidia-smi -q, GPU Link Info), and that ranks run on CPUs near their GPU"
    return [
        Finding(
            check, status, f"{rate(into)} to the GPU, {rate(back)} back, pinned", f"{rate(COPIED)}",
            "" if status == "pass" else remedy, {"to_device_bytes_per_s": into, "to_host_bytes_per_s": back},
        )
    ]  # fmt: skip
