"""What the model is made of, alone: attention kernels, norms, matrix products, convolutions, one transformer block.

Rates are in TFLOP/s of the operation's own products; the backward of attention counts 2.5 times its forward, since it makes
the scores again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bench.measure import Setting, milliseconds, peak_memory, saved_bytes
from bench.peers import diffusers_installed, rotations_for_diffusers
from bench.record import Row
from cogvideo_dist.models.dit import Block, Recompute
from cogvideo_dist.models.embed import rope_table
from cogvideo_dist.models.fused import normed_heads
from cogvideo_dist.models.presets import PRESETS, DiTConfig
from cogvideo_dist.pack.attention import KERNELS, PACKWISE, backend_for
from cogvideo_dist.pack.layout import Clip, PackLayout, groups_of
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.mesh import Axis

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
HEAD_DIM = 64
MILLI = 1e-3

Run = Callable[[], object]


def tera(operations: float, milliseconds_taken: float) -> float:
    """Operations in that many milliseconds -> TFLOP/s."""
    return operations / (milliseconds_taken * MILLI) / 1e12


def attention_flops(length: int, width: int) -> float:
    """One forward: two products of [length, width] and [length, length] in all heads together."""
    return 4.0 * length**2 * width


def config_of(setting: Setting) -> DiTConfig:
    """The 5B, or its toy."""
    return PRESETS["tiny-cogvideox-5b" if setting.toy else "cogvideox-5b"]


def heads_of(setting: Setting) -> int:
    return 2 if setting.toy else 48


def attention(setting: Setting, *, length: int, backend: str) -> list[Row]:
    """``F.scaled_dot_product_attention`` forced to ``backend``."""
    q, k, v = (setting.randn(1, heads_of(setting), length, HEAD_DIM).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)
    choice = BACKENDS[backend]

    def forward() -> Tensor:
        with nullcontext() if choice is None else sdpa_kernel(choice):
            return F.scaled_dot_product_attention(q, k, v)

    backward = partial(torch.autograd.grad, forward(), (q, k, v), grad, retain_graph=True)
    return attention_rows(setting, f"sdpa {backend}", length=length, passes=(forward, backward))


def our_attention(setting: Setting, *, backend: str, lengths: tuple[int, ...]) -> list[Row]:
    """A back end of ``pack.attention`` as a block calls it on a pack: tokens first, values a slice of the joint tensor."""
    qkv = setting.randn(sum(lengths), 3, heads_of(setting), HEAD_DIM)
    q, k, v = qkv[:, 0].contiguous(), qkv[:, 1].contiguous(), qkv[:, 2]
    served = backend_for(backend, device=q.device, dtype=q.dtype)
    groups, grad = groups_of(lengths, lengths), torch.randn_like(q)

    def both() -> object:  # what autograd kept for a whole-pack function serves one backward
        return served.attend_backward(grad, served.attend((q, k, v), groups), qkv=(q, k, v), groups=groups)

    operations = sum(attention_flops(length, heads_of(setting) * HEAD_DIM) for length in lengths)
    passes: tuple[tuple[str, Run, float], ...] = (
        ("forward", partial(served.attend, (q, k, v), groups), 1.0), ("forward and backward", both, 3.5),
    )  # fmt: skip
    return [
        Row("back end", f"{backend}, pack of {' + '.join(map(str, lengths))} tokens, {part}", "TF/s",
            tera(factor * operations, milliseconds(run, setting.device)))
        for part, run, factor in passes
    ]  # fmt: skip


def back_ends(setting: Setting) -> list[str]:
    """The names of those that serve this device and precision."""
    found = []
    for name in (*KERNELS, *PACKWISE):
        with suppress(ValueError):
            backend_for(name, device=setting.device, dtype=setting.dtype)
            found.append(name)
    return found


def attention_rows(setting: Setting, name: str, *, length: int, passes: tuple[Run, Run]) -> list[Row]:
    """The rates of a forward and a backward."""
    operations = attention_flops(length, heads_of(setting) * HEAD_DIM)
    rows = []
    for part, run, factor in zip(("forward", "backward"), passes, (1.0, 2.5)):
        rate = tera(factor * operations, milliseconds(run, setting.device))
        rows.append(Row("rate 1", f"{name}, {length} tokens, {part}", "TF/s", rate))
    return rows


def head_norm(setting: Setting) -> list[Row]:
    """LayerNorm over heads of 64, as a transposed view and as our block calls it, with the rotation."""
    length = 96 if setting.toy else 17_776
    x = setting.randn(1, length, heads_of(setting), HEAD_DIM).requires_grad_()
    norm = nn.LayerNorm(HEAD_DIM, device=setting.device, dtype=setting.dtype)
    out = norm(x.transpose(1, 2))
    grad = torch.ones_like(out)
    qkv = setting.randn(length, 3, heads_of(setting), HEAD_DIM)
    rope = torch.polar(*(torch.ones(length, HEAD_DIM // 2, device=setting.device) for _ in range(2)))
    norms = (norm.weight.detach(), norm.bias.detach()) * 2
    backward = partial(torch.autograd.grad, out, (x, *norm.parameters()), grad, retain_graph=True)
    runs: dict[str, Run] = {
        "LayerNorm(64), forward": lambda: norm(x.transpose(1, 2)),
        "LayerNorm(64), backward": backward,
        "norm and rotation of q and k (ours), forward": lambda: normed_heads(qkv, norms, rope, 1e-6),
    }
    return [
        Row("rate 2", f"{what}, {length} tokens", "ms", milliseconds(run, setting.device)) for what, run in runs.items()
    ]


def products(setting: Setting) -> list[Row]:
    """The block's matrix products, and the square one that utilisation is also measured against."""
    shapes = {"qkv": (17_776, 3072, 9216), "ff1": (17_776, 3072, 12_288), "ff2": (17_776, 12_288, 3072)}
    rows = []
    for what, (m, k, n) in shapes.items():
        m, k, n = (size // 64 if setting.toy else size for size in (m, k, n))
        a, b = setting.randn(m, k), setting.randn(k, n)
        rate = tera(2.0 * m * k * n, milliseconds(partial(torch.mm, a, b), setting.device))
        rows.append(Row("rate 3", f"matrix product {what}, {m}x{k}x{n}", "TF/s", rate))
    return [*rows, Row("rate 3", "matrix product, square", "TF/s", square_product_rate(setting))]


def square_product_rate(setting: Setting) -> float:
    """TFLOP/s of an 8192^3 product of random numbers."""
    size = 128 if setting.toy else 8192
    a, b = setting.randn(size, size), setting.randn(size, size)
    return tera(2.0 * size**3, milliseconds(partial(torch.mm, a, b), setting.device))


def convolution(setting: Setting) -> list[Row]:
    """The VAE's widest 3x3x3 convolution in both memory layouts, with what it takes beside its input."""
    channels, frames, height, width = (4, 4, 8, 8) if setting.toy else (128, 11, 482, 722)
    x, weight = setting.randn(1, channels, frames, height, width), setting.randn(channels, channels, 3, 3, 3)
    operations = 2.0 * channels**2 * 27 * (frames - 2) * (height - 2) * (width - 2)
    rows = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        run = partial(F.conv3d, x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout))
        with peak_memory(setting.device) as peak:
            run()
        name = str(layout).removeprefix("torch.")
        rows.append(Row("rate 4", f"conv3d, {name}", "TF/s", tera(operations, milliseconds(run, setting.device))))
        rows.append(Row("rate 4", f"conv3d, {name}, output and scratch", "GB", peak["bytes"] / 1e9))
    return rows


