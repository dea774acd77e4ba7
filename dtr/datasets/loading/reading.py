"""Shards as arrays for the loader: read once more where that may help, and told apart from data that must not be skipped.

A file that is gone or has changed since it was registered is refused, by name, whatever the policy: leaving out its shards would train on
other data than was declared, silently. A file that is as it was and whose bytes make no samples, or that the disk does not give, is
unreadable: after three attempts the shard is for quarantine. A host that has run out of file descriptors, memory or room, that may not
read the file or has lost its mount, and a store that is away, are no fault of the shard: other hosts read it, and one such host must not
leave out shard after shard. Nor are samples that differ in their columns: that is said of the data set as a whole, and ends the training.
"""

from __future__ import annotations

import logging
import shlex
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtr.clock import SYSTEM, Clock
from dtr.datasets.formats import Columns, Span
from dtr.datasets.formats.columns import bytes_of
from dtr.datasets.loading.batch import joined
from dtr.datasets.registering.spec import Dataset, Shard
from dtr.errors import DatasetChanged, DatasetMismatch, DataUnavailable, FolderFull, ShardUnreadable, StoreRefused, StoreUnavailable

__all__ = ["READ_ATTEMPTS", "Rows", "read_shard"]

log = logging.getLogger(__name__)

READ_ATTEMPTS: Final = 3
PAUSE_S: Final = 0.05
MOST_PAUSE_S: Final = 10.0
STORE_PATIENCE_S: Final = 300.0  # as long as trainers wait for each other, by default
SPARSE: Final = 8  # fewer than one in so many samples of a shard may be read by themselves, where the format can
APART_BYTES: Final = 64 << 10  # a row read by itself costs about as much as so many bytes more that are read along with others
ARRAYS_BYTES: Final = 1 << 10  # of a shard's arrays themselves, so that shards of few samples count, too

T = TypeVar("T")


def read_shard(shard: Shard, columns: Sequence[str] | None, clock: Clock = SYSTEM) -> Columns:
    """All samples of a shard by column.

    Raises:
        ShardUnreadable: three attempts failed, its file is as it was registered, and this host is not to blame; says what to do.
        DatasetChanged: its file is gone or was changed.
        InvalidInput: there is no such column, or not in all samples.
        StoreUnavailable: the store was away for longer than `STORE_PATIENCE_S`.
        StoreRefused: the store does not let us read.
        DataUnavailable, FolderFull: this host has run out of something, or cannot read the file, three times: no shard is to blame.
    """
    return _patiently(shard, lambda: shard.read(columns), clock)


def _patiently(shard: Shard, read: Callable[[], T], clock: Clock = SYSTEM) -> T:
    attempt, pause_s, deadline = 0, PAUSE_S, clock.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            return read()
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
                samples = shlex.quote(f"{shard.file}:{shard.start}-{shard.stop}")
                raise ShardUnreadable(
                    f"{shard.path}: shard {shard.index} ({shard}) cannot be read: {exc}; put the file back as it was, or leave these "
                    f"samples out: dtr data skip {shlex.quote(shard.dataset)} {samples} --reason TEXT",
                    shard=shard.index,
                ) from exc
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

    Shards are read whole, for what comes later. Rows by themselves are read where the format has such, if that is cheaper: where the
    shards that are wanted in turn do not fit into memory, or others read most of their rows.

    Args:
        dataset: with its files.
        columns: to read; all if None.
        keep: how many shards are wanted in turn: so many stay in memory.
        keep_bytes: of these, at most.
        least: the newest so many stay however large.
    """

    def __init__(self, dataset: Dataset, columns: Sequence[str] | None, *, keep: int, keep_bytes: int, least: int = 1) -> None:
        self._dataset, self._columns = dataset, columns
        self._keep, self._keep_bytes, self._least = max(keep, least), keep_bytes, least
        self._held: OrderedDict[int, tuple[Columns, int]] = OrderedDict()
        self._held_bytes = 0
        spec = dataset.spec
        self._row_bytes = sum(facts.plain_bytes or facts.size_bytes for facts in dataset.files) / max(1, spec.total_samples)
        self._fits = min(keep, spec.shards) * spec.shard_size * self._row_bytes <= keep_bytes

    def take(self, shards: NDArray[np.int64], positions: NDArray[np.int64], *, readers: int = 1) -> Columns:
        """The samples at these places, in this order; an empty order gives empty columns. Raises as `read_shard`.

        Args:
            shards, positions: of each sample.
            readers: that share the samples of these shards among them.
        """
        if not len(shards):
            return {column: values[:0] for column, values in self.whole(0).items()}
        apart = self._dataset.spec.format.has_rows and not (self._fits and readers * self._row_bytes <= APART_BYTES)
        order = np.argsort(shards, kind="stable")
        numbers, begins = np.unique(shards[order], return_index=True)
        wanted = np.split(positions[order], begins[1:])
        found = joined([self._some(number, at, apart) for number, at in zip(numbers.tolist(), wanted, strict=True)])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return {column: values[back] for column, values in found.items()}

    def _some(self, number: int, positions: NDArray[np.int64], apart: bool) -> Columns:
        if number in self._held or not apart or len(positions) * SPARSE > self._dataset.size_of(number):
            return {column: values[positions] for column, values in self.whole(number).items()}
        shard = self._dataset.shard(number)
        rows, back = np.unique(positions, return_inverse=True)
        runs = np.split(rows + shard.start, np.flatnonzero(np.diff(rows) > 1) + 1)
        spans = [Span(start=int(run[0]), stop=int(run[-1]) + 1) for run in runs]
        pieces = _patiently(shard, lambda: shard.read_spans(spans, self._columns))
        return {column: values[back] for column, values in joined(pieces).items()}

    def whole(self, number: int) -> Columns:
        """A shard, kept for the next calls. Raises as `read_shard`."""
        held = self._held.get(number)
        if held is not None:
            self._held.move_to_end(number)
            return held[0]
        self._make_room(self._least - 1, next((size for _, size in reversed(self._held.values())), 0))
        columns = read_shard(self._dataset.shard(number), self._columns)
        size_bytes = bytes_of(columns) + ARRAYS_BYTES
        self._held[number] = columns, size_bytes
        self._held_bytes += size_bytes
        self._make_room(self._least, 0)
        return columns

    def _make_room(self, least: int, more_bytes: int) -> None:
        while len(self._held) > self._keep or (len(self._held) > least and self._held_bytes + more_bytes > self._keep_bytes):
            self._held_bytes -= self._held.popitem(last=False)[1][1]
