"""The one decision about a checkpoint: whoever first puts the manifest key of (run, step) decides, be it a commit or an abort.

    SEALED:   put the journal of its steps -> put manifest(commit) if absent -> read it back -> delete leftovers -> tell Redis
    ABORTING: put manifest(abort) if absent -> read it back -> delete the objects that no manifest will ever name -> tell Redis

Any number of uploaders may do this at once, or be killed or stopped between any two lines: the manifest of a sealed checkpoint is the
same bytes whoever writes it, the record that is in the store is the truth for all, and Redis hears of a decision only after it was read
back. Objects are deleted only once a decision that does not name them is in the store. Redis hears last: until then the checkpoint is
open, so that whoever looks next does again what a killed uploader may not have done.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from dtr.checkpoint import parts
from dtr.checkpoint.handover import let_go, sealed_shares
from dtr.checkpoint.keeping.rebuild import index_checkpoint
from dtr.checkpoint.manifest import Manifest, PartFacts
from dtr.checkpoint.parts import CheckpointView, PartView
from dtr.checkpoint.saving.metrics import merged
from dtr.checkpoint.survey import manifest_key, read_manifest
from dtr.datasets.plane import merge_shares
from dtr.datasets.timemachine.keeping import keep_journal
from dtr.errors import AlreadyExists, CheckpointError, DataConflict, DtrError, InvalidInput, NotFound, StateCorrupt, StoreUnavailable
from dtr.failpoints import failpoint
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["discard", "folder_key", "object_key", "settle"]

log = logging.getLogger(__name__)


def folder_key(run: str, step: int) -> str:
    """Where everything of one checkpoint lies in the job's store."""
    return manifest_key(run, step).rpartition("/")[0]


def object_key(run: str, step: int, rank: int, incarnation: str, nonce: str) -> str:
    """A part's object. The nonce makes the key one that nobody else writes, now or later."""
    return f"{folder_key(run, step)}/part-{rank:05d}-{incarnation}-{nonce}.safetensors"


def settle(state: JobState, store: Store, run: str, step: int) -> str:
    """Decide a checkpoint that is SEALED or ABORTING; returns its state afterwards, '' if Redis has none.

    Raises:
        StoreUnavailable, CoordinatorUnavailable: not now; what was done stands, and another call goes on from there.
        ManifestInvalid: the record in the store is damaged, so nobody can say what was decided.
    """
    view = parts.read(state, run, step)
    if view is None:
        return ""
    if view.state == "SEALED":
        return _commit(state, store, view)
    if view.state == "ABORTING":
        return _abort(state, store, view, view.reason)
    return view.state


def discard(store: Store, run: str, step: int, object: str) -> bool:
    """Delete an object that did not become part of its checkpoint, if a decision that does not name it is in the store; and, whatever
    the decision, what an interrupted upload left of it.

    Without a decision everything stays: whoever decides looks for such leftovers afterwards.
    """
    try:
        manifest = read_manifest(store, run, step)
        store.abort_uploads(object)
        if any(part.object == object for part in manifest.parts):
            return False
        store.delete(object)
    except NotFound:
        return False
    except DtrError as exc:
        log.info("the unneeded object %s stays for now: %s", object, exc)
        return False
    return True


def _commit(state: JobState, store: Store, view: CheckpointView) -> str:
    shares = sealed_shares(state, view.run, view.step)
    if shares is None:  # another uploader decided it meanwhile, or Redis was emptied, and somebody has to tell of it anew
        found_anew = parts.read(state, view.run, view.step)
        return found_anew.state if found_anew is not None else ""
    try:
        wanted = _manifest(state, view, data=merge_shares(shares))
    except DataConflict as exc:
        log.error("run %s step %d: %s", view.run, view.step, exc)
        return _abort(state, store, view, exc.message)
    keys = set(store.list(folder_key(view.run, view.step)))
    gone = [part for part in wanted.parts if part.object not in keys and not _is_there(store, part)]
    if gone:
        names = ", ".join(part.object for part in gone)
        log.error("run %s step %d: objects vanished from the store before the commit: %s", view.run, view.step, names)
        return _abort(state, store, view, f"objects vanished from the store before the commit: {names}")
    keep_journal(state, store, view.run, view.step, shares)
    failpoint("commit.before_manifest")
    found = _put_first(store, wanted)
    failpoint("commit.after_manifest")
    if found.decision == "commit" and found.parts != wanted.parts:
        log.warning("run %s step %d: another upload of the same parts was committed first and is adopted", view.run, view.step)
    if any(part.claims > 1 or part.failures for part in view.parts.values()) or keys - {part.object for part in wanted.parts}:
        _sweep(store, found)
    return _tell(state, store, view.store, found)


