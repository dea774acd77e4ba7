"""The first save of a run fixes what the run continues, if no collective restore did; the trainer waits for that, but not for long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Final

from dtr.checkpoint import base
from dtr.checkpoint.lineage import Checkpoint
from dtr.checkpoint.restoring.restore import newest_settled
from dtr.errors import CheckpointAborted, RosterChanged, StaleIncarnation, StateLost, StoreRefused, Unavailable
from dtr.session import Session
from dtr.store import Store

__all__ = ["FirstSave"]

log = logging.getLogger(__name__)

PATIENCE_S: Final = 5.0


class FirstSave:
    """What one manager knows of the runs that it saves under.

    Args:
        store: of the job.
        url: of the store as users name it.
        fresh: a new lineage may begin, though the store holds checkpoints that nobody restored.
    """

    def __init__(self, store: Store, url: str, *, fresh: bool) -> None:
        self._store, self._url, self._fresh = store, url, fresh
        self._mutex = threading.Lock()
        self._postponed: set[str] = set()  # runs that are left to the background
        self.restored: Checkpoint | None = None  # what this process restored before it was in a run
        self.goes_on = False  # it has lost its run, and goes on with the state that it has

    def prepare(self, session: Session) -> None:
        """Fix what the session's run continues; with Redis or the store slow or away, the background does it later.

        Raises:
            UnsavedLineage, CheckpointConflict, RosterChanged, StoreRefused: the trainer has to do something about it.
        """
        run = session.run.id
        if base.is_known(session, run, self._url) or run in self._postponed:
            return
        outcome: Future[None] = Future()
        threading.Thread(target=_resolve, args=(outcome, partial(self._settle, session)), name="dtr-base", daemon=True).start()
        try:
            outcome.result(PATIENCE_S)
        except StoreRefused:
            raise
        except (Unavailable, FutureTimeout) as exc:
            self._postponed.add(run)
            log.warning("what run %s continues is not on record yet; until it is, its saves stay staged: %s", run, exc or "no answer yet")

    def finish(self, session: Session, run: str) -> None:
        """Return when what ``run`` continues is on record; called in the background, before anything of the run is published.

        Raises:
            CheckpointAborted: the run ended before, so nothing of it can be committed.
            Unavailable: not now.
        """
        if base.is_known(session, run, self._url) or base.held(session.state, run).state == "SET":
            return
        if session.run.id == run:
            try:
                self._settle(session)
                return
            except (RosterChanged, StaleIncarnation, StateLost) as exc:
                log.info("%s", exc)
        raise CheckpointAborted(f"run {run} ended before it was on record what it continues, so nothing of it can be committed", run=run)

    def _settle(self, session: Session) -> None:
        with self._mutex:
            if base.is_known(session, session.run.id, self._url):
                return
            restored = newest_settled(session, self._store, self._url) if self.goes_on else self.restored
            base.settle(session, self._store, self._url, restored=restored, fresh=self._fresh)


def _resolve(outcome: Future[None], call: Callable[[], None]) -> None:
    try:
        call()
    except BaseException as exc:
        outcome.set_exception(exc)
    else:
        outcome.set_result(None)
