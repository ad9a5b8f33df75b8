from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cogvideo_dist.config.schema import Data, Source
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import Index, Kind, Member, Record
from cogvideo_dist.data.plan import HELD_OUT, Plan
from cogvideo_dist.data.sizes import assign_size
from cogvideo_dist.protocols import Slot
from tests.data.clips import geometry, settings


def record(
    key: int, *, frames: int = 9, fps: float = 8, size: tuple[int, int] = (48, 64), kind: Kind = "video"
) -> Record:
    members = {"mp4": Member(0, 1, "0" * 32)}
    return Record(
        key=f"{key:08d}", source=f"{key}.mp4", shard="a.tar", kind=kind, members=members, frames=frames,
        fps=0.0 if kind == "image" else fps, height=size[0], width=size[1], caption_length=1,
        size=(frames, *size) if kind == "latent" else None,
    )  # fmt: skip


def mixed(count: int = 40) -> list[Record]:
    """Clips of 5 and of 9 frames, and images."""
    kinds = ({"frames": 9}, {"frames": 7}, {"frames": 1, "kind": "image"})
    return [record(key, **kinds[(key * 7) % 3]) for key in range(count)]


def plan(records: Sequence[Record], seed: int = 0, **changes: object) -> Plan:
    return Plan(Catalog([Index.of(records)]), settings(**changes), seed=seed, geometry=geometry)


def slots(made: Plan, steps: range) -> list[Slot]:
    return [slot for n in steps for pack in made.step(n).packs for slot in pack]


WIDE: Data = settings(sizes=((9, 48, 64), (9, 48, 96), (5, 48, 96), (5, 96, 192), (1, 48, 48), (1, 96, 96)))


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (record(0, frames=9, size=(48, 64)), (9, 48, 64)),
        (record(0, frames=90, size=(480, 640)), (9, 48, 64)),
        (record(0, frames=9, size=(96, 192)), (9, 48, 96)),  # aspect ratio, then frames, then pixels
        (record(0, frames=8, size=(96, 192)), (5, 96, 192)),
        (record(0, frames=8, size=(95, 191)), (5, 48, 96)),
        (record(0, frames=33, fps=30, size=(48, 96)), (9, 48, 96)),
        (record(0, frames=30, fps=30, size=(48, 96)), (5, 48, 96)),
        (record(0, frames=1, size=(100, 120), kind="image"), (1, 96, 96)),
        (record(0, frames=1, size=(95, 500), kind="image"), (1, 48, 48)),
    ],
)
def test_the_best_size_that_needs_no_enlarging_and_fits_is_taken(given: Record, size: tuple[int, int, int]) -> None:
    assert assign_size(given, WIDE) == size


@pytest.mark.parametrize(
    ("given", "changes", "reason"),
    [
        (record(0, size=(47, 64)), {}, "too small: 47 x 64"),
        (record(0, frames=4), {}, "too short: 0.500 s do not hold 5 frames at 8 per second"),
        (record(0, kind="image", frames=1), {"sizes": ((5, 32, 48),)}, "no size for an image"),
        (record(0), {"source": "latents"}, "wrong kind: a video"),
        (record(0, kind="latent"), {}, "wrong kind: a latent"),
        (
            record(0, kind="latent", frames=13),
            {"source": "latents"},
            "unlisted size: data.sizes does not list [13, 48, 64]",
        ),
    ],
)
def test_what_cannot_be_used_has_its_reason(given: Record, changes: dict[str, object], reason: str) -> None:
    sizes = changes.get("sizes", ((5, 48, 64), (1, 48, 64)))
    found = assign_size(given, settings(**{**changes, "sizes": sizes}))
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_a_video_is_a_still_only_where_nothing_longer_is_listed() -> None:
    assert assign_size(record(0), settings(sizes=((1, 48, 64),))) == (1, 48, 64)


def test_a_latent_has_its_own_size() -> None:
    assert assign_size(record(0, kind="latent"), settings(source="latents")) == (9, 48, 64)


def test_every_clip_comes_exactly_once_an_epoch() -> None:
    records = mixed(37)
    made = plan(records, held_out=3)
    training = set(range(37)) - {slot.index for slot in made.held_out}
    found = slots(made, range(60))
    assert max(Counter(found).values()) == 1
    epochs: dict[int, set[int]] = {}
    for slot in found:
        epochs.setdefault(slot.epoch, set()).add(slot.index)
    complete = [epoch for epoch in epochs if epoch < max(epochs) - 2]
    assert len(complete) > 20
    assert all(epochs[epoch] == training for epoch in complete)


