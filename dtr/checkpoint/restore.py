"""Restore a state: for a run collectively, or for whoever only wants to read.

A collective restore fixes what the run continues, once; see :mod:`dtr.checkpoint.agreement`. Reading never changes anything, needs no
Redis, and takes the newest checkpoint of the lineage that verifies; an older one only because of damage, which it reports.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from dtr.checkpoint import base
from dtr.checkpoint.agreement import Agreement, BaseIsSet, restore_failed
from dtr.checkpoint.candidates import Candidate, Offer, gather, name_of, newest_commit
from dtr.checkpoint.lineage import Checkpoint
from dtr.checkpoint.patience import patiently
from dtr.checkpoint.payload import read_state
from dtr.checkpoint.rebuild import rebuild_missing
from dtr.checkpoint.settling import wait_until_settled
from dtr.checkpoint.survey import Indexed, indexed, lineage_of, survey
from dtr.errors import CoordinatorUnavailable, IntegrityError, NoCheckpoint, WorldSizeMismatch
from dtr.session import Session
from dtr.state.exchange import Exchange
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["Restored", "newest_settled", "read_newest", "restore_run"]

log = logging.getLogger(__name__)

STORE_PATIENCE_S: Final = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A state that was saved at ``step`` of ``run``; its arrays are writable. ``seconds`` it took, ``size_bytes`` this rank's part."""

    state: Any = field(repr=False)
    step: int
    run: str
    size_bytes: int = 0
    seconds: float = 0.0


def restore_run(session: Session, store: Store, url: str, *, attempt: int, step: int | None, fresh: bool) -> Restored | None:
    """Restore the session's run; collective: returns on every rank, with the same checkpoint, when what the run continues is fixed.

    A rank that comes when that was fixed without it (its own call was cut short) gets the very same checkpoint.

    Args:
        session: in a run whose base is not fixed.
        store: of the job.
        url: of the store as users name it.
        attempt: how often this run tried before, the same on every rank.
        step: only a checkpoint of this step; None: the newest.
        fresh: None is an answer if there is no checkpoint at all.

    Raises:
        NoCheckpoint, RestoreFailed, WorldSizeMismatch, RosterChanged, CoordinatorUnavailable, StoreUnavailable.
    """
    started, patience_s = time.monotonic(), STORE_PATIENCE_S

    def persist(call: Callable[[], T]) -> T:
        return patiently(call, patience_s=patience_s, what=f"run {session.run.id} can restore", check=session.check, clock=session.clock)

    now = persist(lambda: base.held(session.state, session.run.id))
    if now.state == "SET":
        base.know(session, now.store)
        return _late(session, store, url, now.base, step, fresh=fresh)
    if session.run.rank == 0:
        persist(store.probe)
        persist(lambda: rebuild_missing(session.state, store, url))
    exchange = Exchange(session.settings.redis_url, f"dtr-restore-{session.worker_id}")
    try:
        persist(lambda: wait_until_settled(session, exchange, store, url))
        reached = Agreement(
            session, exchange, attempt=attempt, offer=persist(lambda: _offer(session, store, url, step)), fresh=fresh and step is None,
            read=lambda candidate: read_state(store, candidate.part, patience_s=patience_s, clock=session.clock),
            fix_base=lambda chosen: persist(lambda: base.fix(session, store, url, chosen)),
            patience_s=session.settings.form_timeout_s,
        ).reach()  # fmt: skip
    except BaseIsSet:
        base.know(session, url)
        return _late(session, store, url, base.held(session.state, session.run.id).base, step, fresh=fresh)
    except NoCheckpoint as exc:
        if step is None:
            raise
        raise NoCheckpoint(f"{url} holds no checkpoint of step {step} on the job's lineage", **{**exc.facts, "step": step}) from None
    finally:
        exchange.close()
    base.know(session, url)
    return None if reached is None else _restored(*reached, started)


def _offer(session: Session, store: Store, url: str, step: int | None) -> Offer:
    run, holdings, listed = session.run, survey(store), indexed(session.state, url)
    return gather(
        store, lineage_of(store, url, holdings, session.state), holdings, rank=run.rank, world_size=run.world_size, step=step,
        retired=_retired(listed), indexed=_committed(listed),
    )  # fmt: skip


