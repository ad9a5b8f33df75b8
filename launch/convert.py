"""Convert between our weights and the public formats: python launch/convert.py {diffusers,native,sat-vae} SOURCE OUT

``sat-config`` translates SAT's configuration files instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import native, sat
from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.convert.vae_config import config_from_diffusers
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.rng import fold
from launch.autoencoder import is_vae_run, trained_vae
from launch.beginning import trained_transformer
from launch.environment import run_command
from launch.runs import open_pipeline
from launch.sat_config import add_options, translate_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TOLERANCE = 1e-9
"""Of ``verify``, as a share of the largest value, in float64."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert between our weights and the public formats.",
        epilog="examples:\n"
        "  python launch/convert.py diffusers runs/demo/dit runs/demo/pipeline     # a run -> a diffusers pipeline folder\n"
        "  python launch/convert.py diffusers runs/demo/vae my-vae --verify        # a run -> a diffusers vae folder\n"
        "  python launch/convert.py sat-vae runs/demo/vae my-vae/3d-vae.pt         # a run -> the VAE's file of SAT\n"
        "  python launch/convert.py sat-vae CogVideoX-5b/vae 3d-vae.pt             # diffusers -> the VAE's file of SAT\n"
        "  python launch/convert.py diffusers 3d-vae.pt my-vae --scaling-factor 0.7 # the VAE's file of SAT -> diffusers\n"
        "  python launch/convert.py native mp_rank_00_model_states.pt ours --scaling-factor 0.7 # its VAE -> ours\n"
        "  python launch/convert.py sat-config cogvideox_5b.yaml sft.yaml --out my.yaml # SAT's configuration -> ours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    to_public = formats.add_parser(
        "diffusers", help="a run -> a diffusers pipeline folder; one of a VAE, or a file of SAT -> a vae folder",
        epilog="example: python launch/convert.py diffusers runs/demo/dit runs/demo/pipeline --dtype bf16",
    )  # fmt: skip
    to_public.add_argument(
        "--part", choices=("pipeline", "transformer"), default="pipeline", help="of a transformer's run"
    )
    to_public.add_argument(
        "--verify", action="store_true",
        help="of a VAE: load the folder with diffusers' own class and compare latents and pixels of a small clip with ours",
    )  # fmt: skip
    to_ours = formats.add_parser(
        "native", help="anything -> a folder with weights.safetensors, our names, and model.json",
        epilog="example: python launch/convert.py native CogVideoX-5b/transformer ours",
    )  # fmt: skip
    to_sat = formats.add_parser(
        "sat-vae", help="a VAE -> a file as SAT's 3d-vae.pt",
        epilog="example: python launch/convert.py sat-vae runs/demo/vae runs/demo/3d-vae.pt",
    )  # fmt: skip
    for command in (to_public, to_ours, to_sat):
        add_source(command)
    add_options(
        formats.add_parser(
            "sat-config", help="SAT's configuration files -> one of ours, with a list of what became of each key",
            epilog="example: python launch/convert.py sat-config cogvideox_5b_lora.yaml sft.yaml --out my-lora.yaml",
        )
    )  # fmt: skip
    return parser.parse_args()


def add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", help="a run, a folder of diffusers or of native, or a file of SAT with a VAE (3d-vae.pt, or a fine-tuned "
        "model's mp_rank_00_model_states.pt), of which no code is run",
    )  # fmt: skip
    command.add_argument("out")
    command.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged or last weights")
    command.add_argument("--dtype", choices=DTYPES, help="of the written weights; left out, as they are")
    shape = command.add_mutually_exclusive_group()
    shape.add_argument(
        "--scaling-factor", type=float, metavar="X",
        help="of a file of SAT, which does not say it: 1.15258426 for the 2B, 0.7 for all other releases",
    )  # fmt: skip
    shape.add_argument("--vae-config", metavar="FILE", help="diffusers' config.json for a file of SAT of another shape")
    command.add_argument(
        "--prefix", help="of the VAE's names in a file of SAT, such as first_stage_model.; needed if it holds several"
    )


def main() -> None:
    options = arguments()
    if options.format == "sat-config":
        translate_files(options)
        return
    source, out = Path(options.source), Path(options.out)
    dtype = DTYPES[options.dtype] if options.dtype else None
    if not source.exists():
        raise ConfigError(f"{source}: no such folder or file")
    if options.format == "diffusers" and options.part == "pipeline" and is_transformer_run(source):
        if options.verify:
            raise ConfigError(f"{source} is the run of a transformer; --verify is for an autoencoder's export")
        write_pipeline(options, out, dtype=dtype)
    else:
        model = read_model(source, options)
        write(model, out, options=options, dtype=dtype)
    print(out)


def is_transformer_run(source: Path) -> bool:
    return (source / "config.yaml").exists() and not is_vae_run(source)


