"""What all ranks hold alike is split evenly, each row written once, and put together again whatever the parts look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr.checkpoint.format import tensors, torch_tensors, tree
from dtr.checkpoint.format.paths import Patterns
from dtr.checkpoint.format.replication import REPLICATED, UNSEEN, Shares, first_difference, sampled_in, split
from dtr.checkpoint.format.structure import Structures
from dtr.checkpoint.format.tensors import Tensor
from dtr.checkpoint.restoring.fetch import read_state
from dtr.checkpoint.restoring.scattered import headers_of, locate
from dtr.checkpoint.saving.announce import explained
from dtr.errors import CheckpointConflict, IntegrityError, InvalidInput, WorldSizeMismatch
from tests.chunked import file_of


class Memory:
    """A part in memory, as a Source; counts what is read of it."""

    def __init__(self, name: str, content: bytearray) -> None:
        self.name, self.where, self.content = name, "slot", content
        self.state_bytes = self.piece_bytes = len(content)
        self.read_bytes = 0

    def check(self) -> None:
        pass

    def head(self, *, keep: bool = False) -> bytearray:
        head = bytearray(self.state_bytes)
        self.read_into(head)
        return head

    def read_into(self, buffer: Any, offset: int = 0) -> None:
        view = memoryview(buffer).cast("B")
        view[:] = self.content[offset : offset + len(view)]
        self.read_bytes += len(view)

    def close(self) -> None:
        pass


def shares(patterns: Any, world_size: int, rank: int) -> Shares:
    return Shares(patterns=Patterns.of(patterns, "replicated"), world_size=world_size, rank=rank)


def part(state: Any, patterns: Any, world_size: int, rank: int) -> Memory:
    """The part of one rank, as it would be staged."""
    return Memory(f"part {rank}", file_of(state, {}, shares(patterns, world_size, rank))[0])


def parts(states: list[Any], patterns: Any) -> dict[int, Memory]:
    return {rank: part(state, patterns, len(states), rank) for rank, state in enumerate(states)}


def of_rank(rank: int) -> dict[str, Any]:
    """A state whose model and optimizer are common, and whose loader is the rank's own."""
    chooser = np.random.default_rng(7)
    return {
        "model": {"w": chooser.random((37, 5), dtype=np.float32), "b": np.array(3.5), "empty": np.zeros((0, 4))},
        "optimizer": [chooser.random(1001), {"step": 12, "m": chooser.random((1, 64, 3)).astype(np.float16)}],
        "loader": {"rank": rank, "seen": np.arange(rank * 10)},
    }


def check_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            check_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    else:
        assert found == expected


SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple)
STATES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(SHAPES, st.sampled_from(["u1", "f4", "f8", "c16"])), max_size=12)


