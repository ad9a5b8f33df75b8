"""Every division of a pack over ring x ulysses x tp ranks against plain indices of its tokens; no process takes part."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cogvideo_dist.pack.layout import TEXT, VISION, Clip, PackLayout, Run, Span, cut, groups_of, ring_shares, tokens_of
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh

LAYOUTS = [
    Layout(ring=ring, ulysses=ulysses, tp=tp)
    for ring, ulysses, tp in itertools.product(range(1, 9), repeat=3)
    if ring * ulysses * tp <= 8
]
PACKS = {
    "one clip": PackLayout((Clip(7, (3, 4, 5)),)),
    "videos, an image, another prompt": PackLayout((Clip(5, (3, 4, 2)), Clip(3, (1, 5, 6)), Clip(5, (3, 4, 2)))),
    "images of one size": PackLayout((Clip(4, (1, 3, 3)),) * 4),
    "clips shorter than the ring": PackLayout((Clip(1, (1, 1, 1)), Clip(0, (1, 1, 3)), Clip(2, (1, 1, 1)), Clip(0, (1, 1, 1)))),
    "no text": PackLayout((Clip(0, (2, 3, 3)), Clip(0, (1, 2, 2)))),
    "text in the middle": PackLayout((Clip(0, (2, 3, 3)), Clip(11, (1, 2, 2)))),
    "fewer tokens than ranks": PackLayout((Clip(1, (1, 1, 1)), Clip(0, (1, 1, 1)))),
    "one token": PackLayout((Clip(0, (1, 1, 1)),)),
}  # fmt: skip
CASES = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
Token = tuple[int, int, int]


def mesh_of(layout: Layout, rank: int) -> ParallelMesh:
    """A rank's place on every axis, without process groups."""
    axes = {}
    for name in ("ring", "ulysses", "tp", "sample"):
        ranks = layout.ranks(name, rank)
        axes[name] = Axis(name, ranks.index(rank), len(ranks), ranks)
    return ParallelMesh(**axes)


def shards_of(layout: Layout, pack: PackLayout) -> list[SequenceShard]:
    return [SequenceShard(pack, mesh_of(layout, rank)) for rank in range(layout.world)]


def sequence(pack: PackLayout) -> list[Token]:
    """The plain definition: (clip, kind, place within the clip's tokens of that kind) of every token, in order."""
    return [
        (index, kind, place)
        for index, clip in enumerate(pack.clips)
        for kind, count in ((TEXT, clip.text), (VISION, clip.vision))
        for place in range(count)
    ]


def tokens(spans: tuple[Span, ...]) -> list[Token]:
    return [(span.clip, span.kind, place) for span in spans for place in range(span.start, span.stop)]


def rows_of(runs: tuple[Run, ...]) -> list[int]:
    """The row of every token; runs follow one another and none is empty."""
    assert [run.start for run in runs] == [0, *(run.stop for run in runs)][: len(runs)]
    assert all(run.start < run.stop for run in runs)
    return [run.row for run in runs for _ in range(run.start, run.stop)]


@CASES
def test_every_token_has_one_owner(pack: PackLayout) -> None:
    for layout in LAYOUTS:
        owned = [token for shard in shards_of(layout, pack) for token in tokens(shard.spans)]
        assert sorted(owned) == sequence(pack), layout.name


@CASES
def test_ranks_differ_by_one_token_at_most(pack: PackLayout) -> None:
    for layout in LAYOUTS:
        counts = [tokens_of(shard.spans) for shard in shards_of(layout, pack)]
        assert max(counts) - min(counts) <= 1, layout.name


@CASES
def test_a_rank_hears_the_tokens_of_its_ulysses_and_tp_ranks_in_order(pack: PackLayout) -> None:
    for layout in LAYOUTS:
        shards = shards_of(layout, pack)
        for rank, shard in enumerate(shards):
            together = [r for r in layout.ranks("sample", rank) if shards[r].mesh.ring.rank == shard.mesh.ring.rank]
            expected = [token for r in together for token in tokens(shards[r].spans)]
            assert tokens(shard.heard) == expected == sorted(expected), layout.name


@CASES
def test_modulation_rows_are_the_roles_of_the_tokens(pack: PackLayout) -> None:
    for layout in LAYOUTS:
        shards = shards_of(layout, pack)
        for rank, shard in enumerate(shards):
            wide = [token for r in layout.ranks("tp", rank) for token in tokens(shards[r].spans)]
            mine = tokens(shard.spans)
            assert rows_of(shard.rows.runs) == [2 * clip + kind for clip, kind, _ in mine]
            assert rows_of(shard.rows.wide) == [2 * clip + kind for clip, kind, _ in wide]
            assert shard.rows.counts == tuple(len(tokens(shards[r].spans)) for r in layout.ranks("tp", rank))
            assert shard.rows.axis is shard.mesh.tp
            vision = [clip for clip, kind, _ in mine if kind == VISION]
            assert rows_of(shard.vision_rows.runs) == rows_of(shard.vision_rows.wide) == vision
            assert shard.vision_rows.counts == (len(vision),) and shard.vision_rows.axis.size == 1
            assert shard.vision_counts() == [vision.count(clip) for clip in range(len(pack.clips))]


