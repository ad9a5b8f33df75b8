"""Every shipped recipe trains: its own files, with a model of two layers and clips of 32 x 48 pixels, for two steps.

What makes a recipe what it is stays in force: its kind of positions, patches, image condition, adapters, beginning, sources,
scores and optimizer. A stage begins with the tiny run of the stage before it, a fine-tune with a tiny released folder.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.data.index import Index, IndexWriter
from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.lineage import read_lineage
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.lora import is_adapter
from cogvideo_dist.parallel.mesh import ParallelMesh, Place, build_mesh
from cogvideo_dist.rng import fold
from launch import encode, train_dit
from tests.config.test_shipped import RECIPES, files_of, run_of
from tests.data.clips import add, make_clip, make_image
from tests.launch.world import LENGTH, World, outcome, pack, steps_of
from tests.ranks import run_ranks

QUICK = (
    "cogvideox-2b/stage2.yaml", "cogvideox-5b/lora.yaml", "cogvideox-5b-i2v/sft.yaml", "cogvideox1.5-5b/sft.yaml",
    "cogvideox1.5-5b-i2v/lora.yaml",
)  # fmt: skip
"""One of each model, and of each kind; the others are long."""

SHAPES = ((32, 48), (48, 32), (32, 32))
SMALL = (
    "model.layers=2", "model.heads=2", "model.head_dim=16", "model.time_embed_dim=16", "model.text_dim=16",
    f"model.text_length={LENGTH}", "parallel.sp=1", "data.tokens_per_pack=250", "data.packs_per_step=2", "data.held_out=1",
    "data.workers=0", "train.steps=2", "train.warmup_steps=1", "train.precision=fp32", "checkpoint.every=2", "log.every=1",
    "log.peak_tflops=0.1", "validation.every=0", "validation.sampling.steps=2", "validation.sampling.size=[9, 32, 48]",
)  # fmt: skip
"""What is overridden in every recipe. float32: a CPU's products of 16 bits take minutes."""

LEARNED = ("model.sample_frames=2", "model.sample_height=4", "model.sample_width=6")
"""The base size of small clips, for learned positions, which serve no other."""


def small_sizes(config: DiTRun) -> list[list[int]]:
    """1, 5 or 9 frames and one of ``SHAPES``, as a size's place is among the others."""
    lengths = sorted({1, *(frames for frames, _, _ in config.data.sizes)})
    shapes = {(True, False): SHAPES[0], (False, True): SHAPES[1], (False, False): SHAPES[2]}
    small = {(4 * lengths.index(t) + 1, *shapes[h < w, h > w]) for t, h, w in config.data.sizes}
    return sorted(map(list, small))


def train(mesh: ParallelMesh, files: Sequence[Path], changes: Sequence[str]) -> None:
    """The command's body on one forked rank."""
    config = load_config(DiTRun, files, overrides=changes)
    layout = train_dit.layout_of(config, Place())
    train_dit.train(config, build_mesh(layout, rank=mesh.world.rank), device=torch.device("cpu"))


