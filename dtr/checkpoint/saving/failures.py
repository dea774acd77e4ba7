"""What becomes of a failed save: the next ``save_async`` raises or warns, as the setting ``on_failed_save`` says.

A failure is told once: by a log line, or by a SaveFailed. Only saves of the current run make a save raise: what an ended run had not
committed is lost already, and whoever goes on has restored. What an exception of ``save_async`` itself said is not told again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from dtr.checkpoint.parts import Fence
from dtr.checkpoint.saving.handle import SaveHandle
from dtr.config import Settings
from dtr.errors import SaveFailed, StaleIncarnation, StateLost
from dtr.state.job import JobState

__all__ = ["ECHO", "SKIPPED", "Failed", "Failures", "Standing", "report", "sentence", "verdict"]

log = logging.getLogger(__name__)

# Why a rank that raised SaveFailed has no part. For the others that is no failure of its own: each is told of the one behind it, and two
# ranks that catch the error and save on would make each other raise for ever.
ECHO: Final = "it stopped at an earlier failed save"
# Why a rank has no part where `slot_policy = skip` chose that a save may be left out. It is warned of, and counts for `rpo`; if `fatal`
# raised for it, nobody could choose both.
SKIPPED: Final = "skipped: every staging slot still waits for its upload"
_OVERDUE: Final = "UNDECIDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A save that came to nothing: ``state`` is its handle's, or UNDECIDED for too long; captured at ``begun_s``, monotonic seconds."""

    run: str
    step: int
    state: str
    reason: str
    begun_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What one process knows of its saves.

    Args:
        untold: failures that nobody was told of.
        unresolved: failures since which no newer state was committed, told or not.
        undecided: handles with the moment of their capture.
        newest: run and step of the newest commit; None: none yet.
        safe_s: when the newest committed state was captured; before the first commit, when the first save was.
    """

    untold: tuple[Failed, ...] = ()
    unresolved: tuple[Failed, ...] = ()
    undecided: tuple[tuple[SaveHandle, float], ...] = ()
    newest: tuple[str, int] | None = None
    safe_s: float | None = None


def verdict(
    policy: str, standing: Standing, *, run: str, rpo_s: float, now_s: float
) -> tuple[Literal["raise", "warn", ""], tuple[Failed, ...]]:
    """Whether the next save of ``run`` raises, warns or says nothing, and about which failures.

    ``fatal`` raises for any untold failure of this run but a skipped save. ``rpo`` raises once the newest committed state is older than
    ``rpo_s``, if saves have failed since, skipped ones too, or are undecided for longer than that. Whatever does not raise is warned of.
    """
    meant = (ECHO, SKIPPED)
    ours = tuple(one for one in standing.untold if one.run == run and not any(why in one.reason for why in meant))
    if policy == "fatal" and ours:
        return "raise", ours
    if policy == "rpo" and standing.safe_s is not None and now_s - standing.safe_s > rpo_s:
        failed = tuple(failed for failed in standing.unresolved if failed.run == run)
        failed += tuple(
            Failed(run=run, step=handle.step, state=_OVERDUE, reason=f"it has been on its way for {now_s - begun_s:.0f} s", begun_s=begun_s)
            for handle, begun_s in standing.undecided
            if handle.run == run and now_s - begun_s > rpo_s and (standing.newest is None or begun_s > standing.safe_s)
        )
        if failed:
            return "raise", failed
    return ("warn", standing.untold) if standing.untold else ("", ())


def sentence(failed: Sequence[Failed], standing: Standing, now_s: float) -> str:
    """All of it in one line: what failed, why, and what is safe."""
    last = max(failed, key=lambda one: one.begun_s)
    many = "the save" if len(failed) == 1 else f"{len(failed)} saves came to nothing, the newest"
    how = "is not committed" if last.state == _OVERDUE else f"failed ({last.state})"
    text = f"{many} of run {last.run} step {last.step} {how}: {last.reason}"
    if standing.newest is None:
        return f"{text}; nothing is committed since this process began to save"
    age_s = now_s - (standing.safe_s or now_s)
    return f"{text}; the newest commit is {standing.newest[0]}/{standing.newest[1]}, of {age_s:.0f} s ago"


@dataclass(slots=True)
class Failures:
    """The failures of one manager: the publisher's thread tells of them, the trainer's asks."""

    _standing: Standing = field(default_factory=Standing)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def begun(self, handle: SaveHandle, now_s: float) -> None:
        """A state was captured."""
        with self._mutex:
            now = self._standing
            undecided = tuple(one for one in now.undecided if not one[0].durable.done())
            safe_s = now_s if now.safe_s is None else now.safe_s
            self._standing = replace(now, undecided=(*undecided, (handle, now_s)), safe_s=safe_s)

    def committed(self, run: str, step: int, begun_s: float) -> None:
        """A state is safe; with it, failures of older ones are made good."""
        with self._mutex:
            now = self._standing
            if now.newest is not None and now.safe_s is not None and begun_s < now.safe_s:
                return
            unresolved = tuple(failed for failed in now.unresolved if failed.begun_s > begun_s)
            self._standing = replace(now, newest=(run, step), safe_s=begun_s, unresolved=unresolved)

    def failed(self, failed: Failed) -> None:
        """A save came to nothing."""
        with self._mutex:
            now = self._standing
            later = now.newest is not None and now.safe_s is not None and now.safe_s >= failed.begun_s
            unresolved = now.unresolved if later or ECHO in failed.reason else (*now.unresolved, failed)
            self._standing = replace(now, untold=(*now.untold, failed), unresolved=unresolved)

    def tell(self, settings: Settings, run: str, now_s: float) -> None:
        """Before a save: warn of the earlier ones that failed.

        Raises:
            SaveFailed: by the policy; ``failed`` lists run, step, state and reason of each.
        """
        with self._mutex:
            now = self._standing
            word, failed = verdict(settings.on_failed_save, now, run=run, rpo_s=settings.rpo_s, now_s=now_s)
            overdue = {one.step for one in failed if one.state == _OVERDUE}
            undecided = tuple(one for one in now.undecided if not (word == "raise" and one[0].run == run and one[0].step in overdue))
            self._standing = replace(now, untold=(), unresolved=() if word == "raise" else now.unresolved, undecided=undecided)
        if not word:
            return
        text = sentence(failed, now, now_s)
        if word == "warn":
            log.warning("%s; see `dtr status`", text)
            return
        limit = f", rpo_s={settings.rpo_s:g}" if settings.on_failed_save == "rpo" else ""
        raise SaveFailed(
            f"{text} (on_failed_save={settings.on_failed_save}{limit}); see `dtr status`",
            run=run, failed=[(one.run, one.step, one.state, one.reason) for one in failed],
        )  # fmt: skip

    def last_word(self, now_s: float) -> None:
        """No save comes any more: warn of what nobody was told."""
        with self._mutex:
            now, self._standing = self._standing, replace(self._standing, untold=())
        if now.untold:
            log.warning("%s; see `dtr status`", sentence(now.untold, now, now_s))


def report(state: JobState, state_id: str, who: Fence, failed: Failed, save: str) -> None:
    """Put a failure on record that no decision about the checkpoint tells: an event, and an entry in ``failed_saves`` for status.

    Args:
        state: the job.
        state_id: that the member joined.
        who: whose save.
        failed: what happened.
        save: its id; a report with the same id is not written twice.

    Raises:
        Unavailable, Recovering: not now.
    """
    k = state.keys
    try:
        state.call(
            "save_report",
            [k.meta, k.run(failed.run), k.failed_saves, k.events],
            [
                state_id,
                failed.run,
                failed.step,
                who.rank,
                who.worker,
                who.incarnation,
                save,
                failed.state,
                " ".join(failed.reason.split())[:500],
            ],
        )
    except (StaleIncarnation, StateLost) as exc:
        log.info("nobody is left to be told that the save of step %d failed: %s", failed.step, exc)
