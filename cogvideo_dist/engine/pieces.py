"""Which elements of a tensor a process holds, and how one division of it becomes another.

A tensor is seen as a matrix [rows, columns] in which a tensor-parallel rank's slice is a run of columns (``Cut``). Of its
slice, laid out row after row, a process holds a run of elements (``Piece``). So every piece is at most three rectangles of
the matrix, and what two pieces share is copied rectangle by rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from cogvideo_dist.parallel.split import Split, full_shape, split_of


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of slice ``part`` of ``parts``."""

    part: int
    parts: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """A whole tensor's ``shape`` and how it is sliced; without ``split`` it is not."""

    shape: tuple[int, ...]
    split: Split | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Of the matrix whose columns are dealt to slices."""
        return math.prod(self.shape[: self.split.dim]) * self.split.stacked if self.split else 1

    @property
    def columns(self) -> int:
        return self.count // self.rows

    def slice(self, part: int, parts: int) -> Piece:
        """All of one slice; all of the tensor where it is not sliced."""
        if self.split is None:
            return Piece(0, 1, 0, self.count)
        if self.shape[self.split.dim] % (self.split.stacked * parts):
            raise ValueError(f"a tensor of shape {self.shape} does not divide into {parts} slices")
        return Piece(part, parts, 0, self.count // parts)


def cut_of(model: nn.Module, name: str, *, own: tuple[int, ...]) -> Cut:
    """How ``model`` slices a parameter of which this rank has a slice of shape ``own``."""
    found = split_of(model, name)
    return Cut(full_shape(model, name, own), found[0] if found else None)


class Block(NamedTuple):
    """A rectangle of the matrix, in columns of a slice; its elements lie behind one another in the slice."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def width(self) -> int:
        return self.right - self.left


def blocks(piece: Piece, width: int) -> Iterator[Block]:
    """The rectangles that a piece of a slice of ``width`` columns consists of, in its order."""
    (top, left), (bottom, right) = divmod(piece.start, width), divmod(piece.stop, width)
    if top == bottom:
        if left < right:
            yield Block(top, bottom + 1, left, right)
        return
    if left:
        yield Block(top, top + 1, left, width)
        top += 1
    if top < bottom:
        yield Block(top, bottom, 0, width)
    if right:
        yield Block(bottom, bottom + 1, 0, right)


@dataclass(frozen=True)
class Overlap:
    """What two pieces share, as ``rows`` rows: of one piece ``source`` [start, stop), ``columns`` of each row; likewise of the
    other."""

    rows: int
    source: tuple[int, int]
    source_columns: tuple[int, int]
    target: tuple[int, int]
    target_columns: tuple[int, int]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """``source``: the source's elements ``self.source``, flat; ``target``: the target's piece, flat."""
        taken = source.view(self.rows, -1)[:, slice(*self.source_columns)]
        target[slice(*self.target)].view(self.rows, -1)[:, slice(*self.target_columns)] = taken


def overlaps(cut: Cut, *, source: Piece, target: Piece) -> Iterator[Overlap]:
    """All that ``target`` can take from ``source``; both are pieces of a tensor that is cut so."""
    if source.parts == target.parts:  # the same slices: runs of elements
        start, stop = max(source.start, target.start), min(source.stop, target.stop)
        if source.part == target.part and start < stop:
            runs = [(start - piece.start, stop - piece.start) for piece in (source, target)]
            yield Overlap(1, runs[0], (0, stop - start), runs[1], (0, stop - start))
        return
    widths = cut.columns // source.parts, cut.columns // target.parts
    for one in blocks(source, widths[0]):
        for other in blocks(target, widths[1]):
            yield from _shared((source, widths[0], one), (target, widths[1], other))


def _shared(one: tuple[Piece, int, Block], other: tuple[Piece, int, Block]) -> Iterator[Overlap]:
    """What two rectangles have in common."""
    offsets = [piece.part * width for piece, width, _ in (one, other)]  # columns before each slice
    top = max(block.top for _, _, block in (one, other))
    bottom = min(block.bottom for _, _, block in (one, other))
    left = max(block.left + offset for (_, _, block), offset in zip((one, other), offsets))
    right = min(block.right + offset for (_, _, block), offset in zip((one, other), offsets))
    if top < bottom and left < right:
        sides = []
        for (piece, width, block), offset in zip((one, other), offsets):
            first = top * width + block.left - piece.start
            columns = (left - offset - block.left, right - offset - block.left)
            sides += [(first, first + (bottom - top) * block.width), columns]
        yield Overlap(bottom - top, *sides)
