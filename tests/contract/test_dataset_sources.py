"""Where data sets lie: compressed files, patterns, indexes and stores give the same samples as plain files in a folder."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from dtr.datasets.formats import make_format
from dtr.datasets.registering.declared import check_total, dataset_of, declare
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.sources import copies as copies_module
from dtr.datasets.sources.copies import Copies, Stamp
from dtr.datasets.sources.files import find_files, measure_files
from dtr.datasets.sources.listing import expand
from dtr.errors import DatasetMismatch, InvalidInput
from dtr.store import open_store
from tests.contract.test_dataset_formats import write_mds, write_tar
from tests.servers import SeaweedServer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of copies of one's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DTR_DATA_CACHE", str(folder))
    copies_module.copies.cache_clear()
    yield folder
    copies_module.copies.cache_clear()


def lines(first: int, count: int) -> bytes:
    return "".join(f'{{"id": {i}}}\n' for i in range(first, first + count)).encode()


def dataset(path: str | Path, format: str = "jsonl", shard_size: int = 4) -> Dataset:
    """As ``register`` would make it."""
    how = make_format(format)
    declared = declare("d", how, total_samples=None, shard_size=shard_size, shuffle=False, seed=0)
    found = find_files(path, how)
    files = measure_files(found, how, shard_size)
    check_total(declared, sum(facts.samples for facts in files), found)
    return dataset_of(declared, found, files, now_ms=1)


def ids(made: Dataset, column: str = "id") -> list[int]:
    return [int(i) for shard in made.shards() for i in shard.read([column])[column]]


# --- compressed -------------------------------------------------------------------------------------------------------


def compressed(folder: Path) -> Path:
    """Ten samples in gzip, ten in zstd of two frames, five plain."""
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(0, 10)))
    packer = zstandard.ZstdCompressor()
    (folder / "b.jsonl.zst").write_bytes(packer.compress(lines(10, 4)) + packer.compress(lines(14, 6)))
    (folder / "c.jsonl").write_bytes(lines(20, 5))
    return folder


def test_compressed_files_hold_the_samples_of_plain_ones(tmp_path: Path, cache: Path) -> None:
    """Shards are ranges of the content; a copy is made once and read by position."""
    made = dataset(compressed(tmp_path / "data"))
    assert ids(made) == list(range(25))
    assert [facts.plain_bytes > facts.size_bytes for facts in made.files] == [True, True, False]
    assert len([one for one in cache.iterdir() if one.suffix == ""]) == 2
    assert not list(cache.glob("*.tmp*"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.jsonl.zst"])
def test_a_compressed_file_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    """Also zstd, whose own reader takes the end of the file for the end of the data."""
    path = compressed(tmp_path / "data") / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DatasetMismatch, match=f"{name} is no whole"):
        dataset(path.parent)


def test_a_compressed_file_that_changed_is_refused_by_name(tmp_path: Path) -> None:
    """The copy of what was registered is not read for what is there now."""
    made = dataset(compressed(tmp_path / "data"))
    path = tmp_path / "data" / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(100, 10)))
    with pytest.raises(DatasetMismatch, match=r"a\.jsonl\.gz changed since"):
        ids(made)


def test_copies_stay_within_their_budget_and_the_oldest_go(tmp_path: Path, cache: Path) -> None:
    """Given room for two of three copies, then the one that was not used for longest is made again."""
    data = tmp_path / "data"
    data.mkdir()
    for name in "abc":
        (data / f"{name}.jsonl.gz").write_bytes(gzip.compress(name.encode() * 100_000))
    held = Copies(folder=str(cache), budget_bytes=250_000)

    def read(name: str) -> bytes:
        facts = (data / f"{name}.jsonl.gz").stat()
        with held.open(str(data), f"{name}.jsonl.gz", Stamp(size_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns)) as file:
            return file.read(1)

    def kept() -> set[bytes]:
        return {one.read_bytes()[:1] for one in cache.iterdir() if one.suffix == ""}

    for name in "abac":
        assert read(name) == name.encode()
    assert kept() == {b"a", b"c"}


def test_many_readers_make_one_copy(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads that want a copy at once unpack the file once."""
    data = compressed(tmp_path / "data")
    facts, made = (data / "a.jsonl.gz").stat(), []
    plain = copies_module._copy
    monkeypatch.setattr(copies_module, "_copy", lambda *given: (made.append(given), plain(*given)))
    held, start = Copies(folder=str(cache), budget_bytes=1 << 20), threading.Barrier(8)

    def read(_: int) -> bytes:
        start.wait()
        with held.open(str(data), "a.jsonl.gz", Stamp(size_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns)) as file:
            return file.read()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(8))) == {lines(0, 10)}
    assert len(made) == 1


# --- patterns and indexes ---------------------------------------------------------------------------------------------


