"""Records in the store: equal values give equal bytes, and nothing but what was written is ever read."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dtr.checkpoint.manifest import Manifest, PartFacts, RunRecord
from dtr.errors import InvalidInput, ManifestInvalid

CHECKSUM = "crc64nvme:ae8b14860a799888"


def part(rank: int, **changes: Any) -> PartFacts:
    facts: dict[str, Any] = {
        "rank": rank,
        "worker": f"worker-{rank}",
        "incarnation": "0123456789ab",
        "object": f"runs/0007-k3f9/000000000100/part-{rank:05d}-0123456789ab-0011.safetensors",
        "size_bytes": 1000 + rank,
        "checksum": CHECKSUM,
    }
    return PartFacts(**{**facts, **changes})


COMMIT = Manifest(
    decision="commit",
    job="team/lm",
    run="0007-k3f9",
    step=100,
    world_size=2,
    replicated="none",
    parent=("0006-aaaa", 90),
    created_at=1_795_444_339_893,
    parts=(part(0), part(1)),
    data={"numbers": {"epoch": 1, "cursor": [1, 2.5, None, True, "ä"]}},
)
ABORT = replace(COMMIT, decision="abort", parts=(), parent=None, reason="rank 1 died", data={})
RECORD = RunRecord(
    job="lm",
    run="0007-k3f9",
    parent_run="0006-aaaa",
    parent_step=90,
    world_size=2,
    roster={"worker-0": "0 0123456789ab host-1", "worker-1": "1 ba9876543210 host-2"},
    store="s3://bucket/prefix?endpoint=http://127.0.0.1:9000",
    created_at=1_795_444_339_893,
)


@pytest.mark.parametrize(
    "manifest",
    [
        COMMIT,
        ABORT,
        replace(COMMIT, decision="tombstone", reason="retention"),
        replace(COMMIT, replicated="all", parts=(part(1),)),
        replace(ABORT, parts=(part(1),)),
        replace(COMMIT, step=2**53 - 1, data={}),
    ],
)
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    """What was encoded is what is parsed."""
    assert Manifest.parse(manifest.encode()) == manifest


def test_a_part_in_chunks_comes_back() -> None:
    """The object and what was staged differ there, and both have a size and a checksum; of a file they are one."""
    chunked = part(1, kind="chunks", state_bytes=10**9, state_checksum="crc64nvme:0123456789abcdef")
    manifest = replace(COMMIT, replicated="some", parts=(part(0), chunked))
    assert Manifest.parse(manifest.encode()) == manifest
    assert (part(0).state_bytes, part(0).state_checksum) == (part(0).size_bytes, part(0).checksum)
    wrong: list[dict[str, Any]] = [
        {"kind": "chunks"}, {"kind": "chunks", "state_bytes": 5}, {"kind": "chunks", "state_bytes": 5, "state_checksum": "x"},
        {"state_bytes": 5}, {"state_checksum": "crc64nvme:0123456789abcdef"}, {"kind": "other"},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(InvalidInput):
            part(0, **changes)


def test_a_run_record_comes_back() -> None:
    """With and without a parent."""
    for record in (RECORD, replace(RECORD, parent_run=None, parent_step=None)):
        assert RunRecord.parse(record.encode()) == record


def test_equal_manifests_are_equal_bytes() -> None:
    """Whoever writes it: the order in which parts and members came does not matter."""
    other = replace(COMMIT, parts=(part(1), part(0)), data=json.loads(json.dumps(COMMIT.data, sort_keys=True)))
    assert other.encode() == COMMIT.encode()
    assert other.parts == COMMIT.parts


def test_a_person_can_check_it() -> None:
    """The checksum is the SHA-256 of the sorted, compact record without it, as jq and sha256sum compute it."""
    record = json.loads(COMMIT.encode())
    claimed = record.pop("checksum")
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert claimed == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert record["parts"][1]["size_bytes"] == 1001


def test_any_reason_can_be_recorded() -> None:
    """An abort must never fail because of the text of an error."""
    for reason in ("\ud800 surrogate", "line\nbreak", "x" * 100_000, "\0"):
        manifest = replace(ABORT, reason=reason)
        assert Manifest.parse(manifest.encode()) == manifest
        assert len(manifest.reason) <= 4_000


# --- damage ---


def test_every_truncation_is_found() -> None:
    """A manifest that was cut anywhere is refused."""
    content = COMMIT.encode()
    for length in range(len(content) - 1):  # the last byte is the newline, which carries nothing
        with pytest.raises(ManifestInvalid):
            Manifest.parse(content[:length])


def test_every_changed_byte_is_found() -> None:
    """A single changed byte anywhere is refused, or changes nothing that is read (white space)."""
    content = COMMIT.encode()
    chooser = random.Random(1)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << chooser.randrange(8)
        try:
            assert Manifest.parse(bytes(damaged)) == COMMIT
            assert at == len(content) - 1
        except ManifestInvalid:
            pass


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":1,"a":2}', b'{"version":NaN}', b" " * ((64 << 20) + 1), b"\0" * 100],
    ids=["empty", "object", "list", "null", "not UTF-8", "deep", "twice", "NaN", "huge", "zeros"],
)
def test_what_is_no_record(content: bytes) -> None:
    """Anything else in the manifest's place is refused by both parsers."""
    for parse in (Manifest.parse, RunRecord.parse):
        with pytest.raises(ManifestInvalid):
            parse(content)


