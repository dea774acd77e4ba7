"""Files that lie, that were cut off or were written to do harm: each is refused by a typed error, in bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from dtr.datasets.formats import Format, Span, make_format
from dtr.datasets.sources import copies as copies_module
from dtr.datasets.sources import listing
from dtr.datasets.sources.copies import Copies, Stamp, stamp_of
from dtr.datasets.sources.files import find_files
from dtr.datasets.sources.listing import expand
from dtr.errors import ConfigError, DatasetMismatch, DtrError, InvalidInput
from tests.contract.test_dataset_formats import CASES, ROWS, measured
from tests.contract.test_dataset_sources import dataset, mds_folder

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of copies of one's own."""
    monkeypatch.setenv("DTR_DATA_CACHE", str(tmp_path / "cache"))
    copies_module.copies.cache_clear()
    return tmp_path / "cache"


def everything(format: Format, path: Path) -> int:
    """Count and read all of a file in shards of seven; how many samples there were."""
    with path.open("rb") as file:
        measure = format.measure(file, 7)
        bounds = (*measure.marks, path.stat().st_size)
        for n, start in enumerate(range(0, min(measure.samples, 1000), 7)):
            first, end = (bounds[n], bounds[n + 1]) if measure.marks else (0, 0)
            format.read(file, Span(start=start, stop=min(start + 7, measure.samples), first_byte=first, end_byte=end), None)
    return measure.samples


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four bytes replaced, words made extreme, pieces cut out or put in; half of them where headers stand."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) if rng.random() < 0.5 else min(len(made), 600))
        how = rng.randrange(4)
        if how == 0:
            made[at] = rng.randrange(256)
        elif how == 1:
            made[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x80\0\0\0", b"9999", b"\x7f\xff\xff\xff"])
        elif how == 2:
            del made[at : at + rng.randrange(1, 50)]
        else:
            made[at:at] = rng.randbytes(rng.randrange(1, 20))
        made = made or bytearray(b"x")
    return bytes(made)


@pytest.mark.parametrize("name", list(CASES))
def test_whatever_a_file_holds_it_is_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    """Given 150 files with random damage, when each is counted and read, then it is refused by name or read, and often refused."""
    case = CASES[name]
    path = tmp_path / f"data{case.format.suffixes[0]}"
    case.write(path, ROWS)
    good, rng, refused, unnamed = path.read_bytes(), random.Random(20), 0, 0
    for number in range(150):
        path.write_bytes(mutated(good, rng))
        try:
            everything(case.format, path)
        except InvalidInput as exc:  # of samples with other columns than the rest, too
            refused += path.name in str(exc)
            unnamed += path.name not in str(exc)
        except Exception as exc:
            raise AssertionError(f"file {number}: {path.read_bytes()[:200]!r}") from exc
    assert refused > 30 and not unnamed


def ends_with_a_sample(name: str, good: bytes, left: int) -> bool:
    """Whether nothing is missing but padding, or whole samples of a format that has no end of its own: ``total_samples`` tells these."""
    if name == "tar":
        return left > len(good) - 2 * 512
    return good[:left].rstrip(b"\n").endswith(b"}") if name == "jsonl" else name == "bin" and left % 10 == 0


@pytest.mark.parametrize("name", list(CASES))
def test_a_file_cut_off_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    """Given a file without its last bytes, when it is read, then it is refused, unless it looks like a whole one."""
    case = CASES[name]
    path = tmp_path / f"data{case.format.suffixes[0]}"
    case.write(path, ROWS)
    good = path.read_bytes()
    for left in {len(good) - 2, len(good) * 3 // 4 - 1, len(good) // 2 + 1, 10, 1}:
        path.write_bytes(good[:left])
        if ends_with_a_sample(name, good, left):
            continue
        with pytest.raises(DatasetMismatch, match=path.name):
            everything(case.format, path)


# --- numbers that are not true ------------------------------------------------------------------------------------------


def npy(shape: str, descr: str = "'<f8'", *, version: int = 1, length: int | None = None) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1000000000000000,)"), "promises 8,000,000,000,000,083 bytes, it has"),
        (npy("(1000000000, 1000000000)"), "promises"),
        (npy("(9223372036854775808, 16)"), "its shape is"),
        (npy("(-1,)"), "its shape is"),
        (npy("(True,)"), "its shape is"),
        (npy("(5, 0)"), "of no bytes"),
        (npy("(2,)", "'|O'"), "would have to be unpickled"),
        (npy("(2,)", "[('a', '|O')]"), "would have to be unpickled"),
        (npy("(2,)", "'nonsense'"), "not a whole .npy file"),
        (npy("__import__('os').getpid()"), "not a whole .npy file"),
        (npy("(" * 5000), "not a whole .npy file"),
        (npy("(1,)", version=2, length=1 << 31), "header says it has 2,147,483,648 bytes"),
        (npy("(1,)", version=9), "does not begin as one"),
        (b"\x80\x04\x95pickled", "does not begin as one"),
    ],
)
def test_a_npy_header_is_not_believed(tmp_path: Path, content: bytes, message: str) -> None:
    """Given a header that promises 10**15 bytes, objects, code or nonsense, then it is refused, and nothing of that size is set aside."""
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(DatasetMismatch, match=f"{path} .*{message}"):
        measured(make_format("npy"), path)


