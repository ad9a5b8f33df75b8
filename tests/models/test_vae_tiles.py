"""Tiles with blending against diffusers' ``enable_tiling()`` in float64, and against the whole frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from cogvideo_dist.convert.vae_config import config_to_diffusers
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models.vae import VAE, Semantics, VAEConfig
from cogvideo_dist.models.vae_tiles import Tiling, tiled
from cogvideo_dist.parallel.frames import TimeContext, Whole
from tests.models.test_vae_stream import drawn, peak, pieces_of, random_vae

# Tiles of 6 x 5 latents (24 x 20 pixels) with an overlap of one.
CONFIG = VAEConfig(
    block_out_channels=(4, 4, 8),
    layers_per_block=1,
    latent_channels=4,
    norm_groups=2,
    sample_height=48,
    sample_width=40,
)
UNIT = 4
TOLERANCE = 1e-9


def clip(frames: int, height: int, width: int) -> Tensor:
    return drawn(1, 3, frames, height, width, purpose="clip").clamp(-1, 1)


def latents_of(frames: int, height: int, width: int) -> Tensor:
    return drawn(1, *CONFIG.latent_shape((frames, height, width)), purpose="latents")


@pytest.fixture(scope="module")
def vae() -> VAE:
    return random_vae(CONFIG)


def public(vae: VAE) -> Any:
    """diffusers' model of the same weights."""
    model = AutoencoderKLCogVideoX.from_config(config_to_diffusers(vae.config)).double()
    state = vae.state_dict()
    model.load_state_dict({row.diffusers: state[row.ours] for row in vae_names(vae.config)})
    return model.requires_grad_(False)


@pytest.fixture
def theirs(vae: VAE) -> Any:
    return public(vae)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


SIZES = [
    (24, 20),  # a single tile, not cut
    (48, 48),  # several tiles either way
    (44, 20),  # only the height is larger, yet the width is cut too, where it is larger than a step
    (20, 52),
    (60, 56),  # last tiles narrower than the overlap's complement
]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("frames", [9, 17])
def test_tiles_in_chunks_are_those_of_diffusers(vae: VAE, theirs: Any, frames: int, height: int, width: int) -> None:
    video, latents = clip(frames, height, width), latents_of(frames, height, width)
    theirs.enable_tiling()
    posterior = vae.encode(video, "chunked", tiling=Tiling.of(CONFIG))
    expected = theirs.encode(video).latent_dist
    assert error(posterior.mean, expected.mean) <= TOLERANCE
    assert error(posterior.logvar, expected.logvar) <= TOLERANCE
    assert error(vae.decode(latents, "chunked", tiling=Tiling.of(CONFIG)), theirs.decode(latents).sample) <= TOLERANCE


@pytest.mark.parametrize("tiling", [Tiling((5, 8), (3, 2)), Tiling((4, 4), (2, 2)), Tiling((3, 7))])
def test_other_sizes_and_overlaps_are_those_of_diffusers(vae: VAE, theirs: Any, tiling: Tiling) -> None:
    """Overlaps of more than half a tile, of half, and none."""
    theirs.enable_tiling(tiling.size[0] * UNIT, tiling.size[1] * UNIT)
    factors = [lap / size for lap, size in zip(tiling.overlap, tiling.size, strict=True)]
    theirs.tile_overlap_factor_height, theirs.tile_overlap_factor_width = factors
    video, latents = clip(9, 40, 52), latents_of(9, 40, 52)
    found = vae.encode(video, "chunked", tiling=tiling).mean
    assert error(found, theirs.encode(video).latent_dist.mean) <= TOLERANCE
    assert error(vae.decode(latents, "chunked", tiling=tiling), theirs.decode(latents).sample) <= TOLERANCE


def test_tiles_are_as_far_from_the_whole_frame_as_those_of_diffusers(vae: VAE, theirs: Any) -> None:
    latents = latents_of(17, 60, 56)
    whole = theirs.decode(latents).sample
    theirs.enable_tiling()
    allowed = (theirs.decode(latents).sample - whole).abs().max()
    found = vae.decode(latents, "chunked", tiling=Tiling.of(CONFIG)) - vae.decode(latents, "chunked")
    assert 0 < found.abs().max() <= allowed * (1 + TOLERANCE)


@pytest.mark.parametrize(
    "frames", [1, pytest.param(9, marks=pytest.mark.long), pytest.param(17, marks=pytest.mark.long)]
)
@torch.no_grad()
def test_tiles_of_a_released_frame_are_as_far_from_the_whole_as_those_of_diffusers(frames: int) -> None:
    """480x720 pixels in the nine tiles that both take by default, with as few channels as can be."""
    config = VAEConfig(block_out_channels=(2, 2, 2, 2), layers_per_block=1, latent_channels=2, norm_groups=1)
    vae = random_vae(config)
    theirs = public(vae)
    latents = drawn(1, *config.latent_shape((frames, 480, 720)), purpose="latents")
    whole = vae.decode(latents, "chunked")
    if frames == 9:  # this is the slowest call, and smaller frames have it too
        assert error(whole, theirs.decode(latents).sample) <= TOLERANCE
    theirs.enable_tiling()
    expected = theirs.decode(latents).sample
    found = vae.decode(latents, "chunked", tiling=Tiling.of(config))
    assert error(found, expected) <= TOLERANCE
    assert 0 < (found - whole).abs().max() <= (expected - whole).abs().max() * (1 + TOLERANCE)


