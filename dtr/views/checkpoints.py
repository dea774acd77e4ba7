"""Checkpoints as Redis's index has them: their states, their parts, and what they wait for. The truth is the store's: see ``stored``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from dtr.checkpoint.lineage import split_name
from dtr.checkpoint.manifest import Replicated
from dtr.checkpoint.saving.metrics import Metrics, decode
from dtr.errors import StateCorrupt
from dtr.state.job import JobState
from dtr.views.reading import Fields, reading, whole

__all__ = ["CheckpointView", "IndexView", "PartView", "on_lineage", "parts_of", "read", "read_one", "read_open", "split"]

COMMITTED: Final = "COMMITTED"
ABSENT: Final = "absent"
_LARGEST_WORLD: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PartView:
    """One rank's part. ``state``: ``absent`` (not staged yet), ``staged`` (complete in a slot), ``done`` (in the store)."""

    rank: int
    worker: str
    host: str
    state: str
    size_bytes: int | None
    progress_bytes: int
    uploader: str  # token of the upload under way, empty if there is none
    lease_left_s: float | None
    attempts: int
    failures: int
    error: str
    object: str
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointView:
    """One checkpoint. ``state``: WRITING, SEALED, COMMITTED, ABORTING, ABORTED or ABANDONED; ages by the server's clock.

    ``parts`` is None where only the state was read.
    """

    run: str
    step: int
    state: str
    reason: str
    latest: bool
    on_lineage: bool
    size_bytes: int | None
    world_size: int
    replicated: Replicated
    done: int
    expected: int
    store: str
    created_at_ms: int | None
    decided_at_ms: int | None
    age_s: float | None  # since it was begun
    decided_ago_s: float | None
    parts: tuple[PartView, ...] | None
    pinned: str = ""  # the note of its pin, `-` for none; empty: it is not pinned
    metrics: Metrics = field(default_factory=dict)
    run_left: bool = False  # nothing of its run is on the lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexView:
    """The checkpoints of a job that Redis knows, the newest first."""

    job: str
    latest: str  # RUN/STEP, empty if there is none
    now_ms: int
    checkpoints: tuple[CheckpointView, ...]


def read(state: JobState) -> IndexView:
    """Every checkpoint of the index, without parts.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    return _read(state, state.keys.ckpts, with_parts=False)


def read_open(state: JobState) -> IndexView:
    """The checkpoints without a decision, with their parts, and what is ``latest``.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    return _read(state, state.keys.open_ckpts, with_parts=True)


