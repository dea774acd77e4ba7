"""MDS shards (.mds), the format of MosaicML Streaming, read without it.

    uint32      number of samples n
    uint32[n+1] where each sample begins, and where the last one ends
    JSON        the columns: names, encodings, sizes
    samples     for each: uint32 sizes of the columns that have no fixed one, then the values

A file describes itself, so ``index.json`` is needed for the order of the files and for nothing else.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from dtr.datasets.formats.columns import column_of
from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns
from dtr.errors import DatasetMismatch

__all__ = ["Mds"]

_WORD: Final = np.dtype("<u4")
_MAX_DESCRIPTION_BYTES: Final = 16 << 20
_SCALARS: Final = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True, slots=True)
class _Head:
    samples: int
    columns: tuple[_Column, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mds:
    """Samples of an MDS shard. Numbers, text, decimals (as text), JSON and arrays are decoded; images, pickles and the rest are bytes."""

    name = "mds"
    suffixes = (".mds",)
    has_marks = False
    has_rows = False

    def options(self) -> Mapping[str, str]:
        return {}

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        head = _head(file)
        begins = _begins(file, 0, head.samples)
        if head.samples and int(begins[-1]) != head.size_bytes:
            raise DatasetMismatch(
                f"{file.name} has {head.size_bytes:,} bytes, its last sample ends at {int(begins[-1]):,}: it was truncated", file=file.name
            )
        return Measure(samples=head.samples)

    def promised(self, start: bytes) -> int | None:
        return int.from_bytes(start[:4], "little") if len(start) >= 4 else None

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        return tuple(column.name for column in _head(file).columns)

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        known = self.columns(file)
        chosen = chosen_columns(columns, known, file.name)
        values: dict[str, list[Any]] = {column: [] for column in chosen}
        for sample in self._iterate(file, span, chosen):
            for column in chosen:
                values[column].append(sample[column])
        return {column: _array_of(found) for column, found in values.items()}

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[dict[str, Any]]:
        yield from self._iterate(file, span, None)

    def _iterate(self, file: BufferedReader, span: Span, chosen: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        if span.start == span.stop:
            return
        head = _head(file)
        if span.stop > head.samples:
            raise DatasetMismatch(f"{file.name} has {head.samples} samples, expected {span.stop}: it changed", file=file.name)
        begins = _begins(file, span.start, span.stop)
        file.seek(int(begins[0]))
        content = file.read(int(begins[-1]) - int(begins[0]))
        if len(content) != int(begins[-1]) - int(begins[0]):
            raise DatasetMismatch(f"{file.name} ends within samples {span.start} to {span.stop}: it was truncated", file=file.name)
        places = (begins - begins[0]).tolist()
        for number, (begin, end) in enumerate(itertools.pairwise(places), span.start):
            try:
                yield _decode(memoryview(content)[begin:end], head.columns, chosen)
            except (ValueError, LookupError, TypeError) as exc:
                raise DatasetMismatch(f"{file.name}: sample {number} is damaged: {exc}", file=file.name) from exc


def _head(file: BufferedReader) -> _Head:
    if file.name.endswith(".br"):
        raise DatasetMismatch(f"{file.name} is packed by brotli, which is not read: write it with compression zstd or gz", file=file.name)
    size_bytes = os.fstat(file.fileno()).st_size
    samples = int(_words(file, 0, 1)[0])
    if 4 + 4 * (samples + 1) > size_bytes:
        raise DatasetMismatch(f"{file.name} is no MDS shard: it says {samples:,} samples and has {size_bytes:,} bytes", file=file.name)
    begin = 4 + 4 * (samples + 1)
    end = int(_words(file, 4, 1)[0])
    if not begin <= end <= min(size_bytes, begin + _MAX_DESCRIPTION_BYTES):
        raise DatasetMismatch(f"{file.name} is no MDS shard: its first sample would begin at byte {end:,}", file=file.name)
    file.seek(begin)
    try:
        described = orjson.loads(file.read(end - begin))
        parts = zip(described["column_names"], described["column_encodings"], described["column_sizes"], strict=True)
        columns = tuple(_Column(str(name), str(encoding), None if size is None else int(size)) for name, encoding, size in parts)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as exc:
        raise DatasetMismatch(f"{file.name} is no MDS shard: its columns are not described ({exc})", file=file.name) from exc
    return _Head(samples, columns, size_bytes)


def _begins(file: BufferedReader, start: int, stop: int) -> NDArray[np.int64]:
    """The bytes at which samples ``start`` to ``stop`` begin, the last one included: it is where ``stop - 1`` ends."""
    begins = _words(file, 4 + 4 * start, stop - start + 1).astype(np.int64)
    if np.any(np.diff(begins) < 0):
        raise DatasetMismatch(f"{file.name} is no MDS shard: its samples are not in order", file=file.name)
    return begins


def _words(file: BufferedReader, at: int, count: int) -> NDArray[np.uint32]:
    file.seek(at)
    content = file.read(4 * count)
    if len(content) != 4 * count:
        raise DatasetMismatch(f"{file.name} is no MDS shard: it ends after {at + len(content)} bytes", file=file.name)
    return np.frombuffer(content, _WORD)


def _decode(content: memoryview, columns: Sequence[_Column], chosen: Sequence[str] | None) -> dict[str, Any]:
    at = 0
    sizes: list[int] = []
    for column in columns:
        if column.size is not None:
            sizes.append(column.size)
            continue
        sizes.append(int.from_bytes(content[at : at + 4], "little"))
        at += 4
    sample = {}
    for column, size in zip(columns, sizes, strict=True):
        value = content[at : at + size]
        if len(value) != size:
            raise ValueError(f"column {column.name!r} ends after the sample")
        at += size
        if chosen is None or column.name in chosen:
            sample[column.name] = _value(column.encoding, value)
    if at != len(content):
        raise ValueError(f"{len(content) - at} bytes follow its last column")
    return sample


def _value(encoding: str, content: memoryview) -> Any:
    kind, _, rest = encoding.partition(":")
    if kind in _SCALARS:
        return np.frombuffer(content, np.dtype(kind).newbyteorder("<"))[0]
    if kind == "ndarray":
        return _ndarray(rest, content)
    decode = _DECODERS.get(kind)
    return bytes(content) if decode is None else decode(bytes(content))


def _ndarray(described: str, content: memoryview) -> NDArray[Any]:
    """``ndarray``, ``ndarray:DTYPE`` or ``ndarray:DTYPE:2,3``: what is not described stands before the values."""
    dtype_name, _, shape_text = described.partition(":")
    at = 0
    if not dtype_name:
        dtype_name, at = _ARRAY_DTYPES[content[0]], 1
    shape = tuple(map(int, shape_text.split(","))) if shape_text else None
    if shape is None:
        code = content[at]
        width, dims = {0: "<u1", 1: "<u2", 2: "<u4", 3: "<u8"}[code & 3], code >> 2
        size = np.dtype(width).itemsize * dims
        shape = tuple(np.frombuffer(content[at + 1 : at + 1 + size], width).tolist())
        at += 1 + size
    return np.frombuffer(content[at:], np.dtype(dtype_name).newbyteorder("<")).reshape(shape).copy()


def _array_of(values: list[Any]) -> NDArray[Any]:
    """Scalars keep their type; anything else as in the other formats."""
    if values and all(isinstance(value, np.generic) for value in values):
        return np.array(values)
    return column_of(values)


_ARRAY_DTYPES: Final[Mapping[int, str]] = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
_DECODERS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "str": bytes.decode, "str_int": int, "str_float": float, "str_decimal": bytes.decode, "json": orjson.loads,
    "int": lambda content: int.from_bytes(content, "little", signed=True),
}  # fmt: skip
