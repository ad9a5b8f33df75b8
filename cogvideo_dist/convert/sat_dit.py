"""The transformer in checkpoints of SAT <-> ours, at any number of model-parallel ranks, with SAT's adapters if it has any.

A file does not say what adapters are multiplied by: alpha / rank, and SAT's own default of alpha is 1. So what is written here
has alpha in its second factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.config.adaptation import Adapter
from cogvideo_dist.convert.names import Row, dit_rows, from_foreign, to_foreign
from cogvideo_dist.convert.sat_dit_config import config_of
from cogvideo_dist.convert.sat_folder import LATEST, WRAPPER, Shape, open_checkpoint
from cogvideo_dist.convert.sat_names import (
    ADAPTED,
    FACTOR_A,
    FACTOR_B,
    ORIGINAL,
    POSITIONS,
    PREFIX,
    TABLE,
    UNUSED,
    layer_name,
    names_of_transformer,
    position_table,
    split_of_name,
)
from cogvideo_dist.convert.sat_whole import Whole
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import adapt, is_adapter, sites
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.parallel.mesh import Axis

UNUSED_POSITIONS = 64
"""``max_sequence_length`` of all of SAT's configurations, the rows of a parameter that nothing reads."""


class SatDiT(NamedTuple):
    """The transformer of a checkpoint, where in it it is, how many of its tensors were left out under each first part of a
    name, and what else is to be said."""

    model: DiT
    prefix: str
    left_out: dict[str, int]
    notes: list[str]


def load_dit(
    path: str | Path,
    *,
    config: DiTConfig | None = None,
    prefix: str | None = None,
    adapters: Literal["merge", "keep"] = "merge",
    alpha: float = 1.0,
    average: bool = False,
) -> SatDiT:
    """The transformer of a folder of SAT (with ``latest``, or of one iteration) or of one rank's file.

    It is in the dtype that it is stored in, the widest of several; float32 where DeepSpeed's masters are beside it. ``config``:
    left out, it is found from the shapes. ``adapters``: added to their linears, or kept as adapters of ours with ``alpha``.
    ``average``: of copies that differ between ranks, take the mean.

    Raises ``ValueError`` naming the file and what is wrong with it: a rank that is missing, damaged or hostile, a tensor that
    is missing, unknown or of another shape, copies that differ.
    """
    checkpoint = open_checkpoint(path)
    first, source = checkpoint.ranks[0], str(checkpoint.folder)
    prefix, names = names_of_transformer(first.shapes, wanted=prefix, source=str(first.source))
    whole = Whole(checkpoint.ranks, names, prefix=prefix, average=average)
    found = config or config_of(whole.shapes(), source)
    with torch.device("meta"):
        model = DiT(found)
    rows, shapes = dit_rows(found), {name: p.shape for name, p in model.named_parameters()}
    _check(whole.shapes(), rows, shapes=shapes, source=source, config=found)
    kept = whole.adapters(found.layers, alpha) if adapters == "keep" and whole.modules else {}
    whole.open()
    if found.positions == "sincos" and TABLE in whole.actual:
        _check_table(whole.tensor(TABLE), found, source)
    dtype = reduce(torch.promote_types, (first.dtypes[name] for name in names))
    state: dict[str, Tensor] = {}
    for row in rows:  # one by one, so that a whole model is in memory once
        foreign = {part.name: whole.tensor(part.name, None if kept else alpha).to(dtype) for part in row.sat}
        state |= from_foreign(foreign, [row], column="sat", shapes=shapes, source=source)
    if kept:
        adapt(model, kept)
        state |= {name: tensor.to(dtype, copy=True) for name, tensor in whole.factors(found.layers)}
    model.load_state_dict(state, strict=True, assign=True)
    inside = set(names)
    left_out = Counter(name.partition(".")[0] for name in first.shapes if name not in inside)
    left_out.update(prefix + name for name in whole.actual if name in UNUSED)
    return SatDiT(model, prefix, dict(left_out), checkpoint.notes + whole.notes())


def _check(
    found: Mapping[str, Shape], rows: list[Row], *, shapes: Mapping[str, torch.Size], source: str, config: DiTConfig
) -> None:
    """Refuse tensors that are missing, unknown or of another shape, before any of them is read."""
    computed = (TABLE,) if config.positions == "sincos" else ()
    empty = {
        name: torch.empty(shape, device="meta") for name, shape in found.items() if name not in (*UNUSED, *computed)
    }
    try:
        from_foreign(empty, rows, column="sat", shapes=shapes, source=source)
    except ValueError as error:
        raise ValueError(
            f"{error}, for a transformer of {config.layers} layers, {config.heads} heads, patches of {config.patch} and "
            f"{config.in_channels} channels; say with --preset which one it is"
        ) from None


