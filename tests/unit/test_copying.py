"""Copying with a checksum on the way: the same bytes and sums whichever way the file systems allow."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dtr.store import crc
from dtr.store.copying import Copier, crc_of_range

SIZE = (20 << 20) + 4097
DATA = np.random.default_rng(3).bytes(SIZE)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    (tmp_path / "source").write_bytes(b"before" + DATA)
    source, target = os.open(tmp_path / "source", os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, target
    os.close(source)
    os.close(target)


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, 2 * SIZE, 0)


@pytest.mark.parametrize("refused_from", [None, 0, 2], ids=["shared", "never shared", "shared at first"])
@pytest.mark.parametrize("wanted", [True, False], ids=["with sum", "without"])
def test_every_way(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch, refused_from: int | None, wanted: bool) -> None:
    """By extents, by hand, and where the file system changes its mind in the middle."""
    source, target = files
    calls, by_kernel = [0], os.copy_file_range

    def sometimes(*args: int, **options: int) -> int:
        calls[0] += 1
        if refused_from is not None and calls[0] > refused_from:
            raise OSError(errno.EXDEV, "other file systems")
        return by_kernel(*args, **options)

    monkeypatch.setattr(os, "copy_file_range", sometimes)
    copier, at, total = Copier(source, len(b"before"), target), 0, 0 if wanted else None
    while at < SIZE:
        count, total = copier.append(at, min(at + (3 << 20), SIZE), total)
        at += count
    assert content(target) == DATA
    assert total == (crc.crc_of(DATA) if wanted else None)


def test_goes_on_at_the_end_of_the_target(files: tuple[int, int]) -> None:
    """What an earlier writer left stays before it."""
    source, target = files
    os.write(target, DATA[:1000])
    copier = Copier(source, len(b"before"), target)
    assert copier.append(1000, 5000, 0) == (4000, crc.crc_of(DATA[1000:5000]))
    assert content(target) == DATA[:5000]


def test_a_source_that_ends_early(files: tuple[int, int]) -> None:
    """What is there is copied and counted, then nothing."""
    source, target = files
    copier = Copier(source, len(b"before"), target)
    assert copier.append(SIZE - 10, SIZE + 10, 0)[0] == 10
    assert copier.append(SIZE, SIZE + 10, 0)[0] == 0


def test_the_sum_of_a_range(files: tuple[int, int]) -> None:
    """None rather than a sum of less than was asked for."""
    source, _ = files
    assert crc_of_range(source, 6, 6 + SIZE) == crc.crc_of(DATA)
    assert crc_of_range(source, 1_000_000, 1_000_000) == 0
    assert crc_of_range(source, 0, SIZE + 7) is None


def test_sums_of_parts_make_the_sum_of_the_whole() -> None:
    """Without another look at the bytes; an empty part changes nothing."""
    cuts = [0, 1, 1, 5 << 20, SIZE]
    parts = [(crc.crc_of(DATA[start:end]), end - start) for start, end in itertools.pairwise(cuts)]
    assert crc.combined(parts) == crc.crc_of(DATA)
    assert crc.crc_of(DATA[9:], crc.crc_of(DATA[:9])) == crc.crc_of(DATA)
    assert crc.combined([]) == 0
