"""What every format of data files owes its callers, and what each refuses."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dtr.datasets.formats import Format, Span, format_of_fields, make_format
from dtr.datasets.formats import jsonl as jsonl_module
from dtr.datasets.formats.columns import column_of
from dtr.errors import DatasetMismatch, InvalidInput

ROWS = 23
VALUES: list[Any] = [3, 1.5, 2**53 + 1, 2**70, True, "x", None, [1, 2], [1, 2, 3], [1.0, 2.5]]


@dataclass(frozen=True)
class Case:
    """A format with a writer of ``rows`` samples, of which column ``column`` of sample i is ``value(i)``."""

    format: Format
    write: Callable[[Path, int], None]
    column: str
    value: Callable[[int], Any]


def write_jsonl(path: Path, rows: int) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": "ü" * (i % 7)}) + "\n" for i in range(rows)))


def write_npy(path: Path, rows: int) -> None:
    np.save(path, np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3))


def write_structured(path: Path, rows: int) -> None:
    table = np.zeros(rows, dtype=[("id", ">i4"), ("x", "f8", (2,))])
    table["id"] = np.arange(rows)
    np.save(path, table)


def write_tokens(path: Path, rows: int) -> None:
    np.arange(rows * 5, dtype="<u2").tofile(path)


def write_tar(path: Path, rows: int) -> None:
    with tarfile.open(path, "w") as archive:
        for i in range(rows):
            # A name beyond 100 letters takes a header of its own before the member's.
            key = f"images/{'long' * (30 if i % 5 == 0 else 1)}-{i:04}"
            for extension, content in (("cls", str(i).encode()), ("seg.bin", b"\0" * (i % 3 * 400))):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_mds(path: Path, rows: int) -> None:
    """As MosaicML Streaming's MDSWriter lays out one shard."""
    described = {"column_names": ["id", "text"], "column_encodings": ["int", "str"], "column_sizes": [8, None]}
    config = json.dumps(described).encode()
    texts = [("ü" * (i % 7)).encode() for i in range(rows)]
    samples = [struct.pack("<I", len(text)) + struct.pack("<q", i) + text for i, text in enumerate(texts)]
    first = 4 + 4 * (rows + 1) + len(config)
    begins = [first + sum(map(len, samples[:i])) for i in range(rows + 1)]
    path.write_bytes(struct.pack(f"<I{rows + 1}I", rows, *begins) + config + b"".join(samples))


def write_parquet(path: Path, rows: int) -> None:
    table = pa.table({"id": list(range(rows)), "text": [None if i % 4 == 0 else "ü" * (i % 7) for i in range(rows)]})
    parquet.write_table(table, path, row_group_size=6)