def tar_of(path: Path, members: dict[str, bytes], **facts: Any) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for fact, value in facts.items():
                setattr(member, fact, value)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_names_that_point_outside_are_only_names(tmp_path: Path) -> None:
    """Given members with absolute names and .., and links, then samples bear these names, and nothing is written or followed."""
    path = tar_of(tmp_path / "a.tar", {"/etc/passwd.txt": b"one", "../../out.txt": b"two", "ok\n/\u0430.txt": b"three"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.parent.iterdir())
    with path.open("rb") as file:
        read = make_format("tar").read(file, Span(start=0, stop=3, first_byte=0, end_byte=path.stat().st_size), None)
    assert read["txt"].tolist() == ["one", "two", "three"]
    assert read["__key__"].tolist() == ["/etc/passwd", "../../out", "ok\n/\u0430"]
    assert sorted(tmp_path.parent.iterdir()) == before and [one.name for one in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [b"\x80" + (10**15).to_bytes(11, "big"), b"\xff" * 10 + b"\xfa\0", b"77777777777\0"])  # the second: -1,536
def test_a_tar_member_that_is_larger_than_its_archive_is_refused(tmp_path: Path, size: bytes, kind: bytes) -> None:
    """Given a header that says 10**15 bytes, or less than none, then it is refused, without memory, and no loop."""
    path = tar_of(tmp_path / "a.tar", {"a.txt": b"one", "b.txt": b"two", "c.txt": b"three"})
    content = bytearray(path.read_bytes())
    header = content[2048:2560]
    header[124:136], header[156:157] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    content[2048:2560] = header
    path.write_bytes(content)
    with pytest.raises(DatasetMismatch, match=str(path)):
        everything(make_format("tar"), path)


def test_a_sparse_tar_member_is_refused(tmp_path: Path) -> None:
    """Given a member of 512 bytes that stands for 10**12, then it is refused instead of spelt out."""
    path = tmp_path / "a.tar"
    tar_of(path, {"GNUSparseFile.0/a.bin": b"1\n0\n5\n".ljust(512, b"\0") + b"hello"}, pax_headers={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.bin", "GNU.sparse.realsize": str(10**12),
    })  # fmt: skip
    with pytest.raises(DatasetMismatch, match=r"'a\.bin'.* is sparse"):
        everything(make_format("tar"), path)


def test_an_array_in_a_tar_file_is_not_unpickled(tmp_path: Path) -> None:
    """Given members named .npy that hold objects, or promise more than they have, then they are refused."""
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    for content in (objects.getvalue(), npy("(10**15,)"), npy("(1000000000000000,)"), b""):
        path = tar_of(tmp_path / "a.tar", {"a.npy": content})
        with pytest.raises(DatasetMismatch, match=r"member 'a\.npy' is not what its name says"):
            everything(make_format("tar"), path)
    whole = io.BytesIO()
    np.save(whole, np.asfortranarray(np.arange(6).reshape(2, 3)))
    path = tar_of(tmp_path / "a.tar", {"a.npy": whole.getvalue()})
    with path.open("rb") as file:
        read = make_format("tar").read(file, Span(start=0, stop=1, first_byte=0, end_byte=path.stat().st_size), None)
    assert read["npy"].tolist() == [[[0, 1, 2], [3, 4, 5]]]


# --- JSON lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("ended", [True, False])
def test_a_line_of_a_gibibyte_is_refused_when_it_is_counted(tmp_path: Path, before: int, ended: bool) -> None:
    """Given a file that lost its newlines, when it is counted, then the line is named, and its gigabyte is not read into memory."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n' * before + b'{"a": "')
        file.seek(1 << 30, io.SEEK_CUR)  # a hole: no block of it is on disk
        file.write(b'"}\n{"a": 2}\n' if ended else b'"}')
    peak = limited(f"""
from dtr.errors import DatasetMismatch
from dtr.datasets.formats import make_format
try:
    make_format("jsonl").measure(open({str(path)!r}, "rb"), 10)
except DatasetMismatch as exc:
    assert "a.jsonl line {before + 1} is longer than 64 MiB" in str(exc), exc
    print("refused")
""", address_space=600 * MIB)  # fmt: skip
    assert peak == "refused"


def test_a_long_line_within_bounds_is_a_sample(tmp_path: Path) -> None:
    """Given a line of many chunks, when it is counted and read, then it counts."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * (9 << 20) + b'"}\n{"a": 3}\n')
    assert everything(make_format("jsonl"), path) == 3


