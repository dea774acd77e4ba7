"""What the launcher decides, event by event, without a process."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from worker_agent.launcher import policy
from worker_agent.launcher.outcome import Outcome
from worker_agent.launcher.policy import Job, Rules, Say, Send, Start

OK, FAILED, KILLED = Outcome(code=0), Outcome(code=3), Outcome(signal=9)
TERM, KILL = Send(signal.SIGTERM), Send(signal.SIGKILL)


def rules(n: int = 3, **changes: object) -> Rules:
    return Rules(labels=tuple(f"rank {rank}" for rank in range(n)), **changes)  # type: ignore[arg-type]


def begun(given: Rules) -> Job:
    return policy.begin(given)[0]


def acts(decision: policy.Decision) -> list[policy.Action]:
    return [action for action in decision[1] if not isinstance(action, Say)]


def says(decision: policy.Decision) -> str:
    return " / ".join(action.text for action in decision[1] if isinstance(action, Say))


def test_begins_with_a_trainer_in_every_seat() -> None:
    """Each seat is started once, as its restart 0."""
    assert policy.begin(rules())[1] == [Start(0, 0), Start(1, 0), Start(2, 0)]


def test_all_ended_well_is_status_0_and_over_only_with_the_last() -> None:
    """The job is over when every seat is done, not before."""
    job = begun(rules())
    for seat in (1, 0, 2):
        assert not policy.over(job)
        job, actions = policy.exited(job, rules(), seat, OK, 1.0)
        assert actions == []
    assert policy.over(job)
    assert policy.status(job) == 0


def test_a_failure_is_restarted_after_a_pause_that_grows_and_is_counted() -> None:
    """Restart n of one seat waits 0.2 s * 2**(n-1), up to 5 s; DTR_RESTARTS counts those of the seat."""
    given = rules(max_restarts=10)
    job, now, pauses = begun(given), 100.0, []
    for count in range(1, 8):
        decision = policy.exited(job, given, 1, KILLED, now)
        job = decision[0]
        assert f"restart {count} of 10" in says(decision)
        assert acts(policy.tick(job, given, now)) == []
        due = policy.due_at(job)
        assert due is not None
        pauses.append(round(due - now, 3))
        now = due
        job, actions = policy.tick(job, given, now)
        assert actions == [Start(1, count)]
        assert policy.due_at(job) is None
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_a_seat_starts_again_only_when_nothing_of_its_last_trainer_is_left() -> None:
    """An occupied seat is neither started nor waited for; it starts at the first tick after it is free."""
    given = rules(max_restarts=1)
    job, _ = policy.exited(begun(given), given, 1, FAILED, 0.0)
    assert policy.due_at(job, occupied={1}) is None
    job, actions = policy.tick(job, given, 9.0, occupied={1})
    assert actions == []
    assert policy.tick(job, given, 9.0)[1] == [Start(1, 1)]


def test_restarts_are_counted_over_all_seats() -> None:
    """--max-restarts is for the launcher: two seats use up two."""
    given = rules(max_restarts=2)
    job = begun(given)
    for seat in (0, 1):
        job, _ = policy.exited(job, given, seat, FAILED, 0.0)
        job, _ = policy.tick(job, given, 10.0)
    decision = policy.exited(job, given, 2, FAILED, 10.0)
    assert acts(decision) == [TERM]
    assert "all 2 restarts are used" in says(decision)


def test_without_restarts_left_the_others_are_stopped_and_its_status_is_the_jobs() -> None:
    """The failing trainer is named first; the others get SIGTERM; what they end with does not matter any more."""
    given = rules()
    decision = policy.exited(begun(given), given, 1, FAILED, 0.0)
    assert says(decision).startswith("rank 1 ended with exit status 3")
    assert acts(decision) == [TERM]
    job = decision[0]
    for seat in (0, 2):
        job, actions = policy.exited(job, given, seat, Outcome(signal=15), 1.0)
        assert actions == []
    assert policy.over(job)
    assert policy.due_at(job) is None
    assert policy.status(job) == 3


def test_a_failure_ends_the_waiting_of_another_seat() -> None:
    """A seat that waits for its restart does not start once the job has failed."""
    given = rules(max_restarts=1)
    job, _ = policy.exited(begun(given), given, 0, FAILED, 0.0)
    job, _ = policy.exited(job, given, 1, KILLED, 0.1)
    assert acts(policy.tick(job, given, 10.0)) == []
    job, _ = policy.exited(job, given, 2, Outcome(signal=15), 0.2)
    assert policy.over(job)
    assert policy.status(job) == 137


def test_who_does_not_end_within_the_grace_is_killed_once() -> None:
    """SIGKILL at the deadline, and not again at the next tick."""
    given = rules(grace_s=5.0)
    job, _ = policy.exited(begun(given), given, 0, FAILED, 100.0)
    assert policy.due_at(job) == 105.0
    assert acts(policy.tick(job, given, 104.9)) == []
    decision = policy.tick(job, given, 105.0)
    assert acts(decision) == [KILL]
    assert policy.due_at(decision[0]) is None
    assert acts(policy.tick(decision[0], given, 200.0)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_is_passed_on_once_and_the_second_kills(number: int) -> None:
    """The first is forwarded as it is; an echo of it within 0.3 s is the same press; the next one means it; a third adds nothing."""
    given = rules()
    job, actions = policy.signalled(begun(given), given, number, 10.0)
    assert Send(number) in actions
    assert acts((job, policy.signalled(job, given, number, 10.2)[1])) == []
    decision = policy.signalled(job, given, number, 11.0)
    assert acts(decision) == [KILL]
    assert acts(policy.signalled(decision[0], given, number, 12.0)) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_user_signals_are_passed_on_and_change_nothing(number: int) -> None:
    """SIGUSR1 and SIGUSR2 are the trainers' own business."""
    job = begun(rules())
    assert policy.signalled(job, rules(), number, 0.0) == (job, [Send(number)])


