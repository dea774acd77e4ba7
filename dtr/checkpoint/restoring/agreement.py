"""The collective restore: all ranks of a run agree on one checkpoint that each has read and verified, or on none.

    settle   wait, bounded, for staged saves of the lineage to be decided, so that the newest one is not thrown away
    offer    each rank says what it could read; the last offer chooses the newest common one
    vote     each rank reads the choice and says whether it verified; one no drops it, and the next is chosen
    base     rank 0 cuts the lineage, puts the run's record into the store, sets the base; only then does any rank return

Who dies ends the run, and every other rank gets RosterChanged; but that the attempt failed is the verdict of all, though those who heard
it first may have left by then. Killed between the agreement and the record, nothing was changed that a later run would miss: the lineage
in Redis ends at a checkpoint that all had verified. Killed between the record and SET, the record names a run that saved nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dtr.checkpoint.lineage import Checkpoint, split_name
from dtr.checkpoint.restoring.candidates import Candidate, Offer
from dtr.errors import (
    CheckpointError,
    CoordinatorRefused,
    CoordinatorUnavailable,
    DtrError,
    IntegrityError,
    InvalidInput,
    NoCheckpoint,
    RestoreFailed,
    RosterChanged,
    WorldSizeMismatch,
)
from dtr.failpoints import failpoint
from dtr.session import Session
from dtr.state.client import translate
from dtr.state.exchange import MAX_BLOCK_MS, Exchange

__all__ = ["Agreement", "Answer"]

log = logging.getLogger(__name__)

RETRY_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Where the restore stands. ``state``: OFFERING, VOTING, AGREED, FRESH, NONE, FAILED, or BASED; ``reasons`` why which was dropped."""

    state: str
    choice: str
    base_state: str
    reasons: Mapping[str, str]

    @classmethod
    def parse(cls, reply: Any) -> Answer:
        state, choice, base_state, reasons = reply
        return cls(
            state=state or "FAILED", choice=choice or "", base_state=base_state, reasons=dict(zip(reasons[::2], reasons[1::2], strict=True))
        )


