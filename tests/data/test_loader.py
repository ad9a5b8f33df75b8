from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.loader import Loader, dealt
from cogvideo_dist.data.plan import HELD_OUT, Plan
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.data.writing import write_shards
from cogvideo_dist.protocols import Batch
from tests.data.clips import geometry, indices, make_clip, make_image, make_shards, settings

CLIPS = {
    **{f"videos/{i}.mp4": make_clip(20 + i, 16, size=(48, 80)) for i in range(6)},
    **{f"videos/short {i}.mp4": make_clip(10, 12) for i in range(3)},
    **{f"images/still {i}.png": make_image(60 + i, 90) for i in range(4)},
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return make_shards(tmp_path_factory.mktemp("loader"), CLIPS.items())


def make(reader: ShardReader, dp: tuple[int, int] = (0, 1), seed: int = 3, **changes: object) -> Loader:
    data = settings(**changes)
    plan = Plan(Catalog([reader.records]), data, seed=seed, geometry=geometry)
    return Loader(plan, [reader.store], data=data, geometry=geometry, dp_rank=dp[0], dp_size=dp[1])


def steps(loader: Loader, first: int = 0, count: int = 3) -> list[Batch]:
    return list(islice(loader.iterate(first), count * loader.micro_steps))


def content(batch: Batch) -> list[tuple[object, ...]]:
    return [(s.slot, s.key, s.caption, None if s.pixels is None else s.pixels.numpy().tobytes()) for s in batch.samples]


def damage(reader: ShardReader, *places: int) -> ShardReader:
    """Flip a bit in the clips of these indices."""
    for place in places:
        record = reader.records[place]
        path = reader.folder / record.shard
        data = bytearray(path.read_bytes())
        data[next(m.offset for ext, m in record.members.items() if ext in ("mp4", "png")) + 50] ^= 4
        path.write_bytes(data)
    return reader


@pytest.fixture
def own(tmp_path: Path) -> ShardReader:
    return make_shards(tmp_path, CLIPS.items())


def test_batches_hold_what_the_plan_says(reader: ShardReader) -> None:
    loader = make(reader)
    for number, batch in enumerate(steps(loader)):
        step, micro = divmod(number, 4)
        pack = dealt(batch.plan.costs, 1)[0][micro]
        assert (batch.plan, batch.pack) == (loader.plan.step(step), pack)
        assert batch.first == sum(len(other) for other in batch.plan.packs[:pack])
        assert tuple(sample.slot for sample in batch.samples) == batch.plan.packs[pack]
        assert batch.layout.clips == tuple(geometry(slot.size) for slot in batch.plan.packs[pack])
        assert batch.defects == ()
        for sample in batch.samples:
            record = reader.records[sample.slot.index]
            assert (sample.key, sample.caption) == (record.key, f"This is {record.source}.")
            assert sample.pixels is not None
            assert tuple(sample.pixels.shape) == (*sample.slot.size, 3)
            if record.kind == "video" and record.fps == 16:
                found = indices(sample.pixels)
                assert found == list(range(found[0], found[0] + 2 * len(found), 2))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_world_size_sees_the_same_packs(reader: ShardReader, dp_size: int) -> None:
    alone = {(batch.plan.step, batch.pack): content(batch) for batch in steps(make(reader))}
    ranks = [steps(make(reader, (rank, dp_size))) for rank in range(dp_size)]
    assert {(batch.plan.step, batch.pack): content(batch) for mine in ranks for batch in mine} == alone
    assert {len(mine) for mine in ranks} == {12 // dp_size}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(reader: ShardReader, workers: int) -> None:
    state = torch.random.get_rng_state()
    loader = make(reader, workers=workers, held_out=3)
    alone = make(reader, held_out=3)
    assert [content(batch) for batch in steps(loader)] == [content(batch) for batch in steps(alone)]
    assert [content(batch) for batch in loader.held_out_batches()] == [content(b) for b in alone.held_out_batches()]
    assert torch.equal(state, torch.random.get_rng_state())
    loader.close()


def test_a_run_begins_anywhere(reader: ShardReader) -> None:
    alone = [content(batch) for batch in steps(make(reader), 0, 9)]
    assert [content(batch) for batch in steps(make(reader), 7, 2)] == alone[28:]


def test_a_clip_is_cut_anew_in_every_epoch(reader: ShardReader) -> None:
    seen: dict[str, set[object]] = {}
    for batch in steps(make(reader), 0, 6):
        for _, key, _, pixels in content(batch):
            seen.setdefault(str(key), set()).add(pixels)
    assert max(len(cuts) for cuts in seen.values()) > 1


def test_clips_are_read_at_every_rate_that_their_source_reaches(reader: ShardReader) -> None:
    """Frames of the clips are numbered, so their distance tells the rate."""
    seen: dict[tuple[bool, float], set[int]] = {}
    for batch in steps(make(reader, other_fps=(12.0, 16.0)), 0, 12):
        for sample in batch.samples:
            record = reader.records[sample.slot.index]
            if record.kind == "video" and sample.pixels is not None:
                found = indices(sample.pixels)
                seen.setdefault((record.source.startswith("videos/short"), record.fps), set()).add(found[2] - found[0])
    assert seen == {(False, 16.0): {2, 3, 4}, (True, 12.0): {2, 3}}
    held_out = make(reader, held_out=7, other_fps=(12.0, 16.0)).held_out_batches()
    for sample in (sample for batch in held_out for sample in batch.samples if sample.slot.size[0] > 1):
        assert sample.pixels is not None
        assert indices(sample.pixels)[2] == {16.0: 4, 12.0: 3}[reader.records[sample.slot.index].fps]


def test_a_world_size_that_does_not_divide_is_refused(reader: ShardReader) -> None:
    with pytest.raises(
        ValueError,
        match="packs_per_step 4 does not divide over 3 data-parallel ranks; numbers of ranks that do: 1, 2, 4",
    ):
        make(reader, (0, 3))


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_held_out_packs_are_dealt_once(reader: ShardReader, dp_size: int) -> None:
    found: list[int] = []
    for rank in range(dp_size):
        loader = make(reader, (rank, dp_size), held_out=7, packs_per_step=6, tokens_per_pack=45)
        batches = list(loader.held_out_batches())
        assert len(batches) == loader.held_out_count <= loader.held_out_rounds
        found += [batch.pack for batch in batches]
        assert all(batch.plan.step == HELD_OUT for batch in batches)
        other = make(reader, (0, dp_size), held_out=7, packs_per_step=6, tokens_per_pack=45)
        assert [content(batch) for batch in other.held_out_batches_of(rank)] == [content(batch) for batch in batches]
        for sample in (sample for batch in batches for sample in batch.samples):
            assert sample.pixels is not None
            if sample.slot.size[0] > 1:
                assert indices(sample.pixels)[0] == 0
    assert sorted(found) == list(range(len(loader.plan.held_out_plan.packs)))


def test_a_damaged_clip_is_replaced_and_reported(own: ShardReader) -> None:
    whole = steps(make(own), 0, 6)
    bad = [
        i
        for i, record in enumerate(own.records)
        if record.source in ("videos/1.mp4", "videos/2.mp4", "images/still 3.png")
    ]
    keys = {own.records[i].source: own.records[i].key for i in range(len(own.records))}
    expected = {
        keys["videos/1.mp4"]: keys["videos/3.mp4"],  # 2 is damaged too
        keys["videos/2.mp4"]: keys["videos/3.mp4"],
        keys["images/still 3.png"]: keys["images/still 0.png"],  # round again
    }
    found = set()
    for before, after in zip(whole, steps(make(damage(own, *bad)), 0, 6), strict=True):
        assert after.plan == before.plan
        for old, new in zip(before.samples, after.samples, strict=True):
            assert new.slot == old.slot
            assert new.key == expected.get(old.key, old.key)
        hit = [sample.key for sample in before.samples if sample.key in expected]
        assert {defect.key for defect in after.defects} >= set(hit)
        for defect in after.defects:
            assert "damaged" in defect.reason
            assert defect.replaced_by == expected[defect.key]
            found.add(defect.source)
    assert found == {"videos/1.mp4", "videos/2.mp4", "images/still 3.png"}


def test_a_replacement_is_cut_as_the_clip_would_have_been(own: ShardReader) -> None:
    place = next(i for i, record in enumerate(own.records) if record.source == "images/still 0.png")
    before = steps(make(own), 0, 6)
    after = steps(make(damage(own, place)), 0, 6)
    pairs = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x.samples, y.samples, strict=True)]
    changed = [(a.slot, b.slot) for a, b in pairs if a.key != b.key]
    assert changed
    assert all(a == b for a, b in changed)


