"""How far a save is: bytes of each rank's part that are in the store, how fast they go there, and how long the rest takes.

Reading takes one round trip and only the few fields that it shows, so that a checkpoint of a thousand ranks may be watched. Rates are
measured by whoever looks, from one look to the next, on the server's clock. Everything but ``ask`` is pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dtr.checkpoint.parts import FINAL_STATES
from dtr.state.keys import Keys

__all__ = ["Meter", "PartProgress", "PartSight", "SaveProgress", "Sight", "answered", "ask", "ended", "measure"]

ABSENT: Final = "absent"
_WINDOW_MS: Final = 10_000
_REPORT_MS: Final = 5_000
_MEGA: Final = 1e6
_CKPT_FIELDS: Final = ("state", "reason", "size_bytes", "created_at", "decided_at", "world_size", "replicated", "writer")
_PART_FIELDS: Final = ("state", "worker", "host", "size_bytes", "progress_bytes", "uploader", "lease_until", "error", "state_checksum")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartProgress:
    """One rank's part.

    Args:
        rank: of the run.
        worker, host: who staged it and where; '' while nobody has.
        state: ``absent`` (not staged yet), ``staged`` (waits for an uploader), ``uploading``, or ``done`` (in the store).
        done_bytes: in the store. total_bytes: to go there; None while the part is absent.
        mb_per_s: 10**6 bytes a second, over the last seconds; None unless it is uploading and was seen to move.
        left_s: at that rate; 0 when it is done, None if that is not known.
        error: why the last attempt ended, while it waits for the next.
    """

    rank: int
    worker: str = ""
    host: str = ""
    state: str = ABSENT
    done_bytes: int = 0
    total_bytes: int | None = None
    mb_per_s: float | None = None
    left_s: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveProgress:
    """A checkpoint on its way.

    Args:
        run, step: whose.
        state: STAGED (Redis does not know it yet), WRITING, SEALED, ABORTING, COMMITTED, ABORTED, ABANDONED, or that of the handle.
        reason: why it is not committed, if it will not be.
        parts: those that were looked at, in order of rank: every rank's, once somebody asked for progress.
        expected: parts that make it complete.
        done_bytes, total_bytes: of those parts that are staged.
        mb_per_s, left_s: of all of them together; None as for a part.
        age_s: since it was begun, until it was decided.
    """

    run: str
    step: int
    state: str
    reason: str = ""
    parts: tuple[PartProgress, ...] = ()
    expected: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    mb_per_s: float | None = None
    left_s: float | None = None
    age_s: float | None = None

    @property
    def done_parts(self) -> int:
        """How many are in the store."""
        return self.expected if self.state == "COMMITTED" else sum(part.state == "done" for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSight:
    """One rank's part as Redis showed it. ``uploading``: somebody holds a claim on it; ``checksum``: of what was staged, once stored."""

    rank: int
    state: str
    worker: str
    host: str
    size_bytes: int
    progress_bytes: int
    uploading: bool
    error: str
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """A checkpoint as Redis showed it at ``at_ms`` of the server's clock; ``state`` '' if it has none.

    ``parts``: those asked for; ``checksum``: of what the looking rank's part was staged with, once it is stored.
    """

    state: str
    reason: str = ""
    size_bytes: int = 0
    created_at_ms: int = 0
    decided_at_ms: int = 0
    at_ms: int = 0
    expected: range = range(0)
    parts: tuple[PartSight, ...] = ()
    checksum: str = ""

    @property
    def whole(self) -> bool:
        """Whether every expected part was asked for."""
        return len(self.parts) == len(self.expected)

    def part(self, rank: int) -> PartSight | None:
        """That of one rank, if it was asked for and is staged."""
        return next((part for part in self.parts if part.rank == rank and part.state), None)


def ask(pipeline: Any, keys: Keys, run: str, step: int, ranks: Sequence[int]) -> None:
    """Queue the three reads of one sight."""
    pipeline.hmget(keys.ckpt(run, step), _CKPT_FIELDS)
    pipeline.hmget(keys.parts(run, step), [f"{rank}/{field}" for rank in ranks for field in _PART_FIELDS] or ["-"])
    pipeline.time()


