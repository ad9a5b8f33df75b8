"""Every collective against the same computation in one process, its adjoint, and what the ledger says it sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.parallel.ledger import Ledger
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh
from cogvideo_dist.parallel.ops import (
    barrier,
    broadcast_object,
    enter,
    even,
    gather,
    gather_objects,
    reduce_sum,
    scatter_sum,
    shift,
    to_heads,
    to_tokens,
)
from tests.parallel.layouts import forward, inputs, model_of, packs_of
from tests.ranks import run_ranks

WORLDS = (2, 3, 4)
BOUND = 1e-13
DIM = 4
Counts = tuple[int, ...]
Pair = tuple[float, float]


def counts_of(world: int) -> tuple[Counts, ...]:
    """Rows of every rank: alike, uneven, none on the first, none on one in between or the last, none at all."""
    return ((3,) * world, (4, 1, 3, 2)[:world], (0, 5, 2, 1)[:world], (2, 0, 0, 3)[:world], (0,) * world)


def heads_of(world: int) -> tuple[int, ...]:
    """That divide over the ranks, and that do not."""
    return 2 * world, 2 * world + 1, world + world // 2


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item() if found.numel() else 0.0


def dot(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a * b).sum().item()


def products(
    operation: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], *, x: Tensor, y_seed: int
) -> Pair:
    """This rank's part of <A x, y> and of <x, A* y>."""
    out = operation(x)
    y = draw(y_seed, *out.shape)
    return dot(out, y), dot(x, adjoint(y))


class Rows:
    """The operations over rows on one axis for one division of rows: errors of values, inner products of adjoints."""

    def __init__(self, axis: Axis, counts: Counts) -> None:
        self.axis, self.counts, self.mine = axis, counts, counts[axis.rank]

    def values(self) -> dict[str, float]:
        axis, counts, rank, size = self.axis, self.counts, self.axis.rank, self.axis.size
        parts = [draw(seed, count, 2, DIM) for seed, count in enumerate(counts)]
        wholes = [draw(10 + seed, sum(counts), DIM) for seed in range(size)]
        before, after = (rank - 1) % size, (rank + 1) % size
        mine = parts[rank]
        return {
            "gather": difference(gather(mine, axis, counts=counts).wait(), torch.cat(parts)),
            "scatter_sum": difference(
                scatter_sum(wholes[rank], axis, counts=counts).wait(), sum(wholes).split(list(counts))[rank]
            ),
            "shift": difference(shift(mine, axis, rows=counts[before]).wait(), parts[before]),
            "shift back": difference(shift(mine, axis, rows=counts[after], back=True).wait(), parts[after]),
            "reduce_sum": difference(reduce_sum(wholes[rank], axis), torch.stack(wholes).sum(0)),
        }

    def adjoints(self) -> dict[str, Pair]:
        axis, counts, rank, size = self.axis, self.counts, self.axis.rank, self.axis.size
        part, whole = draw(20 + rank, self.mine, DIM), draw(30 + rank, sum(counts), DIM)

        def gathered(x: Tensor) -> Tensor:
            return gather(x, axis, counts=counts).wait()

        def scattered(x: Tensor) -> Tensor:
            return scatter_sum(x, axis, counts=counts).wait()

        def shifted(x: Tensor) -> Tensor:
            return shift(x, axis, rows=counts[(rank - 1) % size]).wait()

        def back(x: Tensor) -> Tensor:
            return shift(x, axis, rows=self.mine, back=True).wait()

        def summed(x: Tensor) -> Tensor:
            return reduce_sum(x, axis)

        return {
            "gather": products(gathered, scattered, x=part, y_seed=40 + rank),
            "scatter_sum": products(scattered, gathered, x=whole, y_seed=50 + rank),
            "shift": products(shifted, back, x=part, y_seed=60 + rank),
            "reduce_sum": products(summed, summed, x=whole, y_seed=70 + rank),
        }

    def exchanges(self, heads: int, middle: tuple[int, ...]) -> tuple[dict[str, float], dict[str, Pair]]:
        """Tokens for heads and back."""
        axis, counts, rank = self.axis, self.counts, self.axis.rank
        whole = draw(heads, sum(counts), *middle, heads, DIM)
        of_tokens, of_heads = (
            whole.split(list(counts))[rank],
            whole.tensor_split(axis.size, dim=-2)[rank],
        )

        def there(x: Tensor) -> Tensor:
            return to_heads(x, axis, counts=counts).wait()

        def back(x: Tensor) -> Tensor:
            return to_tokens(x, axis, counts=counts, heads=heads).wait()

        values = {
            "to_heads": difference(there(of_tokens), of_heads),
            "to_tokens": difference(back(of_heads), of_tokens),
        }
        pairs = {
            "to_heads": products(there, back, x=of_tokens, y_seed=80 + rank),
            "to_tokens": products(back, there, x=of_heads, y_seed=90 + rank),
        }
        return values, pairs


