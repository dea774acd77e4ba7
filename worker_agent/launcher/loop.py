"""The launcher's loop: one thread that sees exits, signals, registrations and the clock, asks the policy, and does what it says.

Nothing in it waits but the selector. What other threads learn comes in through an inbox that wakes it.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from dtr.config import Settings
from worker_agent.launcher import policy
from worker_agent.launcher.care import Care
from worker_agent.launcher.children import Child
from worker_agent.launcher.desk import Desk
from worker_agent.launcher.inbox import Inbox
from worker_agent.launcher.outcome import Outcome
from worker_agent.launcher.output import Output
from worker_agent.launcher.plan import Launch, Seat, environment
from worker_agent.launcher.policy import Rules, Say, Send, Start
from worker_agent.launcher.signals import received, signals_to_socket
from worker_agent.launcher.stall import StallRule, Watch

__all__ = ["run_trainers"]

log = logging.getLogger(__name__)

_LOOK_AT_GROUPS_S: Final = 0.05
_REDIS_WITHIN_S: Final = 300.0  # for so long a seat waits for Redis to hear of its last trainer: without it, the next could not join
_TELL_WITHIN_S: Final = 5.0
_PRINT_WITHIN_S: Final = 10.0


def run_trainers(launch: Launch, seats: Sequence[Seat], *, settings: Settings, job: str | None, environ: Mapping[str, str]) -> int:
    """Start the trainers of one launch and look after them until the last has ended; the launch's exit status. In the main thread.

    Args:
        launch: what to start.
        seats: where.
        settings: the trainers' server and staging folder.
        job: if it was given to the launcher.
        environ: the environment that trainers get, with ours added.

    Raises:
        Unavailable: the sockets cannot be made; nothing was started.
    """
    output = Output(labelled=launch.nproc > 1 and launch.prefix)
    start = partial(environment, launch, settings=settings, job=job, environ=environ)
    with signals_to_socket() as signals, selectors.DefaultSelector() as selector, contextlib.closing(Inbox()) as inbox:
        loop = _Loop(launch, seats, start, output, selector, inbox)
        selector.register(signals, selectors.EVENT_READ, lambda: loop.on_signals(received(signals)))
        selector.register(inbox, selectors.EVENT_READ, inbox.serve)
        status = loop.run()
    output.close(_PRINT_WITHIN_S)
    return status


class _Loop:
    """The state of one launch; ``environment`` makes a trainer's from its seat and its ``restarts``."""

    def __init__(
        self,
        launch: Launch,
        seats: Sequence[Seat],
        environment: Callable[..., dict[str, str]],
        output: Output,
        selector: selectors.BaseSelector,
        inbox: Inbox,
    ) -> None:
        self._launch, self._seats, self._environment = launch, seats, environment
        self._output, self._selector, self._inbox = output, selector, inbox
        self._rules = Rules(
            labels=tuple(seat.label for seat in seats),
            max_restarts=launch.max_restarts,
            may_lose=launch.may_lose,
            grace_s=launch.grace_s,
        )
        self._job, self._first = policy.begin(self._rules)
        self._children: dict[int, Child] = {}  # by seat; from the start until all of its group has ended
        self._clearing: set[int] = set()  # seats whose process has ended, and whose group perhaps not
        self._untold: dict[int, float] = {}  # seats whose end Redis has not heard of, and until when they wait for that
        self._care = Care(selector, inbox, rule=StallRule(timeout_s=launch.stall_timeout_s), pid_of=self._pid_of, on_stall=self._on_stall)
        self._desk = Desk(selector, seats, self._care)

    def run(self) -> int:
        """Until the last trainer has ended."""
        try:
            self._desk.open()
            self._do(self._first)
            while not policy.over(self._job) or self._children:
                for key, _ in self._selector.select(self._pause_s()):
                    key.data()
                self._tend()
        finally:
            self._kill_all()
            self._desk.close()
        self._care.close(_TELL_WITHIN_S)
        return policy.status(self._job)

    def _pause_s(self) -> float | None:
        """Until something has to be looked at without an event."""
        now = time.monotonic()
        due = list(self._untold.values())
        if self._clearing:
            due.append(now + _LOOK_AT_GROUPS_S)
        if (decide_at := policy.due_at(self._job, occupied=self._occupied())) is not None:
            due.append(decide_at)
        return max(0.0, min(due) - now) if due else None

    def _occupied(self) -> set[int]:
        """The seats in which no trainer can start now."""
        return self._clearing | self._untold.keys()

    def _tend(self) -> None:
        now = time.monotonic()
        for seat in [seat for seat in self._clearing if self._children[seat].clear(now)]:
            self._clearing.remove(seat)
            del self._children[seat]
        for seat in [seat for seat, until in self._untold.items() if now >= until]:
            del self._untold[seat]
        self._decided(policy.tick(self._job, self._rules, now, occupied=self._occupied()))

    def _decided(self, decision: policy.Decision) -> None:
        self._job, actions = decision
        self._do(actions)

    def _do(self, actions: Sequence[policy.Action]) -> None:
        for action in actions:
            match action:
                case Say(text):
                    log.warning("%s", text)
                case Send(number):
                    for seat, child in self._children.items():
                        if seat not in self._clearing:
                            child.send(number)
                case Start(seat, restarts):
                    self._start(seat, restarts)

    # --- what happens -----------------------------------------------------------------------------------------------

    def _start(self, seat: int, restarts: int) -> None:
        place = self._seats[seat]
        label = str(place.local_rank if place.rank is None else place.rank)
        stdin = subprocess.DEVNULL if len(self._seats) > 1 else None  # several cannot share one
        try:
            with self._output.streams(label) as (stdout, stderr):
                env = self._environment(place, restarts=restarts)
                child = Child(self._launch.command, env, stdin=stdin, stdout=stdout, stderr=stderr)
        except OSError as exc:
            outcome = Outcome(code=127 if isinstance(exc, FileNotFoundError) else 126, note=f"it cannot be started: {exc.strerror}")
            self._inbox.post(partial(self._ended, seat, outcome))
            return
        self._children[seat] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, partial(self._on_exit, seat, child))

    def _on_exit(self, seat: int, child: Child) -> None:
        outcome = child.outcome()
        if outcome is None:
            return
        self._selector.unregister(child.pidfd)
        self._clearing.add(seat)
        step, job = self._care.last_step(seat)
        outcome = replace(outcome, step=step, job=job)
        if self._care.ended(seat, outcome, partial(self._told, seat)):
            self._untold[seat] = time.monotonic() + _REDIS_WITHIN_S
        self._ended(seat, outcome)

    def _ended(self, seat: int, outcome: Outcome) -> None:
        self._decided(policy.exited(self._job, self._rules, seat, outcome, time.monotonic()))

    def _told(self, seat: int, replaced: bool) -> None:
        """Redis knows that the last trainer of this seat is gone."""
        self._untold.pop(seat, None)
        if replaced:
            self._decided(policy.replaced(self._job, self._rules, seat, time.monotonic()))

    def on_signals(self, numbers: Sequence[int]) -> None:
        """Signals have come to the launcher."""
        for number in numbers:
            self._decided(policy.signalled(self._job, self._rules, number, time.monotonic()))

    def _on_stall(self, seat: int, watch: Watch, step: int, job: str) -> None:
        who, child = self._seats[seat].label, self._children.get(seat)
        where = (f"at step {step}" if step >= 0 else "before its first step") + (f" of job {job}" if job else "")
        if child is None or seat in self._clearing:
            return  # it has ended meanwhile
        if watch.overdue and self._launch.stall_kills:
            child.kill(f"stalled {where}: {watch.stalled}; killed by the launcher")
        elif watch.stalled and not child.stalled:
            log.warning("%s is stalled %s: %s", who, where, watch.stalled)
        elif not watch.stalled:
            log.warning("%s goes on", who)
        child.stalled = bool(watch.stalled)

    def _pid_of(self, seat: int) -> int | None:
        child = self._children.get(seat)
        return child.pid if child is not None else None

    def _kill_all(self) -> None:
        """Nobody is left, unless the loop itself failed."""
        for child in self._children.values():
            child.kill("the launcher failed")
