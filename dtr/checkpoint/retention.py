"""Keep the newest commits of the lineage and let the others go, one crash-proof step after the other.

    retire      Redis: refused for the newest commit, for what the newest run continues, and while that is being chosen
    tombstone   store: replaces the manifest, so that no reader starts on it any more
    delete      the objects, once the grace of readers under way has passed since the tombstone was written
    forget      Redis: the checkpoint leaves the index; the tombstone stays, so that nothing late can revive it

Each step is decided by what the one before it left behind, so a collector may die anywhere, sleep for an hour, or run twice at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dtr.checkpoint.lineage import Checkpoint, Lineage, split_name
from dtr.checkpoint.manifest import Manifest
from dtr.checkpoint.survey import Indexed, indexed, lineage_in_index, manifest_key, read_manifest
from dtr.config import Settings
from dtr.errors import IntegrityError, NotFound
from dtr.failpoints import failpoint
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store, open_store

__all__ = ["Plan", "apply", "collect", "plan"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do: ``retire`` is to be tombstoned, oldest first; ``sweep`` was retired before; ``forget`` concerns nobody any more."""

    retire: tuple[Checkpoint, ...] = ()
    sweep: tuple[Checkpoint, ...] = ()
    forget: tuple[Checkpoint, ...] = ()


def plan(indexed: Iterable[Indexed], lineage: Lineage, *, keep_last: int, protected: frozenset[Checkpoint], old_ms: int) -> Plan:
    """What retention does about the checkpoints in the index.

    Args:
        indexed: of one store.
        lineage: of the job in that store.
        keep_last: newest commits of the lineage to keep; 0 keeps all.
        protected: checkpoints that stay whatever their age: the newest, and what the newest run continues.
        old_ms: what was aborted before this is forgotten.
    """
    found = list(indexed)
    sweep = tuple((c.run, c.step) for c in found if c.retired)
    if keep_last == 0:
        return Plan(sweep=sweep)
    commits = [(c.run, c.step) for c in found if c.state == "COMMITTED" and not c.retired]
    kept = set(lineage.newest_first(commits)[:keep_last]) | protected
    # What the lineage left behind can never be restored; it goes once something newer is safe.
    left = [(c.run, c.step) for c in found if c.state == "ABANDONED" and not c.retired and kept]
    retire = sorted({c for c in [*commits, *left] if c not in kept}, key=lambda c: (c[1], c[0]))
    forget = tuple((c.run, c.step) for c in found if c.state == "ABORTED" and c.decided_at_ms < old_ms)
    return Plan(retire=tuple(retire), sweep=sweep, forget=forget)


def collect(store: Store, state: JobState, *, keep_last: int | None = None, reader_grace_s: float | None = None) -> Plan:
    """Apply retention to the job's store; what was done.

    Args:
        store: of the job (the folder of the job in the store).
        state: the job.
        keep_last: commits of the lineage to keep; default: what the newest run was started with.
        reader_grace_s: how long objects outlive their manifest; default: likewise.

    Does nothing if the newest run lives in another store, or has not yet fixed what it continues.

    Raises:
        StoreUnavailable, CoordinatorUnavailable: the rest is done at the next call.
    """
    keys = state.keys
    with translate(state.url):
        last_run, latest = state.redis.hmget(keys.meta, ["last_run", "latest"])
        run = state.redis.hgetall(keys.run(last_run)) if last_run else {}
    if run.get("base_state") != "SET" or open_store(run["store"]).child(state.job).url != store.url:
        return Plan()
    keep = int(run.get("keep_last") or Settings.load().keep_last) if keep_last is None else keep_last
    grace_s = float(run["grace_ms"]) / 1000 if run.get("grace_ms") else Settings.load().reader_grace_s
    grace_ms = int((grace_s if reader_grace_s is None else reader_grace_s) * 1000)
    lineage, _ = lineage_in_index(state)
    base = (run["base_run"], int(run["base_step"])) if run.get("base_run") and run.get("base_step") else None
    protected = frozenset(c for c in (split_name(latest or ""), base) if c is not None)
    now_ms = state.server_now_ms()
    todo = plan(indexed(state, run["store"]), lineage, keep_last=keep, protected=protected, old_ms=now_ms - max(grace_ms, 3_600_000))
    apply(store, state, todo, last_run=last_run, grace_ms=grace_ms)
    return todo


def apply(store: Store, state: JobState, todo: Plan, *, last_run: str, grace_ms: int) -> None:
    """Do what ``plan`` said, as far as Redis still agrees."""
    for run, step in [*todo.retire, *todo.sweep]:
        if not _retire(state, last_run, run, step):
            continue
        try:
            manifest = _tombstone(store, state, run, step)
        except IntegrityError as exc:  # what it names is not known, so nothing of it is touched
            log.error("run %s step %d cannot be retired: %s", run, step, exc)
            continue
        if manifest is None or manifest.created_at + grace_ms <= state.server_now_ms():
            _delete(store, run, step, manifest)
            _forget(state, run, step)
    for run, step in todo.forget:
        _forget(state, run, step)


def _retire(state: JobState, last_run: str, run: str, step: int) -> bool:
    keys = state.keys
    answer = state.call(
        "retention_retire", [keys.meta, keys.run(last_run), keys.restore(last_run), keys.ckpt(run, step)], [last_run, f"{run}/{step}"]
    )
    return bool(int(answer))


def _tombstone(store: Store, state: JobState, run: str, step: int) -> Manifest | None:
    """The tombstone that stands for the checkpoint from now on; None: there is no record left to replace."""
    try:
        manifest = read_manifest(store, run, step)
    except NotFound:
        return None
    if manifest.decision == "commit":
        manifest = replace(manifest, decision="tombstone", created_at=state.server_now_ms(), reason="retention")
        store.put(manifest_key(run, step), manifest.encode())
        failpoint("retention.after_tombstone")
        log.info("run %s step %d is retired; its objects go when readers have had their time", run, step)
    return manifest


def _delete(store: Store, run: str, step: int, manifest: Manifest | None) -> None:
    for part in manifest.parts if manifest is not None else ():
        store.delete(part.object)


def _forget(state: JobState, run: str, step: int) -> None:
    keys = state.keys
    state.call("retention_forget", [keys.ckpts, keys.ckpt(run, step), keys.parts(run, step)], [f"{run}/{step}"])
