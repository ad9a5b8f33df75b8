"""The peak rate that utilisation (MFU) is measured against."""

from __future__ import annotations

import time

import torch

KNOWN = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Dense bf16 peak of a GPU, FLOP/s, by a part of its name (vendors' data sheets)."""


def peak_flops(device: torch.device, configured_tflops: float | None) -> float:
    """FLOP/s: as configured, else of a known GPU, else (CPU) as a large float32 matrix product measures it."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in KNOWN.items():
            if part in name:
                return peak
        raise ValueError(f"the peak rate of {name!r} is not known; set log.peak_tflops in the configuration")
    a = torch.ones(768, 768)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 768**3 / (time.perf_counter() - start)
