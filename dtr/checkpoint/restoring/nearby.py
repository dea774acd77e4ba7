"""Where the part of a checkpoint can be read, the nearest place first: a slot that is still in memory, the cache folder, the store.

A slot holds the bytes of a save until it is reused: so ranks that survive a broken run go back to its last commit at the speed of memory.
Only what a manifest committed is read there, and verified against it like anything else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dtr.checkpoint.format.paths import Patterns, prune
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.restoring import scattered
from dtr.checkpoint.restoring.cache import Cache
from dtr.checkpoint.restoring.contract import Source, Where
from dtr.checkpoint.restoring.fetch import check_asked, read_state
from dtr.checkpoint.restoring.source import Pieces, PieceSource, source_of
from dtr.checkpoint.staging.memory import mapped_here
from dtr.checkpoint.staging.slots import Found, holds, open_for_reading, scan_job
from dtr.clock import SYSTEM, Clock
from dtr.errors import IntegrityError, SlotUnavailable, WorldSizeMismatch
from dtr.store import Store

__all__ = ["Nearby", "Part", "Read", "of_slot"]

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 1 << 20
THREADS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a commit: its run and step, and what the manifest says of it."""

    run: str
    step: int
    facts: PartFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A state, and where its bytes came from; of several parts the farthest."""

    state: Any
    where: Where
    size_bytes: int


class Nearby:
    """The places that this process can read a job's parts from.

    Args:
        store: of the job.
        url: of the store, as slots and the cache name it.
        job: whose.
        staging: the folder of this host's slots; None: they are not looked at.
        cache: of this host; None: there is none.
        patience_s: how long a store that is away is tried.
        clock: for that.
    """

    def __init__(
        self, store: Store, url: str, *, job: str, staging: str | None, cache: Cache | None, patience_s: float, clock: Clock = SYSTEM
    ) -> None:
        self._store, self._url, self._job, self._staging, self._cache = store, url, job, staging, cache
        self._patience_s, self._clock = patience_s, clock

    def places(self, part: Part) -> list[Where]:
        """Where the part is, the nearest first; looks at no bytes. The store counts if it holds the object in full length."""
        found: list[Where] = []
        if self._slot(part) is not None:
            found.append("slot")
        if self._cache is not None and self._cache.holds(self._url, part.facts):
            found.append("cache")
        with contextlib.suppress(IntegrityError):
            source_of(self._store, part.facts, patience_s=0).check()
            found.append("store")
        return found

    def check(self, part: Part) -> None:
        """Raise IntegrityError if the part is nowhere in full length."""
        try:
            source_of(self._store, part.facts, patience_s=0).check()
        except IntegrityError:
            if not {"slot", "cache"} & set(self.places(part)):
                raise

    def misfit(self, parts: Iterable[Part], *, rank: int, world_size: int, only: Patterns | None) -> str:
        """Why ``world_size`` ranks cannot have what they ask for of a state that is replicated in part; '' if they can.

        Raises:
            IntegrityError: a part is damaged.
        """
        with contextlib.ExitStack() as stack:
            sources = {part.facts.rank: stack.enter_context(contextlib.closing(self._nearest(part, set()))) for part in parts}
            whole = scattered.locate(scattered.headers_of(sources), rank % len(sources))
            try:
                scattered.check_fits(whole, whole.spec if only is None else prune(whole.spec, only), world_size)
            except WorldSizeMismatch as exc:
                return exc.message
        return ""

    def check_asked(self, parts: Iterable[Part], *, rank: int, world_size: int, only: Patterns | None, into: Any) -> None:
        """Raise InvalidInput if ``only`` or ``into`` do not fit these parts; reads no more than their headers."""
        with contextlib.ExitStack() as stack:
            sources = {part.facts.rank: stack.enter_context(contextlib.closing(self._nearest(part, set()))) for part in parts}
            check_asked(sources, rank=rank, world_size=world_size, only=only, into=into)

    def read(self, parts: Iterable[Part], *, rank: int, world_size: int, only: Patterns | None = None, into: Any = None) -> Read:
        """Read the state of ``rank`` from the nearest places. A slot or cache entry that turns out to be damaged or gone is passed over.

        Raises:
            What :func:`dtr.checkpoint.restoring.fetch.read_state` does.
        """
        parts = tuple(parts)
        passed_over: set[str] = set()
        while True:
            with contextlib.ExitStack() as stack:
                sources = {part.facts.rank: stack.enter_context(contextlib.closing(self._nearest(part, passed_over))) for part in parts}
                try:
                    return self._read(parts, sources, rank=rank, world_size=world_size, only=only, into=into)
                except (IntegrityError, SlotUnavailable) as exc:
                    name, where = exc.facts.get("source"), exc.facts.get("where")
                    if name is None or where == "store":
                        raise
                    passed_over.add(name)
                    log.warning("reading elsewhere: %s", exc)
                    if where == "cache" and self._cache is not None:
                        for part in parts:
                            if sources[part.facts.rank].name == name:
                                self._cache.drop(self._url, part.facts)

    def _read(self, parts: tuple[Part, ...], sources: dict[int, Source], *, only: Patterns | None, into: Any, **reader: int) -> Read:
        filling = None
        if self._cache is not None and len(parts) == 1 and only is None and into is None and sources[parts[0].facts.rank].where == "store":
            filling = self._cache.filling(self._url, parts[0].facts)
        try:
            state = read_state(sources, only=only, into=into, tee=filling.write if filling is not None else None, **reader)
        except BaseException:
            if filling is not None:
                filling.discard()
            raise
        if filling is not None:
            filling.keep()
        farthest: Where = max((source.where for source in sources.values()), key=("slot", "cache", "store").index)
        return Read(state=state, where=farthest, size_bytes=sum(source.state_bytes for source in sources.values()))

    def _nearest(self, part: Part, passed_over: set[str]) -> Source:
        looks: tuple[Callable[[], Source | None], ...] = (lambda: self._of_slot(part), lambda: self._of_cache(part))
        for look in looks:
            found = look()
            if found is not None and found.name not in passed_over:
                return found
            if found is not None:
                found.close()
        return source_of(self._store, part.facts, patience_s=self._patience_s, clock=self._clock)

    def _of_slot(self, part: Part) -> Source | None:
        found = self._slot(part)
        return of_slot(found, Pieces.of(part.facts)) if found is not None else None

    def _of_cache(self, part: Part) -> Source | None:
        return self._cache.source(self._url, part.facts) if self._cache is not None else None

    def _slot(self, part: Part) -> Found | None:
        """The slot that holds this very part; the manifest vouches for its bytes."""
        if self._staging is None:
            return None
        facts = part.facts
        wanted = (part.run, part.step, facts.rank, facts.worker, facts.incarnation, self._url, facts.state_bytes)
        for found in scan_job(self._staging, self._job):
            record = found.record
            if record is None or found.kind not in {"STAGED", "DONE"} or not holds(found):
                continue
            if (record.run, record.step, record.rank, record.worker, record.incarnation, record.store, record.size_bytes) == wanted:
                return found
        return None


def of_slot(found: Found, pieces: Pieces) -> PieceSource:
    """A slot as a source, held from the first read until ``close``: it is not reused meanwhile.

    Args:
        found: a slot with a complete part, whether or not its save is over.
        pieces: what the bytes must be.
    """
    name, stack, mutex = f"slot {found.files.data}", contextlib.ExitStack(), threading.Lock()
    opened: list[_Slot] = []

    def slot() -> _Slot:
        with mutex:
            if not opened:
                try:
                    reading = stack.enter_context(open_for_reading(found, also_done=True))
                    opened.append(_Slot(reading.descriptor, mapped_here(found.files.data, pieces.size_bytes)))
                except OSError as exc:  # its trainer ended, and its folder went with it
                    raise SlotUnavailable(f"{name} cannot be read: {exc.strerror or exc}", path=found.files.data, busy=False) from exc
            return opened[0]

    def close() -> None:
        opened.clear()  # the view of the memory goes before the lock
        stack.close()

    return PieceSource(
        name=name, where="slot", pieces=pieces, fill=lambda view, offset: _fill(slot(), view, offset, name),
        threads=min(THREADS, os.cpu_count() or 1), block_bytes=BLOCK_BYTES, close=close,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Slot:
    """An open slot: its file, and its bytes where this process has them mapped already."""

    descriptor: int
    view: memoryview | None


def _fill(slot: _Slot, view: memoryview, offset: int, name: str) -> None:
    if slot.view is not None:
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(slot.view[offset : offset + len(view)], np.uint8))
        return
    while view:  # quicker than to map the file: each page of it would have to be met
        count = os.preadv(slot.descriptor, [view], offset)
        if not count:
            raise IntegrityError(f"{name} ended after {offset} bytes")
        view, offset = view[count:], offset + count