def test_a_pattern_names_files(tmp_path: Path) -> None:
    """Ranges keep the digits of their first number; lists are taken as they are."""
    for folder, first in (("extra", 0), ("train", 9)):
        (tmp_path / folder).mkdir()
        for n in range(12):
            (tmp_path / folder / f"x-{n:03}.jsonl").write_bytes(lines(first * 100 + n, 1))
    made = dataset(f"{tmp_path}/{{train,extra}}/x-{{009..011}}.jsonl")
    assert [facts.file for facts in made.files] == [f"{folder}/x-{n:03}.jsonl" for folder in ("extra", "train") for n in (9, 10, 11)]
    assert ids(made) == [9, 10, 11, 909, 910, 911]
    with pytest.raises(DatasetMismatch, match=r"x-012\.jsonl cannot be read"):
        dataset(f"{tmp_path}/train/x-{{010..012}}.jsonl")


@pytest.mark.parametrize("pattern", ["x-{3..1}", "x-{a}", "x-{1..2", "x-}1{", "x-{0..99999999}"])
def test_a_wrong_pattern_is_refused(pattern: str) -> None:
    """The message shows it."""
    with pytest.raises(InvalidInput, match="path: "):
        expand(pattern)


def mds_folder(folder: Path, *, packed: bool = False) -> Path:
    """Two shards of 10 and 7 samples with MosaicML Streaming's index."""
    folder.mkdir()
    shards = []
    for n, rows in enumerate((10, 7)):
        name = f"shard.{n:05}.mds"
        write_mds(folder / name, rows)
        zipped = None
        if packed:
            content = (folder / name).read_bytes()
            (folder / f"{name}.zstd").write_bytes(zstandard.ZstdCompressor().compress(content))
            (folder / name).unlink()
            zipped = {"basename": f"{name}.zstd", "bytes": 1, "hashes": {}}
        shards.append({"format": "mds", "samples": rows, "raw_data": {"basename": name, "bytes": 1, "hashes": {}}, "zip_data": zipped})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    (folder / "leftover.mds").write_bytes(b"not in the index")
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_an_index_of_mds_says_which_files_count(tmp_path: Path, packed: bool) -> None:
    """Its counts are taken as they are, so that nothing is read twice; compressed shards are unpacked when they are read."""
    made = dataset(mds_folder(tmp_path / "mds", packed=packed), "mds")
    assert [facts.samples for facts in made.files] == [10, 7]
    assert ids(made) == [*range(10), *range(7)]


def test_an_index_of_webdataset_is_checked_against_the_files(tmp_path: Path) -> None:
    """Samples of a tar file must be found anyway, so a wrong count is told."""
    write_tar(tmp_path / "a.tar", 9)
    (tmp_path / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": [{"url": "a.tar", "nsamples": 9}]}))
    assert ids(dataset(tmp_path, "tar"), "cls") == list(range(9))
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": [{"url": "a.tar", "nsamples": 8}]}))
    with pytest.raises(DatasetMismatch, match=r"a\.tar holds 9 samples, index\.json says 8"):
        dataset(tmp_path, "tar")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"shards": [{}]}', '{"shards": [{"format": "mds", "raw_data": {"basename": "../x"}, "samples": 1}]}']
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    """Also one that points outside its folder."""
    write_mds(tmp_path / "a.mds", 3)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DatasetMismatch, match="is no index of mds"):
        dataset(tmp_path, "mds")


# --- in a store -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("s3_credentials")
def test_a_data_set_in_a_store_is_read_through_copies(seaweed: SeaweedServer, tmp_path: Path, cache: Path) -> None:
    """A folder, a pattern and a single object; an object of another size than registered is refused by name."""
    url = seaweed.url(f"data-{os.getpid()}")
    store = open_store(url)
    for path in compressed(tmp_path / "data").iterdir():
        store.put(f"sub/{path.name}", path.read_bytes())
    store.put("sub/_hidden.jsonl", b"no")
    base, _, query = url.partition("?")
    folder, pattern, single = (f"{base}/{rest}?{query}" for rest in ("sub", "sub/{a.jsonl.gz,c.jsonl}", "sub/c.jsonl"))
    made = dataset(folder)
    assert ids(made) == list(range(25))
    assert ids(dataset(pattern)) == [*range(10), *range(20, 25)]
    assert ids(dataset(single)) == list(range(20, 25))
    for copy in cache.iterdir():
        copy.unlink()
    store.put("sub/c.jsonl", lines(20, 4))
    with pytest.raises(DatasetMismatch, match=r"c\.jsonl changed since it was registered"):
        ids(made)
    store.delete("sub/c.jsonl")
    with pytest.raises(DatasetMismatch, match=r"c\.jsonl is gone"):
        ids(made)
    store.close()
