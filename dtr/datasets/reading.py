"""Shards as arrays for the loader: read once more where that may help, and told apart from data that must not be skipped.

A file that is gone or has changed since it was registered is refused, by name, whatever the policy: leaving out its shards would train on
other data than was declared, silently. A file that is as it was and whose bytes make no samples, or that the disk does not give, is
unreadable: after three attempts the shard is for quarantine.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.clock import SYSTEM, Clock
from dtr.datasets.batch import joined
from dtr.datasets.formats import Columns, Span
from dtr.datasets.spec import Dataset, Shard
from dtr.errors import DatasetMismatch, ShardUnreadable

__all__ = ["READ_ATTEMPTS", "Rows", "read_shard"]

log = logging.getLogger(__name__)

READ_ATTEMPTS: Final = 3
PAUSE_S: Final = 0.05
SPARSE: Final = 8  # fewer than one in so many samples of a shard are read one by one, where the format can
MOST_SHARDS: Final = 64


def read_shard(shard: Shard, columns: Sequence[str] | None, clock: Clock = SYSTEM) -> Columns:
    """All samples of a shard by column.

    Raises:
        ShardUnreadable: three attempts failed, and its file is as it was registered.
        DatasetMismatch: its file is gone or was changed.
        InvalidInput: there is no such column.
    """
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return shard.read(columns)
        except (DatasetMismatch, OSError) as exc:
            shard.check_unchanged()
            log.warning("shard %d (%s) cannot be read, attempt %d of %d: %s", shard.index, shard, attempt, READ_ATTEMPTS, exc)
            if attempt == READ_ATTEMPTS:
                raise ShardUnreadable(f"{shard.path}: shard {shard.index} ({shard}) cannot be read: {exc}", shard=shard.index) from exc
        clock.sleep(PAUSE_S * attempt)
    raise AssertionError("unreachable")


class Rows:
    """Samples of a data set by shard and position, with the newest shards kept in memory. Not for two threads.

    Args:
        dataset: with its files.
        columns: to read; all if None.
        keep: how many shards stay in memory, 64 at most.
    """

    def __init__(self, dataset: Dataset, columns: Sequence[str] | None, keep: int) -> None:
        self._dataset, self._columns, self._keep = dataset, columns, max(1, min(keep, MOST_SHARDS))
        self._held: OrderedDict[int, Columns] = OrderedDict()

    def take(self, shards: NDArray[np.int64], positions: NDArray[np.int64]) -> Columns:
        """The samples at these places, in this order; an empty order gives empty columns. Raises as `read_shard`."""
        if not len(shards):
            return {column: values[:0] for column, values in self._whole(0).items()}
        pieces: list[Columns] = []
        places: list[NDArray[Any]] = []
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            pieces.append(self._some(number, positions[here]))
            places.append(here)
        back = np.argsort(np.concatenate(places), kind="stable")
        return {column: values[back] for column, values in joined(pieces).items()}

    def _some(self, number: int, positions: NDArray[np.int64]) -> Columns:
        shard = self._dataset.shard(number)
        by_arithmetic = shard.span.end_byte == 0
        if number in self._held or not by_arithmetic or len(positions) * SPARSE > len(shard):
            return {column: values[positions] for column, values in self._whole(number).items()}
        return joined([read_shard(_row(shard, at), self._columns) for at in positions.tolist()])

    def _whole(self, number: int) -> Columns:
        held = self._held.pop(number, None)
        if held is None:
            held = read_shard(self._dataset.shard(number), self._columns)
            while len(self._held) >= self._keep:
                self._held.popitem(last=False)
        self._held[number] = held
        return held


def _row(shard: Shard, at: int) -> Shard:
    start = shard.start + at
    return replace(shard, start=start, stop=start + 1, span=Span(start=start, stop=start + 1))
