"""Barriers that name who is missing. Owns ``barrier:NAME:RUN:SEQ``.

Guarantees: a round counts distinct members, so a retry changes nothing; it has one final state, the same for all; broken and timed
out raise an error that names exactly who had not arrived. The members of a round are the run's roster, or an explicit subset.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from redis.exceptions import NoScriptError

from dtr import names
from dtr.clock import SYSTEM, Clock
from dtr.errors import BarrierBroken, BarrierError, BarrierTimeout, CoordinatorRefused, CoordinatorUnavailable, InvalidInput, RosterChanged
from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.client import translate
from dtr.state.exchange import Exchange
from dtr.state.job import JobState
from dtr.state.keys import RoundKeys
from dtr.state.scripts import load

__all__ = ["Barriers", "Missing"]

log = logging.getLogger(__name__)

OPEN = 0  # the answer "wait", an integer of one digit: see Exchange.ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A member that had not arrived; ``step`` and ``beat_age_s`` are None where nothing is known."""

    rank: int
    worker: str
    host: str
    step: int | None
    beat_age_s: float | None
    departed: str | None

    def __str__(self) -> str:
        step = "no step yet" if self.step is None else f"last step {self.step}"
        beat = "no beat known" if self.beat_age_s is None else f"last beat {self.beat_age_s:.1f} s ago"
        gone = f", departed: {self.departed}" if self.departed else ", alive"
        return f"rank {self.rank} {self.worker} on {self.host} ({step}, {beat}{gone})"