def test_one_kind_is_not_the_other() -> None:
    """A run's record under a manifest's key is no manifest."""
    with pytest.raises(ManifestInvalid):
        Manifest.parse(RECORD.encode())
    with pytest.raises(ManifestInvalid):
        RunRecord.parse(COMMIT.encode())


# --- members that are wrong, with a checksum that is right ---


def forged(record: RunRecord | Manifest, change: Callable[[dict[str, Any]], Any]) -> bytes:
    members = json.loads(record.encode())
    del members["checksum"]
    change(members)
    text = json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**members, "checksum": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}).encode()


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        members[name] = value

    return change


def put_part(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        members["parts"][1][name] = value

    return change


ODD: list[Any] = [None, True, -1, 1.5, "", "x", [], {}, [[]], 10**30]

WRONG_MANIFESTS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    *((f"version {value!r}", put("version", value)) for value in [0, 2, 999, *ODD]),
    *((f"decision {value!r}", put("decision", value)) for value in ["COMMIT", "aborted", *ODD]),
    *((f"job {value!r}", put("job", value)) for value in ["../x", "a/b/c", "a b", *[odd for odd in ODD if odd != "x"]]),
    *((f"run {value!r}", put("run", value)) for value in ["../x", "a/b", *[odd for odd in ODD if odd != "x"]]),
    *((f"step {value!r}", put("step", value)) for value in [2**53, "100", 1e3, *ODD]),
    *((f"world_size {value!r}", put("world_size", value)) for value in [0, 1, 3, 10**9, *ODD]),
    *((f"replicated {value!r}", put("replicated", value)) for value in [0, 1, True, "ALL", *ODD]),
    *((f"parent {value!r}", put("parent", value)) for value in [[1, 2], {"run": "a"}, {"run": "a", "step": -1}, *ODD[1:]]),
    *((f"created_at {value!r}", put("created_at", value)) for value in [1795444339.8, 10**15, *ODD]),
    *((f"parts {value!r}", put("parts", value)) for value in [[1], {"0": {}}, *ODD]),
    *((f"reason {value!r}", put("reason", value)) for value in [7, *[odd for odd in ODD if type(odd) is not str]]),
    *((f"data {value!r}", put("data", value)) for value in [7, *[odd for odd in ODD if odd != {}]]),
    *((f"part rank {value!r}", put_part("rank", value)) for value in [0, 2, "1", *ODD]),
    *((f"part worker {value!r}", put_part("worker", value)) for value in ["../x", *[odd for odd in ODD if odd != "x"]]),
    *((f"part incarnation {value!r}", put_part("incarnation", value)) for value in ["0123456789AB", "0123456789abc", *ODD]),
    *((f"part size {value!r}", put_part("size_bytes", value)) for value in [0, 10**15, "7", *ODD]),
    *((f"part checksum {value!r}", put_part("checksum", value)) for value in ["crc32:00000000", CHECKSUM.upper(), *ODD]),
    *(
        (f"part object {value!r}", put_part("object", value))
        for value in [
            "/etc/passwd",
            "../../x",
            "a/../b",
            "runs//x",
            "a\0b",
            part(0).object,
            "x" * 2000,
            *[odd for odd in ODD if odd != "x"],
        ]
    ),
    ("a part has more", lambda members: members["parts"][0].update(more=1)),
    ("a part lacks one", lambda members: members["parts"][0].pop("checksum")),
    ("a part is missing", lambda members: members["parts"].pop()),
    ("a part too many", lambda members: members["parts"].append({**members["parts"][0], "rank": 2, "object": "runs/x"})),
    ("one part twice", lambda members: members["parts"].append(members["parts"][0])),
    ("more members", lambda members: members.update(more=1)),
    ("a member is missing", lambda members: members.pop("reason")),
    ("an abort without a reason", lambda members: members.update(decision="abort", parts=[], reason="")),
    ("a tombstone without a reason", lambda members: members.update(decision="tombstone", reason="")),
]


