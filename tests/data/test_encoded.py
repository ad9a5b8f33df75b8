"""Sets that many workers make: whatever is killed, the bytes are the same and nothing is made twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from cogvideo_dist.data.encoded import Clip, Item, Role, SetPlan, address_of, pack, read_set, unpack
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.data.workshop import Outcome, build, working_folder
from cogvideo_dist.data.writing import write_shards
from tests.killing import KEPT, begun_twice, ended, fork, note, note_what_is_kept, tree

ROLES = (Role("text", ("text", "txt"), ("length",)), Role("latent", ("latent",)))
CLIPS = ("a", "b", "bad", "c", "d", "b", "e", "small", "f", "a", "g")


def clip(number: int, content: str, caption: str) -> Clip:
    """Of ``content`` "bad" nothing can be made, "small" is known not to be usable."""
    if content == "small":
        return Clip(f"k{number}", f"s{number}", refusal="too small")
    facts = {
        "source": f"s{number}", "kind": "latent", "frames": 9, "fps": 8.0, "height": 32, "width": 32,
        "caption_length": len(caption), "size": (9, 32, 32), "origin": {"vae": "v"},
    }  # fmt: skip
    return Clip(
        f"k{number}", f"s{number}", facts, {"text": address_of({"t": caption}), "latent": address_of({"l": content})}
    )


@dataclass
class Studio:
    """Clips by content and caption, and a log of what was made of them."""

    root: Path
    contents: Sequence[str] = CLIPS
    captions: Sequence[str] | None = None
    per_shard: int = 3
    said: list[str] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)

    @property
    def log(self) -> Path:
        return self.root.with_name(f"{self.root.name}.log")

    @property
    def plan(self) -> SetPlan:
        captions = self.captions or [f"about {content}" for content in self.contents]
        clips = [clip(i, content, caption) for i, (content, caption) in enumerate(zip(self.contents, captions))]
        return SetPlan(clips, ROLES, self.per_shard)

    def make(self, number: int, role: str) -> Item:
        address = self.plan.clips[number].addresses[role]
        note(self.log, f"{role} {address}")
        if number in self.broken:
            return Item(reason="the disk is dusty", lasting=False)
        if role == "text":
            return Item({"text": address.encode() * 3, "txt": b"caption"}, {"length": number % 1 + 7})
        return Item(reason="it is bad") if self.contents[number] == "bad" else Item({"latent": address.encode() * 9})

    def run(self, worker: int = 0, workers: int = 1, name: str = "out") -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            note_what_is_kept(self.log, patch)
            return build(
                self.root / name, self.plan, make=self.make, say=self.said.append, track=steps, worker=(worker, workers)
            )

    def made(self) -> Counter[str]:
        """How often what was made of which role since this was last asked."""
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return Counter(line.split()[1] for line in lines if KEPT not in line)


def steps(numbers: Iterable[int], total: int) -> Iterable[int]:
    return numbers


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed loses nothing that it wrote, so these tests need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "sets").mkdir()
    return Studio(tmp_path / "sets")


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The set of an uninterrupted worker."""
    (tmp_path / "one").mkdir()
    Studio(tmp_path / "one").run()
    return tree(tmp_path / "one" / "out")


def only_set(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()]


def test_a_set_is_read_like_any_other(studio: Studio) -> None:
    outcome = studio.run()
    assert (outcome.made, outcome.reused, outcome.unusable) == ({"text": 8, "latent": 7}, 2, 2), "b and a come twice"
    reader = ShardReader(studio.root / "out")
    assert [record.key for record in reader.records] == ["k0", "k1", "k3", "k4", "k5", "k6", "k8", "k9", "k10"]
    assert [record.shard[6:12] for record in reader.records] == [f"{int(r.key[1:]) // 3:06d}" for r in reader.records]
    for record in reader.records:
        assert reader.read(record, "latent").decode() == record.origin["addresses"]["latent"] * 9
        assert record.origin["length"] == 7
    found = read_set(studio.root / "out")
    assert found is not None
    assert [(line["key"], line["reason"]) for line in found.rejected] == [("k2", "it is bad"), ("k7", "too small")]
    assert only_set(studio.root) == ["out"]


FEW = ("a", "bad", "b")