class Barriers:
    """The barriers of one member in one run; counts the rounds of each name from 0."""

    def __init__(self, state: JobState, exchange: Exchange, who: Identity, run: Run, *, clock: Clock = SYSTEM) -> None:
        self._state, self._exchange, self._who, self._run, self._clock = state, exchange, who, run, clock
        self._seq: dict[str, int] = {}
        self._fence = f"{who.state_id} {run.id}"
        self._place = f"{run.rank} {who.incarnation}"
        self._wake = state.keys.wake
        self._packed: dict[tuple[str, str], tuple[bytes, bytes, bytes, bytes]] = {}
        self._remember(run.wake_id)

    def wait(self, name: str, *, timeout_s: float, members: Collection[str] | None = None) -> str:
        """Arrive, and wait for every other expected member.

        Args:
            name: of the barrier; the n-th call with this name in this run is round n.
            timeout_s: then the round ends for all, unless it was released meanwhile.
            members: worker ids to expect, the same for every caller; default: the whole roster.

        Returns ``"form"`` when a newcomer waits for the next run (all members of the round get the same answer), else ``""``.

        Raises:
            BarrierBroken: an expected member departed; ``missing`` and ``reason`` say who and why.
            BarrierTimeout: the first timeout ended the round for all; ``missing`` says who had not arrived.
            RosterChanged: the run had ended before this round began.
            CoordinatorUnavailable: Redis could not be reached until the timeout; the round has no verdict, and the next call asks
                for the same one.
        """
        seq = self._seq.get(name, -1)
        if seq < 0:
            seq = self._seq[names.name(name, "barrier")] = 0
        subset = "" if members is None else self._subset(members)
        began = self._clock.monotonic()
        try:
            wanted = self._meet_at_once(name, seq, subset, timeout_s)
            if wanted is None:
                wanted = self._exchange_until_final(name, seq, subset, timeout_s, began)
        except BarrierError as exc:
            if isinstance(exc, (BarrierBroken, BarrierTimeout)):
                self._seq[name] = seq + 1
                raise self._described(exc, name, seq) from None
            raise
        self._seq[name] = seq + 1
        return wanted

    def _meet_at_once(self, name: str, seq: int, subset: str, timeout_s: float) -> str | None:
        """The usual round: one write, and one wake-up when the last has arrived. None if it takes longer or something is amiss.

        Nothing here is learned that asking again would not tell: an arrival may be sent twice.
        """
        parts = self._packed.get((name, subset))
        if parts is None:
            parts = self._packed[name, subset] = self._pack(name, subset)
        head, base, middle, tail = parts
        number = b"%d" % seq
        size = len(base) + len(number)
        payload = (
            b"%b$%d\r\n%b%b\r\n$%d\r\n%b%b:arrived\r\n$%d\r\n%b%b:wake\r\n"
            b"%b$%d\r\n%b\r\n%b$%d\r\n%d\r\n$7\r\nSTREAMS\r\n$%d\r\n%b%b:wake\r\n%b"
        ) % (
            head, size, base, number, size + 8, base, number, size + 5, base, number, middle, len(number), number, tail,
            4 if timeout_s >= 1 else 3, 1000 if timeout_s >= 1 else 100, size + 5, base, number, self._streams,
        )  # fmt: skip
        try:
            answer, news = self._exchange.ask(payload)
        except (NoScriptError, RosterChanged, CoordinatorUnavailable) as exc:
            if isinstance(exc, (BarrierBroken, CoordinatorRefused)):
                raise
            return None
        if answer != OPEN:
            return str(answer[1])
        for stream, entries in news or ():
            if stream == self._wake:
                self._remember(entries[-1][0])
            elif entries[0][1][1] == "RELEASED":
                return str(entries[0][1][3])
        return None

    def _pack(self, name: str, subset: str) -> tuple[bytes, bytes, bytes, bytes]:
        """What stays the same from round to round: of ``EVALSHA sha 4 roster ROUND.. args SEQ subset`` and ``XREAD BLOCK ms STREAMS``."""
        head = b"*13\r\n" + _bulk("EVALSHA", load("barrier_arrive").sha, "4", self._state.keys.roster)
        base = self._state.keys.barrier(name, self._run.id, 0).round[:-1].encode()
        middle = _bulk(self._fence, self._who.worker_id, self._place, name)
        tail = _bulk(subset) + b"*8\r\n" + _bulk("XREAD", "BLOCK")
        return head, base, middle, tail

    def _remember(self, wake_id: str) -> None:
        """The last entry of the job's news that this member has seen."""
        self._wake_id = wake_id
        self._streams = _bulk(self._wake, "0-0", wake_id)

    def _exchange_until_final(self, name: str, seq: int, subset: str, timeout_s: float, began: float) -> str:
        keys, wake = self._state.keys.barrier(name, self._run.id, seq), self._wake
        script_keys = (self._state.keys.roster, keys.round, keys.arrived, keys.wake)
        args = (self._fence, self._who.worker_id, self._place, name, seq, subset)
        deadline = began + timeout_s
        left_ms = max(1.0, (deadline - self._clock.monotonic()) * 1000)
        failing = False
        while True:
            try:
                streams = {keys.wake: "0-0", wake: self._wake_id}
                try:
                    answer, entries = self._exchange.run_and_wait("barrier_arrive", script_keys, args, streams, int(left_ms))
                except BarrierBroken:
                    raise
                except RosterChanged:
                    answer, entries = self._break(keys, subset), []
                if answer != OPEN:
                    return str(answer[1])
                for stream, entry_id, fields in entries:
                    if stream == keys.wake and fields["state"] == "RELEASED":
                        return fields["wanted"]
                    if stream == wake:
                        self._remember(entry_id)
                left_ms = (deadline - self._clock.monotonic()) * 1000
                if left_ms <= 0:
                    return self._time_out(script_keys, args, keys, subset, timeout_s)
            except CoordinatorRefused:
                raise
            except CoordinatorUnavailable as exc:
                if not failing:
                    failing = True
                    log.warning("barrier %r round %d waits on, its call did not get through: %s", name, seq, exc)
                left_ms = (deadline - self._clock.monotonic()) * 1000
                if left_ms <= 0:
                    raise CoordinatorUnavailable(f"barrier {name!r} round {seq} has no verdict after {timeout_s:g} s: {exc}") from exc
                self._clock.sleep(min(0.2, left_ms / 1000))

    def _break(self, keys: RoundKeys, subset: str) -> Any:
        """The run is not open: break the round and raise why; or learn that it was released, or that the run is open after all."""
        job, who, run = self._state.keys, self._who, self._run
        return self._state.call(
            "barrier_break",
            [job.meta, job.roster, job.run(run.id), keys.round, keys.arrived, keys.wake, job.events],
            [who.state_id, run.id, who.worker_id, run.rank, who.incarnation, subset],
        )

    def _time_out(self, script_keys: Sequence[str], args: Sequence[Any], keys: RoundKeys, subset: str, timeout_s: float) -> str:
        """The time is up: end the round for all, unless it was released meanwhile, however long ago."""
        job = self._state.keys
        try:
            look = self._state.call("barrier_arrive", script_keys, args)
        except BarrierBroken:
            raise
        except RosterChanged:
            look = self._break(keys, subset)
        if look != OPEN:
            return str(look[1])
        answer = self._state.call(
            "barrier_timeout",
            [job.run(self._run.id), keys.round, keys.arrived, keys.wake, job.events],
            [self._who.worker_id, subset, f"{timeout_s:g}"],
        )
        return str(answer[1])

    def _subset(self, members: Collection[str]) -> str:
        if isinstance(members, str) or not all(isinstance(m, str) for m in members):
            raise InvalidInput("members must be a collection of worker ids", field="members")
        chosen = sorted(members)
        unknown = [m for m in chosen if m not in self._run.roster]
        if not chosen or len(set(chosen)) != len(chosen) or unknown or self._who.worker_id not in chosen:
            raise InvalidInput(
                f"members must be distinct worker ids of run {self._run.id}, the caller {self._who.worker_id} among them, got {chosen}"
                + (f"; not in the run: {unknown}" if unknown else ""),
                field="members",
            )
        return orjson.dumps(chosen).decode()

    def _described(self, exc: BarrierError, name: str, seq: int) -> BarrierError:
        text = exc.message.rpartition(" script: ")[0] or exc.message  # an engine may add where the script failed
        reason, _, words = text.rpartition(" | ")
        missing = self._look_up([word.partition(":")[::2] for word in words.split()])
        verdict = "is broken" if isinstance(exc, BarrierBroken) else "timed out"
        who = "; ".join(map(str, missing)) or "nobody: all had arrived"
        return type(exc)(
            f"barrier {name!r} round {seq} of run {self._run.id} {verdict}: {reason}. Missing: {who}",
            barrier=name, seq=seq, run=self._run.id, reason=reason, missing=tuple(missing),
        )  # fmt: skip

    def _look_up(self, seats: list[tuple[str, str]]) -> list[Missing]:
        """What is known of each; the error must be raised even if Redis cannot be asked any more."""
        now_ms = time.time() * 1000
        hashes: list[dict[str, str]] = [{} for _ in seats]
        departed: list[str | None] = [None for _ in seats]
        try:
            with translate(self._state.url):
                pipeline = self._state.redis.pipeline(transaction=False)
                for _, worker in seats:
                    pipeline.hgetall(self._state.keys.worker(worker))
                    pipeline.hget(self._state.keys.departed, worker)
                pipeline.time()
                *replies, (seconds, microseconds) = pipeline.execute()
            now_ms, hashes, departed = seconds * 1000 + microseconds / 1000, replies[::2], replies[1::2]
        except CoordinatorUnavailable:
            pass  # names and ranks are known without it
        found = []
        for (rank, worker), fields, gone in zip(seats, hashes, departed, strict=True):
            incarnation, left_at, why = [*(gone or "").split(" ", 2), "", "", ""][:3]
            seat = self._run.roster.get(worker)
            mine = seat is not None and incarnation == seat.incarnation
            step = fields.get("step")
            beat_at = fields.get("beat_at") or (left_at if mine else "")
            found.append(
                Missing(
                    rank=int(rank),
                    worker=worker,
                    host=seat.host if seat else "?",
                    step=int(step) if step else None,
                    beat_age_s=max(0.0, (now_ms - float(beat_at)) / 1000) if beat_at else None,
                    departed=why if mine else None,
                )
            )
        return found


def _bulk(*words: str) -> bytes:
    """Words as the wire has them."""
    return b"".join(b"$%d\r\n%b\r\n" % (len(raw), raw) for raw in (word.encode() for word in words))
