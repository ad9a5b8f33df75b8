"""Puts a run together from its configuration: models, frozen encoders, data, folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config, plain, to_yaml
from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Data, DiTRun, Run, Size
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.index import Index
from cogvideo_dist.data.loader import Loader, open_sources
from cogvideo_dist.data.plan import Notes, Plan
from cogvideo_dist.engine.log import report_line
from cogvideo_dist.engine.manifest import flat
from cogvideo_dist.evaluation.media import replacing
from cogvideo_dist.models.presets import LATENT_SCALE, DiTConfig
from cogvideo_dist.models.text import TextEncoder
from cogvideo_dist.models.vae import VAE, Tiling
from cogvideo_dist.pack.layout import Clip
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import barrier, broadcast_object
from cogvideo_dist.protocols import Batch, Defect, Geometry
from cogvideo_dist.tasks.pixels import tiling_of
from cogvideo_dist.tasks.video import FrozenModels, cut_reason

GEMM, ATTENTION = 700e12, 470e12
"""Rates of an H100-class device in bfloat16; only their ratio matters, by which packs are balanced."""

FREE = {
    "run.dir", "log", "watch", "checkpoint", "validation", "frozen", "data.workers", "data.max_bad_share", "data.memory_gb",
    "data.remote", "train.steps",
    "train.zero_stage", "train.precision", "train.recompute", "train.offload",
    "train.non_finite", "train.non_finite_in_a_row", "train.checksum_every", "model.weights", "parallel",
}  # fmt: skip
"""What may change between a run and its continuation without changing what is computed, or is meant to (more steps)."""


@dataclass(frozen=True)
class TransformerGeometry:
    """Text tokens and patch grid of a clip; an odd latent is padded in front to whole patches."""

    config: DiTConfig

    def __call__(self, size: Size) -> Clip:
        o, p, q = self.config.patch
        frames = (size[0] - 1) // TEMPORAL + 1
        return Clip(self.config.text_length, (-(-frames // o), size[1] // SPATIAL // p, size[2] // SPATIAL // q))

    def cost(self, clip: Clip) -> float:
        """Seconds of a layer on a device that multiplies matrices at ``GEMM`` and attends at ``ATTENTION`` flop/s: forward and
        backward of 12 d^2 weights per token, and of attention with its scores made again (3.5 times the forward)."""
        n, d = clip.tokens, self.config.hidden
        return 72 * n * d**2 / GEMM + 14 * n**2 * d / ATTENTION


class LatentGeometry:
    """The autoencoder's own: one token is one latent, and all cost alike."""

    def __call__(self, size: Size) -> Clip:
        return Clip(0, ((size[0] - 1) // TEMPORAL + 1, size[1] // SPATIAL, size[2] // SPATIAL))

    def cost(self, clip: Clip) -> float:
        return float(clip.tokens)


def load_frozen(config: DiTRun, *, device: torch.device, records: Catalog, pictures: bool) -> FrozenModels:
    """The encoders that the run needs: both in the loop for pixels, and for pictures; the autoencoder for image conditions."""
    needed = config.data.source == "pixels" or pictures
    model = config.model.transformer()
    vae = text = None
    if (needed or model.image_channels) and config.frozen.vae:
        vae = load_vae(config.frozen.vae, device)
    if needed and config.frozen.text:
        text = load_text(config.frozen.text, model, device=device)
    scale = vae.config.scaling_factor if vae else LATENT_SCALE.get(config.model.preset.removeprefix("tiny-"), 1.0)
    if config.data.source == "latents":
        scale = check_latents(config, records, vae=vae)
    return FrozenModels(scale, vae, config.frozen.vae_semantics, text, config.frozen.vae_tiling)


def load_vae(folder: str, device: torch.device) -> VAE:
    """A frozen autoencoder in float32."""
    return hf.load_vae(folder).float().to(device).requires_grad_(False).eval()


def load_text(folder: str, model: DiTConfig, *, device: torch.device) -> TextEncoder:
    """The frozen text encoder, of the width that the transformer takes."""
    text = TextEncoder.load(folder, length=model.text_length, device=device)
    if text.dim != model.text_dim:
        raise ConfigError(
            f"frozen.text {folder} has features of {text.dim}, the transformer takes text_dim {model.text_dim}"
        )
    return text


def check_latents(config: DiTRun, records: Catalog, *, vae: VAE | None) -> float:
    """The scaling factor of encoded latents; refuses those of a text encoder that does not fit, and of another autoencoder
    (or way of using it) than ``vae``, which decodes the run's pictures."""
    model, frozen = config.model.transformer(), config.frozen
    shards = " and ".join(source.shards for source in config.data.all_sources)
    scale = stored(records, "scaling_factor", shards=shards)
    expected: dict[str, tuple[str, Any]] = {
        "text_length": ("model.text_length", model.text_length), "text_dim": ("model.text_dim", model.text_dim),
    }  # fmt: skip
    if vae is not None:
        expected |= {
            "scaling_factor": (f"frozen.vae {frozen.vae}", vae.config.scaling_factor),
            "vae": (f"frozen.vae {frozen.vae}", weights_digest(vae)),
            "semantics": ("frozen.vae_semantics", frozen.vae_semantics),
            "tiling": ("frozen.vae_tiling", shown_tiling(tiling_of(vae, frozen.vae_tiling))),
        }
    if model.image_channels and not all(index.common.get("image") for index in records.indexes):
        raise ConfigError(
            f"the latents of {shards} lack the first frames that model.preset {config.model.preset} needs; encode them again "
            "with that preset"
        )
    for key, (of, value) in expected.items():
        found = stored(records, key, shards=shards)
        if found != value:
            raise ConfigError(
                f"the latents of {shards} were made with {key} {found}, but {of} has {value}; encode them again"
                + (f", or change {of}" if key in ("semantics", "tiling") else "")
            )
    return float(scale)


def shown_tiling(tiling: Tiling | None) -> str:
    """As latents carry it in their origin."""
    if tiling is None:
        return "none"
    return f"{tiling.size[0]}x{tiling.size[1]} overlapping {tiling.overlap[0]}x{tiling.overlap[1]}"


def stored(records: Catalog, key: str, *, shards: str) -> Any:
    """What all encoded latents carry in their records' origin."""
    values = {index.common.get(key) for index in records.indexes}
    if len(values) != 1 or None in values:
        raise ConfigError(f"the latents of {shards} must all carry one {key}; encode them with launch/encode.py")
    return values.pop()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RankData:
    """A rank's batches, as the trainer asks for them. ``writes``: what is planned is noted in the run's folder."""

    def __init__(self, data: Data, *, run: Run, geometry: Geometry, mesh: ParallelMesh, writes: bool = True) -> None:
        self.records, stores = open_sources(data, check=mesh.is_first)
        notes = Notes(Path(run.dir) / "plan", writes=writes and mesh.is_first)
        self.plan = Plan(self.records, data, seed=run.seed, geometry=geometry, notes=notes)
        self.loader = Loader(
            self.plan, stores, data=data, geometry=geometry, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size
        )

    def iterate(self, first_step: int) -> Iterator[Batch]:
        return self.loader.iterate(first_step)

    def held_out(self) -> Iterator[tuple[Batch, float]]:
        """As many batches on every rank, since a sharded model needs all ranks in each forward; one of weight 0 fills up."""
        batch = None
        mine = self.loader.held_out_batches()
        for _ in range(self.loader.held_out_rounds):
            following = next(mine, None)
            batch = following or batch or self._any_held_out()
            yield batch, float(following is not None)

    def _any_held_out(self) -> Batch:
        return next(self.loader.held_out_batches_of(0))


def prepare_folder(config: DiTRun | VAERun, mesh: ParallelMesh, *, plan: Plan, new_data: bool = False) -> None:
    """The run's folder with its resolved configuration, its data's digests and its data report; refuses a folder that holds
    another run, or one on other data unless ``new_data`` allows it."""
    folder = Path(config.run.dir)
    path = folder / "config.yaml"
    # Decided by one rank: it writes the files that the others would read.
    refusal = refused_as_other_run(config, path) if mesh.is_first and path.exists() else None
    if mesh.is_first and not refusal and not new_data:
        refusal = refused_as_other_data(config.data, plan.catalog, path=folder / "data.json")
    if refusal := broadcast_object(refusal, mesh.world):
        raise ConfigError(refusal)
    if mesh.is_first:
        with replacing(path) as temporary:
            temporary.write_text(to_yaml(config), encoding="utf-8")
        note_data(config, plan)
        cut = [defect for index in plan.catalog.indexes for defect in cut_captions(index)]
        add_to_report(folder / "data_report.jsonl", [*plan.dropped, *cut])
        for what, defects in (("are not used", plan.dropped), ("have a caption that is cut", cut)):
            if defects:
                print(
                    f"data: {len(defects)} of {len(plan.catalog)} samples {what}, listed with reasons in "
                    f"{folder / 'data_report.jsonl'}; first: {defects[0].source}: {defects[0].reason}",
                    flush=True,
                )
    barrier(mesh.world)


def cut_captions(index: Index) -> list[Defect]:
    """Encoded samples whose caption was longer than the text encoder's length; it was measured when they were encoded."""
    tokens, length = index.origin_numbers("caption_tokens"), index.origin_numbers("text_length")
    return [
        Defect(record.key, record.source, cut_reason(int(tokens[place]), int(length[place])), code="caption cut")
        for place in np.flatnonzero(tokens > length).tolist()
        for record in (index[place],)
    ]


def add_to_report(path: Path, defects: Sequence[Defect]) -> None:
    """Append what an earlier start of the run has not listed yet."""
    listed = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in map(report_line, defects) if line not in listed)


def note_data(config: DiTRun | VAERun, plan: Plan, *, drawn: Sequence[int] | None = None) -> None:
    """Write what the run is on to ``data.json``; ``drawn``: clips of each source, for ``skip`` in a later stage."""
    facts = data_facts(config.data, plan.catalog)
    if drawn is not None:
        facts = [
            {**fact, "drawn": source.skip + count} for fact, source, count in zip(facts, config.data.all_sources, drawn)
        ]
    with replacing(Path(config.run.dir) / "data.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def data_facts(data: Data, catalog: Catalog) -> list[dict[str, Any]]:
    """What a run remembers of its data, source by source."""
    return [
        {"shards": source.shards, "samples": len(index), "digest": index.digest}
        for source, index in zip(data.all_sources, catalog.indexes)
    ]


def refused_as_other_data(data: Data, catalog: Catalog, *, path: Path) -> str | None:
    """Why a run that was on the data that ``path`` describes cannot go on with what its sources hold now."""
    if not path.exists():
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    for old, now in zip(before, data_facts(data, catalog)):
        if old["digest"] != now["digest"]:
            return (
                f"{now['shards']} is not what the run began with ({old['samples']} samples, index {old['digest'][:12]}; now "
                f"{now['samples']}, {now['digest'][:12]}); put the old set back, use another run.dir, or pass --new-data to go "
                "on with other clips from here"
            )
    return None


def refused_as_other_run(config: DiTRun | VAERun, path: Path) -> str | None:
    """Why the run that ``path`` describes cannot be continued as ``config``."""
    try:
        old = load_config(type(config), [path])
    except ConfigError as error:
        return f"{error}; use another run.dir"
    before, now = flat(plain(old)), flat(plain(config))
    for key in sorted(before):
        if before[key] != now[key] and not any(key == free or key.startswith(free + ".") for free in FREE):
            return (
                f"{path} was started with {key}={before[key]!r}, now {now[key]!r}; use another run.dir or the old value"
            )
    return None
