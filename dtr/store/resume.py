"""What a large transfer leaves behind for whoever must finish it, should its process die.

    begin  the store's name for the upload is on record, before the first byte
    done   one piece is in the store: on record soon after, and the store itself can say so as well

A successor is handed what is on record, asks the store what of it is true, and goes on at the first missing piece. So a kill costs the
pieces in flight, no more. Whoever gives a ``Resume`` to ``put_file`` promises that all uploads of that key are of the same bytes, cut by
``pieces.piece_bytes``, and that ``abort_uploads`` is called for the key once it is decided that none of them is wanted any more.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Resume", "Sent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A piece that the store has: its number from 1 on, the CRC64NVME of its bytes, and the store's name for what it holds."""

    number: int
    crc: int
    tag: str = ""


class Resume(abc.ABC):
    """The record of one transfer. ``upload`` is the store's name for what an earlier process began, '' if none did."""

    upload: str
    sent: Mapping[int, Sent]

    @abc.abstractmethod
    def begin(self, upload: str, there: Iterable[Sent] = ()) -> None:
        """Put the upload on record, and which pieces it has already. What this raises means that it must not be gone on with."""

    @abc.abstractmethod
    def done(self, piece: Sent) -> None:
        """A piece is in the store. Called by any thread; returns at once and raises nothing."""
