"""Values of samples as columns: one array a column, its first axis the sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["column_of"]


def column_of(values: Sequence[Any]) -> NDArray[Any]:
    """Numbers, booleans and equally long lists of them as such, arrays of one shape and dtype stacked; anything else as objects."""
    kinds = {type(value) for value in values}
    if kinds == {np.ndarray} and len({(value.shape, value.dtype) for value in values}) == 1:
        return np.stack(values)
    if kinds and kinds <= {int, float, bool, list} and not (bool in kinds and len(kinds) > 1):
        try:
            column = np.array(values, dtype=np.int64 if kinds == {int} else None)
        except (ValueError, OverflowError):  # ragged lists, integers beyond 64 bits
            pass
        else:
            if column.dtype.kind in "bif":
                return column
    return np.fromiter(values, dtype=np.object_, count=len(values))
