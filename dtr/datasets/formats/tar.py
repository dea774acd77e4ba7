"""Tar files in the WebDataset convention: neighbouring members with one key are a sample, their extensions its columns.

``images/000123.jpg`` and ``images/000123.cls`` are the columns ``jpg`` and ``cls`` of sample ``images/000123``: the key ends at the
first dot of the file's own name. Column ``__key__`` holds the keys. Nothing is unpacked to disk: a name is text, wherever it may point.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Final

import orjson

from dtr.datasets.formats.columns import column_of
from dtr.datasets.formats.contract import Columns, Measure, Span, chosen_columns, values_of
from dtr.datasets.formats.npy import array_of
from dtr.errors import DatasetMismatch
from dtr.placement import MAX_SHARDS

__all__ = ["Tar"]

KEY: Final = "__key__"
_NAME: Final = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_BLOCK_BYTES: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Tar:
    """Samples of a tar file. ``txt``, ``json``, ``cls`` and ``npy`` are decoded (text, JSON, an integer, an array); the rest is bytes."""

    name = "tar"
    suffixes = (".tar",)
    has_marks = True
    has_rows = False

    def options(self) -> Mapping[str, str]:
        return {}

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        samples, marks = 0, []
        for begin, _key, _members in _samples(file, 0, os.fstat(file.fileno()).st_size):
            if samples % shard_size == 0:
                marks.append(begin)
                if len(marks) > MAX_SHARDS:
                    raise DatasetMismatch(
                        f"{file.name} makes more than {MAX_SHARDS:,} shards of {shard_size:,} samples; use a greater shard_size",
                        file=file.name,
                    )
            samples += 1
        return Measure(samples=samples, marks=tuple(marks))

    def promised(self, start: bytes) -> int | None:
        return None

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        first = next(_samples(file, 0, os.fstat(file.fileno()).st_size), None)
        return (KEY, *first[2]) if first is not None else ()

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        samples = list(self._iterate(file, span, columns))
        chosen = chosen_columns(columns, tuple(samples[0]) if samples else columns or (), file.name)
        values = values_of(samples, chosen, all_of_them=columns is None, named=lambda n: f"{file.name}: sample {samples[n][KEY]!r}")
        return {column: column_of(of_it) for column, of_it in values.items()}

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[dict[str, Any]]:
        yield from self._iterate(file, span, None)

    def _iterate(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        found = 0
        for _begin, key, members in _samples(file, span.first_byte, span.end_byte):
            found += 1
            if found > span.stop - span.start:
                break
            sample: dict[str, Any] = {KEY: key}
            for extension, member in members.items():
                # A column that nobody wants is skipped, but its name stays: it tells whoever asks for another which ones there are.
                wanted = columns is None or extension in columns
                sample[extension] = _value(file, extension, member) if wanted else None
            yield sample
        if found != span.stop - span.start:
            raise DatasetMismatch(
                f"{file.name}: expected {span.stop - span.start} samples in bytes {span.first_byte} to {span.end_byte}, found "
                f"{'more' if found > span.stop - span.start else found} there",
                file=file.name,
            )


def _samples(file: BufferedReader, begin: int, end: int) -> Iterator[tuple[int, str, dict[str, tarfile.TarInfo]]]:
    """(its first byte, its key, extension -> member) of each sample that begins in these bytes; other members are passed over."""
    key, at, members = "", begin, dict[str, tarfile.TarInfo]()
    for member in _members(file, begin, end):
        parts = _NAME.fullmatch(member.name) if member.isfile() else None
        if parts is None:
            continue
        if members and parts[1] != key:
            yield at, key, members
            members = {}
        if not members:
            key, at = parts[1], member.offset
        extension = parts[2].lower()
        if extension in members:
            raise DatasetMismatch(
                f"{file.name}: member {member.name!r} at byte {member.offset} is there twice in one sample: keys must be unique among"
                " neighbours",
                file=file.name,
            )
        members[extension] = member
    if members:
        yield at, key, members


class _Bounded(io.RawIOBase):
    """A file of which nobody can ask for more than there is: Python sets aside all that was asked for before it reads."""

    def __init__(self, file: BufferedReader) -> None:
        super().__init__()
        self._file, self._size_bytes = file, os.fstat(file.fileno()).st_size

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._size_bytes - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))


def _members(file: BufferedReader, begin: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The members whose headers begin in these bytes; DatasetMismatch unless the archive is whole up to there."""
    file.seek(begin)
    if end - begin < _BLOCK_BYTES:
        raise DatasetMismatch(f"{file.name} is no tar file: it has {end} bytes", file=file.name)
    try:
        with tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:
            while (member := archive.next()) is not None and member.offset < end:
                archive.members.clear()  # type: ignore[attr-defined]  # or it would keep every header that it has met
                if member.size < 0 or member.issparse():
                    raise ValueError(f"member {member.name!r} at byte {member.offset} is sparse, or says that it ends before it begins")
                yield member
            stopped_at = archive.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as exc:
        raise DatasetMismatch(f"{file.name} is no whole tar file after byte {begin}: {exc}", file=file.name) from exc
    if member is None:  # the end of the archive is zeros; tarfile also takes garbage for it
        file.seek(min(stopped_at, os.fstat(file.fileno()).st_size))
        if any(file.read(2 * _BLOCK_BYTES)):
            raise DatasetMismatch(f"{file.name} is no whole tar file: no member begins at byte {stopped_at}", file=file.name)


def _value(file: BufferedReader, extension: str, member: tarfile.TarInfo) -> Any:
    position = file.tell()
    file.seek(member.offset_data)
    content = file.read(member.size)  # the archive was followed to what comes after it, so that much is there
    file.seek(position)
    if len(content) != member.size:
        raise DatasetMismatch(f"{file.name} ends within member {member.name!r}: it was truncated", file=file.name)
    decode = _DECODERS.get(extension.rpartition(".")[2])
    if decode is None:
        return content
    try:
        return decode(content)
    except (ValueError, EOFError, TypeError, SyntaxError, RecursionError) as exc:
        raise DatasetMismatch(f"{file.name}: member {member.name!r} is not what its name says: {exc}", file=file.name) from exc


_DECODERS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "txt": bytes.decode, "text": bytes.decode, "json": orjson.loads, "cls": int, "index": int, "npy": array_of,
}  # fmt: skip
