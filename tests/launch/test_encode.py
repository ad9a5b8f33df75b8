"""launch/encode.py: any number of workers, killed anywhere, make one set; a set is brought up to date and not made anew."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import Index, IndexWriter
from cogvideo_dist.data.loader import to_sample
from cogvideo_dist.data.pool import Reads, Task
from cogvideo_dist.data.reading import Cut
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.data.workshop import share
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.vae import VAE, Posterior, Semantics, Tiling, VAEConfig
from cogvideo_dist.protocols import Slot
from cogvideo_dist.tasks.pixels import to_video
from launch import encode
from launch.compose import check_latents
from launch.environment import read_worker, run_command
from tests.data.clips import add, make_clip, make_image
from tests.killing import begun_twice, ended, fork, note, note_what_is_kept, tree
from tests.launch.commands import finish, start
from tests.launch.world import CLIPS, World, outcome, pack, save_tiny_vae


@pytest.fixture
def world(world: World, tmp_path: Path) -> World:
    """The world's models with clips and shards of the test's own."""
    root = tmp_path / "world"
    root.mkdir()
    shutil.copytree(world.root / "clips", root / "clips")
    pack(root / "clips", root / "shards")
    return World(root, world.file)


def arguments(world: World, out: Path, *more: str) -> list[str]:
    changes = world.overrides(out, f"data.shards={world.root / 'shards'}", *(item for item in more if "=" in item))
    options = [item for item in more if "=" not in item]
    return ["--config", str(world.file), *changes, "--out", str(out), "--clips-per-shard", "3", *options]


def run(world: World, out: Path, *more: str) -> tuple[int, str, str]:
    """(exit code, stdout, last line of stderr) of the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["encode.py", *arguments(world, out, *more)])
        return outcome("encode", encode.main)


def done(world: World, out: Path, *more: str) -> list[str]:
    """The lines of a command that ends well, without its seconds."""
    code, stdout, stderr = run(world, out, *more)
    assert code == 0, stderr
    return [line.rsplit(", ", 1)[0] if line.startswith("worker ") else line for line in stdout.splitlines()]


def worker(world: World, place: Path, *more: str) -> None:
    """The command, with a line in ``place``/log for everything that it begins to encode and everything that it keeps."""
    with pytest.MonkeyPatch.context() as patch, Path(os.devnull).open("w") as null:
        note_encoding(place / "log", patch)
        note_what_is_kept(place / "log", patch)
        patch.setattr(sys, "argv", ["encode.py", *arguments(world, place / "sets" / "out", *more)])
        with redirect_stdout(null), redirect_stderr(null):
            run_command("encode", encode.main)


def note_encoding(log: Path, patch: pytest.MonkeyPatch) -> None:
    encode_clip, encode_text = encode.encode_pixels, encode.TextEncoder.encode

    def clip(vae: VAE, pixels: torch.Tensor, **options: Any) -> Posterior:
        note(log, f"clip {hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}")
        return encode_clip(vae, pixels, **options)

    def text(self: encode.TextEncoder, captions: list[str]) -> torch.Tensor:
        note(log, f"caption {captions}")
        return encode_text(self, captions)

    patch.setattr(encode, "encode_pixels", clip)
    patch.setattr(encode.TextEncoder, "encode", text)


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.long)])
def test_killed_workers_and_others_after_them_make_the_same_bytes_and_nothing_twice(
    world: World, tmp_path: Path, kills: int
) -> None:
    assert done(world, tmp_path / "whole")[0].startswith("8 samples encoded")
    dice, killed, expected = random.Random(kills), set[int](), tree(tmp_path / "whole")
    while len(killed) < kills:
        place, mine = tmp_path / f"after-{len(killed)}-kills", set[int]()
        shutil.rmtree(place, ignore_errors=True)
        (place / "sets").mkdir(parents=True)
        while len(killed) < kills and not (place / "sets" / "out").exists():
            mine |= killed_workers(world, place, dice)
            killed |= mine
        assert ended(fork(partial(worker, world, place), root=place))
        assert (tree(place / "sets" / "out"), [p.name for p in (place / "sets").iterdir()]) == (expected, ["out"])
        assert begun_twice(place / "log", mine) == []


