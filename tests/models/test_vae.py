"""The VAE against diffusers' AutoencoderKLCogVideoX in float64: outputs, every parameter's gradient and the input's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from cogvideo_dist.convert.vae_config import config_to_diffusers
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models import vae_blocks
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.vae import VAE, Posterior, Semantics, VAEConfig
from cogvideo_dist.rng import fold

CONFIG = VAEConfig(block_out_channels=(8, 16, 16, 24), norm_groups=4, layers_per_block=2)
HEIGHT, WIDTH = 24, 40
TOLERANCE = 1e-9
SEMANTICS: tuple[Semantics, ...] = ("whole", "chunked")


def random(*shape: int, purpose: str) -> Tensor:
    return torch.randn(shape, generator=fold(0, purpose), dtype=torch.float64)


def clip(frames: int, batch: int = 1) -> Tensor:
    return random(batch, 3, frames, HEIGHT, WIDTH, purpose="clip").clamp(-1, 1)


def latents_of(frames: int, batch: int = 1) -> Tensor:
    return random(batch, *CONFIG.latent_shape((frames, HEIGHT, WIDTH)), purpose="latents")


@pytest.fixture(scope="module")
def ours() -> VAE:
    vae = VAE(CONFIG).double()
    for name, parameter in vae.named_parameters():
        # Away from the start, where norms are the identity, so that no mistake can hide.
        parameter.data += 0.2 * random(*parameter.shape, purpose=name)
    return vae


@pytest.fixture(scope="module")
def theirs(ours: VAE) -> Any:
    vae = AutoencoderKLCogVideoX.from_config(config_to_diffusers(CONFIG)).double()
    state = ours.state_dict()
    vae.load_state_dict({row.diffusers: state[row.ours] for row in vae_names(CONFIG)})
    return vae


@pytest.fixture(autouse=True)
def no_gradients(ours: VAE, theirs: Any) -> Iterator[None]:
    yield
    ours.zero_grad()
    theirs.zero_grad()


def assert_close(found: Tensor | None, expected: Tensor | None, what: str, tolerance: float = TOLERANCE) -> None:
    assert found is not None and expected is not None, what
    assert found.shape == expected.shape, what
    error = (found - expected).norm() / expected.norm()
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def assert_same_gradients(ours: VAE, theirs: Any, part: str) -> None:
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for row in vae_names(CONFIG):
        if row.ours.startswith(part):
            assert_close(found[row.ours].grad, expected[row.diffusers].grad, row.ours)


def oracle(theirs: Any, part: str, semantics: Semantics) -> Callable[[Tensor], Tensor]:
    """diffusers' encoder (to mean and log-variance, not clamped) or decoder, in one piece or in its own chunks."""
    if semantics == "whole":
        return lambda x: getattr(theirs, part)(x)[0]
    return theirs._encode if part == "encoder" else lambda z: theirs._decode(z).sample


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_encode_and_its_gradients_equal_diffusers(ours: VAE, theirs: Any, frames: int, semantics: Semantics) -> None:
    video, reference = clip(frames).requires_grad_(), clip(frames).requires_grad_()
    posterior = ours.encode(video, semantics)
    mean, logvar = oracle(theirs, "encoder", semantics)(reference).chunk(2, dim=1)
    assert_close(posterior.mean, mean, "mean")
    assert_close(posterior.logvar, logvar.clamp(-30, 20), "logvar")
    weight, spread = random(*mean.shape, purpose="mean"), random(*mean.shape, purpose="logvar")
    (posterior.mean * weight + posterior.logvar * spread).sum().backward()
    (mean * weight + logvar.clamp(-30, 20) * spread).sum().backward()
    assert_close(video.grad, reference.grad, "video")
    assert_same_gradients(ours, theirs, "encoder")


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_decode_and_its_gradients_equal_diffusers(ours: VAE, theirs: Any, frames: int, semantics: Semantics) -> None:
    latents, reference = latents_of(frames).requires_grad_(), latents_of(frames).requires_grad_()
    found, expected = ours.decode(latents, semantics), oracle(theirs, "decoder", semantics)(reference)
    assert_close(found, expected, "video")
    weight = random(*expected.shape, purpose="video")
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(latents.grad, reference.grad, "latents")
    assert_same_gradients(ours, theirs, "decoder")


@torch.no_grad()
def test_long_clips_in_chunks_and_batches_equal_diffusers(ours: VAE, theirs: Any) -> None:
    assert_close(ours.encode(clip(33), "chunked").mean, theirs.encode(clip(33)).latent_dist.mean, "mean")
    assert_close(ours.decode(latents_of(33), "chunked"), theirs.decode(latents_of(33)).sample, "video")
    for semantics in SEMANTICS:
        both, single = clip(9, batch=2), ours.encode(clip(9, batch=2)[1:], semantics).mean
        assert_close(ours.encode(both, semantics).mean[1:], single, "mean of a batch")


