"""Weights from measured speeds: steady under noise, right after a change, and read back as they were written."""

from __future__ import annotations

from statistics import median_low

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr.errors import StateCorrupt
from dtr.placement import ShardPoints, place
from dtr.ring import Ring
from dtr.weights import MOST, from_fields, is_field, settled, to_fields

WORKERS = [f"w{n}" for n in range(8)]
SPEEDS = st.dictionaries(st.sampled_from(WORKERS), st.floats(0.001, 1e9), max_size=8)
WEIGHTS = st.dictionaries(st.sampled_from(WORKERS), st.floats(1 / 16, 16).map(lambda weight: float(f"{weight:.3g}")), max_size=8)


def test_without_speeds_all_weigh_the_same() -> None:
    """Nobody was measured: that is the even placement."""
    assert settled({}, {}, ["a", "b"]) == {"a": 1.0, "b": 1.0}


def test_a_slow_worker_weighs_less_and_changes_no_others_weight() -> None:
    """Given one of three at a fifth of the speed, then it alone has another weight."""
    assert settled({"a": 1, "b": 1, "c": 1}, {"a": 1000, "b": 200, "c": 1000}, "abc") == {"a": 1, "b": 0.2, "c": 1}


@pytest.mark.parametrize("speeds", [{"a": 100, "b": 25}, {"a": 4000, "b": 1000}, {"a": 0.4, "b": 0.1}])
def test_of_two_workers_the_ratio_counts(speeds: dict[str, float]) -> None:
    """A speed says nothing but how it compares."""
    weights = settled({"a": 1, "b": 1}, speeds, "ab")
    assert weights["a"] / weights["b"] == pytest.approx(4)


def test_a_worker_that_recovered_weighs_as_before() -> None:
    """The weight follows in both directions."""
    slow = settled({"a": 1, "b": 1, "c": 1}, {"a": 10, "b": 2, "c": 10}, "abc")
    assert settled(slow, {"a": 10, "b": 10, "c": 10}, "abc") == {"a": 1, "b": 1, "c": 1}


def test_within_the_band_nothing_changes_and_beyond_it_does() -> None:
    """A fifth less is noise; a quarter less is not."""
    before = dict.fromkeys("abc", 1.0)
    assert settled(before, {"a": 100, "b": 100, "c": 81}, "abc") == before
    assert settled(before, {"a": 100, "b": 100, "c": 75}, "abc")["c"] == 0.75


def test_a_changed_weight_does_not_swing_back() -> None:
    """Given a worker at the edge of the band, when its speed moves to and fro across the edge, then its weight changes once."""
    weights, seen = dict.fromkeys("abc", 1.0), set()
    for speed in [79, 81, 78, 82, 79, 83, 77]:
        weights = settled(weights, {"a": 100, "b": 100, "c": speed}, "abc")
        seen.add(weights["c"])
    assert seen == {0.79}


def test_who_was_not_measured_keeps_its_weight_and_a_newcomer_gets_the_usual_one() -> None:
    """Given a worker of half the weight that told nothing since, and a new one."""
    assert settled({"a": 2, "b": 0.5, "c": 2}, {"a": 10, "c": 10}, ["a", "b", "c", "new"]) == {"a": 2, "b": 0.5, "c": 2, "new": 2}


def test_a_newcomer_to_a_fast_and_a_slow_worker_stands_between_them() -> None:
    """Given two workers that differ, then who joins is taken for neither."""
    assert settled({"a": 1, "b": 0.1}, {}, ["a", "b", "new"]) == {"a": 1, "b": 0.1, "new": 0.55}


def test_nobody_is_left_without_shards_by_one_bad_measurement() -> None:
    """The lightest weighs a sixteenth of the median."""
    weights = settled({}, {"a": 1000, "b": 1000, "c": 0.001}, "abc")
    assert weights["c"] == pytest.approx(1 / MOST, rel=0.01)


def test_a_weight_in_force_beyond_the_bound_comes_back_once() -> None:
    """The worker in the middle became a lighter one: the heaviest is brought within sixteen times of it, and stays there."""
    before = {"a": 1.0, "b": 3.0, "c": 0.125, "d": 0.125}
    speeds = {worker: 1000 * weight for worker, weight in before.items()}
    after = settled(before, speeds, before)
    assert after == before | {"b": 2.0} == settled(after, speeds, after)


@given(before=WEIGHTS.filter(bool), scale=st.floats(0.01, 1e6), noise=st.lists(st.floats(0.9, 1.1), min_size=8, max_size=8))
def test_noise_moves_no_shard(before: dict[str, float], scale: float, noise: list[float]) -> None:
    """Given speeds as the weights say, each off by up to a tenth, then every weight and so every shard stays."""
    middle = median_low(before.values())  # well within MOST of it: what is beyond comes back, whatever was measured
    before = {worker: min(max(weight, middle / 8), middle * 8) for worker, weight in before.items()}
    speeds = {worker: weight * scale * off for (worker, weight), off in zip(sorted(before.items()), noise, strict=False)}
    after = settled(before, speeds, before)
    assert after == before
    ring, shards = Ring.of(before), ShardPoints.of("d", 97)
    start = place(ring, shards, weights=before)
    assert place(ring, shards, previous=start, weights=after).moved_from(start) == []


@given(before=WEIGHTS, speeds=SPEEDS, members=st.sets(st.sampled_from(WORKERS), min_size=1))
def test_weights_say_what_was_measured_within_the_band(before: dict[str, float], speeds: dict[str, float], members: set[str]) -> None:
    """For any past and any speeds: every member has one, and two that were measured compare as their speeds do, within the bands."""
    weights = settled(before, speeds, members)
    assert set(weights) == members
    assert all(weight > 0 for weight in weights.values())
    found = sorted(weights[worker] / speeds[worker] for worker in members if worker in speeds)
    fastest, slowest = max(speeds.values(), default=1), min(speeds.values(), default=1)
    if found and fastest / slowest < MOST:
        assert found[-1] / found[0] <= 1.25**2 * 1.02


@given(before=WEIGHTS)
def test_what_is_written_is_read(before: dict[str, float]) -> None:
    """Only weights that are not 1 are written, and come back beside the workers' shards."""
    fields = dict.fromkeys(before, "0-3") | to_fields(before)
    assert from_fields(fields) == before
    assert {field for field in fields if not is_field(field)} == set(before)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "inf", "nan"])
def test_damaged_weights_are_refused(text: str) -> None:
    """The message names the field."""
    with pytest.raises(StateCorrupt, match=":weight/a must be a number above 0"):
        from_fields({"a": "0", ":weight/a": text})
