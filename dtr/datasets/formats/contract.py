"""What a format of data files must do; one file per format, chosen by `dtr.datasets.formats.make_format`.

Guarantees that every format gives:

- ``measure`` counts exactly the samples that ``read`` and ``iterate`` yield, and refuses a damaged or truncated file with
  DatasetMismatch, naming it;
- ``read`` and ``iterate`` touch only the bytes of their span, and raise DatasetMismatch for bytes that are not what they should be;
- whole samples that differ in their columns are InvalidInput, as is a column that is not there: that is no damage;
- nothing is unpickled, and nothing is mapped into memory (a mapped file that shrinks kills its reader with SIGBUS).

A format is a frozen value: its options are part of the data set's spec. Files come opened for reading in binary; their ``name`` is
for messages.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from operator import itemgetter
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from dtr.errors import InvalidInput

__all__ = ["START_BYTES", "Columns", "Format", "Measure", "Span", "chosen_columns", "values_of"]

START_BYTES: Final = 16
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What a file holds: ``marks[k]`` is the byte at which shard k begins; empty where samples have one size."""

    samples: int
    marks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Samples ``start`` to ``stop`` (exclusive) of one file, in the bytes ``first_byte`` to ``end_byte`` where samples differ in size."""

    start: int
    stop: int
    first_byte: int = 0
    end_byte: int = 0


class Format(Protocol):
    """Reads one kind of file."""

    @property
    def name(self) -> str:
        """As given to ``register(format=...)``."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The ends of the names of files that belong to it."""

    @property
    def has_marks(self) -> bool:
        """Whether a shard is found by where its bytes begin, which only reading the file tells; else by arithmetic."""

    @property
    def has_rows(self) -> bool:
        """Whether samples have one size, so that a few of a shard can be read for what they are; else all of it is decoded for one."""

    def options(self) -> Mapping[str, str]:
        """What else was given to ``register``, as text, enough to make this format again."""

    def measure(self, file: BufferedReader, shard_size: int) -> Measure:
        """Count the samples and find where each shard of ``shard_size`` samples begins."""

    def promised(self, start: bytes) -> int | None:
        """How many samples a file says that it holds whose first `START_BYTES` are these; None if its beginning does not tell."""

    def columns(self, file: BufferedReader) -> tuple[str, ...]:
        """The names under which ``read`` returns values."""

    def read(self, file: BufferedReader, span: Span, columns: Sequence[str] | None) -> Columns:
        """The values of the span's samples by column, first axis the sample; all columns if None."""

    def iterate(self, file: BufferedReader, span: Span) -> Iterator[Any]:
        """The samples of the span, one by one."""


def chosen_columns(wanted: Sequence[str] | None, known: Sequence[str], file: str) -> tuple[str, ...]:
    """The columns to read; raises InvalidInput that names the one which the file does not have."""
    if wanted is None:
        return tuple(known)
    if isinstance(wanted, str):
        raise InvalidInput(f"columns must be a list of names, got the text {wanted!r}", field="columns")
    for column in wanted:
        if column not in known:
            near = difflib.get_close_matches(column, known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidInput(f"columns: {file} has no column {column!r}; it has {', '.join(known)}{meant}", field="columns")
    return tuple(wanted)


def values_of(
    samples: Sequence[Mapping[str, Any]], chosen: Sequence[str], *, all_of_them: bool, named: Callable[[int], str]
) -> dict[str, list[Any]]:
    """The values of each chosen column, sample by sample.

    Raises InvalidInput unless every sample has these columns, and, if these are to be all, no other; ``named(n)`` is sample n.
    """
    if not all_of_them or set(map(len, samples)) <= {len(chosen)}:  # then one with another key lacks a chosen one
        with contextlib.suppress(KeyError):
            return {column: list(map(itemgetter(column), samples)) for column in chosen}
    wanted = set(chosen)
    for n, sample in enumerate(samples):
        missing, more = wanted - sample.keys(), sample.keys() - wanted if all_of_them else set()
        if missing or more:
            what = f"has no {min(missing)!r}, samples before it have" if missing else f"has {min(more)!r}, samples before it have not"
            raise InvalidInput(f"columns: {named(n)} {what}: give columns=[...] that all samples have, or write all alike", field="columns")
    raise AssertionError("samples that lack no column have all")
