"""The expert-AdaLN diffusion transformer with 3D full attention (Yang et al. 2024, arXiv 2408.06072), over packs.

One definition serves every parallel layout: ``tp`` given to the constructor slices what is wide, ``seq`` given to the forward
says which tokens are here, and neither is asked whether it is more than one rank.

Legend: n = tokens of this rank, w = tokens of its tp ranks together, m = tokens of its Ulysses ranks together, d = hidden,
r = 2 * clips rows of modulation (text, vision of each clip), e = time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideo_dist.config.adaptation import LINEARS
from cogvideo_dist.models.embed import rope_table, sincos_table, timestep_sinusoid
from cogvideo_dist.models.fused import Drop, LinearGateResidual, NormAffineLinear, NormRotateAttend
from cogvideo_dist.models.init import Initial, constant, normal, xavier
from cogvideo_dist.models.lora import (
    Adapters,
    AddGatedLowRank,
    AddLowRank,
    Down,
    Dropout,
    LowRank,
    Place,
    bounded,
    is_adapter,
)
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.pack.layout import TEXT, VISION, Clip, PackLayout, Span
from cogvideo_dist.pack.patch import grid_of, patchify, unpatchify
from cogvideo_dist.pack.shard import SequenceShard, joined
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import enter
from cogvideo_dist.parallel.split import Split

Recompute = Literal["none", "feed_forward", "all_but_attention", "full"]
"""What the backward makes again: nothing but elementwise work; also the first feed-forward linear; every linear that
attention does not need; the whole block (attention too)."""


SPLITS = {
    ("qkv", "weight"): Split(dim=0, stacked=3),
    ("qkv", "bias"): Split(dim=0, stacked=3),
    ("out", "weight"): Split(dim=1),
    ("ff1", "weight"): Split(dim=0),
    ("ff1", "bias"): Split(dim=0),
    ("ff2", "weight"): Split(dim=1),
    **{(name, "b"): Split(dim=0) for name in ("q", "k", "v", "ff1")},
    **{(name, "a"): Split(dim=1) for name in ("out", "ff2")},
}
"""A block's (linear or adapter, parameter) -> its division over tp: by heads or features that go out (dim 0) or come in (dim
1)."""


class TimeEmbedding(nn.Module):
    """A sinusoid of [b] through two linears -> [b, e]; ``name`` begins those of their adapters."""

    def __init__(self, sinusoid: int, dim: int, *, name: str) -> None:
        super().__init__()
        self.sinusoid, self.name = sinusoid, name
        self.adaptable = {f"{name}1": Place("linear1"), f"{name}2": Place("linear2")}
        self.lora = Adapters()
        self.linear1 = nn.Linear(sinusoid, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(self, value: Tensor) -> Tensor:
        wave = timestep_sinusoid(value, self.sinusoid).to(self.linear2.weight.dtype)
        first, second = (self.lora.plus(getattr(self, p.linear), name) for name, p in self.adaptable.items())
        return second(F.silu(first(wave)))


class AlikeLinear(nn.Linear):
    """A linear that every tp rank holds whole and applies to tokens of its own."""

    def __init__(self, features_in: int, features_out: int, *, tp: Axis) -> None:
        super().__init__(features_in, features_out)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *enter((self.weight, self.bias), self.tp))


class Embedding(nn.Module):
    """This rank's text features and latent patches -> its part of the sequence [n, d], with absolute positions if any."""

    adaptable = {"patch": Place("patch"), "text": Place("text")}  # noqa: RUF012 (read alone)

    def __init__(self, config: DiTConfig, tp: Axis) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.patch = AlikeLinear(config.patch_features_in, config.hidden, tp=tp)
        self.text = AlikeLinear(config.text_dim, config.hidden, tp=tp)
        self.lora = Adapters()
        if config.learned_positions:
            t, h, w = config.sample_grid
            self.positions = nn.Parameter(torch.empty(config.text_length + t * h * w, config.hidden))

    def forward(self, vision: Tensor, text: Tensor, seq: SequenceShard) -> Tensor:
        tokens = self.lora.plus(self.patch, "patch")(vision)
        if self.config.positions == "sincos":
            tokens = tokens + sincos_table(
                self.config, seq.layout.clips, spans=seq.spans, device=tokens.device, dtype=tokens.dtype
            )
        joint = seq.interleave(self.lora.plus(self.text, "text")(text), tokens)
        return joint + self._learned(seq) if self.config.learned_positions else joint

    def _learned(self, seq: SequenceShard) -> Tensor:
        base = Clip(self.config.text_length, self.config.sample_grid)
        for clip in seq.layout.clips:
            if clip != base:
                raise ValueError(
                    f"this model's learned positions serve only {base.text} text tokens and a grid of {base.grid} patches; "
                    f"found {clip.text} and {clip.grid}"
                )
        (positions,) = enter((self.positions,), self.tp)
        starts = {TEXT: 0, VISION: base.text}
        pieces = [positions[starts[span.kind] + span.start : starts[span.kind] + span.stop] for span in seq.spans]
        return joined(pieces, positions)