class Kitchen:
    """Runs recipes in ``root``, each once."""

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root = world, root

    def cook(self, name: str, *grid: str) -> Path:
        """The run's folder. ``grid``: a base size other than the recipe's own."""
        config = run_of(name)
        grid = LEARNED if config.model.transformer().learned_positions else grid
        folder = self.root / f"{Path(config.run.dir).name}-{len(grid)}"
        if folder.exists():
            return folder
        changes = [*SMALL, *grid, f"run.dir={folder}", f"data.sizes={small_sizes(config)}"]
        changes += self.data(config)
        if config.frozen.vae is not None:
            changes += [f"frozen.vae={self.world.root / 'vae'}", f"frozen.text={self.world.root / 'text'}"]
        if config.validation.samples_every:
            changes.append("validation.samples_every=2")
        if config.lora is not None:
            changes.append("lora.rank=2")
        if config.init is not None:
            changes.append(f"init.from={self.cook(earlier(config), *grid)}")
        if config.model.weights is not None:
            changes.append(f"model.weights={self.released(name, changes)}")
        run_ranks(train, 1, files_of(name), changes)
        return folder

    def data(self, config: DiTRun) -> list[str]:
        if config.data.source == "pixels":
            return [f"data.shards={self.world.root / 'shards'}"]
        if config.data.shards is not None:
            return [f"data.shards={self.latents('videos', config)}"]
        sources = (
            f"{{shards: {self.latents(Path(source.shards).name, config)}, weight: {source.weight}, "
            f"top_share: {source.top_share}, score: {source.score or 'null'}}}"
            for source in config.data.sources
        )
        return [f"data.sources=[{', '.join(sources)}]"]

    def latents(self, kind: str, config: DiTRun) -> Path:
        """A set of encoded ``videos`` or ``images`` with a score, at the recipe's small sizes, by the command."""
        sizes = [size for size in small_sizes(config) if (size[0] > 1) == (kind == "videos")]
        image = config.model.transformer().image_channels > 0
        out = self.root / f"latents-{kind}-{len(sizes)}-{image}"
        if not out.exists():
            shards, semantics = self.shards(kind), config.frozen.vae_semantics
            changes = [f"data.shards={shards}", f"data.sizes={sizes}", f"frozen.vae_semantics={semantics}"]
            changes += ["model.preset=cogvideox-5b-i2v"] if image else []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["encode.py", "--config", str(self.world.file), *changes, "--out", str(out)])
                code, _, stderr = outcome("encode", encode.main)
            assert code == 0, stderr
        return out

    def shards(self, kind: str) -> Path:
        clips, shards = self.root / kind, self.root / f"shards-{kind}"
        if shards.exists():
            return shards
        for i in range(6):
            media = make_clip(16, 8, size=(48, 64)) if kind == "videos" else make_image(40 + i, 61)
            add(clips, f"{kind}/{i}.{'mp4' if kind == 'videos' else 'png'}", media, f"This is number {i} of {kind}.")
        pack(clips, shards)
        writer = IndexWriter()
        for number, record in enumerate(Index.read(shards)):
            writer.add(replace(record, scores={"aesthetic": float(number)}))
        writer.write(shards)
        return shards

    def released(self, name: str, changes: Sequence[str]) -> Path:
        """A ``transformer`` folder of the recipe's small model."""
        folder = self.root / "released" / name.replace("/", "-").removesuffix(".yaml")
        model = DiT(load_config(DiTRun, files_of(name), overrides=changes).model.transformer())
        draw_parameters(model, 7)
        with torch.no_grad():
            for own, parameter in model.named_parameters():  # a fresh model's gates are zero, and so are all gradients
                parameter.add_(torch.randn(parameter.shape, generator=fold(7, "released", own)), alpha=0.1)
        hf.save_transformer(model, folder)
        return folder


def earlier(config: DiTRun) -> str:
    """The recipe whose run this one begins with."""
    assert config.init is not None
    return next(name for name in RECIPES if run_of(name).run.dir == config.init.from_)


@pytest.fixture(scope="module")
def kitchen(world: World, tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return Kitchen(world, tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in RECIPES]
)
def test_a_recipe_trains(kitchen: Kitchen, name: str) -> None:
    config, folder = run_of(name), kitchen.cook(name)
    losses = steps_of(folder, "loss", "gradient_norm")
    assert [step for step, *_ in losses] == [1, 2]
    assert all(math.isfinite(value) and value > 0 for _, *values in losses for value in values)
    checkpoint = folder / "ckpt" / "step-000002"
    stored = Stored.open(checkpoint)
    stored.verify()
    kept = stored.cuts().keys()
    assert {is_adapter(key) for key in kept} == {config.lora is not None}
    if config.init is not None:
        lineage = read_lineage(folder)
        assert lineage is not None
        assert Path(lineage.ancestors[-1].run).name.rpartition("-")[0] == Path(config.init.from_).name
    assert (folder / "samples").exists() == (config.validation.samples_every > 0)


def test_encoded_clips_keep_their_scores(kitchen: Kitchen) -> None:
    """Without them the last stage could not choose."""
    index = Index.read(kitchen.latents("videos", run_of("cogvideox-5b/stage4.yaml")))
    assert index.scores("aesthetic").tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
