"""What every place is to whoever reads a part: a slot in memory, the cache folder, an object of the store, chunks."""

from __future__ import annotations

from typing import Literal, Protocol

__all__ = ["Source", "Where"]

Where = Literal["slot", "cache", "store"]


class Source(Protocol):
    """The bytes of one part's safetensors file. Threads may read at once; nothing is opened before the first read."""

    @property
    def name(self) -> str:
        """For people: ``object runs/...``, ``slot /dev/shm/...``."""

    @property
    def where(self) -> Where:
        """What kind of place it is."""

    @property
    def state_bytes(self) -> int:
        """The size of the file."""

    @property
    def piece_bytes(self) -> int:
        """A range that begins and ends at multiples of this (or at the end) is read without a byte more; 0: only the whole is."""

    def check(self) -> None:
        """Raise IntegrityError unless all of it is there by its size: asked before memory is taken for what a manifest merely declares."""

    def head(self, *, keep: bool = False) -> bytes | bytearray:
        """The file's first bytes, verified: as many as a source reads at least. Whoever has them must not write to them.

        Args:
            keep: them until ``close``: what is read there later is taken from them, and costs the place nothing more.

        Raises:
            As :meth:`read_into`.
        """

    def read_into(self, buffer: memoryview | bytearray, offset: int = 0) -> None:
        """Fill all of ``buffer`` with the file's bytes from ``offset`` on, verified.

        Raises:
            IntegrityError: missing, of another size, or another checksum; the buffer holds nothing to be relied on.
            StoreUnavailable: it stayed away.
            InvalidInput: the range is not within the file.
        """

    def close(self) -> None:
        """Let go of locks, memory and descriptors; safe to call twice."""
