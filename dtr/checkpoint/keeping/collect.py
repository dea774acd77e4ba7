"""Let commits go that no rule keeps, one crash-proof step after the other; by policy, or because a person removes one.

    retire      Redis: refused for the newest commit, a pinned one, what the newest run continues, and while that is being chosen
    retiring    store: retiring.json, so that whoever fills an index from now on has it as retired too
    retire      Redis, once more: it is still the same state, and it still says so
    pinned?     store, once more: a pin that Redis has lost since counts
    tombstone   store: replaces the manifest; nobody starts reading it any more, and nothing makes it a commit again
    delete      the objects, those of late uploaders too, once the grace of readers under way has passed since the tombstone was written
    forget      Redis: the checkpoint leaves the index; the tombstone stays, so that nothing late can revive it

Each step is decided by what the one before it left behind, so a collector may die anywhere, sleep for an hour, or run twice at once.
Why a sleeper harms nobody: while Redis says retired, no restore chooses the checkpoint. If Redis lost that and was filled again, then
either the store was read before ``retiring`` was put, and the second question finds another state, or after it, and the new index has
it retired. After the tombstone there is nothing to choose, and whoever read before has its grace.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from dtr.checkpoint import records
from dtr.checkpoint.delta.collection import collect_chunks
from dtr.checkpoint.keeping import pins
from dtr.checkpoint.keeping.rebuild import index_checkpoint
from dtr.checkpoint.keeping.retention import Plan, Policy, plan
from dtr.checkpoint.lineage import Checkpoint, Lineage, split_name
from dtr.checkpoint.manifest import Manifest
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.survey import indexed, lineage_in_index, manifest_key, read_manifest, retiring_key
from dtr.config import Settings
from dtr.datasets.timemachine.retiring import retire_journals
from dtr.errors import CheckpointProtected, IntegrityError, NoCheckpoint, NotFound, Recovering, StateLost
from dtr.failpoints import failpoint
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store, open_store

__all__ = ["Act", "Collected", "Done", "Scene", "collect", "collect_due", "look", "remove"]

log = logging.getLogger(__name__)

Act = Literal["retired", "deleted", "forgotten", "kept", "damaged"]
BY_POLICY: Final = "retention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a collector saw when it decided: the state of Redis, the newest run with its store and rules, the lineage."""

    state_id: str
    last_run: str
    store_url: str
    policy: Policy
    lineage: Lineage
    protected: dict[Checkpoint, str]
    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of one checkpoint. ``retired``: tombstoned, its objects stay for ``left_s`` more; ``kept`` says ``why``."""

    run: str
    step: int
    act: Act
    why: str = ""
    left_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one collection decided, and what it did about it.

    ``chunks``: those of delta saves that belonged to no checkpoint any more; ``journals``: those of runs that the job left behind.
    """

    plan: Plan = field(default_factory=Plan)
    done: tuple[Done, ...] = ()
    chunks: int = 0
    journals: int = 0


def look(state: JobState, store: Store, policy: Policy | None = None, *, default: Policy | None = None) -> Scene | str:
    """What there is to decide by; or why nothing can be decided now.

    Args:
        state: the job.
        store: of the job (the folder of the job in the store).
        policy: the rules; default: those that the newest run was started with.
        default: the rules of a run whose own went with Redis; None: nothing is decided by others, which might keep less.
    """
    keys = state.keys
    with translate(state.url):
        state_id, phase, last_run, latest = state.redis.hmget(keys.meta, ["state_id", "phase", "last_run", "latest"])
        run = state.redis.hgetall(keys.run(last_run)) if last_run else {}
    if not state_id or phase != "READY":
        return "Redis holds no state of this job that is ready"
    if not last_run:
        return "no run of this job has begun since Redis was filled: the rules come with the next run"
    if run.get("base_state") != "SET":
        return f"run {last_run} has not yet fixed what it continues: it neither restored nor saved; retention waits for a run that does"
    if open_store(run["store"]).child(state.job).url != store.url:
        return f"the newest run lives in another store: {run['store']}"
    if policy is None and default is None and not run.get("keep_last"):
        return f"the rules of run {last_run} went with what Redis lost: they come with the next run"
    protected = {}
    if (newest := split_name(latest or "")) is not None:
        protected[newest] = "newest"
    if run.get("base_run") and (base := split_name(f"{run['base_run']}/{run.get('base_step')}")) is not None:
        protected[base] = f"run {last_run} continues it"
    lineage, _ = lineage_in_index(state)
    chosen = policy or Policy.of_run(run, default or Policy.of_settings(Settings.load()), keys.run(last_run))
    return Scene(
        state_id=state_id, last_run=last_run, store_url=run["store"], policy=chosen, lineage=lineage, protected=protected,
        now_ms=state.server_now_ms(),
    )  # fmt: skip


