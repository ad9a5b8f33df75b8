"""The transformer against diffusers, in float64, outputs and every gradient by name."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from cogvideo_dist.convert.dit_config import dit_config_to_diffusers
from cogvideo_dist.convert.names import dit_rows, from_foreign, to_foreign
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.embed import rope_table
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import RELEASED, DiTConfig, tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.patch import patchify
from cogvideo_dist.pack.shard import SequenceShard

BOUND = 1e-9


def relative(found: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    return (found - expected).abs().max().item() / max(expected.abs().max().item(), floor)


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """By name. A gradient that is zero in exact arithmetic (a key's bias shifts all scores of a query alike) is held to the
    rounding of the others: its scale is at least a millionth of the largest gradient."""
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert relative(found[name], gradient, floor) <= BOUND, name


def randomised(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter random, also those that start at zero or one, so that no gradient vanishes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)


def pair(config: DiTConfig) -> tuple[DiT, CogVideoXTransformer3DModel]:
    ours = DiT(config).double()
    randomised(ours)
    fields = {name: value for name, value in dit_config_to_diffusers(config).items() if name != "_class_name"}
    theirs = CogVideoXTransformer3DModel(**fields).double()
    foreign = to_foreign({name: p.detach() for name, p in ours.named_parameters()}, dit_rows(config), "diffusers")
    theirs.load_state_dict(foreign, strict=True)
    if config.learned_positions:  # a buffer in diffusers, a parameter in SAT and here
        buffer = theirs.patch_embed.pos_embedding
        del theirs.patch_embed.pos_embedding
        theirs.patch_embed.pos_embedding = torch.nn.Parameter(buffer)
    return ours, theirs


def rope_pair(config: DiTConfig, layout: PackLayout) -> tuple[Tensor, Tensor] | None:
    table = rope_table(config, layout.clips, spans=layout.spans(), device=torch.device("cpu"), dtype=torch.float64)
    if table is None:
        return None
    vision = table[layout.clips[0].text : layout.clips[0].tokens]
    return vision.real.repeat_interleave(2, dim=1), vision.imag.repeat_interleave(2, dim=1)


@pytest.fixture
def rotation_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds queries and keys to float32 while rotating them, which costs 3e-9: here its formula in float64."""

    def apply_rotary_emb(x: Tensor, freqs: tuple[Tensor, Tensor]) -> Tensor:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * freqs[0] + torch.stack([-imaginary, real], dim=-1).flatten(-2) * freqs[1]

    monkeypatch.setattr("diffusers.models.embeddings.apply_rotary_emb", apply_rotary_emb)


@pytest.mark.usefixtures("rotation_in_double")
@pytest.mark.parametrize("name", RELEASED)
def test_output_and_every_gradient_equal_diffusers_at_odd_sizes(name: str) -> None:
    config = tiny(name)
    ours, theirs = pair(config)
    t, h, w = config.sample_grid if config.learned_positions else (3, 5, 7)
    text_length = config.text_length if config.positions == "sincos" or config.learned_positions else 5
    shape = (2, t * config.patch[0], config.in_channels, h * 2, w * 2)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64)
    text = torch.randn(2, text_length, config.text_dim, generator=generator, dtype=torch.float64)
    timestep = torch.tensor([7, 801])
    ofs = torch.full((2,), 2.0, dtype=torch.float64) if config.ofs else None
    leaves = [tensor.clone().requires_grad_() for tensor in (latents, text) for _ in range(2)]
    mine_x, their_x, mine_text, their_text = leaves
    images = mine_x[:, :, config.out_channels :] if config.image_channels else None
    found = ours.denoise(mine_x[:, :, : config.out_channels], mine_text, timestep, images, ofs)
    layout = PackLayout((Clip(text_length, (t, h, w)),))
    expected = theirs(their_x, their_text, timestep, ofs=ofs, image_rotary_emb=rope_pair(config, layout)).sample
    assert relative(found, expected) <= BOUND
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    found.backward(cotangent)
    expected.backward(cotangent)
    assert relative(mine_x.grad, their_x.grad) <= BOUND
    assert relative(mine_text.grad, their_text.grad) <= BOUND
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    shapes = {n: p.shape for n, p in ours.named_parameters()}
    expected_grads = from_foreign(gradients, dit_rows(config), column="diffusers", shapes=shapes, source="gradients")
    assert_gradients_equal({n: p.grad for n, p in ours.named_parameters()}, expected_grads)


