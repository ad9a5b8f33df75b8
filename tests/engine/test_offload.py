"""What is kept in the host's memory changes nothing in what is computed, and is really kept there."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import Offload, Train
from cogvideo_dist.engine.inputs import DataLimits
from cogvideo_dist.engine.offload import LEAST, Shelf, Ticket
from cogvideo_dist.engine.trainer import Trainer
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object
from cogvideo_dist.protocols import Batch, Loss
from tests.engine.test_trainer import PACKS, Slope, ToBe, settings
from tests.engine.test_zero import SAVED, job, train_config
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LAYERS = 3
CONFIG = replace(tiny("cogvideox-5b"), layers=LAYERS)
LAYOUT = PackLayout((Clip(16, (3, 8, 8)), Clip(6, (1, 4, 4))))
STREAM = LAYOUT.tokens * CONFIG.hidden * 4
"""Bytes of one float32 tensor of [tokens, hidden]."""


def forward_backward(recompute: Recompute, shelf: Shelf | None) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, every gradient, and the bytes on the shelf between forward and backward."""
    generator = torch.Generator().manual_seed(0)
    model = DiT(CONFIG, recompute=recompute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    vision = torch.randn(LAYOUT.vision, CONFIG.patch_features_in, generator=generator)
    text = torch.randn(22, CONFIG.text_dim, generator=generator)
    with shelf.keeping() if shelf else nullcontext():
        velocity = model(vision, text, timestep=torch.tensor([100, 900]), seq=SequenceShard(LAYOUT))
        loss = (velocity - vision).square().mean()
    kept = shelf.bytes if shelf else 0
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize(("recompute", "streams"), [("none", 10), ("full", 1)])
def test_loss_and_every_gradient_are_the_same_to_the_bit(recompute: Recompute, streams: int) -> None:
    """And a block keeps on the host what it is said to keep: ten tensors of [tokens, hidden], or its input alone."""
    loss, gradients, _ = forward_backward(recompute, None)
    assert len(gradients) == len(list(DiT(CONFIG).parameters()))
    for least in (0, STREAM):  # everything, and what is as large as a block's tensors
        shelf = Shelf(CPU, least=least)
        found, others, kept = forward_backward(recompute, shelf)
        assert torch.equal(found, loss)
        assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())
        assert kept == streams * LAYERS * STREAM if least else kept > streams * LAYERS * STREAM
        assert shelf.bytes == 0, "what a backward has used is dropped"