def collect(store: Store, state: JobState, *, policy: Policy | None = None, dry_run: bool = False, all_chunks: bool = False) -> Collected:
    """Apply retention to the job's store.

    Does nothing if the newest run lives in another store, or has not yet fixed what it continues.

    Args:
        store: of the job.
        state: the job.
        policy: the rules; default: those that the newest run was started with.
        dry_run: decide only.
        all_chunks: look for chunks that nothing needs even if no checkpoint went, and for journals of runs of which nothing is left.

    Raises:
        StoreUnavailable, CoordinatorUnavailable: the rest is done at the next call.
    """
    scene = look(state, store, policy)
    if isinstance(scene, str):
        log.debug("job %s: nothing is collected: %s", state.job, scene)
        return Collected()
    todo = plan(indexed(state, scene.store_url), scene.lineage, scene.policy, protected=scene.protected, now_ms=scene.now_ms)
    failpoint("retention.after_plan")
    done = () if dry_run else tuple(_apply(store, state, scene, todo))
    journals = retire_journals(store, lambda: _lineage_now(state, store), dry_run=dry_run) if all_chunks else ()
    if all_chunks or any(one.act in {"deleted", "forgotten"} for one in done):
        return Collected(plan=todo, done=done, chunks=_collect_chunks(store, dry_run=dry_run), journals=len(journals))
    return Collected(plan=todo, done=done)


def _lineage_now(state: JobState, store: Store) -> Lineage | None:
    scene = look(state, store)
    return None if isinstance(scene, str) else scene.lineage


def _collect_chunks(store: Store, *, dry_run: bool) -> int:
    """Delete the chunks that no checkpoint names any more; how many."""
    try:
        return len(collect_chunks(store, dry_run=dry_run).deleted)
    except IntegrityError as exc:  # what it names is not known, so nothing is deleted
        log.error("no chunk of %s can be deleted: %s", store.url, exc)
        return 0


def collect_due(state: JobState, store_at: Callable[[str], Store], interval_s: float) -> str:
    """:func:`collect`, if it is the caller's turn: one collector a job and interval, over all hosts.

    Args:
        state: the job.
        store_at: opens the job's folder in the store of this URL.
        interval_s: least time between two.

    Returns:
        EARLY, UNKNOWN (Redis knows no store of the job), or COLLECTED and how many checkpoints something was done about.
    """
    if not int(state.call("retention_due", [state.keys.retention], [secrets.token_hex(6), int(interval_s * 1000)])):
        return "EARLY"
    with translate(state.url):
        last_run = state.redis.hget(state.keys.meta, "last_run")
        url = state.redis.hget(state.keys.run(last_run), "store") if last_run else None
    return f"COLLECTED {len(collect(store_at(url), state, all_chunks=True).done)}" if url else "UNKNOWN"


def remove(store: Store, state: JobState, names: Sequence[Checkpoint], *, policy: Policy | None = None) -> tuple[Done, ...]:
    """Retire these commits because a person wants it; their objects go with the grace. All are checked before the first one goes.

    Raises:
        NoCheckpoint: one of them is no commit.
        CheckpointProtected: one of them must stay: the newest, a pinned one, or what the newest run continues.
        StoreUnavailable, CoordinatorUnavailable: those before are retired; call it again.
    """
    scene = look(state, store, policy)
    if isinstance(scene, str):
        raise CheckpointProtected(f"nothing can be removed now: {scene}")
    known = {(c.run, c.step): c for c in indexed(state, scene.store_url)}
    for name in names:
        word = known[name].state if name in known else index_checkpoint(state, store, scene.store_url, *name)
        if word not in {"COMMITTED", "ABANDONED"}:
            raise NoCheckpoint(f"{name_of(*name)} is {word.lower() or 'not'} in {scene.store_url}: only a commit can be removed")
        if name in scene.protected or pins.is_pinned(store, *name):
            why = scene.protected.get(name, "pinned: `dtr ckpt unpin` it first")
            raise CheckpointProtected(f"{name_of(*name)} must stay: {why}", run=name[0], step=name[1])
    done = []
    for name in names:
        done.append(_retire(store, state, scene, *name, reason="removed by a person"))
        if done[-1].act == "kept":
            raise CheckpointProtected(f"{name_of(*name)} must stay: {done[-1].why}", run=name[0], step=name[1])
    return tuple(done)


