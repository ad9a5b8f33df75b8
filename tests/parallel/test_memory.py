"""What the stack of blocks keeps for its backward falls as one over the ranks that share a sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from tests.ranks import run_ranks

CONFIG = replace(tiny("cogvideox-5b"), heads=8, head_dim=16, layers=2)
PACK = PackLayout((Clip(6, (8, 16, 16)), Clip(6, (1, 16, 16))))


LEVELS: tuple[Recompute, ...] = ("none", "feed_forward", "all_but_attention")


def kept(mesh: ParallelMesh, layout: Layout) -> dict[str, float]:
    mesh = build_mesh(layout, rank=mesh.world.rank)
    return {level: kept_at(mesh, level) for level in LEVELS}


def kept_at(mesh: ParallelMesh, recompute: Recompute) -> float:
    """Bytes of all storages that autograd keeps for the backward of the blocks, once each, without parameters."""
    model = DiT(CONFIG, recompute=recompute, tp=mesh.tp)
    seq = SequenceShard(PACK, mesh)
    x = torch.randn(seq.rows.counts[mesh.tp.rank], CONFIG.hidden)
    rope = torch.ones(sum(span.tokens for span in seq.heard), CONFIG.head_dim // 2, dtype=torch.complex64)
    condition = torch.randn(2, CONFIG.time_embed_dim)
    outside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), rope, condition)}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = x.requires_grad_()
        for block in model.blocks:
            x = block(x, condition, rope, seq)
    return float(sum(t.untyped_storage().nbytes() for pointer, t in seen.items() if pointer not in outside))


@pytest.fixture(scope="module")
def alone() -> dict[str, float]:
    return {level: kept_at(ParallelMesh(), level) for level in LEVELS}


@pytest.mark.parametrize("layout", [
    Layout(tp=2), Layout(ulysses=2), Layout(ring=2), Layout(tp=4), Layout(ulysses=4), Layout(ring=4),
    Layout(ulysses=2, ring=2), Layout(ulysses=2, tp=2), Layout(tp=8), Layout(ulysses=8), Layout(ulysses=2, ring=2, tp=2),
], ids=lambda layout: layout.name)  # fmt: skip
def test_saved_activations_fall_with_the_ranks(alone: dict[str, float], layout: Layout) -> None:
    for found in run_ranks(kept, layout.world, layout):
        for level, whole in alone.items():
            assert 0.9 <= found[level] * layout.sample / whole <= 1.1, level
