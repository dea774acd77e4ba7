"""What a loader will read: the orders for the batches of one rank, in dynamic or in deterministic mode, as generators a thread drives.

Dynamic mode, one epoch of a run::

    ledger open       every rank, the same base
    while samples for a batch are missing: lease -> say how many batches there are samples for
    nothing free      this rank is dry: it has so many batches, and no more
    batch j           full; or what is left; or empty, while another rank has samples for batch j
    end               every rank is dry, and none has samples for batch j

How many batches an epoch of a run has is thus the number of the rank that has most, which only grows, and is final once all are dry; so
every rank yields as many, and a rank that cannot know yet waits. Nobody needs the trainers' collective for that.

``tail="pad"`` is the same with full batches. ``tail="drop"`` has as many batches as the rank that has fewest full ones: a rank yields batch
j once every rank has a full one, and ends when a dry one has none. What it then holds is dropped, on record by sample: a batch of each
rank on average, and up to a shard, so shards that are small beside a rank's share of the epoch lose little.

A shard is leased whole. The last ones of an epoch may thus keep one rank busy while others are dry, for as long as a shard lasts. Leasing
ranges of one shard to several ranks would need another ledger, not only another bitmap: its sums, its fences and its quarantine are by
shard, a sum that is complete frees the lease and sets the bit, and an opened shard could be shared only if its holder gave up a part,
which means asking it and waiting for it. Data states would bear it, since they hold ranges. So far the way is a smaller ``shard_size``:
with 8 shards or more for each rank, the last ones are less than an eighth of an epoch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import Cursor, Dynamic
from dtr.datasets.consuming.ledger import Ledger
from dtr.datasets.loading.batch import Order, SampleRange, coalesced
from dtr.datasets.loading.order import EpochOrder, share
from dtr.datasets.loading.plan import Plan, Tail
from dtr.datasets.loading.shuffle import epoch_order
from dtr.datasets.registering.assignment import Assignment
from dtr.datasets.timemachine.skipping import Skipping, Split
from dtr.datasets.timemachine.skips import Skips
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable
from dtr.failpoints import failpoint
from dtr.session import Session

__all__ = ["Stopped", "Surroundings", "batches_of", "deterministic_orders", "dynamic_orders", "global_share", "left_from"]

POLL_S: Final = (0.005, 0.05)
RETRY_S: Final = 0.2
CANDIDATES: Final = 64

T = TypeVar("T")
Orders = Generator[Order]


class Stopped(Exception):
    """The loader was closed: what it read ahead is nobody's."""


@dataclass(slots=True, kw_only=True)
class Surroundings:
    """What a feed needs beside its plan: whom to tell, and when to stop.

    Args:
        session: in the run.
        skipping: samples that people took out.
        note: puts on record what an epoch leaves out: kind, epoch, shard, reason or ranges.
        have: is told each time the number of batches grows.
        leased: is told of each lease: epoch, shard, fence.
        probe: reads a shard that was leased; '' or why it cannot be read.
        unread: (epoch, shard) that turned out to be unreadable after orders for them went out.
    """

    session: Session
    skipping: Skipping
    note: Callable[[str, int, int, str], None]
    have: Callable[[Ledger, int], None]
    leased: Callable[[int, int, int], None]
    probe: Callable[[int], str]
    unread: set[tuple[int, int]] = field(default_factory=set)
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


def dynamic_orders(plan: Plan, base: Dynamic, around: Surroundings, lanes: int) -> Orders:
    """The orders of this rank from ``base`` on, epoch by epoch. Each lane has shards of its own, and order n is of lane n modulo lanes."""
    session, spec = around.session, plan.dataset.spec
    own = around.persist(lambda: Assignment().in_run(session, spec, session.worker_id))
    epoch = base.epoch
    while plan.epochs is None or epoch < plan.epochs:
        start = base if epoch == base.epoch else Dynamic(version=spec.version, digest=spec.digest, seed=plan.seed, epoch=epoch)
        yield from _Epoch(plan, start, around, own, lanes).orders()
        epoch += 1


@dataclass(slots=True)
class _Piece:
    """What is left of a shard that was leased."""

    shard: int
    left: deque[tuple[int, int]]

    @property
    def samples(self) -> int:
        return sum(stop - start for start, stop in self.left)


