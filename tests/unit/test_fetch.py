"""A state from its bytes: all of it, what a pattern selects, or into a state that is there already."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from dtr.checkpoint.format import tensors, tree
from dtr.checkpoint.format.paths import Patterns
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.restoring import apart
from dtr.checkpoint.restoring.apart import Target
from dtr.checkpoint.restoring.fetch import read_bytes, read_state
from dtr.checkpoint.restoring.source import PieceSource
from dtr.errors import ChecksumMismatch, IntegrityError, InvalidInput, StateMismatch
from tests.unit.test_source import PIECE, facts_of, memory_source


def saved(state: Any, *, pieces: bool = True) -> PieceSource:
    """The state as a source of a part."""
    return memory_source(part_of(state), facts_of(part_of(state), pieces=pieces))


def part_of(state: Any) -> bytes:
    spec, leaves = tree.flatten(state)
    layout = tensors.arrange(leaves).layout({TREE: tree.encode(spec)})
    whole = bytearray(layout.size_bytes)
    layout.copy_into(whole, leaves)
    return bytes(whole)


def restored(source: PieceSource, only: Any = None, into: Any = None) -> Any:
    patterns = None if only is None else Patterns.of(only, "only")
    return read_state({0: source}, rank=0, world_size=1, only=patterns, into=into)


def example(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "model": {"w": rng.random((300, 7)), "b": rng.random(11).astype(np.float32), "half": rng.random(3).astype(np.float16)},
        "optimizer": OrderedDict(m=rng.random(900), v=rng.random(13), step=seed),
        "layers": [rng.integers(0, 9, 5), (rng.random(4), seed, b"raw%d" % seed)],
        "strided": rng.random((20, 6))[::2, ::3],
        7: {"complex": rng.random(3) + 1j, "empty": np.empty((0, 3)), "scalar": np.float32(seed), "zero": np.array(float(seed))},
    }


def assert_equal(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_equal(ours, theirs)
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype
        assert_array_equal(found, wanted)
    else:
        assert found == wanted


def watched(data: bytes, *, pieces: bool = True) -> tuple[PieceSource, list[int]]:
    """A source of ``data``, and every byte's number of reads as it goes."""
    source, reads = memory_source(data, facts_of(data, pieces=pieces)), [0] * len(data)
    fill = source._fill

    def counting(view: memoryview, offset: int) -> None:
        for at in range(offset, offset + len(view)):
            reads[at] += 1
        fill(view, offset)

    source._fill = counting
    return source, reads


def _arrays(state: Any) -> list[Any]:
    return [state["model"]["w"], state["layers"][0], state["layers"][1][0], state["strided"], state[7]["zero"]]


@pytest.mark.parametrize("pieces", [True, False])
def test_all_of_it_is_what_was_saved(pieces: bool) -> None:
    """Into new memory, every array writable and aligned."""
    found = restored(saved(example(), pieces=pieces))
    assert_equal(found, example())
    assert found["model"]["w"].flags.writeable
    assert found["model"]["w"].flags.aligned


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("only", [None, "*"])
@pytest.mark.parametrize("into", [True, False])
def test_the_first_piece_is_read_once(into: bool, only: str | None, pieces: bool) -> None:
    """Though the header is read first, and then what lies beside it: a small part is nothing but its first piece."""
    source, reads = watched(part_of(example()), pieces=pieces)
    assert_equal(restored(source, only, example(1) if into else None), example())
    assert set(reads[:PIECE]) == {1}


def test_what_was_kept_goes_with_the_source() -> None:
    """The first piece is in memory until it is closed; without being asked to, none is."""
    source, reads = watched(part_of(example()))
    head = bytes(source.head())
    source.read_into(bytearray(len(head)))
    assert set(reads[: len(head)]) == {2}
    source.head(keep=True)
    source.read_into(bytearray(len(head)))
    assert set(reads[: len(head)]) == {3}
    source.close()
    assert source._head is None


