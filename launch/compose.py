"""Puts a run together from its configuration: models, frozen encoders, data, folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cogvideo_dist.config.load import ConfigError, load_config, to_yaml
from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, Data, DiTRun, Size, VAERun
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.data.loader import Loader
from cogvideo_dist.data.plan import Plan
from cogvideo_dist.data.shards import Record, ShardReader, read_index
from cogvideo_dist.engine.checkpoint import flat
from cogvideo_dist.engine.log import report_line
from cogvideo_dist.evaluation.media import replacing
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import LATENT_SCALE, DiTConfig
from cogvideo_dist.models.text import TextEncoder
from cogvideo_dist.models.vae import VAE, Tiling
from cogvideo_dist.pack.layout import Clip
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import barrier, broadcast_object
from cogvideo_dist.protocols import Batch, Defect, Geometry
from cogvideo_dist.tasks.pixels import tiling_of
from cogvideo_dist.tasks.video import FrozenModels, cut_reason

FREE = {
    "run.dir", "log", "checkpoint", "validation", "frozen", "data.workers", "data.max_bad_share", "train.steps",
    "train.zero_stage", "train.recompute", "model.weights", "parallel",
}  # fmt: skip
"""What may change between a run and its continuation without changing what is computed, or is meant to (more steps)."""


def transformer_geometry(config: DiTConfig) -> Geometry:
    """Text tokens and patch grid of a clip; an odd latent is padded in front to whole patches."""

    def geometry(size: Size) -> Clip:
        o, p, q = config.patch
        frames = (size[0] - 1) // TEMPORAL + 1
        return Clip(config.text_length, (-(-frames // o), size[1] // SPATIAL // p, size[2] // SPATIAL // q))

    return geometry


def latent_geometry(size: Size) -> Clip:
    """The autoencoder's own: one token is one latent."""
    return Clip(0, ((size[0] - 1) // TEMPORAL + 1, size[1] // SPATIAL, size[2] // SPATIAL))


def build_transformer(config: DiTRun, *, tp: Axis | None = None) -> DiT:
    """This rank's slice, from ``model.weights`` (a diffusers ``transformer`` folder), else drawn from the seed."""
    wanted = config.model.transformer()
    recompute: Recompute = config.train.recompute
    if config.model.weights is None:
        model = DiT(wanted, recompute=recompute, tp=tp)
        draw_parameters(model, config.run.seed)
        return model
    model = hf.load_transformer(config.model.weights, recompute=recompute, tp=tp)
    differences = [
        f"{field.name} is {getattr(model.config, field.name)}, not {getattr(wanted, field.name)}"
        for field in dataclasses.fields(DiTConfig)
        if getattr(model.config, field.name) != getattr(wanted, field.name)
    ]
    if differences:
        raise ConfigError(
            f"model.weights {config.model.weights} is not model.preset {config.model.preset}: {differences[0]}"
        )
    return model.float()


def load_frozen(config: DiTRun, *, device: torch.device, records: list[Record], pictures: bool) -> FrozenModels:
    """The encoders that the run needs: both in the loop for pixels, and for pictures."""
    needed = config.data.source == "pixels" or pictures
    model = config.model.transformer()
    vae = text = None
    if needed and config.frozen.vae and config.frozen.text:
        vae = load_vae(config.frozen.vae, device)
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


def check_latents(config: DiTRun, records: list[Record], *, vae: VAE | None) -> float:
    """The scaling factor of encoded latents; refuses those of a text encoder that does not fit, and of another autoencoder
    (or way of using it) than ``vae``, which decodes the run's pictures."""
    model, shards, frozen = config.model.transformer(), config.data.shards, config.frozen
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


def stored(records: list[Record], key: str, *, shards: str) -> Any:
    """What all encoded latents carry in their records' origin."""
    values = {record.origin.get(key) for record in records if record.kind == "latent"}
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
    """A rank's batches, as the trainer asks for them."""

    def __init__(self, data: Data, *, seed: int, geometry: Geometry, mesh: ParallelMesh) -> None:
        self.records = read_index(data.shards)
        self.plan = Plan(self.records, data, seed=seed, geometry=geometry)
        self.loader = Loader(
            self.plan,
            ShardReader(data.shards),
            data=data,
            geometry=geometry,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
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


def prepare_folder(config: DiTRun | VAERun, mesh: ParallelMesh, *, plan: Plan) -> None:
    """The run's folder with its resolved configuration and data report; refuses a folder that holds another run."""
    folder = Path(config.run.dir)
    path = folder / "config.yaml"
    # Decided by one rank: it writes the file that the others would read.
    refusal = refused_as_other_run(config, path) if mesh.is_first and path.exists() else None
    if refusal := broadcast_object(refusal, mesh.world):
        raise ConfigError(refusal)
    if mesh.is_first:
        with replacing(path) as temporary:
            temporary.write_text(to_yaml(config), encoding="utf-8")
        cut = cut_captions(plan.records)
        add_to_report(folder / "data_report.jsonl", [*plan.dropped, *cut])
        for what, defects in (("are not used", plan.dropped), ("have a caption that is cut", cut)):
            if defects:
                print(
                    f"data: {len(defects)} of {len(plan.records)} samples {what}, listed with reasons in "
                    f"{folder / 'data_report.jsonl'}; first: {defects[0].source}: {defects[0].reason}",
                    flush=True,
                )
    barrier(mesh.world)


def cut_captions(records: Sequence[Record]) -> list[Defect]:
    """Encoded samples whose caption was longer than the text encoder's length; it was measured when they were encoded."""
    facts = (
        (record, record.origin.get("caption_tokens", 0), record.origin.get("text_length", 0)) for record in records
    )
    return [
        Defect(record.key, record.source, cut_reason(tokens, length))
        for record, tokens, length in facts
        if tokens > length
    ]


def add_to_report(path: Path, defects: Sequence[Defect]) -> None:
    """Append what an earlier start of the run has not listed yet."""
    listed = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in map(report_line, defects) if line not in listed)


def refused_as_other_run(config: DiTRun | VAERun, path: Path) -> str | None:
    """Why the run that ``path`` describes cannot be continued as ``config``."""
    try:
        old = load_config(type(config), [path])
    except ConfigError as error:
        return f"{error}; use another run.dir"
    before, now = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(config))
    for key in sorted(before):
        if before[key] != now[key] and not any(key == free or key.startswith(free + ".") for free in FREE):
            return (
                f"{path} was started with {key}={before[key]!r}, now {now[key]!r}; use another run.dir or the old value"
            )
    return None
