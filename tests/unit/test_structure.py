"""Layouts that are kept per structure write the same bytes as if each had been made anew; whatever differs is noticed."""

from __future__ import annotations

import collections
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.format import copying, outline, structure, tensors, tree
from dtr.checkpoint.format.paths import Patterns
from dtr.checkpoint.format.replication import Shares
from dtr.checkpoint.format.structure import Structures
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.staging.device import Cuda
from dtr.errors import InvalidInput, UnsupportedLeaf

ABOUT = {"job": "j"}


def written(
    known: Structures, state: Any, about: dict[str, str] | None = None, *, threads: int = 1, shares: Shares | None = None
) -> bytearray:
    laid = known.lay_out(state, about or ABOUT, shares)
    buffer = bytearray(b"\xaa" * laid.size_bytes)
    assert laid.copy_into(buffer, Cuda(), threads=threads) is None
    return buffer


def anew(state: Any, about: dict[str, str] | None = None) -> bytearray:
    spec, leaves = tree.flatten(state)
    layout = tensors.arrange(leaves).layout({**(about or ABOUT), TREE: tree.encode(spec)})
    buffer = bytearray(layout.size_bytes)
    layout.copy_into(buffer, leaves)
    return buffer


def read(buffer: bytearray) -> Any:
    part = tensors.read(buffer)
    return tree.unflatten(tree.decode(part.metadata[TREE]), part.tensors)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every state that is taken apart in full."""
    seen: list[Any] = []
    real = structure._learn

    def learn(state: Any, shares: Any) -> Any:
        seen.append(state)
        return real(state, shares)

    monkeypatch.setattr(structure, "_learn", learn)
    return seen


def training_state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "model": {f"layer{n}": {"w": rng.random((n + 1, 8), np.float32).T, "b": rng.random(n)} for n in range(4)},
        "optimizer": collections.OrderedDict((n, {"m": rng.random(5), "v": [rng.random(3), step]}) for n in range(3)),
        "random": (step, rng.bytes(16), bytearray(rng.bytes(5))),
        "structured": np.array([(step, 1.5)], np.dtype([("a", "u1"), ("b", "f8")], align=True)),
        "scalars": [step, step * 0.5, f"step {step}", None, step % 2 == 0, np.float32(step), -0.0 if step % 2 else 0.0, float("nan")],
        "mask": rng.random(7) > 0.5,
        "odd": np.frombuffer(rng.bytes(10), np.dtype("V5")),
        "swapped": rng.random(4).astype(">f8"),
        "strided": rng.random((40, 6))[::3, ::2],
        "empty": np.zeros((0, 3)),
        "zero-d": np.array(rng.random()),
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_a_known_structure_is_written_like_a_new_one(walks: list[Any], monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Ten saves of other values, one walk; every byte as if the layout had been made for that save."""
    for name in ("LARGE_BYTES", "_PIECE_BYTES", "_WORTH_THREADS_BYTES"):
        monkeypatch.setattr(copying, name, 40)
    known = Structures()
    for step in range(10):
        about = {"job": "j", "step": str(10 ** (step // 3))}
        assert written(known, training_state(step), about, threads=threads) == anew(training_state(step), about)
    assert len(walks) == 1


BASE: dict[str, Any] = {"a": np.zeros(3), "b": [1, "x", (b"12", None)], "c": {"d": np.zeros((2, 2), np.int32), "e": np.float32(1)}}
OTHER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a key more": lambda s: {**s, "f": 1},
    "a key less": lambda s: {"a": s["a"], "b": s["b"]},
    "another key": lambda s: {"a": s["a"], "x": s["b"], "c": s["c"]},
    "another order": lambda s: {"b": s["b"], "a": s["a"], "c": s["c"]},
    "an ordered dict": collections.OrderedDict,
    "a tuple for a list": lambda s: {**s, "b": tuple(s["b"])},
    "a longer list": lambda s: {**s, "b": [*s["b"], 2]},
    "longer bytes": lambda s: {**s, "b": [1, "x", (b"123", None)]},
    "a bytearray": lambda s: {**s, "b": [1, "x", (bytearray(b"12"), None)]},
    "another dtype": lambda s: {**s, "a": s["a"].astype(np.float32)},
    "another byte order": lambda s: {**s, "a": s["a"].astype(">f8")},
    "an integer of that size": lambda s: {**s, "a": s["a"].astype(np.int64)},
    "another shape": lambda s: {**s, "a": s["a"].reshape(3, 1)},
    "an array for a number": lambda s: {**s, "c": {**s["c"], "e": np.ones((), np.float32)}},
    "a number for an array": lambda s: {**s, "a": 1.0},
    "a bool for an int": lambda s: {**s, "b": [True, "x", (b"12", None)]},
    "a float for an int": lambda s: {**s, "b": [1.0, "x", (b"12", None)]},
    "another kind of scalar": lambda s: {**s, "c": {**s["c"], "e": np.float64(1)}},
    "a dict for a scalar": lambda s: {**s, "b": [{}, "x", (b"12", None)]},
    "shared memory": lambda s: {**s, "a": (both := np.zeros(3)), "b": [both, "x", (b"12", None)]},
    "a bool key": lambda s: {**s, "c": {True: s["c"]["d"]}},
    "an int key": lambda s: {**s, "c": {1: s["c"]["d"]}},
    "nothing": lambda s: {},
    "bytes": lambda s: b"12",
}


@pytest.mark.parametrize("name", OTHER)
def test_whatever_differs_is_noticed(name: str) -> None:
    """A structure that is known under another one, and the other way round, is never mistaken for it."""
    known = Structures()
    other = OTHER[name](BASE)
    for state in (BASE, other, BASE, other):
        assert written(known, state) == anew(state)


def test_structures_that_alternate_are_all_kept(walks: list[Any]) -> None:
    """A trainer that saves its model often and everything seldom pays for neither twice; the fifth kind pushes out the first."""
    known = Structures()
    kinds = [{f"k{n}": np.zeros(2), "step": 0} for n in range(5)]
    for step in range(12):
        state = {**kinds[step % 4], "step": step}
        assert written(known, state) == anew(state)
    assert len(walks) == 4
    written(known, kinds[4])
    written(known, kinds[0])
    assert len(walks) == 6


def test_a_failed_match_leaves_no_trace() -> None:
    """A number that was refreshed before the difference was met is written by the next save all the same."""
    known = Structures()
    first = {"step": 1, "w": np.zeros(2)}
    for state in (first, {"step": 2, "w": np.zeros(3)}, {"step": 2, "w": np.ones(2)}):
        assert read(written(known, state))["step"] == state["step"]


def test_keys_whose_equality_says_too_little(walks: list[Any]) -> None:
    """0.0 and -0.0, 1.0 and True are one key for a dict; such a structure is looked at in full each time."""
    known = Structures()
    for key in (0.0, -0.0, (1,), (True,)):
        assert repr(list(read(written(known, {key: np.zeros(1)})))) == repr([key])
    assert len(walks) == 4


def test_structured_dtypes_that_numpy_finds_equal() -> None:
    """What the tree records of a dtype is compared, not only what numpy compares."""
    known = Structures()
    plain = np.dtype([("a", "f4"), ("b", "f4")])
    titled = np.dtype([(("title", "a"), "f4"), ("b", "f4")])
    for dtype in (plain, titled, plain):
        assert read(written(known, {"x": np.zeros(2, dtype)}))["x"].dtype.fields == dtype.fields


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {"a": w, "b": w.copy(), "c": w[1:3]},
        lambda w: {"a": w, "b": w, "c": w[2:4]},
        lambda w: {"a": w, "b": w[::-1], "c": w[1:3]},
        lambda w: {"a": w.copy(), "b": w.copy(), "c": w[1:3].copy()},
        lambda w: {"a": w.copy(), "b": w, "c": w[1:3]},
    ],
)
def test_who_shares_memory_is_looked_up_in_every_save(change: Callable[[Any], Any]) -> None:
    """The same names, shapes and dtypes, but other ties: the file says so."""
    known = Structures()
    w = np.arange(5.0)
    for state in ({"a": w, "b": w, "c": w[1:3]}, change(np.arange(5.0) + 1), {"a": w, "b": w, "c": w[1:3]}):
        buffer = written(known, state)
        assert buffer == anew(state)
        back = read(buffer)
        assert {name: array.tolist() for name, array in back.items()} == {name: array.tolist() for name, array in state.items()}
        for one, other in ("ab", "ac", "bc"):
            assert np.shares_memory(back[one], back[other]) == np.shares_memory(state[one], state[other])


