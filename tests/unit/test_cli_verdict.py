"""The verdict on a job, and what needs a person; decided from values alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtr.membership import MemberView
from dtr.views.checkpoints import CheckpointView, on_lineage, parts_of
from dtr.views.failures import FailedSave
from dtr.views.jobs import JobSummary, choose, pick
from dtr.views.reading import Fields
from dtr.views.uploaders import UploaderView
from dtr.views.verdict import verdict, warnings
from dtr.views.workers import DepartedView, WorkersView, WorkerView, condition, describe, describe_departed

NOW_MS = 1_795_442_830_123
READY = {"state_id": "s", "phase": "READY", "beat_at": str(NOW_MS - 200)}


def worker(rank: int | None, state: str = "alive", **changes) -> WorkerView:
    name = f"n-{rank if rank is not None else 'new'}"
    base = WorkerView(
        worker=name, rank=rank, condition=state, host="h1", pid=7, address="", step=3, loss=None, phase="training", idle_s=0.0, late_ms=0,
        beat_age_s=0.4, deadline_s=4.6, incarnation=f"inc-{name}", forming=False,
    )  # fmt: skip
    return replace(base, **changes)


def gone(rank: int | None, reason: str, ago_s: float) -> DepartedView:
    return DepartedView(worker=f"n-{rank}", rank=rank, reason=reason, ago_s=ago_s, incarnation="x", returned=False)


def people(*workers: WorkerView, run: str = "0001-a", departed: tuple[DepartedView, ...] = ()) -> WorkersView:
    return WorkersView(job="j", run=run, last_run="0001-a", generation=3, workers=workers, departed=departed)


def judged(found: WorkersView, **meta: str) -> tuple[str, str]:
    return verdict(Fields("meta", {**READY, **meta}), found, now_ms=NOW_MS)


def test_a_job_that_nobody_joined_is_unknown():
    """No state at all: the job's name is probably wrong."""
    assert verdict(Fields("meta", {}), people(run=""), now_ms=NOW_MS)[0] == "unknown"


def test_an_open_run_with_every_rank_alive_is_running():
    """The sentence counts the ranks, newcomers excepted."""
    assert judged(people(worker(0), worker(1), worker(None))) == ("running", "run 0001-a: 2 of 2 ranks alive")


@pytest.mark.parametrize("state", ["late", "stalled", "overdue"])
def test_an_open_run_with_a_rank_that_is_not_well_is_degraded(state):
    """The sentence names the rank and what is the matter."""
    word, sentence = judged(people(worker(0), worker(1, state)))
    assert word == "degraded"
    assert sentence == f"run 0001-a: 1 of 2 ranks alive; rank 1 (n-1) is {state}"


def test_members_without_a_run_are_forming():
    """How many have arrived, of how many, and how many are wanted."""
    word, sentence = judged(people(worker(0, forming=True), worker(1), run=""), forming_world="2 4")
    assert word == "forming"
    assert sentence == "no run is open: 1 of 2 living members has arrived for the next one; 2 to 4 are wanted"


def test_a_job_whose_members_are_all_overdue_is_dead():
    """Nobody is left to record the deaths, so members are on the books; the last beat tells when it happened."""
    word, sentence = judged(people(worker(0, "overdue"), worker(1, "overdue")), beat_at=str(NOW_MS - 600_000))
    assert (word, sentence) == ("dead", "nobody is alive: 2 members are overdue; the last beat came 10 min ago")


def test_a_dead_job_names_the_first_that_failed():
    """Of those who departed, the one that went first for another reason than leaving is the likely cause."""
    left = (gone(0, "left with BarrierBroken", 40), gone(2, "left", 41), gone(1, "signal 9", 50))
    word, sentence = judged(people(run="", departed=left))
    assert (word, sentence) == ("dead", "nobody is alive: rank 1 (n-1) departed 50 s ago: signal 9")


def test_a_job_that_everybody_left_is_over():
    """Left or exit 0 is no failure; an older failure of a former roster does not count."""
    left = (gone(0, "left", 12), gone(1, "exit 0", 15), replace(gone(9, "signal 9", 900), rank=None))
    assert judged(people(run="", departed=left)) == ("finished", "all left in good order, the last one 12 s ago")


def test_a_state_under_reconstruction_is_recovering():
    """Whether somebody is at it, or nobody is any more."""
    word, sentence = judged(people(worker(0)), phase="RECOVERING", recover_until=str(NOW_MS + 30_000))
    assert word == "recovering"
    assert "30 s" in sentence
    assert "next process that joins" in judged(people(worker(0)), phase="RECOVERING", recover_until=str(NOW_MS - 1))[1]


def warned(*workers: WorkerView, uploaders: tuple[UploaderView, ...] = (), ckpts: tuple[CheckpointView, ...] = ()) -> str:
    return "\n".join(warnings(people(*workers), uploaders=uploaders, checkpoints=ckpts, last_run="0001-a"))


