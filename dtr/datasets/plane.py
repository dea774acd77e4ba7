"""The data plane of one process: its loaders in the current run, where the run began, and what a save captures of it.

    restore      sets where the run begins: the merged data state of the checkpoint
    loader       goes on from there
    step(batch)  consumed, as of this step; on record for the time machine (:mod:`dtr.datasets.timemachine.journal`)
    save         captures this rank's own consumption; rank 0 adds where the run began; the uploader merges all ranks'

A consistent cut needs no coordination beyond that of the save itself: each rank's share is what it consumed through the step that it saves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import orjson

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import Cursor, DataState, merged, parse, parse_all, shared
from dtr.datasets.consuming.reports import Reports
from dtr.datasets.loading.batch import Batch
from dtr.datasets.loading.beginning import Place, place
from dtr.datasets.loading.evaluation import Evaluation
from dtr.datasets.loading.loader import Loader
from dtr.datasets.loading.plan import Plan, Reading, planned, reading
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.timemachine.journal import Account, Journal, Row, parse_account
from dtr.errors import DataConflict, DtrError, InvalidInput, LedgerUnset, StateCorrupt
from dtr.session import Session

__all__ = ["DataPlane", "accounts_of", "captured", "committed", "merge_shares", "plane_of", "tell"]

log = logging.getLogger(__name__)

STEPS_IN_REDIS: Final = 1000  # of each rank, and fewer where there are very many ranks:
ENTRIES_IN_REDIS: Final = 100_000
JOURNAL_KEEP_MS: Final = 86_400_000
END_S: Final = 5.0  # for one shard to be read to its end

_mutex = threading.Lock()


def plane_of(session: Session) -> DataPlane:
    """The data plane of the process that this session is of."""
    with _mutex:
        found = session.attached.get("data")
        if not isinstance(found, DataPlane):
            found = session.attached["data"] = DataPlane(session)
        return found


def captured(session: Session, step: int) -> str:
    """This rank's share of the data state as of now, for a save of ``step``; '' for a process that loads nothing."""
    found = session.attached.get("data")
    return found.captured(step) if isinstance(found, DataPlane) else ""


def committed(session: Session, run: str, step: int) -> None:
    """The checkpoint of (run, step) is in the store, and what its steps consumed beside it: this process may forget that."""
    found = session.attached.get("data")
    if isinstance(found, DataPlane):
        found.committed(run, step)


def tell(session: Session, script: str, keys: Sequence[str], args: Sequence[Any]) -> None:
    """Send a report that nobody waits for, if this process has a connection for such."""
    found = session.attached.get("data")
    if isinstance(found, DataPlane):
        found.reports.send(script, keys, args)


