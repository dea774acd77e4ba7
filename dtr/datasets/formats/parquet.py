"""Parquet files, read by row group with pyarrow (``pip install dtr[parquet]``): a sample is a row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats.columns import column_of
from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns
from dtr.errors import ConfigError, DatasetMismatch

__all__ = ["Parquet"]

log = logging.getLogger(__name__)

_DECODED_WHOLE: Final = 4 << 20  # rows
_PIECE_ROWS: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Parquet:
    """Rows of a Parquet file. A row group is decoded whole, so shards should hold at least one: less is reported when it is registered."""

    name = "parquet"
    suffixes = (".parquet", ".pq")
    has_marks = False
    has_rows = False

    def options(self) -> Mapping[str, str]:
        return {}

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        described = _open(file).metadata
        longest = max((described.row_group(n).num_rows for n in range(described.num_row_groups)), default=0)
        if longest > 2 * shard_size:
            log.warning(
                "%s has row groups of %s rows: each shard of %s decodes a whole one; give shard_size=%d or more, or write smaller groups",
                file.name, f"{longest:,}", f"{shard_size:,}", longest,
            )  # fmt: skip
        return Measure(samples=described.num_rows)

    def promised(self, start: bytes) -> int | None:
        return None

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        return tuple(_open(file).schema_arrow.names)

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        opened = _open(file)
        chosen = chosen_columns(columns, opened.schema_arrow.names, file.name)
        table = _rows(opened, span, list(chosen), file.name)
        try:
            return {column: _array(table.column(column)) for column in chosen}
        except ValueError as exc:  # text that is not UTF-8
            raise DatasetMismatch(f"{file.name}: rows {span.start} to {span.stop} cannot be read: {exc}", file=file.name) from exc

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[dict[str, Any]]:
        table = _rows(_open(file), span, None, file.name)
        try:
            yield from table.to_pylist()
        except ValueError as exc:
            raise DatasetMismatch(f"{file.name}: rows {span.start} to {span.stop} cannot be read: {exc}", file=file.name) from exc


def _open(file: BufferedReader) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as exc:
        raise ConfigError("format 'parquet' needs pyarrow: pip install 'dtr[parquet]'", field="format") from exc
    file.seek(0)
    try:
        return parquet.ParquetFile(file)
    except MemoryError:  # pyarrow's is an ArrowException, too
        raise
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DatasetMismatch(f"{file.name} is no whole Parquet file: {exc}", file=file.name) from exc


def _rows(opened: Any, span: Span, columns: list[str] | None, name: str) -> Any:
    """The span's rows as an Arrow table; of the file only the row groups that hold them are read.

    A group far larger than the span is decoded piece by piece: a few bytes of Parquet may stand for any number of equal rows.
    """
    import pyarrow as pa

    described, first, at, held = opened.metadata, 0, 0, 0
    groups: list[int] = []
    for number in range(described.num_row_groups):
        rows = described.row_group(number).num_rows
        if at < span.stop and at + rows > span.start:
            first = at if not groups else first
            groups.append(number)
            held += rows
        at += rows
    if at < span.stop:
        raise DatasetMismatch(f"{name} has {at:,} rows, expected {span.stop:,}: it changed", file=name)
    try:
        if held > _DECODED_WHOLE + 4 * (span.stop - span.start):
            return pa.Table.from_batches(list(_pieces(opened, groups, columns, span.start - first, span.stop - first)))
        return opened.read_row_groups(groups, columns=columns).slice(span.start - first, span.stop - span.start)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DatasetMismatch(f"{name}: rows {span.start} to {span.stop} cannot be read: {exc}", file=name) from exc


def _pieces(opened: Any, groups: list[int], columns: list[str] | None, start: int, stop: int) -> Iterator[Any]:
    """The rows ``start`` to ``stop`` of these row groups, as record batches; nothing behind them is decoded."""
    at = 0
    for batch in opened.iter_batches(batch_size=_PIECE_ROWS, row_groups=groups, columns=columns):
        begin, end = max(0, start - at), min(stop - at, batch.num_rows)
        if begin < end:
            yield batch.slice(begin, end - begin)
        at += batch.num_rows
        if at >= stop:
            return


def _array(column: Any) -> NDArray[Any]:
    """Numbers without nulls as such, lists of one length as a second axis, anything else as objects (null is None)."""
    import pyarrow as pa

    kind = column.type
    simple = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if simple and not column.null_count:
        return np.array(column.to_numpy())
    if pa.types.is_nested(kind) and not column.null_count:
        return column_of(column.to_pylist())
    found = column.to_pylist()
    return np.fromiter(found, dtype=np.object_, count=len(found))
