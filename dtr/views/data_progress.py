"""How far the current run has come with its data sets: by shard, by worker, and when the epoch will be over.

What is counted is what the ranks have told Redis, a batch before its trainer has it; so a few batches that are under way count as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
from redis.client import NEVER_DECODE

from dtr.checkpoint.survey import read_manifest
from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import DataState, Dynamic, parse
from dtr.datasets.consuming.ranges import Ranges
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.timemachine.journal import Account, parse_account
from dtr.datasets.timemachine.skipping import read_skips
from dtr.datasets.timemachine.skips import left_out
from dtr.errors import IntegrityError, InvalidInput, NotFound, StateCorrupt
from dtr.state.job import JobState
from dtr.views.data_show import consumed_of
from dtr.views.reading import Fields, reading, whole
from dtr.views.stored import Sources

__all__ = ["EpochView", "ProgressView", "ShardView", "WorkerView", "read", "tally"]

ShardState = Literal["done", "leased", "free", "quarantined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardView:
    """One shard in the current epoch; ``worker`` holds its lease."""

    shard: int
    file: str
    start: int
    stop: int
    state: ShardState
    consumed: int
    skipped: int
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One rank. ``step`` is the last that consumed something, ``samples`` are of this epoch and run, None before the first."""

    rank: int
    worker: str
    host: str
    step: int | None
    samples: int
    leased: int
    samples_per_s: float | None
    dry: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochView:
    """One data set in the epoch that the run is in. ``left_out`` counts what is skipped or in quarantine and was not consumed; in
    deterministic mode such a sample keeps its place, and counts as consumed when that has passed.

    ``eta_s`` is None as long as no worker has told its speed. Shards are those of dynamic mode; deterministic mode has none.
    """

    dataset: str
    version: int
    mode: str
    epoch: int
    samples: int
    consumed: int
    left_out: int
    samples_per_s: float | None
    eta_s: float | None
    shards: tuple[ShardView, ...]
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressView:
    """The current run, or the last one (then not ``running``), and the data sets that it loads."""

    job: str
    run: str
    running: bool
    datasets: tuple[EpochView, ...]


def read(sources: Sources, name: str | None = None) -> ProgressView:
    """How far the run is; of one data set, or of all that it loads.

    Raises:
        InvalidInput: without Redis nobody knows.
        DatasetNotFound: there is no such data set.
        CoordinatorUnavailable, StateCorrupt, StoreUnavailable.
    """
    state = sources.state
    if state is None:
        raise InvalidInput("progress is known to Redis alone, which does not answer; `dtr data show` asks the store", field="url")
    with reading(state):
        registry = DatasetRegistry(state.url, job=state.job, client=state.redis)
        wanted = [registry.get(name)] if name is not None else [registry.get(spec.name) for spec in registry.list()]
        current, last = state.redis.hmget(state.keys.meta, ["run", "last_run"])
        run = current or last or ""
        if not run:
            return ProgressView(job=state.job, run="", running=False, datasets=())
        view = _Run.read(state, sources, run)
        found = [one for dataset in wanted if (one := view.epoch(registry, dataset)) is not None]
    return ProgressView(job=state.job, run=run, running=bool(current), datasets=tuple(found))


