"""Low-rank adapters of linears (Hu et al. 2021, arXiv 2106.09685): y = x @ w.T + scale * (x @ a.T) @ b.T.

``a`` [rank, features in] starts random, ``b`` [features out, rank] at zero, scale = alpha / rank. Under tensor parallelism an
adapter is divided as its linear is: one of its two factors along the features that are divided, the other whole on all ranks.

A linear's output that a block's backward makes again is made with its adapter; nothing of [tokens, features] is kept for one.

Legend: n = tokens of this rank, w = tokens of its tp ranks together, r = rank of an adapter (or of several side by side).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cogvideo_dist.config.adaptation import Adapter
from cogvideo_dist.models.fused import Drop
from cogvideo_dist.pack.layout import Run, Span
from cogvideo_dist.pack.shard import Rows
from cogvideo_dist.parallel.mesh import Axis
from cogvideo_dist.parallel.ops import enter

aten = torch.ops.aten


class Place(NamedTuple):
    """Where an adapter's update goes: the linear's attribute, and which of how many equal parts of its output."""

    linear: str
    part: int = 0
    parts: int = 1


class LowRank(nn.Module):
    """The two factors of one linear's update. ``alike``: an axis whose ranks hold both whole and use them on their own rows."""

    def __init__(self, features_in: int, features_out: int, *, adapter: Adapter, alike: Axis | None = None) -> None:
        super().__init__()
        self.adapter, self.alike = adapter, alike or Axis("none")
        self.a = nn.Parameter(torch.empty(adapter.rank, features_in))
        self.b = nn.Parameter(torch.empty(features_out, adapter.rank))

    @property
    def scale(self) -> float:
        return self.adapter.scale

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the linear's output."""
        a, b = enter((self.a, self.b), self.alike)
        return F.linear(F.linear(x, a), b) * self.scale

    def update(self) -> Tensor:
        """What is added to the linear's weight, [features out, features in] of this rank."""
        return self.b @ self.a * self.scale


class Adapters(nn.ModuleDict):
    """Those of one module's linears, by target; most often none."""

    def low(self, name: str) -> LowRank:
        return cast(LowRank, self[name])

    def plus(self, linear: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        """A linear with its adapter, where it has one."""
        return (lambda x: linear(x) + self[name](x)) if name in self else linear


class AddLowRank(torch.autograd.Function):
    """y[:, part] += scale * z[:, of it] @ b.T, in place, for several parts of y [w, features]; z [w, r] keeps all their inputs.

    ``pieces``: for each b the columns of y, those of z, and the scale.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, pieces: Sequence[tuple[slice, slice, float]], *bs: Tensor) -> Tensor:
        for (out, of, scale), b in zip(pieces, bs):
            y[:, out].addmm_(z[:, of], b.t(), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(z, *bs)
        ctx.pieces = pieces
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, *bs = ctx.saved_tensors
        d_z, d_bs = torch.empty_like(z), []
        for (out, of, scale), b in zip(ctx.pieces, bs):
            part = grad[:, out]
            d_z[:, of] = torch.mm(part, b).mul_(scale)
            d_bs.append(torch.mm(part.t(), z[:, of]).mul_(scale))
        return grad, d_z, None, *d_bs


class AddGatedLowRank(torch.autograd.Function):
    """y[run] + gate[row] * scale * z[run] @ b.T; y [n, d], z [n, r], b [d, r], gate [rows, d]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, b: Tensor, gate: Tensor, runs: Sequence[Run], scale: float) -> Tensor:
        out = torch.empty_like(y)  # not in place: under tp, y is a view of a message
        for start, stop, row in runs:
            wide = (b * gate[row][:, None]).t()
            torch.addmm(y[start:stop], z[start:stop], wide, alpha=scale, out=out[start:stop])
        ctx.save_for_backward(z, b, gate)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, b, gate = ctx.saved_tensors
        d_z, d_b, d_gate = torch.empty_like(z), torch.zeros_like(b), torch.zeros_like(gate)
        for start, stop, row in ctx.runs:
            part = grad[start:stop]
            d_z[start:stop] = torch.mm(part, b * gate[row][:, None]).mul_(ctx.scale)
            outer = torch.mm(part.t(), z[start:stop]).mul_(ctx.scale)
            d_b.addcmul_(outer, gate[row][:, None])
            d_gate[row] = (b * outer).sum(1)
        return grad, d_z, d_b, d_gate, None, None


