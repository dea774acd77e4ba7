"""A batch: arrays by column that know which samples of which shards they are."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats import Columns

__all__ = ["Batch", "SampleRange", "joined", "ranges_text"]

SampleRange = tuple[int, int, int]  # shard, start, stop: positions within the shard, half open


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Samples for one step of one rank. ``batch["x"]`` is an array whose first axis is the sample; ``len(batch)`` counts samples.

    An empty batch has the right columns and dtypes and no samples: this rank is out of data, and the epoch goes on for others.

    Args:
        dataset, version: of the data set.
        run: in which it was read; it may be consumed in no other.
        epoch: of the data set, from 0.
        number: of this batch: within this run's part of the epoch, or of the global batch in deterministic mode.
        ranges: the samples in their order, (shard, start, stop).
        padded: samples at the end that were given before, so that the batch is full; they are not consumed again.
    """

    dataset: str
    version: int
    run: str
    epoch: int
    number: int
    columns: Mapping[str, NDArray[Any]] = field(repr=False)
    ranges: tuple[SampleRange, ...]
    padded: tuple[SampleRange, ...] = ()

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.columns[column]

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in (*self.ranges, *self.padded))

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


def joined(pieces: Sequence[Columns]) -> Columns:
    """Pieces, one after the other, as one; a single one as it is, without a copy."""
    if len(pieces) == 1:
        return dict(pieces[0])
    return {column: np.concatenate([piece[column] for piece in pieces]) for column in pieces[0]}


def ranges_text(ranges: Sequence[SampleRange]) -> str:
    """As reports and people have it: ``7:0-25 9:3-4``."""
    return " ".join(f"{shard}:{start}-{stop}" for shard, start, stop in ranges)