def answered(replies: Iterator[Any], ranks: Sequence[int]) -> Sight:
    """The sight that the next three replies tell; what is no number counts as none."""
    ckpt, found, (seconds, microseconds) = next(replies), next(replies), next(replies)
    held = dict(zip(_CKPT_FIELDS, (text or "" for text in ckpt), strict=True))
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    width, writer = len(_PART_FIELDS), _whole(held["writer"])
    return Sight(
        state=held["state"],
        reason=held["reason"],
        size_bytes=_whole(held["size_bytes"]),
        created_at_ms=_whole(held["created_at"]),
        decided_at_ms=_whole(held["decided_at"]),
        at_ms=now_ms,
        expected=range(writer, writer + 1) if held["replicated"] == "all" else range(_whole(held["world_size"])),
        parts=tuple(_part(rank, found[n * width : (n + 1) * width], now_ms) for n, rank in enumerate(ranks)),
    )


def _part(rank: int, values: Sequence[str | None], now_ms: int) -> PartSight:
    held = dict(zip(_PART_FIELDS, (text or "" for text in values), strict=True))
    return PartSight(
        rank=rank,
        state=held["state"],
        worker=held["worker"],
        host=held["host"],
        size_bytes=_whole(held["size_bytes"]),
        progress_bytes=_whole(held["progress_bytes"]),
        uploading=bool(held["uploader"]) and _whole(held["lease_until"]) > now_ms,
        error=held["error"],
        checksum=held["state_checksum"],
    )


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0


class Meter:
    """Measures the rates of one checkpoint's parts from successive sights."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, int]]] = {}  # rank -> (at_ms, bytes) at each change, the first sight included

    def rate(self, part: PartSight, at_ms: int) -> float | None:
        """Bytes a second of one part over about the last ten seconds; None while it has not moved."""
        seen = self._seen.setdefault(part.rank, deque())
        if not part.uploading or (seen and part.progress_bytes < seen[-1][1]):
            seen.clear()
        if not part.uploading:
            return None
        if not seen or part.progress_bytes > seen[-1][1]:
            seen.append((at_ms, part.progress_bytes))
        while len(seen) > 2 and seen[1][0] <= at_ms - _WINDOW_MS:
            seen.popleft()
        (first_ms, first), (last_ms, last) = seen[0], seen[-1]
        if last_ms <= first_ms:
            return None
        # One that has not moved for longer than reports take to come gets slower with every look.
        return (last - first) * 1000 / max(last_ms - first_ms, at_ms - first_ms - _REPORT_MS)


def measure(run: str, step: int, sight: Sight, meter: Meter) -> SaveProgress:
    """What a sight means, with the rates that it and earlier ones give."""
    rates = {part.rank: meter.rate(part, sight.at_ms) for part in sight.parts}
    parts = tuple(_measured(part, rates[part.rank]) for part in sight.parts)
    done, total = sum(part.done_bytes for part in parts), sum(part.total_bytes or 0 for part in parts)
    rate = sum(found for found in rates.values() if found)
    over = sight.state in FINAL_STATES
    staged = sight.whole and all(part.total_bytes is not None for part in parts)
    left_s = None
    if staged and (done == total or rate):
        left_s = max([0.0 if done == total else (total - done) / rate, *(part.left_s or 0.0 for part in parts)])
    until_ms = sight.decided_at_ms if over and sight.decided_at_ms else sight.at_ms
    return SaveProgress(
        run=run,
        step=step,
        state=sight.state,
        reason=sight.reason,
        parts=parts,
        expected=len(sight.expected),
        done_bytes=sight.size_bytes if sight.state == "COMMITTED" else done,
        total_bytes=sight.size_bytes if sight.state == "COMMITTED" else total,
        mb_per_s=rate / _MEGA if rate and not over else None,
        left_s=None if over else left_s,
        age_s=max(0, until_ms - sight.created_at_ms) / 1000 if sight.created_at_ms else None,
    )


def ended(progress: SaveProgress, state: str, reason: str, size_bytes: int | None = None) -> SaveProgress:
    """The last word about a save whose parts are not to be seen any more, or that ended otherwise than its checkpoint."""
    found = replace(progress, state=state, reason=reason, mb_per_s=None, left_s=None)
    return found if size_bytes is None else replace(found, done_bytes=size_bytes, total_bytes=size_bytes)


def _measured(part: PartSight, rate: float | None) -> PartProgress:
    if not part.state:
        return PartProgress(rank=part.rank)
    total = part.size_bytes
    done = total if part.state == "done" else min(part.progress_bytes, total)
    left_s = 0.0 if part.state == "done" else (total - done) / rate if rate else None
    return PartProgress(
        rank=part.rank,
        worker=part.worker,
        host=part.host,
        state="uploading" if part.uploading and part.state == "staged" else part.state,
        done_bytes=done,
        total_bytes=total,
        mb_per_s=rate / _MEGA if rate else None,
        left_s=left_s,
        error=part.error if part.state == "staged" else "",
    )
