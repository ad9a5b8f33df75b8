"""Adapters of a run as a public file: diffusers computes with it what we compute, or there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.lora import FILE
from cogvideo_dist.models.dit import DiT
from launch import release_lora
from tests.launch.releases import changed, command, figures, open_model, trained
from tests.launch.world import World

LONG = pytest.mark.long
LORA = (
    "lora.rank=4", "lora.alpha=2", "lora.targets=[q, v, out, modulation]", "train.learning_rate=0.3", "train.clip_norm=null",
    "train.ema_decay=0.1",
)  # fmt: skip
BASE = {"sample_height": 4, "sample_width": 4}


def adapted(world: World, root: Path, name: str, *changes: str) -> Path:
    """A run of adapters on a base all of whose gates are open, so that every adapter has moved."""
    hf.save_transformer(open_model(name, **BASE), root / "base" / "transformer")
    return trained(
        world, root / "run", f"model.preset={name}", f"model.weights={root / 'base' / 'transformer'}", *LORA, *changes
    )


@pytest.fixture(scope="module")
def style(world: World) -> Path:
    return adapted(world, world.root / "release-style", "cogvideox-5b")


def test_adapters_give_in_the_public_library_what_they_give_here(style: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    code, said, stderr = command("lora", style, out, "--base", "THUDM/CogVideoX-5b")
    assert code == 0, stderr
    assert figures(said).keys() == {"latents", "forward"}
    assert figures(said)["forward"] <= 1e-6 and figures(said)["latents"] <= 1e-4
    assert sorted(path.name for path in out.iterdir()) == ["README.md", FILE]
    card = (out / "README.md").read_text()
    for part in (
        'pipe.load_lora_weights("lora")',
        'from_pretrained("THUDM/CogVideoX-5b"',
        "q 4/2",
        "since 0.34",
        "| Steps | 2 |",
    ):
        assert part in card, part


@pytest.mark.long
def test_adapters_of_an_image_to_video_run_are_compared_with_their_image(world: World, tmp_path: Path) -> None:
    run = adapted(world, tmp_path, "cogvideox1.5-5b-i2v")
    code, said, stderr = command("lora", run, tmp_path / "lora", "--dtype", "bf16")
    assert code == 0, stderr
    assert figures(said)["forward"] <= 1e-6 and figures(said)["latents"] <= 1e-4


def other_alpha(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    about["lora_adapter_metadata"] = about["lora_adapter_metadata"].replace('lora_alpha": 2', 'lora_alpha": 2.002')
    save_file(load_file(path), path, metadata=about)


@pytest.mark.parametrize(("change", "message"), [
    (other_alpha, "diffusers computes something else than we do: forward"),
    pytest.param(lambda path: changed(path, "to_v.lora_B"), "diffusers loads another .*to_v.lora_B.weight", marks=LONG),
    pytest.param(lambda path: changed(path, "norm2.linear.lora_A"), "loads another .*norm2.linear.lora_A", marks=LONG),
])  # fmt: skip
def test_adapters_with_a_thousandth_changed_are_refused(
    style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None], message: str,
) -> None:  # fmt: skip
    save = release_lora.save_lora

    def saved(model: DiT, folder: Path, **given: Any) -> Any:
        written = save(model, folder, **given)
        change(folder / FILE)
        return written

    monkeypatch.setattr(release_lora, "save_lora", saved)
    code, _, stderr = command("lora", style, tmp_path / "lora")
    assert code == 1 and re.search(message, stderr.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


def test_adapters_whose_base_has_changed_are_refused(style: Path, tmp_path: Path) -> None:
    weights = style.parent / "base" / "transformer" / hf.WEIGHTS
    before = weights.read_bytes()
    changed(weights, "proj_out.bias")
    code, _, stderr = command("lora", style, tmp_path / "lora")
    weights.write_bytes(before)
    assert code == 78 and "trained on other weights than" in stderr and list(tmp_path.iterdir()) == []


def test_a_run_without_adapters_has_none_to_release(world: World, tmp_path: Path) -> None:
    run = trained(world, tmp_path / "run", "train.steps=1")
    code, _, stderr = command("lora", run, tmp_path / "lora")
    assert code == 78 and "trained all weights, no adapters; release it with launch/convert.py diffusers" in stderr
