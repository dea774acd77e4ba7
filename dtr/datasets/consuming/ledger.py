"""The ledger of one data set in one epoch of a run: leases, quarantine and what ends the epoch. Owns ``ledger:...`` and ``quarantine:...``.

    open         every rank, before its first lease: the same base, compared; leasing is refused until then
    lease        free shards, own placement first; none free: this rank is dry, it has no batch beyond those that it has
    report       (:mod:`dtr.datasets.consuming.reports`) what is handed out, sent before the trainer gets it
    verdict      an epoch of the run has as many batches as the rank that has most, once every rank is dry

A departure ends the run, and the next run has a ledger of its own: so within a ledger nobody takes a lease from anybody, and what a dead
rank held is free in the next one, but for what its lineage consumed. Killed after open, the others find the same base. Killed after a
lease, its shards are nobody's until the run ends, which its death does. A reply that is lost is asked for again by number, and a Redis
that forgot a lease is found out by the next number.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dtr.datasets.consuming.datastate import Cursor, DataState, Dynamic
from dtr.datasets.registering.spec import DatasetSpec
from dtr.errors import ShardUnreadable
from dtr.session import Session
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["KEEP_MS", "Leased", "Ledger", "Verdict", "base_digest", "quarantined", "release", "taken_bits"]

KEEP_MS: Final = 7 * 86_400_000
MOST_SHARDS_A_LEASE: Final = 256
FEW: Final = 3  # shards that may be in quarantine however few there are
CHANNEL: Final = "loader"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """The answer to a lease. ``shards`` are (number, fence); ``quarantined`` were met on the way, and are nobody's."""

    shards: tuple[tuple[int, int], ...]
    quarantined: tuple[int, ...]
    dry: bool

    @classmethod
    def parse(cls, answer: str) -> Leased:
        """What ledger_lease answered."""
        dry, leased, bad = answer.split("|")
        pairs = [word.partition(":") for word in leased.split()]
        return cls(
            shards=tuple((int(shard), int(fence)) for shard, _, fence in pairs),
            quarantined=tuple(map(int, bad.split())),
            dry=dry == "1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How long the epoch is known to be: at least ``batches``; for good once every rank is dry (``final``)."""

    batches: int
    final: bool


class Ledger:
    """One rank's view of one ledger.

    Args:
        session: in the run.
        spec: of the data set.
        epoch: of the data set.
    """

    def __init__(self, session: Session, spec: DatasetSpec, epoch: int) -> None:
        self.session, self.spec, self.epoch, self.run = session, spec, epoch, session.run
        self.keys = session.state.keys.ledger(spec.name, epoch, self.run.id)
        self._leases = 0  # shards that this rank knows it was given
        self._granted: list[str] = []  # answers; one may come late, when the connection broke before it was read
        self.quarantine_key = session.state.keys.quarantine(spec.name, spec.digest)

    def open(self, base: DataState) -> None:
        """Set what was consumed before this run of this epoch; every rank says the same.

        Raises:
            ShardUnreadable: too many shards are in quarantine: see `check_quarantine`.
            DataConflict: another rank said something else.
            RosterChanged, StaleIncarnation, StateLost: the run ended.
        """
        state, keys = self.session.state, self.keys
        if isinstance(base, Dynamic):
            self.check_quarantine()
        bits = taken_bits(base, self.spec.shards) if isinstance(base, Dynamic) else b""
        self.session.guarded(
            lambda: state.call(
                "ledger_open",
                [state.keys.meta, state.keys.roster, state.keys.run(self.run.id), keys.ledger, keys.taken],
                [*self._seat(), base.version, base.digest, base.mode, base.seed, self.spec.shards, base_digest(base), bits, KEEP_MS],
            )
        )

    def lease(self, candidates: Sequence[int], *, want: int, have: int, anything: bool) -> Leased:
        """Lease up to ``want`` shards. What a call that failed was granted all the same comes with the next one.

        Args:
            candidates: to be preferred, the best first.
            want: how many; at most 256 are given.
            have: batches of this epoch that this rank has samples for, those yielded included.
            anything: any free shard will do. Then an answer without shards that says ``dry`` ends the epoch for this rank.

        Raises as `open`, LedgerUnset, and CoordinatorUnavailable: nobody knows what was granted; call it again.
        """
        state, keys, run = self.session.state, self.keys, self.run
        # Ranks look from different places on, so that they do not all want the same shard of the others'.
        from_byte = run.rank * (-(-self.spec.shards // 8)) // run.world_size if anything else -1
        most = min(want, MOST_SHARDS_A_LEASE)
        self.session.numbered(
            CHANNEL,
            "ledger_lease",
            [state.keys.meta, state.keys.roster, state.keys.fences, keys.ledger, keys.taken, self.quarantine_key],
            [*self._seat(), have, most, self._leases, from_byte, KEEP_MS, " ".join(map(str, candidates))],
            on_answer=self._granted.append,
        )
        answers, self._granted = [Leased.parse(answer) for answer in self._granted], []
        shards = tuple(pair for answer in answers for pair in answer.shards)
        self._leases += len(shards)
        return Leased(
            shards=shards,
            quarantined=tuple(shard for answer in answers for shard in answer.quarantined),
            dry=answers[-1].dry,
        )

    def quarantine(self, shard: int, fence: int, *, where: str, reason: str) -> bool:
        """Make a shard nobody's, because it cannot be read; False if the lease does not stand any more.

        Raises ShardUnreadable if that makes too many.
        """
        state, keys = self.session.state, self.keys
        seat = [*self._seat(), self.spec.name, shard, fence, where, " ".join(reason.split())[:500]]
        answer = self.session.guarded(
            lambda: state.call(
                "ledger_quarantine", [state.keys.meta, state.keys.roster, keys.ledger, self.quarantine_key, state.keys.events], seat
            )
        )
        self.check_quarantine()
        return bool(int(answer))

    def check_quarantine(self) -> None:
        """Raise ShardUnreadable if more than `FEW` shards, and more than a tenth, are in quarantine: that is no epoch of this data set."""
        with translate(self.session.state.url):
            count = int(self.session.state.redis.hlen(self.quarantine_key))
        if count > max(FEW, self.spec.shards // 10):
            name = shlex.quote(self.spec.name)
            raise ShardUnreadable(
                f"{count} of {self.spec.shards} shards of data set {self.spec.name!r} are in quarantine, too many to train without them: "
                f"`dtr data show {name}` has their errors; put the files back as they were, or take samples out with `dtr data skip`, and "
                f"then have them read again with `dtr data release {name}`"
            )

    def reasons(self, shards: Sequence[int]) -> dict[int, str]:
        """Why these shards are in quarantine."""
        if not shards:
            return {}
        with translate(self.session.state.url):
            found: Any = self.session.state.redis.hmget(self.quarantine_key, [str(shard) for shard in shards])
        return {shard: reason or "" for shard, reason in zip(shards, found, strict=True)}

    def verdict(self) -> Verdict:
        """How long the epoch is, as far as the ranks have said."""
        with translate(self.session.state.url):
            most, dry = self.session.state.redis.hmget(self.keys.ledger, [":most", ":dry"])
        return Verdict(batches=int(most or 0), final=int(dry or 0) >= self.run.world_size)

    def seats(self) -> list[tuple[int, bool]]:
        """Of each rank: batches that it has samples for, and whether it is dry, so that it will not have more."""
        ranks = range(self.run.world_size)
        with translate(self.session.state.url):
            found: Any = self.session.state.redis.hmget(self.keys.ledger, [f"{what}/{rank}" for what in ("have", "dry") for rank in ranks])
        return [(int(found[rank] or 0), found[len(ranks) + rank] is not None) for rank in ranks]

    def _seat(self) -> list[Any]:
        who = self.session.identity
        return [who.state_id, self.run.id, who.worker_id, self.run.rank, self.run.roster[who.worker_id].incarnation]


def quarantined(state: JobState, spec: DatasetSpec) -> dict[int, str]:
    """Shards of a data set that nobody may lease, with their errors. Raises CoordinatorUnavailable."""
    with translate(state.url):
        held: dict[str, str] = state.redis.hgetall(state.keys.quarantine(spec.name, spec.digest))
    return dict(sorted((int(shard), reason) for shard, reason in held.items() if shard.isdigit()))


def release(state: JobState, spec: DatasetSpec, shards: Sequence[int]) -> tuple[int, ...]:
    """Let shards out of quarantine, and say which of them were in it. Raises CoordinatorUnavailable."""
    keys = [state.keys.quarantine(spec.name, spec.digest), state.keys.events]
    return tuple(map(int, str(state.call("ledger_release", keys, [spec.name, " ".join(map(str, shards))])).split()))


def taken_bits(base: Dynamic, shards: int) -> bytes:
    """The bitmap of shards that nobody may lease, as Redis numbers bits: the first shard is the highest bit of the first byte."""
    taken = np.zeros(-(-shards // 8) * 8, dtype=bool)
    taken[shards:] = True
    for start, stop in base.done:
        taken[start:stop] = True
    return np.packbits(taken).tobytes()


def base_digest(base: DataState) -> str:
    """Equal for equal states alone, whoever computes it."""
    facts = [base.mode, base.version, base.digest, base.epoch]
    if isinstance(base, Cursor):
        facts += [base.batch, base.seed, base.global_batch_size, base.window, base.tail]
    else:
        facts += [base.done, sorted(base.partial.items())]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
