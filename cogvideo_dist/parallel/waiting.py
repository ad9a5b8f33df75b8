"""How long this process's host was blocked in collectives: of ranks that keep step, the slow one waits least."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class Waits:
    """``seconds`` so far. Where collectives run on a device (NCCL), the host does not wait for them."""

    def __init__(self) -> None:
        self.seconds = 0.0


@contextmanager
def counting(waits: Waits) -> Iterator[None]:
    """Within, every wait of this process counts, whoever asked for the collective: all of them, also DeepSpeed's, end in
    ``Work.wait``."""
    wait = dist.Work.wait

    def counted(work: dist.Work, *arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        try:
            return wait(work, *arguments, **named)
        finally:
            waits.seconds += time.monotonic() - began

    dist.Work.wait = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
