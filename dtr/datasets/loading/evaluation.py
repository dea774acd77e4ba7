"""Passes over a data set beside the training: for validation. Made by ``agent.evaluation``.

Guarantees: each ``for`` loop gives the same samples in the same order, each sample to one rank, in as many batches on every rank. Nothing
of it is part of the lineage: no lease, no ledger, no word in a checkpoint, so a pass may be repeated, left half-way or left out. The data
set is divided among the ranks by position, a contiguous share each, equal but for one sample; with ``global_batch_size`` each global batch
is divided likewise.

``tail`` is what it is elsewhere: ``empty`` gives the shorter shares a short or empty last batch, ``pad`` repeats samples until all batches
are full (``batch.padded`` says which: leave them out of a mean), ``drop`` has as many batches as the smallest share has full ones.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np

from dtr.datasets.consuming import ranges
from dtr.datasets.loading.batch import Batch, Order, SampleRange
from dtr.datasets.loading.feed import batches_of, global_share
from dtr.datasets.loading.fetch import Reader
from dtr.datasets.loading.order import EpochOrder, share
from dtr.datasets.loading.plan import Plan, Reading, Tail
from dtr.datasets.loading.processes import read_by_processes
from dtr.datasets.loading.readahead import ReadAhead
from dtr.datasets.timemachine.skipping import Skipping
from dtr.errors import ForkedProcess, RosterChanged
from dtr.session import Session

__all__ = ["Evaluation"]


class Evaluation:
    """Iterable, as often as one likes. It belongs to the run in which it was made, as a loader does.

    Args:
        session: in a run.
        plan: what to load; ``epochs`` are passes of one loop.
        reading: how to read ahead.
    """

    def __init__(self, session: Session, plan: Plan, reading: Reading) -> None:
        self.plan, self.reading = plan, reading
        self._session, self._run, self._pid = session, session.run, os.getpid()
        self._skipping = Skipping(session, plan.dataset, {})

    def __repr__(self) -> str:
        return f"Evaluation({self.plan.dataset.spec.name!r}, run={self._run.id!r})"

    def __len__(self) -> int:
        """Batches of one loop, the same on every rank."""
        return steps_of(self.plan, self._run.world_size) * (self.plan.epochs or 1)

    def __iter__(self) -> Generator[Batch]:
        """One loop's batches, read ahead. Leaving it, also half-way, ends the thread and the processes that read.

        Raises:
            RosterChanged, StaleIncarnation: the run ended.
            DatasetMismatch, ShardUnreadable: a file changed, or cannot be read: the figure would be another.
        """
        self._check()
        stop = threading.Event()
        ahead: ReadAhead[Batch] = ReadAhead(
            self._read(stop), ahead=self.reading.prefetch, name=f"dtr-evaluate-{self.plan.dataset.spec.name}", stop=stop,
            weigh=lambda batch: batch.size_bytes, ahead_bytes=self.reading.prefetch_bytes,
        )  # fmt: skip
        try:
            while True:
                try:
                    batch = ahead.take(self._check)
                except StopIteration:
                    return
                yield batch
        finally:
            ahead.close()

    def reader(self) -> Reader:
        """Makes batches of `orders`, in any process: the data set for ``torch.utils.data.DataLoader``."""
        return Reader(self.plan, self.reading, tracked=False)

    def orders(self) -> Orders:
        """One loop's orders: the sampler for ``torch.utils.data.DataLoader``."""
        return Orders(self)

    def draw(self) -> Iterator[Order]:
        """The orders of one loop."""
        self._check()
        self._skipping.look()
        plan, run = self.plan, self._run
        sizes = plan.dataset.sizes()
        for epoch in range(plan.epochs or 1):
            order = EpochOrder.of(sizes, seed=plan.seed, epoch=epoch, shuffle=plan.mode == "deterministic", window=plan.window)
            for number in range(steps_of(plan, run.world_size)):
                if plan.mode == "deterministic":
                    found = global_share(
                        plan, order, self._skipping.split, epoch=epoch, number=number, run=run.id, rank=run.rank, world_size=run.world_size
                    )
                    yield replace(found, tracked=False)
                else:
                    yield self._nth(order, epoch, number)

    def _nth(self, order: EpochOrder, epoch: int, number: int) -> Order:
        plan, run = self.plan, self._run
        start, stop = share(order.samples, run.world_size, run.rank)
        first = start + number * plan.batch_size
        given: list[SampleRange] = []
        skipped: list[SampleRange] = []
        for shard, begin, end in _pieces(order, min(first, stop), min(first + plan.batch_size, stop)):
            left = ranges.minus(((begin, end),), self._skipping.of(shard))
            given += [(shard, *held) for held in left]
            skipped += [(shard, *held) for held in ranges.minus(((begin, end),), left)]
        spec = plan.dataset.spec
        return Order(
            dataset=spec.name, version=spec.version, run=run.id, epoch=epoch, number=number, ranges=tuple(given), skipped=tuple(skipped),
            fill=plan.batch_size if plan.tail == "pad" else 0, tracked=False,
        )  # fmt: skip

    def _read(self, stop: threading.Event) -> Generator[Batch]:
        def check() -> None:
            if not stop.is_set():
                self._check()

        orders = iter(self.draw())
        reader = self.reader()
        batches = read_by_processes(reader, orders, self.reading, check) if self.reading.processes else map(reader, orders)
        for batch in batches:
            yield batch
            if stop.is_set():
                return

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(f"this evaluation belongs to process {self._pid}: a child may have reader(), and orders of the parent")
        self._session.check()
        if self._session.run.id != self._run.id:
            raise RosterChanged(
                f"run {self._run.id} ended, and this evaluation with it: make a new one", run=self._run.id, worker=None, rank=None
            )


@dataclass(frozen=True, slots=True)
class Orders:
    """What `Evaluation.orders` gives: each iteration is a loop of its own."""

    evaluation: Evaluation

    def __iter__(self) -> Iterator[Order]:
        return self.evaluation.draw()

    def __len__(self) -> int:
        return len(self.evaluation)


def steps_of(plan: Plan, world_size: int) -> int:
    """Batches of one pass: a function of sizes alone, so that ranks that know of other skips agree."""
    samples, size = plan.dataset.spec.total_samples, plan.batch_size
    return batches_of(samples, size, plan.tail) if plan.mode == "deterministic" else _steps(samples, size, world_size, plan.tail)


def _steps(samples: int, size: int, world_size: int, tail: Tail) -> int:
    most = -(-samples // world_size)
    return samples // world_size // size if tail == "drop" else -(-most // size)


def _pieces(order: EpochOrder, start: int, stop: int) -> Iterator[SampleRange]:
    """The places from start to stop of an order that is not permuted, as ranges of shards."""
    at = start
    while at < stop:
        turn = int(np.searchsorted(order.begins, at, side="right")) - 1
        begin, end = int(order.begins[turn]), min(stop, int(order.begins[turn + 1]))
        yield int(order.shards[turn]), at - begin, end - begin
        at = end