def _apply(store: Store, state: JobState, scene: Scene, todo: Plan) -> list[Done]:
    """Do what the plan says, as far as Redis and the store still agree."""
    done = []
    for run, step in [*todo.retire, *todo.sweep]:
        try:
            done.append(_retire(store, state, scene, run, step, reason=BY_POLICY))
        except IntegrityError as exc:  # what it names is not known, so nothing of it is touched
            log.error("run %s step %d cannot be retired: %s", run, step, exc)
            done.append(Done(run=run, step=step, act="damaged", why=exc.message))
    for run, step in todo.forget:
        _forget(state, run, step)
        done.append(Done(run=run, step=step, act="forgotten", why="it was aborted"))
    return done


def _retire(store: Store, state: JobState, scene: Scene, run: str, step: int, *, reason: str) -> Done:
    """Take one checkpoint as far as it may go now."""
    try:
        manifest: Manifest | None = read_manifest(store, run, step)
    except NotFound:
        manifest = None  # nothing that could be restored
    if manifest is not None and manifest.decision == "commit" and pins.is_pinned(store, run, step):
        pins.spare(state, store, run, step)
        return Done(run=run, step=step, act="kept", why="pinned")
    if why := _refused(state, scene, run, step, reason):
        return Done(run=run, step=step, act="kept", why=why)
    failpoint("retention.after_retire")
    if manifest is not None and manifest.decision == "commit":
        found = _tombstone(store, state, scene, manifest, reason)
        if isinstance(found, str):
            return Done(run=run, step=step, act="kept", why=found)
        manifest = found
    left_ms = 0 if manifest is None else manifest.created_at + scene.policy.grace_ms - state.server_now_ms()
    if left_ms > 0:
        return Done(run=run, step=step, act="retired", why=reason, left_s=left_ms / 1000)
    for key in _objects(store, manifest) if manifest is not None else ():
        store.delete(key)
        failpoint("retention.mid_delete")
    store.delete(retiring_key(run, step))
    failpoint("retention.before_forget")
    _forget(state, run, step)
    return Done(run=run, step=step, act="deleted", why=reason)


def _objects(store: Store, manifest: Manifest) -> list[str]:
    """What a retired checkpoint has in the store: what its manifest names, and what late uploaders put beside that."""
    folder = manifest_key(manifest.run, manifest.step).rpartition("/")[0]
    beside = {key for key in store.list(folder) if key.startswith(f"{folder}/part-")}
    return sorted(beside | {part.object for part in manifest.parts})


def _refused(state: JobState, scene: Scene, run: str, step: int, reason: str) -> str:
    """Retire it in Redis; why that was refused, '' if it was not."""
    keys = state.keys
    answer = state.call(
        "retention_retire",
        [keys.meta, keys.run(scene.last_run), keys.restore(scene.last_run), keys.ckpt(run, step), keys.events],
        [scene.state_id, scene.last_run, run, step, reason],
    )
    return "" if answer[0] == "RETIRED" else str(answer[1])


def _tombstone(store: Store, state: JobState, scene: Scene, manifest: Manifest, reason: str) -> Manifest | str:
    """The tombstone that stands for the checkpoint from now on; or why it stays, if things have changed since Redis was asked."""
    run, step = manifest.run, manifest.step
    store.put(retiring_key(run, step), records.encode({"run": run, "step": step, "reason": reason, "at": state.server_now_ms()}))
    failpoint("retention.after_retiring")
    try:
        why = _refused(state, scene, run, step, reason)
    except (StateLost, Recovering) as exc:
        why = str(exc)
    if why:
        store.delete(retiring_key(run, step))
        log.warning("run %s step %d stays after all: %s", run, step, why)
        return why
    failpoint("retention.before_tombstone")
    if pins.is_pinned(store, run, step):
        pins.spare(state, store, run, step)
        store.delete(retiring_key(run, step))
        return "pinned"
    tombstone = replace(manifest, decision="tombstone", created_at=state.server_now_ms(), reason=reason)
    store.put(manifest_key(run, step), tombstone.encode())
    failpoint("retention.after_tombstone")
    log.info("run %s step %d is retired (%s); its objects go when readers have had their time", run, step, reason)
    return tombstone


def _forget(state: JobState, run: str, step: int) -> None:
    keys = state.keys
    state.call("retention_forget", [keys.ckpts, keys.ckpt(run, step), keys.parts(run, step)], [name_of(run, step)])
