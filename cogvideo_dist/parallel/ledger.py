"""What this rank sent: calls and bytes of every collective on tensors, by axis and operation.

Bytes are those of the bandwidth-optimal algorithm, whatever the backend makes of it: an all-gather sends a rank's part to each
other rank, a reduce-scatter all but its own part, a sum both, an all-to-all and a shift what they are given for others.
"""

from __future__ import annotations

from typing import NamedTuple


class Traffic(NamedTuple):
    calls: int = 0
    bytes: int = 0


class Ledger:
    """(axis, operation) -> calls and bytes since it was last taken."""

    def __init__(self) -> None:
        self._traffic: dict[tuple[str, str], Traffic] = {}

    def add(self, axis: str, operation: str, *, sent: int) -> None:
        calls, bytes_ = self._traffic.get((axis, operation), Traffic())
        self._traffic[axis, operation] = Traffic(calls + 1, bytes_ + sent)

    def bytes_of(self, axis: str) -> int:
        return sum(traffic.bytes for (name, _), traffic in self._traffic.items() if name == axis)

    def take(self) -> dict[tuple[str, str], Traffic]:
        """Everything so far; counting starts again."""
        taken, self._traffic = self._traffic, {}
        return taken
