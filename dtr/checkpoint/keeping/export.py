"""Checkpoints out of a store into a plain folder, and back.

``export`` is all or nothing: the files are written into a folder beside the wanted one, synced, and renamed as the last step; whatever
ends it before leaves no folder, and what a kill leaves beside it is removed by the next export there. ``take_in`` (import) puts a run's
record, its parts, and then the manifest: killed between any two, there is no checkpoint, the same call again makes one under another
run, and ``gc --orphans`` removes what is left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dtr.checkpoint import checksum, records
from dtr.checkpoint.format import tree
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.keeping.exported import ABOUT, Exported, ExportedFile, file_name, tree_name
from dtr.checkpoint.manifest import Manifest, PartFacts, RunRecord
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.restoring.contract import Source
from dtr.checkpoint.restoring.opened import file_source, open_stored, read_about, tree_text
from dtr.checkpoint.restoring.scattered import header_of
from dtr.checkpoint.restoring.source import Pieces
from dtr.checkpoint.survey import manifest_key, read_manifest, record_key, survey
from dtr.checkpoint.survey import records as run_records
from dtr.checkpoint.uploading.commit import object_key
from dtr.errors import ChecksumMismatch, FolderFull, IntegrityError, InvalidInput
from dtr.failpoints import failpoint
from dtr.runs import new_run_name, run_number
from dtr.store import Store
from dtr.store.pieces import piece_bytes

__all__ = ["Transfer", "export", "take_in"]

log = logging.getLogger(__name__)

_SLICE_BYTES: Final = 64 << 20  # of a part in memory at a time
_SPARE_BYTES: Final = 1 << 20  # for the JSON files
_UNFINISHED: Final = ".part"
_NAMES: Final = 3  # tried for a folder that can be locked

Progress = Callable[[int], None]  # gets the bytes done so far, of all files


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A checkpoint that was exported to a folder, or imported from one as ``run``."""

    run: str
    step: int
    folder: str
    files: int
    size_bytes: int
    seconds: float


def export(store: Store, manifest: Manifest, folder: Path, *, progress: Progress | None = None) -> Transfer:
    """Write a commit into ``folder``, which must not exist or be empty; every byte was verified, and is on disk when this returns.

    Args:
        store: of the job.
        manifest: of the checkpoint.
        folder: to be made.
        progress: called after each slice; what it raises ends the export.

    Raises:
        InvalidInput: the folder is a file, not empty, or cannot be written.
        FolderFull: there is no room; the message has the numbers.
        IntegrityError: the checkpoint is damaged.
        StoreUnavailable.
    """
    started, folder = time.monotonic(), folder.absolute()
    _check_target(folder)
    size_bytes = sum(part.state_bytes for part in manifest.parts)
    with open_stored(store, manifest) as opened, _making(folder, size_bytes) as making:
        files: list[ExportedFile] = []
        done = 0
        for part in manifest.parts:
            source = opened.sources[part.rank]
            source.check()
            files.append(_write_part(source, part, making / file_name(part.rank), progress, done))
            spec = tree.decode(header_of(source).metadata.get(TREE, "null"))
            _write(making / tree_name(part.rank), tree_text(spec))
            done += part.state_bytes
        about = Exported(
            job=manifest.job, run=manifest.run, step=manifest.step, world_size=manifest.world_size, replicated=manifest.replicated,
            created_at=manifest.created_at, files=tuple(files), metrics=dict(manifest.metrics), data=dict(manifest.data),
        )  # fmt: skip
        _write(making / ABOUT, about.encode())
    return Transfer(
        run=manifest.run, step=manifest.step, folder=str(folder), files=len(files), size_bytes=size_bytes,
        seconds=round(time.monotonic() - started, 3),
    )  # fmt: skip


def _check_target(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()):
            raise InvalidInput(f"folder must be new or empty, and {folder} holds files: name another one", field="folder")
    elif folder.exists() or folder.is_symlink():
        raise InvalidInput(f"folder must be a folder to be made, and {folder} is a file", field="folder")


