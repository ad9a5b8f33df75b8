"""Adapters against the plain definition: the same model with ``weight + scale * b @ a`` in every linear's place."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from cogvideo_dist.config.adaptation import LINEARS, OTHERS, Adapter, LoRA, Target
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.lora import Dropout, adapt, is_adapter, merge, sites, unmerge
from cogvideo_dist.models.presets import DiTConfig, tiny
from cogvideo_dist.pack.layout import TEXT, VISION, Span
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.parallel.layouts import Tensors, inputs, model_of, packs_of

CONFIG = replace(tiny("cogvideox1.5-5b-i2v"), heads=4)
EVERY = LoRA(rank=3, alpha=6.0, targets=LINEARS + OTHERS, special=(Target("q", rank=2), Target("ff2", alpha=1.0)))


def velocity(model: DiT, given: Tensors, *, dropout: Dropout | None = None, weights: Tensors | None = None) -> Tensor:
    seq = SequenceShard(packs_of(model.config)[0])
    arguments = (seq.mine(given["vision"], VISION), seq.mine(given["text"], TEXT))
    options = {"timestep": given["timestep"], "seq": seq, "ofs": given["ofs"], "dropout": dropout}
    return functional_call(model, weights, arguments, options) if weights else model(*arguments, **options)


def plain(model: DiT, given: Tensors) -> tuple[Tensor, Tensors]:
    """The output and the adapters' gradients with every adapted weight made as one tensor, by autograd alone."""
    bare = DiT(model.config).double()
    factors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if is_adapter(name)}
    weights = {name: p.detach() for name, p in model.named_parameters() if not is_adapter(name)}
    for site in sites(model):
        prefix = f"{site.name}.lora.{site.target}"
        if f"{prefix}.a" in factors:
            name, adapter = f"{site.name}.{site.place.linear}.weight", EVERY.adapters()[site.target]
            update = adapter.alpha / adapter.rank * factors[f"{prefix}.b"] @ factors[f"{prefix}.a"]
            height = len(weights[name]) // site.place.parts
            at = site.place.part * height
            weights[name] = torch.cat(
                [weights[name][:at], weights[name][at : at + height] + update, weights[name][at + height :]]
            )
    out = velocity(bare, given, weights=weights)
    out.backward(given["cotangent"])
    return out.detach(), {name: factor.grad for name, factor in factors.items() if factor.grad is not None}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-10 * expected.abs().max())


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_adapters_compute_what_a_changed_weight_does(recompute: Recompute) -> None:
    model, given = model_of(CONFIG, ParallelMesh(), recompute, lora=EVERY), inputs(CONFIG, 0)
    expected, gradients = plain(model, given)
    out = velocity(model, given)
    out.backward(given["cotangent"])
    assert close(out.detach(), expected)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys() == {name for name, _ in model.named_parameters() if is_adapter(name)}
    for name, gradient in gradients.items():
        scale = max(gradient.abs().max(), gradients[name.replace(".k.", ".q.")].abs().max())
        assert (found[name] - gradient).abs().max() <= 1e-10 * scale, name


def test_merged_weights_are_the_model_with_its_adapters_and_come_back_bit_by_bit() -> None:
    model, given = model_of(CONFIG, ParallelMesh(), lora=EVERY), inputs(CONFIG, 0)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not is_adapter(name)}
    expected = velocity(model, given).detach()
    before = merge(model)
    assert not any(is_adapter(name) for name, _ in model.named_parameters())
    assert close(velocity(model, given).detach(), expected)
    unmerge(model, before)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())
    assert len(before) == len({f"{site.name}.{site.place.linear}" for site in sites(model)})


def test_several_adapters_add_up_with_their_shares() -> None:
    def with_adapters(*shares: float) -> dict[str, Tensor]:
        model = model_of(CONFIG, ParallelMesh())
        for number, share in enumerate(shares):
            adapt(model, LoRA(rank=2, alpha=4.0).adapters())
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if is_adapter(name):
                        p.copy_(
                            torch.randn(p.shape, generator=torch.Generator().manual_seed(number + sum(name.encode())))
                        )
            merge(model, share)
        return {name: p.detach() for name, p in model.named_parameters()}

    base, one, two, both = (with_adapters(*shares) for shares in ((), (1.0,), (0.0, 1.0), (0.5, -2.0)))
    for name, value in base.items():
        assert torch.allclose(both[name] - value, 0.5 * (one[name] - value) - 2 * (two[name] - value), atol=1e-12), name
    assert not torch.equal(one["blocks.0.qkv.weight"], base["blocks.0.qkv.weight"])


def test_a_new_adapter_changes_nothing_and_only_adapters_are_trained() -> None:
    model, given = DiT(tiny("cogvideox-5b")), inputs(tiny("cogvideox-5b"), 0)
    draw_parameters(model, 3)
    given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    before = velocity(model, given | {"ofs": None}).detach()
    adapt(model, LoRA(rank=2, targets=("q", "out", "ff1", "ff2", "modulation", "patch", "proj")).adapters())
    draw_parameters(model, 3)
    assert torch.equal(velocity(model, given | {"ofs": None}).detach(), before)
    assert all(p.requires_grad == is_adapter(name) for name, p in model.named_parameters())
    assert all(p.any() == name.endswith(".a") for name, p in model.named_parameters() if is_adapter(name))


def test_dropout_leaves_out_its_share_alike_wherever_a_token_is() -> None:
    dropout, spans = Dropout((12345, 99)), (Span(0, TEXT, 0, 40), Span(0, VISION, 0, 400), Span(1, VISION, 10, 60))
    whole = dropout.of(spans, linear=7, share=0.3)(torch.ones(490, 256))
    assert abs((whole == 0).float().mean().item() - 0.3) < 0.01
    assert torch.equal(whole[whole != 0].unique(), torch.tensor(1 / 0.7)[None])
    part = dropout.of((Span(0, VISION, 100, 130), Span(1, VISION, 20, 25)), linear=7, share=0.3, first=100)
    assert torch.equal(part(torch.ones(35, 50)), torch.cat([whole[140:170], whole[450:455]])[:, 100:150])
    assert not torch.equal(dropout.of(spans, linear=8, share=0.3)(torch.ones(490, 256)), whole)
    for rows in (whole[:40].mean(0), whole.mean(1)):  # no row or column is favoured
        assert (rows - 1).abs().max() < 0.6


@pytest.mark.parametrize("target", LINEARS)
def test_dropout_acts_on_what_the_adapter_reads(target: str) -> None:
    """The mean over many draws is the output without dropout, to first order in the update; one draw differs."""
    config: DiTConfig = replace(tiny("cogvideox-5b"), layers=1)
    lora = LoRA(rank=2, alpha=1e-3, targets=(target,), dropout=0.5)
    model, given = model_of(config, ParallelMesh(), lora=lora), inputs(config, 0)
    with torch.no_grad():
        sure = velocity(model, given | {"ofs": None})
        bare = model_of(config, ParallelMesh())
        effect = sure - velocity(bare, given | {"ofs": None})
        draws = [
            velocity(model, given | {"ofs": None}, dropout=Dropout((n, n + 1, n + 2, n + 3))) for n in range(0, 1200, 4)
        ]
    assert (draws[0] - sure).norm() > 0.2 * effect.norm()
    assert (torch.stack(draws).mean(0) - sure).norm() < 0.15 * effect.norm()


def test_a_linear_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.targets: this model has no linear ofs1, only ff1"):
        adapt(DiT(tiny("cogvideox-5b")), {"ofs1": Adapter(2, 1.0)})