def entered(axis: Axis) -> dict[str, float]:
    """``enter`` of two values of different shapes; their gradients differ between ranks."""
    shapes = ((2, 3), (5,))
    values = tuple(draw(seed, *shape).requires_grad_() for seed, shape in enumerate(shapes))
    grads = [[draw(10 * rank + seed, *shape) for seed, shape in enumerate(shapes)] for rank in range(axis.size)]
    outs = enter(values, axis)
    found = torch.autograd.grad(outs, values, grads[axis.rank])
    expected = [sum(grad[i] for grad in grads) for i in range(len(shapes))]
    return {
        "enter forward": max(difference(a, b) for a, b in zip(outs, values)),
        "enter backward": max(difference(a, b) for a, b in zip(found, expected)),
    }


def plain_values(axis: Axis) -> bool:
    """Text and numbers from every rank, and the first rank's."""
    mine = {"rank": axis.rank, "name": axis.name}
    everyone = [{"rank": rank, "name": axis.name} for rank in range(axis.size)]
    barrier(axis)
    return gather_objects(mine, axis) == everyone and broadcast_object(mine, axis) == everyone[0]


def measured(mesh: ParallelMesh) -> dict[str, Any]:
    """Everything on the axis of all ranks, and shifts on axes whose ranks are not neighbours."""
    axis = mesh.world
    values: dict[str, list[float]] = {}
    pairs: dict[str, list[Pair]] = {}
    for counts in counts_of(axis.size):
        rows = Rows(axis, counts)
        results = [(rows.values(), rows.adjoints())]
        results += [rows.exchanges(heads, middle) for heads in heads_of(axis.size) for middle in ((), (3,))]
        for found, adjoints in results:
            for name, error in found.items():
                values.setdefault(name, []).append(error)
            for name, pair in adjoints.items():
                pairs.setdefault(name, []).append(pair)
    values |= {name: [error] for name, error in entered(axis).items()}
    if axis.size == 4:
        square = build_mesh(Layout(ring=2, ulysses=2), rank=axis.rank)
        for part in (square.ring, square.ulysses):
            values |= {f"{part.name} {name}": [error] for name, error in Rows(part, (2, 3)).values().items()}
    return {"values": values, "pairs": pairs, "plain": plain_values(axis)}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world}ranks")
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What every rank of a world measured."""
    return run_ranks(measured, request.param)


def test_values_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(results):
        for name, errors in found["values"].items():
            assert max(errors) <= BOUND, f"{name} on rank {rank}"
        assert found["plain"]


def test_every_operation_has_its_adjoint(results: list[dict[str, Any]]) -> None:
    for name in ("gather", "scatter_sum", "shift", "reduce_sum", "to_heads", "to_tokens"):
        for case, pairs in enumerate(zip(*(found["pairs"][name] for found in results), strict=True)):
            left, right = map(sum, zip(*pairs))
            assert left == pytest.approx(right, rel=BOUND, abs=BOUND), f"{name}, case {case}"


def test_nothing_happens_on_an_axis_of_one_rank() -> None:
    axis, x = Axis("tp"), draw(0, 3, 2, DIM)
    assert gather(x, axis, counts=(3,)).wait() is x
    assert scatter_sum(x, axis, counts=(3,)).wait() is x
    assert to_heads(x, axis, counts=(3,)).wait() is x
    assert to_tokens(x, axis, counts=(3,), heads=2).wait() is x
    assert shift(x, axis, rows=3).wait() is x and shift(x, axis, rows=3, back=True).wait() is x
    assert enter((x,), axis)[0] is x
    total = reduce_sum(x, axis)
    assert torch.equal(total, x) and total.data_ptr() != x.data_ptr(), "a sum is always the caller's to change"
    assert broadcast_object("a", axis) == "a" and gather_objects("a", axis) == ["a"]
    barrier(axis)
    assert axis.ledger.take() == {}


def test_shares_are_those_of_numpy() -> None:
    for total in range(12):
        for parts in range(1, 6):
            assert list(even(total, parts)) == [len(piece) for piece in torch.arange(total).tensor_split(parts)]


def sent_by_each(mesh: ParallelMesh) -> list[tuple[str, int, int]]:
    """(operation, calls, bytes) of one call each."""
    axis, counts, heads = mesh.world, (2, 0, 3), 5
    rank = axis.rank
    part, whole = torch.zeros(counts[rank], 5).double(), torch.zeros(5, 5).double()
    values = [torch.zeros(7).double().requires_grad_(), torch.zeros(2, 4).double().requires_grad_()]
    calls: dict[str, Callable[[], object]] = {
        "gather": lambda: gather(part, axis, counts=counts).wait(),
        "scatter_sum": lambda: scatter_sum(whole, axis, counts=counts).wait(),
        "to_heads": lambda: to_heads(torch.zeros(counts[rank], heads, 4).double(), axis, counts=counts).wait(),
        "to_tokens": lambda: to_tokens(
            torch.zeros(5, (2, 2, 1)[rank], 4).double(), axis, counts=counts, heads=heads
        ).wait(),
        "shift": lambda: shift(part, axis, rows=counts[rank - 1]).wait(),
        "shift back": lambda: shift(part, axis, rows=counts[(rank + 1) % 3], back=True).wait(),
        "reduce_sum": lambda: reduce_sum(torch.zeros(3, 5).double(), axis),
        "enter forward": lambda: enter(values, axis),
        "enter": lambda: torch.autograd.grad([y.sum() for y in enter(values, axis)], values),
    }  # fmt: skip
    found = []
    for name, call in calls.items():
        axis.ledger.take()
        call()
        total, taken = axis.ledger.bytes_of("world"), axis.ledger.take()
        assert total == sum(traffic.bytes for traffic in taken.values()) and len(taken) < 2
        found.append((name, sum(traffic.calls for traffic in taken.values()), total))
    return found


def test_ledger_counts_what_was_sent() -> None:
    """Three ranks with 2, 0 and 3 rows, in 64 bits: a row of 5 is 40 bytes, a head of 4 is 32."""
    first, second, third = run_ranks(sent_by_each, 3)
    padded = 2 * 3 * 40  # parts of the longest's 3 rows, to two others
    summed, both = 2 * 2 * (3 * 40) // 3, 2 * 2 * (15 * 8) // 3
    alike = {
        "gather": (1, padded), "scatter_sum": (1, padded), "reduce_sum": (1, summed), "enter forward": (0, 0),
        "enter": (1, both),
    }  # fmt: skip
    tokens = {"to_heads": (2 * 3, 0, 3 * 4), "to_tokens": (3 * 2, 5 * 2, 2 * 1)}  # tokens x heads of other ranks
    rows = (2, 0, 3)
    for rank, found in enumerate((first, second, third)):
        expected = alike | {name: (1, 32 * counts[rank]) for name, counts in tokens.items()}
        expected |= {name: (int(rows[rank] > 0), 40 * rows[rank]) for name in ("shift", "shift back")}
        assert {name: (calls, sent) for name, calls, sent in found} == expected, f"rank {rank}"


def test_ledger_adds_up_until_it_is_taken() -> None:
    ledger = Ledger()
    ledger.add("tp", "gather", sent=5)
    ledger.add("tp", "gather", sent=7)
    ledger.add("tp", "sum", sent=1)
    ledger.add("sp", "gather", sent=2)
    assert (ledger.bytes_of("tp"), ledger.bytes_of("sp"), ledger.bytes_of("dp")) == (13, 2, 0)
    assert ledger.take() == {("tp", "gather"): (2, 12), ("tp", "sum"): (1, 1), ("sp", "gather"): (1, 2)}
    assert ledger.take() == {} and ledger.bytes_of("tp") == 0


class Collectives(TorchDispatchMode):
    """Every operator of torch's own ``c10d`` library: (operation, bytes) as the ledger would count it on two ranks."""

    RECEIVED = ("recv_",)

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name not in self.RECEIVED:
                self.found.append(self.counted(name, args))
        return func(*args, **(kwargs or {}))

    def counted(self, name: str, args: Sequence[Any]) -> tuple[str, int]:
        """Arguments in the order of the operators' schemas; with two ranks a sum sends what it is given once."""
        if name == "_allgather_base_":
            return "gather", args[1].nbytes
        if name == "_reduce_scatter_base_":
            return "scatter_sum", args[0].nbytes
        if name == "allreduce_":
            return "sum", sum(tensor.nbytes for tensor in args[0])
        if name == "send":
            return "message", sum(tensor.nbytes for tensor in args[0])
        return name, 0  # what the ledger does not know fails the comparison