def read_one(state: JobState, run: str, step: int) -> CheckpointView | None:
    """One checkpoint with its parts; None if Redis does not know it.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    found = _load(state, [(run, step)], with_parts=True).checkpoints
    return found[0] if found else None


def _read(state: JobState, index: str, *, with_parts: bool) -> IndexView:
    with reading(state):
        names: list[str] = state.redis.zrange(index, 0, -1)
    return _load(state, [split(name, index) for name in names], with_parts=with_parts)


def split(name: str, key: str = "checkpoint") -> tuple[str, int]:
    """``RUN/STEP`` as (run, step); raises StateCorrupt that names ``key``."""
    found = split_name(name)
    if found is None:
        raise StateCorrupt(f"{key}: expected RUN/STEP, got {name[:60]!r}")
    return found


def _load(state: JobState, names: Sequence[tuple[str, int]], *, with_parts: bool) -> IndexView:
    keys = state.keys
    with reading(state):
        pipeline = state.redis.pipeline()
        pipeline.hmget(keys.meta, ["latest", "last_run"])
        pipeline.hgetall(keys.lineage)
        pipeline.time()
        for run, step in names:
            pipeline.hgetall(keys.ckpt(run, step))
            if with_parts:
                pipeline.hgetall(keys.parts(run, step))
                pipeline.hgetall(keys.run(run))
        (latest, last_run), lineage, (seconds, microseconds), *replies = pipeline.execute()
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    width = 3 if with_parts else 1
    found = []
    for index, (run, step) in enumerate(names):
        ckpt, *more = replies[index * width : (index + 1) * width]
        if not ckpt:
            continue  # retention was faster
        fields = Fields(keys.ckpt(run, step), ckpt)
        on = on_lineage(run, step, lineage, last_run or "", keys.lineage)
        view = _describe(
            fields, run=run, step=step, latest=latest == f"{run}/{step}", now_ms=now_ms,
            on_lineage=on, run_left=not on and run not in lineage,
            parts=parts_of(fields, Fields(keys.parts(run, step), more[0]), more[1], now_ms=now_ms) if more else None,
        )  # fmt: skip
        found.append(view)
    found.sort(key=lambda ckpt: (ckpt.created_at_ms or 0, ckpt.step, ckpt.run), reverse=True)
    return IndexView(job=state.job, latest=latest or "", now_ms=now_ms, checkpoints=tuple(found))


def _describe(
    fields: Fields, *, run: str, step: int, latest: bool, on_lineage: bool, run_left: bool, now_ms: int, parts: tuple[PartView, ...] | None
) -> CheckpointView:
    created_at, decided_at = fields.number("created_at"), fields.number("decided_at")
    word = fields.text("state")
    if not word:
        raise StateCorrupt(f"{fields.key} has no field state")
    expected = fields.integer("expected")
    return CheckpointView(
        run=run,
        step=step,
        state="RETIRED" if fields.text("retired_at") else word,
        reason=fields.text("reason"),
        latest=latest,
        on_lineage=on_lineage,
        run_left=run_left,
        size_bytes=fields.number("size_bytes"),
        world_size=fields.integer("world_size"),
        replicated=cast("Replicated", fields.text("replicated").partition(" ")[0]),
        # A checkpoint that was rebuilt from the store has no count of its own: its decision says that nothing is missing.
        done=fields.integer("done", expected if word in {COMMITTED, "ABANDONED"} else 0),
        expected=expected,
        store=fields.text("store"),
        created_at_ms=created_at,
        decided_at_ms=decided_at,
        age_s=None if created_at is None else max(0, now_ms - created_at) / 1000,
        decided_ago_s=None if decided_at is None else max(0, now_ms - decided_at) / 1000,
        pinned=fields.text("pinned"),
        metrics=decode(fields.text("metrics"), fields.key),
        parts=parts,
    )


def on_lineage(run: str, step: int, lineage: Mapping[str, str], last_run: str, key: str = "lineage") -> bool:
    """Whether the job's lineage took ``step`` from ``run``; a run without an entry is off, the newest excepted."""
    if run not in lineage:
        return run == last_run
    last = whole(lineage[run], key, run)
    return last is None or step <= last


def parts_of(ckpt: Fields, parts: Fields, roster: Mapping[str, str], *, now_ms: int) -> tuple[PartView, ...]:
    """Every expected part, by rank, from the hashes of a checkpoint, its parts and its run."""
    world_size = ckpt.integer("world_size")
    if not 0 <= world_size <= _LARGEST_WORLD:
        raise StateCorrupt(f"{ckpt.key}: field world_size must be from 0 to {_LARGEST_WORLD}, got {world_size}")
    expected = {ckpt.integer("writer")} if ckpt.text("replicated") == "all" else set(range(world_size))
    known = {int(name.partition("/")[0]) for name, _ in parts.items() if name.partition("/")[0].isdigit()}
    seats = {place.partition(" ")[0]: (name.removeprefix("member:"), place) for name, place in roster.items() if name.startswith("member:")}
    return tuple(_part(rank, parts, seats.get(str(rank)), now_ms) for rank in sorted(expected | known))


def _part(rank: int, fields: Fields, seat: tuple[str, str] | None, now_ms: int) -> PartView:
    worker, place = seat or ("", "")
    lease_until = fields.integer(f"{rank}/lease_until")
    return PartView(
        rank=rank,
        worker=fields.text(f"{rank}/worker", worker),
        host=fields.text(f"{rank}/host", ([*place.split(" "), "", ""])[2]),
        state=fields.text(f"{rank}/state", ABSENT),
        size_bytes=fields.number(f"{rank}/size_bytes"),
        progress_bytes=fields.integer(f"{rank}/progress_bytes"),
        uploader=fields.text(f"{rank}/uploader") if lease_until > now_ms else "",
        lease_left_s=(lease_until - now_ms) / 1000 if lease_until > now_ms else None,
        attempts=fields.integer(f"{rank}/attempts"),
        failures=fields.integer(f"{rank}/failures"),
        error=fields.text(f"{rank}/error"),
        object=fields.text(f"{rank}/object"),
        checksum=fields.text(f"{rank}/checksum"),
    )
