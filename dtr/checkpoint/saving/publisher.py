"""The background of ``save_async``: publishes staged saves, shows how far they are, and resolves their handles when that is decided.

One thread of a manager, started by a save and gone when there was nothing to do for a while. The trainer never waits for it: while
Redis is away saves are spooled (their bytes are in slots anyway) and published in order when it is back. It looks at growing intervals
instead of blocking in Redis, so that the same thread publishes a new save at once.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from dtr import counters
from dtr.checkpoint.parts import FINAL_STATES
from dtr.checkpoint.saving.announce import Save, announce, look
from dtr.checkpoint.saving.failures import Failed, Failures
from dtr.checkpoint.saving.handle import Commit
from dtr.checkpoint.saving.progress import Sight, ended, measure
from dtr.checkpoint.staging.slots import finish
from dtr.clock import SYSTEM, Clock
from dtr.errors import (
    CheckpointAbandoned,
    CheckpointAborted,
    CheckpointConflict,
    CheckpointError,
    DtrError,
    InvalidInput,
    Recovering,
    StateLost,
    Unavailable,
    UnsavedLineage,
)
from dtr.session import Session
from dtr.state.job import JobState

__all__ = ["Publisher", "error_of"]

log = logging.getLogger(__name__)

FIRST_LOOK_S: Final = 0.02
LONGEST_LOOK_S: Final = 1.0
SHOWN_LOOK_S: Final = 0.5  # for a save whose progress somebody watches
RANKS_A_SECOND: Final = 256  # of a larger world the parts are looked at more rarely: every rank may be asked to show them all
LONGEST_RETRY_S: Final = 5.0
IDLE_S: Final = 10.0
FORGOTTEN_S: Final = 2.0  # Redis has shown no trace of a checkpoint for this long: it lost it, or nobody began it
WRITER_S: Final = 30.0  # a rank that has no part gives the writer this long after the end of the run

_FOR_GOOD: Final = (CheckpointAborted, CheckpointAbandoned, CheckpointConflict, UnsavedLineage, InvalidInput)
_STATES: Final = {CheckpointAborted: "ABORTED", CheckpointAbandoned: "ABANDONED", CheckpointConflict: "CONFLICT"}


def error_of(save: Save, sight: Sight) -> CheckpointError | None:
    """Why the checkpoint that ``sight`` shows is none that this save became part of; None if it is one, or undecided."""
    where = f"run {save.spec.run} step {save.spec.step}"
    facts = {"run": save.spec.run, "step": save.spec.step, "reason": sight.reason}
    if save.own_checksum and sight.checksum and save.own_checksum != sight.checksum:
        return CheckpointConflict(
            f"{where} was saved before with other bytes (checksum {sight.checksum}, now {save.own_checksum}); the first save stands",
            **facts,
        )
    if sight.state == "ABORTED":
        return CheckpointAborted(f"{where} was aborted: {sight.reason or 'no reason is known'}", **facts)
    if sight.state == "ABANDONED":
        return CheckpointAbandoned(f"{where} is off the lineage: {sight.reason}", **facts)
    return None


class Publisher:
    """See the module.

    Args:
        session: whose counters count what is skipped.
        recover_run: called with a save whose run Redis does not know.
        find_decision: called with a save whose checkpoint Redis does not know; what the store decided, or None.
        failures: told of every save that ends.
    """

    def __init__(
        self,
        session: Session,
        *,
        failures: Failures,
        recover_run: Callable[[JobState, Save], None],
        find_decision: Callable[[JobState, Save], Sight | None],
        clock: Clock = SYSTEM,
    ) -> None:
        self._session, self.clock, self._failures = session, clock, failures
        self._recover_run, self._find_decision = recover_run, find_decision
        self._news = threading.Condition()
        self._inbox: list[Save] = []  # to be published, oldest first
        self._watched: list[Save] = []  # published, undecided
        self._thread: threading.Thread | None = None
        self._closing = False

    # --- the trainer's side -----------------------------------------------------------------------------------------

    def submit(self, save: Save) -> None:
        """Take over a save; costs microseconds."""
        with self._news:
            if self._closing:
                self._close_handle(save)
                return
            self._inbox.append(save)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="dtr-publish", daemon=True)
                self._thread.start()
            self._news.notify()

    def nudge(self) -> None:
        """Somebody asked for progress: look now."""
        with self._news:
            for save in self._watched:
                if save.handle.asked:
                    save.due_s = save.whole_due_s = 0.0
            self._news.notify()

    def trouble(self) -> str:
        """What keeps the saves of this rank from being committed, as far as is known here; '' if nothing does."""
        with self._news:
            saves = [*self._watched, *self._inbox]
        return "; ".join(f"step {save.spec.step}: {why}" for save in saves if (why := save.upload_error or save.trouble))

    def close(self, timeout_s: float) -> None:
        """Publish what is staged, for ``timeout_s`` at most, and end. Undecided handles say so; the uploader goes on without them."""
        with self._news:
            self._closing = True
            self._news.notify()
            thread = self._thread
            if thread is not None:
                self._news.wait_for(lambda: not self._inbox or self._thread is None, timeout=max(0.0, timeout_s))
            left, self._inbox, self._watched = self._inbox + self._watched, [], []
            self._news.notify()
        for save in left:
            self._close_handle(save)

    def _close_handle(self, save: Save) -> None:
        save.handle.fail(
            "CLOSED",
            CheckpointError(
                f"run {save.spec.run} step {save.spec.step} was not decided when its manager was closed; it is staged, and the uploader "
                "goes on: see `dtr ckpt ls`",
                run=save.spec.run, step=save.spec.step,
            ),
        )  # fmt: skip

    # --- the thread -------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        settings = self._session.settings
        state = JobState(settings.redis_url, settings.job, name="dtr-save")
        try:
            while self._wait_for_work():
                try:
                    self._publish_due(state)
                    self._look_due(state)
                except Exception:  # a mistake of ours must not leave every later handle undecided
                    log.exception("publishing saves failed; it goes on")
                    self.clock.sleep(1.0)
        finally:
            state.close()

    def _wait_for_work(self) -> bool:
        """Sleep until something is due; False, and the thread is over, when nothing was for a while or the manager is closed."""
        with self._news:
            self._news.notify_all()
            while True:
                due_s = min((save.due_s for save in self._inbox + self._watched), default=None)
                if due_s is None:
                    if self._closing or (not self._news.wait(IDLE_S) and not self._inbox):
                        self._thread = None
                        return False
                    continue
                left_s = due_s - self.clock.monotonic()
                if left_s <= 0:
                    return True
                self._news.wait(left_s)

    def _publish_due(self, state: JobState) -> None:
        now_s = self.clock.monotonic()
        with self._news:
            due = [save for save in self._inbox if save.due_s <= now_s]
        for save in due:
            try:
                announce(state, save, partial(self._recover_run, state, save), self._session.settings.broker)
            except _FOR_GOOD as exc:
                self._end(save, exc)
            except Exception as exc:  # an unforeseen error must not end the saves of a long training
                self._put_off(save, exc)
                if isinstance(exc, (Unavailable, Recovering, StateLost)):
                    return  # the others would only wait for the same
            else:
                self._published(save)

    def _published(self, save: Save) -> None:
        if save.trouble:
            log.warning("run %s step %d is published after all", save.spec.run, save.spec.step)
        save.trouble, save.pause_s = "", FIRST_LOOK_S
        save.due_s = self.clock.monotonic() + save.pause_s
        if save.counter:
            self._count(save.counter)
        save.handle.tell()
        with self._news:
            if save in self._inbox:
                self._inbox.remove(save)
                if not save.handle.durable.done():
                    save.handle.state = "WRITING"
                    self._watched.append(save)

    def _put_off(self, save: Save, exc: Exception) -> None:
        trouble = f"{type(exc).__name__}: {exc}"
        if trouble != save.trouble:
            known = isinstance(exc, DtrError)
            log.warning("run %s step %d stays staged: %s", save.spec.run, save.spec.step, trouble, exc_info=None if known else exc)
        save.trouble = trouble
        save.pause_s = min(LONGEST_RETRY_S, max(0.05, save.pause_s * 2))
        save.due_s = self.clock.monotonic() + save.pause_s * random.uniform(0.5, 1.0)

    def _look_due(self, state: JobState) -> None:
        now_s = self.clock.monotonic()
        with self._news:
            watched = list(self._watched)
        if not any(save.due_s <= now_s for save in watched):
            return
        try:
            sights = self._look(state, watched, now_s)
        except Exception as exc:
            for save in watched:
                self._put_off(save, exc)
            return
        for save, sight in zip(watched, sights, strict=True):
            try:
                self._judge(state, save, sight, now_s)
            except Exception as exc:  # as above
                self._put_off(save, exc)

    def _look(self, state: JobState, watched: list[Save], now_s: float) -> list[Sight]:
        """One look at each; at all ranks' parts of those that somebody watches, not at every look if these are many, but at the last."""
        whole = [save for save in watched if save.handle.asked and save.whole_due_s <= now_s]
        sights = look(state, watched, whole=whole)
        for save in whole:
            save.whole_due_s = now_s + len(save.expected) / RANKS_A_SECOND
        last = [n for n, save in enumerate(watched) if save.handle.asked and save not in whole and sights[n].state in FINAL_STATES]
        if last:
            saves = [watched[n] for n in last]
            for n, sight in zip(last, look(state, saves, whole=saves), strict=True):
                sights[n] = sight
        return sights

    def _judge(self, state: JobState, save: Save, sight: Sight, now_s: float) -> None:
        if save.own_checksum and sight.state == "COMMITTED" and not sight.checksum:
            sight = self._find_decision(state, save) or sight  # an index that was rebuilt has no part's checksum
        mine, save.trouble = sight.part(save.part_rank), ""
        save.upload_error = mine.error if mine is not None and mine.state != "done" else ""
        error = error_of(save, sight)
        if error is not None:
            self._end(save, error, known=sight.state != "COMMITTED")
        elif sight.state == "COMMITTED":
            self._commit(save, sight)
        elif sight.state:
            save.handle.state, save.unseen_since_s = sight.state, None
            self._show(save, sight)
            self._look_later(save, now_s)
        else:
            self._unseen(state, save, now_s)

    def _commit(self, save: Save, sight: Sight) -> None:
        self._drop(save, "committed", "")
        self._failures.committed(save.spec.run, save.spec.step, save.started_s)
        self._show(save, sight)
        seconds = self.clock.monotonic() - save.started_s
        save.handle.commit(Commit(run=save.spec.run, step=save.spec.step, size_bytes=sight.size_bytes, seconds=seconds))

    def _show(self, save: Save, sight: Sight) -> None:
        if sight.parts and (sight.whole or not save.handle.asked):
            save.handle.show(measure(save.spec.run, save.spec.step, sight, save.meter))
        elif sight.state in FINAL_STATES:
            save.handle.show(ended(save.handle.seen, sight.state, sight.reason, sight.size_bytes))

    def _look_later(self, save: Save, now_s: float) -> None:
        longest_s = SHOWN_LOOK_S if save.handle.asked else LONGEST_LOOK_S
        save.pause_s = min(longest_s, max(FIRST_LOOK_S, save.pause_s * 1.5))
        save.due_s = now_s + save.pause_s

    def _unseen(self, state: JobState, save: Save, now_s: float) -> None:
        """Redis has no such checkpoint: it was emptied, or the run ended before the writer began it. The store knows what was decided."""
        self._look_later(save, now_s)
        if save.unseen_since_s is None:
            save.unseen_since_s = now_s
        unseen_s = now_s - save.unseen_since_s
        if unseen_s < FORGOTTEN_S:
            return
        decided = self._find_decision(state, save)
        if decided is not None and decided.state:
            self._judge(state, save, decided, now_s)
            return
        if save.part is None and unseen_s > WRITER_S:
            save.failed = f"the run ended, and the writer, rank {save.spec.writer}, has not been heard of for {WRITER_S:g} s"
        if save.part is not None or save.failed:
            with self._news:
                if save in self._watched:
                    self._watched.remove(save)
                    self._inbox.append(save)
                    save.unseen_since_s = None

    def _end(self, save: Save, exc: DtrError, *, known: bool = False) -> None:
        """The save came to nothing; ``known``: that the checkpoint did, Redis shows itself."""
        state = next((word for kind, word in _STATES.items() if isinstance(exc, kind)), "FAILED")
        spec = save.spec
        self._drop(save, state.lower(), str(exc))
        if save.counter:
            self._count(save.counter)
        if save.handle.durable.done():
            return  # its caller was told
        log.warning("%s", exc)
        reason = str((exc.facts.get("reason") if state != "CONFLICT" else "") or exc)
        failed = Failed(run=spec.run, step=spec.step, state=state, reason=reason, begun_s=save.started_s)
        self._failures.failed(failed)
        save.handle.show(ended(save.handle.seen, state, reason))
        save.handle.fail(state, exc)
        if not known and exc.facts.get("code") not in {"CKPT_ABORTED", "CKPT_ABANDONED"}:
            save.lost, save.due_s, save.pause_s = failed, 0.0, 0.0
            with self._news:
                self._inbox.append(save)

    def _drop(self, save: Save, outcome: str, reason: str) -> None:
        """Nothing is left to do for this save: free its slot (what fails here, the uploader does at its next look)."""
        with self._news:
            for saves in (self._inbox, self._watched):
                if save in saves:
                    saves.remove(save)
        if save.slot is None or save.slot.record is None:
            return
        try:
            now = save.slot.files.read()
            # Usually the uploader was faster, and the slot may hold the next save by now, whose uploader our lock would turn away.
            if now is not None and (now.save, now.state) == (save.slot.record.save, "STAGED"):
                finish(save.slot, outcome, reason)
        except OSError as exc:
            log.warning("slot %s is not free yet: %s", save.slot.files.data, exc)

    def _count(self, counter: str) -> None:
        try:
            counters.add(self._session, counter)
        except DtrError as exc:
            log.info("%s was not counted: %s", counter, exc)
