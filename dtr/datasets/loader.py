"""The loader: batches of one data set for one rank, read ahead, from where the restored lineage stands.

Guarantees, for the batches that the trainer reports with ``agent.step(batch)``: in dynamic mode each sample of an epoch is consumed exactly
once by the surviving lineage, whatever dies and however many ranks there are afterwards; in deterministic mode the sequence of global
batches is a function of (seed, epoch, global batch size) and the data set alone. Excepted is only what the data state has on record.
Every rank yields as many batches in an epoch of a run. Reading ahead is not consuming.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dtr.datasets import ranges
from dtr.datasets.batch import Batch, SampleRange, ranges_text
from dtr.datasets.consumption import Consumption
from dtr.datasets.datastate import Cursor, DataState, Dynamic, merged, parse
from dtr.datasets.feed import Plan, Stopped, Surroundings, deterministic_batches, dynamic_batches
from dtr.datasets.ledger import KEEP_MS, Ledger
from dtr.datasets.readahead import ReadAhead
from dtr.datasets.reports import Reports
from dtr.errors import DataConflict, ForkedProcess, RosterChanged
from dtr.failpoints import failpoint
from dtr.session import Session

if TYPE_CHECKING:
    from threading import Lock

__all__ = ["Loader"]

log = logging.getLogger(__name__)

OLD: Final = 8  # batches of which the ledger keeps each one's ranges; what is older is in sums by shard


class Loader:
    """Iterates over this rank's batches; made by ``agent.loader``.

    It belongs to the run in which it was made: when that ends, it raises RosterChanged, and a new loader in the next run goes on from
    what was restored. A loop that was left may be entered again, and goes on. Not for several threads, nor for a forked child.

    Args:
        session: in a run.
        plan: what to load, and how.
        base: where it goes on: what was consumed before this run.
        reports: of this process.
        prefetch: batches that wait, read, at most; beside them in memory are the shards that they come from, and one more.
        mutex: guards ``consumption``, which saves look at.
    """

    def __init__(self, session: Session, plan: Plan, base: DataState, *, reports: Reports, prefetch: int, mutex: Lock) -> None:
        self.plan, self.base, self.prefetch = plan, base, prefetch
        self._session, self._run, self._mutex, self._pid = session, session.run, mutex, os.getpid()
        self.consumption = Consumption(base, lambda shard: len(plan.dataset.shard(shard)))
        self._reports = reports
        self._around = Surroundings(session=session, note=self._note, have=self._have, leased=self._leased)
        self._ahead = self._reading()
        self._fences: dict[tuple[int, int], int] = {}  # (epoch, shard) -> fence
        self._sums: dict[int, ranges.Ranges] = {}  # of the epoch that reports are about
        self._recent: deque[tuple[int, tuple[SampleRange, ...]]] = deque()
        self._told_epoch = -1
        self._step = ""
        self._started = False

    def __repr__(self) -> str:
        return f"Loader({self.plan.dataset.spec.name!r}, run={self._run.id!r}, mode={self.plan.mode!r})"

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; waits for the reading thread, and at the end of an epoch for the verdict.

        Raises:
            RosterChanged, StaleIncarnation, StateLost: the run ended.
            DatasetMismatch: a file of the data set is gone, or changed since it was registered.
            CoordinatorUnavailable: Redis was away for longer than ``barrier_timeout_s``.
        """
        self._check()
        self._started = True
        try:
            batch = self._ahead.take(self._check)
        except Stopped:
            self._check()
            raise StopIteration from None
        with self._mutex:
            self.consumption.hand_out(batch)
        failpoint("load.before_report")
        self._report(batch)
        failpoint("load.after_report")
        return batch

    # --- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was consumed before this run and by this rank in it, for whoever keeps it: JSON.

        A checkpoint of dtr holds the state of all ranks merged, and restoring sets it, so nobody needs this there. Elsewhere keep the
        dict of every rank.
        """
        with self._mutex:
            own = self.consumption.state()
        return merged(self.plan.dataset.spec.name, [self.base, own]).to_json()

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from a state before the first batch: from the dict of this rank alone, or better from those of all ranks, as a list.

        Every rank must give the same list; a rank that gives another is refused when it begins.

        Raises:
            DataConflict: batches were taken already, or the states are of another data set or sequence.
            StateCorrupt: it is no state.
        """
        if self._started:
            raise DataConflict("load_state_dict() must come before the first batch of this run", name=self.plan.dataset.spec.name)
        states = [state] if isinstance(state, Mapping) else list(state)
        name = self.plan.dataset.spec.name
        base = merged(name, [parse(name, one) for one in states])
        self.base = going_on(self.plan, base)
        self.consumption = Consumption(self.base, lambda shard: len(self.plan.dataset.shard(shard)))
        self._ahead = self._reading()

    def _reading(self) -> ReadAhead[Batch]:
        around = self._around
        batches = (
            deterministic_batches(self.plan, self.base, around)
            if isinstance(self.base, Cursor)
            else dynamic_batches(self.plan, self.base, around)
        )
        return ReadAhead(self._connected(batches), ahead=self.prefetch, name=f"dtr-load-{self.plan.dataset.spec.name}", stop=around.stop)

    def _connected(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The reading thread also sees to the connection of the reports, which the trainer must not wait for."""
        self._reports.connect()
        for batch in batches:
            self._reports.connect()
            yield batch

    # --- what is told -----------------------------------------------------------------------------------------------

    def consume(self, batch: Batch, step: int) -> None:
        """The trainer consumed a batch of this loader; called by ``agent.step``."""
        with self._mutex:
            self.consumption.consume(batch)
        self._step = str(step)

    def _note(self, kind: str, epoch: int, shard: int, text: str) -> None:
        with self._mutex:
            self.consumption.note(kind, epoch, shard, text)

    def _leased(self, epoch: int, shard: int, fence: int) -> None:
        self._fences[epoch, shard] = fence

    def _have(self, ledger: Ledger, batches: int) -> None:
        self._reports.send("ledger_report", self._report_keys(ledger.epoch), self._told(batches, "", "", -1, []))

    def _report(self, batch: Batch) -> None:
        """Tell the ledger what goes out, before the trainer has it."""
        if batch.epoch != self._told_epoch:
            self._told_epoch, self._sums = batch.epoch, {}
            self._recent.clear()
            self._fences = {key: fence for key, fence in self._fences.items() if key[0] >= batch.epoch}
        self._recent.append((batch.number, batch.ranges))
        old, sums = -1, []
        if len(self._recent) > OLD:
            old, given = self._recent.popleft()
            sums = self._summed(batch.epoch, given)
        text = ranges_text(batch.ranges) if self.plan.mode == "dynamic" else ""
        told = self._told(batch.number + 1 if batch.ranges else 0, str(batch.number), text, old, sums)
        self._reports.send("ledger_report", self._report_keys(batch.epoch), told)

    def _summed(self, epoch: int, given: Sequence[SampleRange]) -> list[Any]:
        if self.plan.mode != "dynamic":
            return []
        for shard, start, stop in given:
            before = self._sums.get(shard)
            if before is None:
                before = self.base.partial.get(shard, ()) if isinstance(self.base, Dynamic) and self.base.epoch == epoch else ()
            self._sums[shard] = ranges.union(before, ((start, stop),))
        told: list[Any] = []
        for shard in dict.fromkeys(shard for shard, _, _ in given):
            whole = self._sums[shard] == ((0, len(self.plan.dataset.shard(shard))),)
            told += [shard, self._fences.get((epoch, shard), 0), "" if whole else ranges.format_ranges(self._sums[shard])]
        return told

    def _report_keys(self, epoch: int) -> list[str]:
        keys = self._session.state.keys
        return [keys.roster, *_two(keys.ledger(self.plan.dataset.spec.name, epoch, self._run.id))]

    def _told(self, have: int, batch: str, out: str, old: int, sums: list[Any]) -> list[Any]:
        who, run = self._session.identity, self._run
        with self._mutex:
            samples = self.consumption.samples
        return [
            f"{who.state_id} {run.id}", who.worker_id, run.rank, run.roster[who.worker_id].incarnation, have, self._step, samples, batch,
            out, old, KEEP_MS, *sums,
        ]  # fmt: skip

    # --- life -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop reading ahead. What was read and not taken is nobody's until the run ends."""
        if self._pid == os.getpid():
            self._ahead.close()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(f"this loader belongs to process {self._pid}: read in the process that trains")
        self._session.check()
        if self._session.run.id != self._run.id:
            raise RosterChanged(
                f"run {self._run.id} ended, and this loader with it: make a new one", run=self._run.id, worker=None, rank=None
            )


def going_on(plan: Plan, base: DataState) -> DataState:
    """``base`` as the place where ``plan`` goes on; an epoch that is wholly consumed is over.

    Raises DataConflict if the state is of another data set, mode or sequence than the plan, naming what differs.
    """
    spec = plan.dataset.spec
    wanted: dict[str, Any] = {"mode": plan.mode, "digest": spec.digest}
    if plan.mode == "deterministic":
        wanted |= {"seed": plan.seed, "global_batch_size": plan.batch_size, "window": plan.window, "tail": plan.tail}
    for what, value in wanted.items():
        if getattr(base, what, None) != value:
            raise DataConflict(
                f"data set {spec.name!r}: the restored data state has {what} {getattr(base, what, None)}, the loader {value}: within an "
                "epoch neither data set nor mode nor sequence may change",
                name=spec.name,
            )
    if isinstance(base, Cursor):
        return base
    whole = ranges.normal(
        (shard, shard + 1) for shard, held in base.partial.items() if ranges.count(held) == len(plan.dataset.shard(shard))
    )
    done = ranges.union(base.done, whole)
    gone = base.notes.get("quarantined", {}).get(base.epoch, {})
    left = ranges.minus(((0, spec.shards),), ranges.union(done, ranges.normal((shard, shard + 1) for shard in gone)))
    if not left:
        return Dynamic(version=spec.version, digest=spec.digest, seed=plan.seed, epoch=base.epoch + 1, notes=base.notes)
    partial = {shard: held for shard, held in base.partial.items() if not ranges.contains(done, shard)}
    return Dynamic(version=spec.version, digest=spec.digest, seed=plan.seed, epoch=base.epoch, done=done, partial=partial, notes=base.notes)


def _two(keys: Any) -> list[str]:
    return [keys.ledger, keys.done]