def test_epochs_have_different_orders() -> None:
    found = slots(plan(mixed(40)), range(12))
    first, second = ([slot.index for slot in found if slot.epoch == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    forward, backward = plan(mixed()), plan(mixed())
    steps = [forward.step(n) for n in range(200)]
    assert backward.step(150) == steps[150]
    assert backward.step(7) == steps[7]
    assert backward.step(3) == steps[3]
    assert [backward.step(n) for n in range(199, -1, -13)] == steps[199::-13]
    with pytest.raises(ValueError, match="steps begin at 0"):
        forward.step(-1)


def test_packs_keep_the_budget_and_are_well_filled() -> None:
    made = plan(mixed(), tokens_per_pack=60)
    smallest = min(geometry(slot.size).tokens for slot in slots(made, range(20)))
    for n in range(20):
        step = made.step(n)
        assert len(step.packs) == 4
        for pack in step.packs:
            tokens = [geometry(slot.size).tokens for slot in pack]
            assert 60 - smallest < sum(tokens) <= 60
            assert tokens == sorted(tokens)


def test_totals_are_those_of_all_packs() -> None:
    step = plan(mixed()).step(5)
    clips = [geometry(slot.size) for pack in step.packs for slot in pack]
    assert (step.step, step.clips, step.elements) == (5, len(clips), sum(clip.vision for clip in clips))


def test_held_out_clips_are_never_trained_on() -> None:
    made = plan(mixed(), held_out=6)
    held_out = {slot.index for slot in made.held_out}
    assert len(held_out) == 6
    assert held_out.isdisjoint(slot.index for slot in slots(made, range(20)))
    assert all(slot.epoch == HELD_OUT for slot in made.held_out)
    assert sorted(slot for pack in made.held_out_plan.packs for slot in pack) == sorted(made.held_out)
    assert all(sum(geometry(slot.size).tokens for slot in pack) <= 100 for pack in made.held_out_plan.packs)


def test_held_out_clips_depend_on_their_keys_alone() -> None:
    records = mixed()
    turned = records[::-1]
    keys = {records[slot.index].key for slot in plan(records, held_out=6).held_out}
    assert keys == {turned[slot.index].key for slot in plan(turned, held_out=6).held_out}
    assert keys != {records[slot.index].key for slot in plan(records, seed=1, held_out=6).held_out}


def test_a_data_set_smaller_than_a_step_comes_again_and_again() -> None:
    found = slots(plan(mixed(3)), range(4))
    assert {slot.index for slot in found} == {0, 1, 2}
    assert len(set(found)) == len(found)


def test_what_is_dropped_is_listed() -> None:
    made = plan([record(0), record(1, frames=3), record(2, size=(20, 20)), record(3)], tokens_per_pack=40)
    assert [(defect.key, defect.reason.split(":")[0]) for defect in made.dropped] == [
        ("00000001", "too short"),
        ("00000002", "too small"),
    ]
    assert {slot.index for slot in slots(made, range(3))} == {0, 3}


def scored(key: int, aesthetic: float | None) -> Record:
    return replace(record(key), scores={} if aesthetic is None else {"aesthetic": aesthetic})


def test_the_best_part_of_a_source_is_kept() -> None:
    """A fifth of ten samples, by score; one without a score is never among them."""
    records = [scored(key, None if key == 0 else key % 7 + key / 100) for key in range(10)]
    source = Source("shards", score="aesthetic", top_share=0.2)
    made = plan(records, shards=None, sources=(source,))
    assert made.training.tolist() == [5, 6]
    whole = plan(records, shards=None, sources=(replace(source, top_share=1.0),))
    assert whole.training.tolist() == list(range(1, 10))
    with pytest.raises(ValueError, match="has no score 'motion', only aesthetic"):
        plan(records, shards=None, sources=(Source("shards", score="motion"),))


@pytest.mark.parametrize("mode", ["bucket", "pad"])
def test_other_modes_lose_nothing_either(mode: str) -> None:
    found = slots(plan(mixed(37), mode=mode), range(80))
    assert max(Counter(found).values()) == 1
    last = max(slot.epoch for slot in found)
    epochs = Counter(slot.epoch for slot in found)
    assert last > 5
    assert all(epochs[epoch] == 37 for epoch in range(last - 3))


def test_nothing_left_is_an_error_with_counts() -> None:
    records = [record(0), record(1, frames=3), record(2), record(3, kind="image", frames=1)]
    with pytest.raises(
        ValueError, match=r"none of the 4 samples is left to train on \(2 larger than a pack, 1 too short, 1 held out\)"
    ):
        plan(records, tokens_per_pack=30, held_out=1)
    with pytest.raises(ValueError, match=r"\[9, 48, 64\] takes 40 tokens, data.tokens_per_pack is 30"):
        plan([record(0)], tokens_per_pack=30)
