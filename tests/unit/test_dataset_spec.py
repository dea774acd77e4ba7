"""Data sets as values: found on disk, declared, measured, split into shards, written as plain fields."""

from __future__ import annotations

import os
import pickle
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.datasets.formats import Measure, make_format
from dtr.datasets.registering.declared import check_total, dataset_of, declare, is_registered
from dtr.datasets.registering.spec import Dataset, DatasetSpec, FileFacts
from dtr.datasets.sources.files import find_files, measure_files
from dtr.errors import DatasetMismatch, InvalidInput, StateCorrupt
from dtr.placement import MAX_SHARDS

JSONL = make_format("jsonl")


def write(folder: Path, **lines: int) -> Path:
    """Files NAME.jsonl of so many lines; ``a__b`` stands for a/b."""
    begin = 0
    for name, count in lines.items():
        path = folder / (name.replace("__", "/") + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f'{{"id": {i}}}\n' for i in range(begin, begin + count)))
        begin += count
    return folder


def dataset(path: Path, shard_size: int = 4, **options: Any) -> Dataset:
    declared = declare("d", JSONL, **{"total_samples": None, "shard_size": shard_size, "shuffle": False, "seed": 0, **options})
    found = find_files(path, JSONL)
    return dataset_of(declared, found, measure_files(found, JSONL, shard_size), now_ms=5)


class TestShards:
    def test_shards_are_ranges_that_cross_no_file(self, tmp_path: Path) -> None:
        """Files in the order of their names, each split from its start, the rest of a file a shard of its own."""
        made = dataset(write(tmp_path, b=3, a=9, empty=0, sub__c=4))
        assert [str(shard) for shard in made.shards()] == [
            "a.jsonl[0:4]", "a.jsonl[4:8]", "a.jsonl[8:9]", "b.jsonl[0:3]", "sub/c.jsonl[0:4]",
        ]  # fmt: skip
        assert [len(shard) for shard in made.shards()] == [4, 4, 1, 3, 4]
        assert [shard.index for shard in made.shards()] == list(range(5))

    def test_sizes_are_those_of_the_shards(self, tmp_path: Path) -> None:
        """Asked one by one or all at once, without making a shard: full ones, rests, and files without samples in between and last."""
        made = dataset(write(tmp_path, b=3, a=9, empty=0, sub__c=4, z=0))
        wanted = [len(shard) for shard in made.shards()]
        assert made.sizes().tolist() == [made.size_of(number) for number in range(made.spec.shards)] == wanted == [4, 4, 1, 3, 4]

    def test_shards_together_read_every_sample_once(self, tmp_path: Path) -> None:
        """Read by shard, the data set is what was written."""
        made = dataset(write(tmp_path, a=9, b=3))
        assert np.concatenate([shard.read(["id"])["id"] for shard in made.shards()]).tolist() == list(range(12))
        assert [sample["id"] for shard in made.shards() for sample in shard.iterate()] == list(range(12))
        assert made.shard(0).columns() == ("id",)

    def test_one_file_is_a_data_set_too(self, tmp_path: Path) -> None:
        """A path may name a file, also one whose folder bears the same name."""
        write(tmp_path / "a.jsonl", a=5)
        assert [str(s) for s in dataset(tmp_path / "a.jsonl" / "a.jsonl").shards()] == ["a.jsonl[0:4]", "a.jsonl[4:5]"]
        assert dataset(tmp_path / "a.jsonl").shard(1).read()["id"].tolist() == [4]

    @pytest.mark.parametrize("index", [-1, 3, 10**9])
    def test_a_shard_that_is_not_there_is_refused(self, tmp_path: Path, index: int) -> None:
        """The message has the range."""
        with pytest.raises(InvalidInput, match="from 0 to 2"):
            dataset(write(tmp_path, a=9)).shard(index)

    def test_a_shard_travels_to_another_process(self, tmp_path: Path) -> None:
        """A loader's worker gets it by pickle and reads the same."""
        shard = dataset(write(tmp_path, a=9)).shard(1)
        again = pickle.loads(pickle.dumps(shard))
        assert again == shard
        assert again.read()["id"].tolist() == [4, 5, 6, 7]


class TestChangedFiles:
    def test_a_file_of_another_size_is_refused_with_its_name(self, tmp_path: Path) -> None:
        """Reading, and looking, name the file and both sizes."""
        shard = dataset(write(tmp_path, a=9)).shard(0)
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write('{"id": 9}\n')
        for action in (shard.check_unchanged, shard.read, shard.columns, lambda: list(shard.iterate())):
            with pytest.raises(DatasetMismatch, match=r"a\.jsonl changed since data set 'd' version 1.*90 bytes and has 100"):
                action()

    def test_a_file_of_another_time_is_refused_with_its_name(self, tmp_path: Path) -> None:
        """The same size proves nothing: a file that was written again is another file."""
        shard = dataset(write(tmp_path, a=9)).shard(0)
        os.utime(tmp_path / "a.jsonl", ns=(1, 1))
        with pytest.raises(DatasetMismatch, match=r"a\.jsonl changed since.*written at 1 ns"):
            shard.read()

    def test_a_file_that_is_gone_is_refused_with_its_name(self, tmp_path: Path) -> None:
        """Neither a traceback of open() nor an empty shard."""
        shard = dataset(write(tmp_path, a=9)).shard(0)
        (tmp_path / "a.jsonl").unlink()
        for action in (shard.check_unchanged, shard.read):
            with pytest.raises(DatasetMismatch, match=r"a\.jsonl of data set 'd' version 1 cannot be read: No such file"):
                action()


