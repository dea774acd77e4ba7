"""Checkpoints and their parts as Redis knows them, typed: one look at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from dtr.checkpoint.manifest import Replicated
from dtr.checkpoint.saving import metrics as metric_values
from dtr.checkpoint.saving.metrics import Metrics
from dtr.errors import StateCorrupt
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["CheckpointView", "PartView", "open_checkpoints", "read"]

_PART_FIELDS: Final = (
    "state", "worker", "incarnation", "host", "save", "size_bytes", "object", "checksum", "uploader", "lease_until", "retry_at",
    "claims", "attempts", "failures", "progress_bytes", "error", "object_bytes", "piece_bytes", "pieces", "kind", "metrics",
    "state_checksum",
)  # fmt: skip


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
    metrics: Metrics
    state_checksum: str
    claims: int = 0


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
            replicated=cast("Replicated", fields["replicated"].partition(" ")[0]),
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
            metrics=metric_values.decode(held.get("metrics", ""), f"rank {rank} of a checkpoint's parts"),
            state_checksum=held.get("state_checksum", ""),
            claims=int(held.get("claims") or 0),
        )
        for rank, held in sorted(by_rank.items())
    }
