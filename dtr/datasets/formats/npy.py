"""numpy's .npy files: a sample is a row, that is, an index of the first axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns
from dtr.datasets.formats.rows import read_rows
from dtr.errors import DatasetMismatch

__all__ = ["Npy"]

COLUMN = "data"  # of an array without named fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Npy:
    """Rows of an array in C order and of any dtype but object; the fields of a structured dtype are the columns."""

    name = "npy"
    suffixes = (".npy",)
    has_marks = False

    def options(self) -> Mapping[str, str]:
        return {}

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        return Measure(samples=_header(file).shape[0])

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        return _header(file).dtype.names or (COLUMN,)

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        rows = self._rows(file, span)
        chosen = chosen_columns(columns, rows.dtype.names or (COLUMN,), file.name)
        return {column: rows[column] if rows.dtype.names else rows for column in chosen}

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[Any]:
        yield from self._rows(file, span)

    def _rows(self, file: BufferedReader, span: Span) -> NDArray[Any]:
        header = _header(file)
        return read_rows(file, span, dtype=header.dtype, row_shape=header.shape[1:], offset=header.offset)


def _header(file: BufferedReader) -> np.memmap[Any, Any]:
    """The array's dtype, shape and offset; numpy checks that the file holds all of it. Its values are never looked at."""
    try:
        header = np.lib.format.open_memmap(file.name, mode="r")
    except (ValueError, EOFError, OSError) as exc:
        raise DatasetMismatch(f"{file.name} is not a whole .npy file of numbers: {exc}", file=file.name) from exc
    if header.ndim == 0:
        raise DatasetMismatch(f"{file.name} holds a single value; expected an array whose first axis is the sample", file=file.name)
    if not header.flags.c_contiguous:
        raise DatasetMismatch(
            f"{file.name} is in Fortran order, so its rows are not together; save it with np.ascontiguousarray", file=file.name
        )
    return header
