"""Which transformer the tensors of a SAT checkpoint are of, read off their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from cogvideo_dist.convert.sat_names import MARK, TABLE
from cogvideo_dist.models.presets import PRESETS, RELEASED, DiTConfig

Shape = tuple[int, ...]


def config_of(shapes: Mapping[str, Shape], source: str) -> DiTConfig:
    """The preset whose sizes the tensors have; else, of other sizes, the released model of the same kind with these.

    ``shapes``: of the whole tensors, under SAT's names without the prefix. Sizes of the sample, which no shape tells, are the
    preset's.
    """
    sizes = _sizes(shapes, source)
    for config in PRESETS.values():
        if all(getattr(config, name) == value for name, value in sizes.items()):
            return config
    kind = {name: sizes[name] for name in ("patch", "positions", "learned_positions", "ofs")}
    image = sizes["in_channels"] > sizes["out_channels"]
    for config in RELEASED.values():
        if bool(config.image_channels) == image and all(getattr(config, n) == value for n, value in kind.items()):
            return replace(config, **sizes)
    described = ", ".join(f"{name} {value}" for name, value in sizes.items())
    raise ValueError(f"{source}: a transformer of no released kind ({described}); say which it is with --preset")


def _sizes(shapes: Mapping[str, Shape], source: str) -> dict[str, Any]:
    """The fields of ``DiTConfig`` that shapes tell."""

    def shape(name: str, *dims: int) -> Shape:
        found = shapes.get(name)
        if found is None:
            raise ValueError(f"{source} lacks tensor {name}")
        if len(found) not in dims or not prod(found):
            raise ValueError(f"{source}: tensor {name} has shape {found}, which no CogVideoX transformer has")
        return found

    hidden, text_dim = shape("mixins.patch_embed.text_proj.weight", 2)
    (head_dim,) = shape("mixins.adaln_layer.query_layernorm_list.0.weight", 1)
    projection = shape("mixins.patch_embed.proj.weight", 2, 4)
    patch = (1, *projection[2:]) if len(projection) == 4 else (2, 2, 2)
    channels = projection[1] if len(projection) == 4 else projection[1] // prod(patch)
    out_channels = shape(MARK, 2)[0] // prod(patch)
    layers = {found[1] for name in shapes if (found := re.match(r"transformer\.layers\.(\d+)\.", name))}
    table, image = TABLE in shapes, channels > out_channels
    return {
        "layers": len(layers), "heads": hidden // head_dim, "head_dim": head_dim, "in_channels": channels,
        "out_channels": out_channels, "patch": patch, "positions": "sincos" if table and not image else "rope",
        "learned_positions": table and image, "ofs": "ofs_embed.0.weight" in shapes,
        "time_embed_dim": shape("time_embed.0.weight", 2)[0], "text_dim": text_dim,
    }  # fmt: skip
