"""The time machine: which samples a step of the surviving lineage consumed, and that batch again.

Where a step is looked for: the run from which the lineage takes it, or the one that is named. Of that run first Redis, which has the newest
steps of each rank, then the store, which has every step up to the newest commit, also when Redis was emptied (see
:mod:`dtr.datasets.timemachine.journal`). A step that was trained twice, because its first run died before a commit, is the one that the
model has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import orjson

from dtr import names
from dtr.checkpoint.lineage import Lineage
from dtr.checkpoint.survey import lineage_in_index, lineage_of, survey
from dtr.config import Settings
from dtr.datasets.loading.batch import Batch, SampleRange
from dtr.datasets.loading.feed import batches_of, global_share
from dtr.datasets.loading.order import EpochOrder
from dtr.datasets.loading.plan import Plan, Tail
from dtr.datasets.loading.reading import Rows
from dtr.datasets.registering import described
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.sources.copies import Copies
from dtr.datasets.timemachine.journal import Account, Origin, Row, decode, merged_accounts, parse_account
from dtr.datasets.timemachine.skipping import Places
from dtr.errors import CoordinatorUnavailable, DatasetNotFound, NotFound, StateCorrupt, StepUnknown
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store, open_store

__all__ = ["Consumed", "History", "Moment", "history_of", "places"]

READ_AT_ONCE: Final = 1000
KEEP_BYTES: Final = 256 << 20  # of shards, while a batch is put together


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumed:
    """One batch that one rank consumed at a step: ``ranges`` are (shard, start, stop) in their order, in both modes."""

    rank: int
    dataset: Dataset
    epoch: int
    number: int
    mode: str
    ranges: tuple[SampleRange, ...]
    padded: tuple[SampleRange, ...]
    skipped: tuple[SampleRange, ...]

    def files(self) -> Iterator[tuple[str, int, int]]:
        """File, first sample and the one after the last within it, of `ranges` in their order; what follows each other is one."""
        held: tuple[str, int, int] | None = None
        for number, start, stop in self.ranges:
            shard = self.dataset.shard(number)
            here = (shard.path, shard.start + start, shard.start + stop)
            if held is not None and held[0] == here[0] and held[2] == here[1]:
                held = (held[0], held[1], here[2])
                continue
            if held is not None:
                yield held
            held = here
        if held is not None:
            yield held

    def read(self, columns: Sequence[str] | None = None) -> Batch:
        """The batch again, from the files.

        Raises:
            DatasetMismatch: a file is gone or was changed since; ShardUnreadable: it cannot be read.
            InvalidInput: there is no such column.
        """
        everything = np.array(
            [(shard, at) for shard, start, stop in (*self.ranges, *self.padded) for at in range(start, stop)], dtype=np.int64
        ).reshape(-1, 2)
        rows = Rows(self.dataset, columns, keep=64, keep_bytes=KEEP_BYTES)
        spec = self.dataset.spec
        return Batch(
            dataset=spec.name, version=spec.version, run="", epoch=self.epoch, number=self.number,
            columns=rows.take(everything[:, 0], everything[:, 1]), ranges=self.ranges, padded=self.padded, skipped=self.skipped,
            tracked=False,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What one step of one run consumed, by rank; ``source`` is where that was found: Redis or the store.

    ``on_lineage`` is False for a run that was asked for by name and whose step the job left behind.
    """

    run: str
    step: int
    on_lineage: bool
    source: str
    consumed: tuple[Consumed, ...]


@contextmanager
def history_of(
    *, url: str | None = None, job: str | None = None, store: str | None = None, settings: Settings | None = None
) -> Iterator[History]:
    """The history of a job for a program without an agent, from Redis and the store; with a store, Redis may be away.

    Args:
        url: of Redis; default: the setting ``redis_url``.
        job: ``name`` or ``tenant/name``; default: the setting ``job``.
        store: where its checkpoints are; default: the setting ``store``; without one, Redis alone is asked.
        settings: all of these and where copies of files are kept; default: the environment's.

    Raises CoordinatorUnavailable if Redis is away and there is no store.
    """
    settings = settings or Settings.load(redis_url=url, job=job, store=store)
    state = JobState(settings.redis_url, settings.job, name="dtr-history")
    try:
        try:
            state.server_now_ms()
            there: JobState | None = state
        except CoordinatorUnavailable:
            if not settings.store:
                raise
            there = None
        base = open_store(settings.store) if settings.store else None
        folder, store_url = (None, "") if base is None else (base.child(settings.job), base.url)
        yield History(there, folder, store_url, copies=Copies.of(settings))
    finally:
        state.close()


