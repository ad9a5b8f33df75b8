"""The autoencoder split in time over ranks is the whole clip's: latents, pixels and every gradient, in float64."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor

from cogvideo_dist.models.vae import VAE, VAEConfig
from cogvideo_dist.models.vae_blocks import PAST, CausalConv3d, NormSiLU, matching_frames
from cogvideo_dist.parallel.frames import Shards, Whole, frames_of, latent_shares
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import gather_objects, reduce_sum
from tests.models.drawing import drawn, randomised
from tests.ranks import run_ranks

CONFIG = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=2, norm_groups=2)
BOUND = 1e-12
Tensors = dict[str, Tensor]


def model() -> VAE:
    found = VAE(CONFIG).double()
    randomised(found)
    return found


def run(vae: VAE, video: Tensor, *, noise: Tensor, time: Whole | Shards, totals: tuple[int, int]) -> Tensors:
    """A training step's share of L1, L2 and KL over global counts: outputs, and gradients of the clip and the weights."""
    video = video.clone().requires_grad_()
    out, posterior = vae(video, noise, time=time)
    error = out - video.detach()
    loss = (error.abs() + error.square()).sum() / totals[0] + posterior.kl().sum() / totals[1]
    loss.backward()
    found = {"reconstruction": out.detach(), "mean": posterior.mean.detach(), "logvar": posterior.logvar.detach()}
    assert video.grad is not None
    return found | {"video": video.grad, "loss": loss.detach()}


def compare(mesh: ParallelMesh, clips: tuple[int, ...]) -> dict[str, float]:
    """Errors relative to the largest element, by clip and tensor. Every rank compares its frames, and all gradients."""
    axis = build_mesh(Layout(ulysses=mesh.world.size, cp=mesh.world.size), rank=mesh.world.rank).cp
    errors = {}
    for frames in clips:
        latents = 1 + (frames - 1) // 4
        shares = latent_shares(latents, axis.size)
        mine = frames_of(shares, axis.rank, compression=4)
        own = slice(sum(shares[: axis.rank]), sum(shares[: axis.rank + 1]))
        video, noise = drawn(1, 3, frames, 16, 24, seed=1), drawn(1, 2, latents, 2, 3, seed=2)
        totals = video.numel(), noise.numel()
        whole, split = model(), model()
        expected = run(whole, video, noise=noise, time=Whole(), totals=totals)
        piece = slice(mine.start, mine.stop)
        found = run(split, video[:, :, piece], noise=noise[:, :, own], time=Shards(axis), totals=totals)
        found["loss"] = reduce_sum(found["loss"], axis)
        parts = {"reconstruction": piece, "video": piece, "mean": own, "logvar": own}
        pairs = {name: (found[name], expected[name][:, :, part]) for name, part in parts.items()}
        pairs |= {"loss": (found["loss"], expected["loss"])}
        for (name, p), q in zip(split.named_parameters(), whole.parameters()):
            assert p.grad is not None and q.grad is not None
            pairs[name] = reduce_sum(p.grad, axis), q.grad
        scale = {
            name: expected[name].abs().max() if name in expected else b.abs().max() for name, (_, b) in pairs.items()
        }
        errors |= {f"{frames} {name}": ((a - b).abs().max() / scale[name]).item() for name, (a, b) in pairs.items()}
    return errors


@pytest.mark.parametrize(
    ("ranks", "clips"),
    [
        (2, (9, 13, 17, 21)),
        (3, (17, 29, 33)),
        pytest.param(2, (29, 33, 49), marks=pytest.mark.long),
        pytest.param(3, (49,), marks=pytest.mark.long),
        (4, (25,)),
        pytest.param(4, (29, 33, 49), marks=pytest.mark.long),
    ],
)
def test_a_clip_split_in_time_is_the_whole_clip(ranks: int, clips: tuple[int, ...]) -> None:
    for found in run_ranks(compare, ranks, clips):
        assert max(found.values()) <= BOUND, max(found, key=lambda name: found[name])


def test_every_frame_has_one_rank_and_too_many_ranks_are_refused() -> None:
    for latents in range(1, 30):
        for ranks in range(1, 9):
            if latents >= 2 * ranks - 1:
                shares = latent_shares(latents, ranks)
                pieces = [list(frames_of(shares, rank, compression=4)) for rank in range(ranks)]
                assert list(chain.from_iterable(pieces)) == list(range(1 + 4 * (latents - 1)))
                assert max(shares) - min(shares) <= 1
            else:
                with pytest.raises(ValueError, match=f"the most ranks that serve are {(latents + 1) // 2}$"):
                    latent_shares(latents, ranks)


SERVED = {2: (9, 13, 17, 21, 29, 33, 49), 3: (17, 21, 29, 33, 49), 4: (29, 33, 49)}
"""Ranks -> lengths that they split; the rest of the longest list is refused."""


