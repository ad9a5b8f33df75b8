"""Convert between our weights and the public formats: python launch/convert.py {diffusers,native,sat-vae} SOURCE OUT"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import sat
from cogvideo_dist.convert.vae_config import config_from_diffusers
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.vae import VAE, VAEConfig
from launch.autoencoder import is_vae_run, trained_vae
from launch.environment import run_command
from launch.runs import Weights, open_pipeline, trained_transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert between our weights and the public formats.",
        epilog="examples:\n"
        "  python launch/convert.py diffusers runs/demo/dit runs/demo/pipeline     # a run -> a diffusers pipeline folder\n"
        "  python launch/convert.py diffusers runs/demo/vae runs/demo/vae-export   # a run -> a diffusers vae folder\n"
        "  python launch/convert.py native CogVideoX-5b/transformer ours           # diffusers weights -> ours\n"
        "  python launch/convert.py sat-vae runs/demo/vae runs/demo/3d-vae.pt      # a run -> the VAE's file of SAT\n"
        "  python launch/convert.py diffusers 3d-vae.pt my-vae --scaling-factor 0.7 # the VAE's file of SAT -> diffusers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    to_public = formats.add_parser(
        "diffusers", help="a run's folder -> a diffusers pipeline folder (a VAE run or a 3d-vae.pt of SAT -> a vae folder)",
        epilog="example: python launch/convert.py diffusers runs/demo/dit runs/demo/pipeline --dtype bf16",
    )  # fmt: skip
    to_public.add_argument(
        "--part", choices=("pipeline", "transformer"), default="pipeline", help="of a transformer's run"
    )
    to_ours = formats.add_parser(
        "native", help="a diffusers transformer or vae folder, or a 3d-vae.pt of SAT -> weights.safetensors, our names",
        epilog="example: python launch/convert.py native CogVideoX-5b/transformer ours",
    )  # fmt: skip
    to_sat = formats.add_parser(
        "sat-vae", help="a VAE run's folder or a diffusers vae folder -> a file as SAT's 3d-vae.pt",
        epilog="example: python launch/convert.py sat-vae runs/demo/vae runs/demo/3d-vae.pt",
    )  # fmt: skip
    for command in (to_public, to_sat):
        command.add_argument(
            "--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged or last weights"
        )
    for command in (to_public, to_ours):
        shape = command.add_mutually_exclusive_group()
        shape.add_argument(
            "--scaling-factor", type=float, metavar="X",
            help="of a released 3d-vae.pt, which does not say it: 1.15258426 for the 2B, 0.7 for all others",
        )  # fmt: skip
        shape.add_argument(
            "--vae-config", metavar="FILE", help="a diffusers config.json of a 3d-vae.pt of another shape"
        )
    for command in (to_public, to_ours, to_sat):
        command.add_argument("source")
        command.add_argument("out")
        command.add_argument("--dtype", choices=DTYPES, help="of the written weights; left out, as they are")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    source, out = Path(options.source), Path(options.out)
    dtype = DTYPES[options.dtype] if options.dtype else None
    if source.is_file() and options.format != "sat-vae":
        vae = read_sat(source, options)
        if options.format == "native":
            write_native(vae, out, dtype=dtype)
        else:
            hf.save_vae(vae, out, dtype=dtype)
    elif not source.is_dir():
        raise ConfigError(f"{source}: no such folder")
    elif options.format == "sat-vae":
        sat.save_vae(read_vae(source, options.weights), out, dtype=dtype)
    elif options.scaling_factor is not None or options.vae_config:
        raise ConfigError(f"{source} has a configuration; --scaling-factor and --vae-config are for a 3d-vae.pt alone")
    elif options.format == "native":
        write_native(read_public(source), out, dtype=dtype)
    elif is_vae_run(source) if (source / "config.yaml").exists() else False:
        hf.save_vae(trained_vae(source, options.weights)[0], out, dtype=dtype)
    elif options.part == "transformer":
        config = load_config(DiTRun, [source / "config.yaml"])
        hf.save_transformer(trained_transformer(source, config, weights=options.weights)[0], out, dtype=dtype)
    else:
        write_pipeline(options, out, dtype=dtype)
    print(out)


def read_sat(source: Path, options: argparse.Namespace) -> VAE:
    if options.vae_config:
        config = config_from_diffusers(hf.read_json(Path(options.vae_config)))
    elif options.scaling_factor is not None:
        config = VAEConfig(scaling_factor=options.scaling_factor)
    else:
        raise ConfigError(f"{source} holds tensors alone; give --scaling-factor of its release, or --vae-config")
    vae, left_out = sat.load_vae(source, config)
    for name, count in left_out.items():
        print(f"{count} tensors of {name}.* left out, which are no part of the autoencoder")
    return vae


def read_vae(source: Path, weights: Weights) -> VAE:
    """Of a VAE run or of a diffusers vae folder."""
    if (source / "config.yaml").exists():
        if not is_vae_run(source):
            raise ConfigError(f"{source} is the run of a transformer; expected one of launch/train_vae.py")
        return trained_vae(source, weights)[0]
    return hf.load_vae(source)


def write_pipeline(options: argparse.Namespace, out: Path, *, dtype: torch.dtype | None) -> None:
    pipeline = open_pipeline(options.source, options.weights, device=torch.device("cpu"))
    config = load_config(DiTRun, [Path(options.source) / "config.yaml"])
    hf.save_pipeline(
        out, transformer=pipeline.sampler.model, vae=pipeline.sampler.vae, schedule=pipeline.sampler.schedule.config,
        sampler=config.validation.sampling.sampler, text=pipeline.text_folder, dtype=dtype,
    )  # fmt: skip


def read_public(source: Path) -> DiT | VAE:
    name = hf.read_json(source / "config.json").get("_class_name")
    if name == "CogVideoXTransformer3DModel":
        return hf.load_transformer(source)
    if name == "AutoencoderKLCogVideoX":
        return hf.load_vae(source)
    raise ConfigError(f"{source / 'config.json'} describes a {name}; expected a CogVideoX transformer or autoencoder")


def write_native(model: DiT | VAE, out: Path, *, dtype: torch.dtype | None) -> None:
    """``weights.safetensors`` under our names and ``model.json`` with our configuration."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    save_file(state, out / "weights.safetensors")
    hf.write_json(out / "model.json", {"class": type(model).__name__, **asdict(model.config)})


if __name__ == "__main__":
    run_command("convert", main)
