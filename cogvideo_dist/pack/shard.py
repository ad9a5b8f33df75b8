"""The part of one packed sequence that this rank owns, and the only door to the rest of it.

Every clip is split over the ring, so that its ranks have equal work; a ring rank's tokens are split over its Ulysses ranks, and
theirs over tp. All splits are of consecutive tokens, text and vision alike, and any length will do.

Legend: n = tokens of this rank, w = tokens of its tp ranks together, m = tokens of its Ulysses ranks together (a ring rank's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from cogvideo_dist.pack.attention import Attended, Backend, Clipwise, Triple, backend_for
from cogvideo_dist.pack.layout import (
    TEXT,
    VISION,
    Group,
    PackLayout,
    Run,
    Span,
    cut,
    groups_of,
    part,
    ring_shares,
    runs_of,
    tokens_of,
    vision_runs_of,
)
from cogvideo_dist.pack.ring import ring_attend, ring_attend_backward
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import Pending, even, gather, scatter_sum, to_heads, to_tokens


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor that the ranks of an axis share: ``runs`` of this rank's, ``wide`` of all of them together."""

    runs: tuple[Run, ...]
    wide: tuple[Run, ...]
    counts: tuple[int, ...]
    axis: Axis

    def gather(self, x: Tensor) -> Pending:
        """[n, ...] -> [w, ...]"""
        return gather(x, self.axis, counts=self.counts)

    def scatter_sum(self, x: Tensor) -> Pending:
        """[w, ...], a part of a sum on every rank -> the sum's rows of this rank, [n, ...]."""
        return scatter_sum(x, self.axis, counts=self.counts)