class Down(torch.autograd.Function):
    """z = scatter_sum(drop(f(x)) @ a.T), f = GELU (tanh form) or identity; x [w, features of this rank] -> [n, r].

    Keeps x, which the linear beside it keeps too, or not even that where ``again`` makes it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, rows: Rows, gelu: bool, drop: Drop | None, again: Callable[[], Tensor] | None
    ) -> Tensor:
        z = rows.scatter_sum(F.linear(_active(x, gelu, drop), a)).wait()
        ctx.save_for_backward(None if again else x, a)
        ctx.rows, ctx.gelu, ctx.drop, ctx.again = rows, gelu, drop, again
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        coming = ctx.rows.gather(grad)
        x = x if ctx.again is None else ctx.again()
        ctx.again = None
        active = _active(x, ctx.gelu, ctx.drop)
        wide = coming.wait()
        d_a = torch.mm(wide.t(), active)
        d_x = torch.mm(wide, a)
        if ctx.drop is not None:
            ctx.drop(d_x)
        if ctx.gelu:
            aten.gelu_backward(d_x, x, approximate="tanh", grad_input=d_x)
        return d_x, d_a, None, None, None, None


def _active(x: Tensor, gelu: bool, drop: Drop | None) -> Tensor:
    active = F.gelu(x, approximate="tanh") if gelu else x
    return active if drop is None else drop(active if gelu else active.clone())


GOLDEN, FIRST, SECOND, LOW = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0xFFFFFFFF


def _mixed(value: Tensor) -> Tensor:
    """MurmurHash3's finalizer over int64 values of 32 bits, in place."""
    for shift, factor in ((16, FIRST), (13, SECOND)):
        value ^= value >> shift
        value.mul_(factor).bitwise_and_(LOW)
    value ^= value >> 16
    return value


@dataclass(frozen=True)
class Dropout:
    """Which elements of adapters' inputs are dropped: a function of (clip's key, token, feature, linear), whoever holds them.

    ``keys`` int64 [clips], below 2^32.
    """

    keys: tuple[int, ...]

    def of(self, spans: Sequence[Span], *, linear: int, share: float, first: int = 0) -> Drop:
        """For rows of the tokens of ``spans`` and columns from feature ``first`` on; ``linear`` tells linears apart."""

        def drop(x: Tensor) -> Tensor:
            columns = torch.arange(first, first + x.shape[1], device=x.device).mul_(GOLDEN).bitwise_and_(LOW)
            mask = _mixed(self._tokens(spans, linear, x.device)[:, None] ^ columns) >= int(share * 2**32)
            return x.mul_(mask).div_(1 - share)

        return drop

    def _tokens(self, spans: Sequence[Span], linear: int, device: torch.device) -> Tensor:
        """A hash for every row."""
        parts = [torch.empty(0, dtype=torch.int64, device=device)]
        for span in spans:
            numbers = torch.arange(2 * span.start + span.kind, 2 * span.stop, 2, device=device)
            salted = _mixed(numbers.mul_(GOLDEN).bitwise_and_(LOW)) ^ self.keys[span.clip]
            parts.append(_mixed(_mixed(salted) ^ (linear * GOLDEN & LOW)))
        return torch.cat(parts)


class Site(NamedTuple):
    """A linear that can have an adapter: the name of the module that holds it, its place there, and where adapters go."""

    name: str
    module: nn.Module
    target: str
    place: Place
    lora: Adapters

    @property
    def linear(self) -> nn.Linear:
        return getattr(self.module, self.place.linear)


def sites(model: nn.Module) -> Iterator[Site]:
    """All of a model's."""
    for name, module in model.named_modules():
        for target, place in getattr(module, "adaptable", {}).items():
            yield Site(name, module, target, place, cast(Adapters, module.lora))


def adapt(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Give the named linears adapters and freeze all else. Raises ``ValueError`` for a linear that the model does not have."""
    known = {site.target for site in sites(model)}
    if missing := [name for name in adapters if name not in known]:
        raise ValueError(f"lora.targets: this model has no linear {missing[0]}, only {', '.join(sorted(known))}")
    model.requires_grad_(False)
    for site in sites(model):
        if site.target in adapters:
            weight = site.linear.weight
            low = LowRank(
                weight.shape[1], weight.shape[0] // site.place.parts, adapter=adapters[site.target],
                alike=getattr(site.linear, "tp", None),
            )  # fmt: skip
            site.lora[site.target] = low.to(weight.device, weight.dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora." in f".{name}"


@torch.no_grad()
def merge(model: nn.Module, share: float = 1.0) -> dict[str, Tensor]:
    """Add ``share`` times every adapter to its linear and take the adapters away.

    Returns what the changed weights were, by name, for ``unmerge``. Sums are made in float32 or wider.
    """
    before: dict[str, Tensor] = {}
    for site in sites(model):
        if site.target in site.lora:
            weight = site.linear.weight
            before.setdefault(f"{site.name}.{site.place.linear}.weight".lstrip("."), weight.detach().clone())
            part = weight.data.chunk(site.place.parts)[site.place.part]
            wide = torch.promote_types(part.dtype, torch.float32)
            part.copy_(part.to(wide) + share * site.lora.low(site.target).update().to(part.device, wide))
            del site.lora[site.target]
    return before


@torch.no_grad()
def unmerge(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put back what ``merge`` changed, bit by bit."""
    for name, value in before.items():
        model.get_parameter(name).copy_(value)


def bounded(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The first factor's start: uniform in +-1/sqrt(features in), as public adapters begin."""
    return (torch.rand(list(shape), generator=generator) * 2 - 1) / math.sqrt(shape[1])
