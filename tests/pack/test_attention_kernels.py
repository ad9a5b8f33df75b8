"""Every kernel of ``pack.attention``: the CPU's by its numbers, the GPU's by what each operator is called with.

A machine without a GPU can still run the GPU operators' shape functions on the meta device, and read their schemas: that
holds what goes where in a call, which is where such calls go wrong.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideo_dist.pack.attention import KERNELS, backend_for
from cogvideo_dist.pack.layout import Clip, Group, PackLayout, groups_of

CLIPS, LENGTH, HEADS, DIM = 2, 50, 4, 64
ON_GPU = [name for name in KERNELS if name != "cpu"]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Calls(TorchDispatchMode):
    """The attention operators called, with their arguments and results by the names of their schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "attention" in func.__name__:
            schema = func._schema
            names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
            returns = [item.name or str(index) for index, item in enumerate(schema.returns)]
            self.found.append((dict(zip(names, args)) | (kwargs or {}), dict(zip(returns, result))))
        return result


def strided_heads(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As a block has them: q and k tokens first and whole, v a slice of the joint tensor."""
    qkv = torch.empty(CLIPS, LENGTH, 3, HEADS, DIM, device=device, dtype=dtype)
    q, k, v = (part.transpose(1, 2) for part in (qkv[:, :, 0].contiguous(), qkv[:, :, 1].contiguous(), qkv[:, :, 2]))
    return q, k, v


@pytest.mark.parametrize("kernel", ON_GPU)
def test_backward_gets_every_argument_under_its_name(kernel: str) -> None:
    dtype = torch.float32 if kernel == "efficient" else torch.bfloat16
    q, k, v = strided_heads("meta", dtype)
    grad = torch.empty_like(q)
    with Calls() as calls:
        out, saved = KERNELS[kernel].forward(q, k, v)
        KERNELS[kernel].backward(grad, (q, k, v), out, saved)
    (given, made), (wanted, _) = calls.found
    assert given["query"] is q and given["key"] is k and given["value"] is v
    assert given.get("compute_log_sumexp", True) is True and not given.get("attn_bias")
    state = {"philox_seed": "rng_state", "philox_offset": "unused"} if kernel == "flash" else {}
    logsumexp = "log_sumexp" if kernel == "efficient" else "logsumexp"
    for name in ("philox_seed", "philox_offset"):
        assert wanted[name] is made[state.get(name, name)], name
    assert wanted["logsumexp"] is made[logsumexp] and made[logsumexp].dtype == torch.float32
    expected = {"query": q, "key": k, "value": v, "out": out, wanted_grad(wanted): grad}
    for name, tensor in expected.items():
        assert wanted[name] is tensor, name
    for name in ("max_q", "max_k"):
        assert wanted.get(name, LENGTH) == LENGTH
    for name in ("cum_seq_q", "cum_seq_k"):
        assert wanted.get(name) is None and made.get(name) is None
    assert wanted["dropout_p"] == 0.0 and not wanted.get("is_causal") and wanted.get("attn_bias") is None


def wanted_grad(arguments: dict[str, Any]) -> str:
    return next(name for name in arguments if name.startswith("grad_out"))


@pytest.mark.parametrize("kernel", ON_GPU)
def test_output_and_gradients_come_tokens_first_without_a_copy(kernel: str) -> None:
    dtype = torch.float32 if kernel == "efficient" else torch.bfloat16
    q, k, v = strided_heads("meta", dtype)
    out, saved = KERNELS[kernel].forward(q, k, v)
    gradients = KERNELS[kernel].backward(torch.empty_like(q), (q, k, v), out, saved)
    assert len(gradients) == 3
    for tensor in (out, *gradients):
        assert tensor.shape == q.shape and tensor.dtype == dtype
        assert tensor.transpose(1, 2).is_contiguous()


def test_what_a_kernel_saves_is_only_tensors() -> None:
    """So that it goes through ``save_for_backward``."""
    for kernel in ON_GPU:
        dtype = torch.float32 if kernel == "efficient" else torch.bfloat16
        _, saved = KERNELS[kernel].forward(*strided_heads("meta", dtype))
        assert all(isinstance(item, Tensor) for item in saved), kernel


@pytest.mark.parametrize("clips", [(Clip(5, (2, 3, 4)),), (Clip(3, (1, 4, 4)), Clip(1, (2, 3, 3)), Clip(0, (1, 2, 3)))])
def test_packed_attention_equals_plain_attention_of_each_clip(clips: tuple[Clip, ...]) -> None:
    layout = PackLayout(clips)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.tokens, 3, 2, 16, generator=generator, dtype=torch.float64)
    grad = torch.randn(layout.tokens, 2, 16, generator=generator, dtype=torch.float64)
    q, k, v = qkv.unbind(1)
    backend = backend_for("auto", device=q.device, dtype=q.dtype)
    groups = groups_of(layout.lengths, layout.lengths)
    attended = backend.attend((q, k, v), groups)
    found = (attended.out, *backend.attend_backward(grad, attended, qkv=(q, k, v), groups=groups))
    leaves = [part.clone().requires_grad_() for part in (q, k, v)]
    ends = layout.cu_seqlens
    expected = torch.cat([
        plain(*(leaf[start:stop].transpose(0, 1) for leaf in leaves)).transpose(0, 1)
        for start, stop in itertools.pairwise(ends)
    ])  # fmt: skip
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, (expected, *torch.autograd.grad(expected, leaves, grad))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_clips_of_one_length_share_a_call() -> None:
    layout = PackLayout((Clip(2, (1, 2, 3)), Clip(2, (1, 3, 2)), Clip(0, (2, 2, 2)), Clip(1, (1, 1, 1))))
    groups = groups_of(layout.lengths, layout.lengths)
    assert groups == (Group(0, 0, 3, 8, 8), Group(24, 24, 1, 2, 2))
    q = torch.randn(layout.tokens, 2, 16)
    with Calls() as calls:
        backend_for("cpu", device=q.device, dtype=q.dtype).attend((q, q, q), groups)
    assert len(calls.found) == 2