class TestSplit:
    @settings(max_examples=300, deadline=None)
    @given(STATES, st.integers(1, 9))
    def test_every_row_is_written_once(self, described: Mapping[str, Any], world_size: int) -> None:
        """All shares together are each tensor, whole, whatever the shapes."""
        found = {name: Tensor.of(np.zeros(shape, dtype)) for name, (shape, dtype) in described.items()}
        rows: dict[str, list[tuple[int, int, int]]] = {}
        for rank in range(world_size):
            for share in split(found, world_size, rank):
                rows.setdefault(share.name, []).append((share.start, share.end, share.of))
        assert set(rows) == set(found)
        for held in rows.values():
            assert [start for start, _, _ in held] == [0, *(end for _, end, _ in held[:-1])]
            assert held[-1][1] == held[-1][2]

    @pytest.mark.parametrize("world_size", [2, 3, 4, 7, 64])
    def test_shares_are_even(self, world_size: int) -> None:
        """A few large tensors and many small ones: the largest share is within a few per cent of the smallest."""
        chooser = np.random.default_rng(1)
        sizes = [4_000_000, 1_000_000, 1_000_000, *chooser.integers(1, 20_000, 300).tolist()]
        found = {f"t{n}": Tensor.of(np.zeros((size // 16 + 1, 4), np.float32)) for n, size in enumerate(sizes)}
        held = [
            sum((share.end - share.start) * found[share.name].array.nbytes // share.of for share in split(found, world_size, rank))
            for rank in range(world_size)
        ]
        assert max(held) <= 1.02 * min(held)

    def test_no_more_cuts_than_needed(self) -> None:
        """Equal tensors, one for each rank, stay whole."""
        found = {f"t{n}": Tensor.of(np.zeros((100, 4))) for n in range(4)}
        assert [share.is_whole for rank in range(4) for share in split(found, 4, rank)] == [True] * 4

    def test_does_not_depend_on_the_order(self) -> None:
        """Ranks may hold their dicts in different orders."""
        names = [f"t{n}" for n in range(20)]
        found = {name: Tensor.of(np.zeros((n + 1, 3))) for n, name in enumerate(names)}
        other = {name: found[name] for name in reversed(names)}
        assert [split(found, 3, rank) for rank in range(3)] == [split(other, 3, rank) for rank in range(3)]


class TestParts:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 5])
    def test_each_rank_gets_its_state(self, world_size: int) -> None:
        """Common and own values alike, bit by bit, in the types they had."""
        found = parts([of_rank(rank) for rank in range(world_size)], ["model", "optimizer/*"])
        for rank in range(world_size):
            check_equal(read_state(found, rank=rank, world_size=world_size), of_rank(rank))

    def test_common_bytes_are_stored_once(self) -> None:
        """The parts of four ranks together have hardly more than one state."""
        states = [{"optimizer": {"m": np.zeros(1_000_000, np.uint8), "v": np.zeros(500_000, np.uint8)}} for _ in range(4)]
        sizes = [len(one.content) for one in parts(states, "optimizer").values()]
        assert sum(sizes) < 1_505_000
        assert max(sizes) < 1.03 * min(sizes)

    @pytest.mark.parametrize("patterns", ["tied/*", ["model/a", "tied/1", "tied/2"], "model"])
    @pytest.mark.parametrize("world_size", [2, 3])
    def test_tied_tensors_are_common_by_any_of_their_names(self, patterns: Any, world_size: int) -> None:
        """Stored once, whole or cut, whichever name is selected; and any number of ranks gets them, tied again."""

        def tied(rank: int) -> dict[str, Any]:
            a, b, c = np.arange(600.0), np.arange(3000, dtype=np.float32), np.arange(500, dtype=np.int16)
            return {"model": {"a": a, "b": b, "c": c[:400]}, "tied": [a, b, c[100:]]}

        found = parts([tied(rank) for rank in range(world_size)], patterns)
        assert sum(one.state_bytes for one in found.values()) < 1.1 * (600 * 8 + 3000 * 4 + 1000) + 2_000 * world_size
        for size in (world_size, 5):
            for rank in range(size):
                restored = read_state(found, rank=rank, world_size=size)
                check_equal(restored, tied(0))
                assert np.shares_memory(restored["model"]["c"], restored["tied"][2])
                assert np.shares_memory(restored["model"]["a"], restored["tied"][0])

    def test_a_person_can_read_which_rows_are_where(self) -> None:
        """A cut tensor's rows are named by what they are, in the file and in its metadata."""
        found = parts([{"m": np.arange(20.0).reshape(10, 2)}] * 2, "m")
        header = tensors.read_header(found[1].content, len(found[1].content))
        assert [place.name for place in header.places] == ["m[5:10]"]
        about = orjson.loads(header.metadata[REPLICATED])
        assert about["rows"] == {"m[5:10]": {"of": "m", "rows": [5, 10], "shape": [10, 2]}}
        assert (about["rank"], about["world_size"], about["patterns"]) == (1, 2, ["m"])

    def test_a_name_that_looks_like_rows(self) -> None:
        """A tensor of the user's that is called as rows would be is no rows."""
        state = {"m": np.arange(10.0), "m[5:10]": np.ones(3), "m[0:5]": np.zeros(2)}
        found = parts([state] * 2, "m")
        for rank in range(2):
            check_equal(read_state(found, rank=rank, world_size=2), state)

    @pytest.mark.parametrize("world_size", [1, 2, 6])
    def test_another_number_of_ranks(self, world_size: int) -> None:
        """What all of is common fits any world size."""
        state = {"model": of_rank(0)["model"], "optimizer": of_rank(0)["optimizer"]}
        found = parts([state] * 3, ["model/*", "optimizer/*"])
        for rank in range(world_size):
            check_equal(read_state(found, rank=rank, world_size=world_size), state)

    def test_what_does_not_fit_is_said(self) -> None:
        """Another number of ranks: the error names what belongs to single ranks, and what to ask for; and that then works."""
        found = parts([of_rank(rank) for rank in range(3)], ["model/*", "optimizer/*"])
        with pytest.raises(
            WorldSizeMismatch, match=r"saved by 3 ranks.*here are 2.*loader/rank, loader/seen.*world_size=3.*only="
        ) as error:
            read_state(found, rank=0, world_size=2)
        assert error.value.unfit == ["loader/rank", "loader/seen"]
        only = Patterns.of(list(error.value.fits), "only")
        check_equal(read_state(found, rank=0, world_size=2, only=only), {k: of_rank(0)[k] for k in ("model", "optimizer")})
        with pytest.raises(WorldSizeMismatch, match="loader/seen"):
            read_state(found, rank=0, world_size=2, only=Patterns.of("loader/seen", "only"))

    def test_only_what_is_wanted_is_read(self) -> None:
        """One common tensor of a large state costs its bytes and the headers."""
        state = {"a": np.zeros(1_000_000, np.uint8), "b": np.arange(1000.0)}
        found = parts([state] * 2, ["a", "b"])
        headers = headers_of(found)
        before = sum(one.read_bytes for one in found.values())
        whole = locate(headers, 0)
        assert sum(extent.end - extent.start for extent in whole.tensors["b"].extents) == 8000
        read_state(found, rank=0, world_size=2, only=Patterns.of("b", "only"))
        assert sum(one.read_bytes for one in found.values()) - before == 8000 + before


class TestWrong:
    def test_nothing_is_selected(self) -> None:
        """A misspelt pattern is an error that says what there is, even beside one that is right."""
        with pytest.raises(InvalidInput, match=r"replicated selects nothing: optimiser/\* .* loader, model, optimizer"):
            part(of_rank(0), ["model/*", "optimiser/*"], 2, 0)

    @pytest.mark.parametrize("given", ["", [], [""], [7], 7, {"a": 1}])
    def test_no_pattern(self, given: Any) -> None:
        """Anything that is no pattern names the argument."""
        with pytest.raises(InvalidInput, match="replicated"):
            shares(given, 2, 0)

    def test_ranks_that_differ(self) -> None:
        """Ranks whose common tensors have other shapes make other digests, and no reader puts their parts together."""
        digests = [file_of({"m": np.zeros(n)}, {}, shares("m", 2, 0))[1] for n in (10, 10, 11)]
        assert digests[0] == digests[1] != digests[2]
        found = {0: part({"m": np.zeros(10)}, "m", 2, 0), 1: part({"m": np.zeros(11)}, "m", 2, 1)}
        with pytest.raises(IntegrityError, match="disagree"):
            read_state(found, rank=0, world_size=2)

    def test_parts_that_do_not_belong_together(self) -> None:
        """The same rank's part twice, or one of another world size."""
        state = {"m": np.zeros(100)}
        first = part(state, "m", 2, 0)
        for other in (first, part(state, "m", 3, 1)):
            with pytest.raises(IntegrityError, match="rank 1"):
                read_state({0: first, 1: other}, rank=0, world_size=2)

    @pytest.mark.parametrize(
        "change",
        [
            {"rows": {}},
            {"rows": 7},
            {"rows": {"m[0:5]": {"of": "m", "rows": [0, 4], "shape": [10]}}},
            {"rank": 1},
            {"world_size": 3},
            {"rows": {"m[0:5]": {"of": "m", "rows": [1, 6], "shape": [10]}}},
            {"rows": {"m[0:5]": {"of": "m", "rows": [0, 5], "shape": [11]}}},
            {"rows": {"m[0:5]": {"of": "m", "rows": [0, 5], "shape": [10, 2]}}},
            {"rows": {"m[0:5]": {"of": "m", "rows": [5, 0], "shape": [10]}}},
            {"patterns": ["x"]},
            {"patterns": []},
            {"patterns": [7]},
            {"structure": "x"},
        ],
    )
    def test_metadata_that_somebody_forged(self, change: dict[str, Any]) -> None:
        """Rows that are missing, double or of another tensor are an IntegrityError, never a wrong state."""
        leaves = {"m[0:5]": Tensor.of(np.zeros(5))}
        genuine = tensors.read_header(part({"m": np.zeros(10)}, "m", 2, 0).content, len(part({"m": np.zeros(10)}, "m", 2, 0).content))
        about = {**orjson.loads(genuine.metadata[REPLICATED]), **change}
        metadata = {"dtr_tree": tree.encode({"dict": {"m": {"array": "m"}}}), REPLICATED: orjson.dumps(about).decode()}
        layout = tensors.arrange(leaves).layout(metadata)
        content = bytearray(layout.size_bytes)
        layout.copy_into(content, leaves)
        with pytest.raises(IntegrityError):
            read_state({0: Memory("forged", content), 1: part({"m": np.zeros(10)}, "m", 2, 1)}, rank=0, world_size=2)


class TestValues:
    """What ranks say of the values that they ought to hold alike; ``shares`` of ranks 0 and 1 of 2 unless another number is given."""

    @staticmethod
    def said(state: Any, rank: int = 0, world_size: int = 2) -> str:
        return file_of(state, {}, shares("*", world_size, rank))[1]

    @pytest.mark.parametrize("dtype", ["u1", "f2", ">f4", "f8", "c16", "?", "M8[s]", "V5"])
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (100, 3), (3, 1000)])
    def test_the_same_values_are_alike(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Whatever the dtype, and however each rank's memory is laid out: as rows, as columns, with gaps."""
        chooser = np.random.default_rng(3)
        value = np.frombuffer(chooser.bytes(np.dtype(dtype).itemsize * int(np.prod(shape))), np.dtype(dtype)).reshape(shape)
        spread = np.empty(tuple(2 * size for size in shape), value.dtype)[(..., *(slice(None, None, 2) for _ in shape))]
        spread[...] = value
        held = [{"a": value}, {"a": np.array(value, order="F")}, {"a": spread}]
        assert len({self.said(state, rank) for state in held for rank in (0, 1)}) == 1

    def test_a_nan_is_what_it_is(self) -> None:
        """Bits are compared: NaN equals itself, another NaN and -0.0 do not."""
        plain = {"a": np.array([1.0, np.nan, 0.0])}
        other = {"a": np.array([1.0, np.nan, 0.0])}
        assert self.said(plain) == self.said(other)
        other["a"].view(np.uint64)[1] += 1
        assert self.said(plain) != self.said(other)
        assert self.said(plain) != self.said({"a": np.array([1.0, np.nan, -0.0])})

    @pytest.mark.parametrize("where", [0, -1])
    def test_the_tensor_that_differs_is_named(self, where: int) -> None:
        """Its first or last number, in a known structure as in a new one; the name is read from the part."""
        known, state = Structures(), {f"t{n}": np.arange(1000.0) for n in range(5)}
        before = known.lay_out(state, {}, shares("*", 2, 0)).structure
        assert known.lay_out(state, {}, shares("*", 2, 0)).structure == before
        state["t3"][where] += 1
        after = known.lay_out(state, {}, shares("*", 2, 0)).structure
        content, anew = file_of(state, {}, shares("*", 2, 1))
        assert after == anew
        names = sampled_in(tensors.read_header(content, len(content)).metadata)
        assert names == sorted(state)
        assert first_difference(before, after, names) == "t3"
        assert first_difference(before, after, []) == ""
        assert first_difference(before, self.said({"t3": state["t3"]}), names) is None

    def test_torch_tensors_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """bfloat16 and Parameters in this machine's memory; what they share is compared once, and what is on a device not at all."""
        torch = pytest.importorskip("torch")
        weight = torch.nn.Parameter(torch.ones(40, 3))
        state = {"a": torch.zeros(50, dtype=torch.bfloat16), "b": weight, "c": weight}
        before = self.said(state)
        assert before == self.said(state, 1)
        state["a"][49] = 1
        assert first_difference(before, self.said(state), ["a", "b"]) == "a"
        monkeypatch.setattr(torch_tensors, "is_here", lambda value: False)
        assert Structures().lay_out(state, {}, shares("*", 2, 0)).structure == before[:16] + 2 * UNSEEN

    def test_it_costs_the_same_for_many(self) -> None:
        """Of 20,000 tensors 64 are looked at, spread over all; of one rank's, of empty ones and of what is between fields, none."""
        state = {f"{n:05d}": np.zeros(4) for n in range(20_000)}
        content, said = file_of(state, {}, shares("*", 2, 0))
        names = sampled_in(tensors.read_header(content, len(content)).metadata)
        assert (len(names), len(said)) == (64, 16 + 64 * 4)
        assert (names[0], names[-1]) == ("00000", "19687")
        assert len(self.said(state, world_size=1)) == 16
        padded = np.zeros(3, np.dtype([("a", "u1"), ("b", "f8")], align=True))
        assert len(self.said({"a": np.zeros((0, 3)), "b": padded})) == 16


def test_the_tensor_that_differs_is_in_the_reason() -> None:
    """Names, shapes and dtypes are alike, and the third tensor is not."""
    alike, exc = "0" * 16, "this step was begun with replicated some {}, now it is some {}"
    told = explained(CheckpointConflict(exc.format(f"{alike}aaaabbbbcccc", f"{alike}aaaabbbbdddd")), 3, ["a", "b", "opt/m"])
    assert "begun with replicated opt/m of other values than rank 3 has: what replicated= selects must be alike" in told.message
    told = explained(CheckpointConflict(exc.format(f"{alike}aaaa", f"{alike}bbbb")), 3)
    assert "begun with replicated tensors of other values than rank 3 has" in told.message


@pytest.mark.parametrize(
    ("begun", "now", "says"),
    [
        ("some 1a2b", "some 3c4d", "tensors of other names, shapes or dtypes than rank 3 has: what replicated= selects must be alike"),
        ("some 1a2b", "none", "some of the state, and rank 3 replicates nothing: replicated= must be the same on all ranks"),
        ("none", "all", "nothing, and rank 3 replicates all of it: replicated= must be the same"),
    ],
)
def test_ranks_that_disagree_are_told_what_about(begun: str, now: str, says: str) -> None:
    """The script compares digests, which no person can read; what else the error says of itself stays."""
    told = explained(CheckpointConflict(f"this step was begun with replicated {begun}, now it is {now}", code="CKPT_CONFLICT"), 3)
    assert f"begun with replicated {says}" in told.message
    assert told.facts == {"code": "CKPT_CONFLICT"}
    other = CheckpointConflict("this step was begun with store s3://a, now it is s3://b")
    assert explained(other, 3) is other
