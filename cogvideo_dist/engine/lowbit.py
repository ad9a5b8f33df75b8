"""AdamW whose moments are kept in 8 bits between steps (Dettmers et al. 2021, arXiv 2110.02861, sec. 2): one byte for an
element, which names one of 256 values of torchao's dynamic map, times the largest magnitude of its block of 256 elements.

The ends of the two maps are moved, so that a checkpoint of float32 tensors holds the very same state. The signed one reaches
from -1 to 1; theirs ends at -0.993, and a block whose largest element is negative would be scaled anew by every save. The
unsigned one lacks zero: a second moment of zero under a first that is none would be a leap of lr * m / eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, scale_tensor

from cogvideo_dist.engine.optim import MOMENTS, AdamWithEma

BLOCK = 256
SMALLEST = 4096
"""Elements of a tensor below which it stays in float32, as there is nothing to save. Libraries draw the line here, too."""

PART = 1 << 24
"""Elements that are in float32 at a time during an update; a multiple of ``BLOCK``."""


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values in [-1, 1], or in (0, 1], that a code stands for, ascending."""
    values = torch.tensor(create_dynamic_map(signed))
    values[0] = -1.0 if signed else values[1] / 2
    return values


class Packed:
    """A tensor of ``count`` float32 in 8 bits: ``codes`` uint8 and ``scales`` float32, one for each block. Begins as zeros."""

    def __init__(self, count: int, *, signed: bool, device: torch.device) -> None:
        blocks = -(-count // BLOCK)
        self.count, self.map = count, dynamic_map(signed=signed).to(device)
        self.middles = (self.map[1:] + self.map[:-1]) / 2
        self.codes = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(blocks, device=device)

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def parts(self) -> Iterator[slice]:
        """Of at most ``PART`` elements, which begin with a block."""
        return (slice(start, min(self.count, start + PART)) for start in range(0, self.count, PART))

    def read(self, part: slice) -> Tensor:
        """Those elements in float32, [part]."""
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        codes = self.codes[blocks.start * BLOCK : blocks.stop * BLOCK]
        return dequant_with_qmap(codes, self.map, self.scales[blocks])[: part.stop - part.start]

    def write(self, part: slice, values: Tensor) -> None:
        """Set those elements to the nearest values that 8 bits can say."""
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        values = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
        scaled, self.scales[blocks] = scale_tensor(values, BLOCK)
        # One search where torchao's quantize_8bit_with_qmap makes nine passes; the codes are the same.
        codes = torch.bucketize(scaled, self.middles, out_int32=True, right=True)
        self.codes[blocks.start * BLOCK : blocks.stop * BLOCK] = codes


class LowBitAdamWithEma(AdamWithEma):
    """Of groups whose ``low`` is true, tensors of ``SMALLEST`` elements and more have their moments in 8 bits, in ``packed``
    and not in ``state``. All arithmetic is in float32, by torch's own AdamW; the average of the weights stays float32."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, ema_decay: float | None, **options: Any) -> None:
        super().__init__(groups, ema_decay=ema_decay, **options)
        self.packed: dict[Tensor, dict[str, Packed]] = {}

    def begin(self, p: Tensor, group: dict[str, Any], *, step: int) -> None:
        super().begin(p, group, step=step)
        if group["low"] and p.numel() >= SMALLEST:
            for key in MOMENTS:
                del self.state[p][key]
            self.packed[p] = {
                key: Packed(p.numel(), signed=key == "exp_avg", device=p.device) for key in MOMENTS
            }  # fmt: skip

    @contextmanager
    def whole(self) -> Iterator[None]:
        for p, moments in self.packed.items():
            self.state[p] |= {key: _host_copy(packed).view(p.shape) for key, packed in moments.items()}
        try:
            yield
        finally:
            for p, moments in self.packed.items():
                for key, packed in moments.items():
                    values = self.state[p].pop(key).view(-1)
                    for part in packed.parts():
                        packed.write(part, values[part].to(p.device))

    def update(self, closure: Callable[[], float] | None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.begin(p, group, step=0)
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if p not in self.packed:
            _adamw(p, grad, [state[key] for key in MOMENTS], group | {"step": state["step"]})
            return
        weights, grads = p.detach().view(-1), grad.reshape(-1)
        moments = [self.packed[p][key] for key in MOMENTS]
        for part in moments[0].parts():
            wide = [packed.read(part) for packed in moments]
            _adamw(weights[part], grads[part], wide, group | {"step": state["step"].clone()})
            for packed, values in zip(moments, wide):
                packed.write(part, values)
        state["step"] += 1


def _host_copy(packed: Packed) -> Tensor:
    """In float32, in the host's memory: where the device has no room for the 8 bits' worth, it has none for 32."""
    found = torch.empty(packed.count)
    for part in packed.parts():
        found[part] = packed.read(part)
    return found


def _adamw(p: Tensor, grad: Tensor, moments: list[Tensor], group: dict[str, Any]) -> None:
    """Update p, both moments and the number of steps, which is among the group's values, in place."""
    adamw(
        [p], [grad], [moments[0]], [moments[1]], [], [group["step"]],
        amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
        weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
