"""How the benchmarks count: saved bytes, attention calls, operations; and when a goal is met."""

from __future__ import annotations

import time
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import rates, training
from bench.correctness import gradients, plain_block, relative
from bench.measure import TICK, Setting, attention_calls, interleaved, machine_seconds, saved_bytes, timed, worst_error
from bench.peers import set_recompute
from bench.record import Row, faster, smaller, table
from cogvideo_dist.models.dit import Block, DiT, Recompute
from cogvideo_dist.models.embed import rope_table
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import RELEASED, DiTConfig, tiny
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Axis

CONFIG = DiTConfig(layers=1, heads=2, head_dim=16, time_embed_dim=8)
LAYOUT = PackLayout((Clip(3, (2, 3, 4)),))


def block_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, SequenceShard]:
    x, condition = torch.randn(LAYOUT.tokens, CONFIG.hidden, dtype=dtype), torch.randn(1, 8, dtype=dtype)
    seq = SequenceShard(LAYOUT)
    return x, condition, rope_table(CONFIG, LAYOUT.clips, spans=seq.heard, device=x.device, dtype=dtype), seq


@pytest.mark.parametrize(
    ("name", "teraflops"), [("cogvideox-2b", 360), ("cogvideox-5b", 997), ("cogvideox1.5-5b", 4437)]
)
def test_model_flops_are_those_of_the_released_models(name: str, teraflops: float) -> None:
    config = RELEASED[name]
    assert training.model_flops(config, training.clip_of(config).tokens) / 1e12 == pytest.approx(teraflops, rel=5e-3)


def test_model_flops_count_every_product_of_a_plain_block() -> None:
    block = Block(CONFIG, "none", Axis("tp"))
    with FlopCounterMode(display=False) as counter:
        plain_block(block, *block_inputs(torch.float32))
    modulation = 2 * CONFIG.time_embed_dim * 12 * CONFIG.hidden
    assert counter.get_total_flops() - modulation == training.model_flops(CONFIG, LAYOUT.tokens) / 3


def test_attention_flops_are_counted_alike_by_torch() -> None:
    q = torch.randn(1, 3, 40, 16)
    with FlopCounterMode(display=False) as counter:
        (q @ q.transpose(-1, -2)).softmax(-1) @ q
    assert counter.get_total_flops() == rates.attention_flops(40, 3 * 16)
    assert rates.tera(2e12, 500.0) == pytest.approx(4.0)


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_attention_is_computed_once_unless_the_whole_block_is_recomputed(recompute: Recompute) -> None:
    config = tiny("cogvideox-5b")
    model = DiT(config)
    draw_parameters(model, 0)
    set_recompute(model, recompute)
    latents = torch.randn(1, config.sample_frames, config.in_channels, config.sample_height, config.sample_width)
    text = torch.randn(1, config.text_length, config.text_dim)
    calls, _ = attention_calls(lambda: model.denoise(latents, text, torch.tensor([3])).sum().backward())
    assert calls == config.layers * (2 if recompute == "full" else 1)


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    weight = torch.nn.Parameter(torch.randn(5))
    x = torch.randn(8, 5, requires_grad=True)
    # x * weight saves x and weight; its exponential saves itself, of which the square saves the same storage again
    assert saved_bytes(lambda: (x * weight).exp().square(), parameters=iter([weight])) == 2 * 8 * 5 * 4


def test_plain_block_is_the_block() -> None:
    block = Block(CONFIG, "none", Axis("tp")).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.2)
    x, *rest = block_inputs(torch.float64)
    ours = gradients(block, block, x, *rest)
    plain = gradients(block, lambda *inputs: plain_block(block, *inputs), x, *rest)
    assert ours.keys() == plain.keys()
    for name in plain:
        assert relative(ours[name], plain[name]) < 1e-10, name


def test_sides_take_turns_and_warm_ups_do_not_count() -> None:
    order: list[str] = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times, _ = interleaved(sides, repeats=3, warm_ups=1, limit=0.0)
    assert order[:6] == list("ababba")
    assert sum(map(len, times.values())) <= len(order) - 2
    assert min(map(len, times.values())) >= 3


def test_what_the_machine_did_includes_what_we_did() -> None:
    before, own = machine_seconds(), time.process_time()
    timed(lambda: [torch.randn(200, 200) @ torch.randn(200, 200) for _ in range(20)])
    assert machine_seconds() - before >= time.process_time() - own - 2 * TICK


def test_worst_error_is_named_and_zero_gradients_are_held_to_the_others() -> None:
    expected = {"large": torch.tensor([1.0, -4.0]), "zero": torch.zeros(2)}
    found = {"large": torch.tensor([1.0, -4.4]), "zero": torch.tensor([0.0, 1e-9])}
    assert worst_error(found, expected) == ("large", pytest.approx(0.1))


def test_optimizer_in_two_precisions_follows_a_plain_one() -> None:
    parameter = torch.nn.Parameter(torch.randn(6))
    reference = parameter.detach().clone().requires_grad_()
    ours, plain = training.MixedAdamW([[parameter], []]), torch.optim.AdamW([reference], lr=1e-5)
    for _ in range(3):
        gradient = torch.randn(6)
        parameter.grad, reference.grad = gradient.clone(), gradient.clone()
        ours.step()
        plain.step()
        assert parameter.grad is None
    torch.testing.assert_close(parameter.detach(), reference.detach())


def test_sizes_on_a_device_are_toy_where_asked() -> None:
    setting = Setting(torch.device("cpu"), toy=True)
    assert setting.dtype == torch.float32 and setting.randn(2, 3).shape == (2, 3)
    assert rates.config_of(setting).layers == 2


def test_a_goal_bounds_the_ratio_or_else_the_figure() -> None:
    assert faster("a", "", ours=2.0, peer=3.0, at_least=1.5).met is True
    assert faster("a", "", ours=2.0, peer=None, at_least=1.5).met is None
    assert smaller("b", "", ours=3.0, peer=4.0, unit="MB", at_most=0.5).met is False
    assert Row("c", "", "GB", 126.0, at_most=125.0).met is False
    assert Row("d", "", "GB", 126.0).met is None


def test_table_shows_figures_goals_and_verdicts() -> None:
    text = table(
        [faster("A6", "step", ours=2.0, peer=3.0, at_least=1.6), Row("A4", "memory", "GB", 117.0, at_most=125.0)]
    )
    assert text.splitlines()[2:] == [
        "| A6 | step | 2 s | 3 s | 1.5x | ≥ 1.6x | **no** |",
        "| A4 | memory | 117 GB |  |  | ≤ 125 GB | yes |",
    ]