@pytest.mark.parametrize("contents", [FEW, pytest.param(CLIPS, marks=pytest.mark.long)])
def test_a_worker_killed_at_any_operation_leaves_what_the_next_one_completes(
    tmp_path: Path, contents: tuple[str, ...]
) -> None:
    studio = prepared(tmp_path / "whole", contents)
    ended(fork(studio.run, root=studio.root, count_to=tmp_path / "count"))
    expected, made = tree(studio.root / "out"), studio.made()
    for last in range(int((tmp_path / "count").read_text())):
        other = prepared(tmp_path / f"killed-{last}", contents)
        assert not ended(fork(other.run, root=other.root, last=last))
        other.run()
        assert (tree(other.root / "out"), only_set(other.root)) == (expected, ["out"]), last
        assert (other.made() - made).total() <= 1, f"killed before operation {last}, more than one item was made twice"


def prepared(root: Path, contents: Sequence[str], *, before: Sequence[str] = ()) -> Studio:
    """Clips of which those of ``before`` are a finished set."""
    root.mkdir()
    if before:
        Studio(root, before, per_shard=2).run()
    studio = Studio(root, contents, per_shard=2)
    studio.made()
    return studio


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(("a", "bad"), ("new", "a"), marks=pytest.mark.long),
        pytest.param(CLIPS[:6], ("new", *CLIPS[1:6]), marks=pytest.mark.long),
    ],
)
def test_an_update_killed_at_any_operation_is_completed_too(
    tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    fresh = prepared(tmp_path / "fresh", after)
    fresh.run()
    counting = prepared(tmp_path / "counting", after, before=before)
    ended(fork(counting.run, root=counting.root, count_to=tmp_path / "count"))
    assert counting.made() == {"text": 1, "latent": 1}
    for last in range(int((tmp_path / "count").read_text())):
        other = prepared(tmp_path / f"killed-{last}", after, before=before)
        assert not ended(fork(other.run, root=other.root, last=last))
        assert read_set(other.root / "out") is not None or (other.root / "out.partial" / "old").exists()
        other.run()
        assert (tree(other.root / "out"), only_set(other.root)) == (tree(fresh.root / "out"), ["out"]), last
        assert other.made().total() <= 3, last


def killed_rounds(
    studio: Studio, dice: random.Random, *, kills: int, operations: int, started: Callable[[int, int], object]
) -> set[int]:
    """Rounds of 1 to 4 workers at once, of which some are killed, until ``kills`` were; the killed processes."""
    killed: set[int] = set()
    for _ in range(10 * kills):
        if len(killed) >= kills:
            break
        workers, processes = dice.randint(1, 4), list[int]()
        for worker in range(workers):
            last = dice.randrange(2 * operations // workers) if dice.random() < 0.8 else None
            processes.append(fork(partial(started, worker, workers), root=studio.root, last=last))
        killed |= {process for process in processes if not ended(process)}
        if (studio.root / "out").exists():
            break
    return killed


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 20))])
def test_twenty_kills_and_any_numbers_of_workers_make_the_same_bytes_and_nothing_twice(
    studio: Studio, expected: dict[str, bytes], seed: int
) -> None:
    dice = random.Random(seed)
    killed: set[int] = set()
    while len(killed) < 20:
        killed |= killed_rounds(studio, dice, kills=20 - len(killed), operations=60, started=studio.run)
        for worker in range(3):
            studio.run(worker, 3)
        studio.run()
        assert (tree(studio.root / "out"), only_set(studio.root)) == (expected, ["out"])
        assert begun_twice(studio.log, killed) == []
        for path in (studio.root / "out").iterdir():
            path.unlink()
        (studio.root / "out").rmdir()
        studio.log.unlink()


def test_workers_of_one_start_and_the_next_may_overlap(studio: Studio, expected: dict[str, bytes]) -> None:
    dice = random.Random(4)
    for _ in range(6):
        processes = []
        for workers in (3, 2, 4):
            for worker in range(workers):
                last = dice.randrange(150) if dice.random() < 0.5 else None
                processes.append(fork(partial(studio.run, worker, workers), root=studio.root, last=last))
        for process in processes:
            if dice.random() < 0.2:
                time.sleep(dice.random() * 0.02)
                os.kill(process, signal.SIGKILL)
            ended(process)
        studio.run()
        assert (tree(studio.root / "out"), only_set(studio.root)) == (expected, ["out"])
        for path in (studio.root / "out").iterdir():
            path.unlink()
        (studio.root / "out").rmdir()