class _Epoch:
    """One epoch of one rank in dynamic mode."""

    def __init__(self, plan: Plan, base: Dynamic, around: Surroundings, own: Sequence[int], lanes: int) -> None:
        self._plan, self._base, self._around, self._spec = plan, base, around, plan.dataset.spec
        self._ledger = Ledger(around.session, self._spec, base.epoch)
        order = _turns(own, self._spec.shards, plan.seed, base.epoch) if self._spec.shuffle else list(own)
        done = _members(base.done, self._spec.shards)
        self._candidates = deque(shard for shard in order if not done[shard])
        self._lanes: list[deque[_Piece]] = [deque() for _ in range(lanes)]
        self._number = 0  # of the next batch
        self._have = 0
        self._dry = False
        self._last: tuple[SampleRange, ...] = ()
        self._skips: Skips = {}  # that the stock is without

    def orders(self) -> Orders:
        self._around.persist(lambda: self._ledger.open(self._base))
        failpoint("load.after_open")
        while True:
            lane = self._lanes[self._number % len(self._lanes)]
            self._forget_unread()
            self._forget_skipped()
            while _stock(lane) < self._plan.batch_size and not self._dry:
                self._lease(lane)
            if not self._goes_on():
                break
            yield self._order(lane)
            self._number += 1
        self._drop()

    @property
    def _stock(self) -> int:
        """Samples in hand."""
        return sum(map(_stock, self._lanes))

    # --- the ledger -------------------------------------------------------------------------------------------------

    def _lease(self, lane: deque[_Piece]) -> None:
        candidates = [self._candidates[n] for n in range(min(CANDIDATES, len(self._candidates)))]
        want = max(1, -(-(self._plan.batch_size - _stock(lane)) // self._spec.shard_size))
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
        self._around.skipping.look()
        for shard, fence in answer.shards:
            self._take(lane, shard, fence)
        self._dry = answer.dry
        full = self._stock // self._plan.batch_size
        have = self._number + (full if self._plan.tail == "drop" else -(-self._stock // self._plan.batch_size))
        if have > self._have:
            self._have = have
            self._around.have(self._ledger, have)

    def _take(self, lane: deque[_Piece], number: int, fence: int) -> None:
        shard, epoch = self._plan.dataset.shard(number), self._base.epoch
        unconsumed = ranges.minus(((0, len(shard)),), self._base.partial.get(number, ()))
        left = ranges.minus(unconsumed, self._around.skipping.of(number))
        if left != unconsumed:
            self._around.note("skipped", epoch, number, ranges.format_ranges(ranges.minus(unconsumed, left)))
        if not left:
            return
        self._around.check()
        reason = self._around.probe(number)
        if reason:
            self._around.persist(lambda: self._ledger.quarantine(number, fence, where=str(shard), reason=reason))
            self._around.note("quarantined", epoch, number, reason)
            return
        self._around.leased(epoch, number, fence)
        lane.append(_Piece(number, deque(left)))

    def _forget_unread(self) -> None:
        """A shard that could not be read when its first order was: there will be no more orders for it."""
        gone = {shard for epoch, shard in tuple(self._around.unread) if epoch == self._base.epoch} if self._around.unread else set()
        if gone:
            for lane in self._lanes:
                kept = [piece for piece in lane if piece.shard not in gone]
                lane.clear()
                lane.extend(kept)

    def _forget_skipped(self) -> None:
        """What was skipped since its shard was leased is ordered no more. Batches that were promised are given, smaller or padded."""
        skipping = self._around.skipping
        skipping.look()
        if skipping.known is self._skips:
            return
        self._skips = skipping.known
        for lane in self._lanes:
            for piece in lane:
                held = tuple(piece.left)
                left = ranges.minus(held, skipping.of(piece.shard))
                if left != held:
                    skipped = ranges.format_ranges(ranges.minus(held, left))
                    self._around.note("skipped", self._base.epoch, piece.shard, skipped)
                    piece.left = deque(left)
            kept = [piece for piece in lane if piece.left]
            lane.clear()
            lane.extend(kept)
        self._last = tuple(
            (shard, *held) for shard, start, stop in self._last for held in ranges.minus(((start, stop),), skipping.of(shard))
        )  # nor is it repeated as padding

    def _goes_on(self) -> bool:
        """Whether the epoch has this batch; waits until that is known."""
        if self._plan.tail == "drop":  # what was promised is given, even if a shard of it turned out to be unreadable
            return self._have > self._number and self._known(self._all_have_it)
        return self._stock > 0 or self._known(self._some_has_it)

    def _known(self, answer: Callable[[], bool | None]) -> bool:
        pause_s, longest_s = POLL_S
        while (found := self._around.persist(answer)) is None:
            self._around.stop.wait(pause_s)
            pause_s = min(2 * pause_s, longest_s)
        return found

    def _some_has_it(self) -> bool | None:
        verdict = self._ledger.verdict()
        return True if verdict.batches > self._number else False if verdict.final else None

    def _all_have_it(self) -> bool | None:
        """With ``tail="drop"``. A rank that is dry never has more; one that is not may yet."""
        seats = self._ledger.seats()
        if any(dry and have <= self._number for have, dry in seats):
            return False
        return True if all(have > self._number for have, _ in seats) else None

    # --- orders -----------------------------------------------------------------------------------------------------

    def _order(self, lane: deque[_Piece]) -> Order:
        size = self._plan.batch_size
        taken = _taken(lane, size)
        for other in self._lanes if self._dry else ():
            taken += _taken(other, size - _count(taken))
        given, missing = tuple(taken), size - _count(taken)
        self._last = given or self._last
        padded = _again(self._last or self._first(), missing) if self._plan.tail != "empty" and missing else ()
        return Order(
            dataset=self._spec.name, version=self._spec.version, run=self._ledger.run.id, epoch=self._base.epoch, number=self._number,
            ranges=given, padded=padded, fill=0 if self._plan.tail == "empty" else size,
        )  # fmt: skip

    def _first(self) -> tuple[SampleRange, ...]:
        """What a rank repeats that was given nothing."""
        return ((0, 0, min(self._plan.batch_size, self._plan.dataset.size_of(0))),)

    def _drop(self) -> None:
        """The epoch is over: what this rank holds and no batch will have is on record."""
        for lane in self._lanes:
            for piece in lane:
                self._around.note("dropped", self._base.epoch, piece.shard, ranges.format_ranges(tuple(piece.left)))
            lane.clear()


def _stock(lane: deque[_Piece]) -> int:
    return sum(piece.samples for piece in lane)


def _count(taken: Sequence[SampleRange]) -> int:
    return sum(stop - start for _, start, stop in taken)


def _taken(lane: deque[_Piece], wanted: int) -> list[SampleRange]:
    """So many samples off the front, or what there is."""
    taken: list[SampleRange] = []
    while wanted and lane:
        piece = lane[0]
        start, stop = piece.left[0]
        end = min(stop, start + wanted)
        taken.append((piece.shard, start, end))
        wanted -= end - start
        if end < stop:
            piece.left[0] = (end, stop)
        else:
            piece.left.popleft()
            if not piece.left:
                lane.popleft()
    return taken


def _again(given: Sequence[SampleRange], missing: int) -> tuple[SampleRange, ...]:
    """So many samples, by repeating those given."""
    places = [(shard, at) for shard, start, stop in given for at in range(start, stop)]
    return coalesced([places[n % len(places)] for n in range(missing)])


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


def deterministic_orders(plan: Plan, base: Cursor, around: Surroundings) -> Orders:
    """This rank's shares of the global batches from ``base`` on. The sequence of global batches is the same in every world size."""
    dataset, run = plan.dataset, around.session.run
    sizes = dataset.sizes()
    epoch, number = base.epoch, base.batch
    while plan.epochs is None or epoch < plan.epochs:
        order = EpochOrder.of(sizes, seed=plan.seed, epoch=epoch, shuffle=dataset.spec.shuffle, window=plan.window)
        cursor = Cursor(
            version=base.version, digest=base.digest, seed=base.seed, global_batch_size=plan.batch_size, window=plan.window, tail=plan.tail,
            epoch=epoch, batch=number,
        )  # fmt: skip
        ledger = Ledger(around.session, dataset.spec, epoch)
        around.persist(lambda ledger=ledger, cursor=cursor: ledger.open(cursor))  # type: ignore[misc]
        batches = batches_of(order.samples, plan.batch_size, plan.tail)
        for at in range(number, batches):
            around.check()
            around.skipping.look()
            yield global_share(
                plan, order, around.skipping.split, epoch=epoch, number=at, run=run.id, rank=run.rank, world_size=run.world_size
            )
        for shard, held in left_from(order, batches * plan.batch_size).items():
            around.note("dropped", epoch, shard, ranges.format_ranges(held))
        epoch, number = epoch + 1, 0


def batches_of(samples: int, global_batch_size: int, tail: Tail) -> int:
    """How many global batches an epoch has."""
    return samples // global_batch_size if tail == "drop" else -(-samples // global_batch_size)


def left_from(order: EpochOrder, start: int) -> dict[int, ranges.Ranges]:
    """Shard -> positions of the samples from this place of the epoch on."""
    found: dict[int, list[tuple[int, int]]] = {}
    if start < order.samples:
        shards, positions = order.find(start, order.samples)
        for shard, at in zip(shards.tolist(), positions.tolist(), strict=True):
            found.setdefault(shard, []).append((at, at + 1))
    return {shard: ranges.normal(held) for shard, held in found.items()}


def global_share(plan: Plan, order: EpochOrder, split: Split, *, epoch: int, number: int, run: str, rank: int, world_size: int) -> Order:
    """One rank's share of one global batch; what is skipped leaves its place empty."""
    first = number * plan.batch_size
    size = plan.batch_size if plan.tail == "pad" else min(plan.batch_size, order.samples - first)
    start, stop = (first + at for at in share(size, world_size, rank))
    real = max(start, min(stop, order.samples))
    shards, positions = order.find(start, real)
    more = np.arange(real, stop) % order.samples if stop > real else np.empty(0, dtype=np.int64)
    again = [order.find(int(at), int(at) + 1) for at in more]
    places, skipped = split(list(zip(shards.tolist(), positions.tolist(), strict=True)))
    padding, _ = split([(int(shard[0]), int(position[0])) for shard, position in again])
    return Order(
        dataset=plan.dataset.spec.name, version=plan.dataset.spec.version, run=run, epoch=epoch, number=number,
        ranges=coalesced(places), padded=coalesced(padding), skipped=coalesced(skipped),
    )  # fmt: skip
