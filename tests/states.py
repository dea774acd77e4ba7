"""States to save, and whether what came back is one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.testing import assert_array_equal


def state_of(step: int) -> dict[Any, Any]:
    """A state that has something of everything, other for each step."""
    return {
        "model": {"w": np.arange(64.0) + step, "half": np.float16(step), "none": None},
        7: [step, (True, -0.0, float("nan"), 2**70), b"bytes", "text"],
    }


def assert_is(found: Any, step: int) -> None:
    """``found`` is ``state_of(step)``, type by type and bit by bit."""
    wanted = state_of(step)
    assert_array_equal(found["model"]["w"], wanted["model"]["w"])
    assert found["model"]["w"].flags.writeable
    assert repr(found[7]) == repr(wanted[7])
    assert type(found["model"]["half"]) is np.float16
    assert found["model"]["half"] == step