def _abort(state: JobState, store: Store, view: CheckpointView, reason: str) -> str:
    failpoint("abort.before_record")
    found = _put_first(store, _manifest(state, view, abort_reason=reason or "aborted"))
    failpoint("abort.after_record")
    if found.decision == "commit":
        log.warning("run %s step %d was committed before it could be aborted; the commit stands", view.run, view.step)
    _sweep(store, found)
    return _tell(state, store, view.store, found)


def _manifest(state: JobState, view: CheckpointView, *, data: Mapping[str, Any] | None = None, abort_reason: str | None = None) -> Manifest:
    """The record that this checkpoint's facts make, the same for whoever makes it."""
    with translate(state.url):
        base_state, base_run, base_step = state.redis.hmget(state.keys.run(view.run), ["base_state", "base_run", "base_step"])
    if base_state != "SET" and abort_reason is None:
        raise CheckpointError(f"run {view.run} step {view.step} cannot be committed yet: what the run continues is not on record")
    try:
        return Manifest(
            decision="commit" if abort_reason is None else "abort",
            job=state.job,
            run=view.run,
            step=view.step,
            world_size=view.world_size,
            replicated=view.replicated,
            parent=(base_run, int(base_step)) if base_run else None,
            created_at=view.sealed_at_ms or view.created_at_ms,
            parts=tuple(_facts(part) for part in view.parts.values()) if abort_reason is None else (),
            reason=abort_reason or "",
            metrics=merged(part.metrics for part in view.parts.values()) if abort_reason is None else {},
            data=data or {},
        )
    except (InvalidInput, ValueError) as exc:
        raise StateCorrupt(f"{state.keys.ckpt(view.run, view.step)} and its parts make no manifest: {exc}") from exc


def _facts(part: PartView) -> PartFacts:
    return PartFacts(
        rank=part.rank,
        worker=part.worker,
        incarnation=part.incarnation,
        object=part.object,
        size_bytes=part.object_bytes,
        checksum=part.checksum,
        piece_bytes=part.piece_bytes,
        pieces=part.pieces,
        kind="chunks" if part.kind == "chunks" else "file",
        state_bytes=part.size_bytes,
        state_checksum=part.state_checksum,
    )


def _put_first(store: Store, wanted: Manifest) -> Manifest:
    """Put the record unless one is there, and return the one that is there then, durable and read back."""
    key, record = manifest_key(wanted.run, wanted.step), wanted.encode()
    with contextlib.suppress(AlreadyExists):
        try:
            store.put(key, record, if_absent=True)
        except StoreUnavailable as exc:
            if not getattr(exc, "unknown", False):
                raise
            # It may have arrived all the same, and a reader may see what the next power cut takes: only a put says that it lasts.
            store.put(key, record, if_absent=True)
    return read_manifest(store, wanted.run, wanted.step)


def _tell(state: JobState, store: Store, store_url: str, found: Manifest) -> str:
    """Record in Redis what the store holds."""
    failpoint("commit.before_decide")
    decision, reason = found.decision, found.reason or ""
    if decision not in {"commit", "abort"}:  # Redis is older than the store
        decision, reason = "abort", "it was committed, and retention has retired it since"
    verdict = parts.decide(
        state,
        found.run,
        found.step,
        decision=decision,
        reason=reason,
        size_bytes=sum(part.state_bytes for part in found.parts),
        metrics=found.metrics,
    )
    failpoint("commit.after_decide")
    if verdict == "UNKNOWN":  # Redis forgot it, or retention retired it while we slept: what the store says now is indexed
        verdict = index_checkpoint(state, store, store_url, found.run, found.step)
    let_go(state, found.run, found.step)
    log.debug("run %s step %d is %s%s", found.run, found.step, verdict or "retired", f": {found.reason}" if found.reason else "")
    return verdict


def _is_there(store: Store, part: PartFacts) -> bool:
    """Ask for the object itself: some services list late."""
    try:
        return store.size(part.object) == part.size_bytes
    except NotFound:
        return False


def _sweep(store: Store, decided: Manifest) -> None:
    """Delete what interrupted uploads left of a decided checkpoint; what fails here is garbage, never a wrong checkpoint."""
    folder, named = folder_key(decided.run, decided.step), {part.object for part in decided.parts}
    try:
        for key in list(store.list(folder)):
            if key.startswith(f"{folder}/part-") and key not in named:
                store.delete(key)
        store.abort_uploads(folder)
    except DtrError as exc:
        log.info("leftovers of run %s step %d stay for now: %s", decided.run, decided.step, exc)
