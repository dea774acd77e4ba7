"""What a store holds of one job, and the lineage that it tells. The store is the truth; Redis is asked only where it is the index of it.

runs/RUN.json                     what the run continues, and its roster
runs/RUN/STEP/manifest.json       the decision about one checkpoint
runs/RUN/STEP/pin.json            it must be kept, and why
runs/RUN/STEP/retiring.json       it is about to be retired: whoever fills an index must not offer it
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

from dtr.checkpoint.lineage import Checkpoint, Lineage, Link, chain, from_index, head_of, split_name
from dtr.checkpoint.manifest import Manifest, RunRecord
from dtr.checkpoint.saving.metrics import Metrics, decode
from dtr.errors import AlreadyExists, CoordinatorUnavailable, IntegrityError, ManifestInvalid, NotFound, StateCorrupt, StoreRefused
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store

__all__ = [
    "Holdings",
    "known_runs",
    "lasting_manifest",
    "lineage_in_store",
    "lineage_of",
    "manifest_key",
    "read_manifest",
    "read_record",
    "record_key",
    "survey",
]

log = logging.getLogger(__name__)

READERS: Final = 8
In = TypeVar("In")
Out = TypeVar("Out")
_RECORD: Final = re.compile(r"runs/([^/]+)\.json")
_DECISION: Final = re.compile(r"runs/([^/]+)/(\d+)/(manifest|pin|retiring)\.json")


def record_key(run: str) -> str:
    """Where a run's record lies in the job's store."""
    return f"runs/{run}.json"


def manifest_key(run: str, step: int) -> str:
    """Where the decision about a checkpoint lies in the job's store."""
    return f"runs/{run}/{step:012d}/manifest.json"


def pin_key(run: str, step: int) -> str:
    """Where it is noted that a checkpoint must be kept."""
    return f"runs/{run}/{step:012d}/pin.json"


def retiring_key(run: str, step: int) -> str:
    """Where it is noted that a checkpoint is about to be retired."""
    return f"runs/{run}/{step:012d}/retiring.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """The names in one job's store: runs that have a record, and checkpoints that have a decision, a pin, or are being retired."""

    runs: frozenset[str]
    decided: frozenset[Checkpoint]
    pinned: frozenset[Checkpoint] = frozenset()
    retiring: frozenset[Checkpoint] = frozenset()

    @property
    def every_run(self) -> frozenset[str]:
        """Runs that left anything: a record may be lost."""
        return self.runs | {run for run, _ in self.decided}


def survey(store: Store) -> Holdings:
    """List the job's store."""
    runs: set[str] = set()
    said: dict[str, set[Checkpoint]] = {"manifest": set(), "pin": set(), "retiring": set()}
    for key in store.list("runs"):
        if (found := _RECORD.fullmatch(key)) is not None:
            runs.add(found[1])
        elif (found := _DECISION.fullmatch(key)) is not None and found[2] == f"{int(found[2]):012d}":
            said[found[3]].add((found[1], int(found[2])))
    return Holdings(
        runs=frozenset(runs), decided=frozenset(said["manifest"]), pinned=frozenset(said["pin"]), retiring=frozenset(said["retiring"])
    )


def read_manifest(store: Store, run: str, step: int) -> Manifest:
    """The decision about a checkpoint, checked; raises NotFound or ManifestInvalid."""
    manifest = _parsed(store, manifest_key(run, step), Manifest.parse)
    if (manifest.run, manifest.step) != (run, step):
        raise ManifestInvalid(f"{manifest_key(run, step)} is about run {manifest.run} step {manifest.step}")
    return manifest


def lasting_manifest(store: Store, run: str, step: int) -> Manifest:
    """The decision about a checkpoint, which a power cut cannot take back: whoever wrote it may have been killed just before that was so.

    Only a put says that what is there lasts, so the same record is put again, if it is absent, which it is not. Whoever may only read is
    told what there is.

    Raises as `read_manifest`, and StoreUnavailable.
    """
    manifest = read_manifest(store, run, step)
    with contextlib.suppress(AlreadyExists, StoreRefused):
        store.put(manifest_key(run, step), manifest.encode(), if_absent=True)
    return manifest


def read_record(store: Store, run: str) -> RunRecord:
    """The record of a run, checked; raises NotFound or ManifestInvalid."""
    record = _parsed(store, record_key(run), RunRecord.parse)
    if record.run != run:
        raise ManifestInvalid(f"{record_key(run)} is about run {record.run}")
    return record


def _parsed(store: Store, key: str, parse: Callable[[bytes], Out]) -> Out:
    content = store.get(key)
    try:
        return parse(content)
    except ManifestInvalid as exc:  # a person has to find it
        raise ManifestInvalid(f"{key}: {exc.message}", **exc.facts) from exc


def records(store: Store, holdings: Holdings) -> dict[str, RunRecord]:
    """What each run continues: its record or, if that is damaged or gone, what one of its commits says.

    So a run is known as long as anything of it can be restored.
    """

    def read(run: str) -> RunRecord | None:
        try:
            return read_record(store, run)
        except (IntegrityError, NotFound) as exc:
            implied = _implied(store, run, holdings)
            log.error("the record of run %s cannot be used%s: %s", run, "; its commits tell the same" if implied else "", exc)
            return implied

    runs = sorted(holdings.every_run)
    return {run: record for run, record in zip(runs, in_parallel(read, runs), strict=True) if record is not None}


