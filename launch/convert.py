"""Convert between our weights and the public formats: python launch/convert.py {diffusers,lora,native,sat,sat-vae} SOURCE OUT

``sat-config`` translates SAT's configuration files instead, ``reshape`` and ``check`` are for checkpoints of a run.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import native, sat
from cogvideo_dist.convert.vae_config import config_from_diffusers
from cogvideo_dist.evaluation.media import replacing
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.vae import VAE, VAEConfig
from launch import convert_sat
from launch.autoencoder import is_vae_run, trained_vae
from launch.beginning import trained_transformer
from launch.environment import run_command
from launch.release import Wish, appearing, release_model, release_pipeline
from launch.release_facts import Source
from launch.release_lora import release_lora
from launch.release_proof import wanted
from launch.reshape import COMMANDS as CHECKPOINTS
from launch.sat_config import add_options, translate_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

EXAMPLES = """\
examples:
  python launch/convert.py diffusers runs/demo/dit my-pipeline --dtype bf16   # a run -> a diffusers pipeline folder, verified
  python launch/convert.py diffusers runs/demo/dit my-pipeline --text reference --text-from THUDM/CogVideoX-5b
  python launch/convert.py diffusers my-pipeline smaller --dtype fp16         # a pipeline folder -> another
  python launch/convert.py diffusers runs/demo/vae my-vae                     # a run -> a diffusers vae folder
  python launch/convert.py lora runs/style my-lora --base THUDM/CogVideoX-5b  # a run of adapters -> load_lora_weights
  python launch/convert.py sat-vae runs/demo/vae my-vae/3d-vae.pt             # a run -> the VAE's file of SAT
  python launch/convert.py sat-vae CogVideoX-5b/vae 3d-vae.pt                 # diffusers -> the VAE's file of SAT
  python launch/convert.py diffusers 3d-vae.pt my-vae --scaling-factor 0.7    # the VAE's file of SAT -> diffusers
  python launch/convert.py sat runs/demo/dit for-sat/transformer              # a run -> a folder of SAT
  python launch/convert.py diffusers CogVideoX-5b-sat/transformer transformer # SAT's transformer -> diffusers
  python launch/convert.py native mp_rank_00_model_states.pt ours --scaling-factor 0.7 # its VAE -> ours
  python launch/convert.py sat-config cogvideox_5b.yaml sft.yaml --out my.yaml # SAT's configuration -> ours
  python launch/convert.py check runs/demo/dit/ckpt/step-000020               # is a checkpoint whole, and what is it
  python launch/convert.py reshape runs/demo/dit/ckpt/step-000020 out --ranks 8 --tp 2 # in the pieces of other ranks"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert between our weights and the public formats. docs/release.md has the whole way of a release.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    formats = parser.add_subparsers(dest="format", required=True)
    to_public = formats.add_parser(
        "diffusers", help="a run -> a diffusers pipeline folder; one of a VAE, or what SAT wrote -> its folder",
        epilog="example: python launch/convert.py diffusers runs/demo/dit runs/demo/pipeline --dtype bf16",
    )  # fmt: skip
    add_pipeline(to_public)
    lora = formats.add_parser(
        "lora", help="a run of adapters -> pytorch_lora_weights.safetensors, for load_lora_weights of diffusers",
        epilog="example: python launch/convert.py lora runs/style my-lora --base THUDM/CogVideoX-5b",
    )  # fmt: skip
    lora.add_argument("source", help="a run with a lora section")
    lora.add_argument(
        "--base", metavar="ID", help="the hub's id or folder of the pipeline that they go on, for the card"
    )
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
    for command in (to_public, to_ours):
        convert_sat.add_source_options(command)
    convert_sat.add_commands(formats)
    for command in (to_public, lora, to_ours, to_sat):
        add_output(command)
    for command in (to_public, lora):
        command.add_argument(
            "--verify", action=argparse.BooleanOptionalAction,
            help="load what is written with diffusers itself, and give it its name only if a forward and a sample of few steps "
            "are ours; left out, that is done where diffusers is installed",
        )  # fmt: skip
    add_options(
        formats.add_parser(
            "sat-config", help="SAT's configuration files -> one of ours, with a list of what became of each key",
            epilog="example: python launch/convert.py sat-config cogvideox_5b_lora.yaml sft.yaml --out my-lora.yaml",
        )
    )  # fmt: skip
    for name, (add, _, what) in CHECKPOINTS.items():
        add(formats.add_parser(name, help=what))
    return parser.parse_args()


def add_pipeline(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--part", choices=("pipeline", "transformer"), default="pipeline", help="of a transformer's run"
    )
    command.add_argument(
        "--text", choices=("copy", "reference"), default="copy",
        help="of a pipeline: T5 and its tokenizer are copied, or left out, with the card saying where to take them",
    )  # fmt: skip
    command.add_argument(
        "--text-from",
        metavar="ID",
        help="with --text reference: the hub's id or folder; left out, the run's frozen.text",
    )
    command.add_argument(
        "--shard-size", type=size_in_bytes, default=hf.SHARD_SIZE, metavar="SIZE",
        help="bytes of weights in a file, such as 5GB, which it is unless given",
    )  # fmt: skip


