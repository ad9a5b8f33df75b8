"""Releases for the public library: a folder that appears whole, compared with what we compute before it takes its name."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import SPATIAL, DiTRun, ImageCondition, Sampling
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.model_card import Card, Kind, Use, model_card
from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.samplers import SAMPLERS, SamplerName
from cogvideo_dist.diffusion.schedule import ScheduleConfig
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.tasks.sampling import Sampler
from launch import release_proof as proof
from launch.release_facts import Facts, Source, sampler_fact, size_fact
from launch.runs import Pipeline, Weights, open_pipeline
from launch.sampling_setup import read_source

CARD, SHEET, UNVERIFIED = "README.md", "verification.png", "Not verified."

OURS = {
    *hf.PIPELINE, CARD, SHEET, "config.json", "model.json", "weights.safetensors", "pytorch_lora_weights.safetensors",
}  # fmt: skip
"""What a release's folder holds at its top, beside weights."""

IMAGE = ImageCondition()


@dataclass(frozen=True)
class Wish:
    """How a release is written; ``text_from``: where the text encoder is, if it is not to be copied."""

    storage: hf.Storage
    weights: Weights
    verify: bool
    text_from: str | None = None


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its name if all goes well, and else is gone. A release that is there is replaced;
    anything else there is left alone: ``ConfigError``."""
    out = out.absolute()
    aside, old = (out.with_name(f".{kind}-{out.name}") for kind in ("tmp", "old"))
    if old.exists() and not out.exists():  # killed between the two renamings below
        old.rename(out)
    if out.exists():
        _check_release(out)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if out.exists():
            out.rename(old)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _check_release(out: Path) -> None:
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder to write")
    stem = Path(hf.WEIGHTS).stem
    others = sorted(path.name for path in out.iterdir() if path.name not in OURS and not path.name.startswith(stem))
    if others:
        raise ConfigError(
            f"{out} holds {others[0]}, which is no part of a release; name another folder, or move it away"
        )


def release_pipeline(source: Path, out: Path, *, wish: Wish) -> None:
    """A run or a pipeline's folder as a pipeline's folder."""
    pipeline = open_pipeline(str(source), wish.weights, device=torch.device("cpu"))
    model, described = pipeline.sampler.model, read_source(str(source))
    check_image(model.config, pipeline.sampler.image, source=source)
    kind = _sampler_of(source)
    text = hf.Elsewhere(wish.text_from) if wish.text_from else pipeline.text_folder
    facts = _facts(source, pipeline.step, wish.weights)
    with appearing(out) as folder:
        hf.save_pipeline(
            folder, transformer=model, vae=pipeline.sampler.vae, text=text, storage=wish.storage,
            scheduler=scheduler_config(pipeline.sampler.schedule.config, kind),
            inverted=pipeline.sampler.image.latent_scale == "inverse",
        )  # fmt: skip
        verified, use = UNVERIFIED, use_of(model, described.sampling, wish=wish)
        facts = [size_fact(model), *facts, sampler_fact(described.sampling), written_fact(wish)]
        notes = notes_of(model.config, described.sampling, semantics=pipeline.sampler.vae_semantics)
        if wish.verify:
            public = Public.of(pipeline.sampler, proof.Sample(kind), dtype=wish.storage.dtype)
            parts = {"text_encoder": pipeline.text.t5, "tokenizer": pipeline.text.tokenizer} if wish.text_from else {}
            ours = own_pipeline(pipeline, public.sample, dtype=wish.storage.dtype)
            del pipeline, model  # the public library's copies take their place
            gc.collect()
            theirs = public.pipeline(folder, parts)
            verified = said(proof.compare(ours, theirs))
            proof.write_sheet(folder / SHEET, ours=ours, theirs=theirs)
        sheet = SHEET if wish.verify else None
        write_card(folder, Card("pipeline", out.name, facts, verified, use, notes, sheet))


def release_model(model: DiT | VAE, out: Path, *, wish: Wish, source: Source | None = None) -> None:
    """A transformer's or an autoencoder's own folder; ``source``: the run that it comes from, if it does from one."""
    facts = [size_fact(model), *(source.facts() if source else []), written_fact(wish)]
    kind: Kind = "transformer" if isinstance(model, DiT) else "vae"
    verified = UNVERIFIED
    with appearing(out) as folder:
        if isinstance(model, DiT):
            hf.save_transformer(model, folder, storage=wish.storage)
        else:
            hf.save_vae(model, folder, storage=wish.storage)
        if wish.verify:
            verified = said(verify(model.to(wish.storage.dtype), folder))
        write_card(folder, Card(kind, out.name, facts, verified))


def verify(model: DiT | VAE, folder: Path) -> str:
    """How far ``model``, which is float64 after this, and what the public class makes of its folder differ.

    Raises ValueError if that class misses or does not know a tensor, or computes something else.
    """
    if isinstance(model, VAE):
        theirs = proof.load_public("AutoencoderKLCogVideoX", folder, wanted=proof.digests(model, None))
        return proof.compare(proof.own_coding(model), proof.public_coding(theirs, model.config))
    wanted = proof.digests(model, None)
    ours, config = proof.own_forward(model), model.config
    return proof.compare(ours, proof.public_forward(proof.public_transformer(folder, config, wanted=wanted), config))


@dataclass(frozen=True)
class Public:
    """What is expected of a public pipeline: its class, models and weights; and the sample that is compared."""

    kind: str
    model: DiTConfig
    vae: VAEConfig
    sample: proof.Sample
    weights: proof.Digests
    vae_weights: proof.Digests

    @classmethod
    def of(cls, sampler: Sampler, sample: proof.Sample, *, dtype: torch.dtype | None) -> Public:
        model, vae = sampler.model, sampler.vae
        weights, vae_weights = (proof.digests(each, dtype) for each in (model, vae))
        return cls(hf.pipeline_class(model), model.config, vae.config, sample, weights, vae_weights)

    def pipeline(self, folder: Path, parts: dict[str, Any]) -> proof.Evidence:
        """What the folder's pipeline computes; ``parts``: a text encoder that it does not hold."""
        transformer = proof.public_transformer(folder / "transformer", self.model, wanted=self.weights)
        vae = proof.load_public("AutoencoderKLCogVideoX", folder / "vae", wanted=self.vae_weights)
        pipeline = proof.public_pipeline(folder, kind=self.kind, transformer=transformer, vae=vae, text=parts)
        text = proof.public_text(pipeline, length=self.model.text_length)
        found = {"text": text} | proof.public_sample(pipeline, self.sample, text=text, config=self.model)
        return found | proof.public_coding(vae, self.vae) | proof.public_forward(transformer, self.model)


