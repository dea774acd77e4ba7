"""Sets as ranges, against Python's own sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.datasets.consuming import ranges
from dtr.errors import InvalidInput

pairs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


def members(these: ranges.Ranges) -> set[int]:
    return {n for start, stop in these for n in range(start, stop)}


@given(pairs)
def test_a_normal_form_is_the_set_and_the_only_one(some: list[tuple[int, int]]) -> None:
    """Sorted, disjoint, none empty, none touching: so equal sets are equal tuples."""
    found = ranges.normal(some)
    assert members(found) == {n for start, stop in some for n in range(start, stop)}
    assert all(start < stop for start, stop in found)
    assert all(one[1] < other[0] for one, other in pairwise(found))


@given(pairs, pairs)
def test_arithmetic_is_that_of_sets(some: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    """Union, difference, intersection and count agree with sets, and give normal forms."""
    a, b = ranges.normal(some), ranges.normal(other)
    for found, expected in (
        (ranges.union(a, b), members(a) | members(b)),
        (ranges.minus(a, b), members(a) - members(b)),
        (ranges.common(a, b), members(a) & members(b)),
    ):
        assert members(found) == expected
        assert found == ranges.normal(found)
    assert ranges.count(a) == len(members(a))
    assert [ranges.contains(a, n) for n in range(41)] == [n in members(a) for n in range(41)]


@given(pairs)
def test_text_comes_back(some: list[tuple[int, int]]) -> None:
    """Both spellings are read back as they were written."""
    found = ranges.normal(some)
    assert ranges.parse_ranges(ranges.format_ranges(found)) == found
    assert ranges.parse_numbers(ranges.format_numbers(found)) == found


def test_the_two_spellings() -> None:
    """Samples are half open as a slice is; whole things are numbered, the last one included."""
    assert ranges.format_ranges(((0, 40), (50, 60))) == "0-40,50-60"
    assert ranges.format_numbers(((0, 6), (9, 10))) == "0-5,9"


@pytest.mark.parametrize("text", ["5", "5-5", "9-3", "0-4,4-6", "4-6,0-2", "0-4,", "a-b", "0 - 4", "-1-3", "1-2\n", "٣-٤"])
def test_text_that_is_no_normal_form_is_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(InvalidInput, match="ranges must"):
        ranges.parse_ranges(text)


@pytest.mark.parametrize("text", ["3-1", "1,2", "2,1", "1-2,3", "x", "1-", ",1"])
def test_numbers_that_are_no_normal_form_are_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(InvalidInput, match="numbers must"):
        ranges.parse_numbers(text)


@given(st.sets(st.integers(0, 200)))
def test_numbers_become_a_normal_form(numbers: set[int]) -> None:
    """The quick way for many numbers finds what the general one does."""
    assert ranges.of_numbers(numbers) == ranges.normal((n, n + 1) for n in numbers)