def _check_table(stored: Tensor, config: DiTConfig, source: str) -> None:
    """Refuse fixed positions other than those that the model computes."""
    expected = position_table(config)
    near = 2 * torch.finfo(stored.dtype).eps + 1e-5
    if stored.shape != expected.shape or not (stored.float() - expected).abs().max() <= near:
        raise ValueError(
            f"{source}: {TABLE} {tuple(stored.shape)} does not hold the sines and cosines of {config.text_length} tokens of "
            f"text and {config.sample_grid} patches at spatial_interpolation {config.spatial_interpolation}; say with --preset "
            "which model it is"
        )


def save_dit(
    model: DiT, folder: str | Path, *, tp: int = 1, dtype: torch.dtype | None = None, iteration: int = 1
) -> Path:
    """Write ``latest`` and ``<iteration>/mp_rank_XX_model_states.pt`` of ``tp`` model-parallel ranks, under SAT's names; the
    iteration's folder. ``dtype`` None keeps each tensor's own. A model with adapters is written as one of SAT's LoraMixin.

    The iteration's folder has its name once it is complete, and ``latest`` names it then. Raises ``ValueError`` if it is there
    already, if heads do not divide over ``tp``, or for adapters that SAT cannot hold.
    """
    folder = Path(folder)
    target, aside = folder / str(iteration), folder / f"{iteration}.partial"
    if iteration < 1:
        raise ValueError(f"iteration {iteration}: SAT reads only iterations from 1 on")
    if target.exists() or aside.exists():
        raise ValueError(
            f"{target if target.exists() else aside} is there already; remove it or write to another folder"
        )
    if tp < 1 or model.config.heads % tp:
        raise ValueError(f"{model.config.heads} heads do not divide over {tp} model-parallel ranks")
    adapters = _sat_adapters(model, tp)
    aside.mkdir(parents=True)
    for rank in range(tp):  # without a name for them, a rank's tensors are gone before the next one's are made
        slices = _slices(model, Axis("tp", rank, tp), dtype, adapters=adapters)
        content = ((PREFIX + name, tensor) for name, tensor in slices)
        torch.save({WRAPPER: dict(content)}, aside / f"mp_rank_{rank:02d}_model_states.pt")
    aside.rename(target)
    latest = folder / f"{LATEST}.partial"
    latest.write_text(str(iteration), encoding="utf-8")
    latest.replace(folder / LATEST)
    return target


def _slices(
    model: DiT, axis: Axis, dtype: torch.dtype | None, *, adapters: Mapping[str, Adapter]
) -> Iterator[tuple[str, Tensor]]:
    """One rank's tensors under SAT's names, each with memory of its own."""
    state = {name: p.detach() for name, p in model.named_parameters() if not is_adapter(name)}
    for row in dit_rows(model.config):
        for name, tensor in to_foreign({row.ours: state[row.ours].to("cpu", dtype)}, [row], "sat").items():
            split = split_of_name(name)
            module, _, kind = name.rpartition(".")
            adapted = adapters and module.split(".", 3)[-1] in ADAPTED
            yield (
                f"{module}{ORIGINAL}{kind}" if adapted else name,
                (split.slice(tensor, axis) if split else tensor).clone(),
            )
    if adapters:
        yield from _factors(model, dtype)
    own = dtype or state["embed.text.weight"].dtype
    if model.config.positions == "sincos":
        yield TABLE, position_table(model.config).to(own)
    else:
        yield POSITIONS, torch.zeros(UNUSED_POSITIONS, model.config.hidden, dtype=own)


def _factors(model: DiT, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Of all adapters, with alpha multiplied into the second, as SAT's own alpha is 1."""
    names = {target: (kind, number) for kind, targets in ADAPTED.items() for number, target in enumerate(targets)}
    for site in sites(model):
        if site.target in site.lora:
            low, (kind, number) = site.lora.low(site.target), names[site.target]
            module, b = layer_name(int(site.name.removeprefix("blocks.")), kind), low.b.detach()
            wide = b.to(torch.promote_types(b.dtype, torch.float32)) * low.adapter.alpha
            yield f"{module}{FACTOR_A}{number}", low.a.detach().to("cpu", dtype, copy=True)
            yield f"{module}{FACTOR_B}{number}", wide.to("cpu", dtype or b.dtype)


def _sat_adapters(model: DiT, tp: int) -> dict[str, Adapter]:
    """Of a model; refuses those that SAT's LoraMixin cannot hold."""
    found = {site.target: site.lora.low(site.target).adapter for site in sites(model) if site.target in site.lora}
    wanted = {target for targets in ADAPTED.values() for target in targets}
    if not found:
        return {}
    if found.keys() != wanted or len({adapter.rank for adapter in found.values()}) > 1:
        have = ", ".join(f"{target} (rank {adapter.rank})" for target, adapter in found.items())
        raise ValueError(
            f"SAT's adapters are on q, k, v and out of all blocks, of one rank; this model's are on {have}. Write it with the "
            "adapters merged"
        )
    if tp > 1:
        raise ValueError(
            f"SAT does not sum the adapter of attention.dense over model-parallel ranks, so {tp} of them would compute another "
            "model; write adapters for one rank, or merged"
        )
    return found
