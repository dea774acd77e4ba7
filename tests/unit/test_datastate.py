"""Data states: the merge is a least upper bound, what is written comes back, and what is not a state is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.cut import cut_at
from dtr.datasets.consuming.datastate import Cursor, Dynamic, merged, parse, shared
from dtr.datasets.plane import merge_shares
from dtr.errors import DataConflict, StateCorrupt

SIZE = 10  # samples in a shard
sets = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=3).map(ranges.normal)
numbers = st.sets(st.integers(0, 6), max_size=4).map(lambda of: ranges.normal((n, n + 1) for n in of))
notes = st.dictionaries(
    st.sampled_from(["padded", "dropped"]),
    st.dictionaries(
        st.integers(0, 2), st.dictionaries(st.integers(0, 3), sets.filter(bool).map(ranges.format_ranges), min_size=1), min_size=1
    ),
    max_size=2,
)


@st.composite
def dynamic(draw: Any) -> Dynamic:
    done = draw(numbers)
    partial = draw(st.dictionaries(st.integers(0, 6), sets.filter(bool), max_size=4))
    return Dynamic(
        version=1,
        digest="d",
        seed=draw(st.integers(0, 2)),
        epoch=draw(st.integers(0, 2)),
        done=done,
        partial={shard: held for shard, held in partial.items() if not ranges.contains(done, shard)},
        notes=draw(notes),
    )


cursors = st.builds(
    Cursor, version=st.just(1), digest=st.just("d"), seed=st.just(0), global_batch_size=st.just(8), window=st.just(64),
    tail=st.just("empty"), epoch=st.integers(0, 2), batch=st.integers(0, 5), notes=notes,
)  # fmt: skip


def samples(state: Dynamic) -> set[tuple[int, int]]:
    """What was consumed in the newest epoch, one by one."""
    whole = {(shard, at) for start, stop in state.done for shard in range(start, stop) for at in range(SIZE)}
    return whole | {(shard, at) for shard, held in state.partial.items() for start, stop in held for at in range(start, stop)}


@pytest.mark.parametrize("states", [dynamic(), cursors], ids=["dynamic", "deterministic"])
def test_the_merge_is_a_least_upper_bound(states: Any) -> None:
    """Idempotent, commutative, associative: it does not matter in which order ranks' states arrive, or how often."""

    @given(states, states, states)
    def check(a: Any, b: Any, c: Any) -> None:
        assert merged("x", [a, a]) == a
        assert merged("x", [a, b]) == merged("x", [b, a])
        assert merged("x", [merged("x", [a, b]), c]) == merged("x", [a, merged("x", [b, c])])
        assert merged("x", [merged("x", [a, b]), a]) == merged("x", [a, b])

    check()


@given(dynamic(), dynamic())
def test_consumption_is_united_sample_by_sample(a: Dynamic, b: Dynamic) -> None:
    """Of one epoch the samples of both; of two epochs those of the later. What both have is what `shared` finds."""
    found = merged("x", [a, b])
    if a.epoch == b.epoch:
        assert samples(found) == samples(a) | samples(b)
        both = {shard for shard, _ in samples(a) & samples(b)}
        assert set(shared(a, b)) == both
    else:
        assert samples(found) == samples(max(a, b, key=lambda state: state.epoch))


@pytest.mark.parametrize("states", [dynamic(), cursors], ids=["dynamic", "deterministic"])
def test_a_state_comes_back_from_json(states: Any) -> None:
    """As it stands in a manifest."""

    @given(states)
    def check(state: Any) -> None:
        assert parse("x", json.loads(json.dumps(state.to_json()))) == state

    check()


@pytest.mark.parametrize("what", ["digest", "global_batch_size", "seed"])
def test_states_of_different_sequences_do_not_merge(what: str) -> None:
    """The message names what differs."""
    facts: dict[str, Any] = {"version": 1, "digest": "d", "seed": 0, "global_batch_size": 8, "window": 64, "tail": "empty"}
    other = facts | {what: "e" if what == "digest" else 9}
    with pytest.raises(DataConflict, match=what):
        merged("x", [Cursor(**facts), Cursor(**other)])
    with pytest.raises(DataConflict, match="mode"):
        merged("x", [Cursor(**facts), Dynamic(version=1, digest="d", seed=0)])


WHOLE = Dynamic(version=1, digest="d", seed=0, done=((0, 3),), partial={5: ((0, 4),)}, notes={"padded": {0: {1: "0-2"}}}).to_json()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("mode",), "static"), (("mode",), None), (("version",), "1"), (("seed",), -1), (("epoch",), 1.5), (("epoch",), 2**53),
        (("digest",), None), (("done",), "3-1"), (("done",), "0-1000000"), (("done",), 5), (("partial",), []), (("partial",), {"x": "0-1"}),
        (("partial",), {"5": "4-4"}), (("partial",), {"1000000": "0-1"}), (("notes",), {"lost": {}}),
        (("notes",), {"padded": {"0": {"1": "x"}}}),
        (("notes",), {"padded": 3}),
    ],
)  # fmt: skip
def test_what_is_no_state_is_refused(path: tuple[str, ...], value: Any) -> None:
    """A manifest is taken on no trust."""
    document = copy.deepcopy(WHOLE)
    document[path[0]] = value
    with pytest.raises(StateCorrupt, match="data set 'x'"):
        parse("x", document)


# --- a cut of the ledger --------------------------------------------------------------------------------------------------


def bitmap(*shards: int) -> bytes:
    bits = np.zeros(16, dtype=bool)
    bits[list(shards)] = True
    return np.packbits(bits).tobytes()


def test_the_cut_has_what_was_handed_out_through_a_batch() -> None:
    """Sums and batches through that one count, of the dead rank as well; later batches do not."""
    base = Dynamic(version=1, digest="d", seed=0, done=((0, 2),), partial={4: ((0, 3),)})
    ledger = {
        "part/4": "0-5", "out/0/7": "4:5-7", "out/0/8": "4:7-9 6:0-2", "out/1/7": "5:0-4", "out/1/8": "5:4-8",
        "lease/4": "w i 3", ":most": "9",
    }  # fmt: skip
    found = cut_at("x", base, ledger, bitmap(3), 7)
    assert found.done == ((0, 2), (3, 4))
    assert found.partial == {4: ((0, 7),), 5: ((0, 4),)}
    assert cut_at("x", base, ledger, bitmap(3), 8).partial == {4: ((0, 9),), 5: ((0, 8),), 6: ((0, 2),)}


def test_a_cut_before_what_is_on_record_is_refused() -> None:
    """Sums cannot be taken apart again."""
    with pytest.raises(StateCorrupt, match="restore a checkpoint"):
        cut_at("x", Dynamic(version=1, digest="d", seed=0), {"part/4": "0-5", "out/0/7": "4:5-7"}, b"", 3)


def test_an_epoch_that_a_rank_has_not_ended_is_not_left_behind() -> None:
    """Others are in the next one, and this rank was given samples that it did not report: no checkpoint would ever have them."""
    ahead, behind = (Dynamic(version=1, digest="d", seed=0, epoch=epoch).to_json() for epoch in (1, 0))
    with pytest.raises(DataConflict, match="rank 1 was given 20 samples of epoch 0 that it did not pass to step"):
        merge_shares({0: json.dumps({"n": {"own": ahead}}), 1: json.dumps({"n": {"own": behind, "open": 20}})})
    for quiet in ({"own": behind}, {"own": ahead, "open": 20}):
        assert merge_shares({0: json.dumps({"n": {"own": ahead}}), 1: json.dumps({"n": quiet})})["n"]["epoch"] == 1