class TestOnly:
    def test_selects_by_path(self) -> None:
        """A folder, a pattern across folders, one value; several together."""
        source = saved(example())
        assert list(restored(source, "model")) == ["model"]
        assert_equal(restored(source, "model/*")["model"], example()["model"])
        assert_equal(restored(source, "*/m"), {"optimizer": OrderedDict(m=example()["optimizer"]["m"])})
        found = restored(source, ["7/scalar", "optimizer/step"])
        assert found == {"optimizer": OrderedDict(step=0), 7: {"scalar": np.float32(0)}}

    def test_a_list_keeps_its_length(self) -> None:
        """The place of what was left out is None, also in a tuple."""
        found = restored(saved(example()), "layers/1/0")
        assert found["layers"][0] is None
        assert found["layers"][1][1:] == (None, None)
        assert_array_equal(found["layers"][1][0], example()["layers"][1][0])

    def test_reads_only_what_it_needs(self) -> None:
        """Two arrays at both ends of a large file: nothing between them is read."""
        state = {"a": np.arange(50.0), "big": np.zeros(100_000), "z": np.arange(50.0, dtype=np.float32)}
        source, reads = watched(part_of(state))
        found = restored(source, ["a", "z"])
        assert_array_equal(found["z"], state["z"])
        assert sum(reads) < 10_000

    @pytest.mark.parametrize("pattern", ["modell", "model/x", "model/w/deeper"])
    def test_nothing_selected_is_an_error_that_says_what_there_is(self, pattern: str) -> None:
        """A misspelt path is no empty state."""
        with pytest.raises(InvalidInput, match="only selects nothing.*model, optimizer, layers"):
            restored(saved(example()), pattern)

    @pytest.mark.parametrize("given", ["", "/", [], 3, [""], [None], {"a": 1}])
    def test_what_is_no_pattern_is_refused(self, given: Any) -> None:
        """The error names the argument."""
        with pytest.raises(InvalidInput, match="only must be a path pattern"):
            Patterns.of(given, "only")

    def test_names_with_slashes_and_odd_letters_can_be_selected(self) -> None:
        """They stand in a path as they do in the file."""
        state = {"a/b": {"ü~": np.arange(3)}, "a": {"b": np.arange(4)}}
        assert list(restored(saved(state), "a~1b")) == ["a/b"]
        assert list(restored(saved(state), "a/b")) == ["a"]