def killed_workers(world: World, place: Path, dice: random.Random) -> set[int]:
    """One to four workers at once; most are killed at a counted operation or, some, by the clock."""
    workers, processes = dice.randint(1, 4), list[int]()
    for number in range(workers):
        task = ("--task", str(number), "--tasks", str(workers))
        last = dice.randrange(100 // workers) if dice.random() < 0.6 else None
        processes.append(fork(partial(worker, world, place, *task), root=place / "sets", last=last))
    for process in processes:
        if dice.random() < 0.2:
            time.sleep(dice.random() * 0.2)
            os.kill(process, signal.SIGKILL)
    return {process for process in processes if not ended(process)}


@pytest.fixture
def made(world: World, tmp_path: Path) -> Path:
    """A finished set."""
    lines = done(world, tmp_path / "out")
    assert lines == [
        f"8 samples encoded into {tmp_path / 'out'}, 0 could not be used",
        "worker 0 of 1: encoded 7 clips and 8 captions, reused 0, unusable 0",
    ], "two of the clips are the same"
    return tmp_path / "out"


def change(world: World, name: str, content: bytes, caption: str) -> None:
    """Put a clip among the world's, and make its shards anew."""
    add(world.root / "clips", name, content, caption)
    shutil.rmtree(world.root / "shards")
    pack(world.root / "clips", world.root / "shards")


@pytest.mark.parametrize(
    ("name", "content", "caption", "said", "did"),
    [
        ("videos/1.mp4", make_clip(15, 8, size=(48, 64)), "This is videos/1.mp4, a clip of its own.",
         "clips: 1 (changed)", "encoded 1 clips and 0 captions, reused 7"),
        ("images/a.png", make_image(), "A new one, before all others.",
         "clips: 1 (new); captions: 1 (new)", "encoded 1 clips and 1 captions, reused 8"),
        ("videos/1.mp4", CLIPS["videos/1.mp4"], "Another caption.",
         "captions: 1 (changed)", "encoded 0 clips and 1 captions, reused 7"),
    ],
)  # fmt: skip
def test_only_what_changed_is_encoded_and_the_bytes_are_those_of_a_new_set(
    world: World, made: Path, name: str, content: bytes, caption: str, said: str, did: str
) -> None:  # fmt: skip
    change(world, name, content, caption)
    samples = 9 if "new" in said else 8
    assert done(world, made) == [
        f"{made} is brought up to date; {said}",
        f"{samples} samples encoded into {made}, 0 could not be used",
        f"worker 0 of 1: {did}, unusable 0",
    ]
    done(world, made.with_name("new"))
    assert tree(made) == tree(made.with_name("new"))


def test_an_unchanged_set_is_said_to_be_and_not_written(world: World, made: Path) -> None:
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (made, *made.iterdir())}
    assert done(world, made, "--task", "1", "--tasks", "2") == [
        f"{made} is up to date, nothing to encode",
        "worker 1 of 2: encoded 0 clips and 0 captions, reused 4, unusable 0",
    ]
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (made, *made.iterdir())} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("frozen.vae_semantics=chunked",), "clips: 8 (semantics was whole, now chunked)"),
        (("frozen.vae_tiling=true",), "clips: 8 (tiling was none, now 30x45 overlapping 5x9)"),
        (("data.fps=7",), "clips: 6 (fps was 8.0, now 7.0)"),
        (("data.sizes=[[9, 16, 16], [1, 16, 16]]",), "clips: 6 (size was [9, 32, 32], now [9, 16, 16]), 2 ("),
        (("frozen.vae=OTHER",), "clips: 8 (vae was "),
    ],
)
def test_another_way_of_encoding_encodes_all_again_and_says_why(
    world: World, made: Path, tmp_path: Path, changes: tuple[str, ...], said: str
) -> None:
    save_tiny_vae(tmp_path / "vae", seed=1)
    lines = done(world, made, *(item.replace("OTHER", str(tmp_path / "vae")) for item in changes))
    assert lines[0].startswith(f"{made} is brought up to date; {said}")
    pictures = 2 * ("fps" in changes[0])  # which know nothing of it
    assert lines[-1] == f"worker 0 of 1: encoded {7 - pictures} clips and 0 captions, reused {1 + pictures}, unusable 0"


def test_a_damaged_object_is_encoded_again_and_told(world: World, made: Path) -> None:
    other = made.with_name("other")
    lines = done(world, other, "--task", "0", "--tasks", "2")
    assert lines[0] == (
        f"{other} is not complete: 3 of 3 shards wait for clips of other workers, the first for images/still 1.png; the last "
        "worker completes it, and the same command goes on where a stopped one ended"
    )
    path = max(other.with_name("other.partial").glob("objects/*/*"))
    path.write_bytes(path.read_bytes()[:-1])
    code, stdout, stderr = run(world, other, "--task", "1", "--tasks", "2")
    assert code == 0
    assert f"encode: {path} is damaged; " in stderr
    assert stdout.splitlines()[0] == f"8 samples encoded into {other}, 0 could not be used"
    assert tree(other) == tree(made)


