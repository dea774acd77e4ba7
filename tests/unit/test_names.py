"""Names, steps and ranks from outside: what is refused, and that the message names the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dtr import names
from dtr.errors import InvalidInput

BAD_NAMES = ["", "../x", "A B", "a" * 64, "a{b}", "a*", "a\n", "a\nb", "nаme", "a\0", ".", "..", "a..b", "-a", "a/b", None, 5, b"a", ["a"]]


@pytest.mark.parametrize("bad", BAD_NAMES)
def test_a_bad_name_is_refused(bad: Any) -> None:
    """Empty, path-like, spaced, long, braced, globbed, broken over lines, look-alike and NUL."""
    with pytest.raises(InvalidInput, match="worker_id must be") as caught:
        names.name(bad, "worker_id")
    assert caught.value.field == "worker_id"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("good", ["a", "A-1", "host.example-3", "x" * 63, "0"])
def test_a_good_name_is_kept(good: str) -> None:
    """What people call their jobs."""
    assert names.name(good, "job") == good
    assert names.job_name(good) == good
    assert names.job_name(f"tenant/{good}") == f"tenant/{good}"


@pytest.mark.parametrize("bad", ["a/b/c", "/a", "a/", "a//b", "a/..", 3])
def test_a_bad_job_is_refused(bad: Any) -> None:
    """At most a tenant and a name."""
    with pytest.raises(InvalidInput, match="job must be"):
        names.job_name(bad)


@pytest.mark.parametrize("bad", [-1, 1.5, "1e3", "5", 2**63, 2**53, True, float("nan"), None, np.float64(3)])
def test_a_bad_step_is_refused(bad: Any) -> None:
    """Negative, fractional, text, too large for a double, booleans and NaN."""
    with pytest.raises(InvalidInput, match="step must be an integer from 0"):
        names.step(bad)


@pytest.mark.parametrize("good", [0, 7, np.int64(7), 2**53 - 1])
def test_a_good_step_is_an_int(good: Any) -> None:
    """numpy's integers are integers."""
    assert type(names.step(good)) is int


@pytest.mark.parametrize("bad", [4, -1, "0", 1.0, True])
def test_a_bad_rank_is_refused(bad: Any) -> None:
    """The message has the bound."""
    with pytest.raises(InvalidInput, match="world_size - 1 = 3"):
        names.rank(bad, 4)