class History:
    """Reads; of Redis and the store, either may be missing.

    Args:
        state: the job in Redis; None without one.
        store: the job's folder in its store; None without one.
        store_url: of the store as users name it.
        copies: where copies of files are kept; None: where the environment says.
    """

    def __init__(self, state: JobState | None, store: Store | None, store_url: str = "", *, copies: Copies | None = None) -> None:
        self._state, self._store, self._store_url, self._copies = state, store, store_url, copies
        self._datasets: dict[tuple[str, str], Dataset] = {}
        self._orders: dict[tuple[str, Origin, int], EpochOrder] = {}

    def at(self, step: int, *, rank: int | None = None, run: str | None = None) -> Moment:
        """What ``step`` consumed.

        Args:
            step: as `agent.step` returned it.
            rank: this one's alone; default: all ranks'.
            run: of this run, whether or not the job went on from it; default: of the lineage.

        Raises:
            StepUnknown: no rank's record of this step is there; the message says where it was looked for.
            DatasetNotFound: neither Redis nor the store knows the data set that it consumed.
            StateCorrupt, CoordinatorUnavailable, StoreUnavailable.
        """
        names.step(step, "step")
        lineage = self._lineage()
        run = self._run_of(lineage, step) if run is None else names.name(run, "run")
        source, accounts = "redis", self._in_redis(run, step)
        if self._store is not None and not self._is_whole(run, accounts):
            kept = self._in_store(run, step)
            if len(kept) > len(accounts):
                source, accounts = "store", {**accounts, **kept}
        if rank is not None:
            accounts = {at: held for at, held in accounts.items() if at == rank}
        if not accounts:
            raise StepUnknown(self._unknown(run, step, rank), run=run, step=step)
        consumed = [
            self._consumed(at, name, account.origin, row)
            for at in sorted(accounts)
            for name, found in sorted(accounts[at].items())
            for account in found
            for row in account.rows
        ]
        return Moment(run=run, step=step, on_lineage=lineage.takes(run, step), source=source, consumed=tuple(consumed))

    def _unknown(self, run: str, step: int, rank: int | None) -> str:
        newest = self._newest(run)
        if newest is not None and newest < step:
            return f"nobody has consumed step {step} of run {run} yet: Redis has its steps up to {newest}"
        who = "no rank" if rank is None else f"rank {rank} did not"
        why = f"{who} passed a batch to agent.step() then" if rank is None else f"{who} pass a batch to agent.step() then"
        if self._store is None:
            return f"Redis has no record of step {step} of run {run}: {why}, or --store URL has it, where older steps are"
        where = "neither Redis nor the store has a" if self._state is not None else "the store has no"
        lost = "it is newer than the newest commit" + (", and Redis was emptied" if self._state is not None else "")
        return f"{where} record of step {step} of run {run}: {why}, or {lost}"

    def _newest(self, run: str) -> int | None:
        """The newest step of a run that Redis has on record; of its first rank, since all ranks go step by step."""
        if self._state is None:
            return None
        with translate(self._state.url):
            found: Any = self._state.redis.xrevrange(self._state.keys.journal(run, 0), count=1)
        return int(found[0][0].partition("-")[0]) if found else None

    # --- which run --------------------------------------------------------------------------------------------------

    def _lineage(self) -> Lineage:
        """The job's, as far as anyone tells; without a store, that of its newest run."""
        if self._store is not None:
            found = lineage_of(self._store, self._store_url, survey(self._store), self._state)
            if found.segments:
                return found
        if self._state is None:
            return Lineage()
        found, _ = lineage_in_index(self._state)
        if found.segments:
            return found
        with translate(self._state.url):
            run = self._state.redis.hget(self._state.keys.meta, "last_run")
        return Lineage().after(run, None) if run else Lineage()

    def _run_of(self, lineage: Lineage, step: int) -> str:
        """The run from which the lineage takes this step: the newest that went on from an earlier one."""
        for at, segment in enumerate(lineage.segments):
            older = lineage.segments[at + 1 : at + 2]
            begins_after = older[0].last if older else None
            if lineage.takes(segment.run, step) and (begins_after is None or step > begins_after):
                return segment.run
        if not lineage.segments:
            raise StepUnknown(f"this job has no run yet, so nobody consumed step {step}", step=step)
        raise StepUnknown(f"step {step} is of no run on the lineage: {lineage.head} is its newest", step=step)

    # --- what is on record ------------------------------------------------------------------------------------------

    def _in_redis(self, run: str, step: int) -> dict[int, dict[str, list[Account]]]:
        if self._state is None:
            return {}
        state, found = self._state, dict[int, dict[str, list[Account]]]()
        with translate(state.url):
            size = int(state.redis.hget(state.keys.run(run), "world_size") or 0)
            for first in range(0, size, READ_AT_ONCE):
                pipeline = state.redis.pipeline(transaction=False)
                ranks = range(first, min(first + READ_AT_ONCE, size))
                for rank in ranks:
                    pipeline.xrange(state.keys.journal(run, rank), f"{step}-1", f"{step}-1")
                for rank, entries in zip(ranks, pipeline.execute(), strict=True):
                    for _, fields in entries:
                        found[rank] = {name: [_account(text)] for name, text in fields.items() if not name.startswith(":")}
        return found

    def _is_whole(self, run: str, accounts: Mapping[int, Any]) -> bool:
        """Whether Redis has every rank's; a rank that gave no batch has none anywhere."""
        if self._state is None:
            return False
        with translate(self._state.url):
            return 0 < int(self._state.redis.hget(self._state.keys.run(run), "world_size") or 0) <= len(accounts)

    def _in_store(self, run: str, step: int) -> dict[int, dict[str, list[Account]]]:
        """From the first object that reaches so far; later ones have the step only if a commit was slow to be known."""
        if self._store is None:
            return {}
        for key in sorted(self._store.list(f"journal/{run}")):
            through = key.rpartition("/")[2].partition(".")[0]
            if not through.isdigit() or int(through) < step:
                continue
            found: dict[int, dict[str, list[Account]]] = {}
            for rank, of in decode(self._store.get(key), key).items():
                rows = {name: list(merged_accounts([account.at(step)])) for name, account in of.items()}
                held = {name: accounts for name, accounts in rows.items() if any(account.rows for account in accounts)}
                if held:
                    found[rank] = held
            if found:
                return found
        return {}

    # --- what that means --------------------------------------------------------------------------------------------

    def dataset(self, name: str, digest: str, version: int | None = None) -> Dataset:
        """A data set by its digest, from Redis or the store; raises DatasetNotFound."""
        if (name, digest) not in self._datasets:
            self._datasets[name, digest] = replace(self._find_dataset(name, digest, version), copies=self._copies)
        return self._datasets[name, digest]

    def _find_dataset(self, name: str, digest: str, version: int | None) -> Dataset:
        if self._state is not None:
            try:
                registry = DatasetRegistry(self._state.url, job=self._state.job, client=self._state.redis)
                found = registry.get(name, version)
                if found.spec.digest == digest:
                    return found
            except (DatasetNotFound, CoordinatorUnavailable):
                if self._store is None:
                    raise
        if self._store is not None:
            try:
                return described.decode(self._store.get(described.key_of(name, digest)), name, digest)
            except NotFound:
                pass
        raise DatasetNotFound(f"data set {name!r} with digest {digest} is neither registered any more nor in the store", name=name)

    def _order(self, dataset: Dataset, origin: Origin, epoch: int) -> EpochOrder:
        """The order of an epoch, made once for all ranks."""
        key = (dataset.spec.digest, origin, epoch)
        if key not in self._orders:
            sizes = dataset.sizes()
            self._orders[key] = EpochOrder.of(sizes, seed=origin.seed, epoch=epoch, shuffle=dataset.spec.shuffle, window=origin.window)
        return self._orders[key]

    def _consumed(self, rank: int, name: str, origin: Origin, row: Row) -> Consumed:
        dataset = self.dataset(name, origin.digest, origin.version or None)
        told = origin.mode == "dynamic" or row.ranges
        given, padded = (row.ranges, row.padded) if told else places(dataset, origin, row, rank, self._order(dataset, origin, row.epoch))
        return Consumed(
            rank=rank, dataset=dataset, epoch=row.epoch, number=row.number, mode=origin.mode, ranges=given, padded=padded,
            skipped=row.skipped,
        )  # fmt: skip


