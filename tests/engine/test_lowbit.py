"""Moments in 8 bits: what they lose, that a checkpoint loses no more, and that every stage of ZeRO trains with them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.optim import AdamWithEma, make_optimizer
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import broadcast_object
from tests.engine.test_zero import SAVED, STEPS, job, train_config
from tests.ranks import run_ranks

quant = pytest.importorskip("torchao.optim.quant_utils", reason="adamw8bit is an extra")
lowbit = pytest.importorskip("cogvideo_dist.engine.lowbit")

LOW = Train(steps=1, learning_rate=1e-2, optimizer="adamw8bit", ema_decay=0.9)


def spread(count: int, *, signed: bool) -> Tensor:
    """Elements over eight decades within every block, blocks over twenty, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator) * 10 ** (-8 * torch.rand(count, generator=generator))
    blocks = torch.arange(count) // lowbit.BLOCK
    x *= 10.0 ** (-20 * (blocks / blocks.max()))
    x[: lowbit.BLOCK] = 0
    return x if signed else x.abs()


def packed(x: Tensor, *, signed: bool) -> Any:
    found = lowbit.Packed(len(x), signed=signed, device=x.device)
    for part in found.parts():
        found.write(part, x[part])
    return found


def read(found: Any) -> Tensor:
    return torch.cat([found.read(part) for part in found.parts()])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [256 * 300, 256 * 300 + 17])
def test_what_was_packed_packs_to_the_same_bytes(count: int, signed: bool) -> None:
    """So that a checkpoint of float32 tensors holds the very state."""
    first = packed(spread(count, signed=signed), signed=signed)
    again = packed(read(first), signed=signed)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scales, again.scales)
    assert len(first.codes.unique()) > 200


def test_torchao_s_own_signed_map_would_not_do() -> None:
    """Its end is not -1, so a block whose largest element is negative shrinks by every save: the reason for ours."""
    x = -torch.rand(lowbit.BLOCK, generator=torch.Generator().manual_seed(0))
    book = torch.tensor(quant.create_dynamic_map(True))
    scaled, scale = quant.scale_tensor(x, lowbit.BLOCK)
    back = quant.dequant_with_qmap(quant.quantize_8bit_with_qmap(scaled, book), book, scale)
    assert quant.scale_tensor(back, lowbit.BLOCK)[1] < 0.995 * scale
    assert lowbit.dynamic_map(signed=True)[0] == -1 and torch.equal(lowbit.dynamic_map(signed=True)[1:], book[1:])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_torchao_s_and_errors_half_a_gap(signed: bool) -> None:
    x = spread(256 * 300, signed=signed)
    found, book = packed(x, signed=signed), lowbit.dynamic_map(signed=signed)
    scaled, scale = quant.scale_tensor(x, lowbit.BLOCK)
    assert torch.equal(found.codes, quant.quantize_8bit_with_qmap(scaled, book))
    gap = (book[1:] - book[:-1]).max() / 2
    error = (read(found) - x).view(-1, lowbit.BLOCK).abs()
    assert (error <= scale[:, None] * gap * 1.001).all()


def test_a_second_moment_never_becomes_zero() -> None:
    """It would leave lr * m / eps of an element whose first moment is not zero."""
    x = spread(256 * 300, signed=False)[lowbit.BLOCK :]
    assert (x > 0).all() and (read(packed(x, signed=False)) > 0).all()
    scaled, scale = quant.scale_tensor(x, lowbit.BLOCK)
    book = torch.tensor(quant.create_dynamic_map(False))
    assert (quant.dequant_with_qmap(quant.quantize_8bit_with_qmap(scaled, book), book, scale) == 0).any()


def layers() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def curve(train: Train, steps: int) -> tuple[Tensor, AdamWithEma]:
    """Losses of a small network that learns a function from noisy data."""
    model, generator = layers(), torch.Generator().manual_seed(1)
    optimizer, losses = make_optimizer(model, train), []
    for _ in range(steps):
        x = torch.randn(64, 32, generator=generator)
        loss = (model(x) - x.roll(1, 1) * x.abs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), optimizer


def bytes_of_moments(optimizer: AdamWithEma) -> int:
    wide = sum(
        state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq") if key in state
    )
    return wide + sum(one.bytes for moments in getattr(optimizer, "packed", {}).values() for one in moments.values())


