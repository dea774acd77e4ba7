"""The drawing of a job's history, from values alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.cli.ckpt_log import drawn
from dtr.views.lineage import GONE, LineageView, RunView, paths
from dtr.views.stored import CheckpointRow


def row(run: str, step: int, state: str = "COMMITTED", **facts: Any) -> CheckpointRow:
    known: dict[str, Any] = {
        "reason": "", "latest": False, "size_bytes": None, "world_size": 1, "replicated": "none", "done": 1, "expected": 1, "at_ms": None,
        "in_index": True, "in_store": True,
    }  # fmt: skip
    return CheckpointRow(run=run, step=step, state=state, **{**known, **facts})


def run(name: str, *steps: int, parent: str = "", on: bool = True, left_at: int | None = None, state: str = "COMMITTED") -> RunView:
    return RunView(
        run=name, parent=parent, known=True, on_lineage=on, left_at=left_at, world_size=1, began_at_ms=None,
        checkpoints=tuple(row(name, step, state) for step in sorted(steps, reverse=True)),
    )  # fmt: skip


def view(*runs: RunView) -> LineageView:
    return LineageView(job="j", store="/s", note="", head=runs[0].run, latest="", older=0, runs=runs)


def picture(found: LineageView, *, fold: bool = True, width: int | None = None) -> list[str]:
    """Mark and name of each row."""
    lines = []
    for rows in paths(found, fold=fold):
        for margin, _ in drawn(rows, width):
            lines.append(" ".join([margin[0].text.rstrip(), *(cell.text.strip() for cell in margin[1:2])]).rstrip())
    return lines


def test_one_run_is_a_line() -> None:
    """The newest on top, the start of the run below."""
    assert picture(view(run("0001-a", 1, 2))) == ["* 0001-a/2", "* 0001-a/1", "o 0001-a"]


def test_branches_stand_above_what_they_grew_from() -> None:
    """Two runs that were left, one of which had left something itself; the lineage stays straight on the left."""
    found = view(
        run("0004-d", 70, parent="0001-a/10"),
        run("0003-c", 60, 65, parent="0002-b/20", on=False),
        run("0002-b", 20, 30, parent="0001-a/10", on=False),
        run("0001-a", 10, 15, left_at=10),
    )
    assert picture(found) == [
        "* 0004-d/70", "o 0004-d",
        "| * 0003-c/65", "| * 0003-c/60", "| o 0003-c",
        "| | * 0002-b/30", "| |/",
        "| * 0002-b/20", "| o 0002-b", "|/",
        "| * 0001-a/15", "|/",
        "* 0001-a/10", "o 0001-a",
    ]  # fmt: skip


def test_a_second_fresh_start_is_a_tree_of_its_own() -> None:
    """The lineage's tree comes first, though the other is newer by its number."""
    assert picture(view(run("0001-a", 1), run("0002-b", 5, on=False))) == ["* 0001-a/1", "o 0001-a", "* 0002-b/5", "o 0002-b"]


def test_a_parent_that_is_gone_keeps_its_place() -> None:
    """Neither side has it any more; the run that continued it hangs from where it was."""
    found = view(run("0002-b", 9, parent="0001-a/5"), run("0001-a", 1, left_at=5))
    assert picture(found) == ["* 0002-b/9", "o 0002-b", "? 0001-a/5", "* 0001-a/1", "o 0001-a"]
    (rows,) = paths(found)
    assert [one.checkpoint.state for one in rows if one.checkpoint is not None and one.checkpoint.step == 5] == [GONE]


def test_retired_neighbours_become_one_row() -> None:
    """Unless all are asked for."""
    found = view(run("0001-a", 1, 2, 3, state="RETIRED"))
    assert picture(found) == [". 0001-a/3", "o 0001-a"]
    assert picture(found, fold=False) == [". 0001-a/3", ". 0001-a/2", ". 0001-a/1", "o 0001-a"]


def test_damaged_records_that_make_a_circle_are_drawn_all_the_same() -> None:
    """Two runs that continue each other: every row comes, once."""
    found = view(run("0002-b", 2, parent="0001-a/1"), run("0001-a", 1, parent="0002-b/2"))
    assert sorted(picture(found)) == ["* 0001-a/1", "* 0002-b/2", "o 0001-a", "o 0002-b"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=8))
def test_every_checkpoint_and_run_is_drawn_once(given: list[tuple[int, int, list[int]]]) -> None:
    """Whatever continues what, also what is not there."""
    runs = [
        run(f"{n:04d}-x", *set(steps), parent="" if parent == n else f"{parent:04d}-x/{step}", on=n == 0)
        for n, (parent, step, steps) in enumerate(given)
    ]
    nodes = [one for rows in paths(view(*runs), fold=False) for one in rows]
    drawn_rows = [(one.checkpoint.run, one.checkpoint.step) for one in nodes if one.checkpoint is not None and one.checkpoint.state != GONE]
    assert sorted(drawn_rows) == sorted((r.run, c.step) for r in runs for c in r.checkpoints)
    assert sorted(one.run.run for one in nodes if one.run is not None) == sorted(r.run for r in runs)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_rows_fit_the_screen(width: int) -> None:
    """Beside their graph, or below it where there is no room; nothing is wider."""
    found = view(run("0002-b", 9, parent="0001-a/5", state="DAMAGED"), run("0001-a", 1, 5, 9, left_at=5))
    for rows in paths(found):
        for margin, text in drawn(rows, width):
            used = sum(len(cell.text) + 2 for cell in margin)
            assert used + len(text) <= width or used > width - 24
