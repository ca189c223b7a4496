"""Sparse gradients: the rows of an embedding that occur in a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from keras import ops


@dataclasses.dataclass
class SparseRows:
    """The gradient of a table of which few rows were looked up.

    Attributes:
        ids: int32 `(n,)`, row numbers; one may occur several times.
        values: `(n, ...)`, for each position the *sum* of the gradients of
            all positions with the same id: rows that are written twice are
            written alike, so nothing needs to be taken out.
        unique: `(n, ...)`, the sum for each distinct id, then zeros: what a
            norm over the gradient has to see.
    """

    ids: Any
    values: Any
    unique: Any

    @classmethod
    def sum_repeated(cls, ids: Any, values: Any) -> SparseRows:
        """From ids and gradients as they come, repeated or not."""
        n = ids.shape[0] if ids.shape[0] is not None else ops.shape(ids)[0]
        order = ops.argsort(ids)
        ordered = ops.take(ids, order)
        is_new = ops.cast(ordered[1:] != ordered[:-1], "int32")
        rank = ops.concatenate([ops.zeros_like(ordered[:1]), ops.cumsum(is_new)])
        unique = ops.segment_sum(ops.take(values, order, axis=0), rank, num_segments=n)
        return cls(ordered, ops.take(unique, rank, axis=0), unique)

    def map(self, function: Callable) -> SparseRows:
        """Applies an elementwise function that maps 0 to 0."""
        return SparseRows(self.ids, function(self.values), function(self.unique))

    def gather(self, tensors: dict) -> dict:
        """The rows of each of a (nested) dict of tensors."""
        return {
            k: self.gather(x) if isinstance(x, dict) else ops.take(x, self.ids, axis=0)
            for k, x in tensors.items()
        }

    def scatter(self, tensors: dict, rows: dict) -> dict:
        """The tensors with these rows put in their places."""
        places = ops.expand_dims(self.ids, -1)
        return {
            k: self.scatter(x, rows[k])
            if isinstance(x, dict)
            else ops.scatter_update(x, places, rows[k])
            for k, x in tensors.items()
        }

    def elements(self, shape: tuple[int, ...]) -> Any:
        """The element numbers of the rows in a table of `shape`."""
        size = math.prod(shape[1:])
        within = ops.reshape(ops.arange(size, dtype="int32"), (1, *shape[1:]))
        first = ops.reshape(self.ids * size, (-1, *(1 for _ in shape[1:])))
        return first + within