def test_ctrl_z_is_not_followed_and_that_is_said() -> None:
    """A stopped launcher would not beat."""
    job = begun(rules())
    decision = policy.signalled(job, rules(), signal.SIGTSTP, 0.0)
    assert (decision[0], acts(decision)) == (job, [])
    assert "Ctrl-Z" in says(decision)


def test_nobody_is_restarted_while_stopping() -> None:
    """A trainer that dies of SIGTERM, or waits for its restart when it comes, stays down."""
    given = rules(max_restarts=5)
    job, _ = policy.exited(begun(given), given, 0, FAILED, 0.0)
    job, _ = policy.signalled(job, given, signal.SIGTERM, 0.1)
    for seat in (1, 2):
        job, actions = policy.exited(job, given, seat, Outcome(signal=15), 0.2)
        assert actions == []
    assert policy.over(job)


@pytest.mark.parametrize(
    ("number", "outcomes", "status"),
    [
        (signal.SIGINT, [OK, OK], 130),
        (signal.SIGINT, [Outcome(signal=2), OK], 130),
        (signal.SIGTERM, [OK, OK], 0),
        (signal.SIGTERM, [OK, Outcome(signal=15)], 143),
        (signal.SIGTERM, [Outcome(signal=9), OK], 143),
        (signal.SIGTERM, [Outcome(code=75), Outcome(signal=15)], 75),
        (signal.SIGHUP, [Outcome(signal=1), Outcome(signal=1)], 129),
    ],
)
def test_the_status_after_a_stop_signal(number: int, outcomes: list[Outcome], status: int) -> None:
    """130 for Ctrl-C; otherwise 0 if all ended well, a trainer's own code, or 128 + the signal that the launcher got."""
    given = rules(n=2)
    job, _ = policy.signalled(begun(given), given, number, 0.0)
    for seat, outcome in enumerate(outcomes):
        job, _ = policy.exited(job, given, seat, outcome, 1.0)
    assert policy.status(job) == status


def test_one_that_was_replaced_is_not_started_again() -> None:
    """Another process holds its name: two launchers would only take it from each other for ever. Its own outcome is the job's."""
    given = rules(max_restarts=5)
    job, _ = policy.exited(begun(given), given, 0, FAILED, 0.0)
    decision = policy.replaced(job, given, 0, 0.1)
    assert acts(decision) == [TERM]
    assert "another process has registered under its name" in says(decision)
    assert policy.status(decision[0]) == 3
    assert acts(policy.tick(decision[0], given, 10.0)) == []


def test_that_one_was_replaced_changes_nothing_if_it_was_not_to_start_again() -> None:
    """It ended well, or the job is being stopped, or it runs: nothing follows."""
    given = rules(max_restarts=5)
    done, _ = policy.exited(begun(given), given, 0, OK, 0.0)
    stopping, _ = policy.signalled(begun(given), given, signal.SIGTERM, 0.0)
    for job in (begun(given), done, stopping):
        assert policy.replaced(job, given, 0, 1.0) == (job, [])


def test_an_elastic_job_goes_on_without_the_lost_down_to_its_minimum() -> None:
    """--min 2 of 3: the first lost trainer is left out and does not fail the job; the second is one too many."""
    given = rules(may_lose=1)
    lost = policy.exited(begun(given), given, 0, KILLED, 0.0)
    assert acts(lost) == []
    assert "the others go on without it" in says(lost)
    job = lost[0]
    for seat in (1, 2):
        job, _ = policy.exited(job, given, seat, OK, 1.0)
    assert policy.over(job)
    assert policy.status(job) == 0
    assert acts(policy.exited(lost[0], given, 1, KILLED, 1.0)) == [TERM]


def test_a_launcher_that_lost_all_its_trainers_has_failed() -> None:
    """With --nnodes the job may need none of ours; still the launcher must not claim success."""
    given = rules(n=2, may_lose=2)
    job, _ = policy.exited(begun(given), given, 0, KILLED, 0.0)
    job, _ = policy.exited(job, given, 1, FAILED, 0.0)
    assert policy.over(job)
    assert policy.status(job) == 3


def test_an_outcome_in_words_and_numbers() -> None:
    """As people read it, as Redis records it, as the shell reports it."""
    killed = Outcome(signal=9, step=41)
    assert (str(killed), killed.reason, killed.status) == ("was killed by signal 9 (SIGKILL) at step 41", "signal 9 (SIGKILL)", 137)
    assert str(replace(killed, job="eval")) == "was killed by signal 9 (SIGKILL) at step 41 of job eval"
    ended = Outcome(code=3, note="because")
    assert (str(ended), ended.reason, ended.status) == ("ended with exit status 3 (because)", "exit 3: because", 3)
    assert Outcome(signal=40).reason == "signal 40 (40)"
    assert Outcome(code=0).ok
