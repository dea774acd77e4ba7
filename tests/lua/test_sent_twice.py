"""Every script that writes may be sent twice: its reply is dropped on the way, the client sends it again, and nothing more happens.

Which scripts write is read from their headers, so a new one without a scenario fails. Each scenario runs in two jobs: in one the call
goes straight through, in the other a proxy swallows its first reply and closes. Answers and states must then be alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dtr.checkpoint.saving import failures
from dtr.checkpoint.uploading import lease
from dtr.membership import Identity, reap, stall
from dtr.state.job import JobState
from dtr.state.scripts import catalogue, load
from dtr.store.resume import Sent
from tests.lua import checkpoints as ckpt
from tests.lua import jobs
from tests.lua import test_ckpt_data as data
from tests.lua import test_dataset_scripts as dataset
from tests.lua import test_journal_scripts as journal
from tests.lua import test_ledger_scripts as ledger
from tests.lua import test_placement_scripts as placement
from tests.lua import test_restore_scripts as restore
from tests.lua import test_retention_scripts as retention
from tests.lua import test_speed_script as speed
from tests.proxy import Proxy
from tests.servers import RedisServer

Act = Callable[[JobState], Any]
Scenario = Callable[[JobState], Act]

WRITING = [script.name for script in catalogue() if script.header.writes]


# --- what each script is asked to do, in which state ------------------------------------------------------------------


def effect(act: Act) -> Act:
    """For a script whose answer tells the first call from the second on purpose: only what it leaves behind must be one."""

    def silent(state: JobState) -> None:
        act(state)

    return silent


def state_open(state: JobState) -> Act:
    return lambda s: s.call("state_open", [s.keys.meta, s.keys.events], ["f" * 16, "who", 60_000])


def state_ready(state: JobState) -> Act:
    state_open(state)(state)
    return lambda s: s.call("state_ready", [s.keys.meta, s.keys.wake, s.keys.events], ["f" * 16, 3])


def member_join(state: JobState) -> Act:
    (old,) = jobs.joined(state, "w")
    keys = [*jobs.beat_keys(state, "w")]
    return lambda s: s.call("member_join", keys, [old.state_id, "w", "new", 60_000, "h", 1, "", 11, 22])


def member_beat(state: JobState) -> Act:
    (who, _), _ = jobs.formed(state, "a", "b")
    state.redis.hset(state.keys.meta, "beat_at", state.server_now_ms() - 500)
    return lambda s: jobs.beat(s, who, number=1, ttl_ms=60_000, interval_ms=1000, step=7).run


def member_stall(state: JobState) -> Act:
    (who, _), _ = jobs.formed(state, "a", "b")
    return effect(lambda s: stall(s, who, step=7, reason="the process is stopped"))


def member_reap(state: JobState) -> Act:
    (who, gone), _ = jobs.formed(state, "a", "b")
    state.redis.zadd(state.keys.members, {gone.worker_id: 1})
    return effect(lambda s: reap(s, who.state_id))


def member_depart(state: JobState) -> Act:
    who, _ = jobs.formed(state, "a", "b")

    return effect(lambda s: jobs.leave(s, who[1]))


def form_arrive(state: JobState) -> Act:
    a, b = jobs.joined(state, "a", "b")
    jobs.arrive(state, a, low=2, high=2)
    keys, args = jobs.form_call(state, b, "0001-test", low=2, high=2)
    return lambda s: s.call("form_arrive", keys, args)


def barrier_arrive(state: JobState) -> Act:
    (a, b), run = jobs.formed(state, "a", "b")
    jobs.meet(state, a, run)
    keys, args = jobs.barrier_call(state, b, run, "b", 0)
    return lambda s: s.call("barrier_arrive", keys, args)


def barrier_break(state: JobState) -> Act:
    (a, b), run = jobs.formed(state, "a", "b")
    jobs.meet(state, a, run)
    jobs.leave(state, b)
    keys, args = jobs.break_call(state, a, run, "b", 0)
    return lambda s: s.call("barrier_break", keys, args)


def barrier_timeout(state: JobState) -> Act:
    (a, _b), run = jobs.formed(state, "a", "b")
    jobs.meet(state, a, run)
    return lambda s: jobs.time_out(s, a, run)


def counter_add(state: JobState) -> Act:
    (a,) = jobs.joined(state, "a")
    k = state.keys
    return lambda s: s.call("counter_add", [k.meta, k.fences, k.counters], [a.state_id, "a", a.incarnation, "saves", 5, 1])


def dataset_stage(state: JobState) -> Act:
    return lambda s: dataset.stage(s, "x", "a.jsonl", "samples=1")


def dataset_register(state: JobState) -> Act:
    dataset.stage(state, "x", "a.jsonl", "samples=1")

    def act(s: JobState) -> Any:  # registered or same: either way this version is current
        return dataset.register(s, "x", known=0, version=1)[1]

    return act


def placement_claim(state: JobState) -> Act:
    (a, _b), run = jobs.formed(state, "a", "b")
    return lambda s: placement.claim(s, a, run)


def placement_install(state: JobState) -> Act:
    (a, _b), run = jobs.formed(state, "a", "b")
    placement.claim(state, a, run)
    return lambda s: placement.install(s, a, run)


def speed_note(state: JobState) -> Act:
    (a, _b), run = jobs.formed(state, "a", "b")
    return lambda s: speed.note(s, a, run)


def restore_offer(state: JobState) -> Act:
    (a, b), run = jobs.formed(state, "a", "b")
    restore.offer(state, a, run, "0000-x/10")
    return lambda s: restore.offer(s, b, run, "0000-x/10")


def restore_vote(state: JobState) -> Act:
    (a, b), run = jobs.formed(state, "a", "b")
    for who in (a, b):
        restore.offer(state, who, run, "0000-x/10 0000-x/5")
    return lambda s: restore.vote(s, a, run, "0000-x/10", "it is damaged", damaged=True)


def run_base(state: JobState) -> Act:
    (a,), run = jobs.formed(state, "a")
    return lambda s: restore.base(s, a, run, "CUT")[0]


def index_run(state: JobState) -> Act:
    state_id = jobs.opened(state)
    return effect(lambda s: restore.TestIndex().run_of(s, state_id, "0003-c", "0002-b/40"))


def index_lineage(state: JobState) -> Act:
    state_id, k = jobs.opened(state), state.keys
    return lambda s: s.call("index_lineage", [k.meta, k.lineage, k.events], [state_id, "", "0003-c", "0003-c/60", "0002-b", 40])


def index_ckpt(state: JobState) -> Act:
    state_id = jobs.opened(state)
    return lambda s: restore.TestIndex().ckpt_of(s, state_id, "0002-b", 40)


def retention_retire(state: JobState) -> Act:
    a, run = retention.settled(state, "0000-o/1")
    return lambda s: retention.retire(s, a, run, "0000-o/1")


def retention_pin(state: JobState) -> Act:
    retention.settled(state, "0000-o/1")
    return lambda s: retention.pin(s, "0000-o/1", "the best")


def retention_unpin(state: JobState) -> Act:
    retention.settled(state, "0000-o/1")
    retention.pin(state, "0000-o/1")
    return effect(lambda s: retention.unpin(s, "0000-o/1"))


def retention_due(state: JobState) -> Act:
    return lambda s: retention.due(s, "token", 60_000)


def retention_forget(state: JobState) -> Act:
    retention.committed(state, "0000-o/1")
    state.redis.hset(state.keys.ckpt("0000-o", 1), "retired_at", 1)
    keys = [state.keys.ckpts, state.keys.ckpt("0000-o", 1), state.keys.parts("0000-o", 1)]
    return effect(lambda s: s.call("retention_forget", keys, ["0000-o/1"]))


def delta_note(state: JobState) -> Act:
    keys = [state.keys.delta, state.keys.events]
    return effect(lambda s: s.call("delta_note", keys, [0, "0001-a/10", "off", "it does not pay", 100, 95, 0, 8, 16]))


def ckpt_begin(state: JobState) -> Act:
    who, run = ckpt.based(state, "a", "b")
    return lambda s: ckpt.begin(s, who[0], run)


def ckpt_data(state: JobState) -> Act:
    who, run = ckpt.based(state, "a")
    ckpt.begin(state, who[0], run)
    return lambda s: data.hand_over(s, who[0], run, '{"x": {}}')


def ckpt_fail(state: JobState) -> Act:
    who, run = ckpt.based(state, "a", "b")
    ckpt.begin(state, who[0], run)
    return lambda s: ckpt.parts.fail(s, who[1].state_id, ckpt.spec(run), ckpt.seat(who[1], run), "no free slot")


def ckpt_decide(state: JobState) -> Act:
    who, run = ckpt.based(state, "a")
    ckpt.sealed(state, who, run)
    return lambda s: ckpt.decide(s, run)


def save_report(state: JobState) -> Act:
    who, run = ckpt.based(state, "a", "b")
    failed = failures.Failed(run=run.id, step=10, state="CONFLICT", reason="other bytes", begun_s=0.0)
    return lambda s: failures.report(s, who[1].state_id, ckpt.seat(who[1], run), failed, "save-1")


def part_register(state: JobState) -> Act:
    who, run = ckpt.based(state, "a")
    return lambda s: ckpt.register(s, who[0], run)


def staged(state: JobState) -> tuple[list[Identity], Any]:
    who, run = ckpt.based(state, "a")
    ckpt.begin(state, who[0], run)
    return who, run


def claimed(state: JobState) -> Any:
    _, run = staged(state)
    ckpt.claim(state, run, 0, "t0")
    return run


def part_claim(state: JobState) -> Act:
    _, run = staged(state)
    return lambda s: ckpt.claim(s, run, 0, "t0")


def part_renew(state: JobState) -> Act:
    run = claimed(state)
    return lambda s: ckpt.parts.renew(s, run.id, 10, 0, token="t0", lease_ms=60_000, progress_bytes=5)


def transfer_begin(state: JobState) -> Act:
    run = claimed(state)
    return lambda s: lease.begin(s, (run.id, 10, 0), token="t0", nonce="nt0", upload="u1")


def transfer_note(state: JobState) -> Act:
    run = claimed(state)
    part = (run.id, 10, 0)
    lease.begin(state, part, token="t0", nonce="nt0", upload="u1")
    return lambda s: lease.note(s, part, token="t0", upload="u1", pieces=[Sent(number=3, crc=5, tag="etag")])


def part_release(state: JobState) -> Act:
    run = claimed(state)
    return effect(lambda s: ckpt.parts.release(s, run.id, 10, 0, token="t0", error="slow", retry_ms=60_000))


def part_done(state: JobState) -> Act:
    run = claimed(state)
    return lambda s: ckpt.done(s, run, 0, "nt0")


def part_lose(state: JobState) -> Act:
    _, run = staged(state)
    return lambda s: ckpt.parts.lose(s, run.id, 10, 0, seen="staged", reason="its host is gone")


def ledger_open(state: JobState) -> Act:
    (a,), run = jobs.formed(state, "a")
    return effect(lambda s: ledger.open_ledger(s, a, run))


def ledger_lease(state: JobState) -> Act:
    (a,), run = ledger.opened(state, "a")
    return lambda s: ledger.lease(s, a, run, 3, want=2, start=0)


def ledger_report(state: JobState) -> Act:
    (a,), run = ledger.opened(state, "a")
    ledger.lease(state, a, run, 3)
    return lambda s: ledger.report(s, a, run, 3, 1, "0-25")


def journal_note(state: JobState) -> Act:
    (a,), run = jobs.formed(state, "a")
    return effect(lambda s: journal.note(s, a, run, 3))


def dataset_skip(state: JobState) -> Act:
    return effect(lambda s: journal.skip(s, "part-0.jsonl:3-7"))


def ledger_quarantine(state: JobState) -> Act:
    (a,), run = ledger.opened(state, "a")
    ledger.lease(state, a, run, 3)
    return lambda s: ledger.quarantine(s, a, run, 3, 1)


def ledger_release(state: JobState) -> Act:
    ledger_quarantine(state)(state)
    return effect(lambda s: ledger.release(s, 3))


# --- the trial --------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(valkey: RedisServer) -> Iterator[Proxy]:
    found = Proxy(valkey.port)
    yield found
    found.close()


def outcome(act: Act, state: JobState) -> Any:
    """What the call answered, or the error that it raised."""
    try:
        return act(state)
    except Exception as exc:
        return type(exc), str(exc)


def plain(value: Any, state: JobState) -> Any:
    """The value without what differs from job to job: times, ids of streams, the state id and the job's name."""
    text = repr(value).replace(state.job, "JOB").replace(state.redis.hget(state.keys.meta, "state_id") or "none", "STATE")
    return re.sub(r"\b1[0-9]{12}(\.0)?\b", "TIME", re.sub(r"\b\d{13}-\d+\b", "ID", text))


