"""numpy's .npy files: a sample is a row, that is, an index of the first axis.

The header is read here and not by numpy, whose readers map the file, which needs as much address space as the file is long, open it
again by its name, under which another file may lie by then, or trust the numbers in it.
"""

from __future__ import annotations

import ast
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns
from dtr.datasets.formats.rows import read_rows
from dtr.errors import DatasetMismatch

__all__ = ["Npy", "array_of"]

COLUMN: Final = "data"  # of an array without named fields
_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER_BYTES: Final = 64 << 10
_MAX_ROWS: Final = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Npy:
    """Rows of an array in C order and of any dtype but object; the fields of a structured dtype are the columns."""

    name = "npy"
    suffixes = (".npy",)
    has_marks = False
    has_rows = True

    def options(self) -> Mapping[str, str]:
        return {}

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        return Measure(samples=_header(file).shape[0])

    def promised(self, start: bytes) -> int | None:
        return None

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
        if span.stop > header.shape[0]:
            raise DatasetMismatch(f"{file.name} has {header.shape[0]:,} rows, expected {span.stop:,}: it changed", file=file.name)
        return read_rows(file, span, dtype=header.dtype, row_shape=header.shape[1:], offset=header.offset)


def array_of(content: bytes) -> NDArray[Any]:
    """The array in the bytes of a .npy file; raises ValueError, TypeError or SyntaxError if they are none."""
    header, fortran = _parsed(io.BytesIO(content), len(content))
    values = np.frombuffer(content, header.dtype, math.prod(header.shape), header.offset)
    return values.reshape(header.shape, order="F" if fortran else "C").copy()


def _header(file: BufferedReader) -> _Header:
    """The array's dtype, shape and offset, once it is certain that the file holds all of it."""
    try:
        header, fortran = _parsed(file, os.fstat(file.fileno()).st_size)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError, OSError) as exc:
        raise DatasetMismatch(f"{file.name} is not a whole .npy file of numbers: {exc}", file=file.name) from exc
    if not header.shape:
        raise DatasetMismatch(f"{file.name} holds a single value; expected an array whose first axis is the sample", file=file.name)
    if fortran and len(header.shape) > 1:
        raise DatasetMismatch(
            f"{file.name} is in Fortran order, so its rows are not together; save it with np.ascontiguousarray", file=file.name
        )
    return header


def _parsed(file: IO[bytes], size_bytes: int) -> tuple[_Header, bool]:
    """The header, and whether the array is in Fortran order; ValueError and its like for what is none, or says more than there is."""
    file.seek(0)
    start = file.read(8)
    if start[:6] != _MAGIC or len(start) < 8 or start[6] not in {1, 2, 3}:
        raise ValueError("it does not begin as one")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header says it has {length:,} bytes")
    described = ast.literal_eval(file.read(length).decode("utf-8" if start[6] == 3 else "latin-1").strip())
    if not isinstance(described, dict) or described.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header has not the keys descr, fortran_order and shape")
    dtype, shape = np.lib.format.descr_to_dtype(described["descr"]), described["shape"]
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"it holds values of {dtype}, which would have to be unpickled" if dtype.hasobject else f"its dtype is {dtype}")
    if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size <= _MAX_ROWS for size in shape) or len(shape) > 32:
        raise ValueError(f"its shape is {shape!r:.80}")
    offset = 8 + width + length
    wanted = offset + math.prod(shape) * dtype.itemsize
    if wanted > size_bytes:
        raise ValueError(f"its header promises {wanted:,} bytes, it has {size_bytes:,}")
    if shape and shape[0] and wanted == offset:
        raise ValueError(f"its {shape[0]:,} rows are of no bytes: shape {shape!r}")
    return _Header(dtype=dtype, shape=shape, offset=offset), bool(described["fortran_order"])
