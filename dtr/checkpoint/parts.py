"""The state machine of checkpoints in Redis, typed: the one caller of every ``ckpt_*`` and ``part_*`` script.

    WRITING -> SEALED -> COMMITTED | ABANDONED        ABORTING -> ABORTED, or COMMITTED if a commit record was there first
    WRITING -> ABORTING

Trainers ``begin`` (and ``fail``); uploaders ``register``, ``claim``, ``renew``, ``release``, ``done`` and ``lose``; whoever read the
decision record back from the store calls ``decide``. Every call may be sent twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from dtr.checkpoint.manifest import PartFacts, Replicated
from dtr.checkpoint.part_views import CheckpointView, PartView, open_checkpoints, read
from dtr.checkpoint.saving import metrics as metric_values
from dtr.checkpoint.saving.metrics import Metrics
from dtr.errors import InvalidInput
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What all ranks must say alike about one checkpoint.

    ``writer`` is the rank that writes a state of which all is replicated; ``structure`` the digest of what is, where only some is.
    """

    run: str
    step: int
    world_size: int
    store: str
    replicated: Replicated = "none"
    writer: int = 0
    structure: str = ""

    def facts(self) -> list[Any]:
        """world_size, replicated, writer, store as the scripts take them."""
        replicated = f"{self.replicated} {self.structure}".rstrip()
        return [self.world_size, replicated, self.writer if self.replicated == "all" else "", self.store]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Who calls: one seat of one run."""

    rank: int
    worker: str
    incarnation: str
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPart:
    """A part that is complete in a slot; ``save`` is the id of that ``save_async``, ``metrics`` what was said of it."""

    size_bytes: int
    save: str
    metrics: Metrics = field(default_factory=dict)


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
            part.size_bytes if part else 0, part.save if part else "", metric_values.encode(part.metrics) if part else "",
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
        [
            spec.run, spec.step, who.rank, who.worker, who.incarnation, who.host, *spec.facts(), part.size_bytes, part.save,
            metric_values.encode(part.metrics),
        ],
    )  # fmt: skip
    return Placed(state=answer[0], part_state=answer[1], save=answer[2])


def claim(state: JobState, run: str, step: int, rank: int, *, host: str, token: str, nonce: str, lease_ms: int, max_attempts: int) -> Claim:
    """Ask for a part; ``token`` names this attempt alone, so that asking again after a lost reply is the same attempt."""
    k = state.keys
    answer = state.call(
        "part_claim",
        [k.meta, *_ckpt(state, run, step), k.transfer(run, step, rank), k.events],
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
        [state.keys.meta, *_ckpt(state, run, step), *_shares(state, run, step, facts.rank), state.keys.events],
        [
            run, step, facts.rank, nonce, facts.object, facts.size_bytes, facts.checksum, facts.piece_bytes, facts.pieces, facts.kind,
            facts.state_bytes, facts.state_checksum,
        ],
    )  # fmt: skip
    return answer[0] or "", answer[1] if len(answer) > 1 else ""


def lose(state: JobState, run: str, step: int, rank: int, *, seen: str, reason: str) -> str:
    """A part can never be uploaded: abort the checkpoint, if that part is still as it was ``seen``. Returns the checkpoint's state."""
    k = state.keys
    return str(state.call("part_lose", [*_ckpt(state, run, step), k.events], [run, step, rank, seen, _line(reason)]))


# --- whoever read the decision --------------------------------------------------------------------------------------


def decide(
    state: JobState, run: str, step: int, *, decision: str, reason: str = "", size_bytes: int = 0, metrics: Metrics | None = None
) -> str:
    """Record the store's decision, after it was read back. Returns the checkpoint's state, UNKNOWN if Redis has none.

    Raises:
        CheckpointError: Redis has another verdict already, which must not be.
    """
    k = state.keys
    answer = state.call(
        "ckpt_decide",
        [k.meta, k.lineage, k.ckpt(run, step), k.open_ckpts, k.events, k.failed_saves],
        [run, step, decision, _line(reason), size_bytes, metric_values.encode(metrics or {})],
    )
    return str(answer)


def _shares(state: JobState, run: str, step: int, rank: int) -> list[str]:
    return [state.keys.transfer(run, step, rank), state.keys.run(run), state.keys.ckpt_data(run, step)]


def _ckpt(state: JobState, run: str, step: int) -> list[str]:
    return [state.keys.ckpt(run, step), state.keys.parts(run, step)]


def _line(text: str) -> str:
    """One line that fits a terminal and a hash field."""
    return " ".join(text.split())[:500]
