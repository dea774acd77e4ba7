"""The state machine of checkpoints in Redis, typed: the one caller of every ``ckpt_*`` and ``part_*`` script.

    WRITING -> SEALED -> COMMITTED | ABANDONED        ABORTING -> ABORTED, or COMMITTED if a commit record was there first
    WRITING -> ABORTING

Trainers ``begin`` (and ``fail``); uploaders ``register``, ``claim``, ``renew``, ``release``, ``done`` and ``lose``; whoever read the
decision record back from the store calls ``decide``. Every call may be sent twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from dtr.checkpoint.manifest import PartFacts, Replicated
from dtr.errors import InvalidInput, StateCorrupt
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = [
    "CheckpointView",
    "Claim",
    "Fence",
    "PartView",
    "Placed",
    "Spec",
    "StagedPart",
    "begin",
    "claim",
    "decide",
    "done",
    "fail",
    "lose",
    "open_checkpoints",
    "read",
    "register",
    "release",
    "renew",
]

OPEN_STATES: Final = ("WRITING", "SEALED", "ABORTING")
FINAL_STATES: Final = ("COMMITTED", "ABANDONED", "ABORTED")
_PART_FIELDS: Final = (
    "state", "worker", "incarnation", "host", "save", "size_bytes", "object", "checksum", "uploader", "lease_until", "retry_at",
    "attempts", "failures", "progress_bytes", "error", "object_bytes", "piece_bytes", "pieces", "kind",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What all ranks must say alike about one checkpoint. ``writer`` is the rank that writes a state of which all is replicated."""

    run: str
    step: int
    world_size: int
    store: str
    replicated: Replicated = "none"
    writer: int = 0

    def facts(self) -> list[Any]:
        """world_size, replicated, writer, store as the scripts take them."""
        return [self.world_size, self.replicated, self.writer if self.replicated == "all" else "", self.store]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Who calls: one seat of one run."""

    rank: int
    worker: str
    incarnation: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPart:
    """A part that is complete in a slot; ``save`` is the id of that ``save_async``."""

    size_bytes: int
    save: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What a checkpoint says to a part. ``save`` is the one that counts: another than the caller's means that this step was saved
    before with as many bytes, and the caller compares them (``part.checksum`` once the first is done).
    """

    state: str
    part_state: str
    save: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The answer to a claim.

    ``answer``: CLAIMED (``nonce``, ``save``, ``failures`` so far), BUSY (``left_ms``, ``detail`` the uploader), LATER (``left_ms``,
    ``detail`` the last error), DONE, ELSEWHERE (``detail`` the host), or NONE (``state`` and ``detail`` of the checkpoint).
    """

    answer: str
    nonce: str = ""
    save: str = ""
    attempts: int = 0
    failures: int = 0
    left_ms: int = 0
    state: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartView:
    """One rank's part as Redis knows it. ``size_bytes`` were staged; ``object_bytes`` has the object, which is less for chunks."""

    rank: int
    state: str
    worker: str
    incarnation: str
    host: str
    save: str
    size_bytes: int
    object: str
    checksum: str
    uploader: str
    lease_until_ms: int
    retry_at_ms: int
    attempts: int
    failures: int
    progress_bytes: int
    error: str
    object_bytes: int
    piece_bytes: int
    pieces: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointView:
    """A checkpoint as Redis knows it, with the server's clock at that moment."""

    run: str
    step: int
    state: str
    reason: str
    world_size: int
    expected: int
    replicated: Replicated
    writer: int
    store: str
    created_at_ms: int
    sealed_at_ms: int
    parts: Mapping[int, PartView]
    now_ms: int

    @property
    def expected_ranks(self) -> range:
        """The ranks whose parts complete the checkpoint."""
        return range(self.writer, self.writer + 1) if self.replicated == "all" else range(self.world_size)


# --- trainers -------------------------------------------------------------------------------------------------------


def begin(state: JobState, state_id: str, spec: Spec, who: Fence, part: StagedPart | None) -> Placed:
    """Begin or join a checkpoint under the caller's current run; ``part`` None: a rank that has nothing to write.

    Raises:
        CheckpointAborted, CheckpointAbandoned: it is over, with the reason.
        CheckpointConflict: others began it with another world size or store, or this rank saved it with another size.
        RosterChanged, StaleIncarnation, StateLost: the fence. Parts of an ended run go through ``register``.
    """
    if part is not None and spec.replicated == "all" and who.rank != spec.writer:
        raise InvalidInput(f"a replicated state is written by rank {spec.writer}, not by rank {who.rank}", field="rank")
    k = state.keys
    answer = state.call(
        "ckpt_begin",
        [k.meta, k.roster, k.run(spec.run), *_ckpt(state, spec.run, spec.step), k.ckpts, k.open_ckpts, k.events],
        [
            state_id, spec.run, spec.step, who.rank, who.worker, who.incarnation, who.host, *spec.facts(),
            part.size_bytes if part else 0, part.save if part else "",
        ],
    )  # fmt: skip
    return Placed(state=answer[0], part_state=answer[1], save=answer[2])