class TestInto:
    @pytest.mark.parametrize("pieces", [True, False])
    def test_fills_what_is_there(self, pieces: bool) -> None:
        """The same objects, with the saved values; scalars are replaced, tuples only if something in them is."""
        given = example(1)
        before = _arrays(given)
        found = restored(saved(example(), pieces=pieces), into=given)
        assert found is given
        assert_equal(found, example())
        assert all(ours is theirs for ours, theirs in zip(before, _arrays(found), strict=True))

    def test_fills_non_contiguous_arrays_and_nothing_between(self) -> None:
        """A transposed view and every second column of a larger array."""
        ground = np.full((6, 8), -1.0)
        given = {"t": np.zeros((4, 3)).T, "s": ground[:, ::2]}
        state = {"t": np.arange(12.0).reshape(3, 4), "s": np.arange(24.0).reshape(6, 4)}
        restored(saved(state), into=given)
        assert_equal({k: np.ascontiguousarray(v) for k, v in given.items()}, state)
        assert (ground[:, 1::2] == -1).all()

    def test_only_and_into_together(self) -> None:
        """What was not selected stays as it is; the state may have more than was saved."""
        given = {**example(1), "more": 5}
        restored(saved(example()), only=["model", "layers/0"], into=given)
        assert_equal(given["model"], example()["model"])
        assert_array_equal(given["layers"][0], example()["layers"][0])
        assert_equal(given["layers"][1], example(1)["layers"][1])
        assert_equal(given["optimizer"], example(1)["optimizer"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s["model"].update(w=np.zeros((300, 8))), r"state\['model'\]\['w'\] has shape \(300, 8\), and \(300, 7\) was saved"),
            (lambda s: s["model"].update(b=np.zeros(11)), r"state\['model'\]\['b'\] has dtype float64, and float32 was saved"),
            (lambda s: s["model"].update(w=None), r"state\['model'\]\['w'\] is a NoneType, and an array was saved"),
            (lambda s: s["optimizer"].pop("v"), r"state\['optimizer'\] lacks 'v'"),
            (lambda s: s.update(new=1), r"state has 'new', which was not saved"),
            (lambda s: s["layers"].append(1), r"state\['layers'\] has 3 items, and 2 were saved"),
            (lambda s: s["optimizer"].update(step=np.zeros(1)), r"state\['optimizer'\]\['step'\] is a ndarray, and a single value"),
            (lambda s: s["layers"][0].setflags(write=False), r"state\['layers'\]\[0\] is read-only"),
            (lambda s: s.update(layers=(1, 2)), r"state\['layers'\] is a tuple, and a list was saved"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_changed(self, change: Any, message: str) -> None:
        """The error names the path; no array was touched."""
        given = example(1)
        change(given)
        before = given["strided"].copy(), given["model"]["half"].copy()
        with pytest.raises(StateMismatch, match=message):
            restored(saved(example()), into=given)
        assert_array_equal(before[0], given["strided"])
        assert_array_equal(before[1], given["model"]["half"])

    def test_damage_says_that_something_was_overwritten(self) -> None:
        """Only reading finds it, so arrays before it are filled by then."""
        data = bytearray(part_of(example()))
        data[-1] ^= 1
        with pytest.raises(ChecksumMismatch) as failed:
            restored(memory_source(bytes(data), facts_of(part_of(example()))), into=example(1))
        assert failed.value.facts["touched"]

    def test_one_array_saved_under_two_names_fills_both(self) -> None:
        """Whether or not the given state shares them, too."""
        shared = np.arange(2000.0)
        source = saved({"a": shared, "b": shared})
        given = {"a": np.zeros(2000), "b": np.zeros(2000)}
        restored(source, into=given)
        assert_equal(given, {"a": shared, "b": shared})
        one = np.zeros(2000)
        restored(source, into={"a": one, "b": one})
        assert_array_equal(one, shared)


def views(ground: Any) -> dict[str, Any]:
    """Some of one buffer: overlapping, side by side, interleaved."""
    return {
        "head": ground[:60],
        "tail": ground[50:],
        "even": ground[::2],
        "square": ground.reshape(10, 10),
        "turned": ground.reshape(10, 10).T,
    }


class TestTargetsThatShareMemory:
    """What would be written twice is refused before a byte is read, unless it was saved so."""

    APART: Final = {"a": np.arange(100.0), "b": np.arange(100.0) * 10}

    @pytest.mark.parametrize(
        "made",
        [
            lambda ground: {"a": ground[:100], "b": ground[:100]},
            lambda ground: {"a": ground[:100], "b": ground[50:150]},
            lambda ground: {"a": ground[50:150], "b": ground[:100]},
            lambda ground: {"a": ground[:199:2], "b": ground[100:]},
            lambda ground: {"a": ground[:200].view(np.uint8)[3:803].view(np.float64), "b": ground[:100]},
        ],
    )
    def test_are_refused_where_the_saved_do_not(self, made: Any) -> None:
        """The same array twice, views that overlap in either order, strided ones, a part of an item; both paths are named."""
        given = made(ground := np.full(200, -1.0))
        with pytest.raises(StateMismatch, match=r"state\['a'\] shares memory with state\['b'\]") as refused:
            restored(saved(self.APART), into=given)
        assert refused.value.facts["path"] == "state['a']"
        assert (ground == -1).all()

    @pytest.mark.parametrize("kind", [np.asarray, "torch"])
    def test_are_filled_where_the_saved_share_it_alike(self, kind: Any) -> None:
        """Views of one buffer into the same views of another, of one array under two names, and of a transposed one."""
        make = pytest.importorskip("torch").from_numpy if kind == "torch" else kind
        state, given = views(make(np.arange(100.0))), views(make(np.zeros(100)))
        restored(saved(state), into=given)
        assert_array_equal(given["square"], np.arange(100.0).reshape(10, 10))
        turned = make(np.zeros((10, 10))).T
        restored(saved({"a": state["square"], "b": state["square"]}), into={"a": turned, "b": turned})
        assert_array_equal(turned, state["square"])

    def test_are_refused_where_the_saved_share_it_otherwise(self) -> None:
        """Tied at another offset, or only one of them turned."""
        source, ground = saved(views(np.arange(100.0))), np.zeros(100)
        for change in ({"tail": ground[40:90]}, {"turned": ground.reshape(10, 10)}):
            with pytest.raises(StateMismatch, match="shares memory"):
                restored(source, into={**views(ground), **change})

    def test_may_interleave(self) -> None:
        """Rows, columns and fields of one buffer share no byte, though their extents overlap."""
        ground, pairs = np.zeros((100, 3)), np.zeros(100, [("x", "<f8"), ("y", "<f8")])
        restored(saved(self.APART), into=(given := {"a": ground[:, 0], "b": ground[:, 2]}))
        assert_equal({name: array.copy() for name, array in given.items()}, self.APART)
        assert not ground[:, 1].any()
        restored(saved(self.APART), into={"a": pairs["x"], "b": pairs["y"]})
        assert_array_equal(pairs["y"], self.APART["b"])

    def test_are_refused_where_elements_of_one_share_it(self) -> None:
        """A sliding window can't hold what was saved of another one."""
        window = np.lib.stride_tricks.sliding_window_view(np.zeros(109), 10, writeable=True)
        with pytest.raises(StateMismatch, match=r"state has elements that share memory"):
            restored(saved(np.arange(1000.0).reshape(100, 10)), into=window)

    def test_of_torch_are_told_apart_by_what_is_seen(self) -> None:
        """A tensor and its conjugate are one memory, and so are a tensor and an array of numpy's."""
        torch = pytest.importorskip("torch")
        tied = torch.arange(4) * 1j
        given = torch.zeros(4, dtype=torch.complex64)
        with pytest.raises(StateMismatch, match="shares memory"):
            restored(saved({"a": tied, "b": tied}), into={"a": given, "b": given.conj()})
        ground = np.zeros(4)
        with pytest.raises(StateMismatch, match="shares memory"):
            restored(saved({"a": np.arange(4.0), "b": torch.arange(4.0).double()}), into={"a": ground, "b": torch.from_numpy(ground)})
        with pytest.raises(StateMismatch, match="without plain memory"):
            restored(saved({"a": tied}), into={"a": tied.to("meta")})

    def test_containers_too(self) -> None:
        """One dict or list under two names takes what was saved alike, and nothing else."""
        one: dict[str, Any] = {"n": 0, "w": np.zeros(5)}
        shared = {"n": 3, "w": np.arange(5.0)}
        restored(saved({"a": shared, "b": shared}), into={"a": one, "b": one})
        assert_equal(one, shared)
        items = [0]
        for other in ([2], [1.0]):
            with pytest.raises(StateMismatch, match=r"state\['b'\] is the same list as state\['a'\]"):
                restored(saved({"a": [1], "b": other}), into={"a": items, "b": items})
        assert items == [0]

    @pytest.mark.parametrize("layout", ["apart", "one buffer", "one array"])
    def test_thousands_are_looked_at_quickly(self, layout: str) -> None:
        """Each is compared with its neighbours, not with all."""
        count, ground = 5_000, np.zeros(10_000)
        parts = [
            ground[2 * n : 2 * n + 2] if layout == "one buffer" else ground if layout == "one array" else np.zeros(2) for n in range(count)
        ]
        wanted = [*parts, ground] if layout == "one buffer" else parts
        targets = [Target(path=f"{n:05}", given=array, saved=array) for n, array in enumerate(wanted)]
        with mock.patch.object(apart, "_shared_alike", return_value=True) as compared:
            apart.check_apart(targets)
        assert compared.call_count <= 2 * count


@settings(max_examples=200, deadline=None)
@given(
    slices=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4), st.integers(-4, 4).filter(bool)), min_size=2, max_size=4),
)
def test_apart_is_what_writing_each_finds(slices: list[tuple[int, int, int]]) -> None:
    """Against an oracle that writes every target and reads it back: refused if and only if one of them lost its values."""
    ground = np.zeros(64, np.int64)
    given = [ground[start : start + size * abs(step) : abs(step)][:: 1 if step > 0 else -1] for start, size, step in slices]
    saved_arrays = [np.arange(array.size) + 1000 * n for n, array in enumerate(given)]
    for target, values in zip(given, saved_arrays, strict=True):
        target[...] = values
    spoilt = any((target != values).any() for target, values in zip(given, saved_arrays, strict=True))
    targets = [Target(path=str(n), given=pair[0], saved=pair[1]) for n, pair in enumerate(zip(given, saved_arrays, strict=True))]
    if spoilt:
        with pytest.raises(StateMismatch):
            apart.check_apart(targets)
    else:
        apart.check_apart(targets)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12), only=st.sets(st.integers(0, 11)))