def own_pipeline(pipeline: Pipeline, sample: proof.Sample, *, dtype: torch.dtype | None) -> proof.Evidence:
    """What we compute with the weights as they are written; the models are float64 after this."""
    sampler = pipeline.sampler
    sampler.model.to(dtype)
    sampler.vae.to(dtype)
    text = pipeline.text.encode([proof.PROMPT])[0]
    found = {"text": text} | proof.own_sample(sampler, sample, text=text)
    return found | proof.own_coding(sampler.vae) | proof.own_forward(sampler.model)


def check_image(config: DiTConfig, image: ImageCondition, *, source: Path) -> None:
    """Refuse a condition that the public pipelines do not make."""
    if difference := other_condition(config, image):
        name, value, remedy = difference
        raise ConfigError(
            f"{source} was trained with diffusion.image.{name} {value}, which diffusers' pipelines cannot do; convert --part "
            f"transformer, or train with {remedy}"
        )


def other_condition(config: DiTConfig, image: ImageCondition) -> tuple[str, object, str] | None:
    """What of a condition the public pipelines do not make: the setting, its value, and what would do."""
    if not config.image_channels:
        return None
    if image.latent_scale == "none":
        return "latent_scale", image.latent_scale, "scale or inverse"
    if image.rest != IMAGE.rest:
        return "rest", image.rest, IMAGE.rest
    return ("ofs", image.ofs, str(IMAGE.ofs)) if config.ofs and image.ofs != IMAGE.ofs else None


def _sampler_of(source: Path) -> SamplerName:
    if (source / "config.yaml").exists():
        return load_config(DiTRun, [source / "config.yaml"]).validation.sampling.sampler
    found = hf.read_json(source / "scheduler" / "scheduler_config.json")["_class_name"]
    return next(name for name in SAMPLERS if scheduler_config(ScheduleConfig(), name)["_class_name"] == found)


def _facts(source: Path, step: int | None, weights: str) -> Facts:
    if step is None:
        return []
    return Source(source, load_config(DiTRun, [source / "config.yaml"]), step, weights).facts()


def use_of(model: DiT, sampling: Sampling, *, wish: Wish, base: str | None = None) -> Use:
    dtype = str(wish.storage.dtype or next(model.parameters()).dtype).removeprefix("torch.")
    return Use(hf.pipeline_class(model), sampling, model.config.text_length, dtype, wish.text_from, base)


def notes_of(config: DiTConfig, sampling: Sampling, *, semantics: str = "chunked") -> list[str]:
    """What whoever samples should know."""
    notes = []
    base = f"{SPATIAL * config.sample_height} x {SPATIAL * config.sample_width}"
    if config.rope_grid == "extrapolate" and not proof.stretched(config):
        notes.append(f"diffusers has positions for heights and widths up to {base}.")
    if proof.stretched(config):
        notes.append(
            f"Training counts positions; diffusers stretches those of other heights and widths over {base}, so sample at that."
        )
    if config.learned_positions:
        notes.append("Its learned positions serve the base size alone.")
    if semantics == "whole":
        notes.append(
            "Training used the autoencoder on whole clips; diffusers' norms see a few frames at a time, which gives slightly "
            "other pixels."
        )
    if sampling.guidance_kind == "ramp":
        notes.append("Guidance that grows with the step (ramp) is not in diffusers; the lines above hold it constant.")
    return notes


def written_fact(wish: Wish) -> tuple[str, str]:
    dtype = wish.storage.dtype
    return "Written in", str(dtype).removeprefix("torch.") if dtype else "the dtype of its source"


def said(found: str) -> str:
    """Also to whoever waits for the release."""
    print(found)
    return f"Loaded with diffusers {_version()} and compared with cogvideo_dist, weights as written: {found}."


def _version() -> str:
    from importlib.metadata import version

    return version("diffusers")


def write_card(folder: Path, card: Card) -> None:
    (folder / CARD).write_text(model_card(card), encoding="utf-8")
