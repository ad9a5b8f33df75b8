"""What a release computes in the public library, against what we compute: one small clip, seeded, on the CPU.

Both sides run one after the other, so that no more than one model is in memory. Forwards are compared in float64, which leaves
no room for rounding, and samples in float32, both with the weights as they were written.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.config.schema import SPATIAL, Sampling, Size
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.dit_config import dit_config_from_diffusers, dit_config_to_diffusers
from cogvideo_dist.diffusion.samplers import Draw, SamplerName
from cogvideo_dist.evaluation.media import to_uint8, write_contact_sheet
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import adapt, sites
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.condition import Conditioner
from cogvideo_dist.tasks.sampling import Sampler, latent_frames, latent_shape

Evidence = dict[str, Tensor]
"""What was computed, by name."""

SIZE: Size = (9, 48, 64)
"""Of the sampled clip: three latent frames, 6 x 8 latents each."""

STEPS, GUIDANCE = 5, 3.0
PROMPT = "A cat turns its head."

TOLERANCES = {
    "forward": 1e-6, "mean": 1e-9, "logvar": 1e-9, "decoded": 1e-9, "text": 1e-5, "latents": 1e-4, "video": 1e-4,
}  # fmt: skip
"""How far each may be off, as a share of its largest value. ``text`` is made by the same code on both sides, but where weights
lie in memory decides the order of its float32 sums."""

INSTALL = 'pip install "cogvideo_dist[export]"'


def wanted(asked: bool | None, *, modules: tuple[str, ...] = ("diffusers",)) -> bool:
    """Whether a release is to be verified: as ``asked``, and if nothing is asked where the public library is installed."""
    if asked is False:
        return False
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing and asked:
        raise ConfigError(f"--verify needs {missing[0]}, which is not installed: {INSTALL}")
    if missing:
        print(f"not verified: {missing[0]} is not installed ({INSTALL})")
    return not missing


def compare(ours: Evidence, theirs: Evidence) -> str:
    """The largest difference of each, in words; ValueError if one is larger than it may be."""
    found = {name: relative(theirs[name], ours[name]) for name in TOLERANCES if name in ours}
    shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    # "not <=", so that NaN is refused, too
    if bad := [name for name, value in found.items() if not value <= TOLERANCES[name]]:
        raise ValueError(
            f"diffusers computes something else than we do: {shown} ({bad[0]} may differ by {TOLERANCES[bad[0]]:.0e}); "
            "nothing is released"
        )
    return f"largest difference to diffusers, of the largest value: {shown}"


def relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"diffusers gives {list(found.shape)} where we have {list(expected.shape)}")
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


# ---- Weights.


Digests = dict[str, tuple[torch.dtype, str]]
"""Of every tensor of the public form, the dtype that it is written in and the SHA-256 of its bytes in that dtype."""


def digests(model: DiT | VAE, dtype: torch.dtype | None) -> Digests:
    """Of the weights as they are to be written."""
    return {name: (tensor.dtype, _digest(tensor)) for name, tensor in hf.written_tensors(model, dtype)}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def load_public(kind: str, folder: Path, *, wanted: Digests) -> Any:
    """A model of diffusers' class ``kind`` in float32. Raises ValueError if it misses a tensor, does not know one, or has other
    numbers in one than ``wanted``."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    theirs, loading = getattr(diffusers, kind).from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if odd := [f"{kind} {names[0]}" for kind, names in loading.items() if names]:
        raise ValueError(f"diffusers finds {odd[0]} in the export")
    state = theirs.state_dict()
    for name, (dtype, digest) in wanted.items():
        if _digest(state[name].to(dtype)) != digest:
            raise ValueError(f"diffusers loads another {name} than was to be written; nothing is released")
    return theirs.eval()


# ---- The transformer.


def small_base(config: DiTConfig) -> DiTConfig:
    """The model with a base sample of the size of ours where its own would not do: learned positions exist at that size alone;
    where training counts positions and the public library stretches them, the two agree there alone; and where both count them,
    the public library has those of no larger size."""
    fits = SIZE[1] <= SPATIAL * config.sample_height and SIZE[2] <= SPATIAL * config.sample_width
    if not config.learned_positions and not stretched(config) and (fits or config.rope_grid == "fit_base"):
        return config
    return replace(
        config, sample_frames=latent_frames(SIZE), sample_height=SIZE[1] // SPATIAL, sample_width=SIZE[2] // SPATIAL
    )


def stretched(config: DiTConfig) -> bool:
    """Whether the public library places the tokens of other sizes than the base differently than training did."""
    return dit_config_from_diffusers(dit_config_to_diffusers(config), "").rope_grid != config.rope_grid


def _positions(config: DiTConfig) -> int:
    return config.text_length + prod(config.sample_grid)


