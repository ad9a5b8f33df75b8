"""Bytes that a rank sends for one transformer layer, forward and backward, as plain formulas.

Legend: S tokens of the pack, d hidden, e bytes of an element; R, U, T ranks of ring, ulysses, tp. All are means over the ranks
of a sample, by the bandwidth-optimal algorithms, as ``Ledger`` counts; heads and tokens need not divide over the ranks.
"""

from __future__ import annotations

from typing import Literal

from cogvideo_dist.parallel.mesh import Layout

Recompute = Literal["none", "feed_forward", "all_but_attention", "full"]
Volumes = dict[tuple[str, str], float]
"""(axis, operation) -> bytes, as in the ledger; axes of size 1 are left out."""

GATHERS: dict[Recompute, int] = {"none": 6, "feed_forward": 7, "all_but_attention": 8, "full": 8}
"""Of rows over tp: before qkv and ff1, again in their backwards for the weights' gradients, the gradients of the two outputs;
and one before each linear that is made again."""

SCATTERS: dict[Recompute, int] = {"none": 4, "feed_forward": 4, "all_but_attention": 4, "full": 6}
"""Of partial sums over tp: after out and ff2, and of the gradients of what qkv and ff1 were given."""

EXCHANGED: dict[Recompute, int] = {"none": 8, "feed_forward": 8, "all_but_attention": 11, "full": 12}
"""Tensors of [tokens, hidden] that change between tokens and heads: q, k, v, the output, and their gradients."""

TRAVELLING: dict[Recompute, int] = {"none": 4, "feed_forward": 4, "all_but_attention": 4, "full": 6}
"""Tensors that go around the ring as they are: keys and values, once in every forward and once in the backward."""


def layer_bytes(
    layout: Layout, *, tokens: float, hidden: int, heads: int, element_size: int, recompute: Recompute = "none"
) -> Volumes:
    """Of the large messages; ``modulation_bytes`` are apart.

    ``feed_forward`` gathers ff1's input once more; ``all_but_attention`` gathers qkv's too and exchanges q, k, v again;
    ``full`` adds a whole forward.
    """
    ring, ulysses, tp = layout.ring, layout.ulysses, layout.tp
    wide = wide_size(element_size)
    volumes: Volumes = {}
    if tp > 1:
        # A message's rows are the S/(RU) tokens of tp's ranks together; each sends its part to T-1, or all parts but its own.
        message = (tp - 1) / tp * tokens / (ring * ulysses) * hidden * element_size
        volumes["tp", "gather"] = GATHERS[recompute] * message
        volumes["tp", "scatter_sum"] = SCATTERS[recompute] * message
    if ulysses > 1:
        # Of S/R tokens with the d/T features of a tp rank, each of U ranks holds 1/U and keeps 1/U of that; and D = rowsum(
        # grad * out), one number of at least 32 bits for each token and head.
        token = EXCHANGED[recompute] * hidden * element_size + heads * wide
        volumes["ulysses", "all_to_all"] = (ulysses - 1) / ulysses**2 * tokens / ring / tp * token
    if ring > 1:
        # The S/R tokens of every rank, with its d/(UT) features, are sent R-1 times; the gradients of keys and values, sums
        # over the ring, in at least 32 bits.
        token = hidden * (TRAVELLING[recompute] * element_size + 2 * wide)
        volumes["ring", "shift"] = (ring - 1) / ring * tokens / (ulysses * tp) * token
    return volumes


def layer_rounding(
    layout: Layout, *, hidden: int, heads: int, element_size: int, recompute: Recompute = "none"
) -> Volumes:
    """How far the ledger's mean over the ranks of a sample may lie from ``layer_bytes``, for lengths that do not divide.

    Over tp, rows are padded to the longest part: less than one token per rank and message. Over Ulysses, with parts n_r of
    tokens and h_r of heads, ranks keep sum(n_r h_r), which differs from the even share by at most U/4 tokens of one head where
    neither divides. Over the ring, the mean is exact.
    """
    tp, ulysses = layout.tp, layout.ulysses
    row = (tp - 1) * hidden * element_size
    uneven = heads // tp % ulysses != 0
    head = EXCHANGED[recompute] * hidden // heads * element_size + wide_size(element_size)
    rounding: Volumes = {
        ("tp", "gather"): GATHERS[recompute] * row,
        ("tp", "scatter_sum"): SCATTERS[recompute] * row,
        ("ulysses", "all_to_all"): head / 4 if uneven else 0.0,
        ("ring", "shift"): 0.0,
    }
    return {key: value for key, value in rounding.items() if getattr(layout, key[0]) > 1}


def modulation_bytes(layout: Layout, *, clips: int, hidden: int, heads: int, element_size: int) -> float:
    """Of the sum over tp of what its ranks hold alike, one message of the backward: the gradients of weight, bias and gate of
    both halves of the block for text and vision of each clip, 12 * clips * d, and of q's and k's norms, 4 * d / heads."""
    numbers = 12 * clips * hidden + 4 * hidden // heads
    return 2 * (layout.tp - 1) / layout.tp * numbers * element_size


def wide_size(element_size: int) -> int:
    """Bytes of an element of sums, which have at least 32 bits."""
    return max(element_size, 4)
