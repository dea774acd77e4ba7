"""Staging slots as every process sees them: the files, the record, and who may touch what.

    STAGING/JOB/WORKER/owner.lock            held shared by each living trainer that uses the folder
    STAGING/JOB/WORKER/slot-N.safetensors    the bytes: exactly one part, laid out as a safetensors file
    STAGING/JOB/WORKER/slot-N.json           the record; replaced by rename, so it is old or new; none means free
    STAGING/JOB/WORKER/slot-N.lock           exclusively: copying, reuse, reclaim; shared: reading

A part is complete if and only if its record says STAGED, was written since this machine booted, and its file has the recorded size.
The record is COPYING before the first byte changes and STAGED after the last one did, both under the exclusive lock; so COPYING with
a free lock is a torn copy, whatever killed its writer. A ``/`` in the job's name is a ``~`` here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Final, Literal

from dtr import names
from dtr.checkpoint import records
from dtr.checkpoint.manifest import Replicated
from dtr.checkpoint.saving import metrics as metric_values
from dtr.checkpoint.staging.locks import is_held, try_lock
from dtr.errors import DtrError, SlotUnavailable

__all__ = [
    "OWNER_LOCK",
    "Found",
    "Reading",
    "SlotFiles",
    "SlotRecord",
    "boot_id",
    "fallback",
    "finish",
    "holds",
    "open_for_reading",
    "roots",
    "scan",
    "scan_job",
    "worker_folder",
]

OWNER_LOCK: Final = "owner.lock"
FALLBACK: Final = ".fallback"
_VERSION: Final = 1
_LONGEST_RECORD: Final = 16 << 20

log = logging.getLogger(__name__)

Kind = Literal["STAGED", "COPYING", "TORN", "DONE", "FREE", "FOREIGN"]


@cache
def boot_id() -> str:
    """Changes when the machine boots: bytes that only the page cache held are gone then."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRecord:
    """What a slot holds. ``save`` is the id of one ``save_async``; ``outcome`` and ``reason`` say how it ended, once it did."""

    state: Literal["COPYING", "STAGED", "DONE"] = "COPYING"
    job: str
    run: str
    step: int
    rank: int
    world_size: int
    worker: str
    incarnation: str
    host: str
    store: str
    replicated: Replicated = "none"
    structure: str = ""
    delta: str = "off"
    metrics: dict[str, float | None] = field(default_factory=dict)
    data: str = ""
    size_bytes: int = 0
    save: str = field(default_factory=lambda: secrets.token_hex(8))
    boot_id: str = field(default_factory=boot_id)
    pid: int = field(default_factory=os.getpid)
    staged_at: float = field(default_factory=time.time)
    outcome: str = ""
    reason: str = ""

    def encode(self) -> bytes:
        document = {"v": _VERSION} | {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(document, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, text: bytes) -> SlotRecord | None:
        """The record, or None if it is not a whole one of this version, with its fields and no others."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict) or document.pop("v", None) != _VERSION or set(document) != set(_KINDS):
            return None
        if not all(_is_a(document[name], kind) for name, kind in _KINDS.items()):
            return None
        if document["state"] not in {"COPYING", "STAGED", "DONE"} or document["size_bytes"] < 0:
            return None
        if document["replicated"] not in {"none", "some", "all"}:
            return None
        try:
            names.job_name(document["job"])
            for word in ("run", "worker", "host", "save"):
                names.name(document[word], word)
            records.incarnation(document["incarnation"])
            metric_values.checked(document["metrics"])
            names.step(document["step"])
            names.rank(document["rank"], names.positive(document["world_size"], "world_size"))
        except DtrError:
            return None
        return cls(**document)


def _is_a(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


_KINDS: Final[dict[str, Any]] = {
    "state": str, "job": str, "run": str, "step": int, "rank": int, "world_size": int, "worker": str, "incarnation": str,
    "host": str, "store": str, "replicated": str, "structure": str, "delta": str, "metrics": dict, "data": str, "size_bytes": int,
    "save": str, "boot_id": str, "pid": int,
    "staged_at": (int, float), "outcome": str, "reason": str,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFiles:
    """The three files of one slot."""

    folder: str
    index: int

    @property
    def data(self) -> str:
        return f"{self.folder}/slot-{self.index}.safetensors"

    @property
    def record(self) -> str:
        return f"{self.folder}/slot-{self.index}.json"

    @property
    def lock(self) -> str:
        return f"{self.folder}/slot-{self.index}.lock"

    def read(self) -> SlotRecord | None:
        """The record as it is now; None if there is none, or none that can be read."""
        try:
            with open(self.record, "rb") as file:
                return SlotRecord.parse(file.read(_LONGEST_RECORD))
        except FileNotFoundError:
            return None

    def write(self, record: SlotRecord) -> None:
        """Replace the record; only under the exclusive lock."""
        temporary = f"{self.record}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                view = memoryview(record.encode())
                while view:
                    view = view[os.write(descriptor, view) :]
            finally:
                os.close(descriptor)
            os.rename(temporary, self.record)
        except OSError:
            _remove(temporary)
            raise

    def forget(self) -> None:
        """Remove the record, which frees the slot even where no byte is left to write; only under the exclusive lock."""
        _remove(self.record)

    def size_bytes(self) -> int:
        """The size of the data file; 0 if there is none."""
        try:
            return os.stat(self.data).st_size
        except FileNotFoundError:
            return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A slot as a scan met it."""

    files: SlotFiles
    record: SlotRecord | None
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """An open part: ``buffer`` is its mapped bytes, and ``descriptor`` the open file. They cannot change while this is open."""

    record: SlotRecord
    descriptor: int
    buffer: memoryview


def worker_folder(root: str, job: str, worker: str) -> str:
    """Where the slots of one worker lie."""
    return f"{root}/{job.replace('/', '~')}/{worker}"


def roots(staging: str) -> list[str]:
    """The staging folder, and the disk folder that trainers fell back to when shared memory was too small, if they did."""
    other = fallback(staging)
    return [staging, other] if os.path.isdir(other) else [staging]


def fallback(staging: str) -> str:
    """The disk folder that trainers of this host fell back to, whether or not this process sees it; '' if none did."""
    try:
        with open(f"{staging}/{FALLBACK}", encoding="utf-8") as file:
            other = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return other if os.path.isabs(other) else ""


def scan(staging: str) -> list[Found]:
    """Every slot of every job and worker, in a fixed order. Takes no lock."""
    return [look(files) for root in roots(staging) for folder in worker_folders(root) for files in slots_in(folder)]


def scan_job(staging: str, job: str) -> list[Found]:
    """Every slot of one job."""
    folders = [folder for root in roots(staging) for folder in _folders(f"{root}/{job.replace('/', '~')}")]
    return [look(files) for folder in folders for files in slots_in(folder)]


def worker_folders(root: str) -> Iterator[str]:
    """The folders of all workers under one root."""
    for job in _folders(root):
        yield from _folders(job)


def slots_in(folder: str) -> list[SlotFiles]:
    """The slots of one worker: whatever file of a slot is there counts."""
    found = set()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            stem = name.partition(".")[0]
            if stem.startswith("slot-") and stem[5:].isascii() and stem[5:].isdigit():
                found.add(int(stem[5:]))
    return [SlotFiles(folder=folder, index=index) for index in sorted(found)]


def look(files: SlotFiles) -> Found:
    """One slot as it is now; one that cannot be looked at (somebody else's files) is FOREIGN."""
    try:
        return _look(files)
    except OSError as exc:
        log.debug("slot %d of %s cannot be read and is left alone: %s", files.index, files.folder, exc)
        return Found(files=files, record=None, kind="FOREIGN")


def _look(files: SlotFiles) -> Found:
    record = files.read()
    if record is None:
        return Found(files=files, record=None, kind=_without_record(files))
    if record.state == "DONE":
        return Found(files=files, record=record, kind="DONE")
    if record.boot_id != boot_id():
        return Found(files=files, record=record, kind="TORN")
    if record.state == "COPYING":
        if is_held(files.lock):
            return Found(files=files, record=record, kind="COPYING")
        # It may have become STAGED between the read and the look at the lock; if it still says COPYING, nobody is copying.
        again = files.read()
        return Found(files=files, record=record, kind="TORN") if again == record else _look(files)
    kind: Kind = "STAGED" if files.size_bytes() == record.size_bytes else "TORN"
    return Found(files=files, record=record, kind=kind)


def _without_record(files: SlotFiles) -> Kind:
    """No record frees a slot; one that cannot be read belongs to another version, which may know more fields, or a crash damaged it."""
    try:
        with open(files.record, "rb") as file:
            document = json.loads(file.read(_LONGEST_RECORD))
    except FileNotFoundError:
        return "FREE"
    except (ValueError, RecursionError, OSError):
        return "TORN"
    if not isinstance(document, dict):
        return "TORN"
    return "FOREIGN" if document.pop("v", _VERSION) != _VERSION or document.keys() - _KINDS.keys() else "TORN"


@contextlib.contextmanager
def open_for_reading(found: Found, *, also_done: bool = False) -> Iterator[Reading]:
    """Hold the shared lock, and with it the guarantee that the bytes stay those of this save until the block ends.

    With ``also_done`` the save may be over: its bytes are still there as long as its trainer lives and has not reused the slot. Whoever
    asks for that knows their checksum, since nothing else says that they are whole.

    Raises:
        SlotUnavailable: the slot is being written, or holds something else by now.
    """
    files, wanted = found.files, found.record
    try:
        hold = try_lock(files.lock, shared=True)
    except FileNotFoundError as exc:
        raise SlotUnavailable(f"slot {files.data} is gone", path=files.data, busy=False) from exc
    if hold is None:
        raise SlotUnavailable(f"slot {files.data} is being written or reclaimed", path=files.data, busy=True)
    with hold:
        now = look(files)
        whole = now.kind == "STAGED" or (also_done and now.kind == "DONE" and now.record is not None and holds(now))
        if not whole or now.record is None or wanted is None or now.record.save != wanted.save:
            raise SlotUnavailable(f"slot {files.data} no longer holds this save", path=files.data, busy=False)
        descriptor = os.open(files.data, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with _mapped(descriptor, now.record.size_bytes) as buffer:
                yield Reading(record=now.record, descriptor=descriptor, buffer=buffer)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _mapped(descriptor: int, size_bytes: int) -> Iterator[memoryview]:
    if size_bytes == 0:
        yield memoryview(b"")
        return
    mapping = mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ)
    view = memoryview(mapping)
    try:
        yield view
    finally:
        with contextlib.suppress(BufferError):  # a view that an error's traceback still holds; the last one to go unmaps it
            view.release()
            mapping.close()


def holds(found: Found) -> bool:
    """Whether the slot's file still has the size that its record tells."""
    return found.record is not None and found.files.size_bytes() == found.record.size_bytes > 0


def finish(found: Found, outcome: str, reason: str = "") -> bool:
    """Free the slot of a save that is over, saying how it ended; False if that must be tried again later.

    Succeeds without effect if the slot holds another save by now. The bytes of a dead trainer are removed, those of a living one
    stay resident for its next save.
    """
    files, record = found.files, found.record
    if record is None:
        return True
    try:
        hold = try_lock(files.lock)
    except FileNotFoundError:
        return True
    if hold is None:
        return False
    with hold:
        now = files.read()
        if now is None or now.save != record.save:
            return True
        try:
            files.write(replace(now, state="DONE", outcome=outcome, reason=reason))
        except OSError:  # the folder is full: a slot without a record is as free
            files.forget()
        if not is_held(f"{files.folder}/{OWNER_LOCK}"):
            _remove(files.data)
            files.forget()
    return True


def _folders(parent: str) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            return sorted(e.path for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