def own_small(model: DiT) -> DiT:
    """The same weights and adapters with a small base; the first of learned positions."""
    config = small_base(model.config)
    if config == model.config:
        return model
    adapters = {site.target: site.lora.low(site.target).adapter for site in sites(model) if site.target in site.lora}
    with torch.device("meta"):
        small = DiT(config)
        adapt(small, adapters)
    state = {name: p.detach() for name, p in model.named_parameters()}
    if config.learned_positions:
        state["embed.positions"] = state["embed.positions"][: _positions(config)]
    small.load_state_dict(state, strict=True, assign=True)
    return small


def public_small(theirs: Any, config: DiTConfig) -> Any:
    """``own_small`` of the public model, whose full configuration is ``config``."""
    small = small_base(config)
    if small == config:
        return theirs
    fields = {"sample_height": small.sample_height, "sample_width": small.sample_width, "sample_frames": SIZE[0]}
    with torch.device("meta"):
        cut = type(theirs).from_config({**theirs.config, **fields})
    state = theirs.state_dict()
    if config.learned_positions:
        state["patch_embed.pos_embedding"] = state["patch_embed.pos_embedding"][:, : _positions(small)]
    cut.load_state_dict(state, strict=True, assign=True)
    return cut.eval()


class Inputs(NamedTuple):
    """Of a forward of two clips, in float64: latents [2, T, C, h, w], text [2, L, dim], timestep [2], the image condition as
    the latents, and ofs [2]."""

    latents: Tensor
    text: Tensor
    timestep: Tensor
    image: Tensor | None
    ofs: Tensor | None


def inputs_of(config: DiTConfig) -> Inputs:
    shape = latent_shape(SIZE, channels=config.out_channels, patch_t=config.patch[0])

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=fold(0, "release", name)).double()

    image = draw("image", shape[0], config.image_channels, *shape[2:]) if config.image_channels else None
    ofs = torch.full((2,), 2.0, dtype=torch.float64) if config.ofs else None
    text = draw("text", config.text_length, config.text_dim)
    return Inputs(draw("latents", *shape), text, torch.tensor([987, 321]), image, ofs)


@torch.no_grad()
def own_forward(model: DiT) -> Evidence:
    """Of ``model``, which is float64 after this."""
    small = own_small(model.double())
    given = inputs_of(model.config)
    return {"forward": small.denoise(given.latents, given.text, given.timestep, given.image, given.ofs)}


@torch.no_grad()
def public_forward(theirs: Any, config: DiTConfig) -> Evidence:
    """Of the public transformer, which is float64 after this; with its adapters, if it has been given some."""
    from diffusers import CogVideoXPipeline

    theirs.double()
    given = inputs_of(config)
    latents = given.latents if given.image is None else torch.cat([given.latents, given.image], dim=2)
    rotary = None
    if theirs.config.use_rotary_positional_embeddings:
        parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": None}
        pipeline = CogVideoXPipeline(transformer=theirs, **parts)
        rotary = pipeline._prepare_rotary_positional_embeddings(*SIZE[1:], latents.shape[1], torch.device("cpu"))
    output = theirs(
        hidden_states=latents, encoder_hidden_states=given.text, timestep=given.timestep, ofs=given.ofs,
        image_rotary_emb=rotary,
    )  # fmt: skip
    return {"forward": output.sample}


def public_transformer(folder: Path, config: DiTConfig, *, wanted: Digests) -> Any:
    """The public transformer of a folder, with a small base."""
    return public_small(load_public("CogVideoXTransformer3DModel", folder, wanted=wanted), config)


# ---- The autoencoder.