class SequenceShard:
    """This rank's tokens of the sequence of ``layout`` on ``mesh``; by default all of them.

    ``spans`` are this rank's tokens, ``wide`` those of its tp ranks together, ``heard`` those of its Ulysses ranks together,
    with which it attends for some heads. ``rows`` and ``vision_rows`` are its modulation runs, of all tokens and of vision
    tokens alone.
    """

    def __init__(self, layout: PackLayout, mesh: ParallelMesh | None = None, *, attention: str = "auto") -> None:
        mesh = mesh or ParallelMesh()
        self.layout, self.mesh, self.attention = layout, mesh, attention
        self._shares = ring_shares(layout.lengths, mesh.ring.size)
        self.heard = self._of_ring(mesh.ring.rank)
        self._counts = even(tokens_of(self.heard), mesh.ulysses.size)
        self.wide = part(self.heard, mesh.ulysses.size, index=mesh.ulysses.rank)
        self.spans = part(self.wide, mesh.tp.size, index=mesh.tp.rank)
        counts = even(tokens_of(self.wide), mesh.tp.size)
        self.rows = Rows(runs_of(self.spans), runs_of(self.wide), counts, mesh.tp)
        vision = vision_runs_of(self.spans)
        self.vision_rows = Rows(vision, vision, (sum(self.vision_counts()),), Axis("none"))

    def _of_ring(self, rank: int) -> tuple[Span, ...]:
        """The tokens of a rank of the ring: its share of every clip."""
        spans: list[Span] = []
        whole = self.layout.spans()
        for clip, start in enumerate(self.layout.cu_seqlens[:-1]):
            first = start + sum(shares[clip] for shares in self._shares[:rank])
            spans += cut(whole, first, first + self._shares[rank][clip])
        return tuple(spans)

    def mine(self, packed: Tensor, kind: int) -> Tensor:
        """This rank's rows of a tensor that holds all tokens of one kind, clip after clip; a view if they are one piece."""
        starts = self._starts(kind)
        pieces = [
            packed[starts[span.clip] + span.start : starts[span.clip] + span.stop]
            for span in self.spans
            if span.kind == kind
        ]
        return joined(pieces, packed)

    def _starts(self, kind: int) -> tuple[int, ...]:
        """Where each clip begins in a tensor that holds all tokens of one kind."""
        return (0, *accumulate(clip.vision if kind == VISION else clip.text for clip in self.layout.clips))

    def interleave(self, text: Tensor, vision: Tensor) -> Tensor:
        """This rank's text tokens and vision tokens, clip after clip each -> its part of the sequence [n, d]."""
        rest = {TEXT: text, VISION: vision}
        pieces = []
        for span in self.spans:
            pieces.append(rest[span.kind][: span.tokens])
            rest[span.kind] = rest[span.kind][span.tokens :]
        # What is left is empty; with it both kinds take part on a rank that has none of one, as ZeRO's reductions demand.
        return torch.cat([*pieces, *rest.values()])

    def only(self, tokens: Tensor, kind: int) -> Tensor:
        """The tokens of one kind of this rank's part of the sequence [n, d], in order; a view if they are one piece."""
        pieces = [tokens[run.start : run.stop] for run in self.rows.runs if run.row % 2 == kind]
        return joined(pieces, tokens)

    def vision_counts(self) -> list[int]:
        """This rank's vision tokens of every clip."""
        counts = [0] * len(self.layout.clips)
        for span in self.spans:
            counts[span.clip] += span.tokens if span.kind == VISION else 0
        return counts

    @torch.no_grad()
    def whole_vision(self, vision: Tensor) -> Tensor:
        """This rank's vision tokens [n_vision, ...] -> all of the pack's, clip after clip, on every rank. No gradient."""
        sample = self.mesh.sample
        if sample.size == 1:
            return vision
        owned = [[span for span in self._spans_of(rank) if span.kind == VISION] for rank in range(sample.size)]
        gathered = gather(vision, sample, counts=[tokens_of(spans) for spans in owned]).wait()
        whole, starts, at = torch.empty_like(gathered), self._starts(VISION), 0
        for span in (span for spans in owned for span in spans):
            whole[starts[span.clip] + span.start : starts[span.clip] + span.stop] = gathered[at : at + span.tokens]
            at += span.tokens
        return whole

    def _spans_of(self, rank: int) -> tuple[Span, ...]:
        """The tokens of a rank of the ``sample`` axis, whose ranks are row-major over (ring, ulysses, tp)."""
        ulysses, tp = self.mesh.ulysses.size, self.mesh.tp.size
        wide = part(self._of_ring(rank // (ulysses * tp)), ulysses, index=rank // tp % ulysses)
        return part(wide, tp, index=rank % tp)

    def to_heads(self, x: Tensor) -> Pending:
        """[w, ..., heads, dim] -> [m, ..., this rank's heads, dim]"""
        return to_heads(x, self.mesh.ulysses, counts=self._counts)

    def to_tokens(self, x: Tensor, *, heads: int) -> Pending:
        """[m, ..., this rank's heads, dim] -> [w, ..., heads, dim]"""
        return to_tokens(x, self.mesh.ulysses, counts=self._counts, heads=heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Full attention inside each clip, over the ring; q, k, v [m, heads, dim] -> out [m, heads, dim]."""
        backend = self._backend(q)
        if self.mesh.ring.size > 1 and isinstance(backend, Clipwise):
            return ring_attend(backend.kernel, (q, k, v), ring=self.mesh.ring, shares=self._shares)
        return backend.attend((q, k, v), self._groups())

    def attend_backward(self, grad: Tensor, attended: Attended, *, qkv: Triple) -> Triple:
        """Gradients of q, k, v, given that of the output, all [m, heads, dim]."""
        backend = self._backend(grad)
        if self.mesh.ring.size > 1 and isinstance(backend, Clipwise):
            return ring_attend_backward(
                backend.kernel, grad, attended, qkv=qkv, ring=self.mesh.ring, shares=self._shares
            )
        return backend.attend_backward(grad, attended, qkv=qkv, groups=self._groups())

    def _backend(self, x: Tensor) -> Backend:
        return backend_for(self.attention, device=x.device, dtype=x.dtype, ring=self.mesh.ring.size)

    def _groups(self) -> tuple[Group, ...]:
        return groups_of(self.layout.lengths, self.layout.lengths)


def joined(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """The pieces one after another; a view if there is one, and no rows of ``like`` if there is none."""
    if len(pieces) < 2:
        return pieces[0] if pieces else like[:0]
    return torch.cat(list(pieces))
