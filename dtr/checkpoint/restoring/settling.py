"""Before a restore: wait, bounded, for staged saves of the lineage to be decided, so that the newest one is not thrown away.

A save whose every part is in a slot commits without its trainers, usually within a second of their death. It is looked for in Redis (the
open checkpoints) and in this host's slots (complete ones that Redis has not heard of yet, or forgot). One that cannot become complete is
aborted by the uploaders; one that nobody uploads is not waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from dtr.checkpoint import parts
from dtr.checkpoint.lineage import Checkpoint, Lineage
from dtr.checkpoint.restoring.candidates import name_of, newest_commit
from dtr.checkpoint.staging.slots import scan_job
from dtr.checkpoint.survey import Holdings, lineage_of, survey
from dtr.config import Settings
from dtr.errors import RosterChanged
from dtr.session import Session
from dtr.state.client import translate
from dtr.state.exchange import MAX_BLOCK_MS, Exchange
from dtr.state.job import JobState
from dtr.state.keys import uploader
from dtr.store import Store

__all__ = ["PATIENCE_S", "undecided", "wait_until_settled"]

log = logging.getLogger(__name__)

PATIENCE_S: Final = 15.0  # without any progress
LONGEST_S: Final = 600.0
WITHOUT_UPLOADER_S: Final = 3.0  # one may be starting; nothing moves without it


def wait_until_settled(session: Session, exchange: Exchange, store: Store, url: str, *, patience_s: float = PATIENCE_S) -> None:
    """Return when no save newer than the newest commit of the lineage is on its way, or nothing moved for ``patience_s``.

    An upload that goes on is waited for, up to ten minutes: its bytes are complete in a slot, and an older checkpoint is lost work.

    Raises:
        RosterChanged: the run ended meanwhile.
    """
    clock, state = session.clock, session.state
    started, said, moved_at, before = clock.monotonic(), False, clock.monotonic(), _Progress()
    streams = {state.keys.events: _newest_event(session), state.keys.wake: session.run.wake_id}
    while True:
        holdings = survey(store)
        pending = undecided(state, session.settings, store, url, holdings, lineage_of(store, url, holdings, state))
        if not pending:
            return
        alive, progress = _look(session, pending)
        if progress != before:
            before, moved_at = progress, clock.monotonic()
        waited_s, still_s = clock.monotonic() - started, clock.monotonic() - moved_at
        if still_s >= (patience_s if alive else min(patience_s, WITHOUT_UPLOADER_S)) or waited_s >= LONGEST_S:
            names = ", ".join(name_of(*checkpoint) for checkpoint in pending)
            log.warning("restoring without %s, still undecided after %.1f s%s", names, waited_s, "" if alive else " (no uploader is alive)")
            return
        if not said:
            said = True
            log.info(
                "waiting for %s to be decided, at most %g s without progress",
                ", ".join(name_of(*checkpoint) for checkpoint in pending),
                patience_s,
            )
        streams |= {stream: entry_id for stream, entry_id, _ in exchange.wait(streams, MAX_BLOCK_MS)}
        session.guarded(_still_open(session))


def _newest_event(session: Session) -> str:
    state = session.state
    with translate(state.url):
        newest = state.redis.xrevrange(state.keys.events, count=1)
    return str(newest[0][0]) if newest else "0-0"


def undecided(state: JobState, settings: Settings, store: Store, url: str, holdings: Holdings, lineage: Lineage) -> list[Checkpoint]:
    """Undecided saves of the lineage that are newer than its newest commit: those in Redis, and those in this host's slots."""
    staged = {
        (found.record.run, found.record.step)
        for found in scan_job(settings.staging, settings.job)
        if found.kind == "STAGED" and found.record is not None and found.record.store == url
    }
    undecided = {name for name in {*parts.open_checkpoints(state), *staged} if name not in holdings.decided}
    newest = newest_commit(store, lineage.newest_first(holdings.decided)) if undecided else None
    order = lineage.newest_first({*undecided, *([newest] if newest else [])})
    return order[: order.index(newest)] if newest else order


_Progress = frozenset[tuple[str, int, int, str, int]]  # run, step, rank, state and bytes of each part


def _look(session: Session, pending: list[Checkpoint]) -> tuple[bool, _Progress]:
    """Whether an uploader lives on this host or on one that holds a part; and how far the parts are."""
    state, hosts, progress = session.state, {session.host}, set()
    for run, step in pending:
        view = parts.read(state, run, step)
        for rank, part in view.parts.items() if view is not None else ():
            progress.add((run, step, rank, part.state, part.progress_bytes))
            if part.state != "done":
                hosts.add(part.host)
    with translate(state.url):
        return any(state.redis.exists(uploader(host)) for host in sorted(hosts)), frozenset(progress)


def _still_open(session: Session) -> Callable[[], None]:
    def check() -> None:
        state = session.state
        with translate(state.url):
            current = state.redis.hget(state.keys.meta, "run")
        if current != session.run.id:
            raise RosterChanged(f"run {session.run.id} ended")

    return check