class TestFinding:
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("missing", "there is no file or folder .*missing"),
            ("", "path must be the path of"),
            (None, "path must be the path of"),
            (b"bytes", "path must be the path of"),
            ("a\0b", "path must be the path of"),
            ("a\nb", "path must be .*in one line, got 'a.nb'"),
            ("http://host/key", "got the unknown scheme 'http'"),
        ],
    )
    def test_a_wrong_path_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, message: str) -> None:
        """The message says what is expected; a URL is not taken for a folder."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InvalidInput, match=message):
            find_files(path, JSONL)

    def test_the_url_of_a_file_is_a_path(self, tmp_path: Path) -> None:
        """With what had to be quoted in it."""
        (tmp_path / "a b.jsonl").write_text('{"id": 1}\n')
        assert find_files(f"{tmp_path.as_uri()}/a%20b.jsonl", JSONL).files == ("a b.jsonl",)

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        """As is one with hidden files only."""
        (tmp_path / ".hidden.jsonl").touch()
        (tmp_path / "_SUCCESS.jsonl").touch()
        with pytest.raises(InvalidInput, match=f"{tmp_path} is empty"):
            find_files(tmp_path, JSONL)

    def test_a_folder_of_other_files_is_refused_and_says_what_is_there(self, tmp_path: Path) -> None:
        """Which files were looked for, and an example of what was found."""
        (tmp_path / "a.csv").touch()
        with pytest.raises(InvalidInput, match=r"no \*\.jsonl or \*\.ndjson file for format 'jsonl'; it holds 1 others such as a\.csv"):
            find_files(tmp_path, JSONL)

    def test_what_is_no_ordinary_file_is_refused(self, tmp_path: Path) -> None:
        """A pipe is not opened (that would hang), a dangling link is named."""
        os.mkfifo(tmp_path / "a.jsonl")
        with pytest.raises(DatasetMismatch, match=r"a\.jsonl is no ordinary file"):
            find_files(tmp_path, JSONL)
        (tmp_path / "a.jsonl").unlink()
        (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
        with pytest.raises(DatasetMismatch, match=r"b\.jsonl cannot be read: No such file"):
            find_files(tmp_path, JSONL)

    @pytest.mark.parametrize("name", [b"a\xff.jsonl", b"a\n.jsonl", b"a\x1b[2J.jsonl"])
    def test_a_name_that_cannot_be_shown_is_refused(self, tmp_path: Path, name: bytes) -> None:
        """Neither Redis nor a line of a log or of a terminal could show it."""
        (tmp_path / os.fsdecode(name)).write_text('{"id": 1}\n')
        with pytest.raises(DatasetMismatch, match="must be UTF-8"):
            find_files(tmp_path, JSONL)

    def test_a_file_that_is_written_while_it_is_counted_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Facts of a moment in between would be wrong for ever."""
        path = write(tmp_path, a=9) / "a.jsonl"

        class SomeoneWrites:
            def measure(self, file: BufferedReader, shard_size: int) -> Measure:
                measure = JSONL.measure(file, shard_size)
                with path.open("a") as other:
                    other.write('{"id": 9}\n')
                return measure

        with pytest.raises(DatasetMismatch, match=r"a\.jsonl changed while"):
            measure_files(find_files(path, JSONL), SomeoneWrites(), 4)  # type: ignore[arg-type]


