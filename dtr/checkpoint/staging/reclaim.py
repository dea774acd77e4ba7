"""Give back staging memory that nobody will read: torn copies, and what dead trainers leave behind."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable

from dtr.checkpoint.staging.locks import try_lock
from dtr.checkpoint.staging.slots import OWNER_LOCK, Found, look, roots, slots_in, worker_folders

log = logging.getLogger(__name__)

__all__ = ["close_folder", "free_torn", "reclaim"]


def reclaim(staging: str) -> int:
    """Free torn slots everywhere, and remove the slots (save those still to be uploaded) and folders of dead trainers.

    Returns:
        How many bytes of data files were removed.
    """
    return sum(_reclaim_folder(folder) for root in roots(staging) for folder in worker_folders(root))


def _reclaim_folder(folder: str) -> int:
    try:
        free_torn(look(files) for files in slots_in(folder))
        return close_folder(folder)
    except OSError as exc:  # one folder that is not ours must not keep the others
        log.debug("the staging folder %s cannot be reclaimed: %s", folder, exc)
        return 0


def free_torn(slots: Iterable[Found]) -> None:
    """Make torn slots free again, if they are still torn under their lock."""
    for found in slots:
        if found.kind != "TORN":
            continue
        with contextlib.suppress(FileNotFoundError):  # the folder went meanwhile
            hold = try_lock(found.files.lock)
            if hold is None:
                continue
            with hold:
                now = look(found.files)
                if (
                    now.record == found.record and now.kind != "FOREIGN"
                ):  # nobody wrote since: what was torn without a lock is torn under it
                    found.files.forget()


def close_folder(folder: str) -> int:
    """Remove what a worker's folder need not keep, if no living trainer uses it; returns the bytes of the data files removed.

    A slot that waits for its upload stays, and so does the folder around it. The owner lock is held throughout, so that a trainer
    that starts meanwhile finds either all of its folder or none, and makes it anew.
    """
    try:
        owner = try_lock(f"{folder}/{OWNER_LOCK}")
    except FileNotFoundError:
        return 0
    if owner is None:
        return 0
    with owner:
        freed, kept = 0, False
        for files in slots_in(folder):
            hold = try_lock(files.lock)
            if hold is None:  # an uploader reads it
                kept = True
                continue
            with hold:
                if look(files).kind in {"STAGED", "FOREIGN"}:
                    kept = True
                    continue
                freed += files.size_bytes()
                for path in (files.data, files.record, f"{files.record}.tmp", files.lock):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
        if not kept:
            _remove_folder(folder)
        return freed


def _remove_folder(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{OWNER_LOCK}")
    with contextlib.suppress(OSError):  # somebody put something of his own there
        os.rmdir(folder)
        os.rmdir(os.path.dirname(folder))