def numbered(pack: PackLayout) -> tuple[list[Token], Tensor, Tensor]:
    """The sequence, and the places in it of all text tokens and of all vision tokens, [count, 1] each."""
    whole = sequence(pack)
    text, vision = (
        torch.tensor([at for at, token in enumerate(whole) if token[1] == kind], dtype=torch.float64)[:, None]
        for kind in (TEXT, VISION)
    )
    return whole, text, vision


@CASES
def test_tensors_are_cut_and_joined_as_plain_indices_are(pack: PackLayout) -> None:
    whole, text, vision = numbered(pack)
    at = {token: place for place, token in enumerate(whole)}
    for layout in LAYOUTS:
        for shard in shards_of(layout, pack):
            places = {kind: [at[token] for token in tokens(shard.spans) if token[1] == kind] for kind in (TEXT, VISION)}
            own_text, own_vision = shard.mine(text, TEXT), shard.mine(vision, VISION)
            assert own_text.flatten().tolist() == places[TEXT]
            assert own_vision.flatten().tolist() == places[VISION]
            joint = shard.interleave(own_text, own_vision)
            assert joint.flatten().tolist() == [at[token] for token in tokens(shard.spans)]
            for kind in (TEXT, VISION):
                assert shard.only(joint, kind).flatten().tolist() == places[kind]


@CASES
def test_both_kinds_take_part_in_the_sequence_of_every_rank(pack: PackLayout) -> None:
    """Also on a rank without tokens of one: its gradients are zeros, not missing."""
    _, text, vision = numbered(pack)
    for layout in LAYOUTS:
        for shard in shards_of(layout, pack):
            own = [shard.mine(text, TEXT).clone(), shard.mine(vision, VISION).clone()]
            leaves = [part.requires_grad_() for part in own]
            grads = torch.autograd.grad(shard.interleave(*leaves).sum(), leaves)
            assert all(torch.equal(grad, torch.ones_like(part)) for grad, part in zip(grads, own))


def test_one_piece_is_not_copied() -> None:
    pack = PACKS["text in the middle"]
    whole = SequenceShard(PackLayout(pack.clips[:1]))
    vision = torch.randn(pack.clips[0].vision, 3)
    assert whole.mine(vision, VISION).data_ptr() == vision.data_ptr()
    assert whole.only(vision, VISION).data_ptr() == vision.data_ptr()


def test_a_single_process_holds_everything() -> None:
    for pack in PACKS.values():
        shard = SequenceShard(pack)
        assert shard.spans == shard.heard == pack.spans() and tokens(shard.spans) == sequence(pack)
        vision = torch.randn(pack.vision, 3)
        assert shard.mine(vision, VISION).equal(vision) and shard.whole_vision(vision) is vision


def test_shares_of_a_ring_are_even_for_each_clip_and_in_total() -> None:
    generator = torch.Generator().manual_seed(0)
    for ranks in range(1, 9):
        for clips in range(1, 7):
            lengths = torch.randint(1, 40, (clips,), generator=generator).tolist()
            shares = ring_shares(lengths, ranks)
            assert [sum(column) for column in zip(*shares)] == lengths
            assert all(max(column) - min(column) <= 1 for column in zip(*shares))
            totals = [sum(row) for row in shares]
            assert max(totals) - min(totals) <= 1


def test_a_cut_is_a_slice_of_the_tokens() -> None:
    spans = PACKS["videos, an image, another prompt"].spans()
    whole = tokens(spans)
    for start, stop in itertools.combinations(range(len(whole) + 1), 2):
        assert tokens(cut(spans, start, stop)) == whole[start:stop]
    assert cut(spans, 4, 4) == ()


def test_calls_of_attention_pair_the_queries_and_keys_of_each_clip() -> None:
    """Every (query, key) of one clip is in one call, and no other; whatever shares two ranks of a ring have."""
    for lengths, k_lengths in (
        ((3, 3, 3), (3, 3, 3)), ((3, 3, 2), (4, 4, 4)), ((3, 0, 3), (3, 2, 3)), ((3, 2, 3), (3, 0, 3)),
        ((0, 3, 3), (1, 2, 2)), ((1, 1), (0, 0)), ((2, 2, 2, 2), (1, 1, 0, 1)), ((2, 0, 2, 2), (1, 0, 1, 1)),
        ((3, 0, 3), (1, 1, 2)), ((1, 1, 2), (3, 0, 3)),
    ):  # fmt: skip
        clip_of_query, clip_of_key = (
            [clip for clip, count in enumerate(counts) for _ in range(count)] for counts in (lengths, k_lengths)
        )
        expected = [
            (i, j) for (i, a), (j, b) in itertools.product(enumerate(clip_of_query), enumerate(clip_of_key)) if a == b
        ]
        groups = groups_of(lengths, k_lengths)
        found = [
            (group.start + clip * group.length + i, group.k_start + clip * group.k_length + j)
            for group in groups
            for clip in range(group.clips)
            for i, j in itertools.product(range(group.length), range(group.k_length))
        ]
        assert found == expected
        pairs = [pair for pair in zip(lengths, k_lengths) if all(pair)]
        assert sum(group.clips for group in groups) == len(pairs)
    assert len(groups_of((3, 0, 3), (2, 0, 2))) == 1, "a clip that is on neither rank divides no call"
