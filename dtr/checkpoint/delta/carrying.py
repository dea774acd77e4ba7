"""Only what the last commit lacks goes into the store (setting ``delta = auto``); what lies there: ``chunks``.

    hash       every chunk of the staged part
    intent     put the recipe, before any chunk is looked for: from now on a collector sees what this part needs
    condemned  read what collectors are about to delete; of that nothing is used again
    look       is each chunk that is used again there, in full, and on no record as damaged? That a commit names it does not say so
    send       the chunks that are new, or that the look took away, under this upload's own names

Where the answers take away what the recipe names, another recipe is put, and both questions are asked again. Killed anywhere, the next
upload of the part finds the recipes that were put for it, and sends only the chunks that are not there yet; what belongs to no decided
recipe is collected. Why no collector ever deletes a chunk that a commit names: see :mod:`dtr.checkpoint.delta.collection`.

A chunk that a commit names is durable, and so is the next commit's: its upload wrote it and saw that through, took it from the commit
before, or took it from a killed upload of the same part and made it durable first.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from awscrt.checksums import combine_crc64nvme

from dtr.checkpoint import checksum
from dtr.checkpoint.delta import payoff as delta_payoff
from dtr.checkpoint.delta.chunks import SUFFIX, Chunk, Range, Recipe, cut, digest_of, is_recipe, read_recipe
from dtr.checkpoint.delta.collection import condemned
from dtr.checkpoint.delta.damage import damaged
from dtr.checkpoint.delta.source import recipe_of
from dtr.checkpoint.format.tensors import Header, read_header
from dtr.checkpoint.lineage import Checkpoint, split_name
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.staging.slots import Reading, SlotRecord
from dtr.checkpoint.survey import read_manifest
from dtr.checkpoint.uploading.commit import folder_key
from dtr.errors import AlreadyExists, CoordinatorUnavailable, IntegrityError, NotFound
from dtr.failpoints import failpoint
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.store import Store
from dtr.store.base import Progress
from dtr.store.pieces import Piece, move

__all__ = ["Base", "Hashed", "carry", "hashed"]

log = logging.getLogger(__name__)

_HASHERS: Final = 2
_SENDERS: Final = 4
_LOOKERS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """A chunk before it has a name: ``crc`` is its CRC64NVME, ``crcs`` those of its ranges."""

    hash: str
    crc: int
    crcs: tuple[int, ...]
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Chunks that may be named again. ``nonces``: of a hash, whose they are; ``commit``: the checkpoint whose recipe names them."""

    commit: Checkpoint | None = None
    nonces: Mapping[str, str]


def carry(store: Store, reading: Reading, *, state: JobState, nonce: str, progress: Progress, spare: Progress) -> PartFacts | None:
    """Store a part as chunks, and return its facts; None if it is to be stored as one object: delta is off, or does not pay.

    Args:
        store: of the job.
        reading: the open slot.
        state: the job; asked for the newest commit and for how well delta has paid. While Redis is away, nothing is reused.
        nonce: of the claim, in the name of the recipe.
        progress: gets the bytes of the part that are safe; what it raises ends the transfer and is passed on.
        spare: gets, first, the bytes that need not be sent.
    """
    record = reading.record
    if record.delta != "auto" or not delta_payoff.is_wanted(state, record):
        return None
    try:
        header = read_header(reading.buffer, record.size_bytes)
    except IntegrityError as exc:
        log.warning("run %s step %d rank %d is stored whole: %s", record.run, record.step, record.rank, exc)
        return None
    progress(0)
    chunks = hashed(reading.buffer, header)
    base, left = _base(store, state, record), _left_behind(store, record)
    recipe, key = _intend(store, reading, header, chunks, nonce=nonce, base=base, left=left)
    there = {*base.nonces.items(), *left.nonces.items()}
    new = {chunk.key: chunk for chunk in recipe.chunks if (chunk.hash, chunk.nonce) not in there}
    sent_bytes = _send(store, reading, list(new.values()), progress, spare)
    log.info("run %s step %d rank %d: %d of %d bytes were new", record.run, record.step, record.rank, sent_bytes, record.size_bytes)
    if base.commit is not None:
        delta_payoff.note(state, record, sent_bytes=sent_bytes)
    return _facts(record, key, recipe)


