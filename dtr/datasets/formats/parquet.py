"""Parquet files, read by row group with pyarrow (``pip install dtr[parquet]``): a sample is a row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats.columns import column_of
from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns
from dtr.errors import ConfigError, DatasetMismatch

__all__ = ["Parquet"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parquet:
    """Rows of a Parquet file. A row group is decoded whole, so shards should hold at least one: less is reported when it is registered."""

    name = "parquet"
    suffixes = (".parquet", ".pq")
    has_marks = False

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

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        return tuple(_open(file).schema_arrow.names)

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        opened = _open(file)
        chosen = chosen_columns(columns, opened.schema_arrow.names, file.name)
        table = _rows(opened, span, list(chosen), file.name)
        return {column: _array(table.column(column)) for column in chosen}

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[dict[str, Any]]:
        yield from _rows(_open(file), span, None, file.name).to_pylist()


def _open(file: BufferedReader) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as exc:
        raise ConfigError("format 'parquet' needs pyarrow: pip install 'dtr[parquet]'", field="format") from exc
    file.seek(0)
    try:
        return parquet.ParquetFile(file)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DatasetMismatch(f"{file.name} is no whole Parquet file: {exc}", file=file.name) from exc


def _rows(opened: Any, span: Span, columns: list[str] | None, name: str) -> Any:
    """The span's rows as an Arrow table; of the file only the row groups that hold them are read."""
    import pyarrow as pa

    described, first, at = opened.metadata, 0, 0
    groups: list[int] = []
    for number in range(described.num_row_groups):
        rows = described.row_group(number).num_rows
        if at < span.stop and at + rows > span.start:
            first = at if not groups else first
            groups.append(number)
        at += rows
    if at < span.stop:
        raise DatasetMismatch(f"{name} has {at:,} rows, expected {span.stop:,}: it changed", file=name)
    try:
        return opened.read_row_groups(groups, columns=columns).slice(span.start - first, span.stop - span.start)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DatasetMismatch(f"{name}: rows {span.start} to {span.stop} cannot be read: {exc}", file=name) from exc


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
