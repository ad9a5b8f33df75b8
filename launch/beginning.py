"""What a transformer starts from: its seed, released weights or another run; and what adapters are trained on top of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun, Init
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.data.index import file_checksum
from cogvideo_dist.engine.checkpoint import Stored, checkpoints, newest, step_of
from cogvideo_dist.engine.lineage import Ancestor, Lineage, read_lineage
from cogvideo_dist.engine.manifest import NAME, CheckpointError
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.lora import adapt, is_adapter, merge
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object
from launch.autoencoder import KINDS, fill, newest_checkpoint, weights_kind

Result = TypeVar("Result")

PLACES = ("rope_grid", "spatial_interpolation", "sample_frames", "sample_height", "sample_width", "text_length")
"""Fields that no weight's shape depends on, but for learned positions: a configuration may set them beside given weights."""

GROWN = ("in_channels", "learned_positions", "ofs")
"""Fields in which a stage may have more than the run that it starts from."""


@dataclass(frozen=True)
class Beginning:
    """A transformer as it is before the run's first step, the stages before it and, of adapters, what is frozen under them."""

    model: DiT
    lineage: Lineage = field(default_factory=Lineage)
    base: str | None = None


def begin(config: DiTRun, mesh: ParallelMesh, *, before: int | None = None) -> Beginning:
    """This rank's slice of the run's transformer. A run that has checkpoints of all its weights gets those later on, so it is
    not filled here, and does not need what it once began from. ``before``: only those of earlier steps count."""
    folder = Path(config.run.dir)
    resumed = any(before is None or step_of(path) < before for path in checkpoints(folder / "ckpt"))
    if config.init is None:
        lineage, base = Lineage(), _agreed(lambda: released_identity(config), mesh)
    else:
        lineage = _agreed(partial(chosen, config, config.init), mesh)
        base = lineage.ancestors[-1].sha256
    if resumed and config.lora is None:
        return Beginning(blank(config, tp=mesh.tp), lineage)
    model, new = base_model(config, lineage, tp=mesh.tp)
    if new and mesh.is_first and not resumed:
        print(
            f"init: {', '.join(new)} were not in {config.init.from_ if config.init else ''} and start from zero",
            flush=True,
        )
    if config.lora is None:
        return Beginning(model, lineage)
    add_adapters(model, config)
    return Beginning(model, lineage, base)


def _agreed(decide: Callable[[], Result], mesh: ParallelMesh) -> Result:
    """What the first rank finds, on every rank; its error, too."""
    found: Any = None
    if mesh.is_first:
        try:
            found = decide()
        except ValueError as error:
            found = error
    found = broadcast_object(found, mesh.world)
    if isinstance(found, ValueError):
        raise found
    return found


def add_adapters(model: DiT, config: DiTRun) -> None:
    """New ones, as ``config.lora`` says, drawn from the seed; all else is frozen."""
    assert config.lora is not None
    adapt(model, config.lora.adapters())
    draw_parameters(model, config.run.seed, only=is_adapter)


def blank(config: DiTRun, *, tp: Axis | None = None) -> DiT:
    """A transformer whose weights are yet to come."""
    return _empty(config.model.transformer(), config, tp)


def _empty(shape: DiTConfig, config: DiTRun, tp: Axis | None) -> DiT:
    with torch.device("meta"):
        model = DiT(shape, recompute=config.train.recompute, tp=tp)
    return model.to_empty(device="cpu")


def base_model(config: DiTRun, lineage: Lineage, *, tp: Axis | None = None) -> tuple[DiT, list[str]]:
    """The transformer that the run starts from, and which of its parameters are new in it."""
    if config.init is not None:
        return from_run(config, lineage.ancestors[-1], init=config.init, tp=tp)
    if config.model.weights is not None:
        return released(config, config.model.weights, tp=tp), []
    model = blank(config, tp=tp)
    draw_parameters(model, config.run.seed)
    return model, []


def released(config: DiTRun, folder: str, *, tp: Axis | None = None) -> DiT:
    """A diffusers ``transformer`` folder, which must be the model that the configuration describes."""
    wanted = config.model.transformer()
    places = {name: value for name, value in config.model.changes().items() if name in PLACES}
    model = hf.load_transformer(folder, recompute=config.train.recompute, tp=tp, changes=places)
    for name in _fields():
        found, said = getattr(model.config, name), getattr(wanted, name)
        if found != said and not _idle(name, wanted):
            remedy = f"; set model.{name}: {found} to take it as it is" if name in PLACES else ""
            raise ConfigError(
                f"model.weights {folder} is not model.preset {config.model.preset}: {name} is {found}, not {said}{remedy}"
            )
    return model.float()


