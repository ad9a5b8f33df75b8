"""What tests of releases share: the command, tiny models, runs of two steps, and what a verification says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import PRESETS
from launch import convert
from tests.launch.world import LENGTH, World, outcome, train
from tests.ranks import run_ranks

SIZES = {"heads": 2, "head_dim": 16, "layers": 2, "time_embed_dim": 16, "text_dim": 16, "text_length": LENGTH,
         "sample_frames": 3, "sample_height": 8, "sample_width": 8}  # fmt: skip
FIGURES = re.compile(r"(\w+) (\d\.\de[+-]\d\d)")


def command(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``python launch/convert.py ARGUMENTS``, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert.py", *map(str, arguments)])
        return outcome("convert", convert.main)


def figures(text: str) -> dict[str, float]:
    """What a verification found, by name."""
    return {name: float(value) for name, value in FIGURES.findall(text)}


def open_model(name: str, **changes: Any) -> DiT:
    """An untrained tiny model all of whose gates are open."""
    model = DiT(replace(PRESETS[name], **(SIZES | changes)))
    draw_parameters(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def trained(world: World, run: Path, *changes: str) -> Path:
    """A run of two steps whose modulations have moved, so that averaged and last weights differ."""
    run_ranks(train, 1, world.file, world.overrides(run, "train.steps=2", "train.warmup_steps=0", *changes))
    return run


def changed(path: Path, name: str) -> None:
    """One number of a written tensor a thousandth of its largest away."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    tensor = tensors[next(key for key in tensors if name in key)]
    tensor.view(-1)[-1] += 1e-3 * tensor.abs().max()
    save_file(tensors, path, metadata=about)
