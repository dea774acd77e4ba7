"""Whether the bytes of commits are what their manifests say."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint.keeping.catalogue import verify_parts
from dtr.checkpoint.lineage import Checkpoint
from dtr.checkpoint.survey import read_manifest
from dtr.errors import IntegrityError, InvalidInput, NoCheckpoint, NotFound
from dtr.views import stored
from dtr.views.stored import Elsewhere, Sources

__all__ = ["Checked", "commits", "verify"]

_COMMITS: Final = frozenset({"COMMITTED", "ABANDONED", "DAMAGED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The result for one checkpoint; ``error`` is empty if every byte is what was committed."""

    run: str
    step: int
    ok: bool
    parts: int
    size_bytes: int
    seconds: float
    error: str


def commits(sources: Sources) -> tuple[list[Checkpoint], tuple[Elsewhere, ...]]:
    """Every commit of the job that the asked store has or should have, the newest first; and where the others are.

    Raises:
        NoCheckpoint: all of them are elsewhere.
        StoreUnavailable, CoordinatorUnavailable, StateCorrupt.
    """
    rows = [row for row in stored.read(sources).checkpoints if row.state in _COMMITS]
    here = [(row.run, row.step) for row in rows if row.in_store is not None]
    others = stored.elsewhere(sources, rows)
    if others and not here:
        raise NoCheckpoint(f"{sources.url} holds no commit of job {sources.job}: {stored.not_asked(others)}; give --store")
    return here, others


def verify(sources: Sources, wanted: Sequence[Checkpoint], *, listed: bool = False) -> Iterator[Checked]:
    """Read every byte of these checkpoints; one result each, as soon as it is there.

    Args:
        sources: where they are.
        wanted: their names.
        listed: ``commits`` named them, not a person: what is wrong about one is its result; one retired meanwhile has none.

    Raises:
        InvalidInput: no store is known.
        NoCheckpoint: a person named one that was not committed, or not to this store.
        StoreUnavailable.
    """
    store = sources.store
    if store is None:
        raise InvalidInput("store must be known to verify what is in it: give --store, or set DTR_STORE", field="store")
    known = () if sources.index is None else sources.index.checkpoints
    promised = {(ckpt.run, ckpt.step) for ckpt in known if ckpt.state in _COMMITS and ckpt.store in {"", sources.url}}
    for run, step in wanted:
        began = time.monotonic()
        parts, size_bytes, error = 0, 0, ""
        try:
            manifest = read_manifest(store, run, step)
            if manifest.decision != "commit" and not listed:
                raise NoCheckpoint(f"{run}/{step} {manifest.fate}, so there is nothing to verify: {manifest.reason}", run=run, step=step)
            if manifest.decision == "tombstone":
                continue
            parts, size_bytes = len(manifest.parts), sum(part.state_bytes for part in manifest.parts)
            verify_parts(store, manifest)
        except NotFound as exc:
            if not listed and (run, step) not in promised:
                raise stored.missing(sources, run, step) from exc
            error = stored.NO_MANIFEST
        except IntegrityError as exc:
            error = exc.message
        seconds = time.monotonic() - began
        yield Checked(run=run, step=step, ok=not error, parts=parts, size_bytes=size_bytes, seconds=round(seconds, 3), error=error)
