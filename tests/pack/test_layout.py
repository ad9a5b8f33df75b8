from __future__ import annotations

import pytest

from cogvideo_dist.pack.layout import TEXT, VISION, Clip, Group, PackLayout, Run, groups_of, runs_of, vision_runs_of

IMAGE, WORDLESS, LONG = Clip(4, (1, 2, 3)), Clip(0, (2, 2, 2)), Clip(4, (3, 2, 2))
LAYOUT = PackLayout((IMAGE, WORDLESS, LONG, LONG))


def roles(layout: PackLayout) -> list[tuple[int, int]]:
    """The plain definition: (clip, kind) of every token."""
    return [
        (index, kind)
        for index, clip in enumerate(layout.clips)
        for kind, count in ((TEXT, clip.text), (VISION, clip.grid[0] * clip.grid[1] * clip.grid[2]))
        for _ in range(count)
    ]


def test_runs_are_the_tokens_of_each_role_in_order() -> None:
    expected = roles(LAYOUT)
    runs = runs_of(LAYOUT.spans())
    assert [divmod(run.row, 2) for run in runs for _ in range(run.start, run.stop)] == expected
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert all(run.stop > run.start for run in runs), "no run is empty"
    assert LAYOUT.tokens == len(expected)
    assert LAYOUT.vision == sum(kind == VISION for _, kind in expected)


def test_vision_runs_count_vision_alone() -> None:
    clips = [clip for clip, kind in roles(LAYOUT) if kind == VISION]
    found = vision_runs_of(LAYOUT.spans())
    assert [run.row for run in found for _ in range(run.start, run.stop)] == clips
    assert [run.start for run in found] == [0, *(run.stop for run in found[:-1])]


def test_segments_are_clips_with_their_text() -> None:
    assert LAYOUT.lengths == (10, 8, 16, 16)
    assert LAYOUT.cu_seqlens == (0, 10, 18, 34, 50)


def test_neighbours_of_equal_length_are_one_group() -> None:
    groups = groups_of(LAYOUT.lengths, LAYOUT.lengths)
    assert groups == (Group(0, 0, 1, 10, 10), Group(10, 10, 1, 8, 8), Group(18, 18, 2, 16, 16))
    apart = PackLayout((LONG, IMAGE, LONG))
    assert [group.clips for group in groups_of(apart.lengths, apart.lengths)] == [1, 1, 1]
    covered = [token for g in groups for token in range(g.start, g.start + g.clips * g.length)]
    assert covered == list(range(LAYOUT.tokens))


def test_one_clip_is_two_runs_and_one_group() -> None:
    layout = PackLayout((IMAGE,))
    assert runs_of(layout.spans()) == (Run(0, 4, TEXT), Run(4, 10, VISION))
    assert groups_of((10,), (10,)) == (Group(0, 0, 1, 10, 10),)


def test_layouts_are_values() -> None:
    assert PackLayout((IMAGE, LONG)) == PackLayout((Clip(4, (1, 2, 3)), Clip(4, (3, 2, 2))))
    assert hash(PackLayout((IMAGE,))) == hash(PackLayout((IMAGE,)))


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="a pack needs at least one clip"):
        PackLayout(())
    with pytest.raises(ValueError, match=r"at least 1x1x1, found text=3 grid=\(1, 0, 2\)"):
        Clip(3, (1, 0, 2))
    with pytest.raises(ValueError, match="found text=-1"):
        Clip(-1, (1, 1, 1))
