"""Orders made into batches: the part of a loader that reads files and nothing else, in this process or in any other.

Guarantee: whoever has a `Reader` and an order gets the same batch, bit for bit. A reader holds no connection, no thread and no open file
between two orders, so it may be pickled and may be forked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dtr.datasets.formats import Columns
from dtr.datasets.loading.batch import Batch, Order, SampleRange, coalesced, joined, samples_of
from dtr.datasets.loading.plan import Plan, Reading
from dtr.datasets.loading.reading import Rows
from dtr.datasets.loading.tensors import as_tensors
from dtr.datasets.registering.spec import Dataset
from dtr.errors import ShardUnreadable

__all__ = ["Reader"]

RUN: Final = 4  # samples in a row, on average: orders with fewer are gathered one by one


class Reader:
    """``reader(order)`` and ``reader[order]`` are the batch; the latter makes it a map-style data set for torch. Not for two threads.

    A shard that cannot be read is left out of a dynamic loader's batches, and named in ``batch.unread``; elsewhere it is an error, since
    it would change the sequence, or the figure that an evaluation yields.

    Args:
        plan, reading: of the loader.
        tracked: whether it is a loader of the lineage, or an evaluation.
        lanes: shards that orders take turns with.
    """

    def __init__(self, plan: Plan, reading: Reading, *, tracked: bool = True, lanes: int = 1) -> None:
        self.dataset: Dataset = plan.dataset
        self._columns, self._as_torch, self._batch_size = plan.columns, reading.as_torch, plan.batch_size
        self._leaves_out = tracked and plan.mode == "dynamic"
        self._keep_bytes = reading.prefetch_bytes
        self._keep = _shards_kept(plan, lanes)
        self._begin()

    def __repr__(self) -> str:
        return f"Reader({self.dataset.spec.name!r})"

    def _begin(self) -> None:
        self._unreadable: dict[int, str] = {}
        self._epoch = -1  # of which these are
        self._none: Columns = {}
        self._rows = Rows(self.dataset, self._columns, keep=self._keep, keep_bytes=self._keep_bytes, least=2 if self._leaves_out else 1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"_unreadable", "_epoch", "_none", "_rows"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __getitem__(self, order: Order) -> Batch:
        return self(order)

    def __call__(self, order: Order) -> Batch:
        """Read a batch.

        Raises:
            DatasetMismatch: a file is gone, or changed since it was registered.
            ShardUnreadable: a shard cannot be read, where none may be left out.
            InvalidInput: there is no such column.
        """
        if order.epoch != self._epoch:  # by then a shard may have been put back
            self._unreadable, self._epoch = {}, order.epoch
        wanted = (*order.ranges, *order.padded)
        if not self._leaves_out and samples_of(wanted) < RUN * len(wanted):
            return self._made(order, order.ranges, order.padded, self._gathered(wanted), {})
        unread: dict[int, str] = {}
        given, pieces = self._pieces(order.ranges, unread)
        padded, more = self._pieces(order.padded, unread)
        columns = joined([*pieces, *more]) if pieces or more else self._empty()
        self._none = self._none or {column: values[:0].copy() for column, values in columns.items()}
        missing = order.fill - samples_of(given) - samples_of(padded)
        if missing > 0:
            columns, again = self._repeated(columns, (*given, *padded), missing)
            padded = [*padded, *again]
        return self._made(order, tuple(given), tuple(padded), columns, unread)

    def probe(self, shard: int) -> str:
        """Read a shard that orders will soon want; '' if that worked, else the error, one line."""
        try:
            self._rows.whole(shard)
        except ShardUnreadable as exc:
            return self._unreadable.setdefault(shard, _one_line(self.dataset, shard, exc))
        return ""

    # --- reading ----------------------------------------------------------------------------------------------------

    def _made(
        self, order: Order, ranges: Sequence[SampleRange], padded: Sequence[SampleRange], columns: Columns, unread: dict[int, str]
    ) -> Batch:
        return Batch(
            dataset=order.dataset, version=order.version, run=order.run, epoch=order.epoch, number=order.number,
            columns=as_tensors(columns) if self._as_torch else columns, ranges=tuple(ranges), padded=tuple(padded), skipped=order.skipped,
            unread=tuple(sorted(unread.items())), tracked=order.tracked,
        )  # fmt: skip

    def _gathered(self, wanted: Sequence[SampleRange]) -> Columns:
        """Samples from all over, by the rows of their shards."""
        numbers, starts, stops = np.array(wanted, dtype=np.int64).T
        sizes = stops - starts
        first, shards = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes), np.repeat(numbers, sizes)
        return self._rows.take(shards, first + np.arange(len(shards)), readers=-(-self._batch_size // max(1, len(shards))))

    def _pieces(self, wanted: Sequence[SampleRange], unread: dict[int, str]) -> tuple[list[SampleRange], list[Columns]]:
        """Runs of samples, as views of their shards; without those that cannot be read, if that is allowed."""
        given: list[SampleRange] = []
        pieces: list[Columns] = []
        for shard, start, stop in wanted:
            reason = self.probe(shard) if self._leaves_out and shard not in self._unreadable else self._unreadable.get(shard, "")
            if reason:
                unread[shard] = reason
                continue
            given.append((shard, start, stop))
            pieces.append({column: values[start:stop] for column, values in self._rows.whole(shard).items()})
        return given, pieces

    def _any(self) -> tuple[int, Columns]:
        """Any shard that can be read."""
        for number in range(self.dataset.spec.shards):
            try:
                return number, self._rows.whole(number)
            except ShardUnreadable:
                continue
        raise ShardUnreadable(f"data set {self.dataset.spec.name!r}: no shard of it can be read")

    def _empty(self) -> Columns:
        """The right columns and dtypes, and no samples."""
        return dict(self._none) or {column: values[:0].copy() for column, values in self._any()[1].items()}

    def _repeated(self, columns: Columns, given: Sequence[SampleRange], missing: int) -> tuple[Columns, tuple[SampleRange, ...]]:
        """More samples of those that are there, or, if there are none, the first of a shard: a full batch was promised."""
        source = columns
        if not given:
            number, whole = self._any()
            size = min(missing, self.dataset.size_of(number))
            given, source = ((number, 0, size),), {column: values[:size] for column, values in whole.items()}
        places = [(shard, at) for shard, start, stop in given for at in range(start, stop)]
        index: NDArray[np.int64] = np.arange(missing) % len(places)
        again = {column: values[index] for column, values in source.items()}
        return joined([columns, again]), coalesced([places[n] for n in index.tolist()])


def _shards_kept(plan: Plan, lanes: int) -> int:
    """As many as the next orders will want again."""
    spec = plan.dataset.spec
    if plan.mode == "dynamic":
        return 1 + lanes * (1 + -(-plan.batch_size // spec.shard_size))
    return 2 + -(-(plan.window or spec.total_samples) * spec.shards // spec.total_samples)


def _one_line(dataset: Dataset, shard: int, exc: ShardUnreadable) -> str:
    return " ".join(f"{dataset.shard(shard)}: {exc.__cause__ or exc}".split())[:500]