def test_memory_that_nobody_spans_is_kept_too(walks: list[Any]) -> None:
    """Windows of a buffer that moves from save to save: one walk, the right bytes."""
    known = Structures()
    for step in range(4):
        buffer = np.arange(50.0) * step
        state = {"a": buffer[:30], "b": buffer[20:]}
        assert written(known, state) == anew(state)
    assert len(walks) == 1


def test_a_refused_value_is_named_by_its_path() -> None:
    """Also where the structure is known otherwise."""
    known = Structures()
    written(known, {"a": [1, 2], "w": np.zeros(1)})
    with pytest.raises(UnsupportedLeaf) as caught:
        known.lay_out({"a": [1, object()], "w": np.zeros(1)}, ABOUT)
    assert caught.value.path == 'state["a"][1]'
    with pytest.raises(UnsupportedLeaf, match=r'state\["w"\]'):
        known.lay_out({"a": [1, 2], "w": np.zeros(1, object)}, ABOUT)


def test_shares_of_a_replicated_state(walks: list[Any]) -> None:
    """Each rank's rows, cut from this save's arrays; patterns are part of what is known."""
    known = Structures()
    for step in range(3):
        state = {"own": np.full(3, step), "common": {"w": np.arange(10) + step}}
        found = {}
        for rank in range(2):
            shares = Shares(patterns=Patterns.of("common", "replicated"), world_size=2, rank=rank)
            part = tensors.read(written(known, state, shares=shares))
            found |= {name: tensor.array.tolist() for name, tensor in part.tensors.items()}
        assert found == {
            "own": [step] * 3, "common/w[0:5]": list(range(step, step + 5)), "common/w[5:10]": list(range(step + 5, step + 10)),
        }  # fmt: skip
    assert len(walks) == 2
    with pytest.raises(InvalidInput, match="selects nothing"):
        known.lay_out({"a": 1}, ABOUT, Shares(patterns=Patterns.of("nothing", "replicated"), world_size=2, rank=0))


