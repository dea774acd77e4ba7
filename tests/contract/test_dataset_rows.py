"""Samples from all over a data set: how often files are opened for them, what stays in memory, and whose fault an error is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from dtr.datasets.formats import Columns, Span
from dtr.datasets.formats.columns import bytes_of
from dtr.datasets.formats.npy import Npy
from dtr.datasets.loading.batch import Batch, joined
from dtr.datasets.loading.reading import Rows, read_shard
from dtr.datasets.registering import spec as spec_module
from dtr.datasets.registering.spec import Dataset, Shard
from dtr.errors import DatasetMismatch, DataUnavailable, ShardUnreadable
from tests.contract.test_dataset_formats import CASES
from tests.contract.test_dataset_sources import dataset

SAMPLES, SHARD = 96, 12
FORMATS = [name for name in CASES if name != "bin"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shard and spans of each time that a file was opened to be read."""
    found: list[tuple[int, int]] = []
    plain = Shard.read_spans

    def read_spans(shard: Shard, spans: Sequence[Span], columns: Sequence[str] | None = None) -> list[Columns]:
        found.append((shard.index, len(spans)))
        return plain(shard, spans, columns)

    monkeypatch.setattr(Shard, "read_spans", read_spans)
    return found


def written(name: str, tmp_path: Path) -> Dataset:
    """96 samples in 8 shards of two files."""
    case = CASES[name]
    for part in range(2):
        case.write(tmp_path / f"{part}{case.format.suffixes[0]}", SAMPLES // 2)
    return dataset(tmp_path, case.format.name, SHARD)


def batches(made: Dataset, rows: Rows, column: str, size: int = 4, readers: int = 1) -> Iterator[bool]:
    """Whether each batch of a global shuffle is what the shards hold."""
    whole = [shard.read([column])[column] for shard in made.shards()]
    order = np.random.default_rng(3).permutation(SAMPLES)
    for places in np.split(order, SAMPLES // size):
        shards, at = places // SHARD, places % SHARD
        found = rows.take(shards, at, readers=readers)[column]
        yield found.tolist() == [whole[shard][position].tolist() for shard, position in zip(shards, at, strict=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_what_fits_is_read_once(name: str, tmp_path: Path, opened: list[tuple[int, int]]) -> None:
    """Given a global shuffle of eight shards that fit into memory, when it is read in small batches, then each is read once."""
    made = written(name, tmp_path)
    rows = Rows(made, [CASES[name].column], keep=10, keep_bytes=1 << 20)
    found = list(batches(made, rows, CASES[name].column))
    assert all(found)
    assert sorted(opened[8:]) == [(shard, 1) for shard in range(8)]


@pytest.mark.parametrize(("keep_bytes", "readers"), [(1, 1), (1 << 20, 1 << 20)])
def test_rows_that_do_not_fit_or_are_others_are_read_by_themselves(
    tmp_path: Path, opened: list[tuple[int, int]], keep_bytes: int, readers: int
) -> None:
    """Given a window beyond the bound, or one of many readers, then of an array a batch's rows are read, and each file opened once."""
    made = dataset(written("npy", tmp_path).spec.path, "npy", SAMPLES // 2)
    rows = Rows(made, None, keep=10, keep_bytes=keep_bytes)
    for _ in range(2):
        found = rows.take(np.array([1, 1, 0, 1, 1]), np.array([7, 9, 0, 7, 8]), readers=readers)["data"]
        assert found[:, 0, 0].tolist() == [42, 54, 0, 42, 48]
        found = rows.take(np.array([1, 0, 1]), np.array([7, 3, 40]), readers=readers)["data"]
        assert found[:, 0, 0].tolist() == [42, 18, 240]
    assert opened == [(0, 1), (1, 1), (0, 1), (1, 2)] * 2


def test_what_objects_hold_counts() -> None:
    """Given bytes, text, arrays and lists in a column, then their own size counts, of a shard as of a batch."""
    blobs = np.fromiter([b"x" * 1000, "y" * 1000, np.zeros(1000, np.uint8), [["z" * 1000]], {"k": b"x" * 1000}], dtype=np.object_)
    columns = {"id": np.arange(5), "blob": blobs}
    assert 5000 < bytes_of(columns) < 7000
    assert bytes_of({"id": columns["id"]}) == 40
    batch = Batch(dataset="d", version=1, run="r", epoch=0, number=0, columns=columns, ranges=((0, 0, 5),))
    assert batch.size_bytes == bytes_of(columns)


def test_shards_of_objects_stay_within_the_bound(tmp_path: Path, opened: list[tuple[int, int]]) -> None:
    """Given text of 100 kB a shard and 250 kB to keep, then two shards are kept, and of larger ones as many as must be."""
    for part in range(4):
        (tmp_path / f"{part}.jsonl").write_text(f'{{"t": "{"x" * 100_000}"}}\n')
    made = dataset(tmp_path)
    for keep_bytes, least, again in ((250_000, 1, [2]), (1000, 1, [2, 3]), (1000, 2, [2])):
        rows = Rows(made, None, keep=9, keep_bytes=keep_bytes, least=least)
        for number in (0, 1, 2, 3):
            rows.whole(number)
        assert rows._held_bytes <= max(keep_bytes, least * 110_000)
        opened.clear()
        rows.whole(3)
        rows.whole(2)
        rows.whole(3)
        assert [shard for shard, _ in opened] == ([] if len(again) == 1 else again)


def test_integers_that_floats_would_round_are_not_made_floats() -> None:
    """Given integers in one file and floats in another, then small ones are joined, and large ones refused by their column."""
    small, large, floats = ({"id": np.array(values)} for values in ([1, 2], [2**53 + 1], [0.5]))
    assert joined([small, floats])["id"].tolist() == [1.0, 2.0, 0.5]
    for pieces in ([large, floats], [{"id": np.array([2**64 - 1], dtype=np.uint64)}, small]):
        with pytest.raises(DatasetMismatch, match=r"column 'id' is .*int64.* would lose digits"):
            joined(pieces)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN])
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_host_cannot_do_is_no_fault_of_a_shard(name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a mount that went or permissions that lack, when a file is opened or read, then the host is told, and no shard is blamed."""
    shard = written(name, tmp_path).shard(0)
    monkeypatch.setattr("dtr.datasets.loading.reading.PAUSE_S", 0.0)

    def failing(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    class Failing:
        def __init__(self, path: str, mode: str) -> None:
            self._file = open(path, mode)  # noqa: SIM115
            self.name, self.readinto, self.read, self.readline, self.seek = path, failing, failing, failing, failing

        def __getattr__(self, what: str) -> Any:
            return getattr(self._file, what)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    for fault in (failing, Failing):
        monkeypatch.setattr(spec_module, "open", fault, raising=False)
        with pytest.raises(DataUnavailable, match=f"on this host: {os.strerror(code)}"):
            read_shard(shard, None)


def test_a_file_that_libraries_refuse_is_a_fault_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an OSError without a number, or one of the medium, then the shard is unreadable, and the error says how to go on without it."""
    monkeypatch.setattr("dtr.datasets.loading.reading.PAUSE_S", 0.0)
    shard = written("npy", tmp_path).shard(5)
    for error in (OSError("no such thing"), OSError(errno.EIO, os.strerror(errno.EIO))):
        monkeypatch.setattr(Npy, "read", _raising(error))
        with pytest.raises(ShardUnreadable, match=r"leave these samples out: dtr data skip d 1\.npy:12-24 --reason TEXT"):
            read_shard(shard, None)


def _raising(error: Exception) -> Any:
    def read(*_: object) -> Any:
        raise error

    return read
