"""The parts of a large S3 object: how large they are, their checksums, and the file they come from as memory."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["PART_BYTES", "Part", "combined", "crc_of", "mapped", "part_bytes"]

PART_BYTES: Final = 16 << 20
_MOST_PARTS: Final = 9_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part as the service acknowledged it."""

    number: int
    size_bytes: int
    etag: str
    crc: int


def part_bytes(size_bytes: int) -> int:
    """The size of parts: 16 MiB, or the whole MiB from which 9,000 parts suffice (S3 allows 10,000)."""
    needed = -(-size_bytes // _MOST_PARTS)
    return max(PART_BYTES, -(-needed >> 20) << 20)


@contextlib.contextmanager
def mapped(fd: int, offset: int, size_bytes: int) -> Iterator[memoryview]:
    """The bytes of a file as memory, not read before they are sent."""
    if not size_bytes:
        yield memoryview(b"")
        return
    mapping = mmap.mmap(fd, offset + size_bytes, prot=mmap.PROT_READ)
    try:
        yield memoryview(mapping)[offset:]
    finally:
        with contextlib.suppress(BufferError):  # an error's traceback still holds a view: then it goes with that
            mapping.close()


def crc_of(content: memoryview) -> int:
    """CRC64NVME."""
    from awscrt.checksums import crc64nvme

    return int(crc64nvme(content))


def combined(parts: list[Part]) -> int:
    """The CRC of the whole object from those of its parts, without another look at the bytes."""
    from awscrt.checksums import combine_crc64nvme

    total = 0
    for part in parts:
        total = combine_crc64nvme(total, part.crc, part.size_bytes)
    return total
