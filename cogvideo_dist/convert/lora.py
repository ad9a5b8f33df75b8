"""Adapters in the public form: ``pytorch_lora_weights.safetensors`` with the names of diffusers and peft, and back.

A public file holds two factors for every public linear, ``transformer.<module>.lora_A.weight`` [rank, features in] and
``lora_B.weight`` [features out, rank], and in its metadata rank and alpha. Where one linear of ours is several public ones (a
block's modulation), each of these gets the first factor and its own rows of the second.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvideo_dist.config.adaptation import Adapter
from cogvideo_dist.convert.diffusers import read_file
from cogvideo_dist.convert.names import dit_rows
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import Adapters, LowRank, adapt, is_adapter, sites
from cogvideo_dist.models.presets import DiTConfig

FILE = "pytorch_lora_weights.safetensors"
PREFIX, FIRST, SECOND = "transformer.", ".lora_A.weight", ".lora_B.weight"
METADATA = "lora_adapter_metadata"
"""Where diffusers (0.34 and later) keeps rank and alpha in the file's metadata, as JSON."""


@dataclass(frozen=True)
class Module:
    """A public linear (or convolution, whose weight is ``shape``) and what it has of one of our adapters: the equal pieces
    ``take``, of ``pieces``, of the second factor. ``features``: into it and out of it."""

    name: str
    ours: str
    target: str
    take: tuple[int, ...]
    pieces: int
    features: tuple[int, int]
    shape: tuple[int, ...] | None = None


def modules_of(config: DiTConfig) -> list[Module]:
    """Every public linear of the transformer that can have an adapter, by whichever of ours."""
    with torch.device("meta"):
        model = DiT(config)
    rows, found = {row.ours: row for row in dit_rows(config)}, []
    for site in sites(model):
        row, place = rows[f"{site.name}.{site.place.linear}.weight"], site.place
        count = row.pieces // place.parts
        first = place.part * count
        for part in row.diffusers:
            take = tuple(index - first for index in part.take)
            if all(0 <= index < count for index in take):
                out, into = site.linear.weight.shape
                features = into, out // row.pieces * len(take)
                name, ours = part.name.removesuffix(".weight"), f"{site.name}.lora.{site.target}"
                found.append(Module(name, ours, site.target, take, count, features, part.shape))
    return found


def save_lora(model: DiT, folder: Path, *, dtype: torch.dtype | None = None) -> dict[str, Adapter]:
    """Write the adapters of ``model``; by public module, what they are."""
    tensors = public_tensors(model, dtype)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}")
    written = {module.name: low.adapter for module, low in _adapted(model)}
    folder.mkdir(parents=True, exist_ok=True)
    about = {PREFIX + key: value for key, value in peft_config(written).items()}
    metadata = {"format": "pt", METADATA: json.dumps(about, indent=2, sort_keys=True)}
    save_file(tensors, folder / FILE, metadata=metadata)
    return written