@dataclass(slots=True, kw_only=True)
class _Run:
    """What Redis has of one run."""

    state: JobState
    run: str
    seats: Sequence[tuple[str, str]]  # worker and host by rank
    newest: Sequence[Mapping[str, Account]]  # by rank: data set -> what its newest step consumed
    base: Mapping[str, Any]

    @classmethod
    def read(cls, state: JobState, sources: Sources, run: str) -> _Run:
        fields = Fields(state.keys.run(run), state.redis.hgetall(state.keys.run(run)))
        seats: dict[int, tuple[str, str]] = {}
        for key, text in fields.items():
            if key.startswith("member:"):
                words = text.split(" ", 2)
                seats[int(words[0])] = (key.removeprefix("member:"), words[2])
        pipeline = state.redis.pipeline(transaction=False)
        for rank in sorted(seats):
            pipeline.xrevrange(state.keys.journal(run, rank), "+", "-", 1)
        newest = [dict(_accounts(entries)) for entries in pipeline.execute()]
        base = _base(sources, fields.text("base_run"), fields.number("base_step"))
        return cls(state=state, run=run, seats=[seats[rank] for rank in sorted(seats)], newest=newest, base=base)

    def epoch(self, registry: DatasetRegistry, current: Dataset) -> EpochView | None:
        """The epoch of a data set that this run is in; None if it has not begun any."""
        name, state = current.spec.name, self.state
        base = parse(name, self.base[name]) if name in self.base else None
        told = [row.epoch for of in self.newest if name in of for row in of[name].rows]
        first = max(told, default=base.epoch if base is not None else 0)
        for epoch in (first + 1, first):
            keys = state.keys.ledger(name, epoch, self.run)
            fields = Fields(keys.ledger, state.redis.hgetall(keys.ledger))
            if fields:
                break
        else:
            return None
        version = fields.integer(":version")
        dataset = current if current.spec.version == version else registry.get(name, version)
        taken, done = (_bits(state.redis, key, dataset.spec.shards) for key in (keys.taken, keys.done))
        bad = {int(shard) for shard in state.redis.hkeys(state.keys.quarantine(name, dataset.spec.digest)) if shard.isdigit()}
        before = base if base is not None and (base.epoch, base.digest) == (epoch, dataset.spec.digest) else None
        if fields.text(":mode") == "deterministic":
            return self._by_cursor(dataset, epoch, before, self._workers(dataset, fields, Counter()))
        partial = before.partial if isinstance(before, Dynamic) else {}
        skipped = left_out(dataset, read_skips(state, name))
        shards = tally(dataset, fields, taken=taken, done=done, quarantined=bad, partial=partial, skipped=skipped)
        consumed = sum(shard.consumed for shard in shards)
        out = sum(len_of(shard) - shard.consumed if shard.state == "quarantined" else shard.skipped for shard in shards)
        leased = Counter(shard.worker for shard in shards if shard.state == "leased")
        return _epoch(dataset, "dynamic", epoch, consumed, out, shards, self._workers(dataset, fields, leased))

    def _by_cursor(self, dataset: Dataset, epoch: int, before: DataState | None, workers: Sequence[WorkerView]) -> EpochView:
        """Deterministic mode: the batch that the furthest rank has consumed tells it all."""
        name = dataset.spec.name
        batches = [(row.number + 1, of[name].origin) for of in self.newest if name in of for row in of[name].rows if row.epoch == epoch]
        consumed = 0 if before is None else consumed_of(dataset, before)
        for batch, origin in batches:
            consumed = max(consumed, min(batch * origin.global_batch_size, dataset.spec.total_samples))
        return _epoch(dataset, "deterministic", epoch, consumed, 0, (), workers)

    def _workers(self, dataset: Dataset, fields: Fields, leased: Mapping[str, int]) -> list[WorkerView]:
        name, total = dataset.spec.name, dataset.spec.total_samples
        pipeline = self.state.redis.pipeline(transaction=False)
        for worker, _ in self.seats:
            pipeline.hget(self.state.keys.worker(worker), f"samples_per_s/{name}")
        speeds = pipeline.execute()
        newest = [_newer(of.get(name), rank, fields, total) for rank, of in enumerate(self.newest)]
        return [
            WorkerView(
                rank=rank, worker=worker, host=host, step=newest[rank][0], samples=newest[rank][1],
                leased=leased.get(worker, 0), samples_per_s=_speed(speed), dry=bool(fields.text(f"dry/{rank}")),
            )
            for rank, ((worker, host), speed) in enumerate(zip(self.seats, speeds, strict=True))
        ]  # fmt: skip


def _newer(account: Account | None, rank: int, fields: Fields, total_samples: int) -> tuple[int | None, int]:
    """A rank's last step and its samples: the ledger hears of a batch when the next one goes out, the journal at once."""
    step, samples = fields.number(f"step/{rank}"), fields.integer(f"samples/{rank}")
    epoch = int(fields.key.rsplit(":", 2)[1])
    for row in () if account is None else account.rows:
        if row.epoch == epoch and row.step > (-1 if step is None else step):
            samples += account.origin.samples_of(row, rank, total_samples) if account is not None else 0
    steps = [row.step for row in (() if account is None else account.rows) if row.epoch == epoch]
    return max([*steps, *([] if step is None else [step])], default=None), samples