@pytest.mark.parametrize("grid", [(3, 30, 45), (2, 16, 24), (2, 45, 30), (1, 7, 5)])
def test_rotations_equal_those_of_the_public_pipeline(grid: tuple[int, int, int]) -> None:
    for name in ("cogvideox-5b", "cogvideox1.5-5b"):
        config = RELEASED[name]
        _, base_h, base_w = config.sample_grid
        crop = get_resize_crop_region_for_grid(grid[1:], base_w, base_h)
        kind = "slice" if config.patch[0] > 1 else "linspace"
        cos, sin = get_3d_rotary_pos_embed(64, crop, grid[1:], grid[0], grid_type=kind, max_size=(base_h, base_w))
        found = rope_pair(config, PackLayout((Clip(2, grid),)))
        assert found is not None
        assert relative(found[0], cos.double()) < 1e-5  # theirs are float32 angles of up to 45 radians
        assert relative(found[1], sin.double()) < 1e-5


@pytest.mark.parametrize("name", [name for name in RELEASED if not RELEASED[name].learned_positions])
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_a_pack_equals_its_clips_run_alone(name: str, recompute: Recompute) -> None:
    """Clips of different size, duration, timestep and prompt length; outputs and every gradient; any recomputation."""
    config = tiny(name)
    model = DiT(config, recompute=recompute).double()
    randomised(model)
    alone = DiT(config).double()
    alone.load_state_dict(model.state_dict())
    clips = (Clip(5, (3, 4, 2)), Clip(3, (1, 5, 6)), Clip(0, (2, 2, 3)))
    generator = torch.Generator().manual_seed(2)
    vision = [torch.randn(c.vision, config.patch_features_in, generator=generator, dtype=torch.float64) for c in clips]
    text = [torch.randn(c.text, config.text_dim, generator=generator, dtype=torch.float64) for c in clips]
    timestep = torch.tensor([3, 500, 998])
    ofs = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64) if config.ofs else None
    seq = SequenceShard(PackLayout(clips))
    packed = model(torch.cat(vision), torch.cat(text), timestep=timestep, seq=seq, ofs=ofs)
    singles = torch.cat([
        alone(v, e, timestep=timestep[i : i + 1], seq=SequenceShard(PackLayout((clips[i],))),
              ofs=None if ofs is None else ofs[i : i + 1])
        for i, (v, e) in enumerate(zip(vision, text))
    ])  # fmt: skip
    assert relative(packed, singles) <= BOUND
    cotangent = torch.randn(packed.shape, generator=generator, dtype=torch.float64)
    packed.backward(cotangent)
    singles.backward(cotangent)
    assert_gradients_equal(*({n: p.grad for n, p in m.named_parameters()} for m in (model, alone)))


@pytest.mark.parametrize(("name", "count"), [
    ("cogvideox-2b", 1_693_783_872), ("cogvideox-5b", 5_570_283_072), ("cogvideox-5b-i2v", 5_570_479_680 + 17_776 * 3072),
    ("cogvideox1.5-5b", 5_570_676_352), ("cogvideox1.5-5b-i2v", 5_571_594_880),
])  # fmt: skip
def test_parameter_count_is_the_released_models(name: str, count: int) -> None:
    with torch.device("meta"):
        model = DiT(RELEASED[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_weights_are_a_function_of_seed_and_name() -> None:
    first, second, other = (DiT(tiny("cogvideox-5b")) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        draw_parameters(model, seed)
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(first.blocks[0].qkv.weight, other.blocks[0].qkv.weight)
    assert not torch.equal(first.blocks[0].qkv.weight, first.blocks[1].qkv.weight)


def test_learned_positions_refuse_another_size() -> None:
    config = tiny("cogvideox-5b-i2v")
    model = DiT(config)
    seq = SequenceShard(PackLayout((Clip(config.text_length, (2, 2, 2)),)))
    vision, text = torch.zeros(8, config.patch_features_in), torch.zeros(config.text_length, config.text_dim)
    with pytest.raises(ValueError, match="learned positions serve only"):
        model(vision, text, timestep=torch.tensor([1]), seq=seq)


def test_patches_come_in_the_order_of_the_released_convolution() -> None:
    weight, latent = torch.randn(6, 4, 2, 2), torch.randn(3, 4, 8, 6)
    expected = torch.nn.functional.conv2d(latent, weight, stride=2).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(patchify(latent, (1, 2, 2)) @ weight.flatten(1).t(), expected, atol=1e-6)


def test_saved_activations_shrink_with_recomputation() -> None:
    config = tiny("cogvideox-5b")
    seq = SequenceShard(PackLayout((Clip(6, (4, 8, 8)),)))
    vision, text = torch.randn(256, config.patch_features_in), torch.randn(6, config.text_dim)
    kept = {}
    for recompute in get_args(Recompute):
        model, seen = DiT(config, recompute=recompute), {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(vision, text, timestep=torch.tensor([5]), seq=seq)
        kept[recompute] = sum(size for pointer, size in seen.items() if pointer not in parameters)
    assert kept["full"] < kept["all_but_attention"] < kept["feed_forward"] < kept["none"]
