"""A transformer's tensors over all model-parallel ranks of a checkpoint of SAT, put together.

SAT cuts the linears of its blocks over the ranks as Megatron does: queries, keys and values each by heads, so that a rank's
``query_key_value`` is [q_r; k_r; v_r], the feed-forward's wide side by features, and what reads these along its inputs. All
other tensors are whole in every rank's file.

Its adapters (``LoraMixin``) are ``weight + alpha / rank * B @ A`` on queries, keys, values and ``dense``: the weight is then
named ``original.weight``, the factors ``matrix_A.i`` [rank, in] and ``matrix_B.i`` [out, rank], cut as their linear is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cogvideo_dist.config.adaptation import Adapter
from cogvideo_dist.convert.sat_folder import Get, RankTensors, Shape
from cogvideo_dist.convert.sat_names import ADAPTED, FACTOR_A, FACTOR_B, ORIGINAL, joined, layer_name, split_of_name
from cogvideo_dist.parallel.mesh import Axis


class Whole:
    """Names are SAT's without the prefix and, of adapted linears, without ``original``; ``actual`` has them as in the files.

    ``modules``: the adapted linears, with the rank of each. ``average``: copies that differ between ranks are replaced by their
    mean.
    """

    def __init__(self, ranks: Sequence[RankTensors], names: Sequence[str], *, prefix: str, average: bool) -> None:
        self.ranks, self.prefix, self.average = ranks, prefix, average
        self.actual = {name.removeprefix(prefix).replace(ORIGINAL, "."): name for name in names}
        if twice := [name for name in names if ORIGINAL in name and name.replace(ORIGINAL, ".") in set(names)]:
            raise ValueError(f"{ranks[0].source}: holds {twice[0]} and the same without original; expected one of them")
        self._check_ranks()
        self.modules = dict(self._adapted())
        self.gets: list[Get] = []

    def open(self) -> None:
        """Have the files of all ranks read."""
        self.gets = [rank.read(list(self.actual.values())) for rank in self.ranks]

    def shapes(self) -> dict[str, Shape]:
        """Of the whole tensors, factors of adapters left out."""
        found = {}
        for name, actual in self.actual.items():
            if _module_of(name) not in self.modules:
                split = split_of_name(name)
                shape = self.ranks[0].shapes[actual]
                found[name] = shape if split is None else split.shape(shape, Axis("tp", 0, len(self.ranks)))
        return found

    def tensor(self, name: str, alpha: float | None = None) -> Tensor:
        """A whole tensor; with ``alpha`` that of an adapted linear has its adapter added, in float32 or wider."""
        copies = [get(self.actual[name]) for get in self.gets]
        module = name.removesuffix(".weight")
        if alpha is not None and module in self.modules:
            copies = [_wide(copy) + self._update(module, get, alpha) for copy, get in zip(copies, self.gets)]
        split = split_of_name(name)
        return joined(copies, split) if split else self._alike(name, copies)

    def adapters(self, layers: int, alpha: float) -> dict[str, Adapter]:
        """As ``models.lora.adapt`` takes them. Raises ``ValueError`` if they are not on all blocks alike."""
        ranks: dict[str, int | None] = {}
        for kind, targets in ADAPTED.items():
            found = {self.modules.get(layer_name(layer, kind)) for layer in range(layers)}
            if len(found) > 1 or None in found:
                raise ValueError(
                    f"{self.ranks[0].source}: {kind} has no adapter, or none of the same rank, in some of the {layers} layers; "
                    "have them merged instead of kept"
                )
            ranks |= dict.fromkeys(targets, found.pop())
        return {target: Adapter(rank, alpha) for target, rank in ranks.items() if rank is not None}

    def factors(self, layers: int) -> Iterator[tuple[str, Tensor]]:
        """Of all adapters, under our names."""
        for layer in range(layers):
            for kind, targets in ADAPTED.items():
                module = layer_name(layer, kind)
                for number, target in enumerate(targets):
                    a, b = (
                        [get(self.actual[f"{module}{mark}{number}"]) for get in self.gets]
                        for mark in (FACTOR_A, FACTOR_B)
                    )
                    if target == "out":  # cut along what comes in; the others along what goes out
                        a, b = [torch.cat(a, 1)], [self._alike(f"{module}{FACTOR_B}{number}", b)]
                    else:
                        a, b = [self._alike(f"{module}{FACTOR_A}{number}", a)], [torch.cat(b)]
                    yield from zip((f"blocks.{layer}.lora.{target}.{factor}" for factor in "ab"), a + b)

    def notes(self) -> list[str]:
        """What is to be said of the adapters."""
        if len(self.ranks) > 1 and any(module.endswith("attention.dense") for module in self.modules):
            return [
                "SAT does not sum the adapter of attention.dense over its model-parallel ranks, each of which adds its own "
                "part; here they are summed, as the formula of adapters has it"
            ]
        return []

    def _update(self, module: str, get: Get, alpha: float) -> Tensor:
        """What an adapter adds to one rank's weight."""
        parts = ADAPTED[_kind(module)]
        factors = [
            [_wide(get(self.actual[f"{module}{mark}{number}"])) for mark in (FACTOR_B, FACTOR_A)]
            for number in range(len(parts))
        ]
        return torch.cat([b @ a for b, a in factors]) * (alpha / self.modules[module])

    def _adapted(self) -> Iterator[tuple[str, int]]:
        """Every linear with an adapter, and its rank; their shapes are right in all ranks."""
        first = self.ranks[0]
        modules = {module for name in self.actual if (module := _module_of(name))}
        for module in sorted(modules):
            parts = ADAPTED.get(_kind(module))
            if parts is None:
                raise ValueError(
                    f"{first.source}: an adapter on {module}; SAT's are on {' and '.join(ADAPTED)} of blocks"
                )
            names = [f"{module}{mark}{number}" for mark in (FACTOR_A, FACTOR_B) for number in range(len(parts))]
            if missing := [name for name in (*names, f"{module}.weight") if name not in self.actual]:
                raise ValueError(f"{first.source} lacks tensor {missing[0]}, beside others of that adapter")
            out, features = first.shapes[self.actual[f"{module}.weight"]]
            rank = first.shapes[self.actual[names[0]]][0]
            shapes = [(rank, features)] * len(parts) + [(out // len(parts), rank)] * len(parts)
            for name, shape in zip(names, shapes):
                if (own := first.shapes[self.actual[name]]) != shape:
                    raise ValueError(f"{first.source}: tensor {self.actual[name]} has shape {own}, expected {shape}")
            yield module, rank

    def _check_ranks(self) -> None:
        """Refuse ranks that do not hold the same tensors, and folders that lack the last ranks."""
        first, count = self.ranks[0], len(self.ranks)
        for rank in self.ranks[1:]:
            if more := [name for name in rank.shapes if name.startswith(self.prefix) and name not in first.shapes]:
                raise ValueError(f"{rank.source} holds {more[0]}, which {first.source.name} lacks")
            for name in self.actual.values():
                if rank.shapes.get(name) != first.shapes[name]:
                    there = f"of shape {rank.shapes[name]}" if name in rank.shapes else "missing"
                    raise ValueError(
                        f"{rank.source}: tensor {name} is {there}, but of shape {first.shapes[name]} in {first.source.name}"
                    )
        names = ("mixins.patch_embed.text_proj.bias", layer_name(0, "attention.query_key_value.bias"))
        hidden, own = (first.shapes.get(self.actual.get(name, ""), (0,))[0] for name in names)
        cut = 3 * hidden // own if own else count
        if cut != count:
            raise ValueError(
                f"{first.source.parent} has the files of {count} model-parallel ranks, but its tensors are cut in {cut}: "
                f"expected mp_rank_00_model_states.pt to mp_rank_{cut - 1:02d}_model_states.pt"
            )

    def _alike(self, name: str, copies: list[Tensor]) -> Tensor:
        """A tensor that all ranks have whole."""
        if all(torch.equal(copies[0], other) for other in copies[1:]):
            return copies[0]
        wide = torch.stack([_wide(copy) for copy in copies])
        if self.average:
            return wide.mean(0).to(copies[0].dtype)
        raise ValueError(
            f"{self.ranks[0].source.parent}: {self.actual[name]} should be alike in all {len(copies)} ranks but differs by up "
            f"to {float((wide.amax(0) - wide.amin(0)).max()):.1e}, as copies drift in SAT's training; take their mean with "
            "--average-replicas"
        )


def _module_of(name: str) -> str:
    """The adapted linear that a factor belongs to; nothing of other tensors."""
    for mark in (FACTOR_A, FACTOR_B):
        if mark in name:
            return name.partition(mark)[0]
    return ""


def _kind(module: str) -> str:
    """``attention.dense`` of ``transformer.layers.3.attention.dense``."""
    return module.split(".", 3)[-1]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