def fail(state: JobState, state_id: str, spec: Spec, who: Fence, reason: str) -> str:
    """This rank skipped or failed its save, so the checkpoint cannot become complete; returns its state, SEALED or later if too late."""
    k = state.keys
    answer = state.call(
        "ckpt_fail",
        [k.meta, k.run(spec.run), k.ckpt(spec.run, spec.step), k.ckpts, k.open_ckpts, k.events],
        [state_id, spec.run, spec.step, who.rank, who.worker, who.incarnation, *spec.facts(), _line(reason)],
    )
    return str(answer)


# --- uploaders ------------------------------------------------------------------------------------------------------


def register(state: JobState, spec: Spec, who: Fence, part: StagedPart) -> Placed:
    """Make known a complete slot, whoever staged it being alive or not, the run open or not.

    Raises:
        RunUnknown: Redis does not know the run; rebuild it from the store, then try again.
        CheckpointError: the slot is of no use: its member was not in that roster, the checkpoint is over, the lineage went elsewhere.
    """
    k = state.keys
    answer = state.call(
        "part_register",
        [k.meta, k.run(spec.run), k.lineage, *_ckpt(state, spec.run, spec.step), k.ckpts, k.open_ckpts, k.events],
        [spec.run, spec.step, who.rank, who.worker, who.incarnation, who.host, *spec.facts(), part.size_bytes, part.save],
    )
    return Placed(state=answer[0], part_state=answer[1], save=answer[2])


def claim(state: JobState, run: str, step: int, rank: int, *, host: str, token: str, nonce: str, lease_ms: int, max_attempts: int) -> Claim:
    """Ask for a part; ``token`` names this attempt alone, so that asking again after a lost reply is the same attempt."""
    k = state.keys
    answer = state.call(
        "part_claim",
        [k.meta, *_ckpt(state, run, step), k.events],
        [run, step, rank, host, token, nonce, lease_ms, max_attempts],
    )
    match answer[0]:
        case "CLAIMED":
            return Claim(answer="CLAIMED", nonce=answer[1], attempts=int(answer[2]), failures=int(answer[3]), save=answer[4])
        case "BUSY" | "LATER":
            return Claim(answer=answer[0], left_ms=int(answer[1]), detail=answer[2])
        case "DONE":
            return Claim(answer="DONE", state=answer[1], save=answer[2])
        case "ELSEWHERE":
            return Claim(answer="ELSEWHERE", detail=answer[1])
    return Claim(answer="NONE", state=answer[1], detail=answer[2])


def renew(state: JobState, run: str, step: int, rank: int, *, token: str, lease_ms: int, progress_bytes: int) -> bool:
    """Keep a claim; False: it is another's by now, or the checkpoint is over, and the holder must stop."""
    return bool(int(state.call("part_renew", _ckpt(state, run, step), [rank, token, lease_ms, progress_bytes])))


def release(state: JobState, run: str, step: int, rank: int, *, token: str, error: str, retry_ms: int, counts: bool = False) -> bool:
    """Give a claim back because of an error; nobody is granted one before ``retry_ms`` from now.

    ``counts``: the attempt counts towards ``max_attempts``. A store that throttles or a worker that stops is no fault of the part.
    """
    answer = state.call("part_release", [state.keys.parts(run, step)], [rank, token, _line(error), retry_ms, int(counts)])
    return bool(int(answer))


def done(state: JobState, run: str, step: int, facts: PartFacts, *, nonce: str) -> tuple[str, str]:
    """Record a part that is in the store. Returns the checkpoint's state and '', or LOST and why the object is not part of it.

    Raises:
        CheckpointConflict: this rank's part has another size or checksum.
    """
    answer = state.call(
        "part_done",
        [state.keys.meta, *_ckpt(state, run, step), state.keys.events],
        [
            run, step, facts.rank, nonce, facts.object, facts.size_bytes, facts.checksum, facts.piece_bytes, facts.pieces, facts.kind,
            facts.state_bytes,
        ],
    )  # fmt: skip
    return answer[0] or "", answer[1] if len(answer) > 1 else ""