@pytest.mark.parametrize("semantics", ["whole", "chunked"])
def test_a_clip_of_one_chunk_has_the_same_tiles_in_both_semantics(vae: VAE, semantics: Semantics) -> None:
    tiling = Tiling.of(CONFIG)
    tile = vae.encode(clip(9, 60, 56)[..., :24, :20], semantics).mean
    found = vae.encode(clip(9, 60, 56), semantics, tiling=tiling).mean
    assert torch.equal(found[..., :5, :4], tile[..., :5, :4])
    assert error(found, vae.encode(clip(9, 60, 56), "whole", tiling=tiling).mean) <= TOLERANCE


def test_whole_semantics_give_every_tile_the_statistics_of_its_whole_clip(vae: VAE) -> None:
    tiling = Tiling((6, 5))
    found = vae.decode(latents_of(17, 48, 40), "whole", tiling=tiling)
    for top, left in ((0, 0), (0, 5), (6, 0), (6, 5)):
        alone = vae.decode(latents_of(17, 48, 40)[..., top : top + 6, left : left + 5])
        place = found[..., UNIT * top : UNIT * (top + 6), UNIT * left : UNIT * (left + 5)]
        torch.testing.assert_close(place, alone, rtol=0, atol=1e-12)


def test_a_stream_of_tiles_is_the_call(vae: VAE) -> None:
    tiling, video, latents = Tiling.of(CONFIG), clip(21, 44, 36), latents_of(21, 44, 36)
    means = [p.mean for p in vae.encode_stream(pieces_of(video, (4,)), total=21, tiling=tiling)]
    assert torch.equal(torch.cat(means, dim=2), vae.encode(video, "chunked", tiling=tiling).mean)
    videos = list(vae.decode_stream(pieces_of(latents, (1,)), total=latents.shape[2], tiling=tiling))
    assert torch.equal(torch.cat(videos, dim=2), vae.decode(latents, "chunked", tiling=tiling))


def test_tiles_of_a_local_map_join_without_a_seam() -> None:
    x = drawn(1, 2, 3, 13, 17, purpose="x")

    def halved_values(tile: Tensor, time: TimeContext) -> Tensor:
        return tile / 2

    for tiling in (Tiling((5, 6), (2, 3)), Tiling((4, 4), (3, 3)), Tiling((13, 6)), Tiling((1, 1))):
        places = {(top, left): Whole() for top in range(13) for left in range(17)}
        found = tiled(halved_values, x, times=places, tiling=tiling, units=(1, 1))
        torch.testing.assert_close(found, x / 2, rtol=0, atol=1e-15)


def test_gradients_of_tiles_are_those_of_finite_differences(vae: VAE) -> None:
    latents, weight = latents_of(5, 28, 28), drawn(1, 3, 5, 28, 28, purpose="weight")
    latents.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return (vae.decode(z, tiling=Tiling((5, 4), (2, 1))) * weight).sum()

    (grad,) = torch.autograd.grad(loss(latents), latents)
    direction = drawn(*latents.shape, purpose="direction")
    step = 1e-6
    slope = (loss(latents.detach() + step * direction) - loss(latents.detach() - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=0)


def test_tiles_save_memory(vae: VAE) -> None:
    latents = latents_of(9, 128, 128)
    whole = peak(lambda: iter([vae.decode(latents)]))
    assert peak(lambda: iter([vae.decode(latents, tiling=Tiling((8, 8), (1, 1)))])) < whole / 3


def test_the_default_is_that_of_diffusers_for_every_released_size() -> None:
    for height, width in ((480, 720), (768, 1360), (96, 80)):
        config = VAEConfig(sample_height=height, sample_width=width)
        with torch.device("meta"):
            theirs: Any = AutoencoderKLCogVideoX.from_config(config_to_diffusers(config))
        tiling = Tiling.of(config)
        assert tiling.size == (theirs.tile_latent_min_height, theirs.tile_latent_min_width)
        assert tuple(8 * n for n in tiling.size) == (theirs.tile_sample_min_height, theirs.tile_sample_min_width)
        factors = theirs.tile_overlap_factor_height, theirs.tile_overlap_factor_width
        assert tiling.overlap == tuple(int(size * factor) for size, factor in zip(tiling.size, factors, strict=True))
        steps = tuple(size - lap for size, lap in zip(tiling.size, tiling.overlap, strict=True))
        assert steps == tuple(int(size * (1 - factor)) for size, factor in zip(tiling.size, factors, strict=True))


@pytest.mark.parametrize(("size", "overlap"), [((0, 4), (0, 0)), ((4, 4), (4, 0)), ((4, 4), (0, -1))])
def test_tiles_that_do_not_advance_are_refused(size: tuple[int, int], overlap: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="overlap must be at least 0 and less than the"):
        Tiling(size, overlap)


def test_a_sample_size_below_two_latents_has_no_default_tiles() -> None:
    with pytest.raises(ValueError, match="tiles of height 0"):
        Tiling.of(VAEConfig(sample_height=8))