def test_a_worker_says_what_others_have_to_do_and_the_last_completes_the_set(
    studio: Studio, expected: dict[str, bytes]
) -> None:
    outcomes = [studio.run(worker, 3) for worker in range(3)]
    assert [outcome.missing for outcome in outcomes] == [
        "4 of 4 shards wait for clips of other workers, the first for s1",
        "2 of 4 shards wait for clips of other workers, the first for s2",
        None,
    ]
    assert [outcome.made["latent"] for outcome in outcomes] == [3, 3, 1]
    assert tree(studio.root / "out") == expected


def test_objects_are_deleted_when_their_shard_is_finished(studio: Studio) -> None:
    """But for those that a later shard needs as well."""
    folder, counts = working_folder(studio.root / "out"), []

    def watched(numbers: Iterable[int], total: int) -> Iterable[int]:
        assert total == 8
        for number in numbers:
            counts.append((number, len(list(folder.rglob("objects/*/*")))))
        return ()

    build(studio.root / "out", studio.plan, make=studio.make, say=studio.said.append, track=watched)
    assert counts == [(0, 2), (1, 4), (2, 6), (3, 6), (4, 8), (6, 4), (8, 6), (10, 4)]


def written(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir())}


def test_an_unchanged_set_is_left_alone(studio: Studio) -> None:
    studio.run()
    before, _ = written(studio.root / "out"), studio.made()
    outcome = studio.run(1, 2)
    assert (outcome.unchanged, outcome.reused, outcome.unusable) == (True, 4, 1)
    assert (written(studio.root / "out"), studio.made(), only_set(studio.root)) == (before, {}, ["out"])


@pytest.mark.parametrize(
    ("contents", "captions", "made"),
    [
        (("a", "B", *CLIPS[2:]), None, {"text": 1, "latent": 1}),
        (("new", *CLIPS), None, {"text": 1, "latent": 1}),
        (CLIPS[:-1], None, {}),
        (CLIPS, ("other", *(f"about {content}" for content in CLIPS[1:])), {"text": 1}),
        (tuple(reversed(CLIPS)), None, {}),
        ((*CLIPS[:2], "good", *CLIPS[3:]), None, {"text": 1, "latent": 1}),
    ],
)
def test_only_what_changed_is_made_and_the_bytes_are_those_of_a_new_set(
    studio: Studio, contents: Sequence[str], captions: Sequence[str] | None, made: dict[str, int]
) -> None:
    studio.run()
    studio.made()
    studio.contents, studio.captions = contents, captions
    studio.run()
    assert studio.made() == made
    (studio.root / "new").mkdir()
    other = Studio(studio.root / "new", contents, captions)
    other.run()
    assert tree(other.root / "out") == tree(studio.root / "out")


def test_another_number_of_clips_per_shard_makes_nothing_again(studio: Studio) -> None:
    studio.run()
    studio.made()
    studio.per_shard = 5
    studio.run()
    assert studio.made() == {}
    assert len(list((studio.root / "out").glob("*.tar"))) == 3


def test_an_unfinished_set_of_another_plan_is_taken_over_and_leaves_nothing(studio: Studio) -> None:
    """Of 3 workers two finish, so that there are sealed shards and objects; then a clip is added in front."""
    studio.contents = ("a", "b", "small", *CLIPS[3:])
    for worker in range(2):
        assert studio.run(worker, 3).missing
    assert list(studio.root.rglob("sealed/*.jsonl")), "a shard is finished: its third clip cannot be used"
    done = studio.made()
    studio.contents = ("z", *studio.contents)
    studio.run()
    assert done + studio.made() == {"text": 8, "latent": 8}, "a, b, c, d, e, f, g and z"
    assert only_set(studio.root) == ["out"]


