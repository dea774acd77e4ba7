"""Flat token files (.bin): numbers of one type and nothing else; a sample is a block of ``sample_length`` of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtr import names
from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns
from dtr.datasets.formats.rows import read_rows
from dtr.errors import DatasetMismatch, InvalidInput

__all__ = ["Tokens"]

COLUMN = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Blocks of tokens.

    Args:
        dtype: of one token, such as ``uint16``; stored with its byte order.
        sample_length: tokens in one sample.
        drop_remainder: leave out what remains of a file after its last whole sample; otherwise such a file is refused.
    """

    dtype: str
    sample_length: int
    drop_remainder: bool = False

    name = "bin"
    suffixes = (".bin",)
    has_marks = False
    has_rows = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _numeric(self.dtype).str)
        object.__setattr__(self, "sample_length", names.positive(self.sample_length, "sample_length", 1 << 31))
        if not isinstance(self.drop_remainder, bool):
            raise InvalidInput(f"drop_remainder must be True or False, got {self.drop_remainder!r}", field="drop_remainder")

    def options(self) -> Mapping[str, str]:
        return {
            "dtype": self.dtype,
            "sample_length": str(self.sample_length),
            "drop_remainder": str(self.drop_remainder).lower(),
        }

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        size_bytes = os.fstat(file.fileno()).st_size
        tokens, torn_bytes = divmod(size_bytes, np.dtype(self.dtype).itemsize)
        if torn_bytes:
            raise DatasetMismatch(
                f"{file.name} has {size_bytes:,} bytes, which is no whole number of {self.dtype} tokens: "
                "it was truncated, or dtype is another",
                file=file.name,
            )
        samples, rest = divmod(tokens, self.sample_length)
        if rest and not self.drop_remainder:
            raise DatasetMismatch(
                f"{file.name} has {tokens:,} tokens: {samples:,} samples of {self.sample_length:,}, and {rest:,} tokens remain; "
                "correct sample_length, or leave them out with drop_remainder=True",
                file=file.name,
            )
        return Measure(samples=samples)

    def promised(self, start: bytes) -> int | None:
        return None

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        return (COLUMN,)

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        return {column: self._rows(file, span) for column in chosen_columns(columns, (COLUMN,), file.name)}

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[Any]:
        yield from self._rows(file, span)

    def _rows(self, file: BufferedReader, span: Span) -> NDArray[Any]:
        return read_rows(file, span, dtype=np.dtype(self.dtype), row_shape=(self.sample_length,), offset=0)


def _numeric(dtype: Any) -> np.dtype[Any]:
    wrong = InvalidInput(f"dtype must be a type of integers or floats such as 'uint16', got {dtype!r}", field="dtype")
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except (TypeError, ValueError) as exc:
        raise wrong from exc
    if found.kind not in "iuf":
        raise wrong
    return found
