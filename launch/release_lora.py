"""The adapters of a run for the public library: python launch/convert.py lora RUN OUT"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.lora import FILE, PREFIX, public_tensors, save_lora
from cogvideo_dist.convert.model_card import Card
from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.schedule import Schedule, ScheduleConfig
from cogvideo_dist.engine.checkpoint import read_manifest
from cogvideo_dist.engine.lineage import Lineage
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import adapt, is_adapter, sites
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.tasks.sampling import Sampler
from launch import release_proof as proof
from launch.autoencoder import fill
from launch.beginning import add_adapters, base_model, chosen, newest_checkpoint, released_identity
from launch.compose import load_vae
from launch.release import (
    UNVERIFIED,
    Wish,
    appearing,
    notes_of,
    other_condition,
    said,
    use_of,
    write_card,
    written_fact,
)
from launch.release_facts import Source, sampler_fact, short

CPU = torch.device("cpu")


def release_lora(run: Path, out: Path, *, wish: Wish, base: str | None = None) -> None:
    """Write what ``load_lora_weights`` takes; ``base``: the hub's id or the folder of the pipeline that it goes on top of."""
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run}: no run (it has no config.yaml)")
    config = load_config(DiTRun, [run / "config.yaml"])
    if config.lora is None:
        raise ConfigError(f"{run} trained all weights, no adapters; release it with launch/convert.py diffusers")
    model, checkpoint = adapters_alone(config), newest_checkpoint(run)
    step = fill(model, checkpoint, weights=wish.weights)
    with appearing(out) as folder:
        written = save_lora(model, folder, dtype=wish.storage.dtype)
        verified = UNVERIFIED
        if wish.verify:
            check_base(config, checkpoint)
            verified = said(prove(model, config, folder=folder, wish=wish))
        facts = [
            ("Adapted linears", f"{len(written)} of the public transformer"),
            ("Base", base or _base(config)), *Source(run, config, step, wish.weights).facts(),
            sampler_fact(config.validation.sampling), written_fact(wish),
        ]  # fmt: skip
        use = use_of(model, config.validation.sampling, wish=wish, base=base or _base(config))
        notes = [*notes_of(model.config, config.validation.sampling), *_strength(config)]
        write_card(folder, Card("lora", out.name, facts, verified, use, notes))


def adapters_alone(config: DiTRun) -> DiT:
    """The run's transformer with room for its adapters and for nothing else."""
    assert config.lora is not None
    with torch.device("meta"):
        model = DiT(config.model.transformer())
    adapt(model, config.lora.adapters())
    for site in sites(model):
        if site.target in site.lora:
            site.lora.low(site.target).to_empty(device=CPU)
    return model


def lineage_of(config: DiTRun) -> Lineage:
    return chosen(config, config.init) if config.init else Lineage()


def check_base(config: DiTRun, checkpoint: Path) -> None:
    """Refuse to compare on other weights than the adapters were trained on."""
    found = lineage_of(config).ancestors[-1].sha256 if config.init else released_identity(config)
    if read_manifest(checkpoint)["about"].get("base") != found:
        where = config.init.from_ if config.init else config.model.weights
        raise ConfigError(
            f"{checkpoint} has adapters that were trained on other weights than {where} holds now; put those back, or give "
            "--no-verify"
        )


def prove(model: DiT, config: DiTRun, *, folder: Path, wish: Wish) -> str:
    """How far the run's base with the adapters of ``model`` and the public one with those of ``folder`` differ."""
    base, _ = base_model(config, lineage_of(config))
    sample = Trial(config, proof.Sample(config.validation.sampling.sampler))
    with TemporaryDirectory(prefix=".base-", dir=folder.parent) as temporary:
        hf.save_transformer(base, Path(temporary) / "transformer")
        wanted, vae = proof.digests(base, None), sample.vae()
        if base.config.image_channels:
            inverted = config.diffusion.image.latent_scale == "inverse"
            hf.save_vae(vae, Path(temporary) / "vae", inverted=inverted)
        add_adapters(base, config)
        dtype = wish.storage.dtype
        adapters = {name: p.detach().to(dtype).float() for name, p in model.named_parameters() if is_adapter(name)}
        base.load_state_dict(adapters, strict=False)
        ours = sample.ours(base, vae) | proof.own_forward(base)
        shape = base.config
        del base
        gc.collect()
        transformer = proof.public_transformer(Path(temporary) / "transformer", shape, wanted=wanted)
        pipeline = public_pipeline(sample, transformer, folder=Path(temporary))
        give_adapters(pipeline, folder, wanted=public_tensors(model, dtype))
        return proof.compare(ours, sample.theirs(pipeline) | proof.public_forward(transformer, shape))


