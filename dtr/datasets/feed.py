"""What a loader reads ahead: the batches of one rank, in dynamic or in deterministic mode, as generators that a thread drives.

Dynamic mode, one epoch of a run::

    ledger open       every rank, the same base
    while samples for a batch are missing: lease -> read -> say how many batches there are samples for
    nothing free      this rank is dry: it has so many batches, and no more
    batch j           full; or what is left; or empty, while another rank has samples for batch j
    end               every rank is dry, and none has samples for batch j

How many batches an epoch of a run has is thus the number of the rank that has most, which only grows, and is final once all are dry; so
every rank yields as many, and a rank that cannot know yet waits. Nobody needs the trainers' collective for that.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

import numpy as np

from dtr.datasets import ranges
from dtr.datasets.assignment import Assignment
from dtr.datasets.batch import Batch, SampleRange, joined
from dtr.datasets.datastate import Cursor, Dynamic
from dtr.datasets.formats import Columns
from dtr.datasets.ledger import Ledger
from dtr.datasets.order import EpochOrder, share
from dtr.datasets.reading import Rows, read_shard
from dtr.datasets.shuffle import epoch_order
from dtr.datasets.spec import Dataset
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable, ShardUnreadable
from dtr.failpoints import failpoint
from dtr.session import Session

__all__ = ["Mode", "Plan", "Stopped", "Surroundings", "Tail", "deterministic_batches", "dynamic_batches"]

Mode = Literal["dynamic", "deterministic"]
Tail = Literal["empty", "pad", "drop"]
POLL_S: Final = (0.005, 0.05)
RETRY_S: Final = 0.2
CANDIDATES: Final = 64

T = TypeVar("T")
Note = Callable[[str, int, int, str], None]  # kind, epoch, shard, text


class Stopped(Exception):
    """The loader was closed: what it read ahead is nobody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one rank loads a data set; all ranks of a run load it alike. ``batch_size`` is the global one in deterministic mode."""

    dataset: Dataset
    mode: Mode
    batch_size: int
    epochs: int | None
    columns: tuple[str, ...] | None
    seed: int
    window: int
    tail: Tail


@dataclass(slots=True, kw_only=True)
class Surroundings:
    """What a feed needs beside its plan: whom to tell, and when to stop. ``have`` is told each time the number of batches grows."""

    session: Session
    note: Note
    have: Callable[[Ledger, int], None]
    leased: Callable[[int, int, int], None]  # epoch, shard, fence
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise Stopped, or what stands against going on."""
        if self.stop.is_set():
            raise Stopped
        self.session.check()

    def persist(self, call: Callable[[], T]) -> T:
        """Do ``call`` however long Redis is away, up to the timeout of barriers."""
        clock = self.session.clock
        deadline = clock.monotonic() + self.session.settings.barrier_timeout_s
        while True:
            self.check()
            try:
                return call()
            except CoordinatorRefused:
                raise
            except CoordinatorUnavailable:
                if clock.monotonic() > deadline:
                    raise
                self.stop.wait(RETRY_S)


def dynamic_batches(plan: Plan, base: Dynamic, around: Surroundings) -> Iterator[Batch]:
    """The batches of this rank from ``base`` on, epoch by epoch."""
    session, spec = around.session, plan.dataset.spec
    own = around.persist(lambda: Assignment().in_run(session, spec, session.worker_id))
    epoch = base.epoch
    while plan.epochs is None or epoch < plan.epochs:
        start = base if epoch == base.epoch else Dynamic(version=spec.version, digest=spec.digest, seed=plan.seed, epoch=epoch)
        yield from _Epoch(plan, start, around, own).batches()
        epoch += 1


@dataclass(slots=True)
class _Piece:
    """What is left of a shard that was read."""

    shard: int
    columns: Columns
    left: deque[tuple[int, int]]


