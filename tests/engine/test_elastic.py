"""A checkpoint of any layout and ZeRO stage is loaded by any other: the same state to the bit, and the same run after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_dist.config.schema import Checkpoint, Train
from cogvideo_dist.engine.checkpoint import Stored
from cogvideo_dist.engine.manifest import Saved
from cogvideo_dist.engine.player import Player
from cogvideo_dist.engine.reshaping import reshape
from cogvideo_dist.engine.saving import Saver
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import reduce_sum
from cogvideo_dist.protocols import Learner
from tests.engine.saved_states import whole_states
from tests.engine.test_layouts import PACKS, config, pack_loss
from tests.ranks import run_ranks

BEFORE, AFTER = 3, 5

RATE = 1.0e-3
"""Of learning, at most."""


@dataclass(frozen=True)
class Way:
    """How a run is spread over ranks."""

    layout: Layout
    stage: int
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.layout.name}-zero{self.stage}-{self.precision}"


SINGLE = Way(Layout(), 0)
WAYS = [
    Way(Layout(dp=4), 1), Way(Layout(dp=2, tp=2), 1), Way(Layout(ulysses=2, tp=2), 2), Way(Layout(dp=2, ring=2), 3), SINGLE,
    Way(Layout(dp=2), 0), Way(Layout(tp=4), 3), Way(Layout(dp=3), 3),
]  # fmt: skip


def player_of(mesh: ParallelMesh, way: Way) -> Player:
    stage: Any = way.stage
    precision: Any = way.precision
    train = Train(
        steps=BEFORE + AFTER,
        learning_rate=RATE,
        zero_stage=stage,
        precision=precision,
        clip_norm=0.5,
        ema_decay=0.9,
        eps=1e-3,  # with less, AdamW makes an update of full size of the rounding of a gradient near zero
    )
    model = DiT(config(), tp=mesh.tp)
    draw_parameters(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02)  # opens the gates, so that every parameter has a gradient
    engine = Engine(model, train, mesh=mesh, micro_steps=-(-PACKS // mesh.dp.size))
    return Player(Learner("", model, train, lambda *_: NotImplemented), engine)


def losses(player: Player, mesh: ParallelMesh, steps: range) -> list[float]:
    """Of every step; each has ``PACKS`` packs, whoever takes them."""
    found, engine = [], player.engine
    rounds = -(-PACKS // mesh.dp.size)
    for step in steps:
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(rounds):
            pack = micro * mesh.dp.size + mesh.dp.rank
            loss = pack_loss(engine, mesh, seed=step * PACKS + min(pack, PACKS - 1)) * float(pack < PACKS)
            engine.backward(loss)
            engine.step(RATE * (step + 1) / (BEFORE + AFTER))
            total += loss.detach().double()
        found.append(reduce_sum(total, mesh.world).item())
    return found


def saves(mesh: ParallelMesh, way: Way, folder: Path) -> list[float]:
    """Some steps, a checkpoint written beside the next ones, and the losses of those."""
    mesh = build_mesh(way.layout, rank=mesh.world.rank)
    player = player_of(mesh, way)
    losses(player, mesh, range(BEFORE))
    saver = Saver(folder, Checkpoint(1), mesh=mesh, say=lambda _: None)
    saver.save(Saved(BEFORE, 0, {}, player.scaler()), [player.state()])
    found = losses(player, mesh, range(BEFORE, BEFORE + AFTER))
    saver.finish()
    saver.close()
    return found


def loads(mesh: ParallelMesh, way: Way, paths: dict[str, Path]) -> dict[str, Any]:
    """From each of several checkpoints: the state as it is then, gathered, and the losses of the next steps."""
    mesh, found = build_mesh(way.layout, rank=mesh.world.rank), {}
    for name, path in paths.items():
        player = player_of(mesh, way)
        player.restore(Stored.open(path))
        state = player.engine.full_state(step=BEFORE)
        found[name] = {"state": state, "losses": losses(player, mesh, range(BEFORE, BEFORE + AFTER))}
    return found


@dataclass(frozen=True)
class Kept:
    """Checkpoints by the way they were written, and the losses that followed."""

    paths: dict[str, Path]
    losses: dict[str, list[float]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    root = tmp_path_factory.mktemp("elastic")
    found = {way.name: run_ranks(saves, way.layout.world, way, root / way.name)[0] for way in WAYS[:5]}
    return Kept({name: root / name / f"step-{BEFORE:06d}" for name in found}, found)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_layout_loads_what_every_layout_saved(kept: Kept, way: Way) -> None:
    check(run_ranks(loads, way.layout.world, way, kept.paths)[0], kept)


def test_a_layout_loads_what_another_saved(tmp_path: Path) -> None:
    """The short form, in which everything differs: tp, sp and dp, and stages 3 and 2."""
    source, target = WAYS[3], WAYS[2]
    found = run_ranks(saves, 4, source, tmp_path)[0]
    path = tmp_path / f"step-{BEFORE:06d}"
    check(run_ranks(loads, 4, target, {source.name: path})[0], Kept({source.name: path}, {source.name: found}))


def check(found: dict[str, Any], kept: Kept) -> None:
    for name, loaded in found.items():
        expected = whole_states(kept.paths[name])
        assert loaded["state"].keys() == expected.keys() == {"weights", "exp_avg", "exp_avg_sq", "ema"}
        for kind, tensors in expected.items():
            assert loaded["state"][kind].keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert torch.equal(loaded["state"][kind][key], tensor), (name, kind, key)
        assert loaded["losses"] == pytest.approx(kept.losses[name], rel=1e-6, abs=0), name


HALF = [Way(Layout(dp=2), 2, "bf16"), pytest.param(Way(Layout(tp=2), 3, "bf16"), marks=pytest.mark.long)]


@pytest.mark.parametrize("way", HALF, ids=lambda way: way.name)
def test_another_precision_loads_it_too(tmp_path: Path, way: Way) -> None:
    """Masters and moments to the bit; the next losses are those of the new precision."""
    source = Way(Layout(), 0)
    run_ranks(saves, 1, source, tmp_path)
    path = tmp_path / f"step-{BEFORE:06d}"
    found = run_ranks(loads, way.layout.world, way, {source.name: path})[0][source.name]
    for kind, tensors in whole_states(path).items():
        assert all(torch.equal(found["state"][kind][key], tensor) for key, tensor in tensors.items()), kind


def test_a_checkpoint_is_written_in_other_pieces_without_the_model(tmp_path: Path) -> None:
    """And back, to the bit; the file count is that of the ranks."""
    run_ranks(saves, 1, SINGLE, tmp_path)
    path, expected = tmp_path / f"step-{BEFORE:06d}", whole_states(tmp_path / f"step-{BEFORE:06d}")
    for tp, replicas in ((1, 3), (2, 2), (4, 1)):
        other = reshape(Stored.open(path), tmp_path / f"{tp}-{replicas}", tp=tp, replicas=replicas)
        stored = Stored.open(other)
        stored.verify()
        assert stored.saved == Stored.open(path).saved
        assert len(stored.manifest["files"]) == 4 * tp * replicas
        back = whole_states(reshape(stored, tmp_path / f"back-{tp}-{replicas}", tp=1, replicas=1))
        for found in (whole_states(other), back):
            for kind, tensors in expected.items():
                assert all(torch.equal(found[kind][key], tensor) for key, tensor in tensors.items()), (
                    tp,
                    replicas,
                    kind,
                )
    found = run_ranks(loads, 2, Way(Layout(tp=2), 1), {"reshaped": tmp_path / "2-2" / path.name})[0]["reshaped"]
    assert all(torch.equal(found["state"]["ema"][key], tensor) for key, tensor in expected["ema"].items())