def test_parameters_small_tensors_and_views_with_gaps_stay() -> None:
    shelf = Shelf(CPU)
    weight = nn.Parameter(torch.randn(300, 300))
    inside = torch.randn(300, 600)[:, :300]
    small = torch.randn(LEAST // 4 - 1)
    for tensor in (weight, weight.t(), weight.view(-1), inside, small):
        assert shelf.pack(tensor) is tensor
    ticket = shelf.pack(torch.randn(300, 300))
    assert isinstance(ticket, Ticket) and shelf.bytes == 300 * 300 * 4


def test_a_tensor_and_its_views_are_copied_once_and_come_back_as_they_lay() -> None:
    shelf, x = Shelf(CPU), torch.randn(200, 300)
    views = [x, x.view(-1), x.t(), x.view(2, 100, 300).transpose(0, 2)]
    tickets = [shelf.pack(view) for view in views]
    assert shelf.bytes == x.nbytes
    for view, ticket in zip(views, tickets):
        back = shelf.unpack(ticket)
        assert torch.equal(back, view) and back.stride() == view.stride()
        assert back.data_ptr() != x.data_ptr()
    x.add_(1)
    assert isinstance(later := shelf.pack(x), Ticket) and later.kept is not tickets[0].kept, "it has changed since"


def test_an_address_that_is_given_again_is_not_confused() -> None:
    """What has gone to the host is freed, and the next tensor of its size may come to lie there."""
    shelf, memory = Shelf(CPU, least=0), bytearray(torch.arange(1000.0).numpy().tobytes())
    x = torch.frombuffer(memory, dtype=torch.float32)
    address, version, first = x.data_ptr(), x._version, shelf.pack(x)
    del x
    memory[:] = torch.arange(1000.0, 2000.0).numpy().tobytes()
    y = torch.frombuffer(memory, dtype=torch.float32)
    assert (y.data_ptr(), y._version) == (address, version)
    assert torch.equal(shelf.unpack(shelf.pack(y)), torch.arange(1000.0, 2000.0))
    assert torch.equal(shelf.unpack(first), torch.arange(1000.0))


def test_what_the_backward_wants_next_is_on_its_way() -> None:
    shelf = Shelf(CPU, ahead=2)
    tickets = [shelf.pack(torch.randn(LEAST)) for _ in range(6)]
    for last in (5, 4, 3, 2, 1, 0):
        shelf.unpack(tickets[last])
        coming = [index for index, ticket in enumerate(tickets) if ticket.kept.here is not None]
        assert coming == [index for index in (last - 2, last - 1) if index >= 0]


def test_a_gradient_of_a_gradient_passes_the_shelf() -> None:
    """As the critic's penalty takes it, within the forward."""

    def penalty(shelf: Shelf | None) -> Tensor:
        x, w = torch.linspace(-1, 1, LEAST).requires_grad_(), torch.tensor(0.7, requires_grad=True)
        with shelf.keeping() if shelf else nullcontext():
            (slope,) = torch.autograd.grad((w * x).sin().exp().sum(), x, create_graph=True)
            loss = slope.square().sum()
        loss.backward()
        return w.grad

    shelf = Shelf(CPU)
    assert torch.equal(penalty(shelf), penalty(None))
    assert shelf.bytes == 0


class Wide(Slope):
    """Keeps two tensors of 2 * LEAST bytes for its backward, and notes what is on the shelf before that."""

    trainer: weakref.ref[Trainer]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        wide = (loss.total * torch.ones(LEAST // 2)).sin().mean()
        trainer = self.trainer()
        self.noted = trainer.engine.shelf.bytes if trainer and trainer.engine.shelf else 0
        return Loss(loss.total + wide, loss.metrics)


def wide(mesh: ParallelMesh, folder: str, offload: Offload) -> tuple[int, float]:
    config = settings(Path(folder), steps=3)
    task = Wide()
    limits = DataLimits(micro_steps=PACKS, tokens_per_pack=2, max_bad_share=0.9)
    config = replace(config, train=replace(config.train, offload=offload))
    trainer = Trainer(config, task, batches=ToBe(mesh), mesh=mesh, data_limits=limits)
    task.trainer = weakref.ref(trainer)
    trainer.run()
    return task.noted, task.model.weight.item()


def test_the_trainer_offloads_what_a_task_keeps(tmp_path: Path) -> None:
    (bare,) = run_ranks(wide, 1, str(tmp_path / "bare"), Offload())
    (kept,) = run_ranks(wide, 1, str(tmp_path / "kept"), Offload(activations=True))
    assert (bare[0], kept[0]) == (0, 4 * LEAST) and bare[1] == kept[1]


@pytest.mark.parametrize("recompute", ["feed_forward", "all_but_attention"])
def test_activations_that_a_block_holds_itself_are_refused(recompute: Recompute) -> None:
    with pytest.raises(ValueError, match=f"train.recompute none or full, found {recompute}"):
        Train(steps=1, learning_rate=1e-3, offload=Offload(activations=True), recompute=recompute)


HOST = Offload(optimizer=True)
CASES = [
    (2, "fp32", HOST),
    (3, "fp32", replace(HOST, parameters=True)),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in ((1, "fp32", HOST), (3, "fp32", HOST), (3, "fp32", Offload(parameters=True)), (1, "bf16", HOST))
    ),
]


def twice(mesh: ParallelMesh, train: Train) -> list[dict[str, Any]]:
    """The run without offload, with it, and its second half resumed with it."""
    bare, found = job(mesh, replace(train, offload=Offload()), None), job(mesh, train, None)
    return [bare, found, job(mesh, train, broadcast_object(found["saved"], mesh.world))]


@pytest.mark.parametrize(("stage", "precision", "offload"), CASES, ids=str)
def test_states_on_the_host_compute_the_same_run(stage: int, precision: str, offload: Offload) -> None:
    """To the last bits of the gradient norm, which DeepSpeed sums in another order there; resumed, to the bit."""
    train = replace(train_config(stage, precision=precision), offload=offload)
    bare, found, again = run_ranks(twice, 2, train)[0]
    losses, norms, weights = (1e-6, 1e-6, 1e-5) if precision == "fp32" else (1e-3, 1e-2, 1e-3)
    assert found["losses"] == pytest.approx(bare["losses"], rel=losses)
    assert found["norms"] == pytest.approx(bare["norms"], rel=norms)
    assert found["final"].keys() == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    for kind, tensors in bare["final"].items():
        for name, tensor in tensors.items():
            assert (found["final"][kind][name] - tensor).abs().max() <= weights, (kind, name)
            assert torch.equal(again["final"][kind][name], found["final"][kind][name]), (kind, name)
    assert again["losses"] == found["losses"][SAVED:] and again["norms"] == found["norms"][SAVED:]


def averaged(mesh: ParallelMesh, train: Train) -> dict[str, Any]:
    """What DeepSpeed was told, and the outputs of the model's own and averaged weights beside those of plain products."""
    model = nn.Linear(8, 8)
    engine = Engine(model, train, mesh=mesh, micro_steps=1)
    x = torch.linspace(-1, 1, 16).view(2, 8)
    for _ in range(3):
        engine.backward(engine.forward(x).square().sum() / mesh.dp.size)
        engine.step(0.1)
    state = broadcast_object(engine.full_state(step=3), mesh.world)
    with engine.averaged(), torch.no_grad():
        mean = engine.forward(x)
    with torch.no_grad():
        own = engine.forward(x)
    told = engine._ds.zero_offload_optimizer() is not None, engine._ds.zero_offload_param() is not None
    plain = [nn.functional.linear(x, state[kind]["weight"], state[kind]["bias"]) for kind in ("ema", "weights")]
    return {"told": told, "found": [mean, own], "plain": plain}


@pytest.mark.parametrize(
    ("stage", "offload"), [(3, Offload()), (2, HOST), (3, replace(HOST, parameters=True))], ids=str
)
def test_averaged_weights_come_and_go_again(stage: int, offload: Offload) -> None:
    """Under stage 3, too, where DeepSpeed keeps weights gathered from one forward to the next."""
    for result in run_ranks(averaged, 2, replace(train_config(stage), offload=offload)):
        assert result["told"] == (offload.optimizer, offload.parameters)
        for found, plain in zip(result["found"], result["plain"]):
            torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
        assert (result["plain"][0] - result["plain"][1]).abs().max() > 1e-3, "the two are different weights"