@pytest.mark.long
def test_training_follows_adamw_with_a_quarter_of_the_bytes() -> None:
    """Over 150 steps in which the loss falls by half, every loss within 3 % of AdamW's and their mean within 0.3 %."""
    expected, plain = curve(replace(LOW, optimizer="adamw", learning_rate=2e-3), 150)
    found, low = curve(replace(LOW, learning_rate=2e-3), 150)
    assert expected[-10:].mean() < 0.5 * expected[0]
    assert not torch.equal(found, expected)
    error = (found - expected) / expected
    assert error.abs().max() <= 0.03 and abs(error.mean()) <= 0.003
    # One byte for each element of a matrix and four for each 256; vectors stay as they are.
    model = layers()
    matrices, vectors = (sum(p.numel() for p in model.parameters() if (p.ndim > 1) == wide) for wide in (True, False))
    assert bytes_of_moments(plain) == 8 * (matrices + vectors)
    assert bytes_of_moments(low) == 2 * (matrices + matrices // 64) + 8 * vectors
    assert all(state["ema"].dtype == torch.float32 for state in low.state.values())


@pytest.mark.long
def test_a_transformer_s_loss_follows_adamw() -> None:
    """Over 150 steps on noisy latents, every loss within 3 % and their mean within 0.3 %."""
    config, layout = tiny("cogvideox-5b"), PackLayout((Clip(5, (2, 3, 4)), Clip(6, (1, 2, 2))))

    def losses(train: Train) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        model = DiT(config)
        draw_parameters(model, 0)
        optimizer, found = make_optimizer(model, train), []
        clean = torch.randn(layout.vision, config.patch_features_in, generator=generator)
        text = torch.randn(11, config.text_dim, generator=generator)
        for _ in range(150):
            noisy = clean + torch.randn(clean.shape, generator=generator)
            out = model(noisy, text, timestep=torch.tensor([100, 900]), seq=SequenceShard(layout))
            loss = (out - clean).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    expected, found = (losses(replace(LOW, learning_rate=3e-3, optimizer=kind)) for kind in ("adamw", "adamw8bit"))
    error = (found - expected) / expected
    assert expected[-10:].mean() < 0.1 * expected[0]
    assert error.abs().max() <= 0.03 and abs(error.mean()) <= 0.003


def test_what_is_small_or_no_matrix_is_torch_s_adamw_to_the_bit() -> None:
    model, plain = (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    train = replace(LOW, ema_decay=None)
    pairs = [(model, make_optimizer(model, train)), (plain, make_optimizer(plain, replace(train, optimizer="adamw")))]
    for step in range(5):
        x = torch.full((3, 8), float(step)) + torch.arange(8)
        for each, optimizer in pairs:
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_parts_of_a_tensor_update_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = curve(LOW, 4)
    monkeypatch.setattr(lowbit, "PART", 3 * lowbit.BLOCK)
    parts, _ = curve(LOW, 4)
    assert torch.equal(parts, whole)


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    monkeypatch.delitem(sys.modules, "cogvideo_dist.engine.lowbit")
    with pytest.raises(ValueError, match=r'adamw8bit needs torchao.*pip install "cogvideo_dist\[lowbit\]"'):
        make_optimizer(layers(), LOW)
    assert isinstance(make_optimizer(layers(), replace(LOW, optimizer="adamw")), AdamWithEma)


def resumed(mesh: ParallelMesh, train: Train) -> list[dict[str, Any]]:
    """A run of AdamW, one of 8 bits, and that one continued from its middle."""
    plain, whole = job(mesh, replace(train, optimizer="adamw"), None), job(mesh, train, None)
    return [plain, whole, job(mesh, train, broadcast_object(whole["saved"], mesh.world))]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (3, "fp32"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, "fp32"), (2, "fp32"), (1, "bf16"), (3, "bf16"))),
    ],
)
def test_every_stage_trains_and_resumes_bitwise(stage: int, precision: str) -> None:
    train = replace(train_config(stage, precision=precision), optimizer="adamw8bit")
    plain, whole, again = run_ranks(resumed, 2, train)[0]
    assert len(whole["losses"]) == STEPS
    assert whole["losses"] != plain["losses"]
    assert whole["losses"] == pytest.approx(plain["losses"], rel=1e-3 if precision == "fp32" else 1e-2)
    assert again["losses"] == whole["losses"][SAVED:] and again["norms"] == whole["norms"][SAVED:]
    assert whole["final"].keys() == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    for kind, tensors in whole["final"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again["final"][kind][name]), (kind, name)


@pytest.mark.long
def test_a_state_moves_between_stages_and_optimizers() -> None:
    """It is one of float32 tensors; other partitions pack it in other blocks, so it goes on nearly alike."""
    train = replace(train_config(2), optimizer="adamw8bit")
    whole = run_ranks(job, 2, train, None)[0]
    for other in (replace(train, zero_stage=3), replace(train, optimizer="adamw")):
        found = run_ranks(job, 2, other, whole["saved"])[0]
        assert found["losses"] == pytest.approx(whole["losses"][SAVED:], rel=1e-3)