class Agreement:
    """One attempt of one rank. Not for two threads.

    Args:
        session: in a run whose base is not fixed.
        attempt: the number of this restore within the run, the same on every rank.
        offer: what this rank could read.
        fresh: this rank goes on without a checkpoint if there is none at all.
        read: reads and verifies a candidate of the offer; raises DtrError if it cannot be restored, InvalidInput if none can be.
        check_asked: raises InvalidInput if a candidate of the offer cannot be read as this rank asked; looks at headers alone.
        fix_base: what rank 0 does when all agreed; None: nothing to continue.
        patience_s: the others may go on this long without news before this rank gives up.
    """

    def __init__(
        self,
        session: Session,
        exchange: Exchange,
        *,
        attempt: int,
        offer: Offer,
        fresh: bool,
        read: Callable[[Candidate], Any],
        check_asked: Callable[[Candidate], None],
        fix_base: Callable[[Checkpoint | None], None],
        patience_s: float,
    ) -> None:
        self._session, self._exchange, self._run = session, exchange, session.run
        self._attempt, self._offer, self._fresh = attempt, offer, fresh
        self._read, self._check_asked, self._fix_base, self._patience_s = read, check_asked, fix_base, patience_s
        self._wake_id = self._run.wake_id
        self._choice = ""  # what this rank votes about
        self._no, self._damaged = "", False
        self._refusal: DtrError | None = None  # what this process gave cannot be restored into, whatever the checkpoint
        self._state: Any = None

    def reach(self) -> tuple[Candidate, Any] | None:
        """Wait until all agree and the run's base is fixed; the candidate and its state, None for a fresh start.

        Raises:
            NoCheckpoint, RestoreFailed, WorldSizeMismatch: the verdict, the same on every rank; ``final`` in its facts says that the
                next restore of this run is another attempt.
            InvalidInput: what this rank gave does not fit; the other ranks get RestoreFailed with the reason.
            RosterChanged: a member departed.
            BaseIsSet: the run continues something already.
        """
        answer = self._ask(self._say_offer)
        failpoint("restore.after_offer")
        while True:
            if answer.state == "VOTING":
                answer = self._vote_on(answer)
            elif answer.state in {"AGREED", "FRESH"} and answer.base_state == "SET":
                return self._agreed(answer)
            elif answer.state in {"AGREED", "FRESH"} and self._run.rank == 0:
                self._fix_base(split_name(answer.choice))
                answer = self._ask(self._say_again)
            elif answer.state in {"OFFERING", "AGREED", "FRESH"}:
                answer = self._wait_for_news(answer)
            else:
                raise self._verdict(answer)

    # --- what this rank says ----------------------------------------------------------------------------------------

    def _seat(self) -> list[Any]:
        who, run = self._session.identity, self._run
        return [who.state_id, run.id, who.worker_id, run.rank, run.roster[who.worker_id].incarnation, self._attempt]

    def _say_offer(self) -> Any:
        names = " ".join(candidate.name for candidate in self._offer.candidates)
        rejected = [text[:300] for pair in self._offer.rejected for text in pair]
        limit = self._session.settings.restore_attempts
        return self._call("restore_offer", [self._session.state.keys.events], [int(self._fresh), names, limit, *rejected])

    def _say_vote(self) -> Any:
        try:
            return self._call("restore_vote", [], [self._choice, self._no[:300], int(self._damaged)])
        except CheckpointError as exc:
            if exc.facts.get("code") != "CKPT_STATE":
                raise
        self._choice = ""  # Redis lost this restore, and nothing but it: begin again
        return self._say_offer()

    def _say_again(self) -> Any:
        return self._say_vote() if self._choice else self._say_offer()

    def _call(self, script: str, more_keys: list[str], args: list[Any]) -> Any:
        keys, run = self._session.state.keys, self._run.id
        return self._session.state.call(
            script,
            [keys.meta, keys.roster, keys.run(run), keys.restore(run), keys.wake, keys.restores, *more_keys],
            [*self._seat(), *args],
        )

    def _vote_on(self, answer: Answer) -> Answer:
        if answer.choice != self._choice:
            self._choice, self._no, self._damaged, self._state = answer.choice, "", False, None
            try:
                self._state = self._looked_at(answer.choice)
            except (DtrError, MemoryError) as exc:
                if isinstance(exc, InvalidInput):
                    self._refusal = exc
                self._damaged = isinstance(exc, IntegrityError)
                self._no = " ".join(str(exc).split()) or type(exc).__name__
                log.warning("checkpoint %s cannot be restored here: %s", answer.choice, self._no)
            failpoint("restore.before_vote")
            answer = self._ask(self._say_vote)
            failpoint("restore.after_vote")
            return answer
        return self._wait_for_news(answer)

    def _looked_at(self, choice: str) -> Any:
        if self._refusal is not None:  # an older checkpoint that happens to fit is not what was asked for
            raise self._refusal
        candidate = self._offer.of(choice)
        if candidate is None:
            raise RestoreFailed(f"{choice} was not offered by this rank")
        return self._read(candidate)

    # --- waiting ----------------------------------------------------------------------------------------------------

    def _ask(self, say: Callable[[], Any]) -> Answer:
        """Ask once, however often it takes to reach Redis."""
        clock = self._session.clock
        deadline = clock.monotonic() + self._patience_s
        while True:
            try:
                return Answer.parse(self._session.guarded(say))
            except RosterChanged as exc:
                if exc.facts.get("worker") is None:  # nobody departed: a newcomer waits, or Redis lost the state
                    raise
                return self._ended_with(say, exc)
            except CoordinatorRefused:
                raise
            except CoordinatorUnavailable:
                if clock.monotonic() > deadline:
                    raise
                clock.sleep(RETRY_S)

    def _ended_with(self, say: Callable[[], Any], ended: RosterChanged) -> Answer:
        """The verdict that this attempt came to before the run ended, else ``ended``: the scripts write nothing for a run that has."""
        try:
            return Answer.parse(say())
        except DtrError:
            raise ended from None

    def _wait_for_news(self, before: Answer) -> Answer:
        """Wait for the others: until the answer is another one, looking again at every piece of news and each second."""
        clock, keys = self._session.clock, self._session.state.keys
        deadline = clock.monotonic() + self._patience_s
        while True:
            try:
                for _, entry_id, _ in self._exchange.wait({keys.wake: self._wake_id}, MAX_BLOCK_MS):
                    self._wake_id = entry_id
            except CoordinatorRefused:
                raise
            except CoordinatorUnavailable:
                clock.sleep(RETRY_S)
            answer = self._ask(self._say_again)
            if answer != before:
                return answer
            if clock.monotonic() > deadline:
                raise RestoreFailed(
                    f"restore of run {self._run.id} has seen nothing new for {self._patience_s:g} s; still missing: "
                    f"{self._missing(answer)}. Every rank must call restore().",
                    run=self._run.id, state=answer.state,
                )  # fmt: skip

    def _missing(self, answer: Answer) -> str:
        keys, state = self._session.state.keys, self._session.state
        with translate(state.url):
            held: dict[str, str] = state.redis.hgetall(keys.restore(self._run.id))
        if answer.state == "OFFERING":
            said = {member.rank for member in self._run.roster.values() if f"offer:{member.rank}" in held}
        else:
            said = {member.rank for member in self._run.roster.values() if held.get(f"vote:{member.rank}") == answer.choice}
        silent = sorted((m.rank, worker) for worker, m in self._run.roster.items() if m.rank not in said)
        return ", ".join(f"rank {rank} ({worker})" for rank, worker in silent[:8]) or "rank 0's record of the run"

    # --- the end ----------------------------------------------------------------------------------------------------

    def _agreed(self, answer: Answer) -> tuple[Candidate, Any] | None:
        for name, reason in answer.reasons.items():
            log.warning("checkpoint %s was not restored: %s", name, reason)
        if answer.state == "FRESH":
            return None
        candidate = self._offer.of(answer.choice)
        if candidate is None or self._choice != answer.choice:
            raise RestoreFailed(f"run {self._run.id} agreed on {answer.choice}, which this rank has not read", run=self._run.id)
        return candidate, self._state

    def _verdict(self, answer: Answer) -> DtrError:
        if answer.state == "BASED":
            return BaseIsSet(f"run {self._run.id} continues something already", run=self._run.id)
        if answer.state == "FAILED" and self._refusal is None:
            self._refusal = self._refusal_of_newest()
        if self._refusal is not None:
            self._refusal.facts["final"] = True
            return self._refusal
        if answer.state == "NONE":
            return NoCheckpoint(
                f"job {self._session.settings.job} has no checkpoint on its lineage in this store; pass fresh=True on every rank to "
                "start anew on purpose",
                run=self._run.id, final=True,
            )  # fmt: skip
        if self._offer.misfit:
            return WorldSizeMismatch(self._offer.misfit, run=self._run.id, final=True)
        return restore_failed(answer.reasons)

    def _refusal_of_newest(self) -> DtrError | None:
        """Another rank's no may have ended it before this one looked; that it asked for the impossible too is told all the same."""
        for candidate in self._offer.candidates[:1]:
            try:
                self._check_asked(candidate)
            except InvalidInput as exc:
                return exc
            except DtrError as exc:
                log.info("%s could not be looked at any more: %s", candidate.name, exc)
        return None


class BaseIsSet(CheckpointError):
    """The run continues something already, so a restore only reads."""


def restore_failed(reasons: Mapping[str, str]) -> RestoreFailed:
    """Every candidate with its reason."""
    shown = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no two ranks can read the same one"
    return RestoreFailed(f"checkpoints were found, but none can be restored: {shown}", reasons=dict(reasons), final=True)
