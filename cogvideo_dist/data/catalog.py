"""The samples of all of a run's sources under one numbering: a source's come after those of the sources before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cogvideo_dist.data.index import Index, Record


class Catalog(Sequence[Record]):
    """``indexes`` end to end. ``starts``: each one's first number, and the number of all samples."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self.indexes = tuple(indexes)
        self.starts = (0, *accumulate(map(len, self.indexes)))

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        source, row = self.find(place)
        return self.indexes[source][row]

    def find(self, place: int) -> tuple[int, int]:
        """(source, row) of a sample."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        source = bisect_right(self.starts, place) - 1
        return source, place - self.starts[source]

    def key(self, place: int) -> str:
        source, row = self.find(place)
        return self.indexes[source].key(row)

    def column(self, name: str) -> NDArray[Any]:
        """As of an index; not copied where there is one source."""
        columns = [index.column(name) for index in self.indexes]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        sizes = [index.sizes for index in self.indexes]
        return sizes[0] if len(sizes) == 1 else np.concatenate(sizes)

    @property
    def digest(self) -> str:
        """Tells other samples, or another order of them."""
        return "-".join(index.digest for index in self.indexes)