@dataclass(frozen=True)
class Trial:
    """The sample that is compared: latents alone, from random features, since adapters touch neither encoder. There is none
    where the public pipelines make another image condition than the run."""

    config: DiTRun
    sample: proof.Sample

    @property
    def possible(self) -> bool:
        return other_condition(self.config.model.transformer(), self.config.diffusion.image) is None

    def vae(self) -> VAE:
        """That of an image-to-video run; to others any is as good, since nothing is encoded or decoded."""
        if self.config.model.transformer().image_channels and self.config.frozen.vae:
            return load_vae(self.config.frozen.vae, CPU)
        with torch.device("meta"):
            return VAE(VAEConfig())

    @property
    def schedule(self) -> Schedule:
        return Schedule(ScheduleConfig(snr_shift=self.config.diffusion.snr_shift))

    def ours(self, model: DiT, vae: VAE) -> proof.Evidence:
        if not self.possible:
            return {}
        image = self.config.diffusion.image
        sampler = Sampler(model, vae, self.schedule, vae.config.scaling_factor, "chunked", image=image)
        return proof.own_sample(sampler, self.sample, text=self.sample.text(model.config), decode=False)

    def theirs(self, pipeline: Any) -> proof.Evidence:
        if not self.possible:
            return {}
        shape = self.config.model.transformer()
        return proof.public_sample(pipeline, self.sample, text=self.sample.text(shape), config=shape, decode=False)


def public_pipeline(trial: Trial, transformer: Any, *, folder: Path) -> Any:
    """The public pipeline around ``transformer``, without a text encoder."""
    import diffusers

    scheduler = scheduler_config(trial.schedule.config, trial.sample.sampler)
    image = trial.config.model.transformer().image_channels
    return getattr(diffusers, "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline")(
        tokenizer=None, text_encoder=None, transformer=transformer,
        vae=proof.load_public("AutoencoderKLCogVideoX", folder / "vae", wanted={}) if image else None,
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
    )  # fmt: skip


def give_adapters(pipeline: Any, folder: Path, *, wanted: Mapping[str, Tensor]) -> None:
    """Load the release into a public pipeline; ValueError if anything else than ``wanted`` arrives."""
    from peft import get_peft_model_state_dict

    pipeline.load_lora_weights(str(folder), weight_name=FILE, adapter_name="release")
    arrived = get_peft_model_state_dict(pipeline.transformer, adapter_name="release")
    arrived = {PREFIX + name: tensor for name, tensor in arrived.items()}
    if odd := sorted(wanted.keys() ^ arrived.keys()):
        raise ValueError(f"diffusers does not take {odd[0]} of the adapters; nothing is released")
    for name, tensor in wanted.items():
        if not torch.equal(arrived[name].to(tensor.dtype), tensor):
            raise ValueError(f"diffusers loads another {name} than was to be written; nothing is released")


def _base(config: DiTRun) -> str:
    """What the adapters go on top of, as far as the run knows."""
    if config.init is not None:
        return f"a release of the run {short(config.init.from_)}"
    if config.model.weights is None:
        return f"a release of weights drawn from seed {config.run.seed}"
    return Path(config.model.weights).parent.name or config.model.weights


def _strength(config: DiTRun) -> list[str]:
    assert config.lora is not None
    if all(each.alpha == each.rank for each in config.lora.adapters().values()):
        return []
    return [
        "Rank and alpha are in the file's metadata, which diffusers reads since 0.34; older ones take alpha as the rank, and "
        "the adapters come out stronger or weaker than they are."
    ]