def public_tensors(model: DiT, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The adapters of ``model`` under their public names."""
    tensors = {}
    for module, low in _adapted(model):
        first, second = _public(module, low.a.detach(), low.b.detach())
        tensors[PREFIX + module.name + FIRST] = first.to("cpu", dtype).contiguous()
        tensors[PREFIX + module.name + SECOND] = second.to("cpu", dtype).contiguous()
    return tensors


def _adapted(model: DiT) -> Iterator[tuple[Module, LowRank]]:
    for module in modules_of(model.config):
        owner, _, target = module.ours.rpartition(".")
        if target in (adapters := cast(Adapters, model.get_submodule(owner))):
            yield module, adapters.low(target)


def _public(module: Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    pieces = b.chunk(module.pieces)
    second = torch.cat([pieces[index] for index in module.take])
    if module.shape is None:
        return a.clone(), second
    return a.reshape(len(a), *module.shape[1:]).clone(), second[:, :, None, None]


def peft_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """What peft's LoraConfig is given: the commonest rank and alpha, and by name those that differ."""
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0][0]
    return {
        "r": rank, "lora_alpha": _whole(alpha), "target_modules": sorted(adapters), "bias": "none", "lora_dropout": 0.0,
        "rank_pattern": {name: each.rank for name, each in adapters.items() if each.rank != rank},
        "alpha_pattern": {name: _whole(each.alpha) for name, each in adapters.items() if each.alpha != alpha},
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def load_lora(model: DiT, path: Path) -> dict[str, Adapter]:
    """Give ``model`` the adapters of a public file; what they are, by target.

    Where a target's adapters differ between blocks, they all get the largest rank, filled up with zeros, and a scale of 1.
    Raises ``ValueError`` naming the file and what in it is no adapter of this transformer.
    """
    factors = _factors(path)
    groups: dict[str, dict[str, list[Module]]] = defaultdict(lambda: defaultdict(list))
    for module in modules_of(model.config):
        if module.name in factors:
            given = factors[module.name]
            if (found := (given.a.shape[1], given.b.shape[0])) != module.features:
                raise ValueError(
                    f"{path}: {module.name} goes from {found[0]} to {found[1]} features, here {module.features}"
                )
            groups[module.target][module.ours].append(module)
    known = {module.name for owners in groups.values() for members in owners.values() for module in members}
    if unknown := sorted(factors.keys() - known):
        raise ValueError(f"{path}: {unknown[0]} is no linear of this transformer")
    adapters, state = dict[str, Adapter](), dict[str, Tensor]()
    for target, owners in groups.items():
        adapters[target], own = _joined(owners, factors, str(path))
        state |= own
    adapt(model, adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.zero_()
                if name in state:  # else this block has none
                    parameter.copy_(state[name])
    return adapters


@dataclass(frozen=True)
class Factors:
    """Of one public module."""

    a: Tensor
    b: Tensor
    scale: float


def _factors(path: Path) -> dict[str, Factors]:
    tensors, rank_alpha = read_file(path), _RankAlpha.of(path)
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        kind = next((kind for kind in (FIRST, SECOND) if name.endswith(kind)), None)
        if kind is None or not name.startswith(PREFIX):
            raise ValueError(f"{path}: {name} is not understood; expected {PREFIX}<module>{FIRST} or {SECOND}")
        halves[name[len(PREFIX) : -len(kind)]][kind] = tensor
    found = {}
    for module, half in halves.items():
        if len(half) == 1:
            raise ValueError(f"{path}: {PREFIX}{module} has only one of {FIRST} and {SECOND}")
        a, b = half[FIRST].flatten(1), half[SECOND].flatten(1)
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"{path}: the factors of {module} have ranks {a.shape[0]} and {b.shape[1]}")
        found[module] = Factors(a, b, rank_alpha.alpha(module, rank=a.shape[0]) / a.shape[0])
    return found


@dataclass(frozen=True)
class _RankAlpha:
    """What a file says of its alphas; one that says nothing means alpha = rank, as the public library takes it."""

    common: float | None
    pattern: Mapping[str, float]

    @classmethod
    def of(cls, path: Path) -> _RankAlpha:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
        if text is None:
            return cls(None, {})
        try:
            about = json.loads(text)
            common, pattern = about[f"{PREFIX}lora_alpha"], about.get(f"{PREFIX}alpha_pattern") or {}
            values = [common, *pattern.values()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: its {METADATA} says no {PREFIX}lora_alpha") from None
        if not all(type(value) in (int, float) and 0 < value < float("inf") for value in values):
            raise ValueError(f"{path}: its {METADATA} has alphas {values}; expected numbers above 0")
        if odd := [key for key in ("use_dora", "use_rslora") if about.get(PREFIX + key)]:
            raise ValueError(f"{path}: adapters with {odd[0]} are not supported")
        return cls(common, pattern)

    def alpha(self, module: str, *, rank: int) -> float:
        for key, value in self.pattern.items():
            plain = key.removeprefix("^")
            if module == plain or module.endswith(f".{plain}"):
                return value
        return float(rank) if self.common is None else self.common


def _joined(
    owners: Mapping[str, list[Module]], factors: Mapping[str, Factors], source: str
) -> tuple[Adapter, dict[str, Tensor]]:
    """One target's adapters, in every block that has one, of one rank and scale."""
    made = {ours: _assembled(modules, factors) for ours, modules in owners.items()}
    rank = max(len(each.a) for each in made.values())
    scales = {each.scale for each in made.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    state = {}
    for ours, each in made.items():
        missing = rank - len(each.a)
        state[f"{ours}.a"] = torch.nn.functional.pad(each.a, (0, 0, 0, missing))
        state[f"{ours}.b"] = torch.nn.functional.pad(each.b * (each.scale / scale), (0, missing))
    return Adapter(rank, scale * rank), state


def _assembled(modules: list[Module], factors: Mapping[str, Factors]) -> Factors:
    """The public adapters of one of our linears as one: side by side, or at the same rank where they share the first factor."""
    given = [factors[module.name] for module in modules]
    first = given[0]
    shared = all(each.scale == first.scale and torch.equal(each.a, first.a) for each in given)
    rank = len(first.a) if shared else sum(len(each.a) for each in given)
    size = len(first.b) // len(modules[0].take)
    b = torch.zeros(modules[0].pieces, size, rank, dtype=first.b.dtype)
    at = 0
    for module, each in zip(modules, given):
        piece = each.b.view(len(module.take), size, -1)
        b[list(module.take), :, at : at + len(each.a)] = piece * (1.0 if shared else each.scale)
        at += 0 if shared else len(each.a)
    a = first.a if shared else torch.cat([each.a for each in given])
    return Factors(a, b.flatten(0, 1), first.scale if shared else 1.0)
