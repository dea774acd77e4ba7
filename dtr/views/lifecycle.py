"""What retention does to a job's checkpoints, and did: which stay and why, which go, and what nothing names any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtr.checkpoint.keeping import collect as collector
from dtr.checkpoint.keeping import orphans as sweeper
from dtr.checkpoint.keeping import pins
from dtr.checkpoint.keeping.collect import Scene
from dtr.checkpoint.keeping.orphans import Orphan
from dtr.checkpoint.keeping.retention import Policy
from dtr.checkpoint.lineage import Checkpoint
from dtr.config import Settings
from dtr.errors import CheckpointError, CoordinatorUnavailable, InvalidInput
from dtr.state.job import JobState
from dtr.store import Store
from dtr.views.stored import Sources

__all__ = ["CollectionView", "Fate", "PinView", "RemovalView", "gc", "pin", "remove"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """One checkpoint. ``act``: kept, retired (its objects stay for ``left_s``), deleted, forgotten, damaged; in a dry run ``would ...``."""

    run: str
    step: int
    act: str
    why: str
    left_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionView:
    """One collection: ``rules`` are those that applied, ``checkpoints`` the newest first, ``orphans`` None if they were not asked for."""

    job: str
    store: str
    dry_run: bool
    rules: Policy
    checkpoints: tuple[Fate, ...]
    orphans: tuple[Orphan, ...] | None
    aborted: tuple[str, ...]
    uploads_discarded: int
    chunks: int  # of delta saves that no checkpoint needs any more


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalView:
    """What was removed."""

    job: str
    store: str
    checkpoints: tuple[Fate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PinView:
    """Pins that were set or taken; ``unpinned_before``: those of them that had none to take."""

    job: str
    store: str
    pinned: bool
    note: str
    checkpoints: tuple[str, ...]
    unpinned_before: tuple[str, ...] = ()


def gc(sources: Sources, *, rules: dict[str, Any], dry_run: bool, orphans: bool) -> CollectionView:
    """Apply retention now, with ``rules`` in the place of those that the newest run was started with, or of the settings' after a rebuild.

    Raises:
        CoordinatorUnavailable, StoreUnavailable.
        CheckpointError: nothing can be decided now; the message says why.
    """
    state, store = _both(sources)
    scene = _scene(state, store)
    scene = replace(scene, policy=replace(scene.policy, **rules))
    found = collector.collect(store, state, policy=scene.policy, dry_run=dry_run, all_chunks=True)
    fates = [Fate(run=one.run, step=one.step, act="kept", why="; ".join(one.why)) for one in found.plan.keep]
    if dry_run:
        fates += [Fate(run=run, step=step, act="would retire", why="no rule keeps it") for run, step in found.plan.retire]
        fates += [Fate(run=run, step=step, act="would delete", why="retired before") for run, step in found.plan.sweep]
    fates += [
        Fate(run=done.run, step=done.step, act=done.act, why=done.why, left_s=round(done.left_s, 1) if done.left_s else None)
        for done in found.done
    ]
    swept = sweeper.sweep(store, state, scene, dry_run=dry_run) if orphans else None
    return CollectionView(
        job=sources.job, store=sources.url, dry_run=dry_run, rules=scene.policy, checkpoints=tuple(fates),
        orphans=None if swept is None else swept.orphans,
        aborted=() if swept is None else tuple(f"{run}/{step}" for run, step in swept.aborted),
        uploads_discarded=0 if swept is None else swept.uploads, chunks=found.chunks,
    )  # fmt: skip


def remove(sources: Sources, names: Sequence[Checkpoint], *, grace_ms: int | None) -> RemovalView:
    """Retire these commits; see ``collect.remove``."""
    state, store = _both(sources)
    policy = _scene(state, store).policy
    if grace_ms is not None:
        policy = replace(policy, grace_ms=grace_ms)
    done = collector.remove(store, state, names, policy=policy)
    fates = tuple(
        Fate(run=one.run, step=one.step, act=one.act, why=one.why, left_s=round(one.left_s, 1) if one.left_s else None) for one in done
    )
    return RemovalView(job=sources.job, store=sources.url, checkpoints=fates)


def pin(sources: Sources, names: Sequence[Checkpoint], *, note: str, pinned: bool) -> PinView:
    """Set or take pins; see ``pins``."""
    state, store = _both(sources)
    had_none: list[str] = []
    for run, step in names:
        if pinned:
            pins.pin(state, store, run, step, note)
        elif not pins.unpin(state, store, run, step):
            had_none.append(f"{run}/{step}")
    shown = tuple(f"{run}/{step}" for run, step in names)
    return PinView(job=sources.job, store=sources.url, pinned=pinned, note=note, checkpoints=shown, unpinned_before=tuple(had_none))


def _both(sources: Sources) -> tuple[JobState, Store]:
    """Redis and the store: what lets something go needs both."""
    if sources.state is None:
        raise CoordinatorUnavailable(f"retention needs Redis, which alone knows what is being restored now: {sources.note}")
    if sources.store is None:
        raise InvalidInput("store must be known: give --store, or set DTR_STORE", field="store")
    return sources.state, sources.store


def _scene(state: JobState, store: Store) -> Scene:
    """What a person's command decides by; where Redis lost the rules of the newest run, by those of the settings."""
    found = collector.look(state, store, default=Policy.of_settings(Settings.load()))
    if isinstance(found, str):
        raise CheckpointError(f"nothing can be collected now: {found}")
    return found