# --- what unpacks to more than there is room for ------------------------------------------------------------------------


def limited(code: str, *, address_space: int) -> str:
    """What a process of its own prints, which may not have more than so many bytes of memory beside what its imports take."""
    head = "import resource, numpy, pyarrow, zstandard\nimport dtr.datasets.registering.registry\n"
    limit = f"""
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + {address_space}, resource.RLIM_INFINITY))
"""
    run = subprocess.run([sys.executable, "-c", head + limit + code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("how", ["zst", "gz"])
def test_a_bomb_fills_neither_memory_nor_disk(tmp_path: Path, how: str) -> None:
    """Given 2 GiB of zeros in a few kilobytes, when they are unpacked, then the copy stops at the budget, and nothing is left."""
    path = tmp_path / f"a.jsonl.{how}"
    zeros = bytes(16 * MIB)
    if how == "zst":
        packer = zstandard.ZstdCompressor(level=3).compressobj()
        path.write_bytes(b"".join(packer.compress(zeros) for _ in range(128)) + packer.flush())
    else:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(40):
                file.write(zeros)
    found = limited(f"""
from dtr.datasets.sources.copies import Copies, stamp_of
from dtr.errors import ConfigError
held = Copies(folder={str(tmp_path / "cache")!r}, budget_bytes={100 * MIB})
try:
    held.open({str(tmp_path)!r}, {path.name!r}, stamp_of({str(tmp_path)!r}, {path.name!r}))
except ConfigError as exc:
    print(exc)
""", address_space=400 * MIB)  # fmt: skip
    assert f"the copy of {path} takes" in found and "raise DTR_DATA_CACHE_BYTES" in found
    assert [one.name for one in (tmp_path / "cache").iterdir() if one.suffix != ".lock"] == []


def test_a_row_group_of_gigabytes_is_decoded_piece_by_piece(tmp_path: Path) -> None:
    """Given 400 kilobytes of Parquet that stand for 3 GiB of equal rows in one group, when a shard is read, then only that is."""
    path, rows = tmp_path / "a.parquet", 1 << 25
    equal = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, dtype=np.int8)), pa.array(["x" * 100]))
    parquet.write_table(pa.table({"text": equal}), path, row_group_size=rows, store_schema=False)
    assert path.stat().st_size < MIB
    found = limited(f"""
from dtr.datasets.formats import Span, make_format
with open({str(path)!r}, "rb") as file:
    print(set(make_format("parquet").read(file, Span(start=100_000, stop=100_010), None)["text"].tolist()))
""", address_space=1024 * MIB)  # fmt: skip
    assert found == str({"x" * 100})


def test_a_window_of_gigabytes_is_refused(tmp_path: Path) -> None:
    """Given a zstd frame that asks its reader for 2 GiB of memory, then it is refused by name."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(struct.pack("<I", 0xFD2FB528) + bytes([0x00, (31 - 10) << 3]) + b"\x01\x00\x00")
    with pytest.raises(DatasetMismatch, match=r"a\.jsonl\.zst is no whole zstd file"):
        dataset(path)


def test_what_follows_a_compressed_content_is_refused(tmp_path: Path) -> None:
    """Given garbage after the last frame or member, then the file is refused rather than taken for its first part."""
    for name, packed in (("a.jsonl.gz", gzip.compress(b'{"id": 1}\n')), ("a.jsonl.zst", zstandard.compress(b'{"id": 1}\n'))):
        (tmp_path / name).write_bytes(packed + b"garbage")
        with pytest.raises(DatasetMismatch, match=f"{name} is no whole"):
            dataset(tmp_path / name)


def test_messages_about_a_copy_name_the_file_that_was_copied(tmp_path: Path) -> None:
    """Given a bad line in a compressed file, then the error has the user's file, not a key of the cache."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n{"id": '))
    with pytest.raises(DatasetMismatch, match=r"/a\.jsonl\.gz line 2 is not JSON"):
        dataset(tmp_path / "a.jsonl.gz")


