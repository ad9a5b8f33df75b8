"""Which ranks do what together, without a process: the axes of every layout, the legal layouts, the one that is chosen."""

from __future__ import annotations

import itertools
from math import prod

import pytest

from cogvideo_dist.config.schema import Parallel
from cogvideo_dist.models.presets import RELEASED
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, choose_layout, divisors, legal_layouts

DIFFERS = {
    "dp": {"dp"}, "sp": {"ring", "ulysses"}, "ring": {"ring"}, "ulysses": {"ulysses"}, "tp": {"tp"},
    "replica": {"dp", "ring", "ulysses"}, "sample": {"ring", "ulysses", "tp"}, "world": {"dp", "ring", "ulysses", "tp"},
}  # fmt: skip
LAYOUTS = [
    Layout(*sizes, cp=cp)
    for sizes in itertools.product((1, 2, 3), repeat=4)
    for cp in divisors(prod(sizes[1:]))
    if prod(sizes) <= 12
]
HEADS_2B, HEADS_5B = RELEASED["cogvideox-2b"].heads, RELEASED["cogvideox-5b"].heads


def places(layout: Layout) -> list[dict[str, int]]:
    """The plain definition: every rank's place, tp changing fastest."""
    return [
        {"dp": dp, "ring": ring, "ulysses": ulysses, "tp": tp}
        for dp in range(layout.dp)
        for ring in range(layout.ring)
        for ulysses in range(layout.ulysses)
        for tp in range(layout.tp)
    ]


@pytest.mark.parametrize("axis", DIFFERS)
def test_ranks_of_an_axis_differ_in_its_dimensions_alone(axis: str) -> None:
    for layout in LAYOUTS:
        where = places(layout)
        assert len(where) == layout.world
        for rank, place in enumerate(where):
            alike = [d for d in place if d not in DIFFERS[axis]]
            expected = tuple(r for r, other in enumerate(where) if all(other[d] == place[d] for d in alike))
            assert layout.ranks(axis, rank) == expected, layout.name


@pytest.mark.parametrize("axis", [*DIFFERS, "cp"])
def test_every_axis_divides_the_world(axis: str) -> None:
    for layout in LAYOUTS:
        groups = {layout.ranks(axis, rank) for rank in range(layout.world)}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        assert all(rank in layout.ranks(axis, rank) for rank in range(layout.world))
        size = layout.cp if axis == "cp" else prod(getattr(layout, d) for d in DIFFERS[axis])
        assert {len(group) for group in groups} == {size}


def test_frames_go_to_neighbours_that_hold_the_same_sample() -> None:
    for layout in LAYOUTS:
        for rank in range(layout.world):
            ranks = layout.ranks("cp", rank)
            assert list(ranks) == list(range(ranks[0], ranks[0] + layout.cp))
            assert set(ranks) <= set(layout.ranks("sample", rank))


