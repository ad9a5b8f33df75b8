"""Whether weights that several ranks hold alike are alike, to the bit: a checksum of each parameter, compared over ranks.

Under ZeRO 0 to 2 all replicas (dp and sp) hold the working weights; under tp, whatever is not divided. ZeRO 3 divides over the
replicas, so that only tp ranks hold anything twice.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.engine.player import Player
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import gather_objects, reduce_max
from cogvideo_dist.parallel.split import split_of

ON_HOST, ON_DEVICE = 1 << 16, 1 << 20
"""Words at a time: what stays in a core's cache, and what is worth starting a kernel for."""

MULTIPLIER = 6364136223846793005
"""Odd, so that a difference in any word stays one to the end."""


class Difference(NamedTuple):
    """Ranks whose ``parameter``, the first one in the model's order, is not that of most; all where there is no most."""

    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    parameter: str
    model: str


def checksum(x: Tensor) -> Tensor:
    """64 bits that say a tensor's bits, int64 []. Any change of one word of 8 bytes changes them, others nearly always do.

    A polynomial in ``MULTIPLIER`` over parts, each a sum of words by their odd places, all modulo 2^64.
    """
    raw = x.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    tail = torch.nn.functional.pad(raw[whole:], (0, 8 - (raw.numel() - whole))).view(torch.int64)
    size = ON_HOST if raw.device.type == "cpu" else ON_DEVICE
    places = torch.arange(1, 2 * size, 2, dtype=torch.int64, device=raw.device)
    total = raw.new_zeros((), dtype=torch.int64)
    for words in (*raw[:whole].view(torch.int64).split(size), tail):
        # the upper half goes into the lower one, or two changed signs would cancel modulo 2^64
        mixed = words.bitwise_right_shift(32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(words)
        total = total * MULTIPLIER + mixed.mul_(places[: len(words)]).sum()
    return total


def difference(players: Sequence[Player], mesh: ParallelMesh) -> Difference | None:
    """The first weight that ranks hold differently and should hold alike, if there is one. Collective."""
    for player in players:
        for axis, held in _held_alike(player, mesh):
            sums = torch.stack([checksum(tensor) for tensor in held.values()])
            # the greatest and, as the complement of the complements' greatest, the least, in one message
            most, least = reduce_max(torch.cat([sums, ~sums]), axis).chunk(2)
            differs = most != ~least
            if bool(reduce_max(differs.any().int(), mesh.world)):
                first = int(differs.int().argmax()) if bool(differs.any()) else None
                mine = None if first is None else (list(held)[first], int(sums[first]))
                return _named(player.learner.name, mine, axis=axis, mesh=mesh)
    return None


def _held_alike(player: Player, mesh: ParallelMesh) -> Iterator[tuple[Axis, dict[str, Tensor]]]:
    """By axis, what its ranks hold alike. Every rank comes to the same names."""
    engine = player.engine
    weights = {name: engine.working(parameter) for name, parameter in engine.model.named_parameters()}
    if mesh.replica.size > 1 and engine.stage < 3:
        yield mesh.replica, weights
    if mesh.tp.size > 1:
        whole = {name: tensor for name, tensor in weights.items() if split_of(engine.model, name) is None}
        if whole:
            yield mesh.tp, whole


def _named(model: str, mine: tuple[str, int] | None, *, axis: Axis, mesh: ParallelMesh) -> Difference:
    """``mine``: name and checksum of the first parameter that differs among the ranks that share ``axis`` with this one."""
    gathered = gather_objects((axis.ranks, mine, socket.gethostname()), mesh.world)
    ranks = next(ranks for ranks, found, _ in gathered if found)
    parameter = gathered[ranks[0]][1][0]
    sums = {rank: gathered[rank][1][1] for rank in ranks}
    usual, count = Counter(sums.values()).most_common(1)[0]
    odd = tuple(rank for rank in ranks if 2 * count <= len(ranks) or sums[rank] != usual)
    return Difference(odd, tuple(gathered[rank][2] for rank in odd), parameter, model)