class DataPlane:
    """One process's data plane; it follows its session from run to run.

    Args:
        session: of this process.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._mutex = threading.Lock()
        self._run = ""
        self._base: dict[str, DataState] | None = None
        self._loaders: dict[str, Loader] = {}
        self._places: dict[str, Callable[[], Place]] = {}  # of each loader: where it begins, as the base of the run says
        self._written: dict[str, tuple[DataState, orjson.Fragment]] = {}
        self._journal = Journal()
        self._share: tuple[int, str] | None = None  # the step that was captured last, until something is consumed
        self._warned = False
        self.reports = Reports(session.settings.redis_url, f"dtr-report-{session.worker_id}")

    # --- where a run begins -----------------------------------------------------------------------------------------

    def restored(self, data: Mapping[str, Any]) -> None:
        """The current run goes on from the data state of a checkpoint's manifest; {}: from the beginning.

        Loaders that were made before begin there as well.

        Raises:
            StateCorrupt: it is no data state.
            DataConflict: a loader has handed out batches, or cannot go on from there; the latter is closed.
        """
        base = parse_all(data)
        self._follow()
        self.check_unbegun()
        self._base = base
        try:
            places = {name: self._places[name]() for name in self._loaders if name in base}
        except DtrError:
            self._close_loaders()
            raise
        for name, where in places.items():
            self._loaders[name].begin(*where)

    def check_unbegun(self) -> None:
        """Raise DataConflict if the current run has handed out batches here: what was leased in a run cannot be taken back in it."""
        begun = [name for name, loader in self._loaders.items() if loader.begun] if self._session.run.id == self._run else []
        if begun:
            raise DataConflict(
                f"restore() must come before the first batch of a run, and run {self._run} has handed out batches of data set "
                f"{begun[0]!r}: to go back, call form(), then restore(), then loader()",
                name=begun[0],
            )

    def _follow(self) -> None:
        """Leave behind what belongs to an earlier run."""
        run = self._session.run.id
        if run != self._run:
            self.end_run()
            self._run = run

    def end_run(self) -> None:
        """Close the loaders: the run is over for this process."""
        self._close_loaders()
        self._base, self._run, self._written, self._share = None, "", {}, None
        with self._mutex:
            self._journal = Journal()

    def _close_loaders(self) -> None:
        loaders, self._loaders, self._places = list(self._loaders.values()), {}, {}
        for loader in loaders:
            loader.close()

    def close(self) -> None:
        """Let go of threads and connections; waits a little for threads, which must not read while the interpreter ends."""
        loaders = list(self._loaders.values())
        self.end_run()
        for loader in loaders:
            loader.join(END_S)
        self.reports.close()

    def _place(self, registry: DatasetRegistry, name: str, planned_for: Callable[[Dataset], Plan], on_new_version: str) -> Place:
        return place(self._session, registry, name, self._base_of(name), planned_for, on_new_version)

    def _base_of(self, name: str) -> DataState | None:
        """What the lineage consumed of it, None for nothing; raises LedgerUnset if that is not known."""
        if self._base is None and self._session.run.previous and self._session.settings.store:
            raise LedgerUnset(
                f"run {self._run} follows run {self._session.run.previous}, and it is not known what that consumed: call restore() "
                "before loader()",
                run=self._run,
            )
        if self._base is None and self._session.run.previous:
            log.warning("run %s follows another, and nothing was restored: data set %s begins anew", self._run, name)
        return (self._base or {}).get(name)

    # --- loading ----------------------------------------------------------------------------------------------------

    def loader(
        self, registry: DatasetRegistry, name: str, *, batch_size: Any, global_batch_size: Any, epochs: Any, columns: Any, seed: Any,
        mode: Any, tail: Any, window: Any, prefetch: Any, prefetch_bytes: Any = None, processes: Any = 0, start: Any = "spawn",
        as_torch: Any = False, on_new_version: Any = "next_epoch",
    ) -> Loader:  # fmt: skip
        """A loader in the current run; the one that is there already if the same is asked for again. See ``Agent.loader``."""
        self._session.check()
        self._follow()
        if on_new_version not in ("next_epoch", "abandon_epoch"):
            raise InvalidInput(f"on_new_version must be 'next_epoch' or 'abandon_epoch', got {on_new_version!r}", field="on_new_version")
        planned_for = partial(
            planned, batch_size=batch_size, global_batch_size=global_batch_size, epochs=epochs, columns=columns, seed=seed, mode=mode,
            tail=tail, window=window,
        )  # fmt: skip
        how = reading(prefetch=prefetch, prefetch_bytes=prefetch_bytes, processes=processes, start=start, as_torch=as_torch)
        there = self._loaders.get(name)
        if there is not None:
            return _same(there, planned_for(there.plan.dataset), how)
        where = partial(self._place, registry, name, planned_for, on_new_version)
        plan, base, later = where()
        loader = Loader(self._session, plan, base, reports=self.reports, reading=how, mutex=self._mutex, later=later)
        self._loaders[name], self._places[name] = loader, where
        return loader

    def evaluation(
        self, registry: DatasetRegistry, name: str, *, batch_size: Any, global_batch_size: Any, epochs: Any, columns: Any, tail: Any,
        prefetch: Any, prefetch_bytes: Any, processes: Any, start: Any, as_torch: Any,
    ) -> Evaluation:  # fmt: skip
        """Passes beside the training; see ``Agent.evaluation``."""
        self._session.check()
        mode = "dynamic" if global_batch_size is None else "deterministic"
        plan = planned(
            registry.get(name), batch_size=batch_size, global_batch_size=global_batch_size, epochs=epochs, columns=columns, seed=None,
            mode=mode, tail=tail, window=None if mode == "dynamic" else 1,
        )  # fmt: skip
        how = reading(prefetch=prefetch, prefetch_bytes=prefetch_bytes, processes=processes, start=start, as_torch=as_torch)
        return Evaluation(self._session, plan, how)

    def consumed(self, batches: Any, step: int) -> None:
        """The trainer consumed these: a batch, several, or None.

        Raises InvalidInput for what no loader of this run gave, what was reported before, or, in deterministic mode, what is not the next
        batch; then none of them counts.
        """
        if batches is None:
            return
        some = [batches] if isinstance(batches, Batch) else list(batches) if isinstance(batches, list | tuple) else None
        if some is None or not all(isinstance(batch, Batch) for batch in some):
            if not self._loaders:
                return  # another loader's, which dtr keeps no account of
            raise InvalidInput(
                f"batch must be what the loader gave, or a list of such, got {type(batches).__name__}: pass the batch itself to step(), "
                "whatever was made of it for the model",
                field="batch",
            )
        given, by_name = cast("Sequence[Batch]", some), dict[str, list[Batch]]()
        for batch in given:
            if not batch.tracked:
                raise InvalidInput(
                    f"batch: it is of an evaluation of data set {batch.dataset!r}, no part of the training: leave it out of step()",
                    field="batch",
                )
            loader = self._loaders.get(batch.dataset)
            if loader is None or batch.run != self._run:
                raise InvalidInput(
                    f"batch: batch {batch.number} of data set {batch.dataset!r} was read in run {batch.run}, this is run "
                    f"{self._session.run.id}: what an ended run read ahead is read again",
                    field="batch",
                )
            by_name.setdefault(batch.dataset, []).append(batch)
        for name, of in by_name.items():
            self._loaders[name].check(of)
        self._share = None
        for batch in given:
            self._loaders[batch.dataset].consume(batch, step)
        self._note(given, step)

    def _note(self, batches: Sequence[Batch], step: int) -> None:
        """Put on record which batches a step consumed: here until they are in the store, and in Redis for who asks before."""
        run, found = self._session.run, dict[str, dict[str, Any]]()
        for batch in batches:
            loader, name = self._loaders[batch.dataset], batch.dataset
            origin = loader.origin
            row = Row.of(step, batch, by_order=loader.plan.mode == "deterministic")
            with self._mutex:
                told = self._journal.add(name, origin, row, run.world_size)
            if name not in found:
                found[name] = {**origin.to_json(), "rows": []}
            found[name]["rows"].append(told)
        if not found:
            return
        accounts = [text for name, account in found.items() for text in (name, orjson.dumps(account).decode())]
        who, keys = self._session.identity, self._session.state.keys
        keep = max(16, min(STEPS_IN_REDIS, ENTRIES_IN_REDIS // run.world_size))
        seat = [f"{who.state_id} {run.id}", who.worker_id, run.rank, run.roster[who.worker_id].incarnation]
        args = [*seat, step, keep, JOURNAL_KEEP_MS, *accounts]
        self.reports.send("journal_note", [keys.roster, keys.journal(run.id, run.rank)], args, at_once=False)

    def committed(self, run: str, step: int) -> None:
        """See :func:`committed`."""
        if run == self._run:
            with self._mutex:
                self._journal.forget(step)

    # --- saving -----------------------------------------------------------------------------------------------------

    def captured(self, step: int) -> str:
        """This rank's share of the data state as of now, JSON; '' if there is nothing to say. Costs no round trip.

        A step that is saved twice has the same share twice, though a commit between let go of rows: it is part of what was saved.
        """
        if self._session.run.id != self._run:
            return ""
        if self._share is None or self._share[0] != step:
            self._share = step, self._captured()
        return self._share[1]

    def _captured(self) -> str:
        run = self._session.run
        with self._mutex:
            own = {name: loader.consumption.state() for name, loader in self._loaders.items()}
            unfinished = {name: left for name, loader in self._loaders.items() if (left := loader.consumption.unreported())}
            steps = {name: account for name in own if (account := self._journal.to_json(name)) is not None}
            size = max((loader.most_in_flight for loader in self._loaders.values()), default=0)
        if (left := sum(unfinished.values())) > 2 * size and not self._warned:
            self._warned = True
            log.warning("%d samples were handed out and not reported: pass each batch to step(), or they will be read again", left)
        share: dict[str, dict[str, Any]] = {name: {"own": state.to_json()} for name, state in own.items()}
        for name, samples in unfinished.items():
            share[name]["open"] = samples
        for name, account in steps.items():
            share[name]["steps"] = account
        if run.rank == 0:
            for name, state in {**(self._base or {}), **{name: loader.base for name, loader in self._loaders.items()}}.items():
                share.setdefault(name, {})["before"] = self._before(name, state)
        return orjson.dumps(share, option=orjson.OPT_SORT_KEYS).decode() if share else ""

    def _before(self, name: str, state: DataState) -> orjson.Fragment:
        """Where the run began, written once: it may be long, and a save must not wait for it each time."""
        known = self._written.get(name)
        if known is None or known[0] is not state:
            known = self._written[name] = (state, orjson.Fragment(orjson.dumps(state.to_json(), option=orjson.OPT_SORT_KEYS)))
        return known[1]


def _same(there: Loader, plan: Plan, how: Reading) -> Loader:
    """The loader that the run has, if it is what was asked for; raises InvalidInput that says why it is not."""
    name, pairs = plan.dataset.spec.name, ((there.plan, plan), (there.reading, how))
    differs = [key for held, asked in pairs for key in held.__slots__ if getattr(held, key) != getattr(asked, key)]
    if differs:
        raise InvalidInput(
            f"name: run {there.run} has a loader of data set {name!r} with another {', '.join(differs)}; a run loads a data set in one way",
            field="name",
        )
    if there.exhausted:
        raise InvalidInput(
            f"name: the loader of data set {name!r} is at its end: epochs={plan.epochs} counts the epochs of the whole lineage. For a pass "
            f"that is made again and again, such as validation, take agent.evaluation({name!r}, ...)",
            field="name",
        )
    return there


def merge_shares(shares: Mapping[int, str]) -> dict[str, Any]:
    """The data state of a checkpoint from each rank's share, for its manifest.

    Raises:
        DataConflict: two ranks consumed the same samples, or load in different ways.
        StateCorrupt: a share is no data state.
    """
    found: dict[str, DataState] = {}
    still_open: list[tuple[str, int, int, int]] = []
    for rank in sorted(shares):
        for name, share in _parsed(rank, shares[rank]).items():
            if (samples := share.get("open", 0)) and "own" in share:
                still_open.append((name, rank, parse(name, share["own"]).epoch, samples))
            state = merged(name, [parse(name, share[part]) for part in ("before", "own") if part in share])
            if name in found:
                _check_disjoint(name, rank, found[name], state)
                state = merged(name, [found[name], state])
            found[name] = state
    for name, rank, epoch, samples in still_open:
        if epoch < found[name].epoch:  # of an epoch that is over nothing is kept but its number, so they would be lost
            raise DataConflict(
                f"data set {name!r}: rank {rank} was given {samples} samples of epoch {epoch} that it did not pass to step(), and others "
                f"are in epoch {found[name].epoch}: every rank must pass each batch to step()",
                name=name,
            )
    return {name: state.to_json() for name, state in sorted(found.items())}


def accounts_of(shares: Mapping[int, str]) -> dict[int, dict[str, Account]]:
    """What each rank's share says of its steps: rank -> data set -> rows. Raises StateCorrupt."""
    return {
        rank: {name: parse_account(of["steps"]) for name, of in _parsed(rank, shares[rank]).items() if "steps" in of} for rank in shares
    }