def test_a_file_that_is_written_while_it_is_copied_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a writer in the middle of a copy, then the copy is not kept under the name of what was registered."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": 1}\n' * 9))
    plain = copies_module._plain

    def while_writing(*given: Any) -> Any:
        yield from plain(*given)
        path.write_bytes(gzip.compress(b'{"id": 2}\n' * 99))

    monkeypatch.setattr(copies_module, "_plain", while_writing)
    held = Copies(folder=str(tmp_path / "cache"), budget_bytes=MIB)
    with pytest.raises(DatasetMismatch, match=r"a\.jsonl\.gz changed since"):
        held.open(str(tmp_path), path.name, stamp_of(str(tmp_path), path.name))
    assert [one.name for one in (tmp_path / "cache").iterdir() if one.suffix != ".lock"] == []


# --- indexes and patterns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("change", [-1, 1, 10**12])
def test_a_wrong_count_in_an_index_of_mds_is_refused(tmp_path: Path, packed: bool, change: int) -> None:
    """Given an index that says more or fewer samples than a shard has, also a compressed one, then it is refused: none is lost."""
    folder = mds_folder(tmp_path / "mds", packed=packed)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["samples"] += change
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatasetMismatch, match=r"shard\.00001\.mds\S* holds 7 samples, index\.json says"):
        dataset(folder, "mds")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"shards": 3}, "is no index of mds"),
        ({"shards": [None]}, "is no index of mds"),
        ({"shards": [{"format": "mds", "samples": -1, "raw_data": {"basename": "a.mds"}}]}, "a number of samples is -1"),
        ({"shards": [{"format": "mds", "samples": True, "raw_data": {"basename": "a.mds"}}]}, "a number of samples is True"),
        ({"shards": [{"format": "mds", "samples": 1, "raw_data": {"basename": "/etc/passwd"}}]}, "is not below it"),
        ({"shards": [{"format": "mds", "samples": 1, "raw_data": {"basename": "a/../../b.mds"}}]}, "is not below it"),
        ({"shards": [{"format": "mds", "samples": 1, "raw_data": {"basename": "a\0b.mds"}}]}, "is not below it"),
        ({"shards": [{"format": "mds", "samples": 1, "raw_data": {"basename": "a.mds"}}] * 2}, "lists 'a.mds' twice"),
        ({"shards": [{"format": "mds", "samples": 1, "raw_data": {"basename": "gone.mds"}}]}, r"gone\.mds cannot be read: No such file"),
        ({"shards": [{"format": "mds", "samples": 1, "raw_data": {"basename": ""}}]}, "is no ordinary file"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    """Given wrong counts, names outside the folder, or what is there twice, then the message says what."""
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DatasetMismatch, match=message):
        dataset(tmp_path, "mds")


def test_an_index_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    """Given a folder in its place, then it is named."""
    (tmp_path / "index.json").mkdir()
    with pytest.raises(DatasetMismatch, match=r"index\.json cannot be read: Is a directory"):
        dataset(tmp_path, "mds")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..999999999}", "stands for 1,000,000,000 files; at most 1,000,000"),
        ("{0..999999}" * 60, "at most 1,000,000"),
        ("{a,b}" * 64, "at most 1,000,000"),
        ("{" + "0" * 5000 + ".." + "9" * 5000 + "}", "must be {000..127} or"),
        ("{1..0}", "runs backwards"),
        ("{}", "must be {000..127} or"),
        ("{{a,b}}", "do not match"),
    ],
)
def test_a_pattern_that_explodes_is_refused_before_it_does(pattern: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given braces that stand for 10**9 files or more, then they are refused by number, in a message of one short line."""
    spelt, choices = [], listing._choices
    monkeypatch.setattr(listing, "_choices", lambda *given: spelt.append(1) or choices(*given))
    with pytest.raises(InvalidInput, match=message) as caught:
        expand(pattern)
    assert len(str(caught.value)) < 500 and len(spelt) < 22


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    """Given a pattern that names a file twice, then it is told, instead of read twice."""
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InvalidInput, match=r"names a\.jsonl twice"):
        find_files(f"{tmp_path}/{{a,a}}.jsonl", make_format("jsonl"))


def test_braces_in_a_buckets_name_are_refused() -> None:
    """Given a pattern over buckets, then the message says what may have braces."""
    with pytest.raises(InvalidInput, match="braces in the name of the bucket"):
        find_files("s3://data-{0..3}/a.jsonl", make_format("jsonl"))


def test_every_error_of_the_cache_is_typed(tmp_path: Path) -> None:
    """Given a folder of copies that is a file, or may not be written, then the setting is named."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n'))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        held = Copies(folder=str(folder), budget_bytes=MIB)
        with pytest.raises(ConfigError, match="data_cache: copies cannot be kept in .*set DTR_DATA_CACHE") as caught:
            held.open(str(tmp_path), "a.jsonl.gz", stamp_of(str(tmp_path), "a.jsonl.gz"))
        assert isinstance(caught.value, DtrError) and caught.value.exit_code == 3
    assert Stamp(size_bytes=1) != Stamp(size_bytes=1, tag="x")