def _facts(record: SlotRecord, key: str, recipe: Recipe) -> PartFacts:
    content = recipe.encode()
    return PartFacts(
        rank=record.rank,
        worker=record.worker,
        incarnation=record.incarnation,
        object=key,
        size_bytes=len(content),
        checksum=checksum.of(content),
        kind="chunks",
        state_bytes=recipe.state_bytes,
        state_checksum=recipe.state_checksum,
    )


# --- hash -----------------------------------------------------------------------------------------------------------


def hashed(buffer: memoryview, header: Header) -> list[Hashed]:
    """Every chunk of a part, hashed by a few threads; nothing is copied."""

    def look(ranges: tuple[Range, ...]) -> Hashed:
        views = [buffer[start : start + length] for start, length in ranges]
        crcs = tuple(checksum.crc_of(view) for view in views)
        crc = 0
        for one, (_, length) in zip(crcs, ranges, strict=True):
            crc = combine_crc64nvme(crc, one, length)
        return Hashed(hash=digest_of(views), crc=crc, crcs=crcs, ranges=ranges)

    with ThreadPoolExecutor(_HASHERS, thread_name_prefix="dtr-hash") as pool:
        return list(pool.map(look, cut(header)))


def _whole_crc(header: bytes, chunks: Iterable[Hashed]) -> int:
    """The checksum of the whole file from those of its ranges, without another look at the bytes."""
    crc = checksum.crc_of(header)
    for (_, length), one in sorted((span, one) for chunk in chunks for span, one in zip(chunk.ranges, chunk.crcs, strict=True)):
        crc = combine_crc64nvme(crc, one, length)
    return crc


# --- what is there --------------------------------------------------------------------------------------------------


def _base(store: Store, state: JobState, record: SlotRecord) -> Base:
    """The chunks of the newest commit's part of the same rank; none if it has none, or nobody knows it."""
    try:
        with translate(state.url):
            newest = split_name(state.redis.hget(state.keys.meta, "latest") or "")
        if newest is None:
            return Base(nonces={})
        manifest = read_manifest(store, *newest)
        part = next((part for part in manifest.parts if part.rank == record.rank and part.kind == "chunks"), None)
        if manifest.decision != "commit" or part is None:
            return Base(nonces={})
        return Base(commit=newest, nonces={chunk.hash: chunk.nonce for chunk in recipe_of(store, part).chunks})
    except (NotFound, IntegrityError, CoordinatorUnavailable) as exc:
        log.warning("run %s step %d rank %d reuses nothing: %s", record.run, record.step, record.rank, exc)
        return Base(nonces={})


def _left_behind(store: Store, record: SlotRecord) -> Base:
    """The chunks that killed uploads of this very save have stored: their recipes say which they were about to."""
    stem = f"{folder_key(record.run, record.step)}/part-{record.rank:05d}-{record.incarnation}-"
    named: dict[str, Chunk] = {}
    for key in store.list(folder_key(record.run, record.step)):
        if not key.startswith(stem) or not is_recipe(key):
            continue
        try:
            recipe = read_recipe(store, key)
        except IntegrityError as exc:
            log.warning("what an earlier upload left is of no use: %s", exc)
            continue
        if recipe.save == record.save:
            named |= {chunk.key: chunk for chunk in recipe.chunks}
    found = _those(named.values(), lambda chunk: _is_there(store, chunk) and _is_durable(store, chunk))
    return Base(nonces={chunk.hash: chunk.nonce for chunk in found})


def _those(chunks: Iterable[Chunk], question: Callable[[Chunk], bool]) -> list[Chunk]:
    """Those of ``chunks`` for which the answer, each a round trip or two, is yes."""
    asked = list(chunks)
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="dtr-look") as pool:
        return [chunk for chunk, answer in zip(asked, pool.map(question, asked), strict=True) if answer]


def _is_there(store: Store, chunk: Chunk) -> bool:
    """Whether the store holds a chunk in full."""
    try:
        return store.size(chunk.key) == chunk.size_bytes
    except NotFound:
        return False


def _is_durable(store: Store, chunk: Chunk) -> bool:
    """Whether a chunk that is there outlives a power cut: it does once it keeps another from its name, whatever its writer came to."""
    try:
        store.put(chunk.key, b"", if_absent=True)
    except AlreadyExists:
        return True
    return False  # it went meanwhile. What has its name now is too short for anyone to use, and is collected


# --- intent and look ------------------------------------------------------------------------------------------------