def objects(studio: Studio) -> list[Path]:
    return sorted(studio.root.rglob("objects/*/*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_object_is_made_again_with_one_line(studio: Studio, expected: dict[str, bytes], damage: str) -> None:
    studio.run(0, 2)
    studio.made()
    path, other = objects(studio)[:2]
    data = path.read_bytes()
    flipped = data[:100] + bytes([data[100] ^ 4]) + data[101:]
    path.write_bytes({"flip": flipped, "cut": data[:-1], "empty": b"", "other": other.read_bytes()}[damage])
    studio.run(1, 2)
    (line,) = studio.said
    assert line.startswith(f"{path} is damaged; ")
    assert line.endswith(" is made again")
    assert studio.made().total() == 5, "b and c, and what was damaged"
    assert tree(studio.root / "out") == expected


def test_damaged_results_are_made_again_with_one_line(studio: Studio, expected: dict[str, bytes]) -> None:
    """A finished shard's lines, a shard cut short, a shard that is gone and a byte in a shard that is copied from."""
    out = studio.root / "out"
    studio.contents = ("a", "b", "small", *CLIPS[3:])
    for worker in range(2):
        studio.run(worker, 3)
    seal, *_ = sorted(studio.root.rglob("sealed/*.jsonl"))
    seal.write_bytes(seal.read_bytes()[:-9])
    studio.contents = CLIPS
    studio.run()
    assert tree(out) == expected
    (out / "shard-000001.tar").write_bytes(expected["shard-000001.tar"][:9000])
    (out / "shard-000003.tar").unlink()
    studio.run()
    assert tree(out) == expected
    record = read_set(out).records[0]  # type: ignore[union-attr]
    with (out / record.shard).open("r+b") as file:
        file.seek(record.members["latent"].offset)
        file.write(b"~")
    studio.contents = ("new", *CLIPS)
    studio.run()
    assert [line.removeprefix(str(studio.root)) for line in studio.said] == [
        f"{str(seal).removeprefix(str(studio.root))} or its shard is damaged; what they held is made again",
        "/out/shard-000001.tar is missing or cut short; what it held is made again",
        "/out/shard-000003.tar is missing or cut short; what it held is made again",
        "/out/shard-000000.tar is damaged at k0; latent of s1 is made again",
    ]
    ShardReader(out)


def test_what_cannot_be_used_is_not_tried_again_unless_it_was_the_storage(studio: Studio) -> None:
    studio.broken = {0, 9}
    studio.run()
    assert studio.made() == {"text": 10, "latent": 10}, (
        "a, which is damaged, is asked for by each of its two shards again"
    )
    studio.run()
    assert studio.made() == {"text": 3, "latent": 3}
    studio.broken = set()
    studio.run()
    assert studio.made() == {"text": 1, "latent": 1}
    assert [line["key"] for line in read_set(studio.root / "out").rejected] == ["k2", "k7"]  # type: ignore[union-attr]


def test_a_set_without_a_usable_clip_is_no_set(studio: Studio) -> None:
    studio.contents = ("bad", "small")
    with pytest.raises(ValueError, match=r"no sample to write \(2 rejected; the first, s0: it is bad\); .* left as it"):
        studio.run()
    assert not (studio.root / "out").exists()
    studio.contents = CLIPS
    studio.run()
    assert only_set(studio.root) == ["out"]


def test_another_folder_is_refused_and_left_alone(studio: Studio) -> None:
    (studio.root / "home").mkdir()
    (studio.root / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"home already exists and is no set of encoded clips .*it has no index.arrow"):
        studio.run(name="home")
    facts = {"source": "v", "kind": "video", "frames": 9, "fps": 8.0, "height": 4, "width": 4, "caption_length": 3}
    write_shards(studio.root / "clips", [("a", {"mp4": b"video"}, facts)])
    with pytest.raises(ValueError, match=r"clips already exists .*sample a has no addresses in its origin"):
        studio.run(name="clips")
    assert sorted(only_set(studio.root)) == ["clips", "home"]


def test_an_object_knows_its_address_and_every_byte_of_it() -> None:
    item = Item({"a": b"1\n2", "b": b""}, {"n": 3})
    data = pack(item, "ab")
    assert unpack(data, "ab") == item
    assert unpack(data, "cd") is None
    for i in range(len(data)):
        assert unpack(data[:i], "ab") is None
        assert unpack(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], "ab") is None
