"""Adversarial losses against plain arithmetic, and the autoencoder's whole loss split in time over ranks, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvideo_dist.models.adversarial import (
    LastConvolution,
    adaptive_weight,
    balanced,
    critic_hinge,
    decoder_hinge,
    gradient_penalty,
)
from cogvideo_dist.models.critic import Critic, CriticConfig
from cogvideo_dist.models.perceptual import Perceptual
from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.parallel.frames import Shards, Whole, frames_of, latent_shares
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import reduce_sum
from tests.ranks import run_ranks

CONFIG = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=2, norm_groups=2)
BOUND = 1e-12
HEIGHT, WIDTH = 16, 16
Tensors = dict[str, Tensor]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: nn.Module) -> nn.Module:
    module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=i) * 0.3)
    return module


def models() -> tuple[VAE, Critic]:
    vae, critic = filled(VAE(CONFIG)), filled(Critic(CriticConfig(channels=(4, 6, 8))))
    assert isinstance(vae, VAE) and isinstance(critic, Critic)
    return vae, critic


def test_hinge_losses_are_sums_over_logits() -> None:
    real, made = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.5], [-1.0, 3.0]])
    assert critic_hinge(real, made).item() == (0 + 0.5 + 2 + 0) + (0 + 1.5 + 0 + 4)
    assert decoder_hinge(made).item() == -0.5
    assert critic_hinge(real.bfloat16(), made.bfloat16()).dtype == torch.float32


def test_the_gradient_penalty_and_its_gradient_are_those_of_a_formula() -> None:
    """For logits a . x^3 summed, the gradient is 3 a x^2 and the penalty 9 a^2 x^4."""
    a, x = drawn(6, seed=1).requires_grad_(), drawn(6, seed=2).requires_grad_()
    penalty = gradient_penalty(a * x**3, x)
    torch.testing.assert_close(penalty, (9 * a**2 * x**4).sum())
    penalty.backward()
    torch.testing.assert_close(a.grad, 18 * a.detach() * x.detach() ** 4)


def test_nodes_of_the_penalty_are_numbered_with_those_of_the_critic() -> None:
    """Their order decides who communicates first; a device's own thread would count from a start of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    critic, video = models()[1].to(device), drawn(1, 3, 5, 8, 8, seed=1).to(device).requires_grad_()
    logits = critic(video)
    penalty = gradient_penalty(logits, video)
    of_critic, of_both = numbers(logits), numbers(penalty)
    assert max(of_critic) == logits.grad_fn._sequence_nr()
    assert min(of_both - of_critic) > max(of_critic)


def numbers(output: Tensor) -> set[int]:
    """Those of the graph of ``output``, leaves apart, which count nothing."""
    found: set[int] = set()
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and type(node).__name__ != "AccumulateGrad" and node._sequence_nr() not in found:
            found.add(node._sequence_nr())
            nodes += [following for following, _ in node.next_functions]
    return found


def test_the_critics_penalty_has_the_slope_of_finite_differences() -> None:
    critic, video = models()[1], drawn(1, 3, 5, 8, 8, seed=1).requires_grad_()
    gradient_penalty(critic(video), video).backward()
    step = 1e-6
    for name, parameter in critic.named_parameters():
        if name == "conv_out.bias":  # does not bend the gradient
            continue
        direction, values = drawn(*parameter.shape, seed=9), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            values.append(gradient_penalty(critic(video), video).item())
            with torch.no_grad():
                parameter -= sign * step * direction
        assert parameter.grad is not None
        found = (parameter.grad * direction).sum().item()
        assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-5), name


