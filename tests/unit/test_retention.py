"""Retention decided from values alone: every rule, all of them together, and what no rule may touch."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr import names
from dtr.checkpoint.keeping.retention import Plan, Policy, plan
from dtr.checkpoint.lineage import Link, chain
from dtr.checkpoint.saving import metrics
from dtr.checkpoint.survey import Indexed
from dtr.config import Settings
from dtr.errors import ConfigError, InvalidInput, StateCorrupt


def link(run: str, parent: str = "", step: int | None = None, at: int = 0) -> Link:
    return Link(run=run, parent_run=parent, parent_step=step, created_at_ms=at)


LINKS = {
    "0001-a": link("0001-a", at=1),
    "0002-b": link("0002-b", "0001-a", 30, at=2),
    "0003-c": link("0003-c", "0002-b", 70, at=3),
    "0004-d": link("0004-d", "0002-b", 50, at=4),  # 0003-c was left
}
LINEAGE = chain(LINKS, "0004-d")


def indexed(run: str, step: int, state: str = "COMMITTED", *, at: int = 0, **facts: Any) -> Indexed:
    return Indexed(**{"run": run, "step": step, "state": state, "retired": False, "decided_at_ms": at, "created_at_ms": at, **facts})


def row(*steps: int, **facts: Any) -> list[Indexed]:
    """Commits of the head."""
    return [indexed("0004-d", step, **facts) for step in steps]


def decide(given: list[Indexed], *protected: tuple[str, int], now_ms: int = 0, grace_ms: int = 0, **rules: Any) -> Plan:
    policy = Policy(grace_ms=grace_ms, **rules)
    return plan(given, LINEAGE, policy, protected=dict.fromkeys(protected, "protected"), now_ms=now_ms)


def kept(found: Plan) -> list[int]:
    return sorted(one.step for one in found.keep)


def test_keeps_the_newest_of_the_lineage() -> None:
    """Newest by lineage, not by step: the head's step 40 outlives its parent's step 50."""
    given = [indexed("0001-a", 10), indexed("0002-b", 50), indexed("0004-d", 40), indexed("0004-d", 41)]
    found = decide(given, keep_last=2)
    assert found.retire == (("0001-a", 10), ("0002-b", 50))
    assert [(one.step, one.why) for one in found.keep] == [(41, ("newest", "one of the last 2")), (40, ("one of the last 2",))]


def test_never_what_is_protected() -> None:
    """The newest commit and what the newest run continues stay, however many are newer."""
    given = [indexed("0001-a", 10), indexed("0002-b", 50), indexed("0004-d", 60), indexed("0004-d", 70)]
    assert decide(given, ("0002-b", 50), ("0004-d", 70), keep_last=1).retire == (("0001-a", 10), ("0004-d", 60))


def test_without_a_rule_all_stay_but_what_was_begun_is_finished() -> None:
    """Switched off, it still deletes what was retired before."""
    given = [indexed("0001-a", 10, retired=True), indexed("0002-b", 50), indexed("0002-b", 60, "ABANDONED")]
    found = decide(given)
    assert (found.retire, found.sweep, kept(found)) == ((), (("0001-a", 10),), [50, 60])


def test_what_the_lineage_left_goes_once_something_is_safe() -> None:
    """A branch that can never be restored is not kept, but nothing goes while nothing is committed."""
    left = indexed("0003-c", 80, "ABANDONED", at=5)
    assert decide([left], keep_every=30).retire == ()
    assert decide([left, *row(60, at=9)], keep_every=30).retire == (("0003-c", 80),)
    assert decide([left, *row(60, at=9)]).retire == (), "and without any rule it stays as well"


def test_what_the_lineage_left_has_the_time_of_so_many_commits() -> None:
    """A restore that fell back too far is found out: as many commits as are kept must have been begun since; older ones do not count."""
    left, before = [indexed("0003-c", 80, "ABANDONED", at=5), indexed("0003-c", 70, "ABANDONED", at=4)], [indexed("0002-b", 50, at=3)]
    newer = [indexed("0004-d", 51 + n, at=6 + n) for n in range(3)]
    for count in range(3):
        found = decide([*left, *before, *newer[:count]], keep_last=3)
        assert [one.why for one in found.keep if one.run == "0003-c"] == [("left behind lately",)] * 2
    assert decide([*left, *before, *newer], keep_last=3).retire == (("0002-b", 50), ("0003-c", 70), ("0003-c", 80))
    assert decide([*left, *newer[:1]], keep_last=1).retire == (("0003-c", 70), ("0003-c", 80))


def test_open_and_fresh_aborts_are_left_alone() -> None:
    """Only what was aborted long ago leaves the index; what is under way is nobody's to judge."""
    given = [
        indexed("0004-d", 1, "WRITING"), indexed("0004-d", 2, "SEALED"), indexed("0004-d", 3, "ABORTING"),
        indexed("0004-d", 4, "ABORTED", at=5), indexed("0004-d", 5, "ABORTED", at=50), indexed("0004-d", 9),
    ]  # fmt: skip
    found = decide(given, keep_last=1, now_ms=3_600_010)
    assert (found.retire, found.sweep, found.forget) == ((), (), (("0004-d", 4),))


