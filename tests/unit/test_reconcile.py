"""What an uploader does about one part of an open checkpoint: the whole table, as a pure function."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtr.checkpoint.parts import PartView
from dtr.checkpoint.uploading.reconcile import judge

NOW = 1_000_000
STAGED = PartView(
    rank=0, state="staged", worker="w0", incarnation="0123456789ab", host="h", save="s", size_bytes=1, object="", checksum="", uploader="",
    lease_until_ms=0, retry_at_ms=0, attempts=0, failures=0, progress_bytes=0, error="",
    object_bytes=0, piece_bytes=0, pieces="", kind="file", metrics={}, state_checksum="",
)  # fmt: skip
CLAIMED = replace(STAGED, uploader="t", lease_until_ms=NOW + 1)
LAPSED = replace(STAGED, uploader="t", lease_until_ms=NOW)
PAUSED = replace(STAGED, retry_at_ms=NOW + 1)
DONE = replace(STAGED, state="done")
GONE, STUCK = "w0 departed", "w0 departed long ago"


@pytest.mark.parametrize(
    ("part", "slot", "gone", "act"),
    [
        (None, "", "", "wait"),  # its member lives and may stage it yet
        (None, "", GONE, "lose"),
        (None, "COPYING", "", "wait"),
        (None, "COPYING", GONE, "wait"),  # a survivor of the ended run still copies
        (None, "COPYING", STUCK, "lose"),
        (None, "STAGED", STUCK, "register"),
        (None, "STAGED", "", "register"),
        (None, "STAGED", GONE, "register"),  # a complete part counts, whoever died
        (replace(STAGED, state=""), "STAGED", "", "register"),
        (STAGED, "STAGED", "", "upload"),
        (STAGED, "STAGED", GONE, "upload"),
        (LAPSED, "STAGED", "", "upload"),
        (CLAIMED, "STAGED", "", "wait"),
        (PAUSED, "STAGED", "", "wait"),
        (STAGED, "", "", "lose"),
        (STAGED, "COPYING", "", "lose"),  # the slot holds something else by now
        (CLAIMED, "", "", "wait"),  # its holder will find out
        (PAUSED, "", "", "lose"),
        (DONE, "", GONE, "wait"),
        (DONE, "STAGED", "", "wait"),
    ],
)
def test_judge(part: PartView | None, slot: str, gone: str, act: str) -> None:
    """Every combination of what Redis knows, what the slot holds, and whether the member may still come."""
    found, reason = judge(part, slot, gone, NOW, stuck=gone == STUCK)
    assert found == act
    assert bool(reason) == (act == "lose")
