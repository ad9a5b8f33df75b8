"""Convert between our weights and the public formats: python launch/convert.py {diffusers,native} SOURCE OUT"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.vae import VAE
from launch.environment import run_command
from launch.runs import is_vae_run, open_pipeline, trained_transformer, trained_vae

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert between our weights and the public formats.",
        epilog="examples:\n"
        "  python launch/convert.py diffusers runs/demo/dit runs/demo/pipeline     # a run -> a diffusers pipeline folder\n"
        "  python launch/convert.py diffusers runs/demo/vae runs/demo/vae-export   # a run -> a diffusers vae folder\n"
        "  python launch/convert.py native CogVideoX-5b/transformer ours           # diffusers weights -> ours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    to_public = formats.add_parser(
        "diffusers", help="a run's folder -> a diffusers pipeline folder (a VAE run -> a vae folder)",
        epilog="example: python launch/convert.py diffusers runs/demo/dit runs/demo/pipeline --dtype bf16",
    )  # fmt: skip
    to_public.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights")
    to_public.add_argument(
        "--part", choices=("pipeline", "transformer"), default="pipeline", help="of a transformer's run"
    )
    to_ours = formats.add_parser(
        "native", help="a diffusers transformer or vae folder -> weights.safetensors under our names",
        epilog="example: python launch/convert.py native CogVideoX-5b/transformer ours",
    )  # fmt: skip
    for command in (to_public, to_ours):
        command.add_argument("source")
        command.add_argument("out")
        command.add_argument("--dtype", choices=DTYPES, help="of the written weights; left out, as they are")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    source, out = Path(options.source), Path(options.out)
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder")
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.format == "native":
        write_native(read_public(source), out, dtype=dtype)
    elif is_vae_run(source) if (source / "config.yaml").exists() else False:
        hf.save_vae(trained_vae(source, options.weights)[0], out, dtype=dtype)
    elif options.part == "transformer":
        config = load_config(DiTRun, [source / "config.yaml"])
        hf.save_transformer(trained_transformer(source, config, weights=options.weights)[0], out, dtype=dtype)
    else:
        write_pipeline(options, out, dtype=dtype)
    print(out)


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
