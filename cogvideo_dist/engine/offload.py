"""What the forward keeps for the backward, in the host's memory: copied away as it is kept, brought back before it is wanted.

On a CUDA device both copies run beside the computation, on a stream of their own and from page-locked memory; elsewhere they
are plain copies, and what comes back is the same to the bit everywhere.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

LEAST = 1 << 16
"""Bytes below which a copy costs more than it frees."""

AHEAD = 5
"""How many tensors are on their way back while one is used: what a block of the transformer keeps."""


@dataclass(eq=False)
class Kept:
    """A run of elements of one storage, on the host. ``users`` is how often the graph keeps it and has not asked for it yet.

    ``before``: what was kept just before it, which a backward wants just after it. ``source`` makes its key unique: a storage's
    address is not given to another while a weak reference to it lives.
    """

    host: Tensor
    source: StorageWeakRef
    before: weakref.ref[Kept] | None
    users: int = 0
    here: Tensor | None = None
    arrived: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Ticket:
    """What the graph holds in a tensor's place: whose elements it has, and how they lie."""

    kept: Kept
    size: torch.Size
    stride: tuple[int, ...]


@dataclass
class Shelf:
    """The host's memory for what graphs keep of tensors on ``device``.

    Parameters and their views stay where they are, since they are there anyway; so do small tensors (fewer than ``least``
    bytes) and views with gaps, whose elements belong to something larger. What is kept twice, as a tensor and as a view of it,
    is copied once.
    """

    device: torch.device
    least: int = LEAST
    ahead: int = AHEAD
    _kept: weakref.WeakValueDictionary[tuple[object, ...], Kept] = field(default_factory=weakref.WeakValueDictionary)
    _last: weakref.ref[Kept] | None = None

    def __post_init__(self) -> None:
        # One for life: the allocator keeps a pool of memory for every stream.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def keeping(self) -> saved_tensors_hooks:
        """Within, what is kept for a backward is kept here."""
        return saved_tensors_hooks(self.pack, self.unpack)

    @property
    def bytes(self) -> int:
        """On the host now."""
        return sum(kept.host.nbytes for kept in list(self._kept.values()))

    def pack(self, tensor: Tensor) -> Tensor | Ticket:
        owner = tensor if tensor._base is None else tensor._base
        if isinstance(owner, nn.Parameter) or tensor.device != self.device or tensor.nbytes < self.least:
            return tensor
        if not _without_gaps(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version)
        kept = self._kept.get(key)
        if kept is None:
            flat = tensor.detach().as_strided((tensor.numel(),), (1,))
            kept = self._kept[key] = Kept(self._sent(flat), StorageWeakRef(storage), self._last)
            self._last = weakref.ref(kept)
        kept.users += 1
        return Ticket(kept, tensor.shape, tensor.stride())

    def unpack(self, packed: Tensor | Ticket) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept = packed.kept
        flat = self._fetch(kept)
        following = kept
        for _ in range(self.ahead):
            before = following.before() if following.before else None
            if before is None:
                break
            if before.users > 0:
                self._fetch(before)
            following = before
        if kept.arrived is not None:
            using = torch.cuda.current_stream(self.device)
            using.wait_event(kept.arrived)
            flat.record_stream(using)
        kept.users -= 1
        if kept.users <= 0:
            kept.here = kept.arrived = None
        return flat.as_strided(packed.size, packed.stride)

    def _sent(self, flat: Tensor) -> Tensor:
        """A copy on the host, or one that will be there before anything that is put on the stream later."""
        if self._stream is None:
            return flat.clone()
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(flat, non_blocking=True)
        flat.record_stream(self._stream)  # or its memory could be another's before it is copied
        return host

    def _fetch(self, kept: Kept) -> Tensor:
        """The elements on the device; on a CUDA device they may still be on their way, until ``kept.arrived``."""
        if kept.here is None and self._stream is None:
            kept.here = kept.host.to(self.device)
        elif kept.here is None:
            with torch.cuda.stream(self._stream):
                kept.here = kept.host.to(self.device, non_blocking=True)
                kept.arrived = torch.cuda.current_stream(self.device).record_event()
        return kept.here


def _without_gaps(tensor: Tensor) -> bool:
    """Do its elements lie side by side, each once, in whatever order of dimensions?"""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