def test_the_balance_is_that_of_two_backwards_and_leaves_the_critic_alone() -> None:
    """Two sizes of clips in one pack."""
    vae, critic = models()
    weight = vae.decoder.conv_out.weight
    clips = [(drawn(2, 3, t, 16, 16, seed=t), drawn(2, 2, 1 + t // 4, 2, 2, seed=t + 1)) for t in (1, 5)]

    def losses(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        error = sum((output - video).abs().sum() for output, (video, _) in zip(outputs, clips)) / 1e4
        return error, sum(decoder_hinge(critic(output)) for output in outputs) / 1e3

    reconstruction, adversarial = losses([vae(video, noise)[0] for video, noise in clips])
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (reconstruction, adversarial))
    factor = (first.norm() / second.norm()).item()
    expected = reconstruction + factor * adversarial
    gradients = torch.autograd.grad(2 * expected, list(vae.parameters()))

    with LastConvolution(vae.decoder.conv_out) as last:
        outputs = [vae(video, noise)[0] for video, noise in clips]
    copies = [output.detach().requires_grad_() for output in outputs]
    reconstruction, adversarial = losses(copies)
    total, found = balanced(outputs, copies, reconstruction=reconstruction, adversarial=adversarial, last=last)
    assert found.item() == pytest.approx(factor, rel=1e-12) and total.item() == pytest.approx(
        expected.item(), rel=1e-12
    )
    (2 * total).backward()
    for (name, parameter), gradient in zip(vae.named_parameters(), gradients):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() <= BOUND * gradient.abs().max(), name
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_the_adaptive_weight_is_limited_and_does_not_know_the_scale_of_a_share() -> None:
    a, b = torch.tensor(3.0), torch.tensor(2.0)
    assert adaptive_weight(a, b, limit=1e4).item() == 1.5
    assert adaptive_weight(a * 1e-12, b * 1e-12, limit=1e4).item() == pytest.approx(1.5)
    assert adaptive_weight(a, b * 1e-9, limit=1e4).item() == pytest.approx(1e4)
    assert adaptive_weight(a, torch.tensor(0.0), limit=1e4).item() == pytest.approx(1e4)
    assert adaptive_weight(torch.tensor(0.0), torch.tensor(0.0), limit=1e4).item() == 0


def shares(video: Tensor, noise: Tensor, *, time: Whole | Shards, axis: Axis, totals: tuple[int, int]) -> Tensors:
    """A step's shares of all losses over global counts, and every gradient: first the autoencoder's, then the critic's."""
    vae, critic = models()
    perceptual = Perceptual("vgg", weights="random", chunk=8).double()
    pixels, logits = totals
    with LastConvolution(vae.decoder.conv_out) as last:
        output, posterior = vae(video, noise, time=time)
    copy = output.detach().requires_grad_()
    seen = ((copy - video).abs().sum() + perceptual(copy, video).sum()) / pixels
    judged = decoder_hinge(critic(copy, time=time)) / logits
    total, factor = balanced([output], [copy], reconstruction=seen, adversarial=judged, last=last, axis=axis)
    loss = total + 0.1 * posterior.kl().sum() / pixels
    loss.backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    output = output.detach()
    hinge = critic_hinge(critic(video, time=time), critic(output, time=time)) / logits
    hinge.backward()
    real = video.clone().requires_grad_()
    penalty = 5 * gradient_penalty(critic(real, time=time), real) / pixels
    penalty.backward()
    found = {"output": output, "factor": factor, "loss": loss, "hinge": hinge, "penalty": penalty}
    for which, model in (("vae", vae), ("critic", critic)):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            found[f"{which}.{name}"] = parameter.grad
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def clip(frames: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    video = drawn(1, 3, frames, HEIGHT, WIDTH, seed=3)
    noise = drawn(1, 2, 1 + (frames - 1) // 4, HEIGHT // 8, WIDTH // 8, seed=2)
    return video, noise, (video.numel(), frames * HEIGHT * WIDTH // 16)


def compare(mesh: ParallelMesh, folder: str, clips: tuple[int, ...]) -> dict[str, float]:
    axis = build_mesh(Layout(ulysses=mesh.world.size, cp=mesh.world.size), rank=mesh.world.rank).cp
    errors = {}
    for frames in clips:
        expected = load_file(f"{folder}/{frames}.safetensors")
        video, noise, totals = clip(frames)
        split = latent_shares(noise.shape[2], axis.size)
        own = slice(sum(split[: axis.rank]), sum(split[: axis.rank + 1]))
        mine = frames_of(split, axis.rank, compression=4)
        piece = slice(mine.start, mine.stop)
        found = shares(video[:, :, piece], noise[:, :, own], time=Shards(axis), axis=axis, totals=totals)
        for name, whole in expected.items():
            if name == "output":
                a, b = found[name], whole[:, :, piece]
            else:
                a, b = (found[name] if name == "factor" else reduce_sum(found[name], axis)), whole
            errors[f"{frames} {name}"] = ((a - b).abs().max() / whole.abs().max()).item()
    return errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``save_alone`` keeps what one process finds."""
    return tmp_path_factory.mktemp("alone")


def save_alone(folder: Path, frames: int) -> None:
    """What one process finds for a clip, once for all tests."""
    file = folder / f"{frames}.safetensors"
    if not file.exists():
        video, noise, totals = clip(frames)
        save_file(shares(video, noise, time=Whole(), axis=Axis("cp"), totals=totals), file)


LONGER = [
    (4, (25,)),
    (3, (17, 21)),
    (2, (13,)),
    (2, (29, 33)),
    (2, (49,)),
    (3, (29, 33)),
    (3, (49,)),
    (4, (29, 33)),
    (4, (49,)),
]


@pytest.mark.parametrize(
    ("ranks", "clips"),
    [(2, (9, 17)), *(pytest.param(*case, marks=pytest.mark.long) for case in LONGER)],
)
def test_the_whole_loss_split_in_time_is_that_of_one_process(ranks: int, clips: tuple[int, ...], alone: Path) -> None:
    for frames in clips:
        save_alone(alone, frames)
    for found in run_ranks(compare, ranks, str(alone), clips):
        assert max(found.values()) <= BOUND, max(found, key=lambda name: found[name])


def test_one_frame_has_every_loss() -> None:
    video, noise, totals = clip(1)
    found = shares(video, noise, time=Whole(), axis=Axis("cp"), totals=totals)
    assert all(tensor.isfinite().all() for tensor in found.values()) and found["factor"] > 0
