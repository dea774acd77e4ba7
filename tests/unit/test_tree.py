"""What a state may hold, what is refused and how that is said, and trees that nobody honest wrote."""

from __future__ import annotations

import collections
import enum
import math
import random
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.format import tensors, tree
from dtr.checkpoint.format.tensors import Tensor
from dtr.errors import IntegrityError, InvalidInput, ManifestInvalid, UnsupportedLeaf


def round_trip(state: Any, *, readonly: bool = False) -> Any:
    spec, leaves = tree.flatten(state)
    layout = tensors.arrange(leaves).layout({"dtr": tree.encode(spec)})
    buffer = bytearray(layout.size_bytes)
    layout.copy_into(buffer, leaves)
    part = tensors.read(bytes(buffer) if readonly else buffer)
    return tree.unflatten(tree.decode(part.metadata["dtr"]), part.tensors)


# --- what is kept ---


@pytest.mark.parametrize("state", [b"step_1", b"", bytearray(b"x"), 5, None, "text", [], {}, (), {"a": {}}, [[[]]], {"": {"": []}}])
def test_small_states(state: Any) -> None:
    """The state may be a single value or empty."""
    back = round_trip(state)
    assert back == state
    assert type(back) is type(state)


def test_a_training_state() -> None:
    """Model, optimizer with integer keys, schedule, random state: the usual."""
    state = {
        "model": {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.zeros(0)},
        "optimizer": {0: {"step": np.int64(3), "m": np.ones(4, np.float16)}, 1: {"step": 2**70, "m": None}},
        "schedule": [0.1, 0.01, math.inf, -0.0, math.nan],
        "random": random.Random(1).getstate(),
        "flags": {True: "yes", None: "nothing", (1, "a", (2.5,)): "key"},
    }
    back = round_trip(state)
    assert list(back) == list(state)
    assert repr(back) == repr(state)
    assert back["random"] == state["random"]
    assert [type(key) for key in back["flags"]] == [bool, type(None), tuple]


def test_names_in_the_file_are_paths() -> None:
    """A person who opens the file finds each array under its path; odd keys are escaped and never clash."""
    a, b, c, d, e, f, g, h = np.zeros((8, 1))
    state = {"model": {"layers": [{"w": a}, {"w": b}], "a/b": c, "a~b": d}, 1: e, "1": f, "__metadata__": g, "\ud800": h}
    assert list(tree.flatten(state)[1]) == [
        "model/layers/0/w", "model/layers/1/w", "model/a~1b", "model/a~0b", "1", "1~2", "__metadata__~2", "\\ud800",
    ]  # fmt: skip
    assert list(tree.flatten(b"x")[1]) == ["state"]
    assert repr(round_trip(state)) == repr(state)


def test_one_array_in_two_places() -> None:
    """An array that occurs twice comes back twice, with the same values."""
    w = np.arange(3.0)
    back = round_trip({"a": w, "b": [w, w[1:]]})
    assert back["a"].tolist() == back["b"][0].tolist() == [0, 1, 2]
    assert back["b"][1].tolist() == [1, 2]


def test_shared_containers_are_no_cycle() -> None:
    """The same list at two places is fine; only one that holds itself is not."""
    shared = [1, 2]
    assert round_trip({"a": shared, "b": (shared, shared)}) == {"a": [1, 2], "b": ([1, 2], [1, 2])}


def test_arrays_are_not_copied_before_they_are_staged() -> None:
    """flatten costs no memory and no time per byte."""
    w = np.zeros(1000)
    columns = np.zeros((10, 2))
    _, leaves = tree.flatten({"w": w, "left": columns[:, 0], "right": columns[:, 1]})
    assert leaves["w"].array is w
    assert np.shares_memory(leaves["left"].array, columns)


@pytest.mark.parametrize("readonly", [False, True])
def test_restored_arrays_are_views(readonly: bool) -> None:
    """Nothing is copied again after reading, and an array is writable if the memory is."""
    state = {"plain": np.arange(4.0), "raw": np.arange(4, dtype=">c16"), "text": np.array(["a", "bc"])}
    back = round_trip(state, readonly=readonly)
    for name, array in back.items():
        assert array.flags.writeable is not readonly, name
        assert not array.flags.owndata
        assert array.tolist() == state[name].tolist()


# --- what is refused ---


class Colour(enum.IntEnum):
    RED = 1


class Words(list):  # type: ignore[type-arg]
    pass


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024

REFUSED: list[tuple[Any, str]] = [
    ((n for n in range(3)), "generator"),
    ({1, 2}, "set"),
    (object(), "object"),
    (print, "builtin_function"),
    (3 + 4j, "complex"),
    (np.array([object()]), "Python objects"),
    (np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")]), "Python objects"),
    (np.array(["a"], dtype=np.dtypes.StringDType()), "Python objects|another package"),
    (np.ma.masked_array([1, 2], mask=[True, False]), "MaskedArray.*mask"),
    (np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "recarray"),
    (np.zeros(2, dtype=np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]})), "fields"),
    (Point(1, 2), r"Point.*tuple\(x\)"),
    (collections.defaultdict(list), r"defaultdict.*dict\(x\)"),
    (Words([1]), r"Words.*list\(x\)"),
    (Colour.RED, r"Colour.*int\(x\)"),
    (memoryview(b"x"), "memoryview"),
    ({b"k": 1}, r"key b'k' of type bytes"),
    ({np.int64(1): 1}, r"key <int64> of type int64"),
    ({frozenset(): 1}, r"key <frozenset>"),
    ({(1, frozenset()): 1}, r"key <frozenset>"),
]


