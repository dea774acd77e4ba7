"""Samples that people take out: which places of which shards that is, for which versions of a file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dtr.datasets.formats import make_format
from dtr.datasets.registering import described
from dtr.datasets.registering.spec import Dataset, DatasetSpec, FileFacts, digest_of
from dtr.datasets.timemachine.skips import Skip, checked, left_out, merged_skips, parse_skips, parse_target
from dtr.errors import InvalidInput, StateCorrupt

FILES = (FileFacts(file="a:b.npy", samples=25, size_bytes=100, mtime_ns=1), FileFacts(file="c.npy", samples=7, size_bytes=50, mtime_ns=2))


def dataset(files: tuple[FileFacts, ...] = FILES) -> Dataset:
    """Shards of ten: 0, 1, 2 (of five) and 3 (of seven)."""
    kind = make_format("npy", dtype=None, sample_length=None, drop_remainder=False)
    digest = digest_of(path="/d", format=kind, shard_size=10, shuffle=False, seed=0, files=files)
    spec = DatasetSpec(
        name="n", version=1, path="/d", folder="/d", format=kind, total_samples=32, shard_size=10, shards=4, files=2, shuffle=False, seed=0,
        digest=digest, registered_at_ms=0,
    )  # fmt: skip
    return Dataset(spec=spec, files=files)


def skip(file: FileFacts = FILES[0], at_ms: int = 5, reason: str = "x") -> Skip:
    return Skip(at_ms=at_ms, reason=reason, size_bytes=file.size_bytes, mtime_ns=file.mtime_ns)


def test_a_range_of_a_file_is_places_in_its_shards() -> None:
    """Over shard boundaries, to the file's end, overlapping ones once."""
    found = left_out(dataset(), {"a:b.npy:8-12": skip(), "a:b.npy:10-11": skip(), "a:b.npy:24-25": skip(), "c.npy:0-7": skip(FILES[1])})
    assert found == {0: ((8, 10),), 1: ((0, 2),), 2: ((4, 5),), 3: ((0, 7),)}


def test_it_says_nothing_of_a_file_that_changed_or_is_gone() -> None:
    """Positions of another content are other samples."""
    newer = (replace(FILES[0], mtime_ns=9), FILES[1])
    assert left_out(dataset(newer), {"a:b.npy:8-12": skip(), "gone.npy:0-1": skip()}) == {}


def test_in_a_store_it_is_the_tag_that_tells_one_content_from_another() -> None:
    """A file there has no time of modification, and one of the same size may be another."""
    there = replace(FILES[0], mtime_ns=0, tag='"e1"')
    target, record = checked(dataset((there, FILES[1])), "a:b.npy:3-4", "x", 5)
    assert parse_skips({target: record.to_json()}) == {target: record}
    assert left_out(dataset((there, FILES[1])), {target: record}) == {0: ((3, 4),)}
    assert left_out(dataset((replace(there, tag='"e2"'), FILES[1])), {target: record}) == {}


def test_merging_forgets_no_skip_and_does_not_depend_on_the_order() -> None:
    """Two ranks that learned at different times, and two records of one skip."""
    one, other = {"c.npy:0-1": skip(at_ms=5)}, {"c.npy:0-1": skip(at_ms=4), "c.npy:3-4": skip()}
    assert merged_skips(one, other) == merged_skips(other, one) == {"c.npy:0-1": skip(at_ms=4), "c.npy:3-4": skip()}
    assert merged_skips(one, {}) == merged_skips({}, one) == one


@pytest.mark.parametrize(
    "text", ["", "c.npy", "c.npy:", "c.npy:3", "c.npy:4-4", "c.npy:5-4", "c.npy:-1-4", ":3-4", "c.npy:3-4x", "c.npy:³-4", None]
)
def test_what_is_no_range_of_a_file_is_refused(text: Any) -> None:
    """With what it should look like."""
    with pytest.raises(InvalidInput, match="FILE:START-STOP"):
        parse_target(text)


def test_a_persons_word_is_checked() -> None:
    """A name with a colon is a name; the reason becomes one printable line, and must be one."""
    assert checked(dataset(), "a:b.npy:03-4", " two\nlines\x1b[31m ", 7) == ("a:b.npy:3-4", skip(at_ms=7, reason="two lines [31m"))
    for target, reason, said in (("d.npy:0-1", "x", "no file 'd.npy'"), ("c.npy:6-8", "x", "7 samples"), ("c.npy:0-1", "\x07 ", "say why")):
        with pytest.raises(InvalidInput, match=said):
            checked(dataset(), target, reason, 7)


@pytest.mark.parametrize(
    "record",
    [None, {}, {"reason": 1}, {**skip().to_json(), "at_ms": -1}, {**skip().to_json(), "mtime_ns": "1"}, {**skip().to_json(), "tag": 1}],
)
def test_a_record_that_is_none_is_refused(record: Any) -> None:
    """What a manifest holds is taken on no trust."""
    assert parse_skips({"c.npy:0-1": skip().to_json()}) == {"c.npy:0-1": skip()}
    with pytest.raises(InvalidInput):
        parse_skips({"c.npy:0-1": record})


def test_a_data_set_in_the_store_is_the_one_that_its_name_says() -> None:
    """The same from what was written; anything else is named."""
    one, other = dataset(), dataset((replace(FILES[0], mtime_ns=9), FILES[1]))
    assert described.decode(described.encode(one), "n", one.spec.digest) == one
    for content in (b"", described.encode(other), described.encode(one)[:-20]):
        with pytest.raises(StateCorrupt, match=f"datasets/n/{one.spec.digest}"):
            described.decode(content, "n", one.spec.digest)
