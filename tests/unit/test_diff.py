"""How far apart two buffers are: against plain Python on small cases, bit for bit where numbers say less than bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dtr.checkpoint.format.floats import as_float64
from dtr.checkpoint.keeping import diff
from dtr.checkpoint.keeping.diff import measure


def apart(a: Any, b: Any, dtype: str) -> diff.Measured:
    one, two = np.asarray(a, dtype), np.asarray(b, dtype)
    return measure(one.tobytes(), two.tobytes(), one.dtype, one.dtype.itemsize)


def test_the_same_bits_are_the_same() -> None:
    """NaN included."""
    assert apart([math.nan, 1.0, -0.0], [math.nan, 1.0, -0.0], "f4") == diff.Measured(elements=3)


def test_numbers_that_differ_are_measured() -> None:
    """The largest absolute and the largest relative difference need not be of the same element."""
    found = apart([100.0, 0.001, 5.0], [101.0, 0.002, 5.0], "f8")
    assert (found.elements, found.changed, found.max_abs) == (3, 2, 1.0)
    assert found.max_rel == pytest.approx(0.5)


def test_zero_and_minus_zero_differ_by_nothing() -> None:
    """Their bits do differ."""
    assert apart([0.0], [-0.0], "f4") == diff.Measured(elements=1, changed=1)


def test_what_is_not_finite_is_counted_apart() -> None:
    """A NaN has no distance; it must not hide that of the others."""
    found = apart([math.nan, math.inf, 1.0, 2.0], [0.0, 1.0, math.nan, 2.5], "f4")
    assert (found.changed, found.odd, found.max_abs) == (4, 3, 0.5)
    assert apart([math.nan], [1.0], "f4") == diff.Measured(elements=1, changed=1, odd=1)


INTEGERS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


@given(st.sampled_from(INTEGERS), st.data())
def test_integers_are_exact(dtype: str, data: st.DataObject) -> None:
    """Also where the difference is more than the type holds: compared with Python's own integers."""
    arrays = hnp.arrays(dtype, 5)
    a, b = data.draw(arrays), data.draw(arrays)
    found = apart(a, b, dtype)
    gaps = [abs(int(x) - int(y)) for x, y in zip(a, b, strict=True)]
    assert found.changed == sum(gap > 0 for gap in gaps)
    assert found.max_abs == float(max(gaps))


def test_other_kinds() -> None:
    """bool, complex, big-endian, and opaque items, which are counted only."""
    assert apart([True, False, True], [True, True, False], "?").changed == 2
    assert apart([3 + 4j], [0j], "c8").max_abs == 5.0
    assert apart([1, 2], [1, 4], ">i4").max_abs == 2.0
    found = measure(b"aabbcc", b"aabxcc", None, 2)
    assert (found.elements, found.changed, found.max_abs) == (3, 1, 0.0)


def test_blocks_and_slices_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whether compared at once or in many blocks."""
    rng = np.random.default_rng(1)
    a = rng.standard_normal(1000).astype("f4")
    b = np.where(rng.random(1000) < 0.1, a + 1, a).astype("f4")
    whole = apart(a, b, "f4")
    monkeypatch.setattr(diff, "BLOCK_ITEMS", 7)
    assert apart(a, b, "f4") == whole
    assert whole.changed == int((a != b).sum())


# --- dtypes that numpy lacks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "known"),
    [
        ("F8_E4M3", {0x00: 0.0, 0x38: 1.0, 0x7E: 448.0, 0x01: 2.0**-9, 0xB8: -1.0, 0x7F: math.nan}),
        ("F8_E5M2", {0x3C: 1.0, 0x7B: 57344.0, 0x7C: math.inf, 0xFC: -math.inf, 0x7D: math.nan, 0x01: 2.0**-16}),
        ("F8_E4M3FNUZ", {0x40: 1.0, 0x7F: 240.0, 0x80: math.nan, 0x01: 2.0**-10}),
        ("F8_E5M2FNUZ", {0x40: 1.0, 0x7F: 57344.0, 0x80: math.nan}),
        ("F8_E8M0", {0: 2.0**-127, 127: 1.0, 254: 2.0**127, 255: math.nan}),
        ("BF16", {0x3F80: 1.0, 0xC000: -2.0, 0x7F80: math.inf, 0x0001: 2.0**-133}),
    ],
)
def test_small_floats(label: str, known: dict[int, float]) -> None:
    """By the values of their specifications."""
    bits = np.array(list(known), "u2" if label == "BF16" else "u1")
    assert np.array_equal(as_float64(bits, label), np.array(list(known.values())), equal_nan=True)


def test_small_floats_as_torch_has_them() -> None:
    """Every pattern of every kind, where torch is installed."""
    torch = pytest.importorskip("torch")
    for label, kind in (
        ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E4M3FNUZ", "float8_e4m3fnuz"), ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    ):  # fmt: skip
        bits = np.arange(256, dtype=np.uint8)
        theirs = torch.from_numpy(bits.copy()).view(getattr(torch, kind)).to(torch.float64).numpy()
        assert np.array_equal(as_float64(bits, label), theirs, equal_nan=True), label
