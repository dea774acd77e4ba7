"""Whether delta pays: how much of its last saves a rank did not have to send, and a rest for delta where that was too little.

Hashing costs a little, a restore from chunks costs requests: so where hardly anything is reused (every weight is trained), delta rests for
a number of saves, which are stored whole, then tries again. ``advance`` decides, pure; the history is in Redis, in fields of the job's
``delta``, for people too. A history that is lost begins anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Final

from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.staging.slots import SlotRecord
from dtr.errors import DtrError
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["PAYS", "POOR_SAVES", "History", "advance", "is_wanted", "note"]

log = logging.getLogger(__name__)

PAYS: Final = 0.1  # of its bytes that a save must reuse
POOR_SAVES: Final = 3  # in a row, after which delta rests
FIRST_REST: Final = 8  # saves; twice as many after each try that did not pay
LONGEST_REST: Final = 128
_FIELDS: Final = ("last", "state_bytes", "sent_bytes", "poor", "rest", "next_rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Of one rank.

    Args:
        last: the save that counted last, RUN/STEP.
        state_bytes, sent_bytes: of that save.
        poor: saves in a row that did not pay.
        rest: saves that are still to be stored whole.
        next_rest: how many it will be, should delta not pay again.
    """

    last: str = ""
    state_bytes: int = 0
    sent_bytes: int = 0
    poor: int = 0
    rest: int = 0
    next_rest: int = FIRST_REST


def advance(history: History, name: str, state_bytes: int, sent_bytes: int | None) -> tuple[History, str]:
    """The history after one more save, and the event that is worth a line: ``off``, ``on`` or ''.

    Args:
        history: so far.
        name: of the save.
        state_bytes: of its part.
        sent_bytes: what of it had to be sent, though there was a commit to reuse from; None: delta rested.
    """
    after = replace(history, last=name, state_bytes=state_bytes, sent_bytes=state_bytes if sent_bytes is None else sent_bytes)
    if sent_bytes is None:
        return replace(after, rest=max(0, history.rest - 1), poor=POOR_SAVES - 1), ""  # the next try decides alone
    if sent_bytes <= (1 - PAYS) * state_bytes:
        return replace(after, poor=0, next_rest=FIRST_REST), "on" if history.next_rest > FIRST_REST else ""
    if history.poor + 1 < POOR_SAVES:
        return replace(after, poor=history.poor + 1), ""
    return replace(after, poor=0, rest=history.next_rest, next_rest=min(LONGEST_REST, 2 * history.next_rest)), "off"


def is_wanted(state: JobState, record: SlotRecord) -> bool:
    """Whether this part is to be stored as chunks; counts a save of a rest. While Redis is away, it is."""
    try:
        history = _read(state, record.rank)
        if history.rest == 0 or history.last == name_of(record.run, record.step):
            return history.rest == 0
        _write(state, record, history, None)
    except DtrError as exc:
        log.info("how delta pays is not known just now: %s", exc)
        return True
    return False


def note(state: JobState, record: SlotRecord, *, sent_bytes: int) -> None:
    """Count a save that was stored as chunks, and for which there were some to reuse."""
    try:
        _write(state, record, _read(state, record.rank), sent_bytes)
    except DtrError as exc:
        log.info("how delta pays is not counted this time: %s", exc)


def _read(state: JobState, rank: int) -> History:
    with translate(state.url):
        held = state.redis.hmget(state.keys.delta, [f"{rank}/{field}" for field in _FIELDS])
    last, *numbers = held
    known = {field: int(value) for field, value in zip(_FIELDS[1:], numbers, strict=True) if value and value.isdigit()}
    return History(last=last or "", **known)


def _write(state: JobState, record: SlotRecord, history: History, sent_bytes: int | None) -> None:
    after, event = advance(history, name_of(record.run, record.step), record.size_bytes, sent_bytes)
    reason = ""
    if event == "off":
        reason = (
            f"only {1 - after.sent_bytes / after.state_bytes:.0%} of the last save was in the store already; the next {after.rest} saves "
            "are stored whole"
        )
        log.warning("job %s rank %d: delta does not pay: %s", state.job, record.rank, reason)
    elif event == "on":
        reason = f"{1 - after.sent_bytes / after.state_bytes:.0%} of the last save was in the store already"
        log.info("job %s rank %d: delta pays again: %s", state.job, record.rank, reason)
    state.call(
        "delta_note",
        [state.keys.delta, state.keys.events],
        [record.rank, after.last, event, reason, after.state_bytes, after.sent_bytes, after.poor, after.rest, after.next_rest],
    )