@torch.no_grad()
def test_an_even_number_of_latents_keeps_the_first_frame_rule(
    ours: VAE, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers decides by odd frame counts, so the first upsampling of 2 latents goes wrong there, and only that one."""
    upsample = theirs.decoder.up_blocks[0].upsamplers[0]

    def first_apart(x: Tensor) -> Tensor:
        x = F.interpolate(x.flatten(0, 1), scale_factor=2).unflatten(0, x.shape[:2])
        x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return upsample.conv(x[0].transpose(0, 1)).transpose(0, 1)[None]

    monkeypatch.setattr(upsample, "forward", first_apart)
    expected = theirs.decoder(latents_of(5))[0]
    assert expected.shape[2] == 5
    assert_close(ours.decode(latents_of(5)), expected, "whole")
    assert_close(ours.decode(latents_of(5), "chunked"), expected, "a single chunk")


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 21])
@torch.no_grad()
def test_decoding_gives_back_the_frames_that_were_encoded(ours: VAE, frames: int, semantics: Semantics) -> None:
    posterior = ours.encode(clip(frames), semantics)
    assert posterior.mean.shape[1:] == CONFIG.latent_shape((frames, HEIGHT, WIDTH))
    assert ours.decode(posterior.mode(), semantics).shape == clip(frames).shape


def test_float32_and_its_gradients_agree_with_float64(ours: VAE) -> None:
    """The convolutions of float32 are other routines with another memory layout."""
    single = VAE(CONFIG)
    single.load_state_dict(ours.state_dict())
    noise = random(2, *CONFIG.latent_shape((9, HEIGHT, WIDTH)), purpose="noise")
    weight = random(2, 3, 9, HEIGHT, WIDTH, purpose="weight")
    (ours(clip(9, batch=2), noise)[0] * weight).sum().backward()
    reconstruction, _ = single(clip(9, batch=2).float(), noise.float())
    (reconstruction * weight.float()).sum().backward()
    for (name, found), expected in zip(single.named_parameters(), ours.parameters(), strict=True):
        assert found.grad is not None
        assert_close(found.grad.double(), expected.grad, name, tolerance=1e-3)


def test_forward_is_encode_draw_decode(ours: VAE) -> None:
    noise = random(1, *CONFIG.latent_shape((9, HEIGHT, WIDTH)), purpose="noise")
    reconstruction, posterior = ours(clip(9), noise)
    expected = ours.encode(clip(9))
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=0)
    torch.testing.assert_close(reconstruction, ours.decode(expected.draw(noise)), rtol=0, atol=0)


def test_splitting_a_convolution_over_time_changes_nothing(ours: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    video, split = clip(9).requires_grad_(), clip(9).requires_grad_()
    ours.encode(video).mean.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in ours.encoder.named_parameters()}
    ours.zero_grad()
    monkeypatch.setattr(vae_blocks, "LARGEST_CONV", 5 * 8 * HEIGHT * WIDTH)
    ours.encode(split).mean.square().sum().backward()
    assert_close(split.grad, video.grad, "video")
    for name, parameter in ours.encoder.named_parameters():
        assert_close(parameter.grad, expected[name], name)


def test_statistics_of_16_bit_activations_far_from_zero_stay_exact() -> None:
    x = random(2, 8, 3, 4, 4, purpose="x").float() + 100
    mean, m2 = vae_blocks.Moments.apply(x.bfloat16(), 4)
    exact = x.bfloat16().double().unflatten(1, (4, 2)).flatten(2)
    assert mean.dtype == m2.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double() / exact.shape[2], exact.var(2, correction=0), rtol=1e-4, atol=0)


def test_a_posterior_sample_is_reproducible_and_its_kl_is_that_of_torch() -> None:
    mean, logvar = random(2, 4, 3, 2, 2, purpose="mean"), random(2, 4, 3, 2, 2, purpose="logvar")
    posterior = Posterior(mean, logvar)
    torch.testing.assert_close(posterior.sample(fold(1, "a")), posterior.sample(fold(1, "a")), rtol=0, atol=0)
    assert not torch.equal(posterior.sample(fold(1, "a")), posterior.sample(fold(2, "a")))
    noise = torch.randn(mean.shape, generator=fold(1, "a"))
    assert_close(posterior.sample(fold(1, "a")), mean + (logvar / 2).exp() * noise, "sample")
    normal, standard = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    assert_close(posterior.kl(), torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1), "kl")


def test_the_same_seed_draws_the_same_weights() -> None:
    first, second = VAE(CONFIG), VAE(CONFIG)
    draw_parameters(first, 3)
    draw_parameters(second, 3)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert first.decoder.norm_out.weight.eq(1).all() and first.decoder.norm_out.bias.eq(0).all()
    kernel = first.encoder.conv_in.weight
    assert kernel.abs().max() <= (3 * 27) ** -0.5 and kernel.std() > 0.5 * (3 * 27) ** -0.5


def test_the_vae_has_no_buffers_and_needs_no_memory_on_the_meta_device() -> None:
    with torch.device("meta"):
        vae = VAE(VAEConfig())
        assert vae.decode(vae.encode(torch.empty(1, 3, 5, 48, 72), "chunked").mode()).shape == (1, 3, 5, 48, 72)
    assert not list(vae.buffers())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 24, 40), "nearest is 5"),
        ((1, 3, 8, 24, 40), "nearest is 9"),
        ((1, 3, 5, 20, 40), "height 20"),
        ((1, 3, 5, 24, 45), "width 45.*nearest is 48"),
        ((1, 4, 5, 24, 40), r"\[batch, 3, frames"),
        ((3, 5, 24, 40), r"\[batch, 3, frames"),
    ],
)
def test_illegal_clips_are_refused_with_the_nearest_legal_size(ours: VAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.encode(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_groups": 3},
        {"temporal_compression": 3},
        {"temporal_compression": 16},
        {"block_out_channels": ()},
        {"latent_channels": 0},
        {"scaling_factor": -1.0},
    ],
)
def test_an_impossible_configuration_is_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        VAEConfig(**changes)  # type: ignore[arg-type]