def test_a_job_that_is_well_warns_of_nothing():
    """No noise."""
    present = UploaderView(host="h1", present=True, members=1, waiting_parts=0, fields={})
    assert warned(worker(0), uploaders=(present,)) == ""


def test_a_host_without_uploader_is_warned_of_with_the_remedy():
    """The host, what waits there, and what to start."""
    text = warned(worker(0), uploaders=(UploaderView(host="h1", present=False, members=2, waiting_parts=1, fields={}),))
    assert text == "no uploader on h1 (2 members, 1 staged part waits): start `celery -A tasks worker` or `dtr up` there"


@pytest.mark.parametrize(("said", "warns"), [("45", True), ("0", False), ("x", False), (None, False)])
def test_an_uploader_that_takes_up_nothing_is_warned_of(said, warns):
    """It is there, and parts wait: its own word for it counts."""
    stuck = UploaderView(host="h1", present=True, members=2, waiting_parts=1, fields={} if said is None else {"stuck_s": said})
    text = warned(worker(0), uploaders=(stuck,))
    assert text == ("the uploader on h1 has taken up no part for 45 s: see its log, or start it anew" if warns else "")


def test_many_hosts_without_uploader_are_one_warning():
    """A thousand lines would hide the others: the first hosts are named, the rest counted."""
    missing = tuple(UploaderView(host=f"h{i}", present=False, members=2, waiting_parts=0, fields={}) for i in range(9))
    assert warned(worker(0), uploaders=missing).startswith("no uploader on h0, h1, h2, h3 and 5 more (18 members): start")


def test_members_that_are_not_well_are_warned_of():
    """Stalled with its process, late with what is left, and beats that do not get their turn."""
    assert "see process 7" in warned(worker(1, "stalled", idle_s=90.0))
    assert "has not beaten for 3.2 s" in warned(worker(1, "late", beat_age_s=3.2))
    assert "beats 2.5 s late" in warned(worker(1, late_ms=2500))
    assert warned(worker(1, late_ms=400)) == ""


CKPT = {"state": "WRITING", "world_size": "3", "expected": "3", "done": "1", "replicated": "none", "created_at": str(NOW_MS - 4000)}
PARTS = {
    "0/state": "done", "0/size_bytes": "10", "0/host": "h1",
    "1/state": "staged", "1/host": "h2", "1/size_bytes": "10", "1/error": "StoreUnavailable: 503", "1/attempts": "0", "1/failures": "3",
}  # fmt: skip
ROSTER = {"member:n-2": "2 inc h3", "world_size": "3"}


def checkpoint(run: str = "0001-a", **changes: str) -> CheckpointView:
    fields = Fields("ckpt", {**CKPT, **changes})
    parts = parts_of(fields, Fields("parts", PARTS), ROSTER, now_ms=NOW_MS)
    return CheckpointView(
        run=run, step=4, state=fields.text("state"), reason=fields.text("reason"), latest=False, on_lineage=True, size_bytes=None,
        world_size=3, replicated="none", done=1, expected=3, store="", created_at_ms=None, decided_at_ms=None, age_s=4.0,
        decided_ago_s=None, parts=parts,
    )  # fmt: skip


def test_every_expected_part_is_listed_even_if_nobody_staged_it():
    """A part that is absent is named after the seat of its run's roster."""
    parts = checkpoint().parts
    assert parts is not None
    assert [(part.rank, part.state) for part in parts] == [(0, "done"), (1, "staged"), (2, "absent")]
    assert (parts[2].worker, parts[2].host) == ("n-2", "h3")


def test_of_a_replicated_checkpoint_one_part_is_expected():
    """The writer's."""
    fields = Fields("ckpt", {**CKPT, "replicated": "all", "writer": "1"})
    assert [part.rank for part in parts_of(fields, Fields("parts", {}), {}, now_ms=NOW_MS)] == [1]


def test_checkpoints_that_do_not_get_through_are_warned_of():
    """Errors of the store, an abort under way, and a part that will never come since its run is over."""
    assert warned(ckpts=(checkpoint(),)) == "checkpoint 0001-a/4 does not get through: rank 1: StoreUnavailable: 503"
    assert "is being aborted: rank 1 skipped" in warned(ckpts=(checkpoint(state="ABORTING", reason="rank 1 skipped"),))
    other = checkpoint("0000-z")
    assert other.parts is not None
    quiet = replace(other, parts=tuple(replace(part, error="") for part in other.parts))
    assert "waits for rank 2, which will not come" in warned(ckpts=(quiet,))


def lost(step: int, *, since_latest: bool = True) -> FailedSave:
    return FailedSave(
        run="0001-a", step=step, state="ABORTED", reason="rank 1: disk full", rank=None, worker="", at_ms=1, ago_s=30.0 + step,
        since_latest=since_latest,
    )  # fmt: skip


def test_saves_that_failed_since_the_latest_commit_are_warned_of():
    """The newest is named; one that a later commit made good is history."""
    people_ = people(worker(0))
    text = warnings(people_, uploaders=(), checkpoints=(), last_run="", failed=(lost(2), lost(1), lost(0, since_latest=False)))
    assert text == ("2 saves have failed since the latest commit; the newest, step 2 of run 0001-a, 32 s ago",)
    assert warnings(people_, uploaders=(), checkpoints=(), last_run="", failed=(lost(0, since_latest=False),)) == ()