CASES = {
    "jsonl": Case(make_format("jsonl"), write_jsonl, "id", lambda i: i),
    "npy": Case(make_format("npy"), write_npy, "data", lambda i: [[6 * i, 6 * i + 1, 6 * i + 2], [6 * i + 3, 6 * i + 4, 6 * i + 5]]),
    "npy structured": Case(make_format("npy"), write_structured, "id", lambda i: i),
    "tar": Case(make_format("tar"), write_tar, "cls", lambda i: i),
    "mds": Case(make_format("mds"), write_mds, "id", lambda i: i),
    "parquet": Case(make_format("parquet"), write_parquet, "id", lambda i: i),
    "bin": Case(make_format("bin", dtype="uint16", sample_length=5), write_tokens, "tokens", lambda i: list(range(5 * i, 5 * i + 5))),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def data(case: Case, tmp_path: Path) -> Path:
    path = tmp_path / f"data{case.format.suffixes[0]}"
    case.write(path, ROWS)
    return path


def spans(case: Case, path: Path, shard_size: int) -> list[Span]:
    """The spans of the shards, as a registry would make them."""
    with path.open("rb") as file:
        measure = case.format.measure(file, shard_size)
    bounds = (*measure.marks, path.stat().st_size)
    starts = range(0, measure.samples, shard_size)
    return [
        Span(
            start=start,
            stop=min(start + shard_size, measure.samples),
            first_byte=bounds[n] if measure.marks else 0,
            end_byte=bounds[n + 1] if measure.marks else 0,
        )
        for n, start in enumerate(starts)
    ]


class TestEveryFormat:
    @pytest.mark.parametrize("shard_size", [1, 4, ROWS - 1, ROWS, 100])
    def test_the_shards_together_are_the_file(self, case: Case, data: Path, shard_size: int) -> None:
        """Whatever the size of a shard, each sample is read once and in order."""
        with data.open("rb") as file:
            read = [case.format.read(file, span, [case.column])[case.column] for span in spans(case, data, shard_size)]
        assert np.concatenate(read).tolist() == [case.value(i) for i in range(ROWS)]

    def test_iterating_yields_what_was_counted(self, case: Case, data: Path) -> None:
        """Count and content agree, also one by one."""
        with data.open("rb") as file:
            found = [sum(1 for _ in case.format.iterate(file, span)) for span in spans(case, data, 10)]
        assert found == [10, 10, 3]

    def test_columns_are_those_that_read_returns(self, case: Case, data: Path) -> None:
        """Without a choice every column comes; each has the span's samples as first axis."""
        with data.open("rb") as file:
            columns = case.format.columns(file)
            read = case.format.read(file, spans(case, data, 10)[1], None)
        assert tuple(read) == columns
        assert {len(values) for values in read.values()} == {10}

    def test_an_unknown_column_is_refused_by_name(self, case: Case, data: Path) -> None:
        """The message has the wrong name and the right ones."""
        with data.open("rb") as file, pytest.raises(InvalidInput, match=f"no column 'nope'; it has .*{case.column}"):
            case.format.read(file, spans(case, data, 10)[0], ["nope"])
        with data.open("rb") as file, pytest.raises(InvalidInput, match="columns must be a list"):
            case.format.read(file, spans(case, data, 10)[0], case.column)

    def test_a_file_that_shrinks_under_the_reader_is_an_error(self, case: Case, data: Path) -> None:
        """No SIGBUS, no short batch: the error names the file."""
        last = spans(case, data, 10)[-1]
        with data.open("rb") as file:
            data.write_bytes(data.read_bytes()[:-1] if case.column == "tokens" else data.read_bytes()[: data.stat().st_size // 2])
            with pytest.raises(DatasetMismatch, match=str(data)):
                case.format.read(file, last, None)

    def test_what_is_read_is_the_callers_own(self, case: Case, data: Path) -> None:
        """Arrays may be written to, and the file stays as it is."""
        before = data.read_bytes()
        with data.open("rb") as file:
            values = case.format.read(file, spans(case, data, 10)[0], [case.column])[case.column]
        values[...] = 0
        assert data.read_bytes() == before

    def test_a_format_comes_back_from_its_fields(self, case: Case) -> None:
        """What stands in Redis makes the same format again."""
        assert format_of_fields({"format": case.format.name, **case.format.options(), "shards": "9"}) == case.format

    def test_no_sample_is_no_error(self, case: Case, tmp_path: Path) -> None:
        """A file without samples counts zero."""
        path = tmp_path / "empty"
        case.write(path, 0)
        with (path if path.exists() else path.with_suffix(".npy")).open("rb") as file:
            assert case.format.measure(file, 3).samples == 0


def measured(format: Format, path: Path, shard_size: int = 3) -> int:
    with path.open("rb") as file:
        return format.measure(file, shard_size).samples


class TestJsonLines:
    format = make_format("jsonl")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"a": 1}\n{"a": ', "line 2 is not JSON or was cut off"),
            (b'{"a": 1}\n\n{"a": 2}\n', "line 2 is empty"),
            (b"\n", "line 1 is not JSON"),
            (b'{"a": 1}\n\n', "line 2 is empty"),
            (b"[1, 2]\n", "line 1 must be a JSON object, got list"),
            (b"\xff\xfe\n", "line 1 is not JSON"),
            (b'{"a": 1}', None),
            (b'{"a": 1}\r\n{"a": 2}\r\n', None),
        ],
    )
    def test_what_is_not_json_lines_is_refused_with_its_line(self, tmp_path: Path, content: bytes, message: str | None) -> None:
        """A truncated last line, an empty line and other things than objects are found when the file is counted."""
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        if message is None:
            assert measured(self.format, path) == content.count(b"{")
            return
        with pytest.raises(DatasetMismatch, match=f"{path} {message}"):
            measured(self.format, path)

    @pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
    def test_lines_that_cross_chunks_are_counted_alike(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
        """Where the reader's buffer ends makes no difference to the marks."""
        path = tmp_path / "a.jsonl"
        write_jsonl(path, ROWS)
        lines = path.read_bytes().splitlines(keepends=True)
        monkeypatch.setattr(jsonl_module, "_CHUNK_BYTES", chunk_bytes)
        with path.open("rb") as file:
            measure = self.format.measure(file, 4)
        assert measure.samples == ROWS
        assert list(measure.marks) == [sum(map(len, lines[:n])) for n in range(0, ROWS, 4)]

    @pytest.mark.parametrize("chunk_bytes", [1, 5, 64])
    def test_a_truncated_line_longer_than_a_chunk_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
        """The last line is the one that is looked at, however far back its newline is; an empty line is found anywhere."""
        monkeypatch.setattr(jsonl_module, "_CHUNK_BYTES", chunk_bytes)
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 200)
        with pytest.raises(DatasetMismatch, match="line 2 is not JSON or was cut off"):
            measured(self.format, path)
        path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n')
        with pytest.raises(DatasetMismatch, match="line 2 is empty"):
            measured(self.format, path)

    @given(runs=st.lists(st.tuples(st.sampled_from(VALUES), st.integers(1, 9))))
    def test_a_column_is_what_its_values_are_however_they_are_read(self, runs: list[tuple[Any, int]]) -> None:
        """Read a few lines at a time: dtype, shape and every value are those of a column that is made of all values at once."""
        lines = [json.dumps({"v": value}).encode() for value, count in runs for _ in range(count)]
        text = b"".join(line + b"\n" for line in lines)
        with pytest.MonkeyPatch.context() as patch, tempfile.NamedTemporaryFile() as written, open(written.name, "rb") as file:
            patch.setattr(jsonl_module, "_PIECE_LINES", 5)
            written.write(text)
            written.flush()
            found = self.format.read(file, Span(start=0, stop=len(lines), first_byte=0, end_byte=len(text)), ["v"])["v"]
        wanted = column_of([orjson.loads(line)["v"] for line in lines])
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tolist() == wanted.tolist()

    @pytest.mark.parametrize("piece_lines", [1, 256])
    def test_a_bad_line_within_is_found_when_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_lines: int) -> None:
        """Counting does not parse every line; reading does, and names it."""
        monkeypatch.setattr(jsonl_module, "_PIECE_LINES", piece_lines)
        path = tmp_path / "a.jsonl"
        path.write_text('{"a": 1}\n{"a": 2}\n{"a": }\n{"b": 4}\n')
        size = path.stat().st_size
        with path.open("rb") as file, pytest.raises(DatasetMismatch, match=f"{path} line 3 is not JSON"):
            self.format.read(file, Span(start=0, stop=4, first_byte=0, end_byte=size), None)

    @pytest.mark.parametrize("piece_lines", [1, 256])
    @pytest.mark.parametrize(
        ("lines", "columns", "message"),
        [
            ('{"a": 1}\n{"b": 2}\n', ["a"], "line 2 has no 'a'"),
            ('{"a": 1, "b": 1}\n{"a": 2}\n', None, "line 2 has no 'b'"),
            ('{"a": 1}\n{"a": 2, "b": 2}\n', None, "line 2 has 'b', samples before it have not"),
            ('{"a": 1}\n{"a": 2, "b": 2}\n', ["a"], ""),
        ],
    )
    def test_lines_with_other_keys_are_no_damage(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_lines: int, lines: str, columns: list[str] | None, message: str
    ) -> None:
        """Given an optional key, then the error says which columns to ask for, and is none that leaves out a shard."""
        monkeypatch.setattr(jsonl_module, "_PIECE_LINES", piece_lines)
        path = tmp_path / "a.jsonl"
        path.write_text(lines)
        with path.open("rb") as file, pytest.raises(InvalidInput, match=message) if message else nullcontext() as caught:
            self.format.read(file, Span(start=0, stop=2, first_byte=0, end_byte=len(lines)), columns)
        assert not message or (caught is not None and type(caught.value) is InvalidInput and "give columns=[...]" in str(caught.value))

    @pytest.mark.parametrize(
        ("values", "dtype"),
        [
            ([1, -2], "int64"),
            ([1, 2.5], "float64"),
            ([True, False], "bool"),
            ([[1, 2], [3, 4]], "int64"),
            ([[0.5], [1.5]], "float64"),
            ([2**63, -1], "object"),
            ([2**53 + 1, 0.5], "object"),
            (["a", "bc"], "object"),
            ([[1], [2, 3]], "object"),
            ([["a"], ["b"]], "object"),
            ([None, 1], "object"),
            ([True, 2], "object"),
            ([{"k": 1}, {}], "object"),
        ],
    )
    def test_columns_are_numbers_where_json_has_numbers(self, tmp_path: Path, values: list[Any], dtype: str) -> None:
        """Numbers become arrays of numbers without loss; whatever else comes back as it was."""
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"v": value}) + "\n" for value in values))
        with path.open("rb") as file:
            column = self.format.read(file, Span(start=0, stop=2, first_byte=0, end_byte=path.stat().st_size), None)["v"]
        assert str(column.dtype) == dtype
        assert column.tolist() == values

    def test_too_many_shards_stop_the_count_early(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A shard size far too small does not fill the memory with marks."""
        monkeypatch.setattr(jsonl_module, "MAX_SHARDS", 10)
        path = tmp_path / "a.jsonl"
        write_jsonl(path, ROWS)
        with pytest.raises(DatasetMismatch, match="more than 10 shards of 1 samples; use a greater shard_size"):
            measured(self.format, path, shard_size=1)


def test_samples_of_a_tar_file_with_other_members_are_no_damage(tmp_path: Path) -> None:
    """Given a sample without a member that others have, then that is said of the data set, and columns that all have are read."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.cls", "a.txt", "b.cls"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"1"))
    span = Span(start=0, stop=2, first_byte=0, end_byte=path.stat().st_size)
    with path.open("rb") as file:
        with pytest.raises(InvalidInput, match=r"sample 'b' has no 'txt', .*: give columns=\[\.\.\.\]") as caught:
            make_format("tar").read(file, span, None)
        assert not isinstance(caught.value, DatasetMismatch)
        assert make_format("tar").read(file, span, ["cls"])["cls"].tolist() == [1, 1]