def traffic_of_transformer(mesh: ParallelMesh, layouts: Sequence[Layout]) -> list[dict[str, dict[str, list[int]]]]:
    """Per layout: operation -> calls and bytes of a forward and backward, by the ledger and by torch's dispatcher."""
    config, found = replace(tiny("cogvideox-5b"), heads=4), []
    for layout in layouts:
        part = build_mesh(layout, rank=mesh.world.rank)
        model, seq = model_of(config, part), SequenceShard(packs_of(config)[0], part)
        part.ledger.take()
        with Collectives(mesh.world.rank) as seen:
            forward(model, seq, inputs(config, 0))
        by_ledger: dict[str, list[int]] = {}
        for (_, operation), traffic in part.ledger.take().items():
            operation = "message" if operation in ("all_to_all", "shift") else operation  # to the one other rank
            calls, bytes_ = by_ledger.get(operation, [0, 0])
            by_ledger[operation] = [calls + traffic.calls, bytes_ + traffic.bytes]
        by_torch: dict[str, list[int]] = {}
        for operation, bytes_ in seen.found:
            by_torch.setdefault(operation, [0, 0])[0] += 1
            by_torch[operation][1] += bytes_
        found.append({"ledger": by_ledger, "torch": by_torch})
    return found


def test_no_collective_of_the_transformer_escapes_the_ledger() -> None:
    expected = {
        Layout(ulysses=2): {"message"},
        Layout(ring=2): {"message"},
        Layout(tp=2): {"gather", "scatter_sum", "sum"},
    }
    for rank, found in enumerate(run_ranks(traffic_of_transformer, 2, list(expected))):
        for (layout, operations), sides in zip(expected.items(), found):
            assert sides["ledger"] == sides["torch"], f"{layout.name} on rank {rank}"
            assert set(sides["ledger"]) == operations
