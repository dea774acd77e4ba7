"""The loader: batches of one data set for one rank, read ahead, from where the restored lineage stands.

Guarantees, for the batches that the trainer reports with ``agent.step(batch)``: in dynamic mode each sample of an epoch is consumed exactly
once by the surviving lineage, whatever dies and however many ranks there are afterwards; in deterministic mode the sequence of global
batches is a function of (seed, epoch, global batch size) and the data set alone. Excepted is only what the data state has on record.
Every rank yields as many batches in an epoch of a run. Reading ahead is not consuming.

Who reads, and who talks to Redis::

    for batch in loader                          a thread of this process leases and reads; with processes=N, N processes read
    DataLoader(loader.reader(),                  torch's workers, forked or spawned, read; ``sampler`` is drawn in this process,
               sampler=loader.orders(workers=N), which leases
               batch_size=None, num_workers=N)

In each, the process that trains is alone in the run: it leases, hands out orders, and reports. Whoever else reads is given a
`dtr.datasets.loading.fetch.Reader` and orders, knows files only, and may die or be started anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import orjson

from dtr.datasets.consuming.consumption import Consumption
from dtr.datasets.consuming.datastate import Cursor, DataState, Dynamic, merged, parse
from dtr.datasets.consuming.goingon import going_on, with_whole_shards
from dtr.datasets.consuming.handout import Handout
from dtr.datasets.consuming.ledger import Ledger
from dtr.datasets.consuming.reports import Reports
from dtr.datasets.consuming.standing import standing
from dtr.datasets.loading.batch import Batch, Order
from dtr.datasets.loading.feed import Stopped, Surroundings, batches_of, deterministic_orders, dynamic_orders
from dtr.datasets.loading.fetch import Reader
from dtr.datasets.loading.plan import Plan, Reading
from dtr.datasets.loading.processes import read_by_processes
from dtr.datasets.loading.readahead import ReadAhead
from dtr.datasets.registering.speed import pace_of
from dtr.datasets.timemachine.journal import Origin
from dtr.datasets.timemachine.skipping import Skipping
from dtr.errors import DataConflict, DatasetChanged, ForkedProcess, RosterChanged, StateCorrupt
from dtr.failpoints import failpoint
from dtr.session import Session

if TYPE_CHECKING:
    from threading import Lock

__all__ = ["Loader"]

log = logging.getLogger(__name__)

STATE: str = "dtr_data"  # the one key of `Loader.state_dict`


class Loader:
    """Iterates over this rank's batches; made by ``agent.loader``.

    It belongs to the run in which it was made: when that ends, it raises RosterChanged, and a new loader in the next run goes on from
    what was restored. A loop that was left may be entered again, and goes on; `close`, or leaving ``with loader:``, lets go of its thread
    and processes, and what they had read is nobody's until the run ends. Not for several threads, nor for a forked child.

    Args:
        session: in a run.
        plan: what to load.
        base: where it goes on: what was consumed before this run.
        reports: of this process.
        reading: how to read ahead.
        mutex: guards ``consumption``, which saves look at.
        later: the version of the data set that was registered since the one of the plan; 0: none.
    """

    def __init__(
        self, session: Session, plan: Plan, base: DataState, *, reports: Reports, reading: Reading, mutex: Lock, later: int = 0
    ) -> None:
        self.reading = reading
        self._session, self._run, self._mutex, self._pid = session, session.run, mutex, os.getpid()
        self._reports = reports
        self._pace = pace_of(session, plan.dataset.spec.name)
        self._way = ""  # how batches are taken: once it is known, it stays
        self._drawn: dict[tuple[int, int], Order] = {}  # orders that were not consumed yet
        self._lanes = max(1, reading.processes)
        self.exhausted = False
        self._closed = False
        self._given: tuple[int, int] | None = None  # epoch and number of the batch that was handed out last,
        self._at: tuple[int, int] | None = None  # and of the one that was consumed last
        self.begin(plan, base, later)

    def begin(self, plan: Plan, base: DataState, later: int = 0) -> None:
        """Begin anew, at another place; before the first batch."""
        self.plan, self.base, self._later = plan, base, later
        self.origin = Origin.of(base, self._run.world_size)
        self._skipping = Skipping(self._session, plan.dataset, base.skips)
        batches = batches_of(plan.dataset.spec.total_samples, plan.batch_size, plan.tail)
        self.consumption = Consumption(base, plan.dataset.size_of, batches, lambda: self._skipping.known)
        self._handout = Handout(self._session, plan, base, self._reports, self._samples)
        self._reader = Reader(plan, self.reading, lanes=self._lanes)
        self._around = Surroundings(
            session=self._session, skipping=self._skipping, note=self._note, have=self._handout.have, leased=self._handout.leased,
            probe=self._probe,
        )  # fmt: skip
        name = f"dtr-load-{plan.dataset.spec.name}"
        size, stop = self.reading.prefetch, self._around.stop
        self._batches: ReadAhead[Batch] = ReadAhead(
            self._read(), ahead=size, name=name, stop=stop, weigh=lambda batch: batch.size_bytes, ahead_bytes=self.reading.prefetch_bytes
        )
        self._orders: ReadAhead[Order] = ReadAhead(self._connected(), ahead=size, name=name, stop=stop)

    def __repr__(self) -> str:
        return f"Loader({self.plan.dataset.spec.name!r}, run={self._run.id!r}, mode={self.plan.mode!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- batches ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; waits for the reading thread, and at the end of an epoch for the verdict.

        Raises:
            RosterChanged, StaleIncarnation, StateLost: the run ended.
            DatasetMismatch: a file of the data set is gone, or changed since it was registered.
            DataUnavailable: a process that reads died.
            CoordinatorUnavailable: Redis was away for longer than ``barrier_timeout_s``.
            DataConflict: the loader was closed, or its orders are drawn by another.
        """
        self._go("iterate")
        batch: Batch = self._taken(self._batches)
        self._hand_out(batch)
        return batch

    def reader(self) -> Reader:
        """Makes batches of `orders`, in this process or in another: the data set for ``torch.utils.data.DataLoader``."""
        return Reader(self.plan, self.reading)

    def orders(self, *, workers: int = 1) -> Orders:
        """What the next batches are, drawn in this process and read elsewhere: the sampler for ``torch.utils.data.DataLoader``.

        An order counts as handed out when it is drawn. One whose batch was not passed to ``agent.step`` comes again when the orders are
        iterated over anew, so a ``DataLoader`` that was left half-way loses nothing.

        Args:
            workers: that read: each is given shards of its own, so that none is read twice. Pass what ``num_workers`` is.

        Raises:
            DataConflict: this loader is iterated over itself, or was asked for orders with another number of workers.
            RosterChanged: the run ended.
        """
        lanes = max(1, workers)
        if self._way and lanes != self._lanes:
            raise DataConflict(f"this loader has orders for {self._lanes} workers, and {workers} were asked for", name=self._name)
        self._lanes = lanes
        self._go("orders", begin=False)
        return Orders(self)

    def draw(self) -> Generator[Order]:
        """Orders from where the drawing stands; see `orders`."""
        self._go("orders")
        yield from list(self._drawn.values())
        while True:
            self._go("orders")
            try:
                order = self._taken(self._orders)
            except StopIteration:
                return
            self._drawn[order.epoch, order.number] = order
            self._hand_out(order)
            yield order

    def _taken(self, source: ReadAhead[Any]) -> Any:
        try:
            return source.take(self._check)
        except Stopped:
            self._go(self._way)
            raise
        except StopIteration:
            self.exhausted = True
            raise
        except DatasetChanged as exc:
            if not self._later:
                raise
            raise DatasetChanged(
                f"{exc.message}. The lineage is in the middle of epoch {self.base.epoch} of version {self.plan.dataset.spec.version}, and "
                f"version {self._later} is registered: put the file back and finish the epoch, or abandon it with "
                "agent.loader(..., on_new_version='abandon_epoch'), which has its rest on record as dropped",
                **exc.facts,
            ) from exc

    def _hand_out(self, batch: Batch | Order) -> None:
        with self._mutex:
            self.consumption.hand_out(batch)
        self._given = (batch.epoch, batch.number)
        failpoint("load.before_report")
        self._handout.give(batch)
        failpoint("load.after_report")

    def _read(self) -> Generator[Batch]:
        orders = self._connected()
        if self.reading.processes:
            yield from read_by_processes(self._reader, orders, self.reading, self._around.check)
        else:
            yield from map(self._reader, orders)

    def _connected(self) -> Generator[Order]:
        """The reading thread opens the connection of the reports, which the trainer must not wait for."""
        base, around = self.base, self._around
        if isinstance(base, Cursor):
            orders = deterministic_orders(self.plan, base, around)
        else:
            orders = dynamic_orders(self.plan, base, around, self._lanes)
        self._reports.connect()
        yield from orders

    def _probe(self, shard: int) -> str:
        """Where this thread reads as well, a shard is read as soon as it is leased, so that a bad one is found before it counts."""
        return self._reader.probe(shard) if self._way == "iterate" and not self.reading.processes else ""

    # --- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where all ranks stand after the batch that this one consumed last: one entry, text, the same on every rank.

        With `load_state_dict` this is torch's Stateful protocol, so ``torch.distributed.checkpoint`` and others keep a loader like a
        model: any number of ranks resumes from it. A checkpoint of dtr needs it not, since it has the data state by itself. Every rank
        takes it at the same step. In dynamic mode the ledger is asked for the other ranks' consumption, which takes a round trip or three
        and waits for ranks that are behind. What other ranks padded or dropped is not on record in it.

        Raises:
            DataConflict: a rank is behind by more than ``barrier_timeout_s``.
            StateCorrupt: a rank is ahead by more than 8 batches.
            RosterChanged, CoordinatorUnavailable: the run ended, or Redis is away.
        """
        self._check()
        found = self._standing()
        if isinstance(found, Dynamic):
            found = with_whole_shards(self.plan, found)
        return {STATE: orjson.dumps(found.to_json(), option=orjson.OPT_SORT_KEYS).decode()}

    def _standing(self) -> DataState:
        spec, base = self.plan.dataset.spec, self.base
        with self._mutex:
            own, left = self.consumption.state(), self.consumption.unreported()
        mine = merged(spec.name, [base, own])
        if isinstance(base, Cursor) or not isinstance(own, Dynamic) or self._at is None:
            return mine
        epoch, number = self._at
        if self.exhausted and self.plan.epochs is not None and self._at == self._given and not left:
            return Dynamic(
                version=spec.version, digest=spec.digest, seed=self.plan.seed, epoch=self.plan.epochs, notes=mine.notes, skips=mine.skips
            )
        if self._run.world_size == 1:
            return mine
        start = base if base.epoch == epoch else Dynamic(version=spec.version, digest=spec.digest, seed=base.seed, epoch=epoch)
        found = standing(Ledger(self._session, spec, epoch), start, own, number)
        return merged(spec.name, [base, found]) if base.epoch != epoch else found

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave, before the first batch; of several, as a list, from all they consumed together.

        Every rank must give the same; a rank that gives another is refused when it begins.

        Raises:
            DataConflict: batches were taken already, or the states are of another data set or sequence.
            StateCorrupt: it is no state.
        """
        if self.begun:
            raise DataConflict("load_state_dict() must come before the first batch of this run", name=self._name)
        states = [state] if isinstance(state, Mapping) else list(state)
        known = self._skipping.known
        self.begin(self.plan, going_on(self.plan, merged(self._name, [self._parsed(one) for one in states])), self._later)
        self._skipping.restored(known)

    def _parsed(self, state: Mapping[str, Any]) -> DataState:
        text = state.get(STATE) if isinstance(state, Mapping) else None
        if not isinstance(text, str):
            raise StateCorrupt(f"the state of a loader is {{{STATE!r}: text}}, as state_dict() gives it, got {str(state)[:60]!r}")
        try:
            return parse(self._name, orjson.loads(text))
        except orjson.JSONDecodeError as exc:
            raise StateCorrupt(f"the state of the loader of {self._name!r} is no JSON: {exc}") from exc

    # --- what is told -----------------------------------------------------------------------------------------------

    def check(self, batches: Sequence[Batch]) -> None:
        """Whether the trainer may report these; see `Consumption.check`."""
        with self._mutex:
            self.consumption.check(batches)

    def consume(self, batch: Batch, step: int) -> None:
        """The trainer consumed a batch of this loader, which `check` let pass; called by ``agent.step``."""
        with self._mutex:
            self.consumption.consume(batch)
        self._drawn.pop((batch.epoch, batch.number), None)
        self._at = (batch.epoch, batch.number)
        for shard, reason in batch.unread:
            if (batch.epoch, shard) not in self._around.unread:
                self._around.unread.add((batch.epoch, shard))
                self._handout.unreadable(batch.epoch, shard, reason)
            self._note("quarantined", batch.epoch, shard, reason)
        self._handout.consumed(batch, step)
        self._pace.consumed(batch, self._run, self._reports)

    @property
    def most_in_flight(self) -> int:
        """Samples that may well be on their way through one step: handed out, and not reported yet."""
        return self.plan.batch_size * (1 + self.reading.prefetch + 4 * self._lanes)

    @property
    def waiting(self) -> tuple[int, int]:
        """Batches that were read and not taken yet, and their bytes."""
        return self._batches.waiting

    def _note(self, kind: str, epoch: int, shard: int, text: str) -> None:
        with self._mutex:
            self.consumption.note(kind, epoch, shard, text)

    def _samples(self) -> int:
        with self._mutex:
            return self.consumption.samples

    # --- life -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop reading ahead. What was read and not taken is nobody's until the run ends."""
        if self._pid == os.getpid():
            self._closed = True
            self._batches.close()
            self._orders.close()

    def join(self, timeout_s: float) -> None:
        """After `close`: wait for what is being read to be read, so that no thread is in a library's code when the interpreter ends."""
        if self._pid == os.getpid():
            self._batches.join(timeout_s)
            self._orders.join(timeout_s)

    @property
    def begun(self) -> bool:
        """Whether batches were asked for."""
        return bool(self._way)

    @property
    def run(self) -> str:
        """The run that it belongs to."""
        return self._run.id

    @property
    def _name(self) -> str:
        return self.plan.dataset.spec.name

    def _go(self, way: str, *, begin: bool = True) -> None:
        """Take batches in this way, and in no other from now on."""
        self._check()
        if self._closed:
            raise DataConflict(f"{self!r} was closed: agent.loader() goes on in the next run", name=self._name)
        if self._way not in ("", way):
            raise DataConflict(f"{self!r} is taken by `for batch in loader` or by loader.orders(), not by both", name=self._name)
        if begin:
            self._way = way

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(
                f"this loader belongs to process {self._pid}: a child may have loader.reader(), and orders that process {self._pid} draws"
            )
        self._session.check()
        if self._session.run.id != self._run.id:
            raise RosterChanged(
                f"run {self._run.id} ended, and this loader with it: make a new one", run=self._run.id, worker=None, rank=None
            )


class Orders:
    """What `Loader.orders` gives: iterable as often as one likes, each time from where the drawing stands.

    Args:
        loader: whose orders these are.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Order]:
        return self._loader.draw()