def places(
    dataset: Dataset, origin: Origin, row: Row, rank: int, order: EpochOrder
) -> tuple[tuple[SampleRange, ...], tuple[SampleRange, ...]]:
    """Samples and padding of one rank's share of a global batch, without what was skipped: the loader's own arithmetic. Pure.

    Raises StateCorrupt if there is no such share.
    """
    plan = Plan(
        dataset=dataset, mode="deterministic", batch_size=origin.global_batch_size, epochs=None, columns=None, seed=origin.seed,
        window=origin.window, tail=cast("Tail", origin.tail),
    )  # fmt: skip
    if rank >= origin.world_size or row.number >= batches_of(order.samples, plan.batch_size, plan.tail):
        raise StateCorrupt(f"data set {dataset.spec.name!r}: epoch {row.epoch} has no batch {row.number} of rank {rank}")
    out = {(shard, at) for shard, start, stop in row.skipped for at in range(start, stop)}

    def split(found: Places) -> tuple[Places, Places]:
        return [place for place in found if place not in out], [place for place in found if place in out]

    share = global_share(plan, order, split, epoch=row.epoch, number=row.number, run="", rank=rank, world_size=origin.world_size)
    return share.ranges, share.padded


def _account(text: str) -> Account:
    try:
        return parse_account(orjson.loads(text))
    except orjson.JSONDecodeError as exc:
        raise StateCorrupt(f"a journal of consumed batches in Redis is no JSON: {text[:60]!r}") from exc