def test_decimals_of_mds_are_text_and_brotli_is_named(tmp_path: Path) -> None:
    """Given a column of decimals, then no digit is lost; given a file packed by brotli, then the error says how to pack it."""
    path = tmp_path / "a.mds"
    config = json.dumps({"column_names": ["d"], "column_encodings": ["str_decimal"], "column_sizes": [None]}).encode()
    sample = struct.pack("<I", 22) + b"0.10000000000000000001"
    first = 12 + len(config)
    path.write_bytes(struct.pack("<III", 1, first, first + len(sample)) + config + sample)
    with path.open("rb") as file:
        assert make_format("mds").read(file, Span(start=0, stop=1), None)["d"].tolist() == ["0.10000000000000000001"]
    packed = path.rename(tmp_path / "a.mds.br")
    with packed.open("rb") as file, pytest.raises(DatasetMismatch, match=r"a\.mds\.br is packed by brotli, .* zstd or gz"):
        make_format("mds").measure(file, 3)


class TestNpy:
    format = make_format("npy")

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.array(3.0), "single value"),
            (np.asfortranarray(np.ones((3, 4))), "Fortran order"),
            (np.array([{}, []], dtype=object), "not a whole .npy file of numbers"),
        ],
    )
    def test_arrays_without_rows_are_refused(self, tmp_path: Path, array: np.ndarray, message: str) -> None:
        """What cannot be read row by row, or only by unpickling, is refused when it is counted."""
        path = tmp_path / "a.npy"
        np.save(path, array, allow_pickle=True)
        with pytest.raises(DatasetMismatch, match=message):
            measured(self.format, path)

    def test_a_truncated_or_foreign_file_is_refused(self, tmp_path: Path) -> None:
        """A file that ends before its array does is found without reading it all."""
        path = tmp_path / "a.npy"
        write_npy(path, ROWS)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DatasetMismatch, match=f"{path} is not a whole .npy file"):
            measured(self.format, path)
        path.write_bytes(b"hello")
        with pytest.raises(DatasetMismatch, match=f"{path} is not a whole .npy file"):
            measured(self.format, path)

    def test_the_fields_of_a_structured_array_are_columns(self, tmp_path: Path) -> None:
        """A table of records is read by name, byte order kept."""
        path = tmp_path / "a.npy"
        write_structured(path, ROWS)
        with path.open("rb") as file:
            read = self.format.read(file, Span(start=20, stop=23), ["id"])
        assert list(read) == ["id"]
        assert read["id"].tolist() == [20, 21, 22]


