"""Sets of integers as ranges: the one arithmetic under consumption, data states and placement of batches. Pure.

A `Ranges` is in normal form: pairs (start, stop), half open, none empty, sorted, disjoint, and none touching the next; so equal sets are
equal tuples. Every function takes and returns normal forms (`normal` makes one of anything), and never changes its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

import numpy as np

from dtr.errors import InvalidInput

__all__ = [
    "Ranges",
    "common",
    "contains",
    "count",
    "format_numbers",
    "format_ranges",
    "minus",
    "normal",
    "of_numbers",
    "parse_numbers",
    "parse_ranges",
    "plus",
    "union",
]

Ranges = tuple[tuple[int, int], ...]

_SAMPLES = re.compile(r"\d{1,16}-\d{1,16}(,\d{1,16}-\d{1,16})*", re.ASCII)
_NUMBERS = re.compile(r"\d{1,16}(-\d{1,16})?(,\d{1,16}(-\d{1,16})?)*", re.ASCII)


def normal(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The set that ``pairs`` cover, in whatever order and however they overlap; empty ones count for nothing."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(pair for pair in pairs if pair[0] < pair[1]):
        if found and start <= found[-1][1]:
            if stop > found[-1][1]:
                found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def of_numbers(numbers: AbstractSet[int]) -> Ranges:
    """The set of these numbers, not negative; quick for many."""
    if not numbers:
        return ()
    ascending = np.sort(np.fromiter(numbers, dtype=np.int64, count=len(numbers)))
    breaks = np.flatnonzero(np.diff(ascending) != 1)
    starts = ascending[np.concatenate([[0], breaks + 1])].tolist()
    stops = (ascending[np.concatenate([breaks, [len(ascending) - 1]])] + 1).tolist()
    return tuple(zip(starts, stops, strict=True))


def union(*sets: Ranges) -> Ranges:
    """What is in any of them."""
    filled = [one for one in sets if one]
    return filled[0] if len(filled) == 1 else normal(pair for one in filled for pair in one)


def plus(these: Ranges, start: int, stop: int) -> Ranges:
    """``these`` and the numbers from ``start`` to before ``stop``: quick where they go on from the end of ``these``."""
    if these and these[-1][1] == start < stop:
        return (*these[:-1], (these[-1][0], stop))
    return union(these, ((start, stop),)) if start < stop else these


def minus(these: Ranges, those: Ranges) -> Ranges:
    """What is in ``these`` and not in ``those``."""
    found: list[tuple[int, int]] = []
    at = 0
    for start, stop in these:
        begin = start
        while at < len(those) and those[at][1] <= begin:
            at += 1
        look = at
        while look < len(those) and those[look][0] < stop:
            if those[look][0] > begin:
                found.append((begin, those[look][0]))
            begin = max(begin, those[look][1])
            look += 1
        if begin < stop:
            found.append((begin, stop))
    return tuple(found)


def common(these: Ranges, those: Ranges) -> Ranges:
    """What is in both."""
    return minus(these, minus(these, those))


def count(these: Ranges) -> int:
    """How many numbers are in the set."""
    return sum(stop - start for start, stop in these)


def contains(these: Ranges, number: int) -> bool:
    """Whether the number is in the set."""
    return any(start <= number < stop for start, stop in these)


def format_ranges(these: Ranges) -> str:
    """Sample positions as text, half open as a slice is: ``0-40,50-60`` has 50 samples; '' for none."""
    return ",".join(f"{start}-{stop}" for start, stop in these)


def parse_ranges(text: str) -> Ranges:
    """What `format_ranges` wrote; raises InvalidInput for anything else, also for what is not in normal form."""
    if text == "":
        return ()
    if not isinstance(text, str) or not _SAMPLES.fullmatch(text):
        raise InvalidInput(f"ranges must be START-STOP,START-STOP such as 0-40,50-60, got {str(text)[:60]!r}", field="ranges")
    found = tuple((int(start), int(stop)) for start, _, stop in (word.partition("-") for word in text.split(",")))
    if normal(found) != found:
        raise InvalidInput(f"ranges must ascend, none empty and none touching the next, got {text[:60]!r}", field="ranges")
    return found


def format_numbers(these: Ranges) -> str:
    """Whole things as people number them, the last one included: ``0-5,9`` has 7 of them; '' for none."""
    return ",".join(str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in these)


def parse_numbers(text: str) -> Ranges:
    """What `format_numbers` wrote; raises InvalidInput for anything else."""
    if text == "":
        return ()
    if not isinstance(text, str) or not _NUMBERS.fullmatch(text):
        raise InvalidInput(f"numbers must be such as 0-5,9, got {str(text)[:60]!r}", field="numbers")
    found = tuple((int(first), int(last or first) + 1) for first, _, last in (word.partition("-") for word in text.split(",")))
    if normal(found) != found:
        raise InvalidInput(f"numbers must ascend in ranges that do not touch, got {text[:60]!r}", field="numbers")
    return found