def test_workers_replace_alike(own: ShardReader) -> None:
    damage(own, 0, 5, 7)
    working = make(own, workers=2)
    alone, parallel = steps(make(own)), steps(working)
    assert [content(batch) for batch in alone] == [content(batch) for batch in parallel]
    assert [batch.defects for batch in alone] == [batch.defects for batch in parallel]
    working.close()


def test_a_size_without_a_readable_clip_ends_the_run(own: ShardReader) -> None:
    stills = [i for i, record in enumerate(own.records) if record.kind == "image"]
    with pytest.raises(ValueError, match=r"none of the 4 clips of size \[1, 48, 64\] can be read; the first: sample"):
        steps(make(damage(own, *stills)), 0, 6)


def test_a_lost_shard_is_no_defect_of_a_sample(own: ShardReader) -> None:
    loader = make(own)
    for path in own.folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(OSError, match="shard-000000.tar: .* No such file"):
        steps(loader)


LATENT = {"source": "v", "kind": "latent", "frames": 9, "fps": 8.0, "height": 48, "width": 64, "caption_length": 1}


def latents(folder: Path, mean: tuple[int, ...], text: tuple[int, ...] = (4, 6), **extra: torch.Tensor) -> Loader:
    """One good sample and one with the given shapes, both of the same size."""
    entries = []
    for key, (m, t, more) in {"a": ((16, 3, 6, 8), (4, 6), {}), "b": (mean, text, extra)}.items():
        moments = {"mean": torch.ones(m), "logvar": torch.zeros(m), **more}
        members = {"latent.safetensors": save(moments), "text.safetensors": save({"text": torch.ones(t)})}
        entries.append((key, members, {**LATENT, "size": (9, 48, 64)}))
    write_shards(folder / "latents", entries)
    return make(ShardReader(folder / "latents"), source="latents", packs_per_step=1)


