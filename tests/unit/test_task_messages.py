"""What a message may say, and the line that says what was wrong with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr.errors import InvalidInput
from tasks.messages import Collect, Settle, UploadPart

GOOD = {"job": "tenant/job", "run": "0001-aaaa", "step": 5, "rank": 0}


def test_a_message_is_what_was_sent() -> None:
    """Every kind, every field."""
    assert Collect.parse([], {"job": "tenant/job"}) == Collect(job="tenant/job")
    assert UploadPart.parse([], GOOD) == UploadPart(job="tenant/job", run="0001-aaaa", step=5, rank=0)
    assert Settle.parse([], {k: v for k, v in GOOD.items() if k != "rank"}).step == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"job": "a/b/c"}, "job must be"), ({"job": "../x"}, "job must be"), ({"job": ["a"]}, "job must be"),
        ({"run": ""}, "run must be"), ({"run": "r" * 10_000_000}, "run must be"),
        ({"step": -1}, "step must be an integer"), ({"step": 1.5}, "step must be"), ({"step": "5"}, "step must be"),
        ({"step": True}, "step must be"), ({"step": 2**63}, "step must be"), ({"step": {"a": 1}}, "got a dict of 1"),
        ({"rank": -1}, "rank must be"), ({"rank": None}, "rank must be"), ({"surprise": 1}, "'surprise' as well"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_wrong_field_is_named_in_a_short_line(change: dict[str, Any], says: str) -> None:
    """However large the value, the line is for a log."""
    with pytest.raises(InvalidInput, match=says) as error:
        UploadPart.parse([], {**GOOD, **change})
    assert len(str(error.value)) < 300


def test_missing_and_nameless_fields() -> None:
    """A message names all of its fields."""
    with pytest.raises(InvalidInput, match="lacks run, step"):
        UploadPart.parse([], {"job": "j", "rank": 0})
    with pytest.raises(InvalidInput, match="4 without a name"):
        UploadPart.parse(["j", "r", 1, 0], {})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["job", "run", "step", "rank", "x"]), JSON))
def test_whatever_comes_is_a_message_or_invalid(fields: dict[str, Any]) -> None:
    """No value that JSON can carry raises anything else."""
    try:
        UploadPart.parse([], fields)
    except InvalidInput:
        pass
