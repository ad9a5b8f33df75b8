"""Checkpoints of SAT in launch/convert.py: ``sat`` writes one, and every format can be made of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import native
from cogvideo_dist.convert.sat_dit import load_dit, save_dit
from cogvideo_dist.convert.sat_folder import is_checkpoint
from cogvideo_dist.engine.lineage import Lineage
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import PRESETS, RELEASED
from launch.autoencoder import fill
from launch.beginning import add_adapters, base_model, chosen, newest_checkpoint, trained_transformer

if TYPE_CHECKING:
    Formats = argparse._SubParsersAction[argparse.ArgumentParser]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_commands(formats: Formats) -> None:
    """``sat`` with its options."""
    command = formats.add_parser(
        "sat", help="a transformer -> a folder of SAT: latest, ITERATION/mp_rank_XX_model_states.pt",
        epilog="examples: python launch/convert.py sat runs/demo/dit for-sat/transformer --dtype bf16; a folder of SAT for 2 "
        "ranks instead of 1: python launch/convert.py sat CogVideoX-5b-sat/transformer tp2 --tp 2",
    )  # fmt: skip
    command.add_argument("source", help="a run, a transformer's folder of diffusers or of native, or a folder of SAT")
    command.add_argument("out")
    command.add_argument("--tp", type=int, default=1, metavar="N", help="model-parallel ranks (%(default)s)")
    command.add_argument("--dtype", choices=DTYPES, help="of the written weights; left out, as they are")
    command.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged or last weights")
    command.add_argument(
        "--lora", action="store_true",
        help="write adapters as SAT's LoraMixin has them, of a run with adapters or a folder of SAT; else they are merged",
    )  # fmt: skip
    command.add_argument("--iteration", type=int, metavar="N", help="left out, a run's step; else 1")
    command.add_argument("--prefix", help="of the transformer's names in a folder of SAT that holds several")
    add_source_options(command)


def add_source_options(command: argparse.ArgumentParser) -> None:
    """What a folder of SAT does not say, for every command that reads one (beside ``--prefix``)."""
    command.add_argument(
        "--preset", choices=PRESETS, metavar="NAME",
        help="which model a folder of SAT is of, if its shapes do not tell: " + ", ".join(RELEASED),
    )  # fmt: skip
    command.add_argument(
        "--lora-alpha", type=float, default=1.0, metavar="X",
        help="lora_alpha that SAT's adapters were trained with, which its checkpoints do not say (%(default)s, SAT's default)",
    )  # fmt: skip
    command.add_argument(
        "--average-replicas", action="store_true",
        help="of copies that differ between model-parallel ranks, as they drift in SAT's training, take the mean",
    )  # fmt: skip


def is_sat(path: Path) -> bool:
    """Whether a folder is a checkpoint of SAT, or of DeepSpeed in its layout. A file never is: it stands for its VAE."""
    return is_checkpoint(path)


def read_sat_transformer(
    path: Path, *, preset: str | None, prefix: str | None, alpha: float = 1.0, average: bool = False, keep: bool = False
) -> DiT:
    """The transformer of a folder of SAT; says what it left out. ``keep``: its adapters, which are else merged."""
    config = PRESETS[preset] if preset else None
    found = load_dit(
        path, config=config, prefix=prefix, adapters="keep" if keep else "merge", alpha=alpha, average=average
    )
    for note in found.notes:
        print(note)
    if found.prefix:
        print(f"the transformer is what lies under {found.prefix}*")
    if found.left_out:
        shown = ", ".join(f"{name} ({count})" for name, count in found.left_out.items())
        print(f"left out, with numbers of tensors, as no weights of the transformer: {shown}")
    return found.model


def run(options: argparse.Namespace) -> None:
    """The command ``sat``."""
    source, out = Path(options.source), Path(options.out)
    model, step = _read(source, options)
    if options.lora and not any(".lora." in name for name, _ in model.named_parameters()):
        raise ConfigError(f"{source} has no adapters; leave --lora out")
    dtype = DTYPES[options.dtype] if options.dtype else None
    iteration = step or 1 if options.iteration is None else options.iteration
    print(save_dit(model, out, tp=options.tp, dtype=dtype, iteration=iteration))


def _read(source: Path, options: argparse.Namespace) -> tuple[DiT, int]:
    """The transformer and, of a run, its step."""
    if (source / "config.yaml").exists() and not is_sat(source):
        return _read_run(source, options)
    if is_sat(source):
        model = read_sat_transformer(
            source, preset=options.preset, prefix=options.prefix, alpha=options.lora_alpha,
            average=options.average_replicas, keep=options.lora,
        )  # fmt: skip
        return model, 0
    if (source / native.FIELDS).exists():
        found = native.load(source)
        if not isinstance(found, DiT):
            raise ConfigError(f"{source} is an autoencoder; sat-vae writes those")
        return found, 0
    folder = source / "transformer" if (source / "model_index.json").exists() else source
    return hf.load_transformer(folder), 0


def _read_run(source: Path, options: argparse.Namespace) -> tuple[DiT, int]:
    config = load_config(DiTRun, [source / "config.yaml"])
    if not options.lora:
        return trained_transformer(source, config, weights=options.weights)
    if config.lora is None:
        raise ConfigError(f"{source} trained all weights, no adapters; leave --lora out")
    trained_transformer(source, config, weights=options.weights)  # refuses adapters whose base has changed
    model, _ = base_model(config, chosen(config, config.init) if config.init else Lineage())
    add_adapters(model, config)
    return model, fill(model, newest_checkpoint(source), weights=options.weights)