class TestTokens:
    def test_tokens_that_fill_no_sample_are_refused_or_left_out_on_purpose(self, tmp_path: Path) -> None:
        """Nothing is dropped silently: the numbers are in the error, and drop_remainder is a choice."""
        path = tmp_path / "a.bin"
        np.arange(23, dtype="<u2").tofile(path)
        with pytest.raises(DatasetMismatch, match=r"23 tokens: 4 samples of 5, and 3 tokens remain.*drop_remainder=True"):
            measured(make_format("bin", dtype="uint16", sample_length=5), path)
        assert measured(make_format("bin", dtype="uint16", sample_length=5, drop_remainder=True), path) == 4

    def test_half_a_token_is_a_truncated_file(self, tmp_path: Path) -> None:
        """Also with drop_remainder: such a file was cut, or has another dtype."""
        path = tmp_path / "a.bin"
        path.write_bytes(b"123")
        with pytest.raises(DatasetMismatch, match=r"3 bytes, which is no whole number of <u2 tokens"):
            measured(make_format("bin", dtype="uint16", sample_length=1, drop_remainder=True), path)

    def test_the_byte_order_is_part_of_the_type(self, tmp_path: Path) -> None:
        """A big-endian file is read as such on any machine."""
        path = tmp_path / "a.bin"
        np.array([1, 2, 3, 4], dtype=">u4").tofile(path)
        with path.open("rb") as file:
            read = make_format("bin", dtype=">u4", sample_length=2).read(file, Span(start=1, stop=2), None)
        assert read["tokens"].tolist() == [[3, 4]]

    @pytest.mark.parametrize("dtype", ["object", "S4", "nonsense", "M8[s]", "complex64", 3, "bool"])
    def test_a_type_that_is_no_number_is_refused(self, dtype: Any) -> None:
        """The message names the field and what was given."""
        with pytest.raises(InvalidInput, match="dtype must be a type of integers or floats"):
            make_format("bin", dtype=dtype, sample_length=1)

    @pytest.mark.parametrize("sample_length", [0, -1, 1.5, True, "8"])
    def test_a_wrong_sample_length_is_refused(self, sample_length: Any) -> None:
        """An integer from 1."""
        with pytest.raises(InvalidInput, match="sample_length must be an integer"):
            make_format("bin", dtype="uint8", sample_length=sample_length)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jsnl", "did you mean 'jsonl'"),
        ("JSONL", "did you mean 'jsonl'"),
        ("numpy", "did you mean 'npy'"),
        ("tokens", "did you mean 'bin'"),
        ("lmdb", "known are bin, jsonl, mds, npy, parquet, tar"),
        (None, "known are bin, jsonl, mds, npy, parquet, tar"),
    ],
)
def test_an_unknown_format_is_refused_and_the_nearest_named(name: Any, message: str) -> None:
    """A typing error is answered with what was probably meant."""
    with pytest.raises(InvalidInput, match=message):
        make_format(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bin", {"sample_length": 3}, "needs dtype="),
        ("bin", {"dtype": "uint8"}, "needs sample_length="),
        ("bin", {"dtype": "uint8", "sample_length": 1, "drop_remainder": 1}, "drop_remainder must be True or False"),
        ("jsonl", {"dtype": "uint8"}, "dtype belongs to format 'bin', not to 'jsonl'"),
        ("npy", {"sample_length": 3}, "sample_length belongs to format 'bin'"),
        ("npy", {"drop_remainder": True}, "drop_remainder belongs to format 'bin'"),
    ],
)
def test_options_belong_to_their_format(name: str, options: dict[str, Any], message: str) -> None:
    """An option that is missing, wrong or without effect is refused."""
    with pytest.raises(InvalidInput, match=message):
        make_format(name, **options)
