"""Every error that dtr raises, in one tree; the docstring is the default message, facts are attributes.

``EXIT_CODES`` of the CLI follow the tree: usage 2 (click's own), configuration 3, unavailable 4, integrity 5, anything else 1.
``BY_CODE`` maps the first word of a script's ``error_reply`` to the exception that stands for it.
"""

from __future__ import annotations

from typing import Any


class DtrError(Exception):
    """Something in dtr went wrong."""

    exit_code = 1

    def __init__(self, message: str | None = None, /, **facts: Any) -> None:
        self.message = message or " ".join((type(self).__doc__ or "").split())
        self.facts = facts
        super().__init__(self.message)

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(f"{type(self).__name__} has no fact {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(kind: type[DtrError], message: str, facts: dict[str, Any]) -> DtrError:
    return kind(message, **facts)


# --- what the caller gave -------------------------------------------------------------------------------------------


class ConfigError(DtrError, ValueError):
    """A setting is wrong; the message names it, what was given and what is expected."""

    exit_code = 3


class InvalidInput(DtrError, ValueError):
    """An argument is wrong; the message names the field, what was given and what is expected."""

    exit_code = 3


class UnsupportedLeaf(InvalidInput):
    """The state holds a value that a checkpoint cannot keep; the message names its path."""


class DatasetNotFound(InvalidInput):
    """No data set of this name is registered for the job."""


class DatasetMismatch(InvalidInput):
    """The files do not match what was declared or registered."""


class DatasetChanged(DatasetMismatch):
    """A file of a data set is gone, or is not as it was when it was registered; the message names it."""


class DataConflict(DtrError):
    """Two ranks disagree about what was consumed of a data set; the message says in what."""


class StepUnknown(DtrError):
    """Nobody has on record what this step consumed."""


class LedgerUnset(DtrError):
    """The run's ledger of a data set is not set yet, so nothing of it can be leased; it is set from what the run restored."""


class ShardUnreadable(DtrError):
    """A shard could not be read and no other may take its place; the message names the file and the error."""


# --- what cannot be reached -----------------------------------------------------------------------------------------


class Unavailable(DtrError):
    """A part that dtr needs cannot be reached."""

    exit_code = 4


class CoordinatorUnavailable(Unavailable):
    """Redis cannot be reached or refuses this client."""


class CoordinatorRefused(CoordinatorUnavailable):
    """Redis answered, and refuses: wrong password, command not permitted, out of memory. Retrying does not help."""


class StoreUnavailable(Unavailable):
    """The checkpoint store cannot be reached or is throttling."""


class StoreRefused(StoreUnavailable):
    """The checkpoint store answered, and refuses: no bucket, no permission, wrong credentials. Retrying does not help."""


class DataUnavailable(Unavailable):
    """Data cannot be read on this host now, by no fault of the files: out of memory or descriptors, or the folder of copies fails."""


class ServiceFailed(Unavailable):
    """A service of the local stack did not start; the message has the last line of its log, the fact ``tail`` more of it."""


class NotFound(DtrError, KeyError):
    """The store holds no object under this key."""

    def __str__(self) -> str:
        return self.message


class AlreadyExists(DtrError):
    """The store already holds an object under this key; a put-if-absent lost."""


class ConditionalPutUnsupported(StoreRefused):
    """The store does not honour put-if-absent, so it cannot hold the one decision about a checkpoint."""


# --- what is damaged ------------------------------------------------------------------------------------------------


class IntegrityError(DtrError):
    """Stored bytes are not what was written."""

    exit_code = 5


class ManifestInvalid(IntegrityError):
    """A manifest is truncated, altered or of an unknown version."""


class ChecksumMismatch(IntegrityError):
    """The bytes of an object do not have the checksum that its manifest records."""


class StateCorrupt(IntegrityError):
    """A Redis key of dtr has the wrong type or lacks a field."""


# --- fences ---------------------------------------------------------------------------------------------------------


class StaleIncarnation(DtrError):
    """Another process has registered under this worker_id, or this one was declared dead; it must not go on."""


class RosterChanged(DtrError):
    """The run ended: a member of its roster departed, or a newcomer is waiting. Call form() to join the next run."""


class Recovering(DtrError):
    """The state of this job is being rebuilt from the store; wait until it is READY."""


class StateLost(DtrError):
    """Redis lost this job's state (emptied, or failed over to a copy without the last writes)."""


class NotJoined(DtrError):
    """The agent has not joined; call start() first."""


class ForkedProcess(DtrError):
    """This object belongs to another process: it was created before a fork. Create a new one in the child."""


class FormTimeout(DtrError, TimeoutError):
    """Too few members arrived to form a run; the message says who is there and how many are missing."""


# --- barriers -------------------------------------------------------------------------------------------------------


class BarrierError(DtrError):
    """A barrier round ended without a release."""


class BarrierBroken(BarrierError, RosterChanged):
    """A barrier round was broken because an expected member departed; the message names who is missing."""


class BarrierTimeout(BarrierError, TimeoutError):
    """A barrier round timed out; the message names who is missing."""


class BarrierMembersConflict(BarrierError, InvalidInput):
    """Two members arrived at one barrier round with different member sets."""


# --- checkpoints ----------------------------------------------------------------------------------------------------


class CheckpointError(DtrError):
    """A checkpoint could not be saved or restored."""


class StagingFull(CheckpointError, OSError):
    """The staging folder has no room for this save; the message has the numbers."""


class FolderFull(Unavailable, OSError):
    """A folder has no room for what was to be written there; the message has the numbers."""


class NoFreeSlot(CheckpointError):
    """Every staging slot is still waiting for its upload."""


class SlotUnavailable(CheckpointError):
    """A staging slot cannot be read now: it is being written, or holds another save."""


class RunUnknown(CheckpointError):
    """Redis does not know the run of this checkpoint; its record in the store may."""


class CheckpointAborted(CheckpointError):
    """The checkpoint was aborted; the message says why."""


class CheckpointAbandoned(CheckpointError):
    """The checkpoint belongs to a run that the job no longer continues, so it is not a candidate for restore."""


class CheckpointConflict(CheckpointError):
    """This step was already saved in this run with other bytes."""


class SaveFailed(CheckpointError):
    """An earlier save came to nothing; the message says which and why. Raised by the next one, as the setting on_failed_save says."""


class NoCheckpoint(CheckpointError):
    """No checkpoint was found; pass fresh=True to start anew on purpose."""


class RestoreFailed(CheckpointError):
    """Checkpoints were found, but none could be restored; the message has each one's reason."""


class WorldSizeMismatch(CheckpointError):
    """A sharded checkpoint needs the world size it was saved with; the message says what would fit."""


class CheckpointProtected(CheckpointError, InvalidInput):
    """A checkpoint that must stay (the newest, a pinned one, one that a run continues) was to be removed; the message says why."""


class StateMismatch(CheckpointError, InvalidInput):
    """The state given to restore(into=...) is not built like the checkpoint; the message names the first path that differs."""


class UnsavedLineage(CheckpointError):
    """The store holds checkpoints of this job that the run did not restore; call restore(), or pass fresh=True."""


BY_CODE: dict[str, type[DtrError]] = {
    "STATE_LOST": StateLost,
    "RECOVERING": Recovering,
    "STATE_CORRUPT": StateCorrupt,
    "STALE_INCARNATION": StaleIncarnation,
    "ROSTER_CHANGED": RosterChanged,
    "BARRIER_BROKEN": BarrierBroken,
    "BARRIER_TIMEOUT": BarrierTimeout,
    "BARRIER_MEMBERS": BarrierMembersConflict,
    "BARRIER_UNKNOWN": BarrierError,
    "CKPT_CONFLICT": CheckpointConflict,
    "CKPT_ABORTED": CheckpointAborted,
    "CKPT_ABANDONED": CheckpointAbandoned,
    "CKPT_STATE": CheckpointError,
    "PART_UNKNOWN": CheckpointError,
    "RUN_UNKNOWN": RunUnknown,
    "LEDGER_UNSET": LedgerUnset,
    "LEDGER_CONFLICT": DataConflict,
    "INVALID": InvalidInput,
}