def in_parallel(read: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """``read`` of each of ``items``, in their order, a few at a time."""
    if len(items) <= READERS:
        return [read(item) for item in items]
    with ThreadPoolExecutor(READERS, thread_name_prefix="dtr-survey") as pool:
        return list(pool.map(read, items))


def _implied(store: Store, run: str, holdings: Holdings) -> RunRecord | None:
    for _, step in sorted((c for c in holdings.decided if c[0] == run), reverse=True):
        try:
            manifest = read_manifest(store, run, step)
        except (IntegrityError, NotFound):
            continue
        if manifest.decision != "abort":
            return _record_of(manifest, store)
    return None


def _record_of(manifest: Manifest, store: Store) -> RunRecord:
    """A run's record as far as a manifest tells it: the seats of ranks that it does not name are made up."""
    seats = {part.rank: (part.worker, part.incarnation) for part in manifest.parts}
    unknown = ("unknown", "0" * 12)
    return RunRecord(
        job=manifest.job,
        run=manifest.run,
        parent_run=manifest.parent[0] if manifest.parent else None,
        parent_step=manifest.parent[1] if manifest.parent else None,
        world_size=manifest.world_size,
        roster={
            seats[rank][0] if rank in seats else f"{unknown[0]}-{rank}": f"{rank} {seats.get(rank, unknown)[1]} unknown"
            for rank in range(manifest.world_size)
        },
        store=store.url,
        created_at=manifest.created_at,
    )


def links_of(found: Mapping[str, RunRecord]) -> dict[str, Link]:
    """What each run continues."""
    return {
        run: Link(run=run, parent_run=record.parent_run or "", parent_step=record.parent_step, created_at_ms=record.created_at)
        for run, record in found.items()
    }


def lineage_in_store(links: Mapping[str, Link]) -> Lineage:
    """The lineage as the store alone tells it: that of the newest run with a record."""
    return chain(links, head_of(links.values()))


def known_runs(state: JobState, runs: frozenset[str]) -> frozenset[str]:
    """Those of ``runs`` that Redis knows with what they continue."""
    ordered = sorted(runs)
    with translate(state.url):
        pipeline = state.redis.pipeline(transaction=False)
        for run in ordered:
            pipeline.hget(state.keys.run(run), "base_state")
        states = pipeline.execute()
    return frozenset(run for run, base_state in zip(ordered, states, strict=True) if base_state == "SET")


def lineage_in_index(state: JobState) -> tuple[Lineage, str]:
    """The lineage as Redis has it, and the URL of the store that it lies in; '' if there is none."""
    try:
        with translate(state.url):
            held: dict[str, str] = state.redis.hgetall(state.keys.lineage)
            runs = sorted(held)
            pipeline = state.redis.pipeline(transaction=False)
            for run in runs:
                pipeline.hmget(state.keys.run(run), ["base_run", "base_step", "store"])
            facts = dict(zip(runs, pipeline.execute(), strict=True))
        links = {
            run: Link(run=run, parent_run=parent or "", parent_step=int(step) if step else None) for run, (parent, step, _) in facts.items()
        }
        lineage = from_index(held, links)
    except ValueError as exc:
        raise StateCorrupt(f"{state.keys.lineage} or a run's hash holds what is no step: {exc}") from exc
    return lineage, (facts[lineage.head][2] or "") if lineage.head else ""


def lineage_of(store: Store, store_url: str, holdings: Holdings, state: JobState | None) -> Lineage:
    """The job's lineage in this store.

    Redis's, if it is about this store and knows every run in it: it is the first to learn of a cut. Else what the store tells: Redis
    is empty, older than the store, about another store, or away.
    """
    if state is not None:
        try:
            lineage, where = lineage_in_index(state)
            if where == store_url and known_runs(state, holdings.every_run) >= holdings.every_run:
                return lineage
            if holdings.every_run:
                log.info("Redis does not index %s in full: going by the store's own records", store_url)
        except (CoordinatorUnavailable, StateCorrupt) as exc:
            log.warning("going by the store's own records, because %s", exc)
    return lineage_in_store(links_of(records(store, holdings)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexed:
    """A checkpoint as the index lists it."""

    run: str
    step: int
    state: str
    retired: bool
    decided_at_ms: int
    created_at_ms: int = 0
    pinned: str = ""
    metrics: Metrics = field(default_factory=dict)


def indexed(state: JobState, store_url: str) -> list[Indexed]:
    """Every checkpoint in the index that lies in this store."""
    with translate(state.url):
        names = [found for name in state.redis.zrange(state.keys.ckpts, 0, -1) if (found := split_name(name)) is not None]
        pipeline = state.redis.pipeline(transaction=False)
        for run, step in names:
            pipeline.hmget(state.keys.ckpt(run, step), ["state", "retired_at", "decided_at", "store", "created_at", "pinned", "metrics"])
        replies = pipeline.execute()
    return [
        Indexed(
            run=run,
            step=step,
            state=word,
            retired=bool(retired_at),
            decided_at_ms=int(decided_at or 0),
            created_at_ms=int(created_at or 0),
            pinned=pinned or "",
            metrics=decode(said or "", state.keys.ckpt(run, step)),
        )
        for (run, step), (word, retired_at, decided_at, where, created_at, pinned, said) in zip(names, replies, strict=True)
        if word and where == store_url
    ]