def _parsed(rank: int, share: str) -> Mapping[str, Mapping[str, Any]]:
    """A rank's share: data set -> its ``own`` state, ``steps``, samples that are ``open``, and, of rank 0, the state ``before`` the run."""
    try:
        found = orjson.loads(share) if share else {}
    except orjson.JSONDecodeError as exc:
        raise StateCorrupt(f"rank {rank}'s share of the data state is no JSON: {exc}") from exc
    if not isinstance(found, dict) or not all(isinstance(of, dict) and {"own", "before"} & of.keys() for of in found.values()):
        raise StateCorrupt(f"rank {rank}'s share of the data state must map data sets to own and before, got {share[:60]!r}")
    return found


def _check_disjoint(name: str, rank: int, others: DataState, state: DataState) -> None:
    """Redis that forgot a lease, or a trainer that went on alone: what two ranks both trained on must not pass for consumed once."""
    twice = shared(others, state)
    if twice:
        shard, held = min(twice.items())
        where = f"shard {shard}" + (f" samples {ranges.format_ranges(held)}" if held is not None else "")
        raise DataConflict(f"data set {name!r}: rank {rank} and another rank both consumed {where}", name=name)
    if isinstance(state, Cursor) and isinstance(others, Cursor) and (state.epoch, state.batch) != (others.epoch, others.batch):
        raise DataConflict(
            f"data set {name!r}: rank {rank} stands at batch {state.batch} of epoch {state.epoch}, another rank at batch {others.batch} of "
            f"epoch {others.epoch}: every rank must pass each batch to step()",
            name=name,
        )
