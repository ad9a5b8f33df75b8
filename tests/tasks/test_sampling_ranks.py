"""Ranks that share a video make the video of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.tasks.sampling import Ranks
from launch.sampling_setup import sampling_ranks
from tests.ranks import run_ranks
from tests.tasks.samplers import image_for, sampler_of, settings_of, text_of

MODELS = ("cogvideox-5b", "cogvideox1.5-5b-i2v")
SHAPES: dict[int, list[tuple[Layout, int, set[str]]]] = {
    2: [
        (Layout(ulysses=2), 1, {"ulysses"}),
        (Layout(ring=2), 1, {"ring"}),
        (Layout(tp=2), 1, {"tp"}),
        (Layout(dp=2), 2, {"dp", "cp"}),
    ],
    4: [
        (Layout(dp=2, ulysses=2), 4, {"dp", "ulysses", "cp"}),
        (Layout(dp=2, ring=2), 2, {"dp", "ring", "cp"}),
        (Layout(ring=2, ulysses=2), 1, {"ring", "ulysses"}),
    ],
}
"""Number of ranks -> layouts (dp 2 has a guidance branch on each half), ranks that decode together, axes that must be used."""


def on_ranks(mesh: ParallelMesh) -> list[tuple[list[Tensor], list[str]]]:
    """A rank's videos under every layout, and the axes that carried anything."""
    found = []
    for layout, cp, _ in SHAPES[mesh.world.size]:
        ours = build_mesh(layout, rank=mesh.world.rank)
        ranks = sampling_ranks(ours, cp=cp)
        videos = []
        for name in MODELS:
            sampler = sampler_of(name, ours.tp, semantics="whole", ranks=ranks)
            videos.append(sampler.video(text_of(name), settings_of(name, steps=3), seed=5, image=image_for(name)))
        traffic = {**ours.ledger.take(), **ranks.cp.ledger.take()}
        found.append((videos, sorted({axis for axis, _ in traffic})))
    return found


@pytest.fixture(scope="module")
def alone() -> list[Tensor]:
    """The videos of one process."""
    return [
        sampler_of(name, semantics="whole").video(
            text_of(name), settings_of(name, steps=3), seed=5, image=image_for(name)
        )
        for name in MODELS
    ]


@pytest.mark.parametrize("world", SHAPES)
def test_every_layout_of_ranks_samples_the_video_of_one_process(world: int, alone: list[Tensor]) -> None:
    for found in run_ranks(on_ranks, world):
        for (layout, cp, axes), (videos, used) in zip(SHAPES[world], found, strict=True):
            assert axes <= set(used)
            for video, expected in zip(videos, alone, strict=True):
                assert video.shape == expected.shape == (3, 25, 32, 64)
                assert (video - expected).abs().max() <= 1e-5, f"{layout.name}, cp {cp}"
                assert expected.std() > 0.03


CASES = ((1, False), (4, False), (9, False), (9, True))
"""(latent frames, in tiles): one chunk, chunks of an even and of an odd clip; on three ranks a round that is not full."""


def decoded_on_ranks(mesh: ParallelMesh) -> list[tuple[Tensor, list[int]]]:
    """A rank's videos and the lengths of the pieces that they came in."""
    cp = build_mesh(Layout(ulysses=mesh.world.size, cp=mesh.world.size), rank=mesh.world.rank).cp
    return [of_pieces(Ranks(cp=cp), tiling=tiling, latents=latents) for latents, tiling in CASES]


def of_pieces(ranks: Ranks, *, tiling: bool, latents: int) -> tuple[Tensor, list[int]]:
    sampler = sampler_of("cogvideox-5b", vae_tiling=tiling, ranks=ranks)
    sampler.vae.config = replace(sampler.vae.config, sample_height=32, sample_width=64)  # tiles of 2 x 4 latents
    z = torch.randn(latents, 4, 4, 8, generator=torch.Generator().manual_seed(latents))
    pieces = list(sampler.pieces(z))
    return torch.cat(pieces, dim=1), [piece.shape[1] for piece in pieces]


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.long)])
def test_chunks_on_several_ranks_are_those_of_one_process(world: int) -> None:
    for found in run_ranks(decoded_on_ranks, world):
        for (latents, tiling), (video, lengths) in zip(CASES, found, strict=True):
            expected, chunks = of_pieces(Ranks(), tiling=tiling, latents=latents)
            assert (video - expected).abs().max() <= 1e-6
            rounds = [sum(chunks[start : start + world]) for start in range(0, len(chunks), world)]
            assert lengths == rounds, "no rank holds more than a chunk of its own at a time"
            assert sum(lengths) == 1 + 4 * (latents - 1)
