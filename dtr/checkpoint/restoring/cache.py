"""Parts that were read from the store, kept in a folder of this host: the next restore of the same checkpoint reads them there.

    CACHE/NAME.safetensors     the bytes of one part; NAME tells its object in the store, and belongs to no other
    CACHE/NAME.json            which object that is, and the checksums of pieces that no manifest has: put before the bytes have their name
    CACHE/NAME.tmp, NAME.lock  a part on its way, and the lock that whoever fills it holds

The cache can only make a restore quicker. What it holds is verified like everything that is read; a damaged entry is dropped, and the
store read instead. A folder that is full, cannot be written or is none at all costs a line in the log. Killed at any point, a filling
leaves files that the next one replaces or removes: an entry counts only with both its files, and those are checked against each other,
against the manifest and against the bytes. The folder stays within its budget: the entries that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from dtr.checkpoint import checksum
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.restoring.source import PIECE_BYTES, Pieces, PieceSource
from dtr.checkpoint.staging.locks import Hold, try_lock
from dtr.config import Settings
from dtr.errors import IntegrityError
from dtr.failpoints import failpoint

__all__ = ["Cache", "Entry", "Filling", "over_budget"]

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 1 << 20
THREADS: Final = 4
DATA, FACTS, TEMPORARY, LOCK = ".safetensors", ".json", ".tmp", ".lock"
_VERSION: Final = 1
_LONGEST_FACTS: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file of the cache: its age counts since it was last used."""

    path: str
    size_bytes: int
    used_at: float


class Cache:
    """The cache of this host; several processes use one at once.

    Args:
        folder: made when it is first filled.
        budget_bytes: what it may hold; None: a quarter of the file system.
    """

    def __init__(self, folder: str, budget_bytes: int | None) -> None:
        self.folder, self._budget_bytes = os.path.abspath(folder), budget_bytes

    @classmethod
    def of(cls, settings: Settings) -> Cache | None:
        """The one that the settings name; None if they name none."""
        return cls(settings.cache, settings.cache_budget_bytes) if settings.cache else None

    def holds(self, url: str, facts: PartFacts) -> bool:
        """Whether there is an entry for the part; its bytes are not looked at."""
        return self._pieces(self._stem(url, facts), url, facts) is not None

    def source(self, url: str, facts: PartFacts) -> PieceSource | None:
        """The part as the cache has it; None if it has not.

        Args:
            url: of the store.
            facts: what the manifest says of the part.
        """
        stem = self._stem(url, facts)
        pieces = self._pieces(stem, url, facts)
        if pieces is None:
            return None
        try:
            descriptor = os.open(stem + DATA, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            log.debug("the cache's %s cannot be opened: %s", stem + DATA, exc)
            return None
        with contextlib.suppress(OSError):  # another user's
            os.utime(descriptor)
        name = f"cache {stem}{DATA}"
        return PieceSource(
            name=name, where="cache", pieces=pieces, threads=min(THREADS, os.cpu_count() or 1), block_bytes=BLOCK_BYTES,
            fill=lambda view, offset: _read(descriptor, view, offset, name), close=lambda: os.close(descriptor),
        )  # fmt: skip

    def drop(self, url: str, facts: PartFacts) -> None:
        """Remove the entry of a part: it was damaged."""
        stem = self._stem(url, facts)
        for end in (DATA, FACTS):
            with contextlib.suppress(OSError):
                os.unlink(stem + end)

    def filling(self, url: str, facts: PartFacts) -> Filling | None:
        """Room for a part that is about to be read; None if there is none, or somebody fills it already. The reason is logged."""
        stem, size_bytes = self._stem(url, facts), facts.state_bytes
        budget_bytes = 0
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            budget_bytes = self._budget()
            if size_bytes > budget_bytes:
                log.warning(
                    "%s is not kept in the cache: it has %d bytes, cache_budget_bytes is %d", facts.object, size_bytes, budget_bytes
                )
                return None
            hold = try_lock(stem + LOCK)
            if hold is None:
                return None
            try:
                self._make_room(size_bytes, budget_bytes)
                return Filling(stem, url, facts, hold)
            except BaseException:
                hold.release()
                raise
        except OSError as exc:
            log.warning("the cache %s cannot take %s (%d bytes): %s", self.folder, facts.object, size_bytes, exc.strerror or exc)
            return None

    def _stem(self, url: str, facts: PartFacts) -> str:
        digest = hashlib.sha256(f"{url}\n{facts.object}".encode()).hexdigest()[:16]
        return f"{self.folder}/{facts.object.rpartition('/')[2].partition('.')[0][:120]}-{digest}"

    def _pieces(self, stem: str, url: str, facts: PartFacts) -> Pieces | None:
        """What the entry's bytes must be: its facts, if they are about this very object."""
        try:
            with open(stem + FACTS, "rb") as file:
                noted = json.loads(file.read(_LONGEST_FACTS))
            if os.stat(stem + DATA).st_size != facts.state_bytes:
                return None
        except (OSError, ValueError, RecursionError):
            return None
        wanted = {"v": _VERSION, "store": url, "object": facts.object, "checksum": facts.checksum, "state_bytes": facts.state_bytes}
        if not isinstance(noted, dict) or any(noted.get(name) != value for name, value in wanted.items()):
            return None
        known = Pieces.of(facts)
        return known if known.crcs else _noted(noted, known)

    def _budget(self) -> int:
        if self._budget_bytes is not None:
            return self._budget_bytes
        stats = os.statvfs(self.folder)
        return stats.f_blocks * stats.f_frsize // 4

    def _make_room(self, size_bytes: int, budget_bytes: int) -> None:
        entries = []
        for entry in self._entries():
            if entry.path.endswith((TEMPORARY, LOCK)) and self._abandoned(entry.path):
                continue
            entries.append(entry)
        for path in over_budget(entries, budget_bytes - size_bytes):
            log.info("the cache lets go of %s", path)
            for end in (DATA, FACTS):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path.removesuffix(DATA) + end)

    def _entries(self) -> Iterator[Entry]:
        with os.scandir(self.folder) as found:
            for entry in found:
                if entry.name.endswith((DATA, TEMPORARY, LOCK)):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        yield Entry(path=entry.path, size_bytes=status.st_size, used_at=status.st_mtime)

    def _abandoned(self, path: str) -> bool:
        """Remove what a filling left that was killed; False if one is under way."""
        stem = path.rpartition(".")[0]
        hold = try_lock(stem + LOCK)
        if hold is None:
            return False
        with hold:
            for end in (TEMPORARY, LOCK):  # the lock file last, by whoever holds it
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(stem + end)
        return True


