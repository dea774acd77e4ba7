"""The placement benchmark runs, with tiny sizes, and reports in the agreed shape."""

from __future__ import annotations

import json

import pytest

from bench import placement
from bench.report import Report
from dtr.placement import ShardPoints, place
from dtr.ring import Ring

TINY = ["--workers", "8", "--shards", "50", "--many-shards", "200", "--changes", "20", "--rounds", "1", "--seed", "3"]


def test_the_benchmark_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` gives one object with flat numbers, among them the figures that were promised."""
    assert placement.main([*TINY, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["name", "params", "figures", "limit", "peer", "ratios"]
    assert all(isinstance(value, int | float) for section in list(report)[1:] for value in report[section].values())
    expected = {
        "spread_max",
        "moved_excess_max",
        "ring_ms",
        "hash_100k_ms",
        "place_ms",
        "place_100k_ms",
        "change_ms",
        "peak_mb",
    }
    assert expected <= set(report["figures"])
    assert report["figures"]["spread_max"] == 1
    assert report["figures"]["moved_excess_max"] == 0
    assert report["params"]["seed"] == 3


def test_the_benchmark_prints_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Without `--json` the same figures stand in lines of at most 80 columns."""
    placement.main(TINY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "placement"
    assert any("spread_max" in line and line.endswith(" 1") for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_least_moves_are_those_of_the_theory() -> None:
    """The benchmark's own minimum: a leaver's shards, a newcomer's floor, nothing without a change."""
    members = [f"w{n}" for n in range(7)]
    start = place(Ring.of(members), ShardPoints.of("d", 100))
    assert placement.least_moves(start, members[1:]) == start.counts()["w0"]
    assert placement.least_moves(start, [*members, "new"]) == 100 // 8
    assert placement.least_moves(start, members) == 0


@pytest.mark.parametrize("value", [True, float("nan"), "7", None])
def test_a_report_holds_finite_numbers_only(value: float) -> None:
    """Anything else is refused where it is made, by name."""
    with pytest.raises(TypeError, match=r"x: figures\.a must be a finite number"):
        Report(name="x", params={}, figures={"a": value})
