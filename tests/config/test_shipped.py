"""The configurations that come with the project are whole, and of the models that they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.models.vae import VAE
from launch.autoencoder import vae_config
from launch.compose import LatentGeometry
from launch.train_vae import layout_of

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = {"vae": ["vae/stage1.yaml", "vae/stage2.yaml"], "demo": ["demo/vae_stage1.yaml", "demo/vae_stage2.yaml"]}
USED = {"demo/dit.yaml": DiTRun, "demo/vae.yaml": VAERun}


def vae_run(*names: str) -> VAERun:
    return load_config(VAERun, [CONFIGS / name for name in names])


def test_every_file_is_covered_and_says_its_command() -> None:
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    assert found == {*USED, *STAGES["vae"], *STAGES["demo"]}
    for name in found:
        first = (CONFIGS / name).read_text().splitlines()[0]
        assert first.startswith("# deepspeed ") and first.endswith(f"configs/{name}"), name


@pytest.mark.parametrize("name", USED)
def test_the_demos_files_load(name: str) -> None:
    assert load_config(USED[name], [CONFIGS / name]).run.dir.startswith("runs/")


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