def test_clips_that_cannot_be_used_are_listed_once_with_the_same_bytes(world: World, tmp_path: Path) -> None:
    """Too small for every size; with fewer frames than the index promises; a byte that flipped on the disk."""
    add(world.root / "clips", "videos/small.mp4", make_clip(12, 8, size=(16, 16)), "Too small.")
    change(world, "videos/short.mp4", make_clip(3, 8, size=(48, 64)), "Most of it is missing.")
    records, writer = list(Index.read(world.root / "shards")), IndexWriter()
    for record in records:
        writer.add(replace(record, frames=12) if record.source == "videos/short.mp4" else record)
    writer.write(world.root / "shards")
    one = next(record for record in records if record.source == "videos/1.mp4")
    flip(world, one.members["mp4"].offset + 50)
    said = list[str]()
    for out, tasks in ((tmp_path / "a", 1), (tmp_path / "b", 3)):
        for task in range(tasks):
            said = done(world, out, "--task", str(task), "--tasks", str(tasks))
        assert said[0] == f"7 samples encoded into {out}, 3 could not be used"
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    rejected = [json.loads(line) for line in (tmp_path / "a" / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["source"]: line["reason"] for line in rejected}
    assert len(rejected) == 3
    assert reasons["videos/short.mp4"] == "lasts 0.375 s, too short for 9 frames at 8 per second"
    assert reasons["videos/small.mp4"].startswith("too small: 16 x 16 would have to be enlarged")
    assert reasons["videos/1.mp4"].endswith("are damaged (their checksum is not the index's)")
    assert done(world, tmp_path / "a") == [
        f"{tmp_path / 'a'} is up to date, nothing to encode",
        "worker 0 of 1: encoded 0 clips and 0 captions, reused 7, unusable 3",
    ]
    flip(world, one.members["mp4"].offset + 50)
    assert done(world, tmp_path / "a") == [
        f"{tmp_path / 'a'} is brought up to date; clips: 1 (new); captions: 1 (new)",
        f"8 samples encoded into {tmp_path / 'a'}, 2 could not be used",
        "worker 0 of 1: encoded 1 clips and 1 captions, reused 7, unusable 2",
    ], "the storage was at fault, so it is tried again"


def flip(world: World, place: int) -> None:
    """Flip a bit of the first shard; or flip it back."""
    path = world.root / "shards" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_a_folder_that_is_something_else_is_refused(world: World) -> None:
    before = tree(world.root / "shards")
    code, _, stderr = run(world, world.root / "shards")
    assert code == 1
    assert stderr.splitlines()[-1] == (
        f"encode: error: {world.root / 'shards'} already exists and is no set of encoded clips that could be brought up to "
        "date (sample 00000000 has no addresses in its origin); choose another folder"
    )
    assert tree(world.root / "shards") == before


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_of_a_launcher_are_workers(world: World, made: Path, launcher: str) -> None:
    out = made.with_name("ranks")
    code, stdout, stderr = finish(start(launcher, arguments(world, out)[1:], script=[encode.__file__]))
    assert code == 0, stderr
    assert tree(out) == tree(made)
    assert sum("of 2: encoded " in line for line in stdout.splitlines()) == 2


def environment(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def array(number: int, numbers: range) -> dict[str, int]:
    """What Slurm says to a task of ``--array=START-STOP:STEP``."""
    return {
        "SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_COUNT": len(numbers), "SLURM_ARRAY_TASK_MIN": numbers[0],
        "SLURM_ARRAY_TASK_STEP": numbers.step, "SLURM_ARRAY_TASK_MAX": numbers[-1],
    }  # fmt: skip


@pytest.mark.parametrize("numbers", [range(4), range(1, 5), range(3, 16, 4), range(7, 8)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_tasks_of_an_array_and_their_ranks_do_every_clip_once(
    monkeypatch: pytest.MonkeyPatch, numbers: range, ranks: int
) -> None:
    clips: list[int] = []
    for number in numbers:
        for rank in range(ranks):
            launched = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "here", "MASTER_PORT": 1}
            environment(monkeypatch, **array(number, numbers), **(launched if ranks > 1 else {}))
            found = read_worker(None, None)
            assert found.workers == len(numbers) * ranks
            clips += share(range(100, 150), found.number, workers=found.workers)
    assert sorted(clips) == list(range(100, 150))


@pytest.mark.parametrize(
    ("given", "variables", "message"),
    [
        ((1, None), {}, "--task and --tasks belong together"),
        ((4, 4), {}, "--task 4 is not in 0 to 3, as --tasks 4 means"),
        ((0, 4), array(2, range(4)), "--task 0 --tasks 4 contradicts the Slurm array, in which this is task 2 of 4"),
        ((2, 4), array(2, range(1, 5)), "contradicts the Slurm array, in which this is task 1 of 4 (counted from 0)"),
        (
            (None, None),
            {"SLURM_ARRAY_TASK_ID": 3},
            "SLURM_ARRAY_TASK_ID but not SLURM_ARRAY_TASK_COUNT, SLURM_ARRAY_TASK_MIN",
        ),
        ((None, None), {**array(3, range(8)), "SLURM_ARRAY_TASK_COUNT": 3}, "the numbers must be evenly spaced"),
        (
            (None, None),
            {**array(3, range(8)), "SLURM_ARRAY_TASK_ID": 9},
            "task 9 of a Slurm array of 8 tasks from 0 to 7",
        ),
        ((None, None), {**array(3, range(8)), "SLURM_ARRAY_TASK_MIN": "x"}, "SLURM_ARRAY_TASK_MIN must be an integer"),
        ((None, None), {"RANK": 0}, "the environment sets RANK but not WORLD_SIZE"),
        ((None, None), {"SLURM_STEP_NUM_TASKS": 4}, "srun started 4 processes that would all do the same"),
    ],
)
def test_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: tuple[int | None, int | None], variables: dict[str, object], message: str
) -> None:
    environment(monkeypatch, **variables)
    with pytest.raises(ConfigError) as caught:
        read_worker(*given)
    assert message in str(caught.value)


def test_a_task_may_be_given_and_announced_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **array(5, range(1, 9, 2)))
    assert read_worker(2, 4) == read_worker(None, None) == (2, 4)
    environment(monkeypatch)
    assert (read_worker(2, 4), read_worker(None, None)) == ((2, 4), (0, 1))


@pytest.mark.parametrize("semantics", ["whole", "chunked"])
@pytest.mark.parametrize("tiling", [False, True])
def test_semantics_and_tiling_are_those_of_the_configuration_and_checked_by_runs(
    world: World, tmp_path: Path, semantics: Semantics, tiling: bool
) -> None:
    """Tiles of 2 x 2 latents, for frames of 4 x 4; two chunks."""
    vae = VAE(
        VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2, sample_height=32, sample_width=32)
    )
    draw_parameters(vae, 3)
    hf.save_vae(vae, tmp_path / "vae")
    use = (f"frozen.vae={tmp_path / 'vae'}", f"frozen.vae_semantics={semantics}", f"frozen.vae_tiling={tiling}")
    done(world, tmp_path / "out", "data.sizes=[[13, 32, 32]]", *use)
    reader, clips = ShardReader(tmp_path / "out"), ShardReader(world.root / "shards")
    for record in reader.records:
        source = next(clip for clip in clips.records if clip.source == record.source)
        reads = Reads([clips.store])
        loaded = reads.result(reads.submit(Task(0, source, Cut((13, 32, 32), 8.0))))
        sample = to_sample(loaded, source, slot=Slot(0, 0, (13, 32, 32)))
        with torch.no_grad():
            expected = vae.encode(
                to_video([sample], torch.zeros(())), semantics, tiling=Tiling((2, 2)) if tiling else None
            )
        found = load(reader.read(record, "latent.safetensors"))
        assert torch.equal(found["mean"], expected.mean[0])
        assert torch.equal(found["logvar"], expected.logvar[0])
    changes = (f"data.shards={tmp_path / 'out'}", "data.source=latents", *use)
    config = world.config(tmp_path / "run", *changes)
    assert check_latents(config, Catalog([reader.records]), vae=vae) == 0.7
    assert check_latents(world.config(tmp_path / "run", *changes[:2]), Catalog([reader.records]), vae=None) == 0.7
    other = {True: "2x2 overlapping 0x0", False: "none"}
    with pytest.raises(
        ConfigError, match=f"made with tiling {other[tiling]}, but frozen.vae_tiling has {other[not tiling]}"
    ):
        check_latents(
            world.config(tmp_path / "run", *changes, f"frozen.vae_tiling={not tiling}"),
            Catalog([reader.records]),
            vae=vae,
        )
    wrong = "chunked" if semantics == "whole" else "whole"
    with pytest.raises(
        ConfigError, match=f"semantics {semantics}, but frozen.vae_semantics has {wrong}; .* or change "
    ):
        check_latents(
            world.config(tmp_path / "run", *changes, f"frozen.vae_semantics={wrong}"),
            Catalog([reader.records]),
            vae=vae,
        )