def read_model(source: Path, options: argparse.Namespace) -> DiT | VAE:
    """Of whatever kind the source is."""
    if source.is_file():
        return read_sat(source, options)
    if not (options.scaling_factor is None and options.vae_config is None and options.prefix is None):
        raise ConfigError(
            f"{source} has a configuration; --scaling-factor, --vae-config and --prefix are for a file of SAT alone"
        )
    if is_transformer_run(source):
        if options.format == "sat-vae":
            raise ConfigError(f"{source} is the run of a transformer; expected one of launch/train_vae.py")
        return trained_transformer(source, load_config(DiTRun, [source / "config.yaml"]), weights=options.weights)[0]
    if (source / "config.yaml").exists():
        return trained_vae(source, options.weights)[0]
    return native.load(source) if (source / native.FIELDS).exists() else read_public(source)


def read_sat(source: Path, options: argparse.Namespace) -> VAE:
    config = None
    if options.vae_config:
        config = config_from_diffusers(hf.read_json(Path(options.vae_config)))
    elif options.scaling_factor is not None:
        config = VAEConfig(scaling_factor=options.scaling_factor)
    found = sat.load_vae(source, config, prefix=options.prefix)
    if found.prefix:
        print(f"the VAE is what lies under {found.prefix}*")
    for name, count in found.left_out.items():
        print(f"{count} tensors of {name}.* left out, which are no part of the autoencoder")
    return found.vae


def read_public(source: Path) -> DiT | VAE:
    name = hf.read_json(source / "config.json").get("_class_name")
    if name == "CogVideoXTransformer3DModel":
        return hf.load_transformer(source)
    if name == "AutoencoderKLCogVideoX":
        return hf.load_vae(source)
    raise ConfigError(f"{source / 'config.json'} describes a {name}; expected a CogVideoX transformer or autoencoder")


def write(model: DiT | VAE, out: Path, *, options: argparse.Namespace, dtype: torch.dtype | None) -> None:
    if options.format == "native":
        native.save(model, out, dtype=dtype)
    elif isinstance(model, DiT):
        if options.format == "sat-vae" or options.verify:
            raise ConfigError(f"{options.source} is a transformer; expected an autoencoder")
        hf.save_transformer(model, out, dtype=dtype)
    elif options.format == "sat-vae":
        sat.save_vae(model, out, dtype=dtype)
    else:
        hf.save_vae(model, out, dtype=dtype)
        if options.verify:
            print(verify(model.to(dtype), out))


def write_pipeline(options: argparse.Namespace, out: Path, *, dtype: torch.dtype | None) -> None:
    pipeline = open_pipeline(options.source, options.weights, device=torch.device("cpu"))
    config = load_config(DiTRun, [Path(options.source) / "config.yaml"])
    scale = config.diffusion.image.latent_scale
    if config.model.transformer().image_channels and scale == "none":
        raise ConfigError(
            f"{options.source} was trained with diffusion.image.latent_scale none, which diffusers' pipelines cannot do; "
            "convert --part transformer, or train with scale or inverse"
        )
    sampler = pipeline.sampler
    hf.save_pipeline(
        out, transformer=sampler.model, vae=sampler.vae, text=pipeline.text_folder, dtype=dtype, inverted=scale == "inverse",
        scheduler=scheduler_config(sampler.schedule.config, config.validation.sampling.sampler),
    )  # fmt: skip


@torch.no_grad()
def verify(vae: VAE, folder: Path) -> str:
    """How far ``vae`` and what diffusers' own class makes of its export differ for a small clip, both in float64.

    Raises ValueError if that class misses or does not know a tensor, reads another scaling factor, or differs by more than
    ``TOLERANCE``.
    """
    try:
        from diffusers import AutoencoderKLCogVideoX
    except ImportError:
        raise ConfigError(
            '--verify needs diffusers, which is not installed: pip install "cogvideo_dist[export]"'
        ) from None
    theirs, loading = AutoencoderKLCogVideoX.from_pretrained(
        folder, torch_dtype=torch.float64, output_loading_info=True
    )
    if odd := [f"{kind} {names[0]}" for kind, names in loading.items() if names]:
        raise ValueError(f"{folder}: diffusers finds {odd[0]} in the export")
    if theirs.config.scaling_factor != vae.config.scaling_factor:
        raise ValueError(f"{folder}: diffusers finds scaling_factor {theirs.config.scaling_factor}, not ours")
    ours = vae.double()
    size = (17, 2 * ours.config.spatial_compression, 3 * ours.config.spatial_compression)  # two chunks
    shapes = {"clip": (3, *size), "latents": ours.config.latent_shape(size)}
    drawn = {name: torch.randn(1, *shape, generator=fold(0, name)).double() for name, shape in shapes.items()}
    mine, public = ours.encode(drawn["clip"], "chunked"), theirs.encode(drawn["clip"]).latent_dist
    differences = {
        "mean": relative(mine.mean, public.mean),
        "logvar": relative(mine.logvar, public.logvar),
        "decoded": relative(ours.decode(drawn["latents"], "chunked"), theirs.decode(drawn["latents"]).sample),
    }
    found = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    if not max(differences.values()) <= TOLERANCE:
        raise ValueError(f"{folder}: diffusers computes something else than we do: {found} (at most {TOLERANCE:.0e})")
    return f"largest difference to diffusers, of the largest value: {found}"


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    run_command("convert", main)