def _retired(listed: Iterable[Indexed]) -> frozenset[Checkpoint]:
    return frozenset((c.run, c.step) for c in listed if c.retired)


def _committed(listed: Iterable[Indexed]) -> frozenset[Checkpoint]:
    return frozenset((c.run, c.step) for c in listed if c.state == "COMMITTED" and not c.retired)


def _late(session: Session, store: Store, url: str, continued: Checkpoint | None, step: int | None, *, fresh: bool) -> Restored | None:
    """What the run continues; of a run that began anew, the newest that it has committed since."""
    run, only = session.run, continued if step is None else None
    return read_newest(store, url, session.state, rank=run.rank, world_size=run.world_size, step=step, fresh=fresh, only=only)


def read_newest(
    store: Store, url: str, state: JobState | None, *, rank: int, world_size: int, step: int | None, fresh: bool,
    only: Checkpoint | None = None,
) -> Restored | None:  # fmt: skip
    """Read the newest checkpoint of the lineage that verifies, and change nothing.

    Args:
        store: of the job.
        url: of the store as users name it.
        state: Redis, which knows the lineage best; None, or one that is away: the store's records tell it.
        rank: whose part to read.
        world_size: ranks of the reader's side.
        step: only a checkpoint of this step; None: the newest.
        fresh: None is an answer if there is no checkpoint at all.
        only: no other checkpoint than this one.

    Raises:
        NoCheckpoint, RestoreFailed, WorldSizeMismatch, StoreUnavailable.
    """
    started = time.monotonic()

    def look() -> Offer:
        holdings, listed = survey(store), _listed(state, url)
        lineage = lineage_of(store, url, holdings, state)
        if only is not None:
            holdings, listed = replace(holdings, decided=holdings.decided & {only}), [c for c in listed if (c.run, c.step) == only]
        return gather(store, lineage, holdings, rank=rank, world_size=world_size, step=step, indexed=_committed(listed))

    offer = patiently(look, patience_s=STORE_PATIENCE_S, what=f"{url} can be read")
    reasons = dict(offer.rejected)
    for candidate in offer.candidates:
        try:
            found = read_state(store, candidate.part, patience_s=STORE_PATIENCE_S)
        except IntegrityError as exc:
            reasons[candidate.name] = exc.message
            continue
        for name, reason in reasons.items():
            log.warning("checkpoint %s was not restored: %s", name, reason)
        return _restored(candidate, found, started)
    _check_nothing(offer, reasons, url, step, fresh=fresh)
    return None


def newest_settled(session: Session, store: Store, url: str) -> Checkpoint | None:
    """The newest commit of the lineage, once what is staged is decided: what a process continues that goes on with the state it has."""
    exchange = Exchange(session.settings.redis_url, f"dtr-settle-{session.worker_id}")
    try:
        wait_until_settled(session, exchange, store, url)
    finally:
        exchange.close()
    holdings = survey(store)
    return newest_commit(store, lineage_of(store, url, holdings, session.state).newest_first(holdings.decided))


def _check_nothing(offer: Offer, reasons: dict[str, str], url: str, step: int | None, *, fresh: bool) -> None:
    """Raise unless nothing is a right answer."""
    if offer.misfit:
        raise WorldSizeMismatch(offer.misfit)
    if reasons:
        raise restore_failed(reasons)
    if step is not None:
        raise NoCheckpoint(f"{url} holds no checkpoint of step {step} on the job's lineage", step=step)
    if not fresh:
        raise NoCheckpoint(f"{url} holds no checkpoint on the job's lineage; pass fresh=True to start anew on purpose")


def _restored(candidate: Candidate, found: Any, started: float) -> Restored:
    seconds = time.monotonic() - started
    log.info("restored %s in %.2f s (%d bytes)", name_of(candidate.run, candidate.step), seconds, candidate.part.size_bytes)
    return Restored(state=found, step=candidate.step, run=candidate.run, size_bytes=candidate.part.size_bytes, seconds=seconds)


def _listed(state: JobState | None, url: str) -> list[Indexed]:
    """What Redis lists; nothing if it is away, since reading needs it for nothing else."""
    try:
        return indexed(state, url) if state is not None else []
    except CoordinatorUnavailable:
        return []
