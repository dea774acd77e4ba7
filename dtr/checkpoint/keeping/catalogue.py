"""What a job's store holds, for people and programs: every decided checkpoint, and whether its bytes are what was committed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dtr.checkpoint import checksum
from dtr.checkpoint.delta.source import ChunkSource
from dtr.checkpoint.lineage import Lineage
from dtr.checkpoint.manifest import Manifest, PartFacts, Replicated
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.saving.metrics import Metrics
from dtr.checkpoint.survey import Holdings, in_parallel, read_manifest
from dtr.errors import ChecksumMismatch, IntegrityError, NotFound
from dtr.store import Store

__all__ = ["Listed", "Verified", "catalogue", "verify_parts"]

_SLICE_BYTES: Final = 32 << 20
_WORDS: Final = {"abort": "ABORTED", "tombstone": "RETIRED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A decided checkpoint. ``state``: COMMITTED, ABANDONED (off the lineage), ABORTED, RETIRED (by retention), or DAMAGED."""

    run: str
    step: int
    state: str
    world_size: int = 0
    replicated: Replicated = "none"
    size_bytes: int = 0
    created_at_ms: int = 0
    reason: str = ""
    pinned: bool = False
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A checkpoint whose every byte was read and is what its manifest says."""

    run: str
    step: int
    parts: int
    size_bytes: int


def catalogue(store: Store, lineage: Lineage, holdings: Holdings) -> tuple[Listed, ...]:
    """Every decided checkpoint of the job's store: those of the lineage first, newest first, then the others."""
    on = lineage.newest_first(holdings.decided)
    order = on + sorted(holdings.decided - set(on), reverse=True)
    found = in_parallel(lambda name: _listed(store, lineage, *name, pinned=name in holdings.pinned), order)
    return tuple(listed for listed in found if listed is not None)


def _listed(store: Store, lineage: Lineage, run: str, step: int, *, pinned: bool) -> Listed | None:
    try:
        manifest = read_manifest(store, run, step)
    except NotFound:
        return None
    except IntegrityError as exc:
        return Listed(run=run, step=step, state="DAMAGED", reason=exc.message, pinned=pinned)
    committed = "COMMITTED" if lineage.takes(run, step) else "ABANDONED"
    return Listed(
        run=run,
        step=step,
        state=_WORDS.get(manifest.decision, committed),
        world_size=manifest.world_size,
        replicated=manifest.replicated,
        size_bytes=sum(part.state_bytes for part in manifest.parts),
        created_at_ms=manifest.created_at,
        reason=manifest.reason or "",
        pinned=pinned,
        metrics=dict(manifest.metrics),
    )


def verify_parts(store: Store, manifest: Manifest) -> Verified:
    """Read every object of a commit; raises IntegrityError that names each one that is not what was committed."""
    name = name_of(manifest.run, manifest.step)
    if manifest.decision != "commit":
        raise IntegrityError(f"{name} {manifest.fate}: {manifest.reason}")
    wrong = []
    for part in manifest.parts:
        try:
            _verify(store, part)
        except IntegrityError as exc:
            wrong.append(exc.message)
    if wrong:
        raise IntegrityError(f"{name}: {'; '.join(wrong)}", run=manifest.run, step=manifest.step)
    size_bytes = sum(part.state_bytes for part in manifest.parts)
    return Verified(run=manifest.run, step=manifest.step, parts=len(manifest.parts), size_bytes=size_bytes)


def _verify(store: Store, part: PartFacts) -> None:
    try:
        there = store.size(part.object)
        if there != part.size_bytes:
            raise IntegrityError(f"object {part.object} has {there} bytes, its manifest says {part.size_bytes}")
        running, at = checksum.Running(), 0
        piece = np.empty(min(_SLICE_BYTES, part.size_bytes), np.uint8)
        while at < part.size_bytes:
            count = store.read_into(part.object, piece.data[: part.size_bytes - at], at)
            if count == 0:
                raise IntegrityError(f"object {part.object} ended after {at} of {part.size_bytes} bytes")
            running.update(piece[:count])
            at += count
    except NotFound as exc:
        raise IntegrityError(f"object {part.object} is missing") from exc
    if running.text != part.checksum:
        raise ChecksumMismatch(f"object {part.object} has checksum {running.text}, its manifest says {part.checksum}")
    if part.kind == "chunks":
        ChunkSource(store, part).verify()
