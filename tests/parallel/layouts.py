"""The transformer under a parallel layout, and what it must equal: one process, in float64, every gradient by name."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvideo_dist.config.adaptation import LoRA
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.lora import Dropout, adapt
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import TEXT, VISION, Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import reduce_sum
from cogvideo_dist.parallel.split import full_shape, joined_whole, own_slice

Tensors = dict[str, Tensor]


def packs_of(config: DiTConfig) -> tuple[PackLayout, ...]:
    """Per data-parallel rank: a video, an image with another prompt, clips shorter than the ring; 67 and 35 tokens. Models
    with learned positions take one size."""
    if config.learned_positions:
        base = Clip(config.text_length, config.sample_grid)
        return PackLayout((base, base)), PackLayout((base,))
    return (
        PackLayout((Clip(5, (3, 4, 2)), Clip(3, (1, 5, 6)), Clip(0, (1, 1, 2)), Clip(2, (1, 1, 1)))),
        PackLayout((Clip(7, (2, 3, 4)), Clip(0, (1, 2, 2)))),
    )


def whole_parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random wherever a model starts at zero or one, so that no gradient vanishes."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2


def model_of(config: DiTConfig, mesh: ParallelMesh, recompute: Recompute = "none", *, lora: LoRA | None = None) -> DiT:
    model = DiT(config, recompute=recompute, tp=mesh.tp).double()
    if lora is not None:
        adapt(model, lora.adapters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own_slice(model, name, whole_parameter(name, full_shape(model, name, parameter.shape))))
    return model


def inputs(config: DiTConfig, pack: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(pack)
    layout = packs_of(config)[pack]
    text = sum(clip.text for clip in layout.clips)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "vision": draw(layout.vision, config.patch_features_in),
        "text": draw(text, config.text_dim),
        "cotangent": draw(layout.vision, config.patch_features_out),
        "timestep": torch.tensor([3, 500, 998, 77][: len(layout.clips)]),
        "ofs": draw(len(layout.clips)),
    }


def forward(model: DiT, seq: SequenceShard, given: Tensors) -> Tensor:
    """This rank's velocity, and its backward; adapters that drop inputs do."""
    keys = tuple(2**31 - 9 * clip for clip in range(len(seq.layout.clips)))
    out = model(
        seq.mine(given["vision"], VISION), seq.mine(given["text"], TEXT), timestep=given["timestep"], seq=seq,
        ofs=given["ofs"] if model.config.ofs else None, dropout=Dropout(keys),
    )  # fmt: skip
    out.backward(seq.mine(given["cotangent"], VISION))
    return out.detach()


def reference(config: DiTConfig, packs: int, *, lora: LoRA | None = None) -> tuple[list[Tensor], Tensors]:
    """One process that runs all packs."""
    model = model_of(config, ParallelMesh(), lora=lora)
    outs = [forward(model, SequenceShard(packs_of(config)[pack]), inputs(config, pack)) for pack in range(packs)]
    return outs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


Case = tuple[DiTConfig, Recompute] | tuple[DiTConfig, Recompute, LoRA]


def under_layout(mesh: ParallelMesh, case: Case) -> tuple[DiT, Tensor, Tensors]:
    """The whole output of this rank's pack and the whole gradients of every rank's."""
    config, recompute, *lora = case
    model = model_of(config, mesh, recompute, lora=next(iter(lora), None))
    pack = mesh.dp.rank
    seq = SequenceShard(packs_of(config)[pack], mesh)
    out = seq.whole_vision(forward(model, seq, inputs(config, pack)))
    grads = {
        name: joined_whole(model, name, reduce_sum(p.grad, mesh.replica))
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return model, out, grads


def errors(mesh: ParallelMesh, layout: Layout, cases: dict[str, Case]) -> dict[str, float]:
    """Relative errors of the output and of every gradient in every case, by ``case name``. Without rotations the gradient
    of a key's bias is zero in exact arithmetic (it shifts all scores of a query alike): it is held to its weight's scale."""
    mesh = build_mesh(layout, rank=mesh.world.rank)
    found = {}
    for case, (config, recompute, *lora) in cases.items():
        _, out, grads = under_layout(mesh, (config, recompute, *lora))
        outs, expected = reference(config, layout.dp, lora=next(iter(lora), None))
        assert grads.keys() == expected.keys()
        mine = outs[mesh.dp.rank]
        found[f"{case} output"] = ((out - mine).abs().max() / mine.abs().max()).item()
        for name, grad in expected.items():
            scale = max(g.abs().max().item() for g in (grad, expected[name.replace("norm_k.bias", "norm_k.weight")]))
            found[f"{case} {name}"] = (grads[name] - grad).abs().max().item() / scale
    return found


def denoised(mesh: ParallelMesh, config: DiTConfig) -> Tensor:
    """The velocity of two clips, as a sampler asks for it."""
    mesh = build_mesh(Layout(tp=mesh.world.size), rank=mesh.world.rank)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, config.in_channels, 6, 10, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, config.text_dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model_of(config, mesh).denoise(latents, text, torch.tensor([5, 700]))
