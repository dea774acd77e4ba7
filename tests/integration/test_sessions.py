"""Sessions and agents of one process on a real server: barriers that name the missing, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from dtr import counters
from dtr.config import Settings
from dtr.errors import (
    BarrierBroken,
    BarrierMembersConflict,
    BarrierTimeout,
    ConfigError,
    CoordinatorRefused,
    CoordinatorUnavailable,
    FormTimeout,
    InvalidInput,
    NotJoined,
    RosterChanged,
    StaleIncarnation,
    StoreUnavailable,
)
from dtr.runs import World
from dtr.session import Session
from dtr.state.keys import Keys
from tests.proxy import Proxy
from tests.servers import RedisServer
from tests.waiting import eventually
from worker_agent import Agent, TrainingOrchestrator

Make = Callable[..., Session]


def formed(make_session: Make, count: int, **options: Any) -> list[Session]:
    """Sessions of one process that are in one run."""
    sessions = [make_session(f"w{rank}", rank=rank, world=World(low=count, high=count), **options) for rank in range(count)]
    together([lambda s=s: s.start().form() for s in sessions])
    return sessions


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Do the calls at the same time; their results, or the exceptions that they raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures: list[Future[Any]] = [pool.submit(call) for call in calls]
        return [f.exception() or f.result() for f in futures]


def test_a_timeout_names_exactly_the_missing_the_same_for_all(make_session: Make) -> None:
    """Two of four wait; both errors have the same list: rank, worker, host, last step, last beat."""
    sessions = formed(make_session, 4)
    sessions[3].page.write(17, "training")
    errors = together([lambda s=s: s.barrier("b", timeout_s=1.0) for s in sessions[:2]])
    assert all(isinstance(error, BarrierTimeout) for error in errors), errors
    assert [[(m.rank, m.worker, m.host) for m in error.missing] for error in errors] == [
        [(2, "w2", sessions[2].host), (3, "w3", sessions[3].host)]
    ] * 2
    assert "Missing: rank 2 w2 on" in str(errors[0])
    assert all(m.departed is None for m in errors[0].missing)
    assert all(m.beat_age_s < 5 for m in errors[0].missing)


def test_a_round_that_timed_out_is_consumed_for_everyone(make_session: Make) -> None:
    """The late rank gets that round's error once; then all meet in the next."""
    first, late = formed(make_session, 2)
    with pytest.raises(BarrierTimeout):
        first.barrier("b", timeout_s=0.3)
    with pytest.raises(BarrierTimeout, match="round 0"):
        late.barrier("b")
    assert together([lambda s=s: s.barrier("b") for s in (first, late)]) == [None, None]


def test_a_barrier_may_be_for_some(make_session: Make) -> None:
    """Two of three meet without the third; who disagrees about the members, or is none of them, is told."""
    a, b, c = formed(make_session, 3)
    assert together([lambda s=s: s.barrier("pair", members=["w0", "w1"]) for s in (a, b)]) == [None, None]
    with pytest.raises(InvalidInput, match="the caller w2 among them"):
        c.barrier("pair", members=["w0", "w1"])
    waiting = threading.Thread(target=lambda: together([lambda: a.barrier("mixed", members=["w0", "w1"], timeout_s=2)]))
    waiting.start()
    try:
        while a.state.redis.exists(a.state.keys.barrier("mixed", a.run.id, 0).round) == 0:
            pass
        with pytest.raises(BarrierMembersConflict, match="whole roster"):
            b.barrier("mixed")
    finally:
        waiting.join()


@pytest.mark.parametrize("members", [[], ["w0", "w0"], ["w0", "nobody"], "w0", [0]])
def test_wrong_members_are_refused(members: Any, make_session: Make) -> None:
    """None, duplicates, strangers and things that are no names."""
    (a,) = formed(make_session, 1)
    with pytest.raises(InvalidInput, match="members must be"):
        a.barrier("b", members=members)