def lose(state: JobState, run: str, step: int, rank: int, *, seen: str, reason: str) -> str:
    """A part can never be uploaded: abort the checkpoint, if that part is still as it was ``seen``. Returns the checkpoint's state."""
    k = state.keys
    return str(state.call("part_lose", [*_ckpt(state, run, step), k.events], [run, step, rank, seen, _line(reason)]))


# --- whoever read the decision --------------------------------------------------------------------------------------


def decide(state: JobState, run: str, step: int, *, decision: str, reason: str = "", size_bytes: int = 0) -> str:
    """Record the store's decision, after it was read back. Returns the checkpoint's state, UNKNOWN if Redis has none.

    Raises:
        CheckpointError: Redis has another verdict already, which must not be.
    """
    k = state.keys
    answer = state.call(
        "ckpt_decide",
        [k.meta, k.lineage, k.ckpt(run, step), k.open_ckpts, k.events],
        [run, step, decision, _line(reason), size_bytes],
    )
    return str(answer)


# --- reading --------------------------------------------------------------------------------------------------------


def read(state: JobState, run: str, step: int, ranks: Sequence[int] | None = None) -> CheckpointView | None:
    """The checkpoint and its parts (those of ``ranks`` alone, if given) at one moment; None if Redis has none.

    Raises:
        StateCorrupt: a field is missing or no number.
    """
    with translate(state.url):
        pipeline = state.redis.pipeline(transaction=True)
        pipeline.hgetall(state.keys.ckpt(run, step))
        names = [f"{rank}/{field}" for rank in ranks or () for field in _PART_FIELDS]
        if ranks is None:
            pipeline.hgetall(state.keys.parts(run, step))
        elif names:
            pipeline.hmget(state.keys.parts(run, step), names)
        pipeline.time()
        fields, *found, (seconds, microseconds) = pipeline.execute()
    part_fields = found[0] if ranks is None else {n: v for n, v in zip(names, found[0] if found else (), strict=True) if v is not None}
    if not fields:
        return None
    try:
        return CheckpointView(
            run=run,
            step=step,
            state=fields["state"],
            reason=fields.get("reason", ""),
            world_size=int(fields["world_size"]),
            expected=int(fields["expected"]),
            replicated=cast("Replicated", fields["replicated"]),
            writer=int(fields.get("writer") or 0),
            store=fields["store"],
            created_at_ms=int(fields.get("created_at") or 0),
            sealed_at_ms=int(fields.get("sealed_at") or 0),
            parts=_parts(part_fields),
            now_ms=int(seconds) * 1000 + int(microseconds) // 1000,
        )
    except (KeyError, ValueError) as exc:
        raise StateCorrupt(f"{state.keys.ckpt(run, step)} lacks a field or holds a wrong one: {exc}") from exc


def open_checkpoints(state: JobState) -> list[tuple[str, int]]:
    """Run and step of every checkpoint without a decision, oldest first."""
    with translate(state.url):
        members = state.redis.zrange(state.keys.open_ckpts, 0, -1)
    return [(run, int(step)) for run, _, step in (member.rpartition("/") for member in members) if step.isdigit()]


def _parts(fields: Mapping[str, str]) -> dict[int, PartView]:
    by_rank: dict[int, dict[str, str]] = {}
    for name, value in fields.items():
        rank, _, field = name.partition("/")
        by_rank.setdefault(int(rank), {})[field] = value
    return {
        rank: PartView(
            rank=rank,
            state=held.get("state", ""),
            worker=held.get("worker", ""),
            incarnation=held.get("incarnation", ""),
            host=held.get("host", ""),
            save=held.get("save", ""),
            size_bytes=int(held.get("size_bytes") or 0),
            object=held.get("object", ""),
            checksum=held.get("checksum", ""),
            uploader=held.get("uploader", ""),
            lease_until_ms=int(held.get("lease_until") or 0),
            retry_at_ms=int(held.get("retry_at") or 0),
            attempts=int(held.get("attempts") or 0),
            failures=int(held.get("failures") or 0),
            progress_bytes=int(held.get("progress_bytes") or 0),
            error=held.get("error", ""),
            object_bytes=int(held.get("object_bytes") or 0),
            piece_bytes=int(held.get("piece_bytes") or 0),
            pieces=held.get("pieces", ""),
            kind=held.get("kind", "file"),
        )
        for rank, held in sorted(by_rank.items())
    }


def _ckpt(state: JobState, run: str, step: int) -> list[str]:
    return [state.keys.ckpt(run, step), state.keys.parts(run, step)]


def _line(text: str) -> str:
    """One line that fits a terminal and a hash field."""
    return " ".join(text.split())[:500]
