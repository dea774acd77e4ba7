"""Files that are either there, whole and safe from a power cut, or not there at all.

The order of steps is the guarantee: a complete temporary file in the target's own folder, fsync of the file, one atomic ``link`` (or
rename), fsync of the folder, and before all that fsync of every folder that was made on the way. ``publish`` does the last three, so
that no caller can forget one. The target's name is never opened for writing.

A temporary file is ``.dtr-tmp-NONCE~NAME`` and its writer holds a ``flock`` on it, so that what a killed writer left can be told from
what is being written (``flock`` and not ``lockf``: it also tells two threads of one process apart).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from dtr.errors import AlreadyExists, ConditionalPutUnsupported
from dtr.failpoints import failpoint
from dtr.store.base import RESERVED

__all__ = ["TEMPORARY", "Draft", "Folders", "is_abandoned", "link_absent", "publish", "refuse_existing", "sync_folder", "temporary"]

TEMPORARY: Final = f"{RESERVED}tmp-"
_MODE: Final = 0o644  # less the umask
_RENAME_NOREPLACE: Final = 1
_AT_FDCWD: Final = -100
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_NOREPLACE: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def sync_folder(path: str) -> None:
    """Make the names in a folder durable. A file system that cannot sync folders (EINVAL) has nothing to be waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


class Folders:
    """Makes folders below ``root`` (and root itself) exist durably; remembers which it has synced, by inode, to do so once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._synced: dict[str, tuple[int, int]] = {}

    def ensure(self, folder: str) -> None:
        """When this returns, ``folder`` exists and neither it nor a folder between it and root vanishes in a power cut.

        A folder that another process made may not be durable yet, so its parent is synced as well, the first time.
        """
        try:
            found = os.stat(folder)
        except FileNotFoundError:
            found = None
        if found and (folder == self._root or self._synced.get(folder) == (found.st_dev, found.st_ino)):
            return
        parent = os.path.dirname(folder)
        if parent != folder:
            self._ensure_parent(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(parent)
        made = os.stat(folder)
        self._synced[folder] = (made.st_dev, made.st_ino)

    def forget(self, folder: str) -> None:
        """The folder was removed; its inode may become another's."""
        self._synced.pop(folder, None)

    def _ensure_parent(self, parent: str) -> None:
        above_root = not (parent + os.sep).startswith(self._root + os.sep)
        if not (above_root and os.path.isdir(parent)):
            self.ensure(parent)


@dataclass(slots=True, kw_only=True)
class Draft:
    """A temporary file that is ours: open as ``fd``, locked. ``keep``: when the block ends now, leave it for whoever goes on with it."""

    fd: int
    path: str
    keep: bool = False

    @property
    def name(self) -> str:
        """What a successor must know of it."""
        return os.path.basename(self.path)


@contextlib.contextmanager
def temporary(folder: str, name: str, ensure: Callable[[str], None], *, earlier: str = "") -> Iterator[Draft]:
    """A locked temporary file for ``folder/name``: new and empty, or what an earlier writer left under the name ``earlier``.

    That one is taken only if its writer is gone. The file's name is gone afterwards, whatever happens, unless ``keep`` is set (or the
    process is killed). ``ensure`` is called first, and again if the folder vanished meanwhile (its last object was deleted).
    """
    fd, path = _adopt(folder, name, earlier) or _open_temporary(folder, name, ensure)
    draft = Draft(fd=fd, path=path)
    try:
        yield draft
    finally:
        if not draft.keep:
            with contextlib.suppress(FileNotFoundError):  # renamed to its final name
                os.unlink(path)
        os.close(fd)


def _adopt(folder: str, name: str, earlier: str) -> tuple[int, str] | None:
    if not (earlier.startswith(TEMPORARY) and earlier.endswith(f"~{name}")) or "/" in earlier:
        return None
    path = os.path.join(folder, earlier)
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # gone, or nothing that we may write: begin anew
        return None
    if _lock(fd) is True and os.fstat(fd).st_nlink:  # without locks nobody can say whether its writer is gone
        return fd, path
    os.close(fd)
    return None


def _open_temporary(folder: str, name: str, ensure: Callable[[str], None]) -> tuple[int, str]:
    for _ in range(20):
        path = os.path.join(folder, f"{TEMPORARY}{secrets.token_hex(6)}~{name}")
        try:
            ensure(folder)
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, _MODE)
        except FileNotFoundError:
            continue
        # A cleaner may have taken the lock, or the name, between our open and our lock.
        if _lock(fd) is not False and os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "the folder vanished again and again", folder)


def _lock(fd: int) -> bool | None:
    """Whether we hold the lock now; None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def is_abandoned(path: str) -> Iterator[bool]:
    """Whether the writer of a temporary file is gone; while the block runs nobody else can take it for his own."""
    try:
        fd = os.open(path, os.O_RDWR)
    except (FileNotFoundError, PermissionError):  # gone, or another user's
        yield False
        return
    try:
        yield _lock(fd) is True
    finally:
        os.close(fd)


def publish(fd: int, path: str, target: str, *, if_absent: bool) -> None:
    """Make the complete temporary file ``path`` (open as ``fd``) the object ``target``, durably.

    ``if_absent``: AlreadyExists if there is one, which then is durable too, so that whoever loses can build on it.
    """
    failpoint("store.local.before_link")
    folder = os.path.dirname(target)
    try:
        if if_absent:
            link_absent(path, target)
        else:
            os.rename(path, target)
    except AlreadyExists:
        sync_folder(folder)
        raise
    failpoint("store.local.after_link")
    sync_folder(folder)
    failpoint("store.local.after_sync")


def refuse_existing(target: str) -> None:
    """AlreadyExists if there is an object ``target``, and then it is durable, as it is when ``publish`` says so."""
    if os.path.lexists(target):
        sync_folder(os.path.dirname(target))
        raise AlreadyExists(f"{target} exists already", maybe_ours=False)


def link_absent(path: str, target: str) -> None:
    """Give the file a second name, or its only one where links are not supported; AlreadyExists if the name is taken."""
    try:
        os.link(path, target)
    except FileExistsError as exc:
        # A network file system that resends a request whose reply was lost reports its own success as a failure.
        if not _same_file(path, target):
            raise AlreadyExists(f"{target} exists already", maybe_ours=False) from exc
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        _rename_noreplace(path, target)


def _same_file(path: str, target: str) -> bool:
    try:
        return os.path.samefile(path, target)
    except FileNotFoundError:  # deleted since: it was there
        return False


def _rename_noreplace(path: str, target: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    code = errno.ENOSYS
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
    if code == errno.EEXIST:
        raise AlreadyExists(f"{target} exists already", maybe_ours=False)
    if code in _NO_NOREPLACE:
        raise ConditionalPutUnsupported(
            f"the file system of {os.path.dirname(target)} has neither link(2) nor renameat2(RENAME_NOREPLACE), so it cannot hold"
            " checkpoints: name a folder on another one (ext4, xfs, btrfs, tmpfs and NFS have them)",
            unknown=False,
        )
    raise OSError(code, os.strerror(code), target)