def test_the_first_of_each_so_many_steps_stays() -> None:
    """Saves at 99, 199, ... are no multiples of 200, yet one of each 200 steps stays, the same one whenever it is asked."""
    found = decide(row(99, 199, 299, 399, 499, 599), keep_every=200)
    assert kept(found) == [99, 299, 499, 599]
    assert kept(decide(row(0, 5, 10, 15, 20), keep_every=10)) == [0, 10, 20]
    assert kept(decide(row(*kept(found), 699), keep_every=200)) == [99, 299, 499, 699]


def test_the_best_by_a_metric_stay() -> None:
    """The lowest or the highest; of equal ones the newer; one without a finite value is never the best."""
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: None, 6: 9.0}
    given = [indexed("0004-d", step, metrics={"loss": value, "acc": value}) for step, value in values.items()]
    given += row(7)
    assert kept(decide(given, keep_best=(("loss", "min", 2),))) == [2, 4, 7]
    assert kept(decide(given, keep_best=(("loss", "min", 1),))) == [4, 7]
    assert kept(decide(given, keep_best=(("loss", "min", 1), ("acc", "max", 1)))) == [4, 6, 7]
    assert kept(decide(given, keep_best=(("other", "max", 3),))) == [7]
    (best, *_) = [one for one in decide(given, keep_best=(("loss", "min", 1),)).keep if one.step == 4]
    assert best.why == ("loss 1: one of the 1 lowest",)


def test_a_better_one_off_the_lineage_does_not_count() -> None:
    """A branch that was left can never be restored: it is no best."""
    given = [indexed("0003-c", 80, "ABANDONED", metrics={"loss": 0.1}), *row(60, metrics={"loss": 5.0}), *row(70)]
    assert kept(decide(given, keep_best=(("loss", "min", 1),))) == [60, 70]


def test_the_young_stay() -> None:
    """By the server's clock at which they were begun."""
    given = [indexed("0004-d", step, at=step * 1000) for step in (1, 2, 3, 4)]
    assert kept(decide(given, keep_for_ms=1500, now_ms=4000)) == [3, 4]


def test_pins_stay_on_and_off_the_lineage() -> None:
    """A pin keeps what no rule would, with its note as the reason."""
    given = [*row(1, 2, 3, at=1), indexed("0003-c", 80, "ABANDONED", pinned="for the paper"), indexed("0002-b", 9, pinned="-")]
    found = decide(given, keep_last=1)
    assert [(one.step, one.why) for one in found.keep if one.step in (80, 9)] == [(9, ("pinned",)), (80, ("pinned: for the paper",))]
    assert found.retire == (("0004-d", 1), ("0004-d", 2))


RULES = st.fixed_dictionaries({
    "keep_last": st.integers(0, 3), "keep_every": st.integers(0, 40), "keep_for_ms": st.integers(0, 50),
    "keep_best": st.sampled_from([(), (("loss", "min", 2),), (("loss", "max", 1),)]),
})  # fmt: skip
INDEX = st.dictionaries(
    st.tuples(st.sampled_from(sorted(LINKS)), st.integers(0, 99)),
    st.tuples(st.sampled_from(["", "-"]), st.one_of(st.none(), st.floats(0, 1)), st.integers(0, 100)),
    max_size=14,
)