def test_any_layout_is_read_right(sizes: list[int], only: set[int]) -> None:
    """Arrays of any size against pieces of 1,000 bytes: selected ones are read, into new memory and in place."""
    state = {f"x{n}": np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8) for n, size in enumerate(sizes)}
    wanted = [f"x{n}" for n in sorted(only) if n < len(sizes)] or ["x0"]
    source = saved(state)
    found = restored(source, wanted)
    assert_equal(found, {name: state[name] for name in state if name in wanted})
    given = {name: np.zeros_like(array) for name, array in state.items()}
    restored(source, wanted, given)
    assert_equal(given, {name: array if name in wanted else np.zeros_like(array) for name, array in state.items()})


def test_a_tee_gets_every_byte_once() -> None:
    """What fills the cache."""
    data = part_of(example())
    heard: dict[int, bytes] = {}
    read_bytes(memory_source(data, facts_of(data)), lambda view, offset: heard.__setitem__(offset, bytes(view)))
    assert b"".join(heard[at] for at in sorted(heard)) == data


def test_a_safetensors_file_of_others_is_no_part() -> None:
    """Its bytes are right, but nothing says what tree they are."""
    leaves = {"x": tensors.Tensor.of(np.arange(3))}
    layout = tensors.arrange(leaves).layout({})
    data = bytearray(layout.size_bytes)
    layout.copy_into(data, leaves)
    with pytest.raises(IntegrityError, match="no part of a checkpoint"):
        restored(memory_source(bytes(data), facts_of(bytes(data))))


