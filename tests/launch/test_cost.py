"""What the cost model says is what the real modules do: parameters, saved bytes, products, states; and it scales as it must."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideo_dist.config.adaptation import LoRA
from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun, Train
from cogvideo_dist.engine.optim import make_optimizer
from cogvideo_dist.models.dit import DiT, Recompute
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.lora import adapt
from cogvideo_dist.models.presets import RELEASED, DiTConfig
from cogvideo_dist.models.vae import VAE, Semantics, VAEConfig
from cogvideo_dist.pack.layout import PackLayout
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import ParallelMesh
from launch import cost
from launch.compose import TransformerGeometry
from launch.cost import KEPT, LINEARS, REDONE, WORKING, Cost, cost_of
from tests.launch.world import outcome

RECOMPUTES: tuple[Recompute, ...] = ("none", "feed_forward", "all_but_attention", "full")
FILE = """\
run: {dir: runs/x}
model: {preset: cogvideox-5b}
data: {source: latents, shards: d, sizes: [[49, 480, 720]], fps: 8, tokens_per_pack: 17776, packs_per_step: 16}
train: {steps: 1000, learning_rate: 1.0e-5}
checkpoint: {every: 100}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def of(file: Path, gpus: int, *changes: str) -> Cost:
    return cost_of(load_config(DiTRun, [file], overrides=changes), gpus)


SMALL = DiTConfig(layers=1, heads=4, head_dim=32, time_embed_dim=16, text_dim=16, text_length=16)
CLIP = (13, 256, 256)
"""1024 patches: in runs of fewer than 512 tokens the blocks take another way to the gate's gradient."""