def over_budget(entries: list[Entry], budget_bytes: int) -> list[str]:
    """The parts to let go of, the longest unused first, so that what stays fits. Pure; what is on its way counts, and stays."""
    used = sum(entry.size_bytes for entry in entries)
    gone = []
    for entry in sorted((e for e in entries if e.path.endswith(DATA)), key=lambda e: (e.used_at, e.path)):
        if used <= budget_bytes:
            break
        used -= entry.size_bytes
        gone.append(entry.path)
    return gone


class Filling:
    """A part on its way into the cache. ``write`` gets its verified bytes, from several threads; ``keep`` makes it an entry.

    Never raises for the cache's own troubles: the restore goes on.
    """

    def __init__(self, stem: str, url: str, facts: PartFacts, hold: Hold) -> None:
        self._stem, self._url, self._facts, self._hold = stem, url, facts, hold
        self._descriptor = os.open(stem + TEMPORARY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._mutex, self._failed, self._taken, self._crcs = threading.Lock(), False, 0, dict[int, int]()
        try:
            os.posix_fallocate(self._descriptor, 0, facts.state_bytes)
        except OSError:
            self._end(remove=True)
            raise

    def write(self, view: memoryview, offset: int) -> None:
        """Take the bytes of the part from ``offset`` on."""
        if self._failed:
            return
        try:
            at = 0
            while at < len(view):
                at += os.pwrite(self._descriptor, view[at:], offset + at)
        except OSError as exc:
            self._failed = True
            log.warning("the cache stops taking %s: %s", self._facts.object, exc.strerror or exc)
            return
        crcs = [] if self._facts.pieces else checksum.pieces_of(view, PIECE_BYTES)
        with self._mutex:
            self._taken += len(view)
            self._crcs.update((offset + n * PIECE_BYTES, crc) for n, crc in enumerate(crcs))
        failpoint("cache.mid_fill")

    def keep(self) -> None:
        """All was written, and verified: make it an entry."""
        whole, kept = self._taken == self._facts.state_bytes, False
        try:
            if whole and not self._failed:
                self._note()
                failpoint("cache.before_rename")
                os.rename(self._stem + TEMPORARY, self._stem + DATA)
                kept = True
        except OSError as exc:
            log.warning("the cache could not keep %s: %s", self._facts.object, exc.strerror or exc)
        finally:
            self._end(remove=not kept)

    def discard(self) -> None:
        """The read failed."""
        self._end(remove=True)

    def _note(self) -> None:
        facts = self._facts
        note: dict[str, Any] = {
            "v": _VERSION, "store": self._url, "object": facts.object, "checksum": facts.checksum, "state_bytes": facts.state_bytes,
        }  # fmt: skip
        if not facts.pieces:
            note |= {"piece_bytes": PIECE_BYTES, "pieces": checksum.hex_of(self._crcs[at] for at in sorted(self._crcs))}
        temporary = f"{self._stem}{FACTS}{TEMPORARY}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(note, file)
        os.rename(temporary, self._stem + FACTS)

    def _end(self, *, remove: bool) -> None:
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            if remove:
                os.unlink(self._stem + TEMPORARY)
        with contextlib.suppress(OSError):
            os.unlink(self._stem + LOCK)
        self._hold.release()


def _noted(note: dict[str, Any], known: Pieces) -> Pieces:
    """With the checksums of pieces that the filling computed from verified bytes, where the manifest has only that of the whole."""
    match note:
        case {"piece_bytes": int(piece_bytes), "pieces": str(text)} if piece_bytes > 0 and set(text) <= set("0123456789abcdef"):
            crcs = [int(text[at : at + 16], 16) for at in range(0, len(text), 16)]
            complete = len(crcs) == -(-known.size_bytes // piece_bytes)
            if complete and checksum.combined(crcs, known.size_bytes, piece_bytes) == known.whole:
                return replace(known, piece_bytes=piece_bytes, crcs=tuple(crcs))
    return known


def _read(descriptor: int, view: memoryview, offset: int, name: str) -> None:
    at = 0
    while at < len(view):
        count = os.preadv(descriptor, [view[at:]], offset + at)
        if not count:
            raise IntegrityError(f"{name} ended after {offset + at} bytes")
        at += count