def test_latents_are_read_as_written(tmp_path: Path) -> None:
    (batch,) = steps(latents(tmp_path, (16, 3, 6, 8)), count=1)
    for sample in batch.samples:
        assert sample.mean is not None
        assert sample.logvar is not None
        assert sample.text is not None
        assert sample.pixels is None
        assert (sample.mean.shape, sample.text.shape) == ((16, 3, 6, 8), (4, 6))
        assert sample.mean.eq(1).all()
        assert sample.logvar.eq(0).all()
    assert {sample.key for sample in batch.samples} == {"a", "b"}
    assert batch.defects == ()


@pytest.mark.parametrize(
    ("mean", "text", "extra"),
    [((16, 2, 6, 8), (4, 6), {}), ((16, 3, 6, 8), (4,), {}), ((16, 3, 6, 8), (4, 6), {"more": torch.ones(1)})],
)
def test_latents_of_another_shape_are_defects(
    tmp_path: Path, mean: tuple[int, ...], text: tuple[int, ...], extra: dict[str, torch.Tensor]
) -> None:
    (batch,) = steps(latents(tmp_path, mean, text, **extra), count=1)
    assert {sample.key for sample in batch.samples} == {"a"}
    assert {(defect.key, defect.replaced_by) for defect in batch.defects} == {("b", "a")}
    assert "mean" in batch.defects[0].reason


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["mean", "logvar", "text"])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf, -2e5])
def test_latents_that_no_encoder_makes_are_defects(tmp_path: Path, dtype: torch.dtype, name: str, value: float) -> None:
    """One number of one tensor is not finite, or far beyond any; the shard's checksums are right."""
    tensors = {"mean": torch.ones(16, 3, 6, 8), "logvar": torch.zeros(16, 3, 6, 8), "text": torch.full((4, 6), 9e4)}
    entries = []
    for key in ("a", "b"):
        own = {kind: tensor.clamp(max=6e4).to(dtype) for kind, tensor in tensors.items()}
        if key == "b":
            own[name].view(-1)[7] = value
        moments = {kind: own[kind] for kind in ("mean", "logvar")}
        members = {"latent.safetensors": save(moments), "text.safetensors": save({"text": own["text"]})}
        entries.append((key, members, {**LATENT, "size": (9, 48, 64)}))
    write_shards(tmp_path / "latents", entries)
    (batch,) = steps(make(ShardReader(tmp_path / "latents"), source="latents", packs_per_step=1), count=1)
    assert {sample.key for sample in batch.samples} == {"a"}
    (defect,) = {(defect.key, defect.code, defect.reason) for defect in batch.defects}
    assert defect[:2] == ("b", "wrong values")
    finite = math.isfinite(torch.tensor(value, dtype=dtype).item())
    assert f"shard-000000.tar:b: {name} holds numbers that are {'larger than' if finite else 'not finite'}" in defect[2]