def test_what_exchanges_most_is_nearest() -> None:
    """tp within ulysses within ring within dp: 2 nodes of 8."""
    layout = Layout(dp=2, ring=2, ulysses=2, tp=2)
    assert layout.ranks("tp", 5) == (4, 5)
    assert layout.ranks("ulysses", 5) == (5, 7)
    assert layout.ranks("ring", 5) == (1, 5)
    assert layout.ranks("dp", 5) == (5, 13)
    assert layout.ranks("sp", 5) == (1, 3, 5, 7)
    assert layout.ranks("replica", 5) == (1, 3, 5, 7, 9, 11, 13, 15)
    assert layout.ranks("sample", 5) == tuple(range(8))
    for axis in ("tp", "ulysses", "sp", "sample"):
        assert all(len({rank // 8 for rank in layout.ranks(axis, r)}) == 1 for r in range(16)), axis


def test_names_say_what_is_parallel() -> None:
    assert Layout().name == "single"
    assert Layout(dp=2, ulysses=4).name == "dp2-ulysses4"
    assert Layout(ring=2, tp=2, cp=4).name == "ring2-tp2-cp4"
    assert (Layout(2, 3, 4, 5).sample, Layout(2, 3, 4, 5).world) == (60, 120)


def test_a_single_process_is_first_and_alone_on_every_axis() -> None:
    mesh = ParallelMesh()
    assert mesh.is_first
    for name in (*DIFFERS, "cp"):
        axis = getattr(mesh, name)
        assert (axis.name, axis.rank, axis.size, axis.ranks, axis.group) == (name, 0, 1, (0,), None)


@pytest.mark.parametrize(("heads", "count"), [(HEADS_2B, 16), (HEADS_5B, 20)])
def test_legal_layouts_are_all_that_the_heads_allow(heads: int, count: int) -> None:
    found = legal_layouts(8, heads=heads)
    expected = {
        Layout(*sizes)
        for sizes in itertools.product((1, 2, 4, 8), repeat=4)
        if prod(sizes) == 8 and heads % sizes[3] == 0 and sizes[2] <= heads // sizes[3]
    }
    assert set(found) == expected and len(found) == len(expected) == count
    assert found[0] == Layout(dp=8), "the plainest is named first"


def test_legal_layouts_of_the_released_models() -> None:
    """30 heads divide by 2 and not by 4; 48 by 8. Uneven shares of heads are legal on Ulysses."""
    small, large = ({layout.name for layout in legal_layouts(8, heads=heads)} for heads in (HEADS_2B, HEADS_5B))
    assert {"ulysses8", "ring8", "ulysses4-tp2", "dp4-tp2", "ring2-ulysses2-tp2"} <= small
    assert large - small == {"dp2-tp4", "ulysses2-tp4", "ring2-tp4", "tp8"}
    assert small < large


def test_few_heads_leave_ranks_to_the_ring() -> None:
    assert {layout.name for layout in legal_layouts(4, heads=3)} == {
        "dp4", "dp2-ulysses2", "dp2-ring2", "ring2-ulysses2", "ring4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "world", "heads", "node", "expected"),
    [
        (Parallel(), 1, HEADS_5B, 1, Layout()),
        (Parallel(), 16, HEADS_5B, 8, Layout(dp=16)),
        (Parallel(sp=8), 8, HEADS_2B, 8, Layout(ring=4, ulysses=2)),  # 30 heads divide by 2, not by 4
        (Parallel(sp=8), 8, HEADS_5B, 8, Layout(ulysses=8)),
        (Parallel(sp=16), 16, HEADS_5B, 8, Layout(ring=2, ulysses=8)),  # Ulysses inside a node, the ring across
        (Parallel(sp=16), 32, HEADS_5B, 8, Layout(dp=2, ring=2, ulysses=8)),
        (Parallel(sp=16), 16, HEADS_5B, 16, Layout(ulysses=16)),
        (Parallel(sp=8), 8, HEADS_5B, 1, Layout(ring=8)),
        (Parallel(sp=8, tp=2), 16, HEADS_5B, 8, Layout(ring=2, ulysses=4, tp=2)),  # tp takes half of a node
        (Parallel(sp=2, tp=16), 32, HEADS_5B, 8, Layout(ring=2, tp=16)),  # tp alone is more than a node
        (Parallel(sp=6), 6, HEADS_2B, 8, Layout(ulysses=6)),
        (Parallel(tp=2), 8, HEADS_2B, 8, Layout(dp=4, tp=2)),
        (Parallel(sp=8, ring=2), 8, HEADS_2B, 8, Layout(ring=2, ulysses=4)),  # asked for: uneven heads
        (Parallel(sp=8, ulysses=1), 8, HEADS_5B, 8, Layout(ring=8)),
        (Parallel(sp=8, ulysses=8), 16, HEADS_5B, 4, Layout(dp=2, ulysses=8)),  # asked for: across nodes
        (Parallel(sp=4, ulysses=2, ring=2), 8, HEADS_5B, 8, Layout(dp=2, ring=2, ulysses=2)),
        (Parallel(sp=4, tp=2, cp=8), 8, HEADS_5B, 8, Layout(ulysses=4, tp=2, cp=8)),
    ],
)
def test_chosen_layout(wanted: Parallel, world: int, heads: int, node: int, expected: Layout) -> None:
    assert choose_layout(wanted, world=world, heads=heads, node=node) == expected


def test_every_choice_is_legal() -> None:
    for heads, node, world in itertools.product((3, HEADS_2B, HEADS_5B), (1, 4, 8), (4, 8, 12)):
        for sp, tp in itertools.product(divisors(world), repeat=2):
            if world % (sp * tp) == 0 and heads % tp == 0:
                found = choose_layout(Parallel(sp=sp, tp=tp), world=world, heads=heads, node=node)
                assert found in legal_layouts(world, heads=heads)
                assert found.ring * found.ulysses == sp and found.tp == tp
                assert heads // tp % found.ulysses == 0, "what is chosen divides the heads"


@pytest.mark.parametrize(
    ("wanted", "heads", "message"),
    [
        (Parallel(sp=3), HEADS_5B, "8 ranks do not divide into parallel.sp 3 x parallel.tp 1"),
        (Parallel(sp=4, tp=4), HEADS_5B, "8 ranks do not divide into parallel.sp 4 x parallel.tp 4"),
        (Parallel(tp=4), HEADS_2B, r"30 heads do not divide over parallel.tp 4 \(use one of 1, 2, 3, 5, 6, 10, 15, 30\)"),
        (Parallel(sp=8, ulysses=3), HEADS_5B, "parallel.ulysses 3 x parallel.ring 2 is not parallel.sp 8"),
        (Parallel(sp=8, ulysses=4, ring=4), HEADS_5B, "parallel.ulysses 4 x parallel.ring 4 is not parallel.sp 8"),
        (Parallel(sp=4, ulysses=4), 3, "parallel.ulysses 4 is more than the 3 heads of a rank"),
        (Parallel(sp=4, tp=2, ulysses=4), 6, "parallel.ulysses 4 is more than the 3 heads of a rank"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_key_and_lists_what_is_legal(wanted: Parallel, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        choose_layout(wanted, world=8, heads=heads, node=8)
    text, _, listed = str(refused.value).partition(f"; legal layouts of 8 ranks for {heads} heads: ")
    assert text and listed.split(", ") == [layout.name for layout in legal_layouts(8, heads=heads)]


def test_frames_that_do_not_divide_over_a_sample_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"parallel.cp 3 does not divide parallel.sp 2 x parallel.tp 2; use one of 1, 2, 4$"
    ):
        choose_layout(Parallel(sp=2, tp=2, cp=3), world=8, heads=HEADS_5B, node=8)
