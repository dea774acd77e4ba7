"""Any state that can be saved comes back as what it was: type by type, bit by bit, through the bytes of a real file."""

from __future__ import annotations

import copy
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dtr.checkpoint.format import tensors, tree
from dtr.checkpoint.format.structure import Structures
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.staging.device import Cuda

SCALAR_DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
    hnp.byte_string_dtypes(),
    hnp.unicode_string_dtypes(),
    st.sampled_from([np.dtype("V3"), np.dtype(np.longdouble), np.dtype(np.clongdouble)]),
)
DTYPES = st.one_of(SCALAR_DTYPES, hnp.array_dtypes(SCALAR_DTYPES, allow_subarrays=True, max_size=3))


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any dtype, any bits (NaN payloads, padding), any layout: 0-d, empty, transposed, strided, reversed."""
    dtype = draw(DTYPES)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    count = int(np.prod(shape))
    content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype.kind == "U" or (dtype.fields and any(field[0].base.kind == "U" for field in dtype.fields.values())) or dtype.hasobject:
        array = np.zeros(shape, dtype)  # arbitrary bits are no text
    elif dtype.kind == "b":
        array = np.frombuffer(bytes(byte & 1 for byte in content), dtype).reshape(shape).copy()
    else:
        array = np.ndarray(shape, dtype, bytearray(content) or b"").copy() if count else np.empty(shape, dtype)
    match draw(st.sampled_from(["plain", "transposed", "strided", "reversed", "fortran"])):
        case "transposed":
            return array.T
        case "strided" if array.ndim:
            return np.repeat(array, 2, axis=0)[::2]
        case "reversed" if array.ndim:
            return array[::-1]
        case "fortran":
            return np.asfortranarray(array)
    return array


FLOATS = st.one_of(st.floats(), st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]))
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates as well
INTEGERS = st.one_of(st.integers(), st.integers(-(2**200), 2**200), st.sampled_from([2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 2**64]))
PLAIN = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS)
NUMPY_SCALARS = st.one_of(
    FLOATS.map(np.float64), st.integers(-128, 127).map(np.int8), st.booleans().map(np.bool_), st.floats(width=16).map(np.float16),
    st.binary(max_size=5).map(np.bytes_), TEXTS.map(np.str_), st.just(np.longdouble("0.1")), st.just(np.datetime64("NaT")),
    st.integers(-(2**40), 2**40).map(lambda n: np.datetime64(n, "us")), st.complex_numbers(width=64).map(np.complex64),
    st.binary(min_size=1, max_size=4).map(np.void),
)  # fmt: skip
LEAVES = st.one_of(PLAIN, st.binary(max_size=20), st.binary(max_size=20).map(bytearray), arrays(), NUMPY_SCALARS)
KEYS = st.recursive(PLAIN.filter(lambda value: value == value), lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=3)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(TEXTS, inner, max_size=4),
        st.dictionaries(TEXTS, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equality of types and of every bit; knows nothing of how states are stored."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return (a.dtype, a.dtype.str, a.shape, a.tobytes()) == (b.dtype, b.dtype.str, b.shape, b.tobytes())
    if isinstance(a, np.str_ | np.bytes_):
        return list(a) == list(b)  # with NULs at the end, which numpy's own comparison skips
    if isinstance(a, np.longdouble):
        return bool(a == b and np.signbit(a) == np.signbit(b))  # six of its bytes mean nothing
    if isinstance(a, np.generic):
        return (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return bool(a == b)


def through_a_file(state: Any, *, threads: int = 1, dirt: int = 0xAA) -> tuple[Any, bytearray]:
    spec, leaves = tree.flatten(state)
    layout = tensors.arrange(leaves).layout({"dtr": tree.encode(spec)})
    buffer = bytearray([dirt]) * layout.size_bytes
    layout.copy_into(buffer, leaves, threads=threads)
    part = tensors.read(buffer)
    return tree.unflatten(tree.decode(part.metadata["dtr"]), part.tensors), buffer


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(STATES)
def test_a_state_comes_back_as_it_was(state: Any) -> None:
    """Types, order of keys, dtypes, byte order, NaN payloads, signs of zero: all of it, whatever memory held before."""
    back, buffer = through_a_file(state)
    assert same(state, back)
    again, other = through_a_file(state, dirt=0x55)
    assert same(state, again)
    assert buffer == other, "a save's bytes depend on the state alone"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(STATES, min_size=2, max_size=3))
def test_a_kept_layout_writes_the_same_bytes(states: list[Any]) -> None:
    """Structures that come back in any order, others between them: each file is the one that is written without any memory."""
    known = Structures()
    for state in [*states, *states, copy.deepcopy(states[0])]:
        laid = known.lay_out(state, {})
        buffer = bytearray(b"\x55" * laid.size_bytes)
        assert laid.copy_into(buffer, Cuda()) is None
        spec, leaves = tree.flatten(state)
        layout = tensors.arrange(leaves).layout({TREE: tree.encode(spec)})
        other = bytearray(layout.size_bytes)
        layout.copy_into(other, leaves)
        assert buffer == other


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(TEXTS, arrays(), max_size=6), st.integers(1, 3))
def test_others_read_the_file(state: dict[str, np.ndarray], threads: int) -> None:
    """The safetensors package reads every file that we write, and the bytes of each array are there, aligned for its dtype."""
    back, buffer = through_a_file(state, threads=threads)
    assert same(state, back)
    found = safetensors.numpy.load(bytes(buffer))
    assert sorted(array.tobytes() for array in found.values()) == sorted(array.tobytes() for array in state.values())
    for array in back.values():
        assert array.flags.aligned
        assert array.flags.writeable


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STATES, st.data())
def test_a_damaged_file_is_an_integrity_error(state: Any, data: st.DataObject) -> None:
    """A file with any few bytes changed or cut is read as some state or refused by a typed error; nothing else is ever raised."""
    from dtr.errors import DtrError

    spec, leaves = tree.flatten(state)
    layout = tensors.arrange(leaves).layout({"dtr": tree.encode(spec)})
    buffer = bytearray(layout.size_bytes)
    layout.copy_into(buffer, leaves)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(buffer) - 1, len(layout.header) + 8)))
        buffer[at] = data.draw(st.sampled_from([0, 0x22, 0x2C, 0x30, 0x39, 0x5B, 0x7B, 0x7D, 0xFF, buffer[at] ^ 1]))
    del buffer[len(buffer) - data.draw(st.integers(0, 3)) :]
    try:
        part = tensors.read(buffer)
        tree.unflatten(tree.decode(part.metadata.get("dtr", "")), part.tensors)
    except DtrError:
        pass
