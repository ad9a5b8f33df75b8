"""LPIPS over frames: the package's distances, sums over frames, and memory that does not change them."""

from __future__ import annotations

import sys
from pathlib import Path

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cogvideo_dist.models.perceptual import SMALLEST, Perceptual

BOUND = 1e-12


def clips(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return first, second


def backbone(perceptual: Perceptual) -> dict[str, Tensor]:
    """As torchvision names it."""
    state = perceptual.network.net.state_dict()
    return {"features." + name.split(".", 1)[1]: tensor.float() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def vgg() -> Perceptual:
    return Perceptual("vgg", weights="random").double()


@pytest.mark.parametrize("net", list(SMALLEST))
def test_the_distance_is_the_packages_summed_over_frames(net: str, tmp_path: Path) -> None:
    mine = Perceptual(net, weights="random", chunk=2).double()
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).double()
    theirs.net.load_state_dict(mine.network.net.state_dict())
    size = max(SMALLEST[net], 16)
    output, video = clips(2, 3, 3, size, size + 8)
    output.requires_grad_()
    found = mine(output, video)
    frames = [theirs(output[:, :, t], video[:, :, t]).flatten() for t in range(3)]
    torch.testing.assert_close(found, torch.stack(frames).sum(0), rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad((found * weights).sum(), output)
    (expected,) = torch.autograd.grad((torch.stack(frames).sum(0) * weights).sum(), output)
    assert slope.isfinite().all() and slope.abs().max() > 0
    usable = expected.isfinite()  # the package's is not a number where all channels of a place are zero
    assert (slope - expected)[usable].abs().max() <= BOUND * slope.abs().max() and usable.any()


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r'pip install "cogvideo_dist\[vae\]"'):
        Perceptual(weights="random")


def test_neither_chunks_nor_a_split_in_time_change_it(vgg: Perceptual) -> None:
    output, video = clips(2, 3, 4, 16, 16)
    output.requires_grad_()
    vgg.chunk = 8
    whole = vgg(output, video)
    (expected,) = torch.autograd.grad(whole.sum(), output)
    for chunk in (1, 3):
        vgg.chunk = chunk
        found = vgg(output, video)
        split = sum(vgg(output[:, :, part], video[:, :, part]) for part in (slice(0, 2), slice(2, 4)))
        for distance in (found, split):
            torch.testing.assert_close(distance, whole, rtol=BOUND, atol=0)
            (slope,) = torch.autograd.grad(distance.sum(), output)
            assert (slope - expected).abs().max() <= BOUND * expected.abs().max()


def test_backward_computes_the_features_again_chunk_by_chunk(vgg: Perceptual) -> None:
    """What is kept for backward are the clips, not features."""
    output, video = clips(1, 3, 4, 16, 16)
    vgg.chunk = 2
    sizes: list[int] = []

    def keep(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        vgg(output.requires_grad_(), video)
    assert max(sizes, default=0) <= output.numel()


def test_equal_clips_are_at_no_distance_and_flat_ones_have_a_gradient(vgg: Perceptual) -> None:
    video = torch.zeros(1, 3, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    distance = vgg(video, torch.zeros_like(video))
    assert distance.item() == 0
    (slope,) = torch.autograd.grad(vgg(video, torch.ones_like(video)).sum(), video)
    assert slope.isfinite().all()


def test_it_is_frozen_and_draws_from_its_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, third = (Perceptual("squeeze", weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    name = "net.slice2.3.squeeze.weight"
    one, same, other = (found.network.get_parameter(name) for found in (first, second, third))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_backbone_comes_from_either_kind_of_file(tmp_path: Path) -> None:
    drawn = Perceptual("squeeze", weights="random", seed=5)
    state = backbone(drawn) | {"classifier.1.weight": torch.zeros(2)}
    save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pth")
    for suffix in ("safetensors", "pth"):
        found = Perceptual("squeeze", weights=tmp_path / f"net.{suffix}")
        for name, parameter in drawn.named_parameters():
            assert torch.equal(found.get_parameter(name), parameter), name


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, vgg: Perceptual) -> None:
    with pytest.raises(ValueError, match='no perceptual network "resnet"; there are vgg, alex, squeeze'):
        Perceptual("resnet", weights="random")
    with pytest.raises(ValueError, match=r"are no file; give torchvision's vgg"):
        Perceptual("vgg", weights=tmp_path / "missing.pth")
    (tmp_path / "net.bin").touch()
    with pytest.raises(ValueError, match=r"are \.safetensors or \.pth"):
        Perceptual("vgg", weights=tmp_path / "net.bin")
    state = backbone(Perceptual("squeeze", weights="random"))
    save_file(state, tmp_path / "squeeze.safetensors")
    with pytest.raises(ValueError, match=r"as features\.0\.weight; alex needs \[64, 3, 11, 11\]"):
        Perceptual("alex", weights=tmp_path / "squeeze.safetensors")
    with pytest.raises(ValueError, match="frames of 8x16 pixels; the perceptual network vgg takes 16x16"):
        vgg(*clips(1, 3, 1, 8, 16))
    with pytest.raises(ValueError, match="clips of shapes"):
        vgg(clips(1, 3, 1, 16, 16)[0], clips(1, 3, 2, 16, 16)[1])