def tally(
    dataset: Dataset, fields: Fields, *, taken: Sequence[bool], done: Sequence[bool], quarantined: set[int],
    partial: Mapping[int, Ranges], skipped: Mapping[int, Ranges],
) -> tuple[ShardView, ...]:  # fmt: skip
    """Each shard's state from a ledger of dynamic mode. Pure.

    Args:
        dataset: whose.
        fields: of the ledger.
        taken, done: a flag for each shard: not free; consumed whole in this run.
        quarantined: shards that cannot be read.
        partial: what was consumed before this run of shards that were not done.
        skipped: positions that are left out.
    """
    held: dict[int, Ranges] = dict(partial)
    leases: dict[int, str] = {}
    for key, text in fields.items():
        kind, _, rest = key.partition("/")
        if kind == "part":
            _add(held, whole(rest, fields.key, key) or 0, text)
        elif kind == "out":
            for word in text.split():
                shard, _, span = word.partition(":")
                _add(held, whole(shard, fields.key, key) or 0, span)
        elif kind == "lease":
            leases[whole(rest, fields.key, key) or 0] = text.partition(" ")[0]
    return tuple(
        _shard(dataset, number, taken[number], done[number], number in quarantined, held, leases, skipped)
        for number in range(dataset.spec.shards)
    )


def _shard(
    dataset: Dataset, number: int, taken: bool, done: bool, bad: bool, held: Mapping[int, Ranges], leases: Mapping[int, str],
    skipped: Mapping[int, Ranges],
) -> ShardView:  # fmt: skip
    shard = dataset.shard(number)
    mine = held.get(number, ())
    out = ranges.count(ranges.minus(skipped.get(number, ()), mine))
    over = done or (taken and number not in leases and not bad) or (number in leases and ranges.count(mine) + out == len(shard))
    state: ShardState = "done" if over else "quarantined" if bad else "leased" if number in leases else "free"
    whole_of_it = done or (over and number not in leases)
    return ShardView(
        shard=number, file=shard.file, start=shard.start, stop=shard.stop, state=state,
        consumed=len(shard) if whole_of_it else ranges.count(mine), skipped=0 if whole_of_it else out, worker=leases.get(number, ""),
    )  # fmt: skip


def len_of(shard: ShardView) -> int:
    """How many samples it has."""
    return shard.stop - shard.start


def _epoch(
    dataset: Dataset, mode: str, epoch: int, consumed: int, out: int, shards: Sequence[ShardView], workers: Sequence[WorkerView]
) -> EpochView:
    spec = dataset.spec
    speed = sum(worker.samples_per_s or 0.0 for worker in workers)
    left = max(0, spec.total_samples - consumed - out)
    return EpochView(
        dataset=spec.name, version=spec.version, mode=mode, epoch=epoch, samples=spec.total_samples, consumed=consumed, left_out=out,
        samples_per_s=round(speed, 1) if speed else None, eta_s=0.0 if not left else round(left / speed, 1) if speed else None,
        shards=tuple(shards), workers=tuple(workers),
    )  # fmt: skip


def _add(held: dict[int, Ranges], shard: int, text: str) -> None:
    try:
        held[shard] = ranges.union(held.get(shard, ()), ranges.parse_ranges(text))
    except InvalidInput as exc:
        raise StateCorrupt(f"the ledger's ranges of shard {shard} are not readable: {exc.message}") from exc


def _accounts(entries: Sequence[tuple[str, Mapping[str, str]]]) -> list[tuple[str, Account]]:
    found = []
    for _, fields in entries:
        for name, text in fields.items():
            if not name.startswith(":"):
                try:
                    found.append((name, parse_account(orjson.loads(text))))
                except orjson.JSONDecodeError as exc:
                    raise StateCorrupt(f"a journal of data set {name!r} in Redis is no JSON: {text[:60]!r}") from exc
    return found


def _base(sources: Sources, run: str, step: int | None) -> Mapping[str, Any]:
    """The data state that the run began with; nothing if no store can tell."""
    if sources.store is None or not run or step is None:
        return {}
    try:
        return read_manifest(sources.store, run, step).data
    except (NotFound, IntegrityError):
        return {}


def _bits(client: Any, key: str, count: int) -> list[bool]:
    """A bitmap as flags."""
    raw: bytes = client.execute_command("GET", key, **{NEVER_DECODE: True}) or b""  # it is no text
    flags = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))[:count].astype(bool)
    return [*flags.tolist(), *[False] * (count - len(flags))]


def _speed(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