@torch.no_grad()
def own_coding(vae: VAE) -> Evidence:
    """Latents and pixels of a clip of two chunks, by ``vae``, which is float64 after this."""
    vae.double()
    clip, latents = _coding_inputs(vae.config)
    posterior = vae.encode(clip, "chunked")
    return {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": vae.decode(latents, "chunked")}


def _coding_inputs(config: VAEConfig) -> tuple[Tensor, Tensor]:
    size = (17, 2 * config.spatial_compression, 3 * config.spatial_compression)
    shapes = {"clip": (3, *size), "latents": config.latent_shape(size)}
    clip, latents = (torch.randn(1, *shape, generator=fold(0, name)).double() for name, shape in shapes.items())
    return clip, latents


@torch.no_grad()
def public_coding(theirs: Any, config: VAEConfig) -> Evidence:
    """The same by the public class, which is float64 after this."""
    if theirs.config.scaling_factor != config.scaling_factor:
        raise ValueError(f"diffusers finds scaling_factor {theirs.config.scaling_factor}, not ours")
    theirs.double()
    clip, latents = _coding_inputs(config)
    posterior = theirs.encode(clip).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": theirs.decode(latents).sample}


# ---- Sampling.


@dataclass(frozen=True)
class Sample:
    """A few steps from one seed: by which rule, and what an image-to-video model continues."""

    sampler: SamplerName

    @property
    def settings(self) -> Sampling:
        return Sampling(STEPS, self.sampler, GUIDANCE, "constant", SIZE)

    def generator(self) -> torch.Generator:
        """What the public pipelines draw from, first an image's posterior, then the noise of steps."""
        return fold(0, "release", "sample")

    def image(self) -> Tensor:
        """Smooth colours [3, H, W] in [-1, 1]."""
        rough = torch.rand(1, 3, 3, 4, generator=fold(0, "release", "picture")) * 2 - 1
        return torch.nn.functional.interpolate(rough, SIZE[1:], mode="bilinear")[0].clamp(-1, 1)

    def noise(self, config: DiTConfig) -> Tensor:
        shape = latent_shape(SIZE, channels=config.out_channels, patch_t=config.patch[0])
        return torch.randn(shape, generator=fold(0, "release", "noise"))

    def text(self, config: DiTConfig) -> Tensor:
        """Features [L, dim] for a release without a text encoder."""
        return torch.randn(config.text_length, config.text_dim, generator=fold(0, "release", "prompt"))


def as_public(generator: torch.Generator) -> Draw:
    """The noise that diffusers' scheduler adds: after the first step it draws twice and drops the first."""

    def draw(index: int, shape: torch.Size) -> Tensor:
        if index:
            torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator)

    return draw


@torch.no_grad()
def own_sample(sampler: Sampler, sample: Sample, *, text: Tensor, decode: bool = True) -> Evidence:
    """Latents [T, C, h, w] and, decoded as the public pipelines do, video [T, 3, H, W] in [0, 1]; all in float32."""
    model = own_small(sampler.model.float())
    vae = sampler.vae.float() if decode or model.config.image_channels else sampler.vae
    sampler = replace(sampler, model=model, vae=vae, vae_semantics="chunked", vae_tiling=False)
    generator, condition = sample.generator(), None
    if model.config.image_channels:
        conditioner = Conditioner(vae, sampler.image, sampler.latent_scale, model.config.patch[0])
        condition = conditioner(sample.image(), latent_frames(SIZE), generator=generator)
    noise = sample.noise(model.config)
    latents = sampler.latents(text, sample.settings, noise=noise, draw=as_public(generator), condition=condition)
    if not decode:
        return {"latents": latents}
    video = (sampler.decode(latents) / 2 + 0.5).clamp(0, 1).transpose(0, 1)
    return {"latents": latents, "video": video}


@torch.no_grad()
def public_sample(pipeline: Any, sample: Sample, *, text: Tensor, config: DiTConfig, decode: bool = True) -> Evidence:
    """The same by a public pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []

    def look(_pipeline: Any, _step: int, _timestep: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(given["latents"])
        return {}

    picture = {"image": sample.image()[None] / 2 + 0.5} if config.image_channels else {}
    frames = pipeline(
        prompt_embeds=text[None], negative_prompt_embeds=torch.zeros_like(text)[None], num_frames=SIZE[0],
        height=SIZE[1], width=SIZE[2], num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=sample.generator(),
        latents=sample.noise(config)[None], output_type="pt" if decode else "latent", callback_on_step_end=look,
        max_sequence_length=config.text_length, **picture,
    ).frames[0]  # fmt: skip
    latents = seen[-1][0, -latent_frames(SIZE) :]
    return {"latents": latents, "video": frames} if decode else {"latents": latents}


def public_pipeline(folder: Path, *, kind: str, transformer: Any, vae: Any, text: Mapping[str, Any]) -> Any:
    """The whole pipeline of a folder, whatever class its index names, which must be ``kind``; parts are loaded already."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        folder, transformer=transformer, vae=vae, torch_dtype=torch.float32, local_files_only=True, **text
    )
    if type(pipeline).__name__ != kind:
        raise ValueError(f"diffusers loads a {type(pipeline).__name__}, not a {kind}")
    return pipeline


def public_text(pipeline: Any, *, length: int) -> Tensor:
    """The features [length, dim] of the prompt by a pipeline's own text encoder."""
    features, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=length)
    return features[0].detach()


def write_sheet(path: Path, *, ours: Evidence, theirs: Evidence) -> None:
    """Frames of both samples, one above the other."""
    rows = [(name, to_uint8(found["video"].transpose(0, 1) * 2 - 1)) for name, found in
            (("cogvideo_dist", ours), ("diffusers", theirs))]  # fmt: skip
    write_contact_sheet(path, rows)