def test_a_stall_is_warned_of_with_its_reason():
    """As the launcher has it."""
    assert "(the process is stopped (SIGSTOP or a debugger))" in warned(
        worker(1, "stalled", idle_s=90.0, stalled="the process is stopped (SIGSTOP or a debugger)")
    )


@pytest.mark.parametrize(
    ("run", "step", "on"),
    [("0001-a", 10, True), ("0001-a", 11, False), ("0002-b", 10_000, True), ("0003-c", 1, True), ("0000-z", 1, False)],
)
def test_the_lineage_takes_a_run_up_to_its_last_step(run, step, on):
    """A run without an entry is off the lineage, unless it is the newest."""
    assert on_lineage(run, step, {"0001-a": "10", "0002-b": ""}, "0003-c") is on


@pytest.mark.parametrize(
    ("deadline_ms", "age_ms", "phase", "word"),
    [(4600, 400, "training", "alive"), (2400, 2600, "training", "late"), (-1, 5001, "stalled", "overdue"),
     (4600, 400, "stalled", "stalled"), (3000, None, "", "alive")],
)  # fmt: skip
def test_the_condition_of_a_member(deadline_ms, age_ms, phase, word):
    """The deadline counts first, then the launcher's word, then how much of the time to live has passed."""
    assert condition(deadline_ms=deadline_ms, age_ms=age_ms, phase=phase) == word


def test_a_member_whose_hash_expired_keeps_its_seat_and_its_host():
    """What Redis forgot with the hash, the roster and the run's record still tell."""
    seen = describe(
        [MemberView(worker_id="n-1", deadline_ms=-9000, fields={})],
        now_ms=NOW_MS, prefix="worker:", roster={"n-1": "1 inc"}, record={"member:n-1": "1 inc h9"}, forming={},
    )  # fmt: skip
    assert [(one.rank, one.host, one.condition, one.beat_age_s) for one in seen] == [(1, "h9", "overdue", None)]


def test_a_newcomer_under_the_name_of_a_seat_has_no_seat():
    """A restarted worker is not the incarnation that holds the rank."""
    fields = {"incarnation": "new", "beat_at": str(NOW_MS)}
    seen = describe(
        [MemberView(worker_id="n-1", deadline_ms=5000, fields=fields)],
        now_ms=NOW_MS, prefix="worker:", roster={"n-1": "1 old"}, record={}, forming={"n-1": "new -1 h"},
    )  # fmt: skip
    assert (seen[0].rank, seen[0].forming) == (None, True)


def test_the_departed_are_sorted_and_marked():
    """The newest first; the rank only if this registration held it; whether the worker is back."""
    departed = {"n-1": f"inc1 {NOW_MS - 5000} signal 9", "n-2": f"old {NOW_MS - 1000} exit 1"}
    seen = describe_departed(departed, now_ms=NOW_MS, key="departed", roster={"n-1": "1 inc1", "n-2": "2 inc2"}, present={"n-2"})
    assert [(one.worker, one.rank, one.reason, one.returned) for one in seen] == [
        ("n-2", None, "exit 1", True),
        ("n-1", 1, "signal 9", False),
    ]


def summary(job: str, alive: int, damage: str = "") -> JobSummary:
    return JobSummary(job=job, alive=alive, overdue=0, phase="READY", run="", latest="", opened_ago_s=1.0, damage=damage)


@pytest.mark.parametrize(
    ("jobs", "chosen"),
    [([], None), ([("a", 0)], "a"), ([("a", 2), ("b", 0)], "a"), ([("a", 2), ("b", 1)], None), ([("a", 0), ("b", 0)], None)],
)
def test_the_job_that_is_meant(jobs, chosen):
    """The only one alive, or the only one there is; otherwise nobody guesses."""
    assert choose([summary(name, alive) for name, alive in jobs]) == chosen


@pytest.mark.parametrize(
    ("others", "chosen", "why"),
    [
        ([], None, ""), ([("a", 0)], "a", "the only one that is not damaged"), ([("a", 2)], "a", "the only one alive"),
        ([("a", 0), ("b", 0)], None, ""),
    ],
)  # fmt: skip
def test_a_damaged_job_is_not_guessed_and_is_in_nobodys_way(others, chosen, why):
    """Unless it is alive: then it may be the one that is meant."""
    listed = [summary("bad", 0, "damage"), *(summary(name, alive) for name, alive in others)]
    assert pick(listed, "default", asked=False) == (chosen, why)
    alive = [summary("bad", 1, "damage"), *listed[1:]]
    assert choose(alive) is None


def test_a_job_that_was_asked_for_is_never_replaced():
    """Also if it does not exist, and others do; without any job the default stands."""
    assert pick([summary("a", 1)], "b", asked=True)[0] == "b"
    assert pick([], "default", asked=False)[0] == "default"
