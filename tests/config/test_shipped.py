"""The configurations that come with the project are whole, of the models that they name, and honest about what they take."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import LATENT_SCALE, RELEASED, SNR_SHIFT, DiTConfig
from cogvideo_dist.models.vae import VAE
from launch.autoencoder import vae_config
from launch.beginning import check_stage
from launch.compose import LatentGeometry, TransformerGeometry
from launch.cost import cost_of, rows
from launch.train_vae import layout_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
STAGES = {"vae": ["vae/stage1.yaml", "vae/stage2.yaml"], "demo": ["demo/vae_stage1.yaml", "demo/vae_stage2.yaml"]}
USED: dict[str, type[DiTRun | VAERun]] = {
    "demo/dit.yaml": DiTRun, "demo/stage1.yaml": DiTRun, "demo/stage2.yaml": DiTRun, "demo/overfit_sft.yaml": DiTRun,
    "demo/overfit_lora.yaml": DiTRun, "demo/overfit_i2v.yaml": DiTRun, "demo/vae.yaml": VAERun,
}  # fmt: skip

OF_TEXT, OF_IMAGE = ("base", "stage1", "stage2", "stage3", "stage4", "sft", "lora"), ("base", "stage1", "sft", "lora")
RECIPES = [f"{preset}/{kind}.yaml" for preset in RELEASED for kind in (OF_IMAGE if preset.endswith("i2v") else OF_TEXT)]
PARAMETERS = {
    "cogvideox-2b": 1_693_783_872, "cogvideox-5b": 5_570_283_072, "cogvideox-5b-i2v": 5_570_479_680,
    "cogvideox1.5-5b": 5_570_676_352, "cogvideox1.5-5b-i2v": 5_571_594_880,
}  # fmt: skip
"""Of the released models, without the table of learned positions, which diffusers has as a buffer."""

CARD, USABLE = 80e9, 0.9


def header(name: str) -> list[str]:
    """The comment that a file begins with, a line each, without its mark."""
    lines = (CONFIGS / name).read_text().splitlines()
    return [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def files_of(name: str) -> list[Path]:
    """The files that the header's command names, in their order."""
    return [ROOT / word for word in header(name)[0].split(" --config ")[1].split()]


def said(name: str, key: str) -> str:
    """What the header says of ``Hardware`` and the like."""
    return next(line for line in header(name) if line.startswith(f"{key} ")).removeprefix(key).strip()


def gpus_of(name: str) -> int:
    found = re.fullmatch(r"(\d+) GPUs? of 80 GB", said(name, "Hardware"))
    assert found, name
    return int(found[1])


@cache
def run_of(name: str) -> DiTRun:
    return load_config(DiTRun, files_of(name))


@cache
def parameters_of(model: DiTConfig) -> dict[str, int]:
    with torch.device("meta"):
        return {name: p.numel() for name, p in DiT(model).named_parameters()}


def vae_run(*names: str) -> VAERun:
    return load_config(VAERun, [CONFIGS / name for name in names])


def test_every_file_is_covered_and_says_its_command() -> None:
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    assert found == {*USED, *STAGES["vae"], *STAGES["demo"], *RECIPES}
    for name in found:
        assert header(name)[0].startswith("deepspeed "), name
        assert header(name)[0].endswith(f"configs/{name}"), name


@pytest.mark.parametrize("name", USED)
def test_the_demos_files_load(name: str) -> None:
    assert load_config(USED[name], files_of(name)).run.dir.startswith("runs/")


@pytest.mark.parametrize("which", STAGES)
def test_the_second_stage_goes_on_from_the_first(which: str) -> None:
    first, second = vae_run(STAGES[which][0]), vae_run(*STAGES[which])
    assert second.model.weights == first.run.dir != second.run.dir
    assert first.loss.critic is not None and second.loss.critic is not None
    assert second.loss.critic.weights == first.run.dir
    assert second.loss.critic.channels == first.loss.critic.channels
    assert vae_config(second.model) == vae_config(first.model)
    assert max(second.data.sizes) > max(first.data.sizes)
    for config in (first, second):
        largest = max(LatentGeometry()(size).tokens for size in config.data.sizes)
        assert config.data.tokens_per_pack >= largest


