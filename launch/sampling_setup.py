"""What samples: which ranks do what, in which precision, and the models on their device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, DiTRun, Parallel, Sampling
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.dit_config import dit_config_from_diffusers
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.models.quantized import check_quantization, quantize
from cogvideo_dist.models.vae import Semantics
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, Place, build_mesh, choose_layout
from cogvideo_dist.parallel.split import own_slice
from cogvideo_dist.tasks.decoding import check_decoding
from cogvideo_dist.tasks.sampling import Ranks, Sampler, latent_frames
from launch.adapters import check_adapter, merge_adapter, read_adapter
from launch.environment import device_of, join
from launch.runs import Pipeline, open_pipeline

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What the folder of a run or of a released pipeline says before its weights are read: the transformer, how it is sampled
    unless told otherwise, the precision it was trained or released in, and the autoencoder's semantics."""

    model: DiTConfig
    sampling: Sampling
    precision: Precision
    semantics: Semantics


def read_source(folder: str) -> Source:
    path = Path(folder)
    if (path / "config.yaml").exists():
        config = load_config(DiTRun, [path / "config.yaml"])
        return Source(
            config.model.transformer(), config.validation.sampling, config.train.precision, config.frozen.vae_semantics
        )
    if not (path / "model_index.json").exists():
        raise ConfigError(
            f"{folder} is neither a run (it has no config.yaml) nor a diffusers pipeline (no model_index.json)"
        )
    fields = path / "transformer" / "config.json"
    model = dit_config_from_diffusers(hf.read_json(fields), str(fields))
    size = (TEMPORAL * (model.sample_frames - 1) + 1, SPATIAL * model.sample_height, SPATIAL * model.sample_width)
    # 2B, the one with sin-cos positions, is released in fp16 and all others in bf16.
    precision: Precision = "fp16" if model.positions == "sincos" else "bf16"
    return Source(model, Sampling(size=size, fps=8.0 if model.patch[0] == 1 else 16.0), precision, "chunked")


def sampling_settings(options: argparse.Namespace, source: Source) -> Sampling:
    """The run's own settings (or the model's base size), changed by what the command line gives."""
    names = ("steps", "guidance", "guidance_kind", "sampler", "fps", "seed")
    given: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.size:
        given["size"] = tuple(options.size)
    return replace(source.sampling, **given)


def sampling_layout(options: argparse.Namespace, place: Place, *, heads: int) -> Layout:
    """Which ranks do what. Guidance's branches are what is data parallel in training: different work, the same weights.

    Raises ``ConfigError`` unless the ranks started are those asked for.
    """
    branches, tp = 2 if options.guidance_parallel else 1, options.tp
    parts = [number for number in (options.ulysses, options.ring) if number is not None]
    sp = options.sp
    if sp is None:
        sp = parts[0] * parts[1] if len(parts) == 2 else max(1, place.world // (branches * tp))
    asked = f"--sp {sp} x --tp {tp}" + (" x 2 branches of --guidance-parallel" if branches == 2 else "")
    if min(sp, tp, *parts) < 1 or branches * sp * tp != place.world:
        raise ConfigError(
            f"{asked} are not the number of ranks started, {place.world}; each video is sampled by all of them together"
        )
    wanted = Parallel(sp=sp, tp=tp, ulysses=options.ulysses, ring=options.ring)
    return choose_layout(wanted, world=place.world, heads=heads, node=place.node)


def check_setup(options: argparse.Namespace, source: Source, *, settings: Sampling, place: Place) -> None:
    """Refuse what cannot run before anything starts."""
    if options.cp < 1 or place.world % options.cp:
        raise ConfigError(f"--cp {options.cp} does not divide the {place.world} ranks that decode")
    try:
        check_decoding(latent_frames(settings.size), semantics=semantics_of(options, source), ranks=options.cp)
    except ValueError as error:
        raise ConfigError(f"--cp: {error}") from None
    for given in map(read_adapter, options.adapter):
        check_adapter(given)
    if options.quantize is None:
        return
    if options.tp > 1:
        raise ConfigError(f"--quantize {options.quantize} and --tp {options.tp}: use --sp instead of --tp")
    device = device_of(place)
    try:
        check_quantization(options.quantize, device=device, dtype=dtype_of(options, source, device=device))
    except ValueError as error:
        raise ConfigError(f"--quantize: {error}") from None


def semantics_of(options: argparse.Namespace, source: Source) -> Semantics:
    found: Semantics = options.vae_semantics or source.semantics
    return found


def dtype_of(options: argparse.Namespace, source: Source, *, device: torch.device) -> torch.dtype:
    """On a GPU what the model was trained in; float32 on a CPU, which is slow in 16 bits."""
    return DTYPES[options.precision or (source.precision if device.type == "cuda" else "fp32")]


def start_ranks(
    options: argparse.Namespace, place: Place, *, layout: Layout
) -> tuple[ParallelMesh, Ranks, torch.device]:
    """Join the other ranks, if there are any."""
    if place.world == 1:
        return ParallelMesh(), Ranks(), device_of(place)
    mesh, device = join(place, layout)
    return mesh, sampling_ranks(mesh, cp=options.cp), device


def sampling_ranks(mesh: ParallelMesh, *, cp: int) -> Ranks:
    """Guidance's branches on the data-parallel axis, and runs of ``cp`` of all ranks, which decode. Collective."""
    world = mesh.world
    decoding = build_mesh(Layout(ulysses=world.size, cp=cp), rank=world.rank).cp if cp > 1 else Axis("cp")
    return Ranks(mesh, mesh.dp, decoding)


def ready_pipeline(options: argparse.Namespace, source: Source, *, ranks: Ranks, device: torch.device) -> Pipeline:
    """The models on the device, in their precision, this rank's part of them.

    They are read into the host's memory, so that the device never holds the transformer in more than it is sampled in.
    """
    pipeline = open_pipeline(options.checkpoint, options.weights, device=torch.device("cpu"))
    for given in map(read_adapter, options.adapter):
        merge_adapter(pipeline.sampler.model, given)
    tp = Axis("tp") if ranks.mesh is None else ranks.mesh.tp
    model = sliced(pipeline.sampler.model, tp).to(dtype_of(options, source, device=device)).to(device).eval()
    if options.quantize is not None:
        quantize(model, options.quantize)
    pipeline.text.to(device)
    vae = pipeline.sampler.vae.to(device, DTYPES[options.vae_precision])
    sampler = replace(pipeline.sampler, model=model, vae=vae, vae_semantics=semantics_of(options, source), ranks=ranks)
    return replace(pipeline, sampler=with_options(sampler, options))


def with_options(sampler: Sampler, options: argparse.Namespace) -> Sampler:
    """What the command line says otherwise than the run."""
    if options.vae_tiling is not None:
        sampler = replace(sampler, vae_tiling=options.vae_tiling)
    if options.image_scale is not None:
        sampler = replace(sampler, image=replace(sampler.image, latent_scale=options.image_scale))
    return sampler


def sliced(model: DiT, tp: Axis) -> DiT:
    """This rank's part of a whole model."""
    if tp.size == 1:
        return model
    with torch.device("meta"):
        mine = DiT(model.config, tp=tp)
    # Copies, or a slice would keep the whole alive.
    state = {name: own_slice(mine, name, p.detach()).clone() for name, p in model.named_parameters()}
    mine.load_state_dict(state, strict=True, assign=True)
    return mine