def block(setting: Setting) -> list[Row]:
    """One layer of the 5B on one 480x720x49 clip: forward, backward and what it saves, at every recomputation."""
    config = config_of(setting)
    clip = Clip(config.text_length, config.sample_grid)
    seq = SequenceShard(PackLayout((clip,)))
    condition = setting.randn(1, config.time_embed_dim)
    x = setting.randn(clip.tokens, config.hidden).requires_grad_()
    rope = rope_table(config, (clip,), spans=seq.heard, device=setting.device, dtype=setting.dtype)
    rows: list[Row] = []
    for level in get_args(Recompute):
        if level == "full":  # a matter of the model, not of a block
            continue
        with torch.device(setting.device):
            layer = Block(config, level, Axis("tp")).to(setting.dtype)
        rows += block_rows(setting, f"block, recompute {level}", layer, run=partial(layer, x, condition, rope, seq))
    return rows + (_block_of_diffusers(setting, config, clip) if diffusers_installed() else [])


def _block_of_diffusers(setting: Setting, config: DiTConfig, clip: Clip) -> list[Row]:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    with torch.device(setting.device):
        layer = CogVideoXBlock(config.hidden, config.heads, config.head_dim, config.time_embed_dim).to(setting.dtype)
    vision = setting.randn(1, clip.vision, config.hidden).requires_grad_()
    text = setting.randn(1, clip.text, config.hidden).requires_grad_()
    condition = setting.randn(1, config.time_embed_dim)
    rotations = rotations_for_diffusers(config, clip, setting.device)

    def run() -> Tensor:
        return torch.cat([part.flatten() for part in layer(vision, text, condition, image_rotary_emb=rotations)])

    def checkpointed() -> Tensor:
        return checkpoint(run, use_reentrant=False)

    return [
        *block_rows(setting, "block, diffusers", layer, run=run),
        *block_rows(setting, "block, diffusers checkpointed", layer, run=checkpointed),
    ]


def block_rows(setting: Setting, name: str, layer: nn.Module, *, run: Callable[[], Tensor]) -> list[Row]:
    grad = torch.randn_like(run())

    def both() -> None:
        layer.zero_grad()
        run().backward(grad)

    forward, whole = (milliseconds(part, setting.device) for part in (run, both))
    layer.zero_grad()
    with peak_memory(setting.device) as peak:
        both()
    return [
        Row("rate 5", f"{name}, forward", "ms", forward),
        Row("rate 5", f"{name}, forward and backward", "ms", whole),
        Row("rate 5", f"{name}, saved activations", "MB", saved_bytes(run, parameters=layer.parameters()) / 1e6),
        Row("rate 5", f"{name}, peak above weights and input, gradients included", "MB", peak["bytes"] / 1e6),
    ]