@pytest.mark.parametrize(("leaf", "said"), REFUSED)
def test_unsupported_leaves_are_named(leaf: Any, said: str) -> None:
    """Each names its path, its type, and what to give instead where that is known."""
    state = {"model": {"w": [0, 1, 2, leaf]}}
    with pytest.raises(UnsupportedLeaf, match=said) as caught:
        tree.flatten(state)
    assert str(caught.value).startswith('state["model"]["w"][3] ')
    assert caught.value.path == 'state["model"]["w"][3]'


def test_paths_are_readable() -> None:
    """Keys appear as one would write them; a long path and a long key are cut."""
    with pytest.raises(UnsupportedLeaf) as caught:
        tree.flatten({'"': {1: {None: {(1, 2): {"x" * 100: {1}}}}}})
    assert caught.value.path == "state['\"'][1][None][(1, 2)][\"" + "x" * 56 + "...]"
    assert "\n" not in str(caught.value)


def nested(depth: int, wrap: Any) -> Any:
    state: Any = 1
    for _ in range(depth):
        state = wrap(state)
    return state


@pytest.mark.parametrize(
    "wrap", [lambda s: [s], lambda s: {"a": s}, lambda s: {1: s}, lambda s: (s,), lambda s: collections.OrderedDict(a=s)]
)
def test_nesting_is_bounded(wrap: Any) -> None:
    """64 levels come back; one more, or ten thousand, is refused without a RecursionError."""
    assert round_trip(nested(64, wrap)) == nested(64, wrap)
    for depth in (65, 10_000):
        with pytest.raises(UnsupportedLeaf, match="nested deeper than 64"):
            tree.flatten(nested(depth, wrap))


def test_the_deepest_leaf_may_be_a_described_array() -> None:
    """The deepest tree with the deepest keys and dtype still fits the JSON library."""
    array = np.zeros(2, dtype=[("a", [("b", [("c", "<f4")])])])
    state = nested(64, lambda s: {(1, (2, (3,))): s if s != 1 else array})
    back = round_trip(state)
    for _ in range(64):
        ((_, back),) = back.items()
    assert back.dtype == array.dtype


def test_a_stack_that_is_nearly_full() -> None:
    """Called by deeply recursive code, flatten refuses rather than ending in a RecursionError."""

    def dig(levels: int) -> None:
        if levels:
            dig(levels - 1)
        else:
            tree.flatten(nested(60, lambda s: [s]))

    with pytest.raises((UnsupportedLeaf, RecursionError)) as caught:
        dig(2000)
    assert isinstance(caught.value, RecursionError)  # our own digging met the limit first

    def deepest() -> int:
        try:
            return 1 + deepest()
        except RecursionError:
            return 0

    with pytest.raises(UnsupportedLeaf, match="nested too deep"):
        dig(deepest() - 60)


@pytest.mark.parametrize("make", [lambda s: s.append(s), lambda s: s.append({"a": (s,)})])
def test_cycles_are_refused(make: Any) -> None:
    """A container that holds itself is named."""
    state: list[Any] = [1]
    make(state)
    with pytest.raises(UnsupportedLeaf, match="holds itself"):
        tree.flatten({"loop": state})


