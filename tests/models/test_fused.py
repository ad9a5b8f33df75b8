"""The block's operations against plain autograd, on both ways to the gradient of a gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_dist.models import fused
from cogvideo_dist.models.fused import LinearGateResidual
from cogvideo_dist.pack.layout import Clip, PackLayout
from cogvideo_dist.pack.shard import SequenceShard

LAYOUT = PackLayout((Clip(3, (2, 2, 3)), Clip(0, (1, 2, 2)), Clip(5, (1, 1, 4))))
ROWS = SequenceShard(LAYOUT).rows


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("short_run", [0, 10**6])  # by products of the weight's size, by the output made again
def test_gated_linear_has_every_gradient_of_plain_code(
    monkeypatch: pytest.MonkeyPatch, short_run: int, gelu: bool
) -> None:
    monkeypatch.setattr(fused, "SHORT_RUN", short_run)
    n, wide, d = LAYOUT.tokens, 7, 5
    inputs = leaves((n, d), (n, wide), (d, wide), (d,), (2 * len(LAYOUT.clips), d))
    found = LinearGateResidual.apply(*inputs, ROWS, gelu, None)
    residual, x, w, b, gate = inputs
    rows = torch.cat([torch.full((run.stop - run.start,), run.row) for run in ROWS.runs])
    expected = residual + gate[rows] * F.linear(F.gelu(x, approximate="tanh") if gelu else x, w, b)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (cotangent,) = leaves((n, d))
    pairs = zip(torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))
    for name, (a, e) in zip(("residual", "x", "w", "b", "gate"), pairs):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12, msg=name)


def test_the_two_ways_differ_in_products_only() -> None:
    """A row without tokens (a clip without text) gets a zero gradient on both."""
    grad, active = (torch.randn(LAYOUT.tokens, size, dtype=torch.float64) for size in (5, 7))
    w, b, gate = (torch.randn(*size, dtype=torch.float64) for size in ((5, 7), (5,), (6, 5)))
    rows = torch.cat([torch.full((run.stop - run.start,), run.row) for run in ROWS.runs])
    ways = [
        way(grad, grad * gate[rows], active=active, linear=(w, b), gate=gate, runs=ROWS.runs)
        for way in (fused._gradients_by_products, fused._gradients_by_output)
    ]
    for first, second in zip(*ways):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-12)
    assert not ways[0][1][2].any() and not ways[1][1][2].any()
