"""Files whose samples all have one size: a sample is found by arithmetic."""

from __future__ import annotations

import math
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats.contract import Span
from dtr.errors import DatasetMismatch

__all__ = ["read_rows"]


def read_rows(file: BufferedReader, span: Span, *, dtype: np.dtype[Any], row_shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    """The rows ``span.start`` to ``span.stop`` of an array that begins at byte ``offset``, read into memory of their own.

    Raises DatasetMismatch if the file ends before them.
    """
    rows = np.empty((span.stop - span.start, *row_shape), dtype=dtype)
    file.seek(offset + span.start * dtype.itemsize * math.prod(row_shape))
    buffer = rows.reshape(-1).view(np.uint8).data if rows.nbytes else memoryview(b"")
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise DatasetMismatch(f"{file.name} ends within samples {span.start} to {span.stop}: it was truncated", file=file.name)
        done += count
    return rows