def test_without_redis_a_barrier_waits_and_then_says_so(settings: Settings, valkey: RedisServer, make_session: Make) -> None:
    """A black hole instead of Redis: a clear error at the timeout, no verdict; and the same round once Redis is back."""
    proxy = Proxy(valkey.port)
    try:
        (a,) = formed(make_session, 1, settings=replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0"))
        proxy.set_mode("refuse")
        with pytest.raises(CoordinatorUnavailable, match="barrier 'b' round 0 has no verdict after 1 s"):
            a.barrier("b", timeout_s=1.0)
        proxy.set_mode("pass")
        a.barrier("b", timeout_s=30)
        assert a.state.redis.hget(a.state.keys.roster, ":released/b").startswith("0 ")
    finally:
        proxy.close()


def test_a_refusal_is_not_retried(settings: Settings, own_valkey: RedisServer, make_session: Make) -> None:
    """A revoked user fails at once and clearly, in a barrier too, however long its timeout."""
    with redis.Redis.from_url(own_valkey.url) as admin:
        admin.execute_command("ACL", "SETUSER", "trainer", "on", ">secret", "~*", "&*", "+@all")
        url = own_valkey.url.replace("redis://", "redis://trainer:secret@")
        (a,) = formed(make_session, 1, settings=replace(settings, redis_url=url))
        a.barrier("b")
        admin.execute_command("ACL", "SETUSER", "trainer", "off", "-@all")
        admin.execute_command("CLIENT", "KILL", "USER", "trainer")
        with pytest.raises(CoordinatorRefused) as caught:
            a.barrier("b", timeout_s=60)
        assert "secret" not in str(caught.value)
        admin.execute_command("ACL", "SETUSER", "trainer", "on", "+@all")


def test_forming_that_nobody_joins_ends_with_numbers(make_session: Make) -> None:
    """One of two: the timeout says who is there and how many are missing."""
    alone = make_session("w0", world=World(low=2, high=2)).start()
    with pytest.raises(FormTimeout, match="1 of 2 members arrived"):
        alone.form(timeout_s=0.5)


def test_leaving_ends_the_run_for_the_others(make_session: Make) -> None:
    """The others' next call says who left; form() makes the next run."""
    a, b = formed(make_session, 2)
    b.close()
    with pytest.raises(RosterChanged, match=r"rank 1 \(w1\) departed: left") as caught:
        a.barrier("b")
    assert (caught.value.worker, caught.value.rank, caught.value.reason) == ("w1", 1, "left")
    with pytest.raises(RosterChanged):
        a.check()


def test_counters_add_once_however_often_the_reply_is_lost(settings: Settings, valkey: RedisServer, make_session: Make) -> None:
    """The reply of an addition is dropped three times: it is there once."""
    proxy = Proxy(valkey.port)
    try:
        (a,) = formed(make_session, 1, settings=replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0"))
        assert counters.add(a, "saves_skipped") == 1
        proxy.drop_replies(3, matching=b"saves_skipped", then="close")
        assert counters.add(a, "saves_skipped") == 2
        assert proxy.dropped == 3
        assert counters.read(a.state) == {"saves_skipped": 2}
    finally:
        proxy.close()


def test_a_thousand_and_one_arguments_of_an_agent(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """Wrong arguments are refused before anything is joined."""
    good: dict[str, Any] = {"worker_id": "w", "coordinator_url": valkey.url, "job": job, "staging": str(tmp_path / "s")}
    for wrong, message in [
        ({"worker_id": "../x"}, "worker_id"),
        ({"job": "A B"}, "job"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": True}, "world_size"),
        ({"world_size": (3, 2)}, "world_size"),
        ({"world_size": 2, "rank": 2}, "rank"),
        ({"world_size": 2, "rank": -1}, "rank"),
        ({"coordinator_url": "http://h"}, "redis_url"),
        ({"beat": "never"}, "beat"),
        ({"ttl_s": 1, "beat_interval_s": 1}, "3 beats"),
        ({"tls": 5}, "did you mean ttl_s"),
    ]:
        with pytest.raises((ConfigError, InvalidInput), match=message):
            Agent(**{**good, **wrong})
    with redis.Redis.from_url(valkey.url) as client:
        assert not client.exists(Keys(job).meta)


def test_an_agent_before_its_start_says_so(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """Nothing is connected by the constructor, and each call says what to do first."""
    agent = Agent("w", "redis://127.0.0.1:1/0", job=job, staging=str(tmp_path / "s"))
    for call in (lambda: agent.run, lambda: agent.rank, lambda: agent.barrier("b"), agent.step):
        with pytest.raises(NotJoined, match=r"start\(\)"):
            call()
    with pytest.raises(CoordinatorUnavailable, match="dtr up"):
        agent.start()
    agent.close()


async def registered(agent: TrainingOrchestrator) -> None:
    await agent.register_worker(ip="127.0.0.1", port=8080)


def test_an_agent_registers_its_address_and_steps(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """register_worker shows the address in redis-cli; steps grow and are numbered from 0."""
    import asyncio

    agent = TrainingOrchestrator(worker_id="w", coordinator_url=valkey.url, world_size=1, rank=0, job=job, staging=str(tmp_path / "s"))
    asyncio.run(registered(agent))
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        assert client.hget(Keys(job).worker("w"), "address") == "127.0.0.1:8080"
    assert [agent.step(), agent.step(loss=0.5), agent.step(step=10)] == [0, 1, 10]
    with pytest.raises(InvalidInput, match="step must grow: got 10 after 10"):
        agent.step(step=10)
    agent.close()
    agent.close()


def test_a_reason_with_a_bar_in_it_breaks_no_message(make_session: Make) -> None:
    """Whatever the reason of a departure says, the others get BarrierBroken with the list of the missing."""
    a, b = formed(make_session, 2)
    waiting = ThreadPoolExecutor(1)
    verdict = waiting.submit(lambda: a.barrier("b"))
    eventually(lambda: a.state.redis.exists(a.state.keys.barrier("b", a.run.id, 0).round), what="the arrival")
    b.close("killed | by hand")
    error = verdict.exception(timeout=30)
    waiting.shutdown()
    assert isinstance(error, BarrierBroken)
    assert isinstance(error, RosterChanged), "one except clause is enough for a trainer"
    assert error.reason == "rank 1 (w1) departed: killed | by hand"
    assert [m.worker for m in error.missing] == ["w1"]


def test_a_rank_without_barriers_learns_from_its_beats_that_its_run_ended(make_session: Make) -> None:
    """Given a trainer that only steps, when another departs, then check() says so within some beats."""
    a, b = formed(make_session, 2)
    b.close()

    def ended() -> bool:
        try:
            a.check()
        except RosterChanged as change:
            return change.worker == "w1"
        return False

    eventually(ended, what="the news of the run's end")


def test_a_write_of_unknown_outcome_is_settled_before_the_next(
    settings: Settings, valkey: RedisServer, make_session: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an addition whose reply never came, when another counter is added to, then both are there, once each."""
    (a,) = formed(make_session, 1)
    call = a.state.call
    monkeypatch.setattr(type(a.state), "call", lambda self, *args: (call(*args), lost())[1] if args[0] == "counter_add" else call(*args))
    with pytest.raises(CoordinatorUnavailable):
        counters.add(a, "saves_skipped")
    monkeypatch.undo()
    assert counters.add(a, "saves_failed", 5) == 5
    assert counters.read(a.state) == {"saves_skipped": 1, "saves_failed": 5}


def lost() -> None:
    raise CoordinatorUnavailable("no reply")


def test_a_registration_that_fails_once_is_tried_again(make_session: Make, own_valkey: RedisServer, settings: Settings) -> None:
    """Given that the rebuild fails twice after FLUSHALL, when it works again, then the member is back, and forms, and is not stale."""
    failures = iter([StoreUnavailable("503 slow down"), StoreUnavailable("503 slow down")])

    def recover(state_id: str) -> int:
        if armed:
            error = next(failures, None)
            if error is not None:
                raise error
        return 0

    armed: list[bool] = []
    here = replace(settings, redis_url=own_valkey.url)
    a = make_session("w0", settings=here, recover=recover).start()
    a.form()
    armed.append(True)
    a.state.redis.flushall()
    eventually(lambda: a.state.redis.zscore(a.state.keys.members, "w0"), what="the member to be back")
    with pytest.raises(RosterChanged, match="Redis lost the state"):
        a.check()
    assert a.form().world_size == 1
    a.barrier("b")


@pytest.mark.parametrize("losses", [1, 3])
def test_redis_is_emptied_while_a_member_registers(make_session: Make, own_valkey: RedisServer, settings: Settings, losses: int) -> None:
    """Under the rebuild of a first start: it begins again, and the trainer has noticed nothing."""
    left = list(range(losses))

    def recover(state_id: str) -> int:
        if left:
            left.pop()
            session.state.redis.flushall()
        return 0

    session = make_session("w0", settings=replace(settings, redis_url=own_valkey.url), recover=recover)
    assert session.start().form().world_size == 1
    assert not left


def test_one_that_cannot_rebuild_keeps_no_other_from_it(make_session: Make, own_valkey: RedisServer, settings: Settings) -> None:
    """Given a host that cannot read the store, when Redis was emptied, then another member rebuilds, and both are back."""
    rebuilt: list[str] = []

    def fails(state_id: str) -> int:
        if emptied:
            raise StoreUnavailable("no such mount")
        return 0

    def works(state_id: str) -> int:
        rebuilt.append(state_id)
        return 0

    emptied: list[bool] = []
    here = replace(settings, redis_url=own_valkey.url)
    a = make_session("w0", settings=here, recover=fails).start()
    b = make_session("w1", settings=here, recover=works)
    emptied.append(True)
    a.state.redis.flushall()
    eventually(lambda: a.state.redis.hget(a.state.keys.meta, "recover_by"), what="the member that cannot to try")
    b.start()
    assert len(rebuilt) == 1
    eventually(lambda: a.state.redis.zscore(a.state.keys.members, "w0"), what="the other to be back")


def test_failed_starts_leave_no_pages_behind(tmp_path: Path, make_session: Make, settings: Settings) -> None:
    """Three starts without Redis under a launcher: one page at most, and none after close()."""
    session = make_session("w", settings=replace(settings, redis_url="redis://127.0.0.1:1/0"), launcher=str(tmp_path / "socket"))
    for _ in range(3):
        with pytest.raises(CoordinatorUnavailable):
            session.start()
    assert len(list(tmp_path.glob("page-*"))) == 1
    session.close()
    assert list(tmp_path.glob("page-*")) == []


@pytest.mark.parametrize("when", ["before", "in the barrier"])
def test_who_was_taken_over_hears_so_and_the_others_hear_of_it(settings: Settings, make_session: Make, when: str) -> None:
    """The older process of one worker_id gets StaleIncarnation at its next call, and not the news of its own departure."""
    zero, older = formed(make_session, 2, settings=replace(settings, beat_interval_s=30.0, ttl_s=90.0))

    def take_over() -> None:
        if when != "before":
            eventually(
                lambda: zero.state.redis.hget(zero.state.keys.barrier("b", zero.run.id, 0).round, "arrived") == "1", what="an arrival"
            )
        make_session("w1").start()

    def meet(session: Session) -> None:
        session.barrier("b", timeout_s=30)

    if when == "before":
        take_over()
        errors = [*together([lambda: meet(older)]), *together([lambda: meet(zero)])]
    else:
        errors = together([lambda: meet(older), take_over])[:1] + together([lambda: meet(zero)])
    assert isinstance(errors[0], StaleIncarnation), errors
    assert "takeover" in str(errors[0])
    assert isinstance(errors[1], RosterChanged), errors
    assert "rank 1 (w1) departed: takeover" in str(errors[1])
    with pytest.raises(StaleIncarnation):
        older.form()


def test_a_closed_agent_begins_nothing(settings: Settings, tmp_path: Path) -> None:
    """After close() a call says that this process has left; the run that it was in gets no checkpoint any more."""
    agent = Agent("w0", settings.redis_url, job=settings.job, store=str(tmp_path / "store"), staging=settings.staging)
    with agent:
        agent.restore(fresh=True)
        agent.step(loss=0.5)
    for call in (
        lambda: agent.save_async({"a": 1}, step=5, replicated=True), agent.step, lambda: agent.barrier("b"), agent.form, agent.start,
    ):  # fmt: skip
        with pytest.raises(NotJoined, match="has left job"):
            call()


class TestWhatIsRefused:
    @pytest.fixture
    def agent(self, settings: Settings) -> Iterator[Agent]:
        """In a run of one."""
        with Agent("w0", settings.redis_url, job=settings.job, staging=settings.staging) as agent:
            yield agent

    def test_a_loss_that_is_no_number(self, agent: Agent) -> None:
        """Nothing of that step was reported."""
        agent.step(loss=1.0)
        for bad in ("x", b"1", [1.0, 2.0], object()):
            with pytest.raises(InvalidInput, match="loss must be a number"):
                agent.step(loss=bad)  # type: ignore[arg-type]
        assert agent.current_step == 0
        assert agent.step(loss=2) == 1

    @pytest.mark.parametrize("bad", ["5", float("nan"), float("inf"), -1, True])
    def test_a_timeout_that_is_no_time(self, agent: Agent, bad: Any) -> None:
        """Names the field; the next round is the first."""
        with pytest.raises(InvalidInput, match="timeout_s must be a finite number"):
            agent.barrier("b", timeout_s=bad)
        agent.barrier("b", timeout_s=5)

    def test_an_empty_worker_id(self, settings: Settings) -> None:
        """No name is not the default name."""
        with pytest.raises(InvalidInput, match="worker_id must be"):
            Agent("", settings.redis_url, job=settings.job)

    @pytest.mark.parametrize(("ip", "port", "field"), [("127.0.0.1", "x", "port"), ("a\nb", 1, "ip"), ("x" * 300, 1, "ip"), (5, 1, "ip")])
    def test_an_address_for_people(self, settings: Settings, ip: Any, port: Any, field: str) -> None:
        """It is shown in tables, so it is one short word."""
        agent = Agent("w0", settings.redis_url, job=settings.job)
        with pytest.raises(InvalidInput, match=f"{field} must be"):
            asyncio.run(agent.register_worker(ip=ip, port=port))
