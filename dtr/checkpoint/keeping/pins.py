"""Pins: checkpoints that no policy retires and nobody removes until they are unpinned.

    pin:    Redis (refused if it is being retired) -> runs/RUN/STEP/pin.json
    unpin:  runs/RUN/STEP/pin.json -> Redis

The object is the truth, Redis its index: an emptied Redis gets its pins back from it, and whoever retires asks both. Killed between the
two, a checkpoint is still kept, and the same command again finishes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

from dtr.checkpoint import records
from dtr.checkpoint.lineage import Checkpoint
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.survey import in_parallel, pin_key, read_manifest
from dtr.errors import CheckpointProtected, InvalidInput, ManifestInvalid, NoCheckpoint, NotFound
from dtr.failpoints import failpoint
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["is_pinned", "pin", "read_pins", "unpin"]

log = logging.getLogger(__name__)

NO_NOTE: Final = "-"
LONGEST_NOTE: Final = 200


def pin(state: JobState, store: Store, run: str, step: int, note: str = "") -> None:
    """Keep a commit until it is unpinned; pinning it again replaces the note.

    Args:
        state: of the job; must index the checkpoint.
        store: of the job.
        run, step: of the checkpoint.
        note: why, one line of at most 200 characters.

    Raises:
        NoCheckpoint: it is no commit that Redis knows.
        CheckpointProtected: it is being retired, so it is too late.
    """
    note = _note(note)
    _check_commit(store, run, step)
    _tell(state, run, step, note, spare=False)
    failpoint("pin.after_index")
    store.put(pin_key(run, step), records.encode({"run": run, "step": step, "note": note, "pinned_at": state.server_now_ms()}))


def unpin(state: JobState, store: Store, run: str, step: int) -> bool:
    """Let policies decide about a checkpoint again; whether it was pinned."""
    was = is_pinned(store, run, step)
    store.delete(pin_key(run, step))
    failpoint("unpin.after_store")
    return bool(int(state.call("retention_unpin", [state.keys.ckpt(run, step)], []))) or was


def spare(state: JobState, store: Store, run: str, step: int) -> None:
    """Redis lost a pin that the store has (a failover): put it back, and take a retirement back that has not reached the store."""
    _tell(state, run, step, read_pins(store, [(run, step)]).get((run, step), NO_NOTE), spare=True)
    log.warning("Redis had lost the pin of %s; the store has it", name_of(run, step))


def is_pinned(store: Store, run: str, step: int) -> bool:
    """Whether the store says that a checkpoint is pinned."""
    try:
        store.size(pin_key(run, step))
    except NotFound:
        return False
    return True


def read_pins(store: Store, names: Iterable[Checkpoint]) -> dict[Checkpoint, str]:
    """The notes of those that are pinned, ``-`` for none; a pin that cannot be read is a pin."""

    def read(name: Checkpoint) -> str | None:
        try:
            found: Any = records.decode(store.get(pin_key(*name)), "the pin").get("note")
        except NotFound:
            return None
        except ManifestInvalid as exc:
            log.error("the pin of %s counts, though it cannot be read: %s", name_of(*name), exc)
            found = None
        return found[:LONGEST_NOTE] if type(found) is str and found else NO_NOTE

    wanted = sorted(names)
    return {name: note for name, note in zip(wanted, in_parallel(read, wanted), strict=True) if note is not None}


def _check_commit(store: Store, run: str, step: int) -> None:
    """What the store says counts: Redis may be older."""
    try:
        manifest = read_manifest(store, run, step)
    except NotFound:
        return  # then Redis has its state
    if manifest.decision != "commit":
        raise NoCheckpoint(f"{name_of(run, step)} {manifest.fate}: only a commit can be pinned", run=run, step=step)


def _note(note: str) -> str:
    line = " ".join(note.split()) if isinstance(note, str) else None
    if line is None or len(line) > LONGEST_NOTE or not line.isprintable():
        raise InvalidInput(f"note must be one printable line of at most {LONGEST_NOTE} characters, got {repr(note)[:60]}", field="note")
    return line or NO_NOTE


def _tell(state: JobState, run: str, step: int, note: str, *, spare: bool) -> None:
    answer = str(state.call("retention_pin", [state.keys.ckpt(run, step)], [note, int(spare)]))
    if answer == "RETIRED":
        raise CheckpointProtected(f"{name_of(run, step)} is being retired: it is too late to pin it", run=run, step=step)
    if answer != "PINNED":
        what = f"is {answer.lower()}" if answer else "is not known to Redis (`dtr rebuild` tells it what the store holds)"
        raise NoCheckpoint(f"{name_of(run, step)} {what}: only a commit can be pinned", run=run, step=step)
