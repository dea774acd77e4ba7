"""A checkpoint on its way, look by look, until it is decided; and which one is meant where nobody said so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from dtr.checkpoint.parts import FINAL_STATES
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.saving.progress import Meter, SaveProgress, Sight, answered, ask, measure
from dtr.clock import SYSTEM, Clock
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable, NoCheckpoint
from dtr.state.job import JobState
from dtr.views import events
from dtr.views.checkpoints import split
from dtr.views.events import Event, Interruption
from dtr.views.reading import reading

__all__ = ["begun", "follow", "newest_open", "of_step"]

_RETRY_S: Final = 0.5
_GONE_S: Final = 30.0  # an emptied Redis is filled again from the store and the slots within this time


def newest_open(state: JobState) -> tuple[str, int] | None:
    """Run and step of the checkpoint that was begun last and is not decided; None if there is none.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    key = state.keys.open_ckpts
    with reading(state):
        found = state.redis.zrevrange(key, 0, 0)
    return split(found[0], key) if found else None


def of_step(state: JobState, step: int) -> tuple[str, int]:
    """The checkpoint of this step in the newest run that has one.

    Raises:
        NoCheckpoint: no run has.
        CoordinatorUnavailable, StateCorrupt.
    """
    key = state.keys.ckpts
    with reading(state):
        found = state.redis.zrangebyscore(key, step, step)
    if not found:
        raise NoCheckpoint(f"job {state.job} has no checkpoint of step {step} in Redis; `dtr ckpt ls` lists them", step=step)
    return split(max(found), key)  # names of runs begin with their number


def begun(state: JobState, after: str, *, clock: Clock = SYSTEM) -> Iterator[tuple[str, int] | Interruption]:
    """Every checkpoint that is begun after the event with the id ``after``, for ever; waits for the next.

    Raises:
        CoordinatorRefused, StateCorrupt.
    """
    for news in events.follow(state, after, clock=clock):
        if isinstance(news, Interruption):
            yield news
        elif (found := _begun(news)) is not None:
            yield found


def _begun(event: Event) -> tuple[str, int] | None:
    run, step = event.fields.get("run", ""), event.fields.get("step", "")
    return (run, int(step)) if event.event == "ckpt_begun" and run and step.isdigit() else None


def follow(state: JobState, run: str, step: int, *, every_s: float, clock: Clock = SYSTEM) -> Iterator[SaveProgress | Interruption]:
    """How far a checkpoint is, at every look, ``every_s`` apart; ends with the look that shows its decision.

    Survives outages of Redis: tells when one begins and when it is over, and looks on.

    Raises:
        NoCheckpoint: Redis does not know it, or has forgotten it and does not learn of it again.
        CoordinatorUnavailable: at the first look. CoordinatorRefused: at any.
    """
    meter, ranks, seen, away = Meter(), range(0), False, False
    gone_since_s: float | None = None
    while True:
        try:
            sight = _look(state, run, step, ranks)
            if len(ranks) != len(sight.expected):  # the first look tells how many there are
                ranks = sight.expected
                sight = _look(state, run, step, ranks)
        except CoordinatorRefused:
            raise
        except CoordinatorUnavailable as exc:
            if not seen:
                raise
            if not away:
                yield Interruption(back=False, reason=exc.message)
            away = True
            clock.sleep(_RETRY_S)
            continue
        if away:
            yield Interruption(back=True)
            away = False
        if sight.state:
            seen, gone_since_s = True, None
            yield measure(run, step, sight, meter)
            if sight.state in FINAL_STATES:
                return
        else:
            now_s = clock.monotonic()
            gone_since_s = now_s if gone_since_s is None else gone_since_s
            if not seen or now_s - gone_since_s > _GONE_S:
                raise NoCheckpoint(_unknown(state, run, step, seen), run=run, step=step)
        clock.sleep(every_s)


def _look(state: JobState, run: str, step: int, ranks: Sequence[int]) -> Sight:
    with reading(state):
        pipeline = state.redis.pipeline(transaction=False)
        ask(pipeline, state.keys, run, step, ranks)
        replies = pipeline.execute()
    return answered(iter(replies), ranks)


def _unknown(state: JobState, run: str, step: int, seen: bool) -> str:
    if seen:
        return (
            f"Redis has forgotten checkpoint {name_of(run, step)} of job {state.job}; `dtr ckpt show {name_of(run, step)}` asks the store"
        )
    return f"job {state.job} has no checkpoint {name_of(run, step)} in Redis; `dtr ckpt ls` lists them"
