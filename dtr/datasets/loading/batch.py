"""A batch: arrays by column that know which samples of which shards they are; and an order for one, before it was read."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats import Columns
from dtr.datasets.formats.columns import EXACT, bytes_of
from dtr.errors import DatasetMismatch

__all__ = ["Batch", "Order", "SampleRange", "coalesced", "joined", "ranges_text", "samples_of"]

SampleRange = tuple[int, int, int]  # shard, start, stop: positions within the shard, half open


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which samples a batch will have: made in the process that trains, read in any. Small, and may be pickled.

    Args:
        dataset, version, run, epoch, number, ranges, padded, skipped, tracked: as of the batch.
        fill: samples that the batch must have, repeated if some cannot be read; 0: as many as there are.
    """

    dataset: str
    version: int
    run: str
    epoch: int
    number: int
    ranges: tuple[SampleRange, ...]
    padded: tuple[SampleRange, ...] = ()
    skipped: tuple[SampleRange, ...] = ()
    fill: int = 0
    tracked: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Samples for one step of one rank. ``batch["x"]`` has the sample as its first axis; ``len(batch)`` counts samples.

    Columns are numpy arrays, or, of a loader with ``as_torch=True``, tensors. An empty batch has the right columns and dtypes and no
    samples: this rank is out of data, and the epoch goes on for others.

    Args:
        dataset, version: of the data set.
        run: in which it was read; it may be consumed in no other.
        epoch: of the data set, from 0.
        number: of this batch: within this run's part of the epoch, or of the global batch in deterministic mode.
        ranges: the samples in their order, (shard, start, stop).
        padded: samples at the end that were given before, so that the batch is full; they are not consumed again.
        skipped: samples whose place is in it, and which are left out because `dtr data skip` says so; of deterministic mode.
        unread: shards that it lacks samples of because they cannot be read, with the error: on record once it is consumed.
        tracked: whether it counts; one of an evaluation does not.
    """

    dataset: str
    version: int
    run: str
    epoch: int
    number: int
    columns: Mapping[str, NDArray[Any]] = field(repr=False)
    ranges: tuple[SampleRange, ...]
    padded: tuple[SampleRange, ...] = ()
    skipped: tuple[SampleRange, ...] = ()
    unread: tuple[tuple[int, str], ...] = ()
    tracked: bool = True

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.columns[column]

    def __len__(self) -> int:
        return samples_of(self.ranges) + samples_of(self.padded)

    def __bool__(self) -> bool:
        """A batch is true even if it is empty: it stands for a step."""
        return True

    def __contains__(self, column: object) -> bool:
        return column in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def keys(self) -> KeysView[str]:
        """The names of the columns."""
        return self.columns.keys()

    def items(self) -> ItemsView[str, NDArray[Any]]:
        """The columns by name."""
        return self.columns.items()

    @property
    def size_bytes(self) -> int:
        """Of the columns, with what objects such as text and images hold."""
        return bytes_of(self.columns)

    def pin_memory(self) -> Self:
        """The same with its tensors in pinned memory; ``DataLoader(pin_memory=True)`` calls it."""
        return replace(self, columns={name: _pinned(values) for name, values in self.items()})


def _pinned(values: Any) -> Any:
    return values.pin_memory() if hasattr(values, "pin_memory") else values


def joined(pieces: Sequence[Columns]) -> Columns:
    """Pieces, one after the other, as one; a single one as it is, without a copy.

    Raises DatasetMismatch if they have different columns, or a column's arrays do not go together without loss; names them. Integers beside
    floats become floats.
    """
    if len(pieces) == 1:
        return dict(pieces[0])
    names = [set(piece) for piece in pieces]
    if any(found != names[0] for found in names):
        some = sorted(names[0].union(*names) - names[0].intersection(*names))
        raise DatasetMismatch(
            f"columns {', '.join(some)} are in some files of the data set and not in others: give columns=[...] that all have, or make the "
            "files alike",
            columns=some,
        )
    return {column: _concatenated(column, [piece[column] for piece in pieces]) for column in pieces[0]}


def _concatenated(column: str, pieces: Sequence[NDArray[Any]]) -> NDArray[Any]:
    try:
        found = np.concatenate(pieces)
        if found.dtype.kind == "f" and any(map(_inexact, pieces)):
            raise TypeError(f"integers beyond {EXACT:,} would lose digits")
        return found
    except (ValueError, TypeError) as exc:
        kinds = " and ".join(sorted({f"{piece.dtype} of shape {piece.shape[1:]}" for piece in pieces}))
        raise DatasetMismatch(
            f"column {column!r} is {kinds} in different files of the data set, which make no one array ({exc}): make the files alike, or "
            "leave the column out with columns=[...]",
            columns=[column],
        ) from exc


def _inexact(piece: NDArray[Any]) -> bool:
    return piece.dtype.kind in "iu" and bool(np.any((piece > EXACT) | (piece < -EXACT)))


def samples_of(ranges: Sequence[SampleRange]) -> int:
    """How many samples these are."""
    return sum(stop - start for _, start, stop in ranges)


def coalesced(places: Sequence[tuple[int, int]]) -> tuple[SampleRange, ...]:
    """Samples, (shard, position), in their order, as ranges where they follow each other."""
    found: list[SampleRange] = []
    shard, start, stop = -1, 0, 0
    for number, at in places:
        if number == shard and at == stop:
            stop += 1
            continue
        if stop > start:
            found.append((shard, start, stop))
        shard, start, stop = number, at, at + 1
    return (*found, (shard, start, stop)) if places else ()


def ranges_text(ranges: Sequence[SampleRange]) -> str:
    """As reports and people have it: ``7:0-25 9:3-4``."""
    return " ".join(f"{shard}:{start}-{stop}" for shard, start, stop in ranges)
