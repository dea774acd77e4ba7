"""Objects in our own folders that nothing names: what interrupted uploads and collectors left behind.

An object is an orphan once nobody can ever name it, which only a decision record makes certain:

    the checkpoint was committed       every part that its manifest does not name
    it was aborted                     every part
    it was retired                     every part, also those that its tombstone names, unless a collector still has it in hand
    it is off the lineage, undecided   an abort record is put first (put-if-absent); if a commit was faster, that stands

Nothing is deleted before the grace has passed since the decision was written, nothing on the lineage that is undecided is touched, and
only names that dtr gives (``part-...``, ``retiring.json``, ``pin.json``) in its own folders count; whatever else lies there stays.

Interrupted uploads that no listing shows as objects (S3's multiparts, temporary files) go as well, where nothing of their run is open:
also one whose uploader died before it could put it on record, in a run that left nothing else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from dtr.checkpoint import parts
from dtr.checkpoint.keeping.collect import Scene
from dtr.checkpoint.lineage import Checkpoint
from dtr.checkpoint.manifest import Manifest
from dtr.checkpoint.survey import indexed, manifest_key, pin_key, read_manifest, read_record, retiring_key
from dtr.errors import AlreadyExists, DtrError, IntegrityError, NotFound
from dtr.failpoints import failpoint
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["Orphan", "Swept", "sweep"]

log = logging.getLogger(__name__)

_YOUNG_S: Final = 60.0  # of the newest run: it may begin a checkpoint, and its first upload, while this looks
_OF_RUN: Final = re.compile(r"runs/([^/]+?)(?:\.json|/.*)")
_OBJECT: Final = re.compile(r"runs/([^/]+)/(\d{12})/(part-[^/]+|manifest\.json|pin\.json|retiring\.json)")
LEFT_BEHIND: Final = "the job went on from an earlier step, and nobody completed it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """An object that nothing names. ``act``: deleted, waits (for ``left_s``: its readers' grace), or would be (a dry run)."""

    key: str
    run: str
    step: int
    why: str
    act: Literal["deleted", "waits", "would be"]
    left_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep found; ``uploads``: interrupted multipart uploads that were discarded."""

    orphans: tuple[Orphan, ...] = ()
    aborted: tuple[Checkpoint, ...] = ()
    uploads: int = 0


def sweep(store: Store, state: JobState, scene: Scene, *, dry_run: bool = False) -> Swept:
    """Delete what nothing names.

    Args:
        store: of the job.
        state: the job.
        scene: what ``collect.look`` saw before: so a run that formed since is not on its lineage, and is left alone.
        dry_run: look only; nothing is deleted, and no abort record is put.

    Raises:
        StoreUnavailable, CoordinatorUnavailable: the rest is done at the next call.
    """
    keys_there = [*store.list("runs")]
    folders = _folders(keys_there)
    busy = {(c.run, c.step) for c in indexed(state, scene.store_url) if c.retired}  # the collector's own
    opened = set(parts.open_checkpoints(state))
    found: list[Orphan] = []
    aborted: list[Checkpoint] = []
    for name, keys in sorted(folders.items()):
        if name in opened or name in busy or (keys == {manifest_key(*name)}):
            continue
        if manifest_key(*name) in keys:
            decision = _decision(store, name)
        elif _may_abort(scene, name):
            decision = None if dry_run else _abort(store, state, scene, name)
            aborted += [name] if decision is None or decision.decision == "abort" else []
            if decision is None:  # a dry run: what would follow
                found += [_orphan(key, name, LEFT_BEHIND, "would be") for key in sorted(keys)]
        else:
            decision = None
        if decision is not None:
            now_ms = state.server_now_ms() if name in aborted else scene.now_ms
            found += _of_decided(store, decision, keys, grace_ms=scene.policy.grace_ms, now_ms=now_ms, dry_run=dry_run)
    uploads = 0 if dry_run else _discard_uploads(store, state, scene, keys_there)
    return Swept(orphans=tuple(found), aborted=tuple(aborted), uploads=uploads)


def _folders(keys: Iterable[str]) -> dict[Checkpoint, set[str]]:
    """The keys of each checkpoint's folder, those that dtr itself names."""
    found: dict[Checkpoint, set[str]] = {}
    for key in keys:
        if (match := _OBJECT.fullmatch(key)) is not None:
            found.setdefault((match[1], int(match[2])), set()).add(key)
    return found


def _decision(store: Store, name: Checkpoint) -> Manifest | None:
    try:
        return read_manifest(store, *name)
    except NotFound:
        return None
    except IntegrityError as exc:  # what it names is not known, so nothing of it is touched
        log.error("%s/%d: nothing of it is swept: %s", *name, exc)
        return None


def _may_abort(scene: Scene, name: Checkpoint) -> bool:
    """Whether an undecided checkpoint was left behind: its run is older than the newest, and the lineage does not take it."""
    run, step = name
    return run != scene.last_run and not scene.lineage.takes(run, step)


def _abort(store: Store, state: JobState, scene: Scene, name: Checkpoint) -> Manifest | None:
    """Decide a checkpoint that was left behind, so that no late uploader ever names what is deleted; the record that stands then."""
    run, step = name
    try:
        world_size = read_record(store, run).world_size
    except (NotFound, IntegrityError):
        world_size = 1
    record = Manifest(
        decision="abort", job=state.job, run=run, step=step, world_size=world_size, replicated="none", parent=None,
        created_at=state.server_now_ms(), reason=LEFT_BEHIND,
    )  # fmt: skip
    try:
        store.put(manifest_key(run, step), record.encode(), if_absent=True)
    except AlreadyExists:
        log.info("%s/%d was decided meanwhile", run, step)
    failpoint("orphans.after_abort")
    return _decision(store, name)


def _of_decided(store: Store, decision: Manifest, keys: set[str], *, grace_ms: int, now_ms: int, dry_run: bool) -> Iterator[Orphan]:
    name = (decision.run, decision.step)
    named = {part.object for part in decision.parts} if decision.decision == "commit" else set()
    why = {"commit": "its manifest does not name it", "abort": "its checkpoint was aborted", "tombstone": "its checkpoint was retired"}
    stays = {manifest_key(*name)} | ({pin_key(*name)} if decision.decision == "commit" else set())
    left_s = (decision.created_at + grace_ms - now_ms) / 1000
    for key in sorted(keys - named - stays):
        if key == retiring_key(*name) and decision.decision == "commit":
            continue  # a collector is about to replace the manifest
        if left_s > 0:
            yield _orphan(key, name, why[decision.decision], "waits", left_s)
            continue
        if not dry_run:
            store.delete(key)
            failpoint("orphans.mid_delete")
        yield _orphan(key, name, why[decision.decision], "would be" if dry_run else "deleted")


def _orphan(key: str, name: Checkpoint, why: str, act: Literal["deleted", "waits", "would be"], left_s: float = 0.0) -> Orphan:
    return Orphan(key=key, run=name[0], step=name[1], why=why, act=act, left_s=left_s)


def _discard_uploads(store: Store, state: JobState, scene: Scene, keys: Iterable[str]) -> int:
    """Interrupted uploads of runs that have nothing open: nobody goes on with them."""
    runs = {match[1] for key in keys if (match := _OF_RUN.fullmatch(key)) is not None} | {scene.last_run}
    opened = {run for run, _ in parts.open_checkpoints(state)}  # asked anew: what begins from now on is young
    count = 0
    for run in sorted(runs - opened):
        try:
            count += store.abort_uploads(f"runs/{run}", older_than_s=_YOUNG_S if run == scene.last_run else 0.0)
        except DtrError as exc:
            log.warning("interrupted uploads of run %s stay for now: %s", run, exc)
    return count
