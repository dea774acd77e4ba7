"""What one rank tells the ledger of its batches, by reports that nobody waits for (:mod:`dtr.datasets.consuming.reports`).

Told before the trainer has the batch, so that what a dead rank gave to a collective that its peers completed is on record. The newest
batches are told one by one; those that were consumed `OLD` batches ago are told as sums by shard. What was not consumed stays by itself,
however far a trainer that reads ahead is in front of it, so that the ledger can be cut after any batch that may still be the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import DataState, Dynamic
from dtr.datasets.consuming.ledger import KEEP_MS, Ledger
from dtr.datasets.consuming.reports import Reports
from dtr.datasets.loading.batch import Batch, Order, SampleRange, ranges_text
from dtr.datasets.loading.plan import Plan
from dtr.session import Session

__all__ = ["OLD", "Handout"]

OLD: Final = 8
MOST: Final = 4096  # told one by one: a trainer that never says what it consumed must not fill Redis


class Handout:
    """One rank's telling, in one run.

    Args:
        session: in the run.
        plan: of the loader.
        base: where it goes on.
        reports: of this process.
        samples: how many were consumed in the current epoch of the run, for people.
    """

    def __init__(self, session: Session, plan: Plan, base: DataState, reports: Reports, samples: Callable[[], int]) -> None:
        self._session, self._plan, self._base, self._reports, self._samples = session, plan, base, reports, samples
        self._run = run = session.run
        who = session.identity
        self._seat = [f"{who.state_id} {run.id}", who.worker_id, run.rank, run.roster[who.worker_id].incarnation]
        self._keys: tuple[int, list[str]] = -1, []  # of the ledger of an epoch
        self._fences: dict[tuple[int, int], int] = {}  # (epoch, shard) -> fence
        self._sums: dict[int, ranges.Ranges] = {}  # of the epoch that reports are about
        self._recent: deque[tuple[int, tuple[SampleRange, ...]]] = deque()
        self._epoch = -1
        self._consumed = -1  # newest batch of that epoch
        self._step = ""

    def leased(self, epoch: int, shard: int, fence: int) -> None:
        """A shard is this rank's."""
        self._fences[epoch, shard] = fence

    def have(self, ledger: Ledger, batches: int) -> None:
        """There are samples for so many batches."""
        self._send(ledger.epoch, self._told(batches, "", "", -1, []))

    def give(self, batch: Batch | Order) -> None:
        """A batch goes to the trainer."""
        if batch.epoch != self._epoch:
            self._epoch, self._consumed, self._sums = batch.epoch, -1, {}
            self._recent.clear()
            self._fences = {key: fence for key, fence in self._fences.items() if key[0] >= batch.epoch}
        self._recent.append((batch.number, batch.ranges))
        old, sums = -1, []
        if self._recent[0][0] <= self._consumed - OLD or len(self._recent) > MOST:
            old, given = self._recent.popleft()
            sums = self._summed(batch.epoch, given)
        text = ranges_text(batch.ranges) if self._plan.mode == "dynamic" else ""
        self._send(batch.epoch, self._told(batch.number + 1 if batch.ranges else 0, str(batch.number), text, old, sums))

    def consumed(self, batch: Batch, step: int) -> None:
        """The trainer reported a batch; the ledger hears of it with the next one."""
        self._step = str(step)
        if batch.epoch == self._epoch:
            self._consumed = max(self._consumed, batch.number)

    def unreadable(self, epoch: int, shard: int, reason: str) -> None:
        """A shard that this rank holds could not be read by whoever reads for it."""
        who, run, spec, state = self._session.identity, self._run, self._plan.dataset.spec, self._session.state
        keys = [state.keys.meta, state.keys.roster, state.keys.ledger(spec.name, epoch, run.id).ledger]
        args = [
            who.state_id, run.id, who.worker_id, run.rank, run.roster[who.worker_id].incarnation, spec.name, shard,
            self._fences.get((epoch, shard), 0), str(self._plan.dataset.shard(shard)), reason,
        ]  # fmt: skip
        self._reports.send("ledger_quarantine", [*keys, state.keys.quarantine(spec.name, spec.digest), state.keys.events], args)

    def _summed(self, epoch: int, given: Sequence[SampleRange]) -> list[Any]:
        if self._plan.mode != "dynamic":
            return []
        for shard, start, stop in given:
            before = self._sums.get(shard)
            if before is None:
                before = self._base.partial.get(shard, ()) if isinstance(self._base, Dynamic) and self._base.epoch == epoch else ()
            self._sums[shard] = ranges.plus(before, start, stop)
        told: list[Any] = []
        for shard in dict.fromkeys(shard for shard, _, _ in given):
            whole = self._sums[shard] == ((0, self._plan.dataset.size_of(shard)),)
            told += [shard, self._fences.get((epoch, shard), 0), "" if whole else ranges.format_ranges(self._sums[shard])]
        return told

    def _send(self, epoch: int, told: list[Any]) -> None:
        of_epoch, held = self._keys  # the thread that reads ahead may be in the next epoch, and set another
        if of_epoch != epoch:
            keys = self._session.state.keys
            ledger = keys.ledger(self._plan.dataset.spec.name, epoch, self._run.id)
            held = [keys.roster, ledger.ledger, ledger.done]
            self._keys = epoch, held
        self._reports.send("ledger_report", held, told)

    def _told(self, have: int, batch: str, out: str, old: int, sums: list[Any]) -> list[Any]:
        return [*self._seat, have, self._step, self._samples(), batch, out, old, KEEP_MS, *sums]
