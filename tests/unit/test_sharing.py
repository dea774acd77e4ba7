"""Values that lie in the same memory are stored once, and share it again when they come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.format import tensors, tree
from dtr.checkpoint.format.sharing import Extent, groups, span
from dtr.checkpoint.format.tensors import Tensor
from dtr.errors import ManifestInvalid
from tests.unit.test_tree import round_trip

KINDS = ["f4", "f8", "i2", "u1", "c8", "c16", ">f4", "?", "M8[s]", "S5", [("a", "i1"), ("b", "f4")]]


def file_of(state: Any) -> dict[str, Tensor]:
    return tree.flatten(state)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights(kind: Any) -> None:
    """Two names, one copy; what is written through one name is seen under the other again."""
    w = np.zeros((4, 6), np.dtype(kind))
    state = {"embed": w, "head": w, "again": [w[:]]}
    assert list(file_of(state)) == ["embed"]
    back = round_trip(state)
    assert np.shares_memory(back["embed"], back["head"])
    back["head"].view(np.uint8).reshape(-1)[5] = 1
    assert back["embed"].tobytes() == back["again"][0].tobytes() != w.tobytes()


def test_views_of_an_array_that_is_saved_as_well() -> None:
    """Slices, transposes, reversals, single elements, other dtypes of the same bytes: all views of the one tensor again."""
    w = np.arange(60, dtype=np.float64).reshape(6, 10)
    views = {
        "rows": w[2:4], "columns": w[:, 3:5], "transposed": w.T, "backwards": w[::-2, ::3], "one": w[5, 9, ...], "empty": w[:0],
        "bytes": w.view(np.uint8), "integers": w[1].view(np.int32), "flat": w.reshape(-1), "deep": w[None, :, None],
    }  # fmt: skip
    state = {"views": views, "whole": w}
    assert list(file_of(state)) == ["views/empty", "whole"] or list(file_of(state)) == ["views/empty", "views/flat"]
    back = round_trip(state)
    for name, view in views.items():
        assert back["views"][name].tobytes() == view.tobytes(), name
        assert back["views"][name].dtype == view.dtype
        assert back["views"][name].shape == view.shape
    back["whole"][:] = -1
    assert all((view == -1).all() for name, view in back["views"].items() if name not in {"bytes", "integers"})


def test_overlapping_windows_of_a_buffer_that_is_not_saved() -> None:
    """No value spans the memory: it is stored once as bytes, and all are views of it, aligned."""
    buffer = np.arange(100, dtype=np.float32)
    state = {"odd": np.zeros(3, np.uint8), "a": buffer[3:60], "b": buffer[40:90], "c": buffer[50:95:5]}
    found = file_of(state)
    assert list(found) == ["odd", "a~shared"]
    assert found["a~shared"].array.nbytes == (91 - 3) * 4
    back = round_trip(state)
    for name in "abc":
        assert back[name].tolist() == state[name].tolist()
        assert back[name].flags.aligned
        assert back[name].flags.writeable
    back["a"][37] = -7
    assert back["b"][0] == -7


def test_neighbours_share_nothing() -> None:
    """Rows of one buffer, its even and its odd columns: each is a tensor of its own, under its own name."""
    buffer = np.arange(24.0).reshape(4, 6)
    for state in ({"a": buffer[:2], "b": buffer[2:]}, {"a": buffer[:, ::2], "b": buffer[:, 1::2]}, {"a": buffer[:, 0], "b": buffer[:, 4]}):
        assert list(file_of(state)) == ["a", "b"]
        back = round_trip(state)
        assert back["a"].tolist() == state["a"].tolist()
        assert not np.shares_memory(back["a"], back["b"])


def test_a_broadcast_array_beside_its_source() -> None:
    """Strides of 0 come back as such; alone it is stored in full."""
    w = np.arange(4.0)
    back = round_trip({"w": w, "wide": np.broadcast_to(w, (100, 4))})
    assert back["wide"].strides == (0, 8)
    assert back["wide"].tolist() == [w.tolist()] * 100
    assert file_of({"wide": np.broadcast_to(w, (100, 4))})["wide"].array.nbytes == 3200


def test_a_restored_state_is_saved_again_as_it_was() -> None:
    """All its arrays are views of one buffer; that makes them no group."""
    state = {"a": np.arange(10.0), "b": np.arange(7, dtype=np.int8), "c": np.zeros((0, 3))}
    assert list(file_of(round_trip(state))) == ["a", "b", "c"]


def test_random_views_of_one_buffer() -> None:
    """Whatever shares, overlaps or lies apart: every value comes back bit by bit."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        buffer = rng.integers(0, 2**32, 64, dtype=np.uint32)
        state = {}
        for n in range(int(rng.integers(1, 6))):
            low, high = sorted(rng.integers(0, 64, 2).tolist())
            view = buffer[low : high + 1 : int(rng.integers(1, 4))]
            view = view[::-1] if rng.random() < 0.2 else view
            state[f"v{n}"] = view.view(np.float32) if rng.random() < 0.5 and view.flags.c_contiguous else view
        back = round_trip(state, readonly=bool(rng.random() < 0.2))
        assert {name: view.tobytes() for name, view in back.items()} == {name: view.tobytes() for name, view in state.items()}