def different(one: DiTConfig, other: DiTConfig) -> str:
    """The first field in which the weights of two models differ; nothing if their shapes are the same."""
    for name in _fields():
        if name not in PLACES and getattr(one, name) != getattr(other, name):
            return f"{name} is {getattr(one, name)}, not {getattr(other, name)}"
    return ""


def _fields() -> list[str]:
    return [each.name for each in dataclasses.fields(DiTConfig)]


def _idle(name: str, config: DiTConfig) -> bool:
    """Whether a field plays no part in what a model computes."""
    counted = config.positions == "rope" and config.rope_grid == "extrapolate" and not config.learned_positions
    if name.startswith("sample_"):
        return counted
    return name in ("spatial_interpolation", "temporal_interpolation") and config.positions == "rope"


def released_identity(config: DiTRun) -> str | None:
    """Of the weights under adapters: checksums of their files; of drawn ones the seed."""
    if config.lora is None:
        return None
    if config.model.weights is None:
        return f"seed {config.run.seed}"
    files = sorted(Path(config.model.weights).glob("*.safetensors"))
    return " ".join(f"{file.name}:{file_checksum(file)}" for file in files)


def chosen(config: DiTRun, init: Init) -> Lineage:
    """The stages before the run, up to the checkpoint of ``init.from`` that it began from; its newest if it begins now."""
    known = read_lineage(Path(config.run.dir))
    if known is not None and known.ancestors and known.ancestors[-1].run == init.from_:
        return known
    run = Path(init.from_)
    if not (run / "config.yaml").exists():
        raise ConfigError(f"init.from {run} is no run (it has no config.yaml)")
    path, _ = newest(run / "ckpt", kinds=[KINDS[init.weights]])
    if path is None:
        raise ConfigError(f"init.from {run} has no checkpoint yet")
    stored = Stored.open(path)
    saved, digest = stored.saved, stored.digest(weights_kind(stored, init.weights))
    before = Lineage.of(saved.lineage, source=str(path / NAME))
    own = Ancestor(init.from_, saved.step, saved.samples, init.weights, digest)
    return Lineage((*before.ancestors, own))


def from_run(config: DiTRun, ancestor: Ancestor, *, init: Init, tp: Axis | None = None) -> tuple[DiT, list[str]]:
    """The weights of an earlier stage in the shape of this one, and the parameters that it did not have."""
    run = Path(init.from_)
    earlier = load_config(DiTRun, [run / "config.yaml"])
    before, now = earlier.model.transformer(), config.model.transformer()
    check_stage(before, now, init=init)
    old, _ = trained_transformer(run, earlier, weights=init.weights, tp=tp, pinned=ancestor)
    if before == now and old.recompute == config.train.recompute:
        return old, []
    model = _empty(now, config, tp)
    model.load_state_dict(grown := _grown(old, model, config.run.seed), strict=True)
    had = dict(old.named_parameters())
    return model, [name for name, value in grown.items() if name not in had or had[name].numel() < value.numel()]


def trained_transformer(
    run: Path, config: DiTRun, *, weights: str, tp: Axis | None = None, pinned: Ancestor | None = None
) -> tuple[DiT, int]:
    """The transformer of a run's newest whole checkpoint, or of the ``pinned`` one, with adapters merged; and its step."""
    checkpoint = _pinned(run, pinned) if pinned else newest_checkpoint(run, weights)
    if config.lora is None:
        model = blank(config, tp=tp)
    else:
        lineage = chosen(config, config.init) if config.init else Lineage()
        _check_base(config, lineage, checkpoint)
        model, _ = base_model(config, lineage, tp=tp)
        add_adapters(model, config)
    step = fill(model, checkpoint, weights=weights)
    if config.lora is not None:
        merge(model)
    return model.requires_grad_(), step


def _check_base(config: DiTRun, lineage: Lineage, checkpoint: Path) -> None:
    """Refuse adapters whose base holds other weights now than when they were trained."""
    found = lineage.ancestors[-1].sha256 if config.init else released_identity(config)
    if Stored.open(checkpoint).saved.about.get("base") != found:
        where = config.init.from_ if config.init else config.model.weights
        raise CheckpointError(f"{checkpoint} has adapters that were trained on other weights than {where} holds now")


