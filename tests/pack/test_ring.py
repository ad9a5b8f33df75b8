"""Attention over a ring against plain attention of each clip, and the back ends against one another and in their refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogvideo_dist.pack.attention import KERNELS, PACKWISE, Backend, Clipwise, Packwise, backend_for
from cogvideo_dist.pack.layout import groups_of, ring_shares
from cogvideo_dist.pack.ring import Shares, ring_attend, ring_attend_backward
from cogvideo_dist.parallel.mesh import ParallelMesh
from tests.ranks import run_ranks

HEADS, DIM, BOUND = 3, 16, 1e-12
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (
    (24,),
    (31, 33, 8, 8),
    (16, 16, 16),
    (1, 3, 2, 9, 1),  # clips that some ranks hold no token of
    (1, 1),  # ranks that hold no token at all
)
Named = dict[str, float]


def plain(q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
    """Each clip on its own, the scores written out; [n, heads, dim]."""
    outs = []
    for parts in zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))):
        scores = parts[0] @ parts[1].transpose(-1, -2) * q.shape[-1] ** -0.5
        outs.append((scores.softmax(-1) @ parts[2]).transpose(0, 1))
    return torch.cat(outs)


def drawn(lengths: tuple[int, ...], sharpness: float = 1.0) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The output's gradient, and q, k, v of whole clips; ``sharpness`` scales the scores."""
    generator = torch.Generator().manual_seed(sum(lengths))
    grad, q, k, v = torch.randn(4, sum(lengths), HEADS, DIM, generator=generator, dtype=torch.float64)
    return grad, (q * sharpness, k, v)


def expected(lengths: tuple[int, ...], sharpness: float = 1.0) -> dict[str, Tensor]:
    grad, qkv = drawn(lengths, sharpness)
    leaves = tuple(x.clone().requires_grad_() for x in qkv)
    out = plain(*leaves, lengths=lengths)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, leaves, grad))))


def rows_of(shares: Shares, rank: int) -> Tensor:
    """Indices of a rank's tokens in the sequence of whole clips: of each clip what the ranks before it left."""
    found, start = [], 0
    for clip, length in enumerate(map(sum, zip(*shares))):
        first = start + sum(own[clip] for own in shares[:rank])
        found += range(first, first + shares[rank][clip])
        start += length
    return torch.tensor(found, dtype=torch.long)


def case(mesh: ParallelMesh, shares: Shares, sharpness: float = 1.0) -> Named:
    """Largest difference of each result from plain attention (relative if above 1), and of the bytes sent from what travels."""
    axis, lengths = mesh.world, tuple(map(sum, zip(*shares)))
    rows = rows_of(shares, axis.rank)
    grad, qkv = drawn(lengths, sharpness)
    q, k, v = (x[rows] for x in qkv)
    axis.ledger.take()
    attended = ring_attend(KERNELS["cpu"], (q, k, v), ring=axis, shares=shares)
    sent = axis.ledger.bytes_of(axis.name)
    grads = ring_attend_backward(KERNELS["cpu"], grad[rows], attended, qkv=(q, k, v), ring=axis, shares=shares)
    back = axis.ledger.bytes_of(axis.name) - sent
    found = {}
    for (name, whole), part in zip(expected(lengths, sharpness).items(), (attended.out, *grads)):
        assert part.shape == q.shape
        scale = whole.abs().max().clamp_min(1.0)
        found[name] = ((part - whole[rows]).abs().max() / scale).item() if len(rows) else 0.0
    # Keys and values of every owner but the next rank pass through here; gradients of every owner but this rank.
    token, following = 2 * HEADS * DIM * 8, (axis.rank + 1) % axis.size
    travelling = sum(lengths) * token
    found["bytes forward"] = abs(sent - (travelling - sum(shares[following]) * token))
    found["bytes backward"] = abs(back - sent - (travelling - sum(shares[axis.rank]) * token))
    return found


def ring_errors(mesh: ParallelMesh) -> dict[str, Named]:
    size = mesh.world.size
    found = {str(lengths): case(mesh, ring_shares(lengths, size)) for lengths in LENGTHS}
    uneven = tuple((5 * (rank == 0), rank, 4 * (rank == size - 1) + 1) for rank in range(size))
    found["a clip on one rank alone, others uneven"] = case(mesh, uneven)
    found["scores of hundreds"] = case(mesh, ring_shares((31, 6), size), sharpness=100.0)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ring_equals_plain_attention_of_each_clip(world: int) -> None:
    for rank, cases in enumerate(run_ranks(ring_errors, world)):
        for name, found in cases.items():
            assert max(found.values()) <= BOUND, f"{name} on rank {rank}: {found}"


