"""Columns of lists as what they are in memory: items one after the other, and where each row's begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


class Lists:
    """A column of lists: its items one after the other, and where each row's begin. R = rows, N = items."""

    def __init__(self, column: Any) -> None:
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        self.valid: Mask = pc.is_valid(array).to_numpy(zero_copy_only=False)  # [R]
        self.lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)  # [R]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])  # [R + 1]
        items = array.flatten()
        self._nulls = items.is_null().to_numpy(zero_copy_only=False) if items.null_count else None
        self.flat = items.fill_null(-1).to_numpy(zero_copy_only=False)  # [N]

    def row(self, row: int) -> NDArray[Any]:
        """The items of one row; none if it is null."""
        items: NDArray[Any] = self.flat[self.offsets[row] : self.offsets[row + 1]]
        return items

    def rows(self, doubtful: Mask) -> NDArray[np.int64]:
        """The rows of the items of which `doubtful`, or which are null."""
        items = np.flatnonzero(doubtful if self._nulls is None else doubtful | self._nulls)
        found: NDArray[np.int64] = np.unique(np.searchsorted(self.offsets, items, side="right") - 1)
        return found


def list_array(
    values: NDArray[Any], lengths: NDArray[np.int64], kind: pa.DataType, valid: Mask | None = None
) -> pa.Array:
    """Items as a column of lists; see `Lists` for the shapes."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = None if valid is None else pa.array(~valid)
    return pa.ListArray.from_arrays(offsets, pa.array(values, kind.value_type), type=kind, mask=mask)
