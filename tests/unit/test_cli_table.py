"""Tables on any width: what stays, what is cut, what goes, and what replaces a table."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from dtr.cli.screen import Screen
from dtr.cli.table import LUXURY, Column, cell, cut, fit

COLUMNS = (
    Column(title="rank", right=True),
    Column(title="worker", least=8, keep="ends"),
    Column(title="phase", least=6, spare=1),
    Column(title="host", spare=2),
    Column(title="address", spare=LUXURY),
)
ROWS = [
    [cell(0), cell("gpu-node-17-0"), cell("training"), cell("vm-57fa59bc"), cell("10.0.0.1:29500")],
    [cell(11), cell("gpu-node-17-11"), cell("evaluating"), cell("vm-57fa59bc"), cell("10.0.0.1:29511")],
]


def printed(width: int | None, *, rows=ROWS, columns=COLUMNS) -> list[str]:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=width or 10_000, markup=False, highlight=False, emoji=False))
    screen.width = width
    screen.table(columns, rows)
    return out.getvalue().splitlines()


def test_all_columns_stand_whole_where_there_is_room():
    """Nothing is cut on a wide screen, and rank is aligned on the right."""
    lines = printed(120)
    assert lines[0].split() == ["rank", "worker", "phase", "host", "address"]
    assert lines[1].startswith("   0  gpu-node-17-0 ")
    assert lines[2].split() == ["11", "gpu-node-17-11", "evaluating", "vm-57fa59bc", "10.0.0.1:29511"]


def test_a_luxury_goes_before_anything_is_cut():
    """The address is dropped although cutting the names would have made room for it."""
    widths = fit(COLUMNS, ROWS, 60)
    assert widths is not None
    assert widths[4] == 0
    assert widths[1] == len("gpu-node-17-11")


def test_texts_are_cut_before_a_column_goes_and_names_last():
    """The phase loses letters first; the host stays."""
    widths = fit(COLUMNS, ROWS, 43)
    assert widths == [4, 14, 8, 11, 0]


def test_spare_columns_go_in_their_order():
    """The host goes before the phase, which is worth more."""
    widths = fit(COLUMNS, ROWS, 24)
    assert widths is not None
    assert [bool(width) for width in widths] == [True, True, True, False, False]


@pytest.mark.parametrize("width", range(10, 130))
def test_no_line_is_ever_wider_than_the_screen(width):
    """On every width, every line fits, and every rank is to be seen."""
    lines = printed(width)
    assert max(map(cell_len, lines)) <= width
    assert sum("0" in line for line in lines) >= 1
    assert any(line.split()[:1] == ["11"] or line == "rank 11" for line in lines)


def test_a_row_becomes_a_paragraph_where_no_table_fits():
    """Twelve characters: each row is a few lines that together hold everything, empty fields excepted."""
    lines = printed(12, rows=[[cell(0), cell("n-17-0-1"), cell(None), cell("vm"), cell("")]])
    assert [line.strip() for line in lines] == ["rank 0", "worker", "n-17-0-1", "host vm"]


def test_a_pipe_has_no_width():
    """Nothing is cut or wrapped where the output is no terminal."""
    lines = printed(None, rows=[[cell(0), cell("w" * 300), cell("p" * 300), cell("h"), cell("a")]])
    assert len(lines) == 2
    assert "w" * 300 in lines[1]


def test_an_empty_spare_column_takes_no_room():
    """A column without content is left out, even on a wide screen."""
    lines = printed(120, rows=[[cell(0), cell("n-0"), cell("training"), cell(None), cell(None)]])
    assert lines[0].split() == ["rank", "worker", "phase"]


def test_control_codes_of_a_terminal_are_not_passed_on():
    """What a trainer writes into its phase cannot move the cursor or break the table."""
    assert cell("load\x1b[2Jing\n\x07").text == "load?[2Jing??"


def test_cutting_keeps_both_ends_of_a_name():
    """Names of hosts differ at their ends; the cut text has exactly the asked-for width."""
    column = Column(title="worker", least=8, keep="ends")
    assert cut("gpu-node-17-cluster-3", 11, column) == "gpu-n…ter-3"
    assert cut("gpu", 6, column) == "gpu   "
    assert cut("gpu", 6, Column(title="n", right=True)) == "   gpu"
    assert cut("evaluating", 6, Column(title="phase", least=6)) == "evalu…"


@pytest.mark.parametrize("width", [6, 7, 10, 11])
def test_wide_letters_are_measured_in_cells(width):
    """A letter that takes two cells never makes a column overflow."""
    column = Column(title="worker", least=4, keep="ends")
    assert cell_len(cut("工作者-机器-零零零", width, column)) == width


def test_an_entry_wraps_beside_its_margin_and_below_it_on_a_narrow_screen():
    """The text hangs at its own column; where that would leave too little room, it stands below."""
    out = io.StringIO()
    screen = Screen(Console(file=out, width=50, markup=False, highlight=False), width=50)
    screen.fact("latest", "0007-k3f9/400 committed 34 s ago and then some more words")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("latest       0007-k3f9/400")
    assert all(line.startswith(" " * 13) for line in lines[1:])
    out.truncate(0)
    narrow = Screen(Console(file=out, width=20, markup=False, highlight=False), width=20)
    narrow.fact("latest", "0007-k3f9/400 committed")
    assert "latest\n 0007-k3f9/400" in out.getvalue()


def test_square_brackets_in_data_are_no_markup():
    """A reason like [bold] is shown as it is."""
    out = io.StringIO()
    Screen(Console(file=out, width=80, markup=False, highlight=False), width=80).line("exit [bold]1[/bold]")
    assert out.getvalue() == "exit [bold]1[/bold]\n"


@pytest.mark.parametrize("width", [30, 40, 50])
def test_words_stay_whole_on_a_narrow_screen(width):
    """One that has no room beside the margin goes below it; one that no line can hold ends a line behind a separator."""
    out = io.StringIO()
    screen = Screen(Console(file=out, width=width), width)
    words = "rank 1 of tenant/training-run-seven is file:///checkpoints/of/a/team/with/long/names-of-everything/here"
    screen.fact("store", words)
    screen.line(words)
    shown = out.getvalue().splitlines()
    assert max(map(len, shown)) <= width
    assert [line for line in shown if line != line.rstrip()] == [], "no padding at the end of lines"
    parts = " ".join(shown).split()
    assert parts.count("tenant/training-run-seven") == 2
    assert all(part[-1] in "/-" or part in words.split() for part in parts if part not in ("store", "here") and "everything" not in part)


def test_a_table_that_is_drawn_in_place_leaves_its_last_picture():
    """As when it is printed, with its heading and what stands below."""
    out = io.StringIO()
    screen = Screen(Console(file=out, width=40, force_terminal=True), 40)
    with screen.live() as draw:
        for word in ("first", "last"):
            draw(f"heading {word}", (Column(title="rank"), Column(title="is")), [[cell(0), cell(word)]], "below")
    last = out.getvalue().rpartition("heading")[2]
    assert last.startswith(" last")
    assert ("rank" in last, "below" in last) == (True, True)