def model_of(layers: int, *, recompute: Recompute = "none", lora: LoRA | None = None) -> DiT:
    model = DiT(replace(SMALL, layers=layers), recompute=recompute)
    if lora is not None:
        adapt(model, lora.adapters())
    draw_parameters(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def forward(model: DiT) -> Tensor:
    layout = PackLayout((TransformerGeometry(SMALL)(CLIP),))
    clip = layout.clips[0]
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(clip.vision, SMALL.patch_features_in, generator=generator)
    text = torch.randn(clip.text, SMALL.text_dim, generator=generator)
    return model(vision, text, timestep=torch.tensor([500]), seq=SequenceShard(layout, ParallelMesh()))


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that live, and the most there ever were, parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return result

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_a_layer_keeps_what_is_said_and_its_backward_needs_no_more(recompute: Recompute) -> None:
    """Bytes between forward and backward of one layer more; and of the backward beyond those of all layers. Weights have no
    gradients here, which are told apart."""
    kept, peaks = [], []
    for layers in (2, 3):
        model = model_of(layers, recompute=recompute, lora=LoRA(rank=1))
        with Held(model) as held:
            out = forward(model)
            kept.append(held.bytes)
            out.sum().backward()
        peaks.append(held.peak)
    unit = 2 * TransformerGeometry(SMALL)(CLIP).tokens * SMALL.hidden  # 2: bytes of 32 bits for every one of 16
    # Beside them the log-sum-exp of attention, a number for each token and head (here of 32), and the modulation.
    assert KEPT[recompute] <= (kept[1] - kept[0]) / unit <= KEPT[recompute] + 0.5
    beyond = (peaks[0] - 2 * (peaks[1] - peaks[0])) / unit
    said = KEPT["none"] - KEPT[recompute] + WORKING[4]
    assert 0.6 * said <= beyond <= said


@pytest.mark.parametrize("semantics", ["whole", "chunked"])
def test_the_autoencoder_has_at_most_what_is_said(semantics: Semantics) -> None:
    """In tensors of the first level's width and full size, on an autoencoder of the released one's shape, but narrow."""
    vae = VAE(VAEConfig(block_out_channels=(16, 32, 32, 64), norm_groups=16)).requires_grad_(False).eval()
    draw_parameters(vae, 0)
    frames, side = 17, 32
    unit = 4 * 16 * (frames if semantics == "whole" else 9) * side**2
    with torch.no_grad(), Held(vae) as encoding:
        vae.encode(torch.zeros(1, 3, frames, side, side), semantics=semantics)
    with torch.no_grad(), Held(vae) as decoding:
        vae.decode(torch.zeros(1, 16, 5, side // 8, side // 8), semantics)
    assert 0.75 * cost.ENCODING[semantics] <= encoding.peak / unit <= cost.ENCODING[semantics]
    assert 0.75 * cost.DECODING[semantics] <= decoding.peak / unit <= cost.DECODING[semantics]


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, those inside attention aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.count += 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [None, LoRA(rank=8)], ids=["all", "adapters"])
@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_a_layer_multiplies_what_is_said(recompute: Recompute, lora: LoRA | None) -> None:
    """The matrix products of forward and backward of one layer more, without the modulation's few rows."""
    counts = []
    for layers in (2, 3):
        model = model_of(layers, recompute=recompute, lora=lora)
        with Products() as products:
            forward(model).sum().backward()
        counts.append(products.count)
    tokens, d = TransformerGeometry(SMALL)(CLIP).tokens, SMALL.hidden
    own = cost.counted(SMALL, lora=lora)[1]
    said = (LINEARS[lora is None] + REDONE[recompute][0]) * tokens * d**2 + 6 * tokens * own
    assert counts[1] - counts[0] == pytest.approx(said, rel=0.03)


@pytest.mark.parametrize("ema", [None, 0.99])
def test_the_optimizer_keeps_what_is_said(file: Path, ema: float | None) -> None:
    """Beside the masters: both moments and the average."""
    parameter = torch.nn.Linear(64, 64)
    optimizer = make_optimizer(parameter, Train(steps=1, learning_rate=0.1, ema_decay=ema))
    parameter(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values() for name, value in state.items() if name != "step"
    )  # fmt: skip
    found = of(file, 1, f"train.ema_decay={'null' if ema is None else ema}")
    masters = 4
    assert held / sum(p.numel() for p in parameter.parameters()) == found.memory.states / found.share.trained - masters


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("preset", RELEASED)
def test_ranks_of_tp_hold_the_whole_together(preset: str, tp: int) -> None:
    """What is divided over tp adds up; what is not is on every rank."""
    config = RELEASED[preset]
    if config.heads % tp:
        return
    (whole, _), (own, _) = cost.counted(config), cost.counted(config, tp=tp)
    d = config.hidden
    # Weights of q, k, v, out, ff1, ff2 and the biases of q, k, v and ff1.
    divided = config.layers * (12 * d**2 + 7 * d)
    assert own == whole - divided + divided // tp


def test_adapters_are_counted() -> None:
    """rank * (in + out) of four [d, d] in every layer, whatever the rank of tp that holds the outputs' halves."""
    config = RELEASED["cogvideox-5b"]
    assert cost.counted(config, lora=LoRA(rank=128))[1] == 42 * 4 * 128 * 2 * 3072
    assert cost.counted(config, lora=LoRA(rank=128), tp=2)[1] == 42 * 4 * 128 * (3072 + 3072 // 2)


@pytest.mark.parametrize(
    ("preset", "size", "petaflops"),
    [
        ("cogvideox-2b", "[49, 480, 720]", 0.360),
        ("cogvideox-5b", "[49, 480, 720]", 0.997),
        ("cogvideox1.5-5b", "[81, 768, 1360]", 4.437),
    ],
)
def test_a_clip_of_the_released_models_takes_known_operations(
    file: Path, preset: str, size: str, petaflops: float
) -> None:
    """Three forwards of 24 n d^2 + 4 n^2 d a layer, which agrees with torch's count of diffusers' own block to four digits."""
    found = of(file, 16, f"model.preset={preset}", f"data.sizes=[{size}]", "data.tokens_per_pack=45200")
    assert found.flops / 16 / found.share.pack.clips == pytest.approx(petaflops * 1e15, rel=1e-3)


def test_zero_divides_states_gradients_and_weights_in_turn(file: Path) -> None:
    whole = 5_570_283_072
    # DeepSpeed's stage 1 has a pack's gradients in 16 bits beside their sums.
    for stage, (weights, gradients, states) in enumerate([(1, 6, 8), (1, 6, 8), (1, 4 / 8, 8), (8, 4 / 8, 8)]):
        memory = of(file, 8, f"train.zero_stage={stage}").memory
        assert memory.weights == 2 * whole / weights
        assert memory.gradients == gradients * whole
        assert memory.states == 16 * whole / states  # masters, two moments, the average
    assert of(file, 8, "train.zero_stage=3", "train.offload.parameters=true").memory.weights == 0
    assert of(file, 8, "train.offload.optimizer=true").memory.states == 0
    eight_bits = of(file, 8, "train.optimizer=adamw8bit").memory.states
    assert eight_bits == of(file, 8).memory.states - 6 * whole / 8


@pytest.mark.parametrize("change", ["parallel.sp=2", "parallel.tp=2"])
def test_sharing_a_pack_halves_its_activations_and_not_the_work(file: Path, change: str) -> None:
    alone, shared = of(file, 8), of(file, 8, change)
    assert shared.memory.activations == alone.memory.activations / 2
    assert shared.flops == alone.flops
    assert shared.seconds.transformer == pytest.approx(alone.seconds.transformer)
    assert shared.seconds.sent > 0


def test_more_gpus_make_a_step_shorter_at_the_same_cost(file: Path) -> None:
    few, many = of(file, 4), of(file, 16)
    assert many.seconds.transformer == few.seconds.transformer / 4
    assert many.mfu == pytest.approx(few.mfu, rel=0.1)
    assert many.gpu_hours == pytest.approx(few.gpu_hours, rel=0.1)


def test_what_saves_memory_costs_time(file: Path) -> None:
    costs = [of(file, 8, f"train.recompute={recompute}") for recompute in RECOMPUTES]
    assert sorted(costs, key=lambda found: -found.memory.activations) == costs
    assert sorted(costs, key=lambda found: found.seconds.step) == costs
    assert costs[3].seconds.transformer / costs[0].seconds.transformer == pytest.approx(
        1.30, abs=0.02
    )  # a forward with its attention


def test_frozen_models_cost_what_latents_save(file: Path) -> None:
    pixels = ("data.source=pixels", "frozen.vae=v", "frozen.text=t")
    whole, chunked = of(file, 8, *pixels), of(file, 8, *pixels, "frozen.vae_semantics=chunked")
    latents = of(file, 8)
    assert latents.memory.frozen == latents.memory.encoding == latents.seconds.frozen == 0
    assert whole.memory.frozen == 4 * (4.762e9 + 215_583_907)
    assert whole.memory.encoding > 3 * chunked.memory.encoding > 0
    assert whole.seconds.frozen == chunked.seconds.frozen > 0.5
    tiled = of(file, 8, *pixels, "frozen.vae_semantics=chunked", "frozen.vae_tiling=true")
    assert tiled.memory.encoding == chunked.memory.encoding / 4


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["cost.py", "--config", *arguments])
    return outcome("cost", cost.main)


def test_the_command_tells_the_figures(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, stdout, _ = run(monkeypatch, str(file), "train.steps=500", "--gpus", "8")
    assert code == 0
    told = {line[:10].strip(): line[11:] for line in stdout.splitlines()}
    figures = cost.rows(of(file, 8, "train.steps=500"))
    assert [*told.values()] == [*figures.values()]
    assert told["Model"] == "cogvideox-5b: 5,570,283,072 parameters; trained: all"
    assert told["Cost"].endswith("GPU-hours for 500 steps")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--gpus", "3"), "data.packs_per_step 16 does not divide over 3 data-parallel ranks"),
        (("--gpus", "0"), "a run needs at least 1 GPU, found 0"),
        (("parallel.sp=4", "--gpus", "6"), "6 ranks do not divide into parallel.sp 4 x parallel.tp 1"),
        (("data.tokens_per_pack=1000",), "data.tokens_per_pack 1000 holds none of data.sizes"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = run(monkeypatch, str(file), *changes)
    assert code == 1 and not stdout
    assert stderr.startswith(f"cost: error: {message}")
    assert len(stderr.splitlines()) == 1