def test_the_released_model_is_trained_on_any_ranks_that_divide_the_packs() -> None:
    first, second = vae_run(STAGES["vae"][0]), vae_run(*STAGES["vae"])
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(vae_config(first.model)).parameters()) == 215_583_907
    assert [layout_of(first, ranks).dp for ranks in (1, 8, 64)] == [1, 8, 64]
    assert [(layout_of(second, ranks).dp, layout_of(second, ranks).cp) for ranks in (4, 64)] == [(1, 4), (16, 4)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_of_the_released_model(name: str) -> None:
    """Built whole, without memory: its parameters, and what of the training goes with the model."""
    config, preset = run_of(name), name.split("/")[0]
    counts = dict(parameters_of(config.model.transformer()))
    if preset == "cogvideox-5b-i2v":
        assert counts.pop("embed.positions") == 17_776 * 3072
    assert sum(counts.values()) == PARAMETERS[preset]
    assert config.model.preset == preset
    assert config.diffusion.snr_shift == SNR_SHIFT[preset]
    assert config.train.precision == ("fp16" if LATENT_SCALE[preset] != 0.7 else "bf16")
    assert config.data.fps == (16 if preset.startswith("cogvideox1.5") else 8)
    assert (config.lora is not None) == name.endswith("lora.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_says_what_the_cost_model_says(name: str) -> None:
    figures = rows(cost_of(run_of(name), gpus_of(name)))
    assert said(name, "Memory") == figures["Memory"]
    assert said(name, "Step time") == f"{figures['Step time']}, at most"
    assert said(name, "Cost") == f"{figures['Cost']}, at most; these three by launch/cost.py, not measured"
    assert said(name, "Expect") and said(name, "Needs")


def test_the_table_of_recipes_says_what_their_headers_say() -> None:
    lines = [line for line in (ROOT / "docs" / "recipes.md").read_text().splitlines() if "](../configs/" in line]
    assert [line.split("](../configs/")[1].split(")")[0] for line in lines] == RECIPES
    for name, line in zip(RECIPES, lines):
        *_, source, size, gpus, memory, step, hours = (cell.strip() for cell in line.strip("|").split("|"))
        config = run_of(name)
        assert source == config.data.source, name
        assert [int(number) for number in size.split(" x ")] in [list(size) for size in config.data.sizes], name
        assert int(gpus) == gpus_of(name)
        assert f"{memory} a GPU" == said(name, "Memory")
        assert f"{step}, at most" == said(name, "Step time")
        assert said(name, "Cost").startswith(f"{hours} GPU-hours for ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_cards_with_a_tenth_to_spare(name: str) -> None:
    gpus = gpus_of(name)
    assert cost_of(run_of(name), gpus).memory.peak <= USABLE * CARD
    launcher = f"--num_gpus {gpus}" if gpus <= 8 else "--hostfile hosts"
    assert header(name)[0].startswith(f"deepspeed {launcher} launch/train_dit.py --config ")


@pytest.mark.parametrize("name", RECIPES)
def test_packs_hold_every_size_and_are_nearly_full_of_the_longest(name: str) -> None:
    config = run_of(name)
    geometry = TransformerGeometry(config.model.transformer())
    tokens = [geometry(size).tokens for size in config.data.sizes]
    budget = config.data.tokens_per_pack
    assert max(tokens) <= budget
    assert budget // max(tokens) * max(tokens) >= 0.98 * budget


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("base.yaml")])
def test_an_overlay_says_only_what_differs(name: str) -> None:
    """No key of it has the value that the files before it give."""
    *before, own = files_of(name)
    given = flat(load(own))
    earlier = {key: value for path in before for key, value in flat(load(path)).items()}
    assert before and given
    assert not [key for key, value in given.items() if key in earlier and earlier[key] == value]


def load(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


@pytest.mark.parametrize("preset", RELEASED)
def test_every_run_has_a_folder_of_its_own(preset: str) -> None:
    folders = [run_of(name).run.dir for name in RECIPES if name.startswith(f"{preset}/")]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", [name for name in RECIPES if "/stage" in name])
def test_a_stage_begins_with_one_that_is_shipped_and_fits_it(name: str) -> None:
    """All but the first of text-to-video, which begin from the seed."""
    config = run_of(name)
    if name.endswith("stage1.yaml") and not config.model.transformer().image_channels:
        assert config.init is None
        return
    assert config.init is not None
    runs = {run_of(other).run.dir: run_of(other) for other in RECIPES}
    earlier = runs[config.init.from_]
    assert earlier is not config
    check_stage(earlier.model.transformer(), config.model.transformer(), init=config.init)
    assert config.train.warmup_steps > 0


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(("sft.yaml", "lora.yaml"))])
def test_a_fine_tune_begins_with_the_released_folder(name: str) -> None:
    config = run_of(name)
    assert config.model.weights is not None and config.frozen.vae is not None
    folder = Path(config.model.weights).parent
    assert Path(config.frozen.vae).parent == folder == Path(config.frozen.text or "")
    assert folder.name.lower() == name.split("/")[0]
    assert str(folder) in " ".join(header(name))


@pytest.mark.parametrize("preset", [preset for preset in RELEASED if not preset.endswith("i2v")])
def test_stages_grow_as_the_paper_says(preset: str) -> None:
    """Sizes of its table 5, images among the clips of every stage, and the best fifth at the end."""
    stages = [run_of(f"{preset}/stage{n}.yaml") for n in (1, 2, 3, 4)]
    largest = [max(config.data.sizes, key=lambda size: (size[0], size[2])) for config in stages]
    assert [size[1:] for size in largest] == [(256, 384), (480, 720), (768, 1360), (768, 1360)]
    fps = stages[0].data.fps
    seconds = [(size[0] - 1) / fps for size in largest]
    assert seconds == ([5, 5, 10, 10] if preset.startswith("cogvideox1.5") else [6, 6, 10, 10])
    for config in stages:
        assert {size[0] == 1 for size in config.data.sizes} == {True, False}
        assert len({size[0] for size in config.data.sizes}) == 3
        assert len({size[2] / size[1] for size in config.data.sizes}) == 3
    assert [config.train.steps for config in stages] == [400_000, 220_000, 120_000, 10_000]
    clips = [config.data.packs_per_step * round(config.data.tokens_per_pack / tokens_of(config)) for config in stages]
    assert all(0.9 <= found / wanted <= 1.1 for found, wanted in zip(clips, (2000, 1000, 250, 100))), clips
    assert [{(source.score, source.top_share) for source in config.data.sources} for config in stages] == [
        {(None, 1.0)}, {(None, 1.0)}, {(None, 1.0)}, {("aesthetic", 0.2)},
    ]  # fmt: skip


def tokens_of(config: DiTRun) -> int:
    """Of the stage's longest clip."""
    return max(TransformerGeometry(config.model.transformer())(size).tokens for size in config.data.sizes)
