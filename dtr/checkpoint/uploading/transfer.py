"""The bytes of a part on their way from its slot into the store, and the facts that the manifest will have of them.

The checksum of each piece is computed once, by the store's code while it sends the piece, and is S3's checksum of that part, the record's
for a successor, and the manifest's; that of the whole follows from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dtr.checkpoint import checksum
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.staging.slots import Reading
from dtr.errors import AlreadyExists
from dtr.store import Store
from dtr.store.base import Progress
from dtr.store.pieces import cut, piece_bytes
from dtr.store.resume import Resume, Sent

__all__ = ["carry"]


def carry(store: Store, reading: Reading, key: str, *, resume: Resume | None = None, progress: Progress | None = None) -> PartFacts:
    """Put a part under a key that only uploads of this part write, and return its facts; the bytes are in the store then.

    Args:
        store: of the job.
        reading: the open slot.
        key: of the object; what is there already under it are these bytes, sent before.
        resume: the record of the transfer; None: nothing is left for a successor.
        progress: gets the bytes done so far; what it raises ends the transfer and is passed on.
    """
    record, heard = reading.record, _Heard(resume) if resume is not None else None
    try:
        store.put_file(key, reading.descriptor, record.size_bytes, if_absent=True, progress=progress, resume=heard)
    except AlreadyExists:
        if store.size(key) != record.size_bytes:
            raise
    crcs = _complete(reading, heard.crcs if heard is not None else {})
    each = piece_bytes(record.size_bytes)
    return PartFacts(
        rank=record.rank,
        worker=record.worker,
        incarnation=record.incarnation,
        object=key,
        size_bytes=record.size_bytes,
        checksum=checksum.text_of(checksum.combined(crcs, record.size_bytes, each)),
        piece_bytes=each,
        pieces=checksum.hex_of(crcs),
    )


def _complete(reading: Reading, known: Mapping[int, int]) -> list[int]:
    """The checksum of every piece: those that were heard of, and the others from the slot."""
    size_bytes = reading.record.size_bytes
    pieces = cut(size_bytes, piece_bytes(size_bytes))
    return [known[piece.number] if piece.number in known else checksum.crc_of(reading.buffer[piece.start : piece.end]) for piece in pieces]


class _Heard(Resume):
    """The same record, which also keeps the checksums that pass by."""

    def __init__(self, resume: Resume) -> None:
        self._resume, self.upload, self.sent = resume, resume.upload, resume.sent
        self.crcs: dict[int, int] = {}

    def begin(self, upload: str, there: Iterable[Sent] = ()) -> None:
        there = [*there]
        self.crcs = {sent.number: sent.crc for sent in there}
        self._resume.begin(upload, there)

    def done(self, piece: Sent) -> None:
        self.crcs[piece.number] = piece.crc
        self._resume.done(piece)
