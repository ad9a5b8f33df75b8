"""Bytes that a rank sends by torch's collectives, counted alike for any library and as our own ledger counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARES = {
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "message": lambda n: 1.0,
}
"""Kind -> the part of its largest tensor list that one of n ranks sends by the bandwidth-optimal algorithm, on average."""

KINDS = {
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "message",
}
SILENT = ("recv_", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """Calls and bytes by kind of collective, over groups of ``ranks``."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # a tensor made of others: what it does with them comes by here in turn
        result = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name not in SILENT:
            kind = KINDS[name]
            self.calls[kind] += 1
            self.sent[kind] += round(SHARES[kind](self.ranks) * max(map(_bytes, (*args, result))))
        return result


def _bytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, Tensor))


def traffic_of(run: Callable[[], object], ranks: int) -> dict[str, dict[str, int]]:
    """Calls and bytes of ``run`` on this rank, by kind."""
    with Traffic(ranks) as found:
        run()
    return {"calls": dict(found.calls), "bytes": dict(found.sent)}
