"""Restore a state: for a run collectively, or for whoever only wants to read.

A collective restore fixes what the run continues, once (``agreement``). Reading never changes anything, needs no
Redis, and takes the newest checkpoint of the lineage that verifies; an older one only because of damage, which it reports.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

from dtr.checkpoint import base
from dtr.checkpoint.keeping.rebuild import rebuild_missing
from dtr.checkpoint.lineage import Checkpoint
from dtr.checkpoint.patience import patiently
from dtr.checkpoint.restoring.agreement import Agreement, BaseIsSet, restore_failed
from dtr.checkpoint.restoring.attempts import quarantined, tallies
from dtr.checkpoint.restoring.cache import Cache
from dtr.checkpoint.restoring.candidates import ENOUGH, Candidate, Offer, Wish, gather, name_of, newest_commit
from dtr.checkpoint.restoring.contract import Where
from dtr.checkpoint.restoring.nearby import Nearby, Read
from dtr.checkpoint.restoring.settling import wait_until_settled
from dtr.checkpoint.survey import Holdings, Indexed, indexed, lineage_of, survey
from dtr.clock import SYSTEM, Clock
from dtr.config import Settings
from dtr.errors import (
    CoordinatorUnavailable,
    IntegrityError,
    NoCheckpoint,
    RestoreFailed,
    StateCorrupt,
    WorldSizeMismatch,
)
from dtr.session import Session
from dtr.state.exchange import Exchange
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["Reader", "Restored", "look", "newest_settled", "read_newest", "restore_run"]

log = logging.getLogger(__name__)

STORE_PATIENCE_S: Final = 60.0
_LOOKS: Final = 10  # at a store in which everything seen was retired meanwhile
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A state that was saved at ``step`` of ``run``; its arrays are writable.

    ``size_bytes`` is that of the parts that this rank read, ``source`` where they were: ``slot`` (still in memory), ``cache`` or
    ``store``; ``seconds`` is how long it took; ``data`` the data state of the step, by data set.
    """

    state: Any = field(repr=False)
    step: int
    run: str
    size_bytes: int = 0
    seconds: float = 0.0
    source: Where = "store"
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Who restores from where, and what.

    Args:
        store: of the job.
        url: of the store as users name it.
        settings: staging and cache folders, and when a checkpoint is quarantined.
        wish: whose state, and of which checkpoints.
        fresh: None is an answer if there is no checkpoint at all.
        into: a state to fill; None: a new one.
    """

    store: Store
    url: str
    settings: Settings
    wish: Wish
    fresh: bool = False
    into: Any = field(default=None, repr=False)

    def nearby(self, patience_s: float, clock: Clock = SYSTEM) -> Nearby:
        """The places to read from."""
        return Nearby(
            self.store, self.url, job=self.settings.job, staging=self.settings.staging, cache=Cache.of(self.settings),
            patience_s=patience_s, clock=clock,
        )  # fmt: skip

    def read(self, nearby: Nearby, candidate: Candidate) -> Read:
        """The state of one candidate, verified."""
        wish = self.wish
        return nearby.read(candidate.parts, rank=wish.rank, world_size=wish.world_size, only=wish.only, into=self.into)

    def check_asked(self, nearby: Nearby, candidate: Candidate) -> None:
        """Raise InvalidInput if what is wished for cannot be had of this candidate."""
        wish = self.wish
        if wish.only is not None or self.into is not None:
            nearby.check_asked(candidate.parts, rank=wish.rank, world_size=wish.world_size, only=wish.only, into=self.into)


def restore_run(session: Session, reader: Reader, *, attempt: int) -> Restored | None:
    """Restore the session's run; collective: returns on every rank, with the same checkpoint, when what the run continues is fixed.

    A rank that comes when that was fixed without it (its own call was cut short) gets the very same checkpoint.

    Args:
        session: in a run whose base is not fixed.
        reader: this rank's.
        attempt: how often this run tried before, the same on every rank.

    Raises:
        NoCheckpoint, RestoreFailed, WorldSizeMismatch, StateMismatch, RosterChanged, CoordinatorUnavailable, StoreUnavailable.
    """
    started, patience_s = time.monotonic(), STORE_PATIENCE_S
    store, url, step = reader.store, reader.url, reader.wish.step
    nearby = reader.nearby(patience_s, session.clock)

    def persist(call: Callable[[], T]) -> T:
        return patiently(call, patience_s=patience_s, what=f"run {session.run.id} can restore", check=session.check, clock=session.clock)

    now = persist(lambda: base.held(session.state, session.run.id))
    if now.state == "SET":
        base.know(session, now.store)
        return _late(session, reader, now.base)
    if session.run.rank == 0:
        persist(store.probe)
        persist(lambda: rebuild_missing(session.state, store, url))
    exchange = Exchange(session.settings.redis_url, f"dtr-restore-{session.worker_id}")
    try:
        persist(lambda: wait_until_settled(session, exchange, store, url))
        reached = Agreement(
            session, exchange, attempt=attempt, offer=persist(lambda: _offer(session, reader, nearby)), fresh=reader.fresh and step is None,
            read=partial(reader.read, nearby), check_asked=partial(reader.check_asked, nearby),
            fix_base=lambda chosen: persist(lambda: base.fix(session, store, url, chosen)), patience_s=session.settings.form_timeout_s,
        ).reach()  # fmt: skip
    except BaseIsSet:
        base.know(session, url)
        return _late(session, reader, base.held(session.state, session.run.id).base)
    except NoCheckpoint as exc:
        if step is None:
            raise
        raise NoCheckpoint(f"{url} holds no checkpoint of step {step} on the job's lineage", **{**exc.facts, "step": step}) from None
    except RestoreFailed as exc:
        raise _touched(exc, reader) from None
    finally:
        exchange.close()
    base.know(session, url)
    return None if reached is None else _restored(*reached, started)


def _offer(session: Session, reader: Reader, nearby: Nearby) -> Offer:
    state = session.state
    listed = indexed(state, reader.url)  # before the store: what commits in between would look as if the store had lost it
    holdings = survey(reader.store)
    lineage = lineage_of(reader.store, reader.url, holdings, state)
    refused = quarantined(tallies(state), reader.settings.restore_attempts)
    return gather(
        reader.store, lineage, holdings, nearby, reader.wish, retired=_retired(listed) | holdings.retiring, indexed=_committed(listed),
        refused=refused,
    )  # fmt: skip


def _retired(listed: Iterable[Indexed]) -> frozenset[Checkpoint]:
    return frozenset((c.run, c.step) for c in listed if c.retired)


def _committed(listed: Iterable[Indexed]) -> frozenset[Checkpoint]:
    return frozenset((c.run, c.step) for c in listed if c.state == "COMMITTED" and not c.retired)


def _late(session: Session, reader: Reader, continued: Checkpoint | None) -> Restored | None:
    """What the run continues; of a run that began anew, the newest that it has committed since."""
    return read_newest(reader, session.state, this=continued if reader.wish.step is None else None)


def read_newest(reader: Reader, state: JobState | None, *, this: Checkpoint | None = None) -> Restored | None:
    """Read the newest checkpoint of the lineage that verifies, and change nothing.

    Args:
        reader: whose.
        state: Redis, which knows the lineage best; None, or one that is away: the store's records tell it.
        this: no other checkpoint than this one.

    Raises:
        NoCheckpoint, RestoreFailed, WorldSizeMismatch, StateMismatch, StoreUnavailable.
    """
    started, nearby = time.monotonic(), reader.nearby(STORE_PATIENCE_S)
    offer = patiently(lambda: look(reader, nearby, state, this=this), patience_s=STORE_PATIENCE_S, what=f"{reader.url} can be read")
    reasons = dict(offer.rejected)
    for candidate in offer.candidates:
        try:
            found = reader.read(nearby, candidate)
        except IntegrityError as exc:
            reasons[candidate.name] = exc.message
            continue
        for name, reason in reasons.items():
            log.warning("checkpoint %s was not restored: %s", name, reason)
        return _restored(candidate, found, started)
    _check_nothing(offer, reasons, reader)
    return None


def look(reader: Reader, nearby: Nearby, state: JobState | None, *, this: Checkpoint | None = None, enough: int = ENOUGH) -> Offer:
    """What a reader outside of any run could restore; with Redis away, by the store alone.

    A job that is alive may commit and retire meanwhile. Where that left nothing of what was seen, it is looked again.
    """
    for _ in range(_LOOKS):
        listed = _listed(state, reader.url)  # before the store: what commits in between would look as if the store had lost it
        holdings = survey(reader.store)
        offer = _look(reader, nearby, state, this, holdings, listed, enough)
        if offer.candidates or offer.misfit or survey(reader.store).decided <= holdings.decided:
            break
    return offer


def _look(
    reader: Reader, nearby: Nearby, state: JobState | None, this: Checkpoint | None, holdings: Holdings, listed: list[Indexed], enough: int
) -> Offer:
    refused = _refused(state, reader.settings)
    lineage = lineage_of(reader.store, reader.url, holdings, state)
    if this is not None:
        holdings = replace(holdings, decided=holdings.decided & {this})
        listed, refused = [c for c in listed if (c.run, c.step) == this], {}
    return gather(reader.store, lineage, holdings, nearby, reader.wish, indexed=_committed(listed), refused=refused, enough=enough)


def _refused(state: JobState | None, settings: Settings) -> dict[Checkpoint, str]:
    try:
        return quarantined(tallies(state), settings.restore_attempts) if state is not None else {}
    except (CoordinatorUnavailable, StateCorrupt):
        return {}


def newest_settled(session: Session, store: Store, url: str) -> Checkpoint | None:
    """The newest commit of the lineage, once what is staged is decided: what a process continues that goes on with the state it has."""
    exchange = Exchange(session.settings.redis_url, f"dtr-settle-{session.worker_id}")
    try:
        wait_until_settled(session, exchange, store, url)
    finally:
        exchange.close()
    holdings = survey(store)
    return newest_commit(store, lineage_of(store, url, holdings, session.state).newest_first(holdings.decided))


def _check_nothing(offer: Offer, reasons: dict[str, str], reader: Reader) -> None:
    """Nothing was restored: an error, unless there is nothing at all and that is an answer."""
    step = reader.wish.step
    if offer.misfit:
        raise WorldSizeMismatch(offer.misfit)
    if reasons:
        raise _touched(restore_failed(reasons), reader)
    if step is not None:
        raise NoCheckpoint(f"{reader.url} holds no checkpoint of step {step} on the job's lineage", step=step)
    if not reader.fresh:
        raise NoCheckpoint(f"{reader.url} holds no checkpoint on the job's lineage; pass fresh=True to start anew on purpose")


def _touched(failed: RestoreFailed, reader: Reader) -> RestoreFailed:
    """The same error, which also says what became of the state that was to be filled."""
    if reader.into is None:
        return failed
    return RestoreFailed(f"{failed.message}. The arrays of into= may have been overwritten meanwhile.", **failed.facts)


def _restored(candidate: Candidate, found: Read, started: float) -> Restored:
    seconds, name = time.monotonic() - started, name_of(candidate.run, candidate.step)
    log.info("restored %s from the %s in %.2f s (%d bytes)", name, found.where, seconds, found.size_bytes)
    return Restored(
        state=found.state, step=candidate.step, run=candidate.run, size_bytes=found.size_bytes, seconds=seconds, source=found.where,
        data=candidate.manifest.data,
    )  # fmt: skip


def _listed(state: JobState | None, url: str) -> list[Indexed]:
    """What Redis lists; nothing if it is away, since reading needs it for nothing else."""
    try:
        return indexed(state, url) if state is not None else []
    except CoordinatorUnavailable:
        return []