class TestDeclaring:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("shard_size", 0), ("shard_size", -1), ("shard_size", 1.5), ("shard_size", True), ("shard_size", "10"),
            ("total_samples", 0), ("total_samples", 1e3), ("shuffle", 1), ("shuffle", "yes"), ("seed", -1), ("seed", 2**53), ("seed", None),
        ],
    )  # fmt: skip
    def test_wrong_arguments_are_refused_by_name(self, field: str, value: Any) -> None:
        """Each message begins with the field."""
        given = {"total_samples": None, "shard_size": 1, "shuffle": False, "seed": 0, field: value}
        with pytest.raises(InvalidInput, match=f"{field} must be"):
            declare("d", JSONL, **given)

    @pytest.mark.parametrize("name", ["", "../x", "A B", "a" * 64, "a{b}", "a*", "a\n", "é", "a\0", "_names", "a:1", 3, None])
    def test_wrong_names_are_refused(self, name: Any) -> None:
        """A name is one word."""
        with pytest.raises(InvalidInput, match="name must be"):
            declare(name, JSONL, total_samples=None, shard_size=1, shuffle=False, seed=0)

    def test_too_many_shards_are_refused_with_the_numbers(self, tmp_path: Path) -> None:
        """10**8 shards: from what is declared, and from what the files hold; the message says which shard size would do."""
        with pytest.raises(InvalidInput, match="shard_size 1 makes 100,000,000 shards of 100,000,000 samples.*at least 100"):
            declare("d", JSONL, total_samples=10**8, shard_size=1, shuffle=False, seed=0)
        path = tmp_path / "a.bin"
        with path.open("wb") as file:
            file.truncate(10**8)
        tokens = make_format("bin", dtype="uint8", sample_length=1)
        found = find_files(path, tokens)
        declared = declare("d", tokens, total_samples=None, shard_size=1, shuffle=False, seed=0)
        with pytest.raises(InvalidInput, match=f"100,000,000 shards .*at most {MAX_SHARDS:,}"):
            dataset_of(declared, found, measure_files(found, tokens, 1), now_ms=0)

    def test_counts_that_do_not_match_are_refused_with_the_numbers(self, tmp_path: Path) -> None:
        """What the files hold and what was said; and files without any sample."""
        found = find_files(write(tmp_path, a=9), JSONL)
        declared = declare("d", JSONL, total_samples=10, shard_size=1, shuffle=False, seed=0)
        with pytest.raises(DatasetMismatch, match="the 1 file at .* hold 9 samples, but total_samples is 10"):
            check_total(declared, 9, found)
        with pytest.raises(DatasetMismatch, match="hold no samples"):
            check_total(declared, 0, found)
        check_total(declared, 10, found)

    def test_only_the_same_again_is_registered(self, tmp_path: Path) -> None:
        """Each part of the description counts, and each file."""
        made = dataset(write(tmp_path, a=9))
        same = {"total_samples": None, "shard_size": 4, "shuffle": False, "seed": 0}
        found = find_files(tmp_path, JSONL)
        assert is_registered(made, declare("d", JSONL, **same), found)
        for change in ({"shard_size": 5}, {"shuffle": True}, {"seed": 1}):
            assert not is_registered(made, declare("d", JSONL, **{**same, **change}), found)
        write(tmp_path, b=1)
        assert not is_registered(made, declare("d", JSONL, **same), find_files(tmp_path, JSONL))


class TestFields:
    def test_a_spec_comes_back_from_its_fields(self, tmp_path: Path) -> None:
        """Text in Redis, the same value again."""
        spec = dataset(write(tmp_path, a=9), shuffle=True, seed=7).spec
        fields = spec.to_fields()
        assert all(isinstance(text, str) for text in fields.values())
        assert (fields["shards"], fields["shuffle"], fields["format"]) == ("3", "true", "jsonl")
        assert DatasetSpec.from_fields("d", fields) == spec

    @pytest.mark.parametrize("change", [{"version": "x"}, {"shuffle": "1"}, {"format": "zip"}, {"digest": None}, {"shards": None}])
    def test_a_damaged_spec_is_refused(self, tmp_path: Path, change: dict[str, str | None]) -> None:
        """A missing or wrong field is corrupt state, not a default."""
        fields = {**dataset(write(tmp_path, a=9)).spec.to_fields(), **change}
        with pytest.raises(StateCorrupt, match="its spec in Redis"):
            DatasetSpec.from_fields("d", {key: text for key, text in fields.items() if text is not None})

    def test_the_facts_of_a_file_are_readable_and_come_back(self) -> None:
        """One line per file, for redis-cli."""
        facts = FileFacts(file="a", samples=9, size_bytes=81, mtime_ns=123, marks=(0, 36, 72))
        assert facts.to_text() == "samples=9 size_bytes=81 mtime_ns=123 marks=0,36,72"
        assert FileFacts.from_text("a", facts.to_text()) == facts
        bare = FileFacts(file="a", samples=9, size_bytes=81, mtime_ns=-5)
        assert FileFacts.from_text("a", bare.to_text()) == bare

    @pytest.mark.parametrize(
        "text", ["", "samples=9", "samples=x size_bytes=1 mtime_ns=1 marks=", "samples=9 size_bytes=81 mtime_ns=1 marks=0;1"]
    )
    def test_damaged_facts_are_refused(self, text: str) -> None:
        """The message names the file."""
        with pytest.raises(StateCorrupt, match="facts of file 'a'"):
            FileFacts.from_text("a", text)

    def test_a_spec_whose_files_hold_something_else_is_refused(self, tmp_path: Path) -> None:
        """Numbers that contradict each other are corrupt state."""
        made = dataset(write(tmp_path, a=9))
        with pytest.raises(StateCorrupt, match=r"\(1, 9, 3\) in its spec and \(0, 0, 0\)"):
            Dataset(spec=made.spec, files=())

    def test_equal_data_has_an_equal_digest(self, tmp_path: Path) -> None:
        """The digest is of the data, not of when it was registered, and changes with everything else."""
        write(tmp_path, a=9)
        digests = [dataset(tmp_path, **change).spec.digest for change in ({}, {}, {"shuffle": True}, {"seed": 1}, {"shard_size": 5})]
        assert digests[0] == digests[1]
        assert len(set(digests)) == 4