def size_in_bytes(text: str) -> int:
    """5GB, 200MB, 1000; units are powers of ten, as in diffusers."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?B?)", text.upper())
    size = int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 5GB or 200MB")
    return size


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("out")
    command.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged or last weights")
    command.add_argument("--dtype", choices=DTYPES, help="of the written weights; left out, as they are")


def add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", help="a run, a folder of diffusers or of native, a folder of SAT with a transformer, or a file of SAT with a "
        "VAE (3d-vae.pt, or a fine-tuned model's mp_rank_00_model_states.pt); no code of SAT's files is run",
    )  # fmt: skip
    shape = command.add_mutually_exclusive_group()
    shape.add_argument(
        "--scaling-factor", type=float, metavar="X",
        help="of a file of SAT, which does not say it: 1.15258426 for the 2B, 0.7 for all other releases",
    )  # fmt: skip
    shape.add_argument("--vae-config", metavar="FILE", help="diffusers' config.json for a file of SAT of another shape")
    command.add_argument(
        "--prefix",
        help="of the names in a file or folder of SAT, such as first_stage_model.; needed if it holds several",
    )


def main() -> None:
    options = arguments()
    if options.format == "sat-config":
        translate_files(options)
        return
    if options.format in CHECKPOINTS:
        CHECKPOINTS[options.format][1](options)
        return
    source, out = Path(options.source), Path(options.out)
    if not source.exists():
        raise ConfigError(f"{source}: no such folder or file")
    if options.format == "sat":
        convert_sat.run(options)
        return
    if options.format == "lora":
        release_lora(source, out, wish=wish_of(options, modules=("diffusers", "peft")), base=options.base)
    elif options.format == "diffusers" and is_pipeline(source) and options.part == "pipeline":
        release_pipeline(source, out, wish=wish_of(options))
    else:
        write(options, source=source, out=out)
    print(out)


def wish_of(options: argparse.Namespace, *, modules: tuple[str, ...] = ("diffusers",)) -> Wish:
    storage = hf.Storage(DTYPES.get(options.dtype), getattr(options, "shard_size", hf.SHARD_SIZE))
    return Wish(storage, options.weights, wanted(options.verify, modules=modules), text_from(options))


def text_from(options: argparse.Namespace) -> str | None:
    """Where a pipeline's text encoder is, if it is not to be copied."""
    given: str | None = getattr(options, "text_from", None)
    if getattr(options, "text", "copy") == "copy":
        if given is not None:
            raise ConfigError("--text-from says where a text encoder is that is not copied; add --text reference")
        return None
    source = Path(options.source)
    if given is None and is_transformer_run(source):
        given = load_config(DiTRun, [source / "config.yaml"]).frozen.text
    return given or options.source


def is_pipeline(source: Path) -> bool:
    """Whether there is all that a pipeline needs: the run of a transformer, or such a folder."""
    return is_transformer_run(source) or (source / "model_index.json").exists()


def is_transformer_run(source: Path) -> bool:
    return (source / "config.yaml").exists() and not is_vae_run(source)


def read_model(source: Path, options: argparse.Namespace) -> tuple[DiT | VAE, Source | None]:
    """Of whatever kind the source is, and the run that it is, if it is one."""
    if source.is_file():
        return read_sat(source, options), None
    if convert_sat.is_sat(source) and options.format != "sat-vae":
        return read_sat_transformer(source, options), None
    given = (options.scaling_factor, options.vae_config, options.prefix, getattr(options, "preset", None))
    if any(each is not None for each in given):
        raise ConfigError(
            f"{source} has a configuration; --scaling-factor, --vae-config, --preset and --prefix are for a file of SAT alone"
        )
    if is_transformer_run(source):
        if options.format == "sat-vae":
            raise ConfigError(f"{source} is the run of a transformer; expected one of launch/train_vae.py")
        config = load_config(DiTRun, [source / "config.yaml"])
        model, step = trained_transformer(source, config, weights=options.weights)
        return model, Source(source, config, step, options.weights)
    if (source / "config.yaml").exists():
        vae, step = trained_vae(source, options.weights)
        return vae, Source(source, load_config(VAERun, [source / "config.yaml"]), step, options.weights)
    return (native.load(source) if (source / native.FIELDS).exists() else read_public(source)), None


def read_sat_transformer(source: Path, options: argparse.Namespace) -> DiT:
    if options.scaling_factor is not None or options.vae_config is not None:
        raise ConfigError(
            f"{source} holds a transformer; --scaling-factor and --vae-config are for the VAE's file of SAT"
        )
    return convert_sat.read_sat_transformer(
        source, preset=options.preset, prefix=options.prefix, alpha=options.lora_alpha, average=options.average_replicas
    )


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


def write(options: argparse.Namespace, *, source: Path, out: Path) -> None:
    """One model, as the format is that is asked for."""
    dtype = DTYPES.get(options.dtype)
    wish = wish_of(options) if options.format == "diffusers" else None
    model, run = read_model(source, options)
    if options.format == "native":
        with appearing(out) as folder:
            native.save(model, folder, dtype=dtype)
    elif wish is not None:
        release_model(model, out, wish=wish, source=run)
    elif isinstance(model, DiT):
        raise ConfigError(f"{source} is a transformer; expected an autoencoder")
    else:
        with replacing(out) as temporary:
            sat.save_vae(model, temporary, dtype=dtype)


if __name__ == "__main__":
    run_command("convert", main)