@pytest.mark.parametrize("change", [change for _, change in WRONG_MANIFESTS], ids=[name for name, _ in WRONG_MANIFESTS])
def test_wrong_members_are_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest that somebody forged with a right checksum: each wrong member is a ManifestInvalid, nothing else."""
    assert Manifest.parse(forged(COMMIT, lambda members: None)) == COMMIT
    with pytest.raises(ManifestInvalid):
        Manifest.parse(forged(COMMIT, change))


WRONG_RECORDS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    *((f"version {value!r}", put("version", value)) for value in [0, 2, *ODD]),
    *((f"run {value!r}", put("run", value)) for value in ["../x", *[odd for odd in ODD if odd != "x"]]),
    *((f"parent_run {value!r}", put("parent_run", value)) for value in ["a/b", *[odd for odd in ODD if odd != "x"]]),
    *((f"parent_step {value!r}", put("parent_step", value)) for value in [2**53, *ODD]),
    *((f"world_size {value!r}", put("world_size", value)) for value in [0, 1, 3, *ODD]),
    *((f"roster {value!r}", put("roster", value)) for value in [{"worker-0": "0 0123456789ab h"}, *ODD]),
    *((f"store {value!r}", put("store", value)) for value in [7, *[odd for odd in ODD if type(odd) is not str]]),
    *((f"created_at {value!r}", put("created_at", value)) for value in [1.5, *ODD]),
    *(
        (f"seat {value!r}", lambda members, value=value: members["roster"].update({"worker-1": value}))
        for value in ["0 ba9876543210 h", "2 ba9876543210 h", "1 short h", "1 ba9876543210", "1 ba9876543210 ", "x ba9876543210 h",
                      "-1 ba9876543210 h", "² ba9876543210 h", "1  ba9876543210 h", *ODD]
    ),
    ("worker ../x", lambda members: members["roster"].update({"../x": members["roster"].pop("worker-1")})),
    ("more members", lambda members: members.update(more=1)),
    ("a member is missing", lambda members: members.pop("store")),
]  # fmt: skip


@pytest.mark.parametrize("change", [change for _, change in WRONG_RECORDS], ids=[name for name, _ in WRONG_RECORDS])
def test_wrong_run_records_are_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    """The same for the record of a run."""
    with pytest.raises(ManifestInvalid):
        RunRecord.parse(forged(RECORD, change))


def test_what_could_not_be_read_is_not_written() -> None:
    """The same checks hold for the writer, as InvalidInput that names the field."""
    for changes, field in [
        ({"step": -1}, "step"),
        ({"parts": (part(0),)}, "parts"),
        ({"parts": (part(0), part(1, object=part(0).object))}, "parts"),
        ({"decision": "abort"}, "reason"),
        ({"decision": "perhaps"}, "decision"),
        ({"created_at": 1.5}, "created_at"),
    ]:
        with pytest.raises(InvalidInput, match=field):
            replace(COMMIT, **changes)  # type: ignore[arg-type]
    wrong: list[Any] = [{"a": float("nan")}, {1: "a"}, {"a": (1,)}, {"a": object()}, {"a": "\ud800"}, {"a": b"x"}]
    for data in wrong:
        manifest = replace(COMMIT, data=data)
        with pytest.raises(InvalidInput, match="plain JSON"):
            manifest.encode()


def test_a_thousand_ranks() -> None:
    """A manifest of 1,000 parts is written and read in well under a second, and is small."""
    manifest = replace(COMMIT, world_size=1000, parts=tuple(part(rank) for rank in range(1000)))
    content = manifest.encode()
    assert len(content) < 400_000
    assert Manifest.parse(content) == manifest
