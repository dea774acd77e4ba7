"""Runs: members become a roster of ranks in one collective step. Owns ``roster``, ``forming`` and ``run:RUN``.

Guarantees: ranks are always 0 to world_size - 1; a run forms only when every living member of the previous one has arrived; the
death, leave or takeover of a roster member ends the run, and every call under it answers RosterChanged.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from dtr.clock import SYSTEM, Clock
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable, FormTimeout, RosterChanged, StateCorrupt
from dtr.failpoints import failpoint
from dtr.membership import Identity
from dtr.state.client import translate
from dtr.state.exchange import Exchange
from dtr.state.job import JobState

__all__ = ["Member", "Run", "World", "form", "read_run", "run_number", "why_ended"]

_ALPHABET: Final = "abcdefghijkmnpqrstuvwxyz23456789"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """How many ranks a run may have; elastic when ``low`` is below ``high``."""

    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One seat of a roster."""

    rank: int
    incarnation: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One roster of ranks, as ``worker_id`` sees it; ``rank`` is -1 for one that only looks at it."""

    id: str
    rank: int
    world_size: int
    generation: int
    previous: str
    roster: Mapping[str, Member]
    wake_id: str = "0-0"

    def worker_of(self, rank: int) -> str:
        """The worker that holds ``rank``."""
        return next(worker for worker, member in self.roster.items() if member.rank == rank)


def run_number(run: str) -> int:
    """The counter in a run's name, 0 if there is none."""
    match = re.match(r"\d+", run)
    return int(match.group()) if match else 0


def new_run_name(number: int) -> str:
    """A name that is unique even if Redis forgot the counter: ``0007-k3f9``."""
    return f"{number:04d}-" + "".join(secrets.choice(_ALPHABET) for _ in range(4))


def read_run(state: JobState, run: str, *, worker_id: str | None = None, wake_id: str = "0-0") -> Run:
    """The record of ``run`` in Redis.

    Raises:
        StateCorrupt: there is none, or a field is missing.
    """
    with translate(state.url):
        fields: dict[str, str] = state.redis.hgetall(state.keys.run(run))
    roster: dict[str, Member] = {}
    try:
        for name, value in fields.items():
            if name.startswith("member:"):
                rank, incarnation, host = [*value.split(" "), "", ""][:3]
                roster[name.removeprefix("member:")] = Member(rank=int(rank), incarnation=incarnation, host=host)
        return Run(
            id=run,
            rank=roster[worker_id].rank if worker_id is not None and worker_id in roster else -1,
            world_size=int(fields["world_size"]),
            generation=int(fields["generation"]),
            previous=fields.get("previous", ""),
            roster=MappingProxyType(roster),
            wake_id=wake_id,
        )
    except (KeyError, ValueError) as exc:
        raise StateCorrupt(f"{state.keys.run(run)} is missing or lacks a field: {exc}") from exc


def why_ended(state: JobState, run: str) -> RosterChanged | None:
    """The error that tells a member of ``run`` who departed and why; None if the run is open."""
    with translate(state.url):
        ended_run, worker, rank, reason, current = state.redis.hmget(
            state.keys.meta, ["ended_run", "ended_worker", "ended_rank", "ended_reason", "run"]
        )
    if current == run:
        return None
    if ended_run == run:
        return RosterChanged(
            f"run {run} ended: rank {rank} ({worker}) departed: {reason}. Call form() to join the next run.",
            run=run, worker=worker, rank=int(rank), reason=reason,
        )  # fmt: skip
    return RosterChanged(
        f"run {run} ended: the job goes on as run {current or '?'}. Call form().", run=run, worker=None, rank=None, reason=""
    )


def form(
    state: JobState,
    exchange: Exchange,
    who: Identity,
    *,
    world: World,
    asked_rank: int | None,
    settle_s: float,
    timeout_s: float,
    after_run: str = "",
    clock: Clock = SYSTEM,
) -> Run:
    """Wait until the members have become a run, and return it.

    Collective: waits for ``world`` members and for every living member of the previous run.

    Args:
        state: the job.
        exchange: the connection that waits.
        who: the registration of the caller.
        world: how many ranks.
        asked_rank: the rank to get if nobody else asks for it.
        settle_s: an elastic run forms when nobody new came for this long.
        timeout_s: then FormTimeout says who is there.
        after_run: the run that the caller leaves.
        clock: for the deadline.

    Raises:
        FormTimeout, StaleIncarnation, StateLost, CoordinatorUnavailable.
    """
    keys = state.keys
    deadline = clock.monotonic() + timeout_s
    number = run_number(after_run) + 1
    wake_id, waited, arrived = "0-0", False, 0
    while True:
        name = new_run_name(number)
        failpoint("form.before_arrive")
        try:
            if not waited:
                wake_id, waited = _newest(state), True
            answer = state.call(
                "form_arrive",
                [keys.meta, keys.members, keys.fences, keys.roster, keys.forming, keys.wake, keys.events, keys.run(name)],
                [
                    who.state_id, who.worker_id, who.incarnation, -1 if asked_rank is None else asked_rank, who.host,
                    world.low, world.high, int(settle_s * 1000), name, after_run,
                ],
            )  # fmt: skip
            failpoint("form.after_arrive")
            if answer[0] == "formed":
                return read_run(state, answer[1], worker_id=who.worker_id, wake_id=answer[2])
            if answer[0] == "again":
                number = int(answer[1]) + 1
                continue
            arrived, settle_left_ms = int(answer[1]), int(answer[2])
            left_ms = int((deadline - clock.monotonic()) * 1000)
            if left_ms > 0:
                block_ms = min(left_ms, settle_left_ms + 5) if settle_left_ms and arrived >= world.low else left_ms
                for _, entry_id, _ in exchange.wait({keys.wake: wake_id}, block_ms):
                    wake_id = entry_id
        except CoordinatorRefused:
            raise
        except CoordinatorUnavailable:
            if clock.monotonic() > deadline:
                raise
            clock.sleep(0.2)
        if clock.monotonic() > deadline:
            raise FormTimeout(
                f"no run formed within {timeout_s:g} s: {arrived} of {world.low}{f' to {world.high}' if world.high > world.low else ''} "
                f"members arrived. `dtr workers` shows who is alive; a living member of the last run that does not call form() "
                "holds the others back.",
                arrived=arrived, world=(world.low, world.high),
            )  # fmt: skip


def _newest(state: JobState) -> str:
    with translate(state.url):
        newest = state.redis.xrevrange(state.keys.wake, count=1)
    return str(newest[0][0]) if newest else "0-0"