def test_a_span_has_every_element() -> None:
    """First address and the one behind the last, in all directions."""
    w = np.zeros((3, 4, 5), np.int16)
    assert span(100, w.shape, w.strides, 2) == (100, 100 + w.nbytes)
    back = w[::-1, :, ::-2]
    low, high = span(w.nbytes, back.shape, back.strides, 2)
    assert (low, high) == (w.nbytes - 2 * 40 - 2 * 4, w.nbytes + 3 * 10 + 2)
    assert span(7, (3, 0), (8, 8), 8) == (7, 7)
    assert span(7, (), (), 8) == (7, 15)


def extent(start: int, end: int, device: str = "cpu", **facts: Any) -> Extent:
    return Extent(**{
        "device": device, "address": start, "start": start, "end": end, "size_bytes": end - start, "contiguous": True, **facts,
    })  # fmt: skip


def test_groups_move_with_the_memory() -> None:
    """The same pattern anywhere in memory is the same group; one on another device is another matter."""
    pattern = [extent(0, 100), extent(40, 60), extent(100, 120), extent(90, 100)]
    moved = [extent(e.start + 10**12, e.end + 10**12) for e in pattern]
    (group,) = groups(pattern)
    assert (group.members, group.offsets, group.owner, group.size_bytes) == ((0, 1, 3), (0, 40, 90), 0, 100)
    assert groups(moved) == (group,)
    assert groups([extent(0, 100), extent(0, 100, "cuda:0")]) == ()
    assert groups([extent(0, 60, "cuda:0"), extent(40, 100, "cuda:0")]) == (), "nobody here can read the memory between them"
    assert groups([extent(0, 100, "cuda:0"), extent(40, 100, "cuda:0")]) == groups([extent(0, 100), extent(40, 100)])


VIEW = {"at": "w", "dtype": "<f4", "shape": [2], "strides": [4], "offset": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1}, {"offset": 9}, {"offset": 2**70}, {"offset": True}, {"offset": 1.0}, {"shape": [3], "strides": [8]},
        {"strides": []},
        {"strides": [-4]}, {"strides": [2**70]}, {"strides": ["4"]}, {"shape": [2**62], "strides": [0]}, {"shape": [-1]}, {"at": "x"},
        {"dtype": "O"}, {"more": 1}, {"shape": [2**40], "strides": [2**40]}, {"shape": [0], "offset": 17},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["array", "torch"])
def test_a_view_that_leaves_its_tensor_is_refused(change: dict[str, Any], kind: str) -> None:
    """A damaged or hostile tree never makes an array over memory that is not the file's."""
    leaves = {"w": Tensor.of(np.zeros(4, np.float32))}
    node = {**VIEW, **change} if kind == "array" else {**VIEW, "dtype": "float32", **change}
    with pytest.raises(ManifestInvalid):
        tree.unflatten({kind: node}, leaves)


def test_a_view_inside_of_its_tensor() -> None:
    """The same node without a fault, at both ends and backwards."""
    leaves = {"w": Tensor.of(np.arange(4, dtype=np.float32))}
    for change, wanted in ({}, [0, 1]), ({"offset": 8}, [2, 3]), ({"strides": [-8], "offset": 12}, [3, 1]), ({"strides": [0]}, [0, 0]):
        assert tree.unflatten({"array": {**VIEW, **change}}, leaves).tolist() == wanted


def test_the_file_stays_a_plain_safetensors_file(tmp_path: Any) -> None:
    """Others read the shared bytes once, under one name."""
    import safetensors.numpy

    w = np.arange(5.0)
    spec, leaves = tree.flatten({"a": w, "b": w, "step": 1})
    layout = tensors.arrange(leaves).layout({"tree": tree.encode(spec)})
    buffer = bytearray(layout.size_bytes)
    layout.copy_into(buffer, leaves)
    assert {name: array.tolist() for name, array in safetensors.numpy.load(bytes(buffer)).items()} == {"a": w.tolist()}