def both_ways(backend: Backend, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    grad, qkv = drawn(lengths)
    groups = groups_of(lengths, lengths)
    attended = backend.attend(qkv, groups)
    assert not attended.out.requires_grad
    grads = backend.attend_backward(grad, attended, qkv=qkv, groups=groups)
    return dict(zip(("out", "dq", "dk", "dv"), (attended.out, *grads)))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_call_for_the_pack_equals_a_call_for_each_clip(lengths: tuple[int, ...]) -> None:
    whole, each, reference = (
        both_ways(Packwise(plain), lengths), both_ways(Clipwise(KERNELS["cpu"]), lengths), expected(lengths),
    )  # fmt: skip
    for name, tensor in reference.items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=BOUND, msg=name)
        torch.testing.assert_close(each[name], tensor, rtol=0, atol=BOUND, msg=name)


def test_a_call_for_the_pack_serves_callers_without_autograd() -> None:
    """A block calls it inside its own forward, where nothing is recorded."""
    with torch.no_grad():
        found = both_ways(Packwise(plain), (5, 3))
    torch.testing.assert_close(found, expected((5, 3)), rtol=0, atol=BOUND)


@pytest.mark.parametrize("backend", [Packwise(plain), Clipwise(KERNELS["cpu"])], ids=["pack", "clip"])
def test_no_tokens_are_attended_without_a_call(backend: Backend) -> None:
    none = torch.empty(0, HEADS, DIM)
    attended = backend.attend((none, none, none), ())
    grads = backend.attend_backward(none, attended, qkv=(none, none, none), groups=())
    assert [x.shape for x in (attended.out, *grads)] == [none.shape] * 4


def refusal(name: str, device: torch.device, dtype: torch.dtype, ring: int) -> str:
    with pytest.raises(ValueError, match=f"parallel.attention {name} ") as refused:
        backend_for(name, device=device, dtype=dtype, ring=ring)
    return str(refused.value)


def test_a_cpu_has_one_back_end() -> None:
    for name in ("auto", "cpu"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for ring in (1, 4):
                backend = backend_for(name, device=CPU, dtype=dtype, ring=ring)
                assert isinstance(backend, Clipwise) and backend.kernel is KERNELS["cpu"]


@pytest.mark.parametrize("name", [name for name in (*KERNELS, *PACKWISE) if name != "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_ends_of_a_gpu_are_refused_on_a_cpu_by_name(name: str, dtype: torch.dtype) -> None:
    assert refusal(name, CPU, dtype, 1) == f"parallel.attention {name} does not run on cpu; use auto or one of cpu"


def test_a_gpu_refuses_the_back_end_of_a_cpu() -> None:
    text = refusal("cpu", CUDA, torch.float32, 1)
    assert text == "parallel.attention cpu does not run on cuda; use auto or one of efficient, flex"


@pytest.mark.parametrize("name", ["cudnn", "flash", "varlen", "flash_attn"])
def test_kernels_of_16_bits_refuse_more(name: str) -> None:
    assert "needs 16 bits, found torch.float32; use auto or one of efficient, flex" in refusal(
        name, CUDA, torch.float32, 1
    )


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_a_call_for_the_pack_has_no_place_in_a_ring(name: str) -> None:
    text = refusal(name, CUDA, torch.bfloat16, 2)
    assert "has no backward for parts of a clip, which parallel.ring 2 needs" in text
    assert text.endswith("use auto or one of efficient, cudnn, flash")


@pytest.mark.parametrize("name", ["efficient", "flex"])
def test_no_gpu_kernel_computes_in_64_bits(name: str) -> None:
    assert "does not compute in torch.float64" in refusal(name, CUDA, torch.float64, 1)


def test_what_is_asked_for_is_what_runs() -> None:
    for name, kernel in KERNELS.items():
        if name != "cpu":
            backend = backend_for(name, device=CUDA, dtype=torch.bfloat16, ring=2)
            assert isinstance(backend, Clipwise) and backend.kernel is kernel
    for name in ("varlen", "flex"):
        backend = backend_for(name, device=CUDA, dtype=torch.bfloat16)
        assert isinstance(backend, Packwise) and backend.function is PACKWISE[name]