@given(INDEX, RULES)
def test_all_rules_together_keep_the_union_of_what_each_keeps(names_of: dict[Any, Any], rules: dict[str, Any]) -> None:
    """Against each rule alone; and a second collection finds nothing more to do."""
    given = [
        indexed(*name, "COMMITTED" if LINEAGE.takes(*name) else "ABANDONED", pinned=pinned, metrics={"loss": loss}, created_at_ms=at)
        for name, (pinned, loss, at) in names_of.items()
    ]
    found = decide(given, now_ms=60, **rules)
    standing = {(one.run, one.step) for one in found.keep}
    alone = [decide(given, now_ms=60, **{name: rule}) for name, rule in rules.items() if rule]
    assert standing == ({name for one in alone for name in ((k.run, k.step) for k in one.keep)} if alone else set(names_of))
    assert standing | set(found.retire) == set(names_of)
    left = [one for one in given if (one.run, one.step) in standing]
    assert decide(left, now_ms=60, **rules).retire == ()


# --- rules as people give them ----------------------------------------------------------------------------------------


def test_best_rules_are_read() -> None:
    """Several, with spaces; none."""
    assert names.best_rules("loss:min:3, val/acc:max:1") == (("loss", "min", 3), ("val/acc", "max", 1))
    assert names.best_rules(None) == names.best_rules("") == ()


@pytest.mark.parametrize("wrong", ["loss", "loss:min", "loss:low:3", "loss:min:0", "loss:min:-1", "a b:min:1", "loss:min:3,", ":min:1", 7])
def test_best_rules_that_are_none(wrong: Any) -> None:
    """Named with what was given and an example."""
    with pytest.raises(InvalidInput, match="keep_best must be METRIC:min:COUNT") as caught:
        names.best_rules(wrong)
    assert caught.value.field == "keep_best"


def test_settings_make_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are those of the settings; a wrong rule is refused when it is read, by the name of its variable."""
    given = Settings.load(environ={}, keep_last=0, keep_every=500, keep_best="loss:min:3", keep_for_s=1.5, reader_grace_s=2)
    expected = Policy(keep_every=500, keep_best=(("loss", "min", 3),), keep_for_ms=1500, grace_ms=2000)
    assert Policy.of_settings(given) == expected
    with pytest.raises(ConfigError, match="DTR_KEEP_BEST: keep_best must be"):
        Settings.load(environ={"DTR_KEEP_BEST": "loss"})
    with pytest.raises(ConfigError, match="keep_last"):
        Settings.load(environ={"DTR_KEEP_LAST": "-1"})


def test_the_runs_own_rules_win() -> None:
    """What the newest run was started with; of a run that was rebuilt nothing is known, and a damaged rule is named."""
    default = Policy(keep_last=9)
    held = {"keep_last": "2", "keep_every": "10", "keep_best": "loss:min:1", "keep_for_ms": "5", "grace_ms": "7"}
    found = Policy.of_run(held, default, "run:x")
    assert found == Policy(keep_last=2, keep_every=10, keep_best=(("loss", "min", 1),), keep_for_ms=5, grace_ms=7)
    assert Policy.of_run({}, default, "run:x") == default
    with pytest.raises(StateCorrupt, match="run:x"):
        Policy.of_run({"keep_last": "x"}, default, "run:x")


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_become_plain_numbers() -> None:
    """Numbers of any kind, also numpy's; what is not finite is on record as given, without a value."""
    import numpy as np

    given = {"loss": np.float32(0.5), "n": 3, "bad": float("nan"), "worse": float("inf"), "array": np.array(2.0)}
    assert metrics.checked(given) == {"loss": 0.5, "n": 3.0, "bad": None, "worse": None, "array": 2.0}
    assert metrics.checked(None) == {}
    assert metrics.decode(metrics.encode(metrics.checked(given)), "k") == metrics.checked(given)


@pytest.mark.parametrize("wrong", [{"loss": "0.5"}, {"loss": True}, {"a:b": 1}, {"": 1}, {3: 1}, {"x" * 65: 1}, [1], {"loss": [1, 2]}])
def test_metrics_that_are_none(wrong: Any) -> None:
    """Refused before anything is copied, with the name of the metric."""
    with pytest.raises(InvalidInput, match="metrics"):
        metrics.checked(wrong)


def test_the_lowest_rank_that_says_a_number_counts() -> None:
    """Ranks may say different things."""
    assert metrics.merged([{"loss": 1.0}, {"loss": 2.0, "acc": 3.0}]) == {"loss": 1.0, "acc": 3.0}


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "x"}', "NaN", '{"a": NaN, "b": "c"}'])
def test_metrics_in_redis_that_are_damaged(text: str) -> None:
    """StateCorrupt names the key."""
    with pytest.raises(StateCorrupt, match="the-key"):
        metrics.decode(text, "the-key")
