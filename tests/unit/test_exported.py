"""``checkpoint.json`` of an exported folder: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dtr.checkpoint.keeping.exported import Exported, ExportedFile
from dtr.errors import ManifestInvalid


def file(rank: int = 0, **facts: Any) -> ExportedFile:
    known = {
        "file": f"rank-{rank:05d}.safetensors", "rank": rank, "worker": "w", "incarnation": "0" * 12, "size_bytes": 100,
        "checksum": "crc64nvme:" + "0" * 16, "piece_bytes": 64, "pieces": "0" * 32,
    }  # fmt: skip
    return ExportedFile(**{**known, **facts})


def about(**facts: Any) -> Exported:
    known: dict[str, Any] = {
        "job": "tenant/job", "run": "0001-a", "step": 5, "world_size": 2, "replicated": "none", "created_at": 1,
        "files": (file(0), file(1)), "metrics": {"loss": 0.5, "bad": None}, "data": {"epoch": 1},
    }  # fmt: skip
    return Exported(**{**known, **facts})


def test_what_is_written_is_read() -> None:
    """Every member, and it says how to read the folder without dtr."""
    assert Exported.parse(about().encode()) == about()
    assert "safetensors" in json.loads(about().encode())["read_me"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"), (("version",), 2), (("step",), -1), (("step",), True), (("step",), 1e3), (("world_size",), 3),
        (("world_size",), 10**12), (("job",), "../x"), (("run",), "a b"), (("replicated",), "yes"), (("files",), {}), (("files",), []),
        (("metrics",), []), (("metrics",), {"loss": "x"}), (("data",), 3), (("surprise",), 1), (("created_at",), "now"),
        (("files", 0, "file"), "../rank-00000.safetensors"), (("files", 0, "file"), "/etc/passwd"),
        (("files", 0, "file"), "rank-00001.safetensors"),
        (("files", 0, "size_bytes"), -1), (("files", 0, "size_bytes"), 10**18), (("files", 0, "checksum"), "sha256:00"),
        (("files", 0, "pieces"), "zz"), (("files", 0, "rank"), 7), (("files", 0, "incarnation"), None), (("files", 0, "extra"), 1),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_refused(path: tuple[Any, ...], value: Any) -> None:
    """A typed error in one line, whatever is wrong."""
    document = json.loads(about().encode())
    at = document
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    with pytest.raises(ManifestInvalid) as caught:
        Exported.parse(json.dumps(document).encode())
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"format": "dtr-checkpoint"}', b"[" * 100_000])
def test_what_is_no_record_is_refused(content: bytes) -> None:
    """Truncated, of another type, or nested until the parser gives up."""
    with pytest.raises(ManifestInvalid):
        Exported.parse(content)
