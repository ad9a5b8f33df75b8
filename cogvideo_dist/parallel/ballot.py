"""What any rank wishes, known to all ranks at the same step, without waiting for each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideo_dist.parallel.mesh import Axis


class Ballot:
    """A vote in every step, whose outcome is known one step later: its message travels beside the computation, and reading it
    does not stop a device's queue."""

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self.axis, self.device = axis, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: tuple[dist.Work | None, Tensor, torch.cuda.Event | None] | None = None

    def turn(self, wishes: Sequence[bool]) -> tuple[bool, ...]:
        """Cast this rank's vote; which wishes any rank had at the turn before. Collective."""
        outcome = self._outcome(len(wishes))
        votes = torch.tensor(wishes, dtype=torch.int32, device=self.device)
        if self.axis.size == 1:
            self.last = (None, votes, None)
            return outcome
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.axis.group, async_op=True)
        event = None
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                work.wait()  # this stream waits, the host does not
                votes = votes.to("cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
        self.last = (work, votes, event)
        return outcome

    def _outcome(self, count: int) -> tuple[bool, ...]:
        if self.last is None:
            return (False,) * count
        work, votes, event = self.last
        if event is not None:
            event.synchronize()
        elif work is not None:
            work.wait()
        return tuple(bool(vote) for vote in votes.tolist())