class Block(nn.Module):
    """One layer: AdaLN, attention, gate; AdaLN, feed-forward, gate. All of its linears are shared by text and vision."""

    zero_unit = True  # its parameters are read across its submodules, so ZeRO-3 gathers the block as a whole
    adaptable = {  # noqa: RUF012 (read alone)
        "q": Place("qkv", 0, 3), "k": Place("qkv", 1, 3), "v": Place("qkv", 2, 3), "out": Place("out"),
        "ff1": Place("ff1"), "ff2": Place("ff2"), "modulation": Place("modulation"),
    }  # fmt: skip

    def __init__(self, config: DiTConfig, recompute: Recompute, tp: Axis, *, number: int = 0) -> None:
        super().__init__()
        d = config.hidden
        self.config, self.recompute, self.tp, self.number = config, recompute, tp, number
        self.lora = Adapters()
        self.modulation = nn.Linear(config.time_embed_dim, 12 * d)
        self.norm1 = nn.LayerNorm(d, config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d // tp.size)
        self.norm_q = nn.LayerNorm(config.head_dim, config.head_norm_eps)
        self.norm_k = nn.LayerNorm(config.head_dim, config.head_norm_eps)
        self.out = nn.Linear(d // tp.size, d)
        self.norm2 = nn.LayerNorm(d, config.norm_eps)
        self.ff1 = nn.Linear(d, 4 * d // tp.size)
        self.ff2 = nn.Linear(4 * d // tp.size, d)

    def forward(
        self, x: Tensor, condition: Tensor, rope: Tensor | None, seq: SequenceShard, dropout: Dropout | None = None
    ) -> Tensor:
        """x [n, d], condition [clips, e] (after SiLU), rope [m, head_dim/2] -> [n, d]."""
        (weight1, bias1, gate1, weight2, bias2, gate2), head_norms, low = self._entered(condition)
        work = Adapted(self, seq, low=low, dropout=dropout)
        again_qkv = again_ff = None
        qkv = self._heads(work.widen(("q", "k", "v"), x, weight1, bias1))
        if self.recompute == "all_but_attention":
            again_qkv = Again(lambda *inputs: self._heads(work.widen(("q", "k", "v"), *inputs)), x, weight1, bias1)
        attended = NormRotateAttend.apply(qkv, *head_norms, rope, seq, self.config.head_norm_eps, again_qkv)
        x = work.narrow("out", x, x=attended.flatten(1), gate=gate1)
        wide = work.widen(("ff1",), x, weight2, bias2)
        if self.recompute in ("feed_forward", "all_but_attention"):
            again_ff = Again(lambda *inputs: work.widen(("ff1",), *inputs), x, weight2, bias2)
        return work.narrow("ff2", x, x=wide, gate=gate2, again=again_ff)

    def _entered(self, condition: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Factors]]:
        """What every tp rank holds alike and uses on tokens and heads of its own: the modulation as weight, bias and gate of
        attention and of the feed-forward, [r, d] each, the norms of q and k, and a factor of every adapter."""
        # [clips, 12*d] -> [2*clips, 6, d]
        table = self.lora.plus(self.modulation, "modulation")(condition).view(2 * len(condition), 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(1)
        modulation = (
            *fold_affine(self.norm1, shift1, scale1), gate1, *fold_affine(self.norm2, shift2, scale2), gate2,
        )  # fmt: skip
        norms = (self.norm_q.weight, self.norm_q.bias, self.norm_k.weight, self.norm_k.bias)
        adapters = {name: self.lora.low(name) for name in self.lora if name != "modulation"}
        alike = [low.b if name in NARROW else low.a for name, low in adapters.items()]
        entered = enter((*modulation, *norms, *alike), self.tp)
        factors = {
            name: Factors(low.a, whole, low) if name in NARROW else Factors(whole, low.b, low)
            for (name, low), whole in zip(adapters.items(), entered[10:])
        }
        return entered[:6], entered[6:10], factors

    def _heads(self, qkv: Tensor) -> Tensor:
        """[w, 3 * heads * head_dim] -> [w, 3, heads, head_dim], the heads of this tp rank."""
        return qkv.unflatten(-1, (3, -1, self.config.head_dim))


def fold_affine(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x) * (1 + scale) + shift) as one weight and one bias per row; shift, scale [r, d]."""
    return norm.weight * (1 + scale), norm.bias * (1 + scale) + shift


NARROW = ("out", "ff2")
"""The linears whose inputs are divided over tp; those of all others' adapters are whole."""


class Factors(NamedTuple):
    """An adapter's factors as this rank uses them."""

    a: Tensor
    b: Tensor
    low: LowRank


class Adapted:
    """A block's linears with their adapters, on the tokens of ``seq``."""

    def __init__(self, block: Block, seq: SequenceShard, *, low: dict[str, Factors], dropout: Dropout | None) -> None:
        self.block, self.seq, self.low, self.dropout = block, seq, low, dropout

    def widen(self, names: tuple[str, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """gather(norm(x) * weight[row] + bias[row]), x [n, d], through a linear and its parts' adapters -> [w, features]."""
        place, eps = self.block.adaptable[names[0]], self.block.config.norm_eps
        linear, rows = getattr(self.block, place.linear), self.seq.rows
        y = NormAffineLinear.apply(x, weight, bias, linear.weight, linear.bias, rows, eps, None)
        width = y.shape[1] // place.parts
        here = [name for name in names if name in self.low]
        for share in sorted(
            {self.low[name].low.adapter.dropout for name in here}
        ):  # one pass over x for all of a share
            factors = {name: self.low[name] for name in here if self.low[name].low.adapter.dropout == share}
            a = torch.cat([factor.a for factor in factors.values()])
            drop = self._drop(next(iter(factors)), self.seq.spans)
            z = NormAffineLinear.apply(x, weight, bias, a, None, rows, eps, drop)
            pieces, at = [], 0
            for name, factor in factors.items():
                part, rank = self.block.adaptable[name].part, len(factor.a)
                pieces.append((slice(part * width, (part + 1) * width), slice(at, at + rank), factor.low.scale))
                at += rank
            y = AddLowRank.apply(y, z, pieces, *(factor.b for factor in factors.values()))
        return y

    def narrow(self, name: str, residual: Tensor, *, x: Tensor, gate: Tensor, again: Again | None = None) -> Tensor:
        """residual + gate[row] * scatter_sum(f(x)) through a linear and its adapter; f is GELU for the feed-forward's."""
        linear, rows, gelu = getattr(self.block, name), self.seq.rows, name == "ff2"
        y = LinearGateResidual.apply(residual, x, linear.weight, linear.bias, gate, rows, gelu, again)
        if name in self.low:
            a, b, low = self.low[name]
            first = self.block.tp.rank * x.shape[1]
            z = Down.apply(x, a, rows, gelu, self._drop(name, self.seq.wide, first=first), again)
            y = AddGatedLowRank.apply(y, z, b, gate, rows.runs, low.scale)
        return y

    def _drop(self, name: str, spans: tuple[Span, ...], *, first: int = 0) -> Drop | None:
        share = self.low[name].low.adapter.dropout
        if self.dropout is None or not share:
            return None
        number = self.block.number * len(LINEARS) + LINEARS.index(name)
        return self.dropout.of(spans, linear=number, share=share, first=first)


class Again:
    """Makes what a linear gave again from its inputs, in the backward."""

    def __init__(self, make: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.make, self.inputs = make, tuple(tensor.detach() for tensor in inputs)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.make(*self.inputs)


class Head(nn.Module):
    """The final norm, AdaLN and linear, for this rank's vision tokens alone -> [n_vision, patch features]."""

    zero_unit = True
    adaptable = {"head_modulation": Place("modulation"), "proj": Place("proj")}  # noqa: RUF012 (read alone)

    def __init__(self, config: DiTConfig, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.lora = Adapters()
        self.norm_final = nn.LayerNorm(config.hidden, config.norm_eps)
        self.modulation = nn.Linear(config.time_embed_dim, 2 * config.hidden)
        self.norm_out = nn.LayerNorm(config.hidden, config.out_norm_eps)
        self.proj = nn.Linear(config.hidden, config.patch_features_out)

    def forward(self, x: Tensor, condition: Tensor, seq: SequenceShard) -> Tensor:
        shift, scale = self.lora.plus(self.modulation, "head_modulation")(condition).chunk(2, dim=-1)
        final, proj = self.norm_final, self.proj
        last = proj.weight + self.lora.low("proj").update() if "proj" in self.lora else proj.weight
        alike = (final.weight, final.bias, *fold_affine(self.norm_out, shift, scale), last, proj.bias)
        final_w, final_b, weight, bias, proj_w, proj_b = enter(alike, self.tp)
        x = F.layer_norm(seq.only(x, VISION), x.shape[-1:], final_w, final_b, final.eps)
        return NormAffineLinear.apply(x, weight, bias, proj_w, proj_b, seq.vision_rows, self.norm_out.eps, None)


class DiT(nn.Module):
    """Predicts the velocity of every vision token of a pack."""

    def __init__(self, config: DiTConfig, *, recompute: Recompute = "none", tp: Axis | None = None) -> None:
        super().__init__()
        self.config, self.recompute, self.tp = config, recompute, tp or Axis("tp")
        if config.heads % self.tp.size:
            raise ValueError(f"{config.heads} heads do not divide over {self.tp.size} tensor-parallel ranks")
        self.embed = Embedding(config, self.tp)
        self.time = TimeEmbedding(config.hidden, config.time_embed_dim, name="time")
        if config.ofs:
            self.ofs = TimeEmbedding(config.time_embed_dim, config.time_embed_dim, name="ofs")
        self.blocks = nn.ModuleList(Block(config, recompute, self.tp, number=n) for n in range(config.layers))
        self.head = Head(config, self.tp)

    def forward(
        self, vision: Tensor, text: Tensor, *, timestep: Tensor, seq: SequenceShard, ofs: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        """Patches [n_vision, features in], text [n_text, text_dim], timestep [clips] -> velocity [n_vision, features out].

        Patches, text and velocity are this rank's; timestep and ofs [clips] the whole pack's. ``dropout``: of adapters.
        """
        emb = self.time(timestep)
        if self.config.ofs:
            if ofs is None:
                raise ValueError(
                    "this model takes ofs, one value per clip (the released 1.5-5B-I2V is trained with 2.0)"
                )
            emb = emb + self.ofs(ofs)
        condition = F.silu(emb)
        x = self.embed(vision, text, seq)
        rope = rope_table(self.config, seq.layout.clips, spans=seq.heard, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            if self.recompute == "full":
                x = checkpoint(block, x, condition, rope, seq, dropout, use_reentrant=False)
            else:
                x = block(x, condition, rope, seq, dropout)
        return self.head(x, condition, seq)

    def denoise(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        image_latents: Tensor | None = None,
        ofs: Tensor | None = None,
        *,
        mesh: ParallelMesh | None = None,
    ) -> Tensor:
        """Velocity of a batch of equal clips: latents [B,T,C,H,W], text [B,L,text_dim], timestep [B] -> [B,T,C,H,W].

        ``image_latents`` [B,T,C',H,W] is the image condition of an image-to-video model; ``ofs`` [B] goes with 1.5-5B-I2V.
        The tokens are divided over ``mesh``, by default over the model's tensor-parallel ranks alone; every rank gives and gets
        the whole, without a gradient.
        """
        channels = 0 if image_latents is None else image_latents.shape[2]
        if channels != self.config.image_channels:
            raise ValueError(
                f"this model takes image_latents of {self.config.image_channels} channels, found {channels}"
            )
        x = latents if image_latents is None else torch.cat([latents, image_latents], dim=2)
        frames, height, width = x.shape[1], x.shape[3], x.shape[4]
        grid = grid_of((frames, height, width), self.config.patch)
        mesh = mesh or ParallelMesh(tp=self.tp, sample=self.tp)
        seq = SequenceShard(PackLayout((Clip(text.shape[1], grid),) * len(x)), mesh)
        vision = seq.mine(patchify(x, self.config.patch).flatten(0, 1), VISION)
        velocity = self(vision, seq.mine(text.flatten(0, 1), TEXT), timestep=timestep, seq=seq, ofs=ofs)
        return unpatchify(seq.whole_vision(velocity).unflatten(0, (len(x), -1)), grid, self.config.patch)

    def split(self, name: str) -> Split | None:
        """How a parameter is divided over tp; None where every rank holds the whole."""
        module, _, kind = name.rpartition(".")
        return SPLITS.get((module.rpartition(".")[2], kind)) if module.startswith("blocks.") else None

    def initial(self, name: str) -> Initial:
        """How a parameter starts: N(0, 0.02), outputs of residual branches / sqrt(2 layers), modulation and biases zero."""
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if is_adapter(name):
            return bounded if kind == "a" else constant(0.0)
        if leaf.startswith("norm"):
            return constant(1.0 if kind == "weight" else 0.0)
        if kind == "bias" or kind == "positions" or leaf == "modulation":
            return constant(0.0)
        if leaf in ("patch", "proj"):
            return xavier()
        return normal(0.02 / math.sqrt(2 * self.config.layers) if leaf in ("out", "ff2") else 0.02)
