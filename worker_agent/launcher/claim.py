"""A launcher's place among those of the same job on its host: an index, and a folder for sockets and progress pages.

Guarantees: two launchers that run at once have different indexes, hence different worker names; one that is started after another
has ended, however it ended, gets the lowest free index, so that the names stay the same over a restart of the launcher.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint.staging.locks import Hold, try_lock
from dtr.errors import ConfigError
from dtr.host import host_id

__all__ = ["Claim", "claimed"]

_FOLDER: Final = ".launchers"
_MOST_LAUNCHERS: Final = 1024
_LONGEST_FOLDER_BYTES: Final = 90  # the path of a Unix socket has at most 107 bytes, and the name within the folder up to 10
_ROOM_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What this launcher has to itself while it runs."""

    host: str
    index: int
    folder: str


@contextlib.contextmanager
def claimed(staging: str, job: str) -> Iterator[Claim]:
    """Claim an index for the time of the block; the folder is made, and removed in the end.

    Raises:
        ConfigError: the staging folder cannot be used.
    """
    host = host_id(staging)
    stem, index, hold, folder = _take(os.path.abspath(staging), job)
    with hold:
        try:
            yield Claim(host=host, index=index, folder=folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # somebody has removed the whole staging folder
                os.unlink(f"{stem}.lock")


def _take(staging: str, job: str) -> tuple[str, int, Hold, str]:
    try:
        stem, index, hold = _lock(staging, job)
    except OSError as exc:
        raise _unusable(staging, exc) from exc
    try:
        return stem, index, hold, _folder(stem)
    except OSError as exc:
        hold.release()
        raise _unusable(staging, exc) from exc


def _unusable(staging: str, exc: OSError) -> ConfigError:
    return ConfigError(
        f"staging: {exc.filename or staging} cannot be used: {exc.strerror}; set DTR_STAGING to another folder", setting="staging"
    )


def _lock(staging: str, job: str) -> tuple[str, int, Hold]:
    base = os.path.join(staging, _FOLDER)
    os.makedirs(base, mode=0o700, exist_ok=True)
    for index in range(_MOST_LAUNCHERS):
        stem = os.path.join(base, f"{job.replace('/', '~')}.{index}")
        hold = try_lock(f"{stem}.lock")
        if hold is not None:
            return stem, index, hold
    raise ConfigError(f"staging: {_MOST_LAUNCHERS} launchers of job {job} run on this host already")


def _folder(stem: str) -> str:
    """An empty folder that is short enough for sockets and has room for pages; what a killed launcher left there is removed."""
    shutil.rmtree(stem, ignore_errors=True)
    room = os.statvfs(os.path.dirname(stem))
    if len(os.fsencode(stem)) <= _LONGEST_FOLDER_BYTES and room.f_bavail * room.f_frsize >= _ROOM_BYTES:
        os.mkdir(stem, mode=0o700)
        return stem
    return tempfile.mkdtemp(prefix="dtr-run-", dir="/tmp")