def dump(state: JobState) -> dict[str, Any]:
    """The whole job, streams included."""
    found: dict[str, Any] = ckpt.snapshot(state)
    for key in sorted(state.redis.keys(f"{state.keys.prefix}*")):
        kind = state.redis.type(key)
        if kind == "stream":
            found[key] = [fields for _, fields in state.redis.xrange(key)]
        elif kind == "set":
            found[key] = sorted(state.redis.smembers(key))
        elif kind == "zset":  # by member: deadlines of the same millisecond have no order of their own
            found[key] = sorted(state.redis.zrange(key, 0, -1, withscores=True))
    return found


@pytest.mark.parametrize("name", WRITING)
def test_a_lost_reply_changes_nothing(name: str, valkey: RedisServer, proxy: Proxy, job: str) -> None:
    """Sent once or twice, the script answers the same and leaves the same behind."""
    scenario: Scenario = globals()[name]
    once, twice = JobState(valkey.url, f"{job}-o"), JobState(valkey.url, f"{job}-t")
    act = scenario(once)
    expected = outcome(act, once)
    act = scenario(twice)
    cut = JobState(f"redis://127.0.0.1:{proxy.port}/0", twice.job)
    cut.redis.script_load(load(name).text)
    proxy.drop_replies(1, matching=load(name).sha.encode(), then="close")
    answer = outcome(act, cut)
    assert proxy.dropped == 1, "the script was not called, or its reply came through"
    assert plain(answer, twice) == plain(expected, once)
    assert plain(dump(twice), twice) == plain(dump(once), once)
    for state in (once, twice, cut):
        state.close()
