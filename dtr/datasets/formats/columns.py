"""Values of samples as columns: one array a column, its first axis the sample."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXACT", "bytes_of", "column_of"]

EXACT: Final = 1 << 53  # up to here a float of 64 bits has every integer

_PLAIN: Final = frozenset({bytes, str, int, float, bool, type(None)})


def column_of(values: Sequence[Any]) -> NDArray[Any]:
    """Numbers, booleans and equally long lists of them as such, arrays of one shape and dtype stacked; anything else as objects.

    So are integers beside floats, if some are beyond `EXACT`: they would not come out as they went in.
    """
    kinds = {type(value) for value in values}
    if kinds == {np.ndarray} and len({(value.shape, value.dtype) for value in values}) == 1:
        return np.stack(values)
    if kinds and kinds <= {int, float, bool, list} and not (bool in kinds and len(kinds) > 1):
        try:
            column = np.array(values, dtype=np.int64 if kinds == {int} else None)
        except (ValueError, OverflowError):  # ragged lists, integers beyond 64 bits
            pass
        else:
            if column.dtype.kind in "bi" or (column.dtype.kind == "f" and not (int in kinds and any(map(_inexact, values)))):
                return column
    return np.fromiter(values, dtype=np.object_, count=len(values))


def _inexact(value: Any) -> bool:
    return type(value) is int and abs(value) > EXACT


def bytes_of(columns: Mapping[str, Any]) -> int:
    """The memory that columns take, arrays or tensors: of objects what they hold as well, bytes, text, arrays and lists of them."""
    return sum(int(values.nbytes) + (_held(values.tolist()) if values.dtype == np.object_ else 0) for values in columns.values())


def _held(values: Sequence[Any]) -> int:
    if {type(value) for value in values} <= _PLAIN:
        return sum(map(sys.getsizeof, values))
    return sum(map(_size_of, values))


def _size_of(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return bytes_of({"": value})
    if isinstance(value, dict):
        return sys.getsizeof(value) + _held([*value, *value.values()])
    return sys.getsizeof(value) + (_held(value) if isinstance(value, list) else 0)