@pytest.mark.parametrize("ranks", SERVED)
def test_only_clips_with_too_few_frames_to_lend_are_refused_and_before_any_work(ranks: int) -> None:
    for frames in SERVED[2]:
        latents = 1 + (frames - 1) // 4
        if frames in SERVED[ranks]:
            assert min(latent_shares(latents, ranks)[:-1]) >= 2
        else:
            most = (latents + 1) // 2
            with pytest.raises(ValueError, match=f"{latents} latent frames do not split over {ranks} .* are {most}$"):
                latent_shares(latents, ranks)
            # No even or uneven cut would do: each rank but the last lends two frames, and none is empty.
            assert 2 * (ranks - 1) + 1 > latents


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("first", [True, False])
def test_frames_meet_their_cells_and_what_is_lent_is_a_run_of_its_own(each: int, first: bool) -> None:
    for latents in range(2, 6):
        cell_of = [0] * (1 if first else each) + [cell for cell in range(1, latents) for _ in range(each)]
        x = torch.zeros(1, 1, len(cell_of), 1, 1)
        for cells in (torch.zeros(1, 1, latents, 1, 1), torch.zeros(1, 1, 1, 1, 1)):
            runs = matching_frames(x, cells, first=first, lent=PAST)
            assert [f for frames, _ in runs for f in range(len(cell_of))[frames]] == list(range(len(cell_of)))
            for frames, covering in runs:
                run, mine = cell_of[frames], list(range(cells.shape[2]))[covering]
                assert cells.shape[2] == 1 or [mine[i * len(mine) // len(run)] for i in range(len(run))] == run
            lent = len(cell_of[runs[-1][0]])
            assert PAST <= lent <= (PAST if cells.shape[2] == 1 else max(PAST, each))


def traffic(mesh: ParallelMesh) -> list[dict[str, tuple[int, int]]]:
    """What every rank sent in a step's forward and backward of 29 frames, by operation."""
    axis = build_mesh(Layout(ulysses=mesh.world.size, cp=mesh.world.size), rank=mesh.world.rank).cp
    shares = latent_shares(8, axis.size)
    piece = frames_of(shares, axis.rank, compression=4)
    video = drawn(1, 3, 29, 16, 24, seed=1)[:, :, piece.start : piece.stop].requires_grad_()
    out, posterior = model()(video, drawn(1, 2, shares[axis.rank], 2, 3, seed=2), time=Shards(axis))
    (out.sum() + posterior.kl().sum()).backward()
    return gather_objects({op: tuple(sent) for (_, op), sent in axis.ledger.take().items()}, axis)


def asked_of(vae: VAE) -> tuple[int, int, int]:
    """Causal convolutions, the bytes of the two frames that all of them need, and norms, of one clip of 16 x 24."""
    convs = [module for module in vae.modules() if isinstance(module, CausalConv3d)]
    halo: list[int] = []
    for conv in convs:
        conv.register_forward_pre_hook(
            lambda _, args: halo.append(2 * args[0][:, :, 0].numel() * args[0].element_size())
        )
    vae(drawn(1, 3, 9, 16, 24, seed=1), drawn(1, 2, 3, 2, 3, seed=2))
    assert len(halo) == len(convs)
    return len(convs), sum(halo), sum(isinstance(module, NormSiLU) for module in vae.modules())


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_frames_a_convolution_and_a_few_numbers_a_norm_are_sent_each_way(ranks: int) -> None:
    convs, halo, norms = asked_of(model())
    for rank, sent in enumerate(run_ranks(traffic, ranks)[0]):
        lent = sent.pop("left_of")
        # Frames go to the rank on the right, their gradients to the one on the left.
        neighbours = (rank < ranks - 1) + (rank > 0)
        assert lent == (neighbours * convs, neighbours * halo)
        # Count, mean and squared deviations of every group, to all others; their gradients likewise.
        assert sum(calls for calls, _ in sent.values()) == 2 * norms
        assert sum(size for _, size in sent.values()) == 2 * norms * (ranks - 1) * 3 * CONFIG.norm_groups * 8


def test_the_released_model_asks_for_frames_68_times() -> None:
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    counts = [sum(isinstance(m, CausalConv3d) for m in half.modules()) for half in (vae.encoder, vae.decoder)]
    assert counts == [30, 38]


def kept(mesh: ParallelMesh, frames: int) -> float:
    """Bytes of all storages that autograd keeps of a forward for the backward, once each, without parameters."""
    axis = build_mesh(Layout(ulysses=mesh.world.size, cp=mesh.world.size), rank=mesh.world.rank).cp
    shares = latent_shares(1 + (frames - 1) // 4, axis.size)
    piece = frames_of(shares, axis.rank, compression=4)
    vae = model()
    video, noise = drawn(1, 3, len(piece), 16, 16, seed=1), drawn(1, 2, shares[axis.rank], 2, 2, seed=2)
    outside = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = vae(video, noise, time=Shards(axis))
    assert out.shape[2] == len(piece)
    return float(sum(t.untyped_storage().nbytes() for at, t in seen.items() if at not in outside))


def test_saved_activations_fall_with_the_ranks() -> None:
    whole = run_ranks(kept, 1, 97)[0]
    for ranks in (2, 4):
        for found in run_ranks(kept, ranks, 97):
            assert found * ranks / whole == pytest.approx(1.0, abs=0.15)