@contextlib.contextmanager
def _making(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A folder that becomes ``folder`` at the end of the block, and goes if the block fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making, hold = _begun(folder)
    except OSError as exc:
        raise InvalidInput(f"folder cannot be made: {exc.strerror}: {folder}", field="folder") from exc
    try:
        _check_room(making, size_bytes)
        yield making
        _sync_folder(making)
        failpoint("export.before_rename")
        making.rename(folder)
        _sync_folder(folder.parent)
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise FolderFull(f"{folder} has no room for {size_bytes} bytes: {exc.strerror}", path=str(folder), needed=size_bytes) from exc
        if exc.errno in {errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTEMPTY, errno.EEXIST}:
            raise InvalidInput(f"folder cannot be written: {exc.strerror}: {folder}", field="folder") from exc
        raise
    finally:
        shutil.rmtree(making, ignore_errors=True)  # it is no more, if all went well
        if hold is not None:
            os.close(hold)


def _begun(folder: Path) -> tuple[Path, int | None]:
    """A new folder beside ``folder``, locked by the descriptor as long as its export lives; removes what killed exports left there.

    Where the file system has no locks, there is no descriptor, and leftovers stay.
    """
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}{_UNFINISHED}"):
        if (hold := _locked(left)) is not None:
            log.info("%s was left by an export that was killed, and is removed", left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(hold)
    for _ in range(_NAMES):
        making = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        making.mkdir()
        if (hold := _locked(making)) is not None:
            if making.exists():
                return making, hold
            os.close(hold)  # another export took it for a leftover before it was locked
    return making, None


def _locked(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed; None: another process does, it is gone, or there are no locks here."""
    try:
        hold = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(hold)
        return None
    return hold


def _check_room(folder: Path, size_bytes: int) -> None:
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < size_bytes + _SPARE_BYTES:
        raise FolderFull(
            f"{folder.parent} has {free} bytes free, the checkpoint takes {size_bytes}: choose another folder, or make room",
            path=str(folder.parent), needed=size_bytes, free=free,
        )  # fmt: skip


def _write_part(source: Source, part: PartFacts, path: Path, progress: Progress | None, before: int) -> ExportedFile:
    """Copy one part, verified on the way, and note what is in the file now."""
    each = piece_bytes(part.state_bytes)
    slice_bytes = max(each, _SLICE_BYTES // each * each)
    buffer, crcs = bytearray(min(slice_bytes, part.state_bytes)), []
    with path.open("xb", buffering=0) as file:
        for at in range(0, part.state_bytes, slice_bytes):
            view = memoryview(buffer)[: min(slice_bytes, part.state_bytes - at)]
            source.read_into(view, at)
            crcs += checksum.pieces_of(view, each)
            _write_all(file.fileno(), view)
            failpoint("export.mid_part")
            if progress is not None:
                progress(before + at + len(view))
        os.fsync(file.fileno())
    whole = checksum.text_of(checksum.combined(crcs, part.state_bytes, each))
    if whole != part.state_checksum:
        raise ChecksumMismatch(f"{source.name} has checksum {whole}, its manifest says {part.state_checksum}")
    return ExportedFile(
        file=path.name, rank=part.rank, worker=part.worker, incarnation=part.incarnation, size_bytes=part.state_bytes, checksum=whole,
        piece_bytes=each, pieces=checksum.hex_of(crcs),
    )  # fmt: skip


def _write(path: Path, content: bytes) -> None:
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(content))
        os.fsync(file.fileno())


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- import -----------------------------------------------------------------------------------------------------------


def take_in(store: Store, url: str, job: str, folder: Path, *, now_ms: int, progress: Progress | None = None) -> Transfer:
    """Make an exported folder the first checkpoint of a job that has none, under a run of its own.

    Every byte is compared with what was exported before the first one is put. The new run continues nothing; whoever trains the job next
    restores it.

    Args:
        store: of the job.
        url: of the store as users name it.
        job: whose checkpoint it becomes.
        folder: that ``export`` wrote.
        now_ms: the time, by the coordinator's clock where there is one.
        progress: gets the bytes put so far.

    Raises:
        InvalidInput: the job holds checkpoints already, or the folder is none that was exported.
        IntegrityError: a file is missing, or is not what was exported.
        StoreUnavailable.
    """
    started, folder = time.monotonic(), folder.absolute()
    about = read_about(folder)
    _verify_files(folder, about)
    store.probe()
    holdings = survey(store)
    if holdings.decided:
        newest = max(holdings.decided, key=lambda name: (run_number(name[0]), name))
        raise InvalidInput(
            f"job must be one without checkpoints: {url} holds such of job {job}, as {name_of(*newest)}; import under another --job, "
            "and train on under that name",
            field="job",
        )
    after_ms = max((record.created_at for record in run_records(store, holdings).values()), default=0)
    created_at = max(now_ms, after_ms + 1)
    run = new_run_name(max((run_number(name) for name in holdings.every_run), default=0) + 1)
    record = RunRecord(
        job=job, run=run, parent_run=None, parent_step=None, world_size=about.world_size, roster=_roster(about), store=url,
        created_at=created_at,
    )  # fmt: skip
    store.put(record_key(run), record.encode(), if_absent=True)
    parts: list[PartFacts] = []
    for one in about.files:
        parts.append(one.facts(object_key(run, about.step, one.rank, one.incarnation, secrets.token_hex(4))))
        before = sum(part.size_bytes for part in parts[:-1])
        report = None if progress is None else (lambda done, before=before: progress(before + done))
        store.put_file(parts[-1].object, folder / one.file, one.size_bytes, if_absent=True, progress=report)
        failpoint("import.after_part")
    failpoint("import.before_manifest")
    reason = records.clean_text(f"imported: it was {name_of(about.run, about.step)} of job {about.job}")
    manifest = about.manifest(parts, run=run, created_at=created_at, reason=reason, job=job)
    store.put(manifest_key(run, about.step), manifest.encode(), if_absent=True)
    if read_manifest(store, run, about.step) != manifest:
        raise IntegrityError(f"the store does not give back the manifest of {name_of(run, about.step)} as it was put")
    log.info("job %s: %s was imported from %s", job, name_of(run, about.step), folder)
    return Transfer(
        run=run, step=about.step, folder=str(folder), files=len(parts), size_bytes=about.size_bytes,
        seconds=round(time.monotonic() - started, 3),
    )  # fmt: skip


def _verify_files(folder: Path, about: Exported) -> None:
    """Read every file once: size, checksum, and that it is a part of a checkpoint."""
    for one in about.files:
        with contextlib.closing(file_source(folder / one.file, Pieces.of(one.facts("runs/x")))) as source:
            if TREE not in header_of(source).metadata:
                raise IntegrityError(f"{source.name} is a safetensors file, but no part of a checkpoint: it holds no {TREE}")
        with (folder / one.file).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            found = checksum.of(view)
        if found != one.checksum:
            raise ChecksumMismatch(f"file {folder / one.file} has checksum {found}, {ABOUT} says {one.checksum}")


def _roster(about: Exported) -> dict[str, str]:
    """The seats as the files tell them; ranks that wrote nothing are made up."""
    seats = {one.rank: (one.worker, one.incarnation) for one in about.files}
    found: dict[str, str] = {}
    for rank in range(about.world_size):
        worker, incarnation = seats.get(rank, (f"unknown-{rank}", "0" * 12))
        found[worker if worker not in found else f"{worker[:50]}-{rank}"] = f"{rank} {incarnation} imported"
    return found