def test_too_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that share lists may stand for more values than memory holds: bounded."""
    state: Any = 0
    for _ in range(40):
        state = [state, state]
    monkeypatch.setattr(tree, "_MAX_VALUES", 10_000)
    with pytest.raises(UnsupportedLeaf, match="more than 10000 values"):
        tree.flatten(state)


def test_a_header_that_nobody_could_read() -> None:
    """Scalars that fill more than a safetensors header holds are refused, with the advice to use arrays."""
    spec, leaves = tree.flatten(["x" * 1000] * 110_000)
    with pytest.raises(InvalidInput, match="into arrays"):
        tensors.arrange(leaves).layout({"dtr": tree.encode(spec)})


# --- hostile trees ---

LEAVES = {
    "u8": Tensor.of(np.zeros(8, np.uint8)),
    "u8x2": Tensor.of(np.zeros((2, 4), np.uint8)),
    "f4": Tensor.of(np.zeros(2, np.float32)),
    "bf": Tensor(label="BF16", array=np.zeros(2, np.uint16)),
}

HOSTILE: list[Any] = [
    {}, {"a": 1}, {"dict": {}, "list": []}, {"dict": []}, {"dict": None}, {"items": {}}, {"items": [1]}, {"items": [[1]]},
    {"items": [[1, 2, 3]]},
    {"items": [[[1], 2]]}, {"items": [[{"dict": {}}, 2]]}, {"items": [["a", 1], ["a", 2]]}, {"items": [[1, 1], [True, 2]]},
    {"tuple": 3}, {"tuple": {}}, {"ordered": [["a"]]}, {"int": 5}, {"int": "12"}, {"int": "0x"}, {"int": "0xg"}, {"int": "-"},
    {"int": "0x1_0"},
    {"int": " 0x1"}, {"int": "0x1\n"}, {"float": 1.5}, {"float": "NaN"}, {"float": "7ff0000000000000"}, {"float": "00"}, {"float": None},
    {"str": "zz"}, {"str": "ff"}, {"str": 7}, {"bytes": "absent"}, {"bytes": "f4"}, {"bytes": "u8x2"}, {"bytes": 3}, {"bytes": ["u8"]},
    {"array": "absent"}, {"array": None}, {"array": "bf"}, {"array": {}}, {"array": {"at": "u8"}},
    {"array": {"at": "u8", "dtype": "<f8", "shape": [2]}}, {"array": {"at": "u8", "dtype": "<f8", "shape": [-1]}},
    {"array": {"at": "u8", "dtype": "<f8", "shape": [True]}}, {"array": {"at": "u8", "dtype": "<f8", "shape": [1] * 65}},
    {"array": {"at": "u8", "dtype": "<f8", "shape": "1"}}, {"array": {"at": "u8", "dtype": "<f8", "shape": [1], "more": 1}},
    {"array": {"at": "u8", "dtype": "O", "shape": [1]}}, {"array": {"at": "u8", "dtype": "|O8", "shape": [1]}},
    {"array": {"at": "u8", "dtype": [["a", "|O8"]], "shape": [1]}}, {"array": {"at": "u8", "dtype": "float64", "shape": [1]}},
    {"array": {"at": "u8", "dtype": "<f99", "shape": [1]}}, {"array": {"at": "u8", "dtype": "|V9999999999", "shape": []}},
    {"array": {"at": "u8", "dtype": "<M8[parsec]", "shape": [1]}}, {"array": {"at": "u8", "dtype": [], "shape": [1]}},
    {"array": {"at": "u8", "dtype": [["a"]], "shape": [1]}}, {"array": {"at": "u8", "dtype": [["a", "<f4", [-1]]], "shape": [1]}},
    {"array": {"at": "u8", "dtype": [["a", "<f4"], ["a", "<f4"]], "shape": [1]}}, {"array": {"at": "u8", "dtype": 7, "shape": [1]}},
    {"array": {"at": "u8", "dtype": [["a", "|V1", [2**31 - 1, 2**31 - 1, 2**31 - 1]]], "shape": [1]}},
    {"array": {"at": "u8", "dtype": nested(20, lambda s: [["a", "<f4" if s == 1 else s]]), "shape": [1]}},
    {"array": {"at": "f4", "dtype": "<f8", "shape": [1]}}, {"array": {"at": "u8", "dtype": "|V0", "shape": [2**62, 2**62]}},
    {"scalar": {"dtype": "<f8", "hex": "00"}}, {"scalar": {"dtype": "<f8", "hex": 0}}, {"scalar": {"dtype": "|V0", "hex": ""}},
    {"scalar": 1},
    {"scalar": {"dtype": "|O8", "hex": "0000000000000000"}}, {"numpy_str": 5}, {"numpy_str": []}, {"numpy_bytes": 5},
    {"torch": {"at": "u8", "dtype": "complex999", "shape": [1]}}, {"torch": {"at": "u8", "dtype": [], "shape": [1]}}, {"torch": 5},
    {"torch": "absent"}, {"parameter": 1}, {"parameter": [{"torch": "absent"}, True]}, {"parameter": [{"torch": "f4"}, 1]},
]  # fmt: skip


@pytest.mark.parametrize("spec", HOSTILE, ids=[str(spec)[:60] for spec in HOSTILE])
def test_hostile_trees_are_refused(spec: Any) -> None:
    """Every malformed node is a ManifestInvalid, at the top and inside."""
    for tree_of in (spec, [spec], {"dict": {"a": spec}}, {"items": [[1, spec]]}, {"tuple": [1, spec]}):
        with pytest.raises(ManifestInvalid):
            tree.unflatten(tree_of, LEAVES)


@pytest.mark.parametrize(
    "text", ["", "{", "[1,", "nan", "NaN", '"\\ud800"', "[" * 100_000, "{" * 5000, '{"tuple":' * 900 + "1" + "}" * 900, "\0"]
)
def test_hostile_json_is_refused(text: str) -> None:
    """Text that is no JSON, or JSON that is nested without end."""
    with pytest.raises(ManifestInvalid):
        tree.unflatten(tree.decode(text), {})


def test_integrity_errors_are_one_kind() -> None:
    """Who restores catches damage of every kind with one class."""
    assert issubclass(ManifestInvalid, IntegrityError)
