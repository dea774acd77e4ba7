"""What the launcher does next, decided without touching anything: (job, what happened) -> (job, actions).

A seat is the place of one trainer; processes come and go in it. A seat is ``running``, ``waiting`` for its restart, ``done``, or
``lost``: its trainer failed for good, and the job may go on without it.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from worker_agent.launcher.outcome import Outcome, signal_name

__all__ = ["Action", "Job", "Rules", "Say", "Send", "Start", "begin", "due_at", "exited", "over", "replaced", "signalled", "status", "tick"]

STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 5.0
# A terminal and a parent that forwards may both deliver one press of Ctrl-C; a person's second one comes later than this.
SAME_PRESS_S: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for the whole launch.

    ``labels`` name the seats for people; ``max_restarts`` counts for all seats together; ``may_lose`` seats may fail for good;
    ``grace_s`` stands between a request to stop and SIGKILL.
    """

    labels: tuple[str, ...]
    max_restarts: int = 0
    may_lose: int = 0
    grace_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatState:
    """One seat: ``restarts`` of it so far; while it waits, when it starts again and how its last trainer ended."""

    phase: Literal["running", "waiting", "done", "lost"] = "running"
    restarts: int = 0
    start_at: float = 0.0
    last: Outcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The job is being stopped: by this signal to the launcher, or, if ``signal`` is None, because a trainer failed."""

    signal: int | None
    since: float
    deadline: float
    killed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where the launch stands. ``failure`` is the first that was not made good by a restart."""

    seats: tuple[SeatState, ...]
    restarts: int = 0
    ending: Ending | None = None
    failure: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process in this seat; ``restarts`` counts those of the seat."""

    seat: int
    restarts: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send this signal to the process group of every trainer."""

    signal: int


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the person who started the launch."""

    text: str


Action = Start | Send | Say
Decision = tuple[Job, Sequence[Action]]


def begin(rules: Rules) -> Decision:
    """Start a trainer in every seat."""
    seats = tuple(SeatState() for _ in rules.labels)
    return Job(seats=seats), [Start(seat, 0) for seat in range(len(seats))]


def exited(job: Job, rules: Rules, seat: int, outcome: Outcome, now: float) -> Decision:
    """The process in ``seat`` ended, at ``now`` (monotonic seconds)."""
    if outcome.ok or job.ending is not None:
        failure = job.failure or (None if outcome.ok else outcome)
        return replace(_with(job, seat, phase="done"), failure=failure), []
    who = f"{rules.labels[seat]} {outcome}"
    if job.restarts < rules.max_restarts:
        count = job.restarts + 1
        again = job.seats[seat].restarts + 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(again - 1, 10))
        waiting = replace(_with(job, seat, phase="waiting", restarts=again, start_at=now + pause_s, last=outcome), restarts=count)
        return waiting, [Say(f"{who}; it starts again (restart {count} of {rules.max_restarts})")]
    used = f"all {rules.max_restarts} restarts are used" if rules.max_restarts else "--max-restarts is 0"
    if _can_lose(job, rules, seat):
        return _with(job, seat, phase="lost"), [Say(f"{who}; {used}, and --min lets the others go on without it")]
    return _fail(job, rules, seat, outcome, now, f"{who}; {used}")


def replaced(job: Job, rules: Rules, seat: int, now: float) -> Decision:
    """Another process holds the worker_id of the trainer that ended in ``seat``: starting it again would only fight that one."""
    last = job.seats[seat].last
    if job.seats[seat].phase != "waiting" or last is None:
        return job, []
    text = f"{rules.labels[seat]} is not started again: another process has registered under its name"
    return _fail(job, rules, seat, last, now, text)


def signalled(job: Job, rules: Rules, number: int, now: float) -> Decision:
    """The launcher got a signal: the first to stop is passed on and starts the grace, a later one kills; others are passed on.

    Ctrl-Z is not followed: a launcher that is stopped does not beat, and the job would take its trainers for dead.
    """
    if number == signal.SIGTSTP:
        return job, [Say("Ctrl-Z is not followed: a stopped launcher could not beat for its trainers")]
    if number not in STOP_SIGNALS:
        return job, [Send(number)]
    if job.ending is None:
        seats = tuple(replace(s, phase="done") if s.phase == "waiting" else s for s in job.seats)
        ending = Ending(signal=number, since=now, deadline=now + rules.grace_s)
        name = signal_name(number)
        text = f"{name}: stopping the trainers; SIGKILL in {rules.grace_s:g} s, or at a second {name}"
        return replace(job, seats=seats, ending=ending), [Say(text), Send(number)]
    if job.ending.killed or now - job.ending.since < SAME_PRESS_S:
        return job, []
    return _kill(job, job.ending, f"a second {signal_name(number)}")


def tick(job: Job, rules: Rules, now: float, *, occupied: Collection[int] = ()) -> Decision:
    """Time has passed: restarts that are due, save in seats that are still ``occupied``, and the end of the grace."""
    if job.ending is not None:
        if now >= job.ending.deadline and not job.ending.killed and not over(job):
            return _kill(job, job.ending, f"{rules.grace_s:g} s have passed")
        return job, []
    actions: list[Action] = []
    for seat, state in enumerate(job.seats):
        if state.phase == "waiting" and now >= state.start_at and seat not in occupied:
            job = _with(job, seat, phase="running")
            actions.append(Start(seat, state.restarts))
    return job, actions


def due_at(job: Job, *, occupied: Collection[int] = ()) -> float | None:
    """When ``tick`` has to be called at the latest, unless something happens before."""
    if job.ending is not None:
        return None if job.ending.killed or over(job) else job.ending.deadline
    return min((s.start_at for n, s in enumerate(job.seats) if s.phase == "waiting" and n not in occupied), default=None)


def over(job: Job) -> bool:
    """Whether nothing runs and nothing will."""
    return all(state.phase in {"done", "lost"} for state in job.seats)


def status(job: Job) -> int:
    """The launcher's exit status: 130 after SIGINT; else 0, or that of the first trainer that failed for good.

    A trainer that dies of being stopped counts as stopped by the signal that the launcher got, not by the SIGKILL that followed.
    """
    stopped_by = job.ending.signal if job.ending is not None else None
    if stopped_by == signal.SIGINT:
        return 128 + signal.SIGINT
    if job.failure is None:
        return 0
    if stopped_by is not None and job.failure.signal is not None:
        return 128 + stopped_by
    return job.failure.status


def _with(job: Job, seat: int, **changes: object) -> Job:
    changed = replace(job.seats[seat], **changes)  # type: ignore[arg-type]
    return replace(job, seats=(*job.seats[:seat], changed, *job.seats[seat + 1 :]))


def _can_lose(job: Job, rules: Rules, seat: int) -> bool:
    others = [state.phase for n, state in enumerate(job.seats) if n != seat]
    return others.count("lost") < rules.may_lose and any(phase != "lost" for phase in others)


def _fail(job: Job, rules: Rules, seat: int, outcome: Outcome, now: float, text: str) -> Decision:
    seats = tuple(replace(s, phase="done") if n == seat or s.phase == "waiting" else s for n, s in enumerate(job.seats))
    failed = replace(job, seats=seats, failure=outcome, ending=Ending(signal=None, since=now, deadline=now + rules.grace_s))
    if over(failed):
        return failed, [Say(text)]
    return failed, [Say(f"{text}; stopping the others"), Send(signal.SIGTERM)]


def _kill(job: Job, ending: Ending, why: str) -> Decision:
    return replace(job, ending=replace(ending, killed=True)), [Say(f"{why}: killing what is left"), Send(signal.SIGKILL)]