def test_the_size_does_not_follow_each_digit() -> None:
    """A slot of exactly the part's size need not be resized because a number got longer."""
    known = Structures()
    sizes = {known.lay_out({"step": step, "loss": 1 / (step + 1), "w": np.zeros(9)}, {"step": str(step)}).size_bytes for step in range(300)}
    assert len(sizes) <= 2
    state = {f"w{n}": np.zeros(1) for n in range(2000)}
    sizes = {known.lay_out({**state, "text": "x" * step}, ABOUT).size_bytes for step in range(0, 2000, 20)}
    assert len(sizes) <= 3


def test_a_large_state_of_plain_arrays_is_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 arrays, a save of a known structure calls none of our functions per array."""
    import sys

    known = Structures()
    state = {f"w{n}": np.zeros(4) for n in range(2000)}
    buffer = bytearray(known.lay_out(state, ABOUT).size_bytes)
    known.lay_out(state, ABOUT).copy_into(buffer, Cuda())
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and "<" not in frame.f_code.co_name

    sys.setprofile(count)
    try:
        known.lay_out(state, ABOUT).copy_into(buffer, Cuda())
    finally:
        sys.setprofile(None)
    assert calls < 200


def test_nothing_of_a_state_is_kept() -> None:
    """What is known of a structure holds on to none of the arrays that it was seen with."""
    known = Structures()
    arrays = [np.zeros(100) for _ in range(4)]
    windows = np.arange(50.0)
    alive = [weakref.ref(array) for array in (*arrays, windows)]
    for _ in range(2):
        written(known, {"a": arrays[:2], "b": {"c": arrays[2:]}, "v": windows[:30], "w": windows[20:]})
    del arrays, windows
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


def test_an_outline_matches_only_what_it_was_made_of() -> None:
    """Its own answer, without the cache around it."""
    state = {"a": [np.zeros(2), 3], "b": np.ones(1)}
    made = outline.outline_of(state, tree.walk(state))
    assert made is not None
    arrays, changed = made.match({"a": [np.full(2, 5.0), 4], "b": np.zeros(1)})
    assert changed
    assert [array.tolist() for array in arrays] == [[0.0], [5.0, 5.0]]
    assert [made.order[n] for n in range(2)] == [1, 0], "the walk met the list's array first"
    with pytest.raises(outline.Different):
        made.match({"a": [np.zeros(2), 3, 4], "b": np.ones(1)})
