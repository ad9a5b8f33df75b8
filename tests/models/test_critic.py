"""The critic: plain arithmetic, what its logits see, and a clip split in time over ranks, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_dist.models.adversarial import critic_hinge, gradient_penalty
from cogvideo_dist.models.critic import Critic, CriticConfig
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.parallel.frames import Shards, Whole, frames_of, latent_shares
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import reduce_sum
from tests.models.drawing import drawn, randomised
from tests.ranks import run_ranks

CONFIG = CriticConfig(channels=(4, 6, 8))
BOUND = 1e-12


def model() -> Critic:
    found = Critic(CONFIG).double()
    randomised(found)
    return found


def plain(critic: Critic, video: Tensor) -> Tensor:
    """Three layers and a last one, written out; the repeated frame and the zeros around it by padding."""

    def past(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate")

    p = dict(critic.named_parameters())
    x = F.conv3d(past(video), p["layers.0.conv.weight"], p["layers.0.conv.bias"], stride=(1, 2, 2), padding=(0, 1, 1))
    x = torch.where(x > 0, x, 0.2 * x)
    for i, (stride, padding) in ((1, ((1, 2, 2), (0, 1, 1))), (2, ((1, 1, 1), (0, 1, 1)))):
        x = F.conv3d(past(x), p[f"layers.{i}.conv.weight"], p[f"layers.{i}.conv.bias"], stride=stride, padding=padding)
        x = x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-6) * p[f"layers.{i}.norm.weight"].view(1, -1, 1, 1, 1)
        x = torch.where(x > 0, x, 0.2 * x)
    return F.conv3d(past(x), p["conv_out.weight"], p["conv_out.bias"], padding=(0, 1, 1))


@pytest.mark.parametrize("frames", [1, 9])
def test_logits_and_gradients_are_those_of_plain_arithmetic(frames: int) -> None:
    critic, video = model(), drawn(2, 3, frames, 16, 24, seed=1).requires_grad_()
    logits, expected = critic(video), plain(critic, video)
    assert logits.shape == (2, 1, *CONFIG.logits((frames, 16, 24)))
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    leaves, y = [video, *critic.parameters()], drawn(*logits.shape, seed=2)
    for mine, other in zip(torch.autograd.grad(logits, leaves, y), torch.autograd.grad(expected, leaves, y)):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_any_clip_has_logits_of_the_size_that_is_said() -> None:
    critic = model()
    for size in ((1, 8, 8), (2, 7, 9), (1, 1, 1), (5, 16, 13), (3, 33, 2)):
        assert critic(drawn(1, 3, *size, seed=1)).shape == (1, 1, *CONFIG.logits(size))


def test_a_logit_sees_its_patch_and_the_frames_before() -> None:
    critic, video = model(), drawn(1, 3, 14, 48, 48, seed=1)
    changed = video.clone()
    changed[:, :, 6, 20, 20] += 1
    places = (critic(video) - critic(changed)).abs()[0, 0].nonzero()
    assert places[:, 0].min() == 6 and places[:, 0].max() == 13  # four convolutions of three frames
    assert places[:, 1:].min() >= 2 and places[:, 1:].max() <= 8  # of 12


def test_a_convolution_too_large_for_its_kernels_runs_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    critic, video = model(), drawn(1, 3, 9, 16, 13, seed=1)
    expected = critic(video)
    monkeypatch.setattr("cogvideo_dist.models.vae_blocks.LARGEST_CONV", 4 * 4 * 16 * 14)
    torch.testing.assert_close(critic(video), expected, rtol=1e-13, atol=1e-13)


def test_a_clip_starts_like_the_image_of_its_first_frame() -> None:
    critic, video = model(), drawn(1, 3, 5, 16, 16, seed=1)
    torch.testing.assert_close(critic(video)[:, :, :1], critic(video[:, :, :1]), rtol=1e-13, atol=1e-13)


def test_weights_are_drawn_by_name() -> None:
    first, second = Critic(CONFIG), Critic(CONFIG)
    draw_parameters(first, 3)
    draw_parameters(second, 3)
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(a, b) and ((".norm." in name) == bool((a == 1).all())), name
    assert first.layers[0].conv.weight.abs().max() <= (3 * 3 * 4 * 4) ** -0.5


def test_a_critic_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="channels are"):
        CriticConfig(channels=())
    with pytest.raises(ValueError, match="in_channels is 0"):
        CriticConfig(in_channels=0)


def run(critic: Critic, real: Tensor, *, made: Tensor, time: Whole | Shards) -> dict[str, Tensor]:
    """Logits, this rank's shares of hinge and R1, and gradients of the clips by the first and of the weights by both."""
    real, made = real.clone().requires_grad_(), made.clone().requires_grad_()
    logits = critic(real, time=time)
    critic_hinge(logits, critic(made, time=time)).backward()
    found = {f"hinge {name}": parameter.grad.clone() for name, parameter in critic.named_parameters()}
    found |= {"logits": logits.detach(), "made": made.grad, "real": real.grad}
    critic.zero_grad()
    real = real.detach().requires_grad_()
    penalty = gradient_penalty(critic(real, time=time), real)
    penalty.backward()
    found |= {"penalty": penalty.detach(), "real twice": real.grad}
    for name, parameter in critic.named_parameters():
        # the last bias does not bend the gradient
        found[f"penalty {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def compare(mesh: ParallelMesh, clips: tuple[int, ...]) -> dict[str, float]:
    axis = build_mesh(Layout(ulysses=mesh.world.size, cp=mesh.world.size), rank=mesh.world.rank).cp
    errors = {}
    for frames in clips:
        shares = latent_shares(1 + (frames - 1) // 4, axis.size)
        mine = frames_of(shares, axis.rank, compression=4)
        piece = slice(mine.start, mine.stop)
        real, made = (drawn(1, 3, frames, 8, 12, seed=seed) for seed in (1, 2))
        expected = run(model(), real, made=made, time=Whole())
        found = run(model(), real[:, :, piece], made=made[:, :, piece], time=Shards(axis))
        for name, whole in expected.items():
            clip = name in ("logits", "made", "real", "real twice")
            a, b = (found[name], whole[:, :, piece]) if clip else (reduce_sum(found[name], axis), whole)
            errors[f"{frames} {name}"] = ((a - b).abs().max() / whole.abs().max().clamp_min(1e-9)).item()
    return errors


@pytest.mark.parametrize(
    ("ranks", "clips"), [(2, (9, 13, 17, 21, 29, 33, 49)), (3, (17, 29, 33, 49)), (4, (25, 29, 33, 49))]
)
def test_a_clip_split_in_time_is_judged_as_the_whole_clip(ranks: int, clips: tuple[int, ...]) -> None:
    for found in run_ranks(compare, ranks, clips):
        assert max(found.values()) <= BOUND, max(found, key=lambda name: found[name])
