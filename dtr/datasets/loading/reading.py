"""Shards as arrays for the loader: read once more where that may help, and told apart from data that must not be skipped.

A file that is gone or has changed since it was registered is refused, by name, whatever the policy: leaving out its shards would train on
other data than was declared, silently. A file that is as it was and whose bytes make no samples, or that the disk does not give, is
unreadable: after three attempts the shard is for quarantine. A host that has run out of file descriptors, memory or room, and a store that
is away, are no fault of the shard: other hosts read it, and one such host must not leave out shard after shard.
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
from dtr.datasets.formats import Columns, Span
from dtr.datasets.loading.batch import joined
from dtr.datasets.registering.spec import Dataset, Shard
from dtr.errors import DatasetChanged, DatasetMismatch, DataUnavailable, FolderFull, ShardUnreadable, StoreRefused, StoreUnavailable

__all__ = ["READ_ATTEMPTS", "Rows", "read_shard"]

log = logging.getLogger(__name__)

READ_ATTEMPTS: Final = 3
PAUSE_S: Final = 0.05
MOST_PAUSE_S: Final = 10.0
STORE_PATIENCE_S: Final = 300.0  # as long as trainers wait for each other, by default
SPARSE: Final = 8  # fewer than one in so many samples of a shard are read one by one, where the format can
MOST_SHARDS: Final = 64


def read_shard(shard: Shard, columns: Sequence[str] | None, clock: Clock = SYSTEM) -> Columns:
    """All samples of a shard by column.

    Raises:
        ShardUnreadable: three attempts failed, its file is as it was registered, and this host is not to blame.
        DatasetChanged: its file is gone or was changed.
        InvalidInput: there is no such column.
        StoreUnavailable: the store was away for longer than `STORE_PATIENCE_S`.
        StoreRefused: the store does not let us read.
        DataUnavailable, FolderFull: this host has run out of something, three times: no shard is to blame.
    """
    attempt, pause_s, deadline = 0, PAUSE_S, clock.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            return shard.read(columns)
        except (DatasetChanged, StoreRefused):
            raise
        except StoreUnavailable as exc:
            if clock.monotonic() > deadline:
                raise
            log.warning("shard %d (%s) waits for its store: %s", shard.index, shard, exc)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)
        except (DatasetMismatch, OSError, DataUnavailable) as exc:
            _check_unchanged(shard)
            attempt += 1
            log.warning("shard %d (%s) cannot be read, attempt %d of %d: %s", shard.index, shard, attempt, READ_ATTEMPTS, exc)
            if attempt == READ_ATTEMPTS:
                if isinstance(exc, DataUnavailable | FolderFull):
                    raise
                raise ShardUnreadable(f"{shard.path}: shard {shard.index} ({shard}) cannot be read: {exc}", shard=shard.index) from exc
            pause_s = PAUSE_S * attempt
        clock.sleep(pause_s)


def _check_unchanged(shard: Shard) -> None:
    """Raise DatasetChanged if that is why it could not be read; a disk that does not even tell is none."""
    try:
        shard.check_unchanged()
    except DatasetChanged:
        raise
    except (DatasetMismatch, DataUnavailable) as exc:
        log.debug("shard %d (%s) cannot be looked at: %s", shard.index, shard, exc)


class Rows:
    """Samples of a data set by shard and position, with the newest shards kept in memory. Not for two threads.

    Args:
        dataset: with its files.
        columns: to read; all if None.
        keep: how many shards stay in memory, 64 at most.
        keep_bytes: of these, at most; the newest one stays however large.
    """

    def __init__(self, dataset: Dataset, columns: Sequence[str] | None, *, keep: int, keep_bytes: int) -> None:
        self._dataset, self._columns, self._keep, self._keep_bytes = dataset, columns, max(1, min(keep, MOST_SHARDS)), keep_bytes
        self._held: OrderedDict[int, Columns] = OrderedDict()
        self._held_bytes = 0

    def take(self, shards: NDArray[np.int64], positions: NDArray[np.int64]) -> Columns:
        """The samples at these places, in this order; an empty order gives empty columns. Raises as `read_shard`."""
        if not len(shards):
            return {column: values[:0] for column, values in self.whole(0).items()}
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
            return {column: values[positions] for column, values in self.whole(number).items()}
        return joined([read_shard(_row(shard, at), self._columns) for at in positions.tolist()])

    def whole(self, number: int) -> Columns:
        """A shard, kept for the next calls. Raises as `read_shard`."""
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = read_shard(self._dataset.shard(number), self._columns)
            self._held_bytes += _bytes_of(held)
            while len(self._held) > self._keep or (self._held_bytes > self._keep_bytes and len(self._held) > 1):
                self._held_bytes -= _bytes_of(self._held.popitem(last=False)[1])
        else:
            self._held.move_to_end(number)
        return held


def _bytes_of(columns: Columns) -> int:
    return sum(values.nbytes for values in columns.values())


def _row(shard: Shard, at: int) -> Shard:
    start = shard.start + at
    return replace(shard, start=start, stop=start + 1, span=Span(start=start, stop=start + 1))