def _pinned(run: Path, ancestor: Ancestor) -> Path:
    """The very checkpoint that a stage began from: a run that has gone on meanwhile has others."""
    for path in checkpoints(run / "ckpt"):
        stored = Stored.open(path)
        if stored.saved.step == ancestor.step:
            kind = weights_kind(stored, ancestor.weights)
            stored.verify([kind])
            if stored.digest(kind) != ancestor.sha256:
                raise CheckpointError(
                    f"{path} is not the checkpoint of that step that this run began from; use another run.dir"
                )
            return path
    raise CheckpointError(
        f"this run began from step {ancestor.step} of {run}, whose checkpoint is gone; put it back, or use another run.dir"
    )


def check_stage(before: DiTConfig, now: DiTConfig, *, init: Init) -> None:
    """Refuse a stage whose model is another one than that of the run it starts from, or whose positions are not as it says."""
    for name in _fields():
        old, new = getattr(before, name), getattr(now, name)
        if old == new or name in PLACES:
            continue
        if name not in GROWN or new < old:
            raise ConfigError(f"init.from {init.from_} has a model of {name} {old}, this run one of {new}")
        if not init.widen:
            raise ConfigError(
                f"init.from {init.from_} has a model of {name} {old}, this run one of {new}; set init.widen: true to "
                "start what is new from zero"
            )
    check_positions(before, now, init=init)


def check_positions(before: DiTConfig, now: DiTConfig, *, init: Init) -> None:
    """Refuse positions that mean something else than ``init.positions`` says."""
    alike = all(getattr(before, name) == getattr(now, name) for name in PLACES if name != "text_length")
    if alike and (before.text_length == now.text_length or not before.learned_positions):
        return
    if init.positions is None:
        raise ConfigError(
            f"init.positions: the base size or the positions of this stage are not those of {init.from_}; say extrapolate or "
            "interpolate"
        )
    if before.learned_positions and (init.positions == "extrapolate" or before.text_length != now.text_length):
        raise ConfigError("init.positions: learned positions can only be interpolated, for the same model.text_length")
    grid = (before.sample_height, before.sample_width)
    if now.positions == "sincos":
        ratio = now.sample_height / before.sample_height if init.positions == "interpolate" else 1.0
        scale = before.spatial_interpolation * ratio
        if abs(now.spatial_interpolation - scale) > 1e-6 * scale:
            raise ConfigError(f"init.positions: {init.positions} takes model.spatial_interpolation: {scale:g} here")
    elif init.positions == "extrapolate":
        if now.rope_grid != "extrapolate":
            raise ConfigError("init.positions: extrapolate takes model.rope_grid: extrapolate")
    # beside learned positions, rotations are spread over the new base size as those are
    elif now.rope_grid != "fit_base" or (
        (now.sample_height, now.sample_width) != grid and not before.learned_positions
    ):
        raise ConfigError(
            f"init.positions: interpolate spreads clips over the rows and columns that {init.from_} knows; it takes "
            f"model.rope_grid: fit_base, model.sample_height: {grid[0]} and model.sample_width: {grid[1]}"
        )


def _grown(old: DiT, new: DiT, seed: int) -> dict[str, Tensor]:
    """The earlier stage's parameters in the later one's shapes; further ones are zero, but for ofs' first layer, so that its
    second one learns."""
    draw_parameters(new, seed, only=lambda name: name.startswith("ofs.linear1"))
    state = {name: p.detach() for name, p in old.named_parameters()}
    for name, parameter in new.named_parameters():
        if name not in state:
            state[name] = parameter.detach() if name.startswith("ofs.linear1") else torch.zeros(parameter.shape)
        elif name == "embed.positions" and state[name].shape != parameter.shape:
            state[name] = resized(state[name], before=old.config, now=new.config)
        elif state[name].shape != parameter.shape:  # the patches' further channels are the last ones
            state[name] = F.pad(state[name], (0, parameter.shape[1] - state[name].shape[1]))
    return state


def resized(positions: Tensor, *, before: DiTConfig, now: DiTConfig) -> Tensor:
    """Learned positions [text + t*h*w, d] of another grid, trilinear between those of the earlier one."""
    text, vision = positions[: before.text_length], positions[before.text_length :]
    grid = vision.t().unflatten(1, before.sample_grid)[None]
    spread = F.interpolate(grid, size=now.sample_grid, mode="trilinear", align_corners=True)
    return torch.cat([text, spread[0].flatten(1).t()])
