"""What a run continues: fixed once, before its first part is published and before any rank returns from a collective restore.

    run_base CUT      Redis: the lineage ends at the base from now on, so a late commit of another branch is ABANDONED
    runs/RUN.json     store: put-if-absent
    run_base SET      Redis: the record is in the store

Killed after CUT, nothing is in the store, and the next run starts from the lineage as cut, at a checkpoint that was verified. Killed after
the record, the store names a run that saved nothing, and its chain is right. In both cases every rank of the run is still waiting.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

from dtr.checkpoint.keeping.rebuild import rebuild_missing
from dtr.checkpoint.lineage import Checkpoint, Lineage, Link, chain
from dtr.checkpoint.manifest import RunRecord
from dtr.checkpoint.restoring.candidates import name_of, newest_commit
from dtr.checkpoint.survey import indexed, lineage_in_index, lineage_of, links_of, read_record, record_key, records, survey
from dtr.errors import (
    AlreadyExists,
    CheckpointConflict,
    CheckpointError,
    StateCorrupt,
    UnsavedLineage,
)
from dtr.failpoints import failpoint
from dtr.session import Session
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["Held", "fix", "held", "is_known", "know", "settle"]

log = logging.getLogger(__name__)


# The runs of this process whose base is SET, as it learned by a restore that returned or a first save; and the store of each.
_known: weakref.WeakKeyDictionary[Session, dict[str, str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What Redis says of a run: ``state`` is NONE, CUT or SET."""

    state: str
    base: Checkpoint | None
    store: str


def held(state: JobState, run: str) -> Held:
    """What ``run`` continues, as Redis has it."""
    with translate(state.url):
        base_state, base_run, base_step, store = state.redis.hmget(state.keys.run(run), ["base_state", "base_run", "base_step", "store"])
    try:
        base = (base_run, int(base_step)) if base_run and base_step else None
    except ValueError as exc:
        raise StateCorrupt(f"{state.keys.run(run)} has a base_step that is no step: {base_step!r}") from exc
    return Held(state=base_state or "NONE", base=base, store=store or "")


def is_known(session: Session, run: str, url: str) -> bool:
    """Whether this process has learned that the base of ``run`` is SET, by a restore that returned or a first save. Asks nobody.

    Raises:
        CheckpointConflict: it is, and the run saves into another store than ``url``.
    """
    known = _known.get(session, {}).get(run)
    if known is not None and known != url:
        raise CheckpointConflict(f"run {run} saves into {known}, this manager into {url}: a run has one store", run=run)
    return known is not None


def fix(session: Session, store: Store, url: str, base: Checkpoint | None) -> None:
    """Make ``base`` (None: nothing) what the session's run continues; returns when it is SET. Any rank may call it; the first wins.

    Args:
        session: in the run.
        store: of the job.
        url: of the store as users name it, for the records.
        base: the checkpoint that was restored.

    Raises:
        CheckpointConflict: the run continues something else.
        RosterChanged: the run ended.
        StoreUnavailable, CoordinatorUnavailable: it is not known how far this came; call it again.
    """
    holdings = survey(store)
    found = records(store, holdings)
    links = links_of(found)
    lineage = lineage_of(store, url, holdings, session.state)
    run = session.run.id
    if base is None or lineage.takes(*base):
        after = lineage.after(run, base)
    else:
        after = chain({**links, run: Link(run=run, parent_run=base[0], parent_step=base[1])}, run)
    newest_ms = max((link.created_at_ms for name, link in links.items() if name != run), default=0)
    base_at_ms = int(_step(session, "CUT", base, url, newest_ms, after)[3])
    failpoint("restore.before_record")
    _put(store, _record(session, base, url, base_at_ms))
    failpoint("restore.after_record")
    try:
        did = _step(session, "SET", base, url, newest_ms, after)[4]
    except CheckpointError as exc:
        if exc.facts.get("code") != "CKPT_STATE":
            raise
        log.warning("Redis lost the cut of run %s: cutting again", run)  # a failover; the record in the store stands
        _step(session, "CUT", base, url, newest_ms, after)
        did = _step(session, "SET", base, url, newest_ms, after)[4]
    failpoint("restore.after_base")
    if did:
        log.info("run %s continues %s", run, name_of(*base) if base else "nothing: a fresh start")


