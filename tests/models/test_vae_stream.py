"""Streams through the VAE: equal to the whole call, however they are cut, and of a memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideo_dist.convert.vae_config import config_to_diffusers
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.models.vae_stream import recut
from cogvideo_dist.models.vae_tiles import Tiling
from cogvideo_dist.rng import fold

CONFIG = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=4, norm_groups=2)
HEIGHT, WIDTH = 16, 24
TOLERANCE = 1e-9


def drawn(*shape: int, purpose: str) -> Tensor:
    return torch.randn(shape, generator=fold(0, purpose), dtype=torch.float64)


def random_vae(config: VAEConfig) -> VAE:
    """Away from its start in every parameter."""
    model = VAE(config).double()
    for name, parameter in model.named_parameters():
        parameter.data += 0.2 * drawn(*parameter.shape, purpose=name)
    return model.requires_grad_(False)


def clip(frames: int) -> Tensor:
    return drawn(2, 3, frames, HEIGHT, WIDTH, purpose="clip").clamp(-1, 1)


def latents_of(frames: int) -> Tensor:
    return drawn(2, *CONFIG.latent_shape((frames, HEIGHT, WIDTH)), purpose="latents")


@pytest.fixture(scope="module")
def vae() -> VAE:
    return random_vae(CONFIG)


@pytest.fixture(scope="module")
def theirs(vae: VAE) -> Any:
    model = AutoencoderKLCogVideoX.from_config(config_to_diffusers(CONFIG)).double()
    state = vae.state_dict()
    model.load_state_dict({row.diffusers: state[row.ours] for row in vae_names(CONFIG)})
    return model.requires_grad_(False)


def pieces_of(x: Tensor, lengths: Iterable[int]) -> Iterator[Tensor]:
    """x [B, C, T, H, W] in pieces of these lengths, the last of which repeats."""
    start = length = 0
    lengths = iter(lengths)
    while start < x.shape[2]:
        length = next(lengths, length)
        yield x[:, :, start : start + length]
        start += length


def moments(vae: VAE, pieces: Iterable[Tensor], total: int | None) -> tuple[Tensor, Tensor]:
    found = list(vae.encode_stream(pieces, total=total))
    return torch.cat([p.mean for p in found], dim=2), torch.cat([p.logvar for p in found], dim=2)


CUTS = ((1,), (3,), (8,), (9, 8), (0, 2, 0, 30, 1), (1000,))


@pytest.mark.parametrize("frames", [17, 49, pytest.param(97, marks=pytest.mark.long)])
def test_a_stream_is_the_chunked_call_bit_by_bit_and_diffusers(vae: VAE, theirs: Any, frames: int) -> None:
    video, latents = clip(frames), latents_of(frames)
    posterior, decoded = vae.encode(video, "chunked"), vae.decode(latents, "chunked")
    for lengths in CUTS if frames == 17 else ((5,), (30, 1)):
        for total in (frames, None):
            mean, logvar = moments(vae, pieces_of(video, lengths), total)
            assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar), lengths
        for total in (latents.shape[2], None):
            found = torch.cat(list(vae.decode_stream(pieces_of(latents, lengths), total=total)), dim=2)
            assert torch.equal(found, decoded), lengths
    expected = theirs.encode(video).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(decoded, theirs.decode(latents).sample, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 21])
def test_a_total_puts_the_remainder_first_as_the_call_does(vae: VAE, theirs: Any, frames: int) -> None:
    video, latents = clip(frames), latents_of(frames)
    assert torch.equal(moments(vae, pieces_of(video, (3,)), frames)[0], vae.encode(video, "chunked").mean)
    torch.testing.assert_close(
        moments(vae, pieces_of(video, (3,)), frames)[0], theirs.encode(video).latent_dist.mean, rtol=0, atol=TOLERANCE
    )
    found = list(vae.decode_stream(pieces_of(latents, (1,)), total=latents.shape[2]))
    assert torch.equal(torch.cat(found, dim=2), vae.decode(latents, "chunked"))


def test_without_a_total_the_remainder_comes_last(vae: VAE) -> None:
    shapes = [posterior.mean.shape[2] for posterior in vae.encode_stream(pieces_of(clip(21), (2,)))]
    assert shapes == [3, 2, 1]
    found = list(vae.decode_stream(pieces_of(latents_of(21), (4,))))
    assert [video.shape[2] for video in found] == [9, 8, 4]
    head = list(vae.decode_stream(pieces_of(latents_of(21)[:, :, :5], (4,)), total=5))
    assert all(torch.equal(a, b) for a, b in zip(found, head, strict=False))


def test_results_come_out_before_the_stream_is_read_to_its_end(vae: VAE) -> None:
    read = 0

    def frames() -> Iterator[Tensor]:
        nonlocal read
        for piece in pieces_of(clip(25), (1,)):
            read += 1
            yield piece

    seen = [read for _ in vae.encode_stream(frames())]
    assert seen == [9, 17, 25]


def test_chunks_are_cut_as_diffusers_cuts_them() -> None:
    for total in range(1, 40):
        x = torch.arange(total, dtype=torch.float64).view(1, 1, -1, 1, 1)
        for chunk in (2, 8):
            expected = [
                x[:, :, chunk * i + (total % chunk if i else 0) : chunk * (i + 1) + total % chunk]
                for i in range(max(total // chunk, 1))
            ]
            found = list(recut(pieces_of(x, (1, 5, 2)), chunk=chunk, total=total))
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_flow_through_a_stream(vae: VAE) -> None:
    whole, piecewise = clip(17).requires_grad_(), clip(17).requires_grad_()
    weight = drawn(*vae.encode(clip(17)).mean.shape, purpose="weight")
    (vae.encode(whole, "chunked").mean * weight).sum().backward()
    (moments(vae, pieces_of(piecewise, (3,)), 17)[0] * weight).sum().backward()
    assert whole.grad is not None and piecewise.grad is not None
    torch.testing.assert_close(piecewise.grad, whole.grad, rtol=0, atol=1e-12)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside made and that still live; ``peak`` is the largest count."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.at_most = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self.made:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.at_most += storage.nbytes()
        if self.at_most > self.peak:  # only then can the dead among them matter
            self.made = {key: entry for key, entry in self.made.items() if not entry[0].expired()}
            self.at_most = sum(size for _, size in self.made.values())
            self.peak = max(self.peak, self.at_most)
        return out


def peak(work: Callable[[], Iterator[object]]) -> int:
    with LiveBytes() as count, torch.no_grad():
        for _ in work():
            pass
    return count.peak


SMALL = VAEConfig(block_out_channels=(2, 2, 2, 2), layers_per_block=1, latent_channels=2, norm_groups=1)


def frames_of(count: int) -> Iterator[Tensor]:
    """A clip of 64x64 pixels, frame by frame."""
    return (torch.full((1, 3, 1, 64, 64), i / count) for i in range(count))


def latent_frames_of(count: int) -> Iterator[Tensor]:
    return (torch.full((1, 2, 1, 8, 8), i / count) for i in range(1 + (count - 1) // 4))


STREAMS: dict[str, Callable[[VAE, int], Iterator[object]]] = {
    "encode": lambda vae, count: vae.encode_stream(frames_of(count)),
    "encode, total": lambda vae, count: vae.encode_stream(frames_of(count), total=count),
    "encode, tiles": lambda vae, count: vae.encode_stream(frames_of(count), tiling=Tiling((4, 4), (1, 1))),
    "decode": lambda vae, count: vae.decode_stream(latent_frames_of(count)),
    "decode, total": lambda vae, count: vae.decode_stream(latent_frames_of(count), total=1 + (count - 1) // 4),
    "decode, tiles": lambda vae, count: vae.decode_stream(latent_frames_of(count), tiling=Tiling((4, 4), (1, 1))),
}
LENGTHS = (65, 69, 129, 513, 1021, 1025)


@pytest.mark.parametrize(
    ("stream", "lengths"),
    [
        ("encode, total", (65, 1025)),
        pytest.param("decode", (65, 1025), marks=pytest.mark.long),
        *(pytest.param(name, (65, 257) if "tiles" in name else LENGTHS, marks=pytest.mark.long) for name in STREAMS),
    ],
)
def test_memory_does_not_grow_with_the_clip(stream: str, lengths: tuple[int, ...]) -> None:
    vae = VAE(SMALL)
    peaks = {count: peak(partial(STREAMS[stream], vae, count)) for count in lengths}
    assert peaks[65] > 64 * 64 * 8 * 4 * 2
    for count, found in peaks.items():
        # Of a total of 8k + 5 the first chunk has four frames more, in 69 as in 1,021.
        assert found <= 1.1 * peaks[64 + count % 8], peaks


def test_the_measure_of_memory_sees_what_grows() -> None:
    """The call keeps the whole clip."""
    vae = VAE(SMALL)
    whole = peak(lambda: iter([vae.decode(torch.cat(list(latent_frames_of(65)), dim=2), "chunked")]))
    assert whole > peak(partial(STREAMS["decode"], vae, 65)) + 65 * 64 * 64 * 3 * 2


@pytest.mark.parametrize(
    ("lengths", "total", "message"),
    [
        ((), None, "has no frames"),
        ((0,), None, "has no frames"),
        ((4, 4), None, "clip of 8 frames.*nearest is 9"),
        ((9, 4), 9, "at least 13 frames, but total=9"),
        ((9,), 13, "ended after 9 frames, but total=13"),
        ((9,), 12, "clip of 12 frames.*nearest is 13"),
    ],
)
def test_a_stream_of_another_length_is_refused(
    vae: VAE, lengths: tuple[int, ...], total: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(vae.encode_stream((clip(n)[:, :, :n] for n in lengths), total=total))


def test_pieces_that_do_not_belong_together_are_refused(vae: VAE) -> None:
    with pytest.raises(ValueError, match=r"\(1, 16, 24\) follows pieces with \(2, 16, 24\)"):
        list(vae.encode_stream([clip(9), clip(9)[:1]]))
    with pytest.raises(ValueError, match=r"latents of shape .*\[batch, 4, frames"):
        list(vae.decode_stream([clip(9)]))
    with pytest.raises(ValueError, match="width 20"):
        list(vae.encode_stream([clip(9)[..., :20]]))
    with pytest.raises(ValueError, match="ended after 3 frames, but total=4"):
        list(vae.decode_stream([latents_of(9)], total=4))
