"""JSON lines: a sample is one line, a JSON object in UTF-8; its keys are the columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from dtr.datasets.formats.columns import column_of
from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns, values_of
from dtr.errors import DatasetMismatch
from dtr.placement import MAX_SHARDS

__all__ = ["JsonLines"]

_CHUNK_BYTES = 4 << 20
_MAX_LINE_BYTES = 64 << 20  # beyond it is no sample but a file that lost its newlines; and a line is in memory as a whole
_NEWLINE = 10
_PIECE_LINES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines:
    """One JSON object a line. A last line without its newline counts if it is a whole object; otherwise it is a truncated one."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")
    has_marks = True
    has_rows = False

    def options(self) -> Mapping[str, str]:
        return {}

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes == 0:
            return Measure(samples=0)
        _whole_line(file, 0, line=1)
        lines, marks, last_newline = _count(file, shard_size)
        if last_newline != size_bytes - 1:
            _whole_line(file, last_newline + 1, line=lines + 1)
            lines += 1
        begins = np.concatenate([np.zeros(1, dtype=np.int64), *marks])
        return Measure(samples=lines, marks=tuple(begins[begins < size_bytes].tolist()))

    def promised(self, start: bytes) -> int | None:
        return None

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        return tuple(_whole_line(file, 0, line=1)) if os.fstat(file.fileno()).st_size else ()

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        lines = _lines(file, span)
        there = tuple(_object(lines[0], file.name, span.start + 1)) if lines else columns or ()
        chosen = chosen_columns(columns, there, file.name)

        def of(low: int, high: int) -> Columns:
            samples = _parsed(lines[low:high], file.name, span.start + low)
            values = values_of(
                samples, chosen, all_of_them=columns is None, named=lambda n: f"{file.name} line {span.start + low + n + 1}"
            )  # fmt: skip
            return {column: column_of(of_it) for column, of_it in values.items()}

        return _in_pieces(of, len(lines)) or of(0, len(lines))

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[Any]:
        for number, line in enumerate(_lines(file, span), span.start + 1):
            yield _object(line, file.name, number)


def _lines(file: BufferedReader, span: Span) -> list[bytes]:
    file.seek(span.first_byte)
    lines = file.read(span.end_byte - span.first_byte).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if len(lines) != span.stop - span.start:
        raise DatasetMismatch(
            f"{file.name}: expected lines {span.start + 1} to {span.stop} in bytes {span.first_byte} to {span.end_byte}, "
            f"found {len(lines)} lines there",
            file=file.name,
        )
    return lines


def _in_pieces(of: Callable[[int, int], Columns], lines: int) -> Columns | None:
    """The columns of all lines, made from those of a few at a time, whose objects are still in the processor's cache.

    None where pieces differ in dtype or shape: what the whole column is can only be told of all its values. Where they do not, the whole
    is what they are.
    """
    count = lines // _PIECE_LINES
    pieces: list[Columns] = []
    for n in range(count):
        pieces.append(of(n * lines // count, (n + 1) * lines // count))
        if len({tuple((values.dtype, values.shape[1:]) for values in piece.values()) for piece in (pieces[0], pieces[-1])}) > 1:
            return None
    return {column: np.concatenate([piece[column] for piece in pieces]) for column in pieces[0]} if count else None


def _parsed(lines: list[bytes], name: str, start: int) -> list[dict[str, Any]]:
    try:
        samples = list(map(orjson.loads, lines))
    except orjson.JSONDecodeError:
        samples = []
    if {type(sample) for sample in samples} == {dict}:
        return samples
    return [_object(line, name, number) for number, line in enumerate(lines, start + 1)]  # says which line it is


def _count(file: BufferedReader, shard_size: int) -> tuple[int, list[NDArray[np.int64]], int]:
    """(newlines, the bytes after every ``shard_size``-th of them, the last newline's byte)."""
    chunk = np.empty(_CHUNK_BYTES, dtype=np.uint8)
    marks: list[NDArray[np.int64]] = []
    lines, marked, base, previous = 0, 0, 0, -1
    file.seek(0)
    while size := file.readinto(chunk.data):
        newlines = np.flatnonzero(chunk[:size] == _NEWLINE) + base
        lengths = np.diff(newlines, prepend=previous)
        empty = np.flatnonzero(lengths == 1)
        if empty.size:
            raise DatasetMismatch(f"{file.name} line {lines + int(empty[0]) + 1} is empty; expected a JSON object", file=file.name)
        if base + size - previous > _MAX_LINE_BYTES:
            _check_lengths(file.name, lines, [*lengths.tolist(), base + size - 1 - int(newlines[-1] if newlines.size else previous)])
        marks.append(newlines[-(lines + 1) % shard_size :: shard_size] + 1)
        marked += len(marks[-1])
        if marked > MAX_SHARDS:
            raise DatasetMismatch(
                f"{file.name} makes more than {MAX_SHARDS:,} shards of {shard_size:,} samples; use a greater shard_size", file=file.name
            )
        lines += len(newlines)
        previous = int(newlines[-1]) if newlines.size else previous
        base += size
    return lines, marks, previous


def _check_lengths(name: str, before: int, lengths: list[int]) -> None:
    for line, length in enumerate(lengths, before + 1):
        if length > _MAX_LINE_BYTES:
            raise _too_long(name, line)


def _too_long(name: str, line: int) -> DatasetMismatch:
    return DatasetMismatch(
        f"{name} line {line} is longer than {_MAX_LINE_BYTES >> 20} MiB; a line must be one sample: is a newline missing?",
        file=name,
        line=line,
    )


def _whole_line(file: BufferedReader, offset: int, *, line: int) -> dict[str, Any]:
    """The object in the line that begins at ``offset``."""
    file.seek(offset)
    text = file.readline(_MAX_LINE_BYTES + 1)
    if len(text) > _MAX_LINE_BYTES:
        raise _too_long(file.name, line)
    return _object(text, file.name, line)


def _object(text: bytes, file: str, line: int) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        cut = "" if text.endswith(b"\n") else " or was cut off"
        raise DatasetMismatch(f"{file} line {line} is not JSON{cut}: {exc}", file=file, line=line) from exc
    if not isinstance(value, dict):
        raise DatasetMismatch(f"{file} line {line} must be a JSON object, got {type(value).__name__}", file=file, line=line)
    return value