def settle(session: Session, store: Store, url: str, *, restored: Checkpoint | None, fresh: bool) -> None:
    """Fix the base at the first save of a run that nobody restored collectively; returns when it is SET.

    Args:
        session: in the run.
        store: of the job.
        url: of the store as users name it.
        restored: what this process restored before the run had a base.
        fresh: start anew on purpose, though the store holds checkpoints.

    Raises:
        UnsavedLineage: nothing was restored, and the store holds checkpoints of the job.
        CheckpointConflict: the run continues something else, or saves into another store.
        StoreUnavailable, CoordinatorUnavailable: try again later.
    """
    now = held(session.state, session.run.id)
    if now.state == "SET":
        know(session, now.store)
        is_known(session, session.run.id, url)
        return
    if now.state == "CUT":  # another rank is about to set it: whoever comes may finish that
        fix(session, store, url, now.base)
        know(session, url)
        return
    store.probe()
    rebuild_missing(session.state, store, url)
    if restored is None and not fresh:
        newest = newest_commit(store, sorted(survey(store).decided, reverse=True)) or _newest_indexed(session.state, url)
        if newest is not None:
            raise UnsavedLineage(
                f"{url} holds checkpoints of job {session.settings.job}, such as {name_of(*newest)}, and run {session.run.id} restored "
                "none: call restore() before the first save, or pass fresh=True to the manager to start anew on purpose",
                run=session.run.id,
            )  # fmt: skip
    fix(session, store, url, restored)
    know(session, url)


def know(session: Session, url: str) -> None:
    """This process goes on from the base of its run, and saves into this store."""
    _known.setdefault(session, {})[session.run.id] = url


def _newest_indexed(state: JobState, url: str) -> Checkpoint | None:
    """The newest commit that Redis lists for this store: also one that the store has lost is no reason to start anew silently."""
    lineage, where = lineage_in_index(state)
    commits = [(c.run, c.step) for c in indexed(state, url) if c.state == "COMMITTED" and not c.retired]
    return next(iter(lineage.newest_first(commits)), None) if where == url else None


def _step(session: Session, phase: str, base: Checkpoint | None, url: str, newest_ms: int, after: Lineage) -> Any:
    keys, who, run, settings = session.state.keys, session.identity, session.run, session.settings
    base_run, base_step = base if base is not None else ("", "")
    ancestors = [word for pair in after.ancestors() for word in pair]
    return session.guarded(
        lambda: session.state.call(
            "run_base",
            [
                keys.meta, keys.roster, keys.run(run.id), keys.restore(run.id), keys.ckpt(*(base or (run.id, 0))), keys.lineage, keys.wake,
                keys.events,
            ],
            [
                who.state_id, run.id, who.worker_id, run.rank, run.roster[who.worker_id].incarnation, phase, base_run, base_step, url,
                newest_ms, settings.keep_last, int(settings.reader_grace_s * 1000), settings.keep_every, settings.keep_best or "",
                int(settings.keep_for_s * 1000), *ancestors,
            ],
        )
    )  # fmt: skip


def _record(session: Session, base: Checkpoint | None, url: str, base_at_ms: int) -> RunRecord:
    run = session.run
    return RunRecord(
        job=session.settings.job,
        run=run.id,
        parent_run=base[0] if base else None,
        parent_step=base[1] if base else None,
        world_size=run.world_size,
        roster={worker: f"{member.rank} {member.incarnation} {member.host}" for worker, member in run.roster.items()},
        store=url,
        created_at=base_at_ms,
    )


def _put(store: Store, record: RunRecord) -> None:
    """Put the run's record; one that is there already must say the same."""
    try:
        store.put(record_key(record.run), record.encode(), if_absent=True)
    except AlreadyExists:
        _compare(read_record(store, record.run), record)


def _compare(there: RunRecord, ours: RunRecord) -> None:
    if (there.parent_run, there.parent_step) != (ours.parent_run, ours.parent_step):
        raise CheckpointConflict(
            f"the store says that run {ours.run} continues {there.parent_run}/{there.parent_step}, this rank would continue "
            f"{ours.parent_run}/{ours.parent_step}", run=ours.run,
        )  # fmt: skip
