"""Fill Redis's index of runs, checkpoints and data sets from the store, which alone is enough: Redis was emptied, or is older than it.

Idempotent and safe beside live members and other rebuilders: what Redis has decided is never changed, and a lineage that moved since it
was looked at is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from redis.client import Pipeline

from dtr.checkpoint.keeping.pins import read_pins
from dtr.checkpoint.lineage import Checkpoint, Lineage, Link, head_of
from dtr.checkpoint.manifest import Manifest, RunRecord
from dtr.checkpoint.saving import metrics
from dtr.checkpoint.survey import (
    Holdings,
    in_parallel,
    known_runs,
    lasting_manifest,
    lineage_in_index,
    lineage_in_store,
    links_of,
    read_manifest,
    read_record,
    records,
    retiring_key,
    survey,
)
from dtr.datasets.timemachine.keeping import refill
from dtr.errors import IntegrityError, NotFound, StateLost
from dtr.runs import run_number
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store, open_store

__all__ = ["index_checkpoint", "index_run", "rebuild", "rebuild_missing"]

log = logging.getLogger(__name__)


def rebuild(state: JobState, store_url: str, *, state_id: str | None = None) -> int:
    """Tell Redis every run, the lineage and every commit that the store at ``store_url`` holds of this job.

    Args:
        state: the job.
        store_url: of the store as users name it (not of the job's folder in it).
        state_id: of the state to fill, which may still be RECOVERING; default: the one that is there.

    Returns:
        The highest number of a run that the store knows, 0 if it knows none.

    Raises:
        StateLost: Redis has no such state, or lost it meanwhile.
        StoreUnavailable, CoordinatorUnavailable.
    """
    base = open_store(store_url)
    return _rebuild(state, base.child(state.job), base.url, state_id)


def rebuild_missing(state: JobState, store: Store, url: str) -> bool:
    """:func:`rebuild`, if the job's store holds runs that Redis does not know; whether it did."""
    runs = survey(store).every_run
    if known_runs(state, runs) >= runs:
        return False
    log.warning("Redis does not know every run of job %s in %s: rebuilding its index from there", state.job, url)
    _rebuild(state, store, url, None)
    return True


def index_run(state: JobState, store: Store, url: str, run: str, *, state_id: str | None = None) -> bool:
    """Tell Redis of one run from its record; False if the store has none."""
    try:
        record = read_record(store, run)
    except NotFound:
        return False
    _index_run(state, state_id or _state_id(state), record, url)
    return True


def index_checkpoint(state: JobState, store: Store, url: str, run: str, step: int) -> str:
    """Tell Redis of one checkpoint from its decision record; its state, '' if the store has no decision or retired it.

    A pin, or that it is about to be retired, is told as well.
    """
    try:
        manifest = lasting_manifest(store, run, step)
    except NotFound:
        return ""
    return _index_checkpoint(
        state, _state_id(state), manifest, url,
        pinned=read_pins(store, [(run, step)]).get((run, step), ""), retiring=_exists(store, retiring_key(run, step)),
    )  # fmt: skip


def _exists(store: Store, key: str) -> bool:
    try:
        store.size(key)
    except NotFound:
        return False
    return True


def _rebuild(state: JobState, store: Store, url: str, state_id: str | None) -> int:
    state_id = state_id or _state_id(state)
    holdings = survey(store)
    found = records(store, holdings)
    manifests = _manifests(store, holdings)
    notes = read_pins(store, holdings.pinned)
    links = links_of(found)
    for record in found.values():
        _index_run(state, state_id, record, url)
    lineage = lineage_in_store(links)
    commits = [name for name, manifest in manifests.items() if manifest.decision == "commit"]
    newest = next(iter(lineage.newest_first(commits)), None)
    if newest is not None:
        lasting_manifest(store, *newest)
    if lineage.head:
        _index_lineage(state, state_id, lineage, links, url, newest)
        _index_last_run(state, state_id, lineage.head)
    # Aborts older than the newest commit concern nobody any more: the store keeps them, the index need not.
    after = commits if newest is None else [*commits, *(c for c, m in manifests.items() if m.decision == "abort" and c[1] > newest[1])]
    for name in sorted(after, key=lambda c: (c[1], c[0])):
        _index_checkpoint(state, state_id, manifests[name], url, pinned=notes.get(name, ""), retiring=name in holdings.retiring)
    refill(state, store, {} if newest is None else manifests[newest].data)
    log.info("job %s: %d runs and %d checkpoints of %s are indexed", state.job, len(found), len(after), url)
    return max((run_number(run) for run in holdings.every_run), default=0)


def _state_id(state: JobState) -> str:
    with translate(state.url):
        found = state.redis.hget(state.keys.meta, "state_id")
    if not found:
        raise StateLost(f"Redis holds no state for job {state.job} that could be filled; a member creates it when it starts")
    return str(found)


def _manifests(store: Store, holdings: Holdings) -> dict[Checkpoint, Manifest]:
    """Every decision record that can be used."""

    def read(name: Checkpoint) -> Manifest | None:
        try:
            return read_manifest(store, *name)
        except NotFound:
            return None
        except IntegrityError as exc:
            log.error("run %s step %d is no checkpoint: %s", *name, exc)
            return None

    names = sorted(holdings.decided)
    return {name: manifest for name, manifest in zip(names, in_parallel(read, names), strict=True) if manifest is not None}


def _index_run(state: JobState, state_id: str, record: RunRecord, url: str) -> None:
    members = [word for pair in record.roster.items() for word in pair]
    parent_step = "" if record.parent_step is None else record.parent_step
    state.call(
        "index_run",
        [state.keys.meta, state.keys.run(record.run)],
        [
            state_id, record.world_size, record.parent_run or "", parent_step, url, record.created_at, run_number(record.run), *members,
        ],
    )  # fmt: skip


def _index_lineage(
    state: JobState, state_id: str, lineage: Lineage, links: Mapping[str, Link], url: str, newest: Checkpoint | None
) -> None:
    """Make the store's lineage the job's, unless Redis has one that is as new, or one in another store."""
    there, where = lineage_in_index(state)
    if there.head and (where != url or there.head not in links or head_of([links[there.head], links[lineage.head]]) == there.head):
        return
    ancestors: list[Any] = [word for pair in lineage.ancestors() for word in pair]
    state.call(
        "index_lineage",
        [state.keys.meta, state.keys.lineage, state.keys.events],
        [state_id, there.head, lineage.head, f"{newest[0]}/{newest[1]}" if newest else "", *ancestors],
    )


def _index_last_run(state: JobState, state_id: str, head: str) -> None:
    """Until a run forms, the one that goes on is the last: a person may let commits go before that, and what it continues is spared."""

    def fill(pipe: Pipeline) -> None:
        found, run, last_run = pipe.hmget(state.keys.meta, ["state_id", "run", "last_run"])
        pipe.multi()
        if found == state_id and not run and not (last_run and run_number(str(last_run)) >= run_number(head)):
            pipe.hset(state.keys.meta, "last_run", head)

    with translate(state.url):
        state.redis.transaction(fill, state.keys.meta)


def _index_checkpoint(state: JobState, state_id: str, manifest: Manifest, url: str, *, pinned: str, retiring: bool) -> str:
    if manifest.decision not in {"commit", "abort"}:
        return ""
    keys, run, step = state.keys, manifest.run, manifest.step
    facts: list[Any] = []
    for part in manifest.parts:
        fields = {
            "state": "done", "worker": part.worker, "incarnation": part.incarnation, "object": part.object,
            "size_bytes": part.state_bytes, "checksum": part.checksum, "state_checksum": part.state_checksum,
            "object_bytes": part.size_bytes, "piece_bytes": part.piece_bytes, "pieces": part.pieces, "kind": part.kind,
        }  # fmt: skip
        facts += [word for name, value in fields.items() for word in (f"{part.rank}/{name}", value)]
    answer = state.call(
        "index_ckpt",
        [keys.meta, keys.lineage, keys.ckpt(run, step), keys.parts(run, step), keys.ckpts, keys.open_ckpts, keys.events],
        [
            state_id, run, step, manifest.decision, manifest.reason or "", manifest.world_size, manifest.replicated, url,
            manifest.created_at, sum(part.state_bytes for part in manifest.parts), metrics.encode(manifest.metrics), pinned,
            int(retiring) or "", *facts,
        ],
    )  # fmt: skip
    return str(answer)