def _intend(
    store: Store, reading: Reading, header: Header, chunks: Sequence[Hashed], *, nonce: str, base: Base, left: Base
) -> tuple[Recipe, str]:
    """Put the recipe; and another one, as long as something that it uses again turns out to be condemned or gone."""
    record, own, taken = reading.record, secrets.token_hex(8), set[str]()
    head = bytes(reading.buffer[: header.data_start])
    state_checksum = checksum.text_of(_whole_crc(head, chunks))
    while True:
        recipe = _recipe(record, head, _named(chunks, own, [left, base], taken), state_checksum)
        key = f"{folder_key(record.run, record.step)}/part-{record.rank:05d}-{record.incarnation}-{nonce}-{secrets.token_hex(4)}{SUFFIX}"
        failpoint("delta.before_intent")
        store.put(key, recipe.encode(), if_absent=True)
        failpoint("delta.after_intent")
        reused = [chunk for chunk in recipe.chunks if chunk.nonce != own]
        gone = _condemned(store, reused)
        failpoint("delta.after_condemned")
        gone |= _gone(store, reused)
        if not gone:
            return recipe, key
        log.info("%d chunks that %s would use again are damaged, gone or about to go, and are stored anew", len(gone), key)
        taken |= gone


def _named(chunks: Iterable[Hashed], own: str, known: Sequence[Base], taken: AbstractSet[str]) -> tuple[Chunk, ...]:
    """The chunks under the names that they have, or, where they have none or it is ``taken``, under ours."""

    def name(one: Hashed) -> Chunk:
        for held in known:
            if (nonce := held.nonces.get(one.hash)) is not None:
                chunk = Chunk(hash=one.hash, nonce=nonce, crc=one.crc, ranges=one.ranges)
                if chunk.key not in taken:
                    return chunk
        return Chunk(hash=one.hash, nonce=own, crc=one.crc, ranges=one.ranges)

    return tuple(name(one) for one in chunks)


def _recipe(record: SlotRecord, header: bytes, chunks: tuple[Chunk, ...], state_checksum: str) -> Recipe:
    return Recipe(
        job=record.job, run=record.run, step=record.step, rank=record.rank, save=record.save, state_bytes=record.size_bytes,
        state_checksum=state_checksum, header=header, chunks=chunks,
    )  # fmt: skip


def _condemned(store: Store, reused: Sequence[Chunk]) -> set[str]:
    """Keys of those that a collector is about to delete; of all, if nobody can tell: then a save is stored anew, rather than not at all."""
    keys = {chunk.key for chunk in reused}
    try:
        return keys & condemned(store) if keys else keys
    except IntegrityError as exc:
        log.error("nothing is used again, and no chunk can be deleted, until it is removed: %s", exc)
        return keys


def _gone(store: Store, reused: Sequence[Chunk]) -> set[str]:
    """Keys that cannot be relied on. Looked for after the intent was put, and after the condemned were read, and not before."""
    keys = {chunk.key for chunk in reused}
    there = {chunk.key for chunk in _those(reused, lambda chunk: _is_there(store, chunk))}
    return keys - there | keys & damaged(store) if keys else keys


# --- send -----------------------------------------------------------------------------------------------------------


def _send(store: Store, reading: Reading, new: Sequence[Chunk], progress: Progress, spare: Progress) -> int:
    """Put chunks, each under a key that only this upload writes; returns their bytes."""
    total = sum(chunk.size_bytes for chunk in new)
    known = reading.record.size_bytes - total
    spare(known)

    def send(piece: Piece, over: threading.Event) -> None:
        if over.is_set():
            return
        chunk = new[piece.number - 1]
        views = [reading.buffer[start : start + length] for start, length in chunk.ranges]
        try:
            store.put(chunk.key, views[0] if len(views) == 1 else b"".join(views), if_absent=True)
        except AlreadyExists:  # our own, sent twice
            if store.size(chunk.key) != chunk.size_bytes:
                raise
        failpoint("delta.mid_send")

    move(send, _pieces(new), threads=_SENDERS if len(new) > 1 else 1, progress=lambda done: progress(known + done))
    progress(reading.record.size_bytes)
    return total


def _pieces(chunks: Iterable[Chunk]) -> Iterator[Piece]:
    at = 0
    for number, chunk in enumerate(chunks, start=1):
        yield Piece(number=number, start=at, end=at + chunk.size_bytes)
        at += chunk.size_bytes