class _Epoch:
    """One epoch of one rank in dynamic mode."""

    def __init__(self, plan: Plan, base: Dynamic, around: Surroundings, own: Sequence[int]) -> None:
        self._plan, self._base, self._around, self._spec = plan, base, around, plan.dataset.spec
        self._ledger = Ledger(around.session, self._spec, base.epoch)
        order = _turns(own, self._spec.shards, plan.seed, base.epoch) if self._spec.shuffle else list(own)
        done = _members(base.done, self._spec.shards)
        self._candidates = deque(shard for shard in order if not done[shard])
        self._pieces: deque[_Piece] = deque()
        self._stock = 0  # samples in the pieces
        self._number = 0  # of the next batch
        self._have = 0
        self._dry = False
        self._columns: Columns | None = None
        self._last: tuple[Columns, tuple[SampleRange, ...]] | None = None

    def batches(self) -> Iterator[Batch]:
        self._around.persist(lambda: self._ledger.open(self._base))
        failpoint("load.after_open")
        while True:
            while self._stock < self._plan.batch_size and not self._dry:
                self._lease()
            if not self._stock and not self._goes_on():
                return
            yield self._batch()
            self._number += 1

    # --- the ledger -------------------------------------------------------------------------------------------------

    def _lease(self) -> None:
        candidates = [self._candidates[n] for n in range(min(CANDIDATES, len(self._candidates)))]
        want = max(1, -(-(self._plan.batch_size - self._stock) // self._spec.shard_size))
        answer = self._around.persist(
            lambda: self._ledger.lease(candidates, want=want, have=self._have, anything=len(candidates) == len(self._candidates))
        )
        failpoint("load.after_lease")
        given = [shard for shard, _ in answer.shards]
        tried = len(candidates)
        if len(given) >= want and set(given) <= set(candidates):  # those after the last one given were not looked at
            tried = max(map(candidates.index, given)) + 1
        for _ in range(tried):
            self._candidates.popleft()
        if answer.quarantined:
            for shard, reason in self._around.persist(lambda: self._ledger.reasons(answer.quarantined)).items():
                self._around.note("quarantined", self._base.epoch, shard, reason)
        for shard, fence in answer.shards:
            self._read(shard, fence)
        self._dry = answer.dry
        have = self._number + -(-self._stock // self._plan.batch_size)
        if have > self._have:
            self._have = have
            self._around.have(self._ledger, have)

    def _read(self, number: int, fence: int) -> None:
        shard = self._plan.dataset.shard(number)
        left = ranges.minus(((0, len(shard)),), self._base.partial.get(number, ()))
        if not left:
            return
        self._around.check()
        try:
            columns = read_shard(shard, self._plan.columns)
        except ShardUnreadable as exc:
            reason = " ".join(f"{shard}: {exc.__cause__ or exc}".split())[:500]
            self._around.persist(lambda: self._ledger.quarantine(number, fence, where=str(shard), reason=reason))
            self._around.note("quarantined", self._base.epoch, number, reason)
            return
        self._around.leased(self._base.epoch, number, fence)
        self._columns = columns
        self._pieces.append(_Piece(number, columns, deque(left)))
        self._stock += ranges.count(left)

    def _goes_on(self) -> bool:
        """Whether another rank has samples for the batch that this rank has none for; waits until that is known."""
        pause_s, longest_s = POLL_S
        while True:
            verdict = self._around.persist(self._ledger.verdict)
            if verdict.batches > self._number:
                return True
            if verdict.final:
                return False
            self._around.stop.wait(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    # --- batches ----------------------------------------------------------------------------------------------------

    def _batch(self) -> Batch:
        taken: list[SampleRange] = []
        pieces: list[Columns] = []
        wanted = self._plan.batch_size
        while wanted and self._pieces:
            piece = self._pieces[0]
            start, stop = piece.left[0]
            end = min(stop, start + wanted)
            taken.append((piece.shard, start, end))
            pieces.append({column: values[start:end] for column, values in piece.columns.items()})
            wanted -= end - start
            if end < stop:
                piece.left[0] = (end, stop)
            else:
                piece.left.popleft()
                if not piece.left:
                    self._pieces.popleft()
        self._stock -= self._plan.batch_size - wanted
        columns = joined(pieces) if pieces else self._empty()
        ranges_given = tuple(taken)
        padded: tuple[SampleRange, ...] = ()
        if taken:
            self._last = (columns, ranges_given)
        if wanted and self._plan.tail == "pad":
            columns, padded = self._padded(columns, wanted)
        return Batch(
            dataset=self._spec.name, version=self._spec.version, run=self._ledger.run.id, epoch=self._base.epoch, number=self._number,
            columns=columns, ranges=ranges_given, padded=padded,
        )  # fmt: skip

    def _empty(self) -> Columns:
        """The right columns and dtypes, and no samples."""
        if self._columns is None:
            self._columns = _readable(self._plan.dataset, self._plan.columns)
        return {column: values[:0] for column, values in self._columns.items()}

    def _padded(self, columns: Columns, missing: int) -> tuple[Columns, tuple[SampleRange, ...]]:
        """The batch made full with samples that this rank was given before, or, if it was given none, with the first of the data set."""
        if self._last is None:
            whole = _readable(self._plan.dataset, self._plan.columns)
            size = min(missing, len(next(iter(whole.values()))))
            self._last = ({column: values[:size] for column, values in whole.items()}, ((0, 0, size),))
        held, given = self._last
        places = [(shard, at) for shard, start, stop in given for at in range(start, stop)]
        index = np.arange(missing) % len(places)
        again = {column: values[index] for column, values in held.items()}
        return joined([columns, again]), coalesced([places[n] for n in index.tolist()])


def coalesced(places: Sequence[tuple[int, int]]) -> tuple[SampleRange, ...]:
    """Samples, (shard, position), in their order, as ranges where they follow each other."""
    found: list[SampleRange] = []
    for shard, at in places:
        if found and found[-1][0] == shard and found[-1][2] == at:
            found[-1] = (shard, found[-1][1], at + 1)
        else:
            found.append((shard, at, at + 1))
    return tuple(found)


def _readable(dataset: Dataset, columns: Sequence[str] | None) -> Columns:
    """Any shard that can be read, for its columns and dtypes."""
    for number in range(dataset.spec.shards):
        try:
            return read_shard(dataset.shard(number), columns)
        except ShardUnreadable:
            continue
    raise ShardUnreadable(f"data set {dataset.spec.name!r}: no shard of it can be read")


def _turns(own: Sequence[int], shards: int, seed: int, epoch: int) -> list[int]:
    """These shards in the order in which the epoch takes them."""
    turn = np.empty(shards, dtype=np.int64)
    turn[epoch_order(seed, epoch, shards)] = np.arange(shards)
    mine = np.array(own, dtype=np.int64)
    found: list[int] = mine[np.argsort(turn[mine])].tolist()
    return found


def _members(numbers: ranges.Ranges, size: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    found = np.zeros(size, dtype=bool)
    for start, stop in numbers:
        found[start:stop] = True
    return found


# --- deterministic mode -------------------------------------------------------------------------------------------------


def deterministic_batches(plan: Plan, base: Cursor, around: Surroundings) -> Iterator[Batch]:
    """This rank's shares of the global batches from ``base`` on. The sequence of global batches is the same in every world size."""
    dataset, run = plan.dataset, around.session.run
    sizes = np.array([len(shard) for shard in dataset.shards()], dtype=np.int64)
    rows = Rows(dataset, plan.columns, keep=2 + -(-(plan.window or len(sizes)) // max(1, int(sizes.mean()))))
    epoch, number = base.epoch, base.batch
    while plan.epochs is None or epoch < plan.epochs:
        order = EpochOrder.of(sizes, seed=plan.seed, epoch=epoch, shuffle=dataset.spec.shuffle, window=plan.window)
        cursor = Cursor(
            version=base.version, digest=base.digest, seed=base.seed, global_batch_size=plan.batch_size, window=plan.window, tail=plan.tail,
            epoch=epoch, batch=number,
        )  # fmt: skip
        ledger = Ledger(around.session, dataset.spec, epoch)
        around.persist(lambda ledger=ledger, cursor=cursor: ledger.open(cursor))  # type: ignore[misc]
        for at in range(number, batches_of(order.samples, plan.batch_size, plan.tail)):
            around.check()
            yield _global_share(plan, order, rows, epoch=epoch, number=at, run=run.id, rank=run.rank, world_size=run.world_size)
        epoch, number = epoch + 1, 0


def batches_of(samples: int, global_batch_size: int, tail: Tail) -> int:
    """How many global batches an epoch has."""
    return samples // global_batch_size if tail == "drop" else -(-samples // global_batch_size)


def _global_share(plan: Plan, order: EpochOrder, rows: Rows, *, epoch: int, number: int, run: str, rank: int, world_size: int) -> Batch:
    first = number * plan.batch_size
    size = plan.batch_size if plan.tail == "pad" else min(plan.batch_size, order.samples - first)
    start, stop = (first + at for at in share(size, world_size, rank))
    real = max(start, min(stop, order.samples))
    shards, positions = order.find(start, real)
    more = np.arange(real, stop) % order.samples if stop > real else np.empty(0, dtype=np.int64)
    again = [order.find(int(at), int(at) + 1) for at in more]
    places = list(zip(shards.tolist(), positions.tolist(), strict=True))
    padding = [(int(shard[0]), int(position[0])) for shard, position in again]
    everything = np.array([*places, *padding], dtype=np.int64).reshape(-1, 2)
    return Batch(
        dataset=plan.dataset.spec.name, version=plan.dataset.spec.version, run=run, epoch=epoch, number=number,
        columns=rows.take(everything[:, 0], everything[:, 1]), ranges=coalesced(places), padded=coalesced(padding),
    )  # fmt: skip