class TestTorch:
    def test_tensors_are_filled_in_place(self) -> None:
        """Also bfloat16, a parameter that needs its gradient, a transposed one, and two names of one tensor."""
        torch = pytest.importorskip("torch")
        shared = torch.arange(600.0)
        state = {
            "w": torch.randn(30, 7), "half": torch.randn(9).to(torch.bfloat16), "p": torch.nn.Parameter(torch.randn(4)),
            "t": torch.randn(6, 5), "c": torch.randn(3, dtype=torch.complex128), "a": shared, "b": shared, "n": torch.tensor(3),
        }  # fmt: skip
        given = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        given["p"] = parameter = torch.nn.Parameter(torch.zeros(4))
        given["t"] = torch.zeros(5, 6).T
        restored(saved(state), into=given)
        assert given["p"] is parameter
        assert parameter.requires_grad
        for name, tensor in state.items():
            assert torch.equal(given[name].detach(), tensor.detach()), name

    def test_another_dtype_or_shape_is_refused(self) -> None:
        """Named as torch names it."""
        torch = pytest.importorskip("torch")
        source = saved({"w": torch.zeros(3)})
        for other, message in ((torch.zeros(4), "shape"), (torch.zeros(3, dtype=torch.float64), "torch.float64"), (np.zeros(3), "ndarray")):
            with pytest.raises(StateMismatch, match=message):
                restored(source, into={"w": other})
