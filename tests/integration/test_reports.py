"""Reports that nobody waits for: they arrive in order, whatever the connection does, and cost their sender nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from dtr.datasets.consuming import reports
from dtr.datasets.consuming.ledger import KEEP_MS
from dtr.datasets.consuming.reports import Reports
from dtr.state.job import JobState
from tests.lua.test_ledger_scripts import fields, opened
from tests.proxy import Proxy
from tests.servers import RedisServer
from tests.waiting import eventually


class Teller:
    """Reports of one rank through a proxy: each says how many samples it has consumed."""

    def __init__(self, server: RedisServer, job: str) -> None:
        self.proxy = Proxy(server.port)
        self.state = JobState(server.url, job)
        (self.who,), self.run = opened(self.state, "a")
        self.reports = Reports(f"redis://127.0.0.1:{self.proxy.port}/0", "test")

    def tell(self, number: int) -> None:
        keys = self.state.keys.ledger("numbers", 0, self.run.id)
        args: list[Any] = [
            f"{self.who.state_id} {self.run.id}",
            "a",
            0,
            self.who.incarnation,
            1,
            number,
            number,
            number,
            "7:0-1",
            number - 2,
        ]
        self.reports.send("ledger_report", [self.state.keys.roster, keys.ledger, keys.done], [*args, KEEP_MS])

    def answered(self) -> None:
        assert self.reports.flush(30)

    def told(self) -> set[str]:
        return {field for field in fields(self.state, self.run) if field.startswith("out/")}

    def close(self) -> None:
        self.reports.close()
        self.state.close()
        self.proxy.close()


@pytest.fixture
def teller(valkey: RedisServer, job: str) -> Iterator[Teller]:
    made = Teller(valkey, job)
    yield made
    made.close()


def test_reports_arrive_without_a_wait(teller: Teller) -> None:
    """Given a connection, when many are sent, then the last two stand, as each says which older one is part of the sums."""
    teller.reports.connect()
    for number in range(500):
        teller.tell(number)
    teller.answered()
    assert teller.told() == {"out/0/498", "out/0/499"}
    assert teller.reports.refused == ""


def test_what_was_sent_before_a_connection_or_without_an_answer_is_sent_again(teller: Teller) -> None:
    """Given reports before the first connection, and a connection that breaks, when there is another, then all have arrived."""
    teller.tell(0)
    teller.reports.connect()
    teller.answered()
    teller.proxy.set_mode("blackhole")
    for number in (1, 2, 3):
        teller.tell(number)
    teller.reports.close()
    teller.proxy.set_mode("pass")
    teller.reports.connect()
    teller.answered()
    assert teller.told() == {"out/0/2", "out/0/3"}


def test_a_server_that_does_not_answer_costs_the_sender_nothing(teller: Teller) -> None:
    """Given a path that swallows everything, when a thousand reports are sent, then that takes no longer than writing them down."""
    teller.reports.connect()
    teller.tell(0)
    teller.answered()
    teller.proxy.set_mode("blackhole")
    started = time.monotonic()
    for number in range(1, 1000):
        teller.tell(number)
    assert time.monotonic() - started < 10  # not one timeout of 2 s for each


def test_a_server_that_forgot_the_script_is_taught_it_again(teller: Teller) -> None:
    """Given SCRIPT FLUSH, when reports go on, then they arrive."""
    teller.reports.connect()
    teller.tell(0)
    teller.answered()
    teller.state.redis.script_flush()
    teller.tell(1)
    eventually(lambda: teller.told() == {"out/0/0", "out/0/1"}, timeout_s=30, what="the report")


@pytest.mark.parametrize("trouble", ["refuse", "blackhole", "half_open"])
def test_the_last_report_arrives_though_its_sender_says_nothing_more(
    teller: Teller, monkeypatch: pytest.MonkeyPatch, trouble: Literal["refuse", "blackhole", "half_open"]
) -> None:
    """Given a report on a connection that was lost, when its sender waits for the others, who wait for it, then it arrives all the same."""
    monkeypatch.setattr(reports, "SILENT_LOOKS", 2)
    teller.reports.connect()
    teller.tell(0)
    teller.answered()
    if trouble == "half_open":
        teller.proxy.half_open()
    else:
        teller.proxy.set_mode(trouble)
    teller.tell(1)
    teller.proxy.set_mode("pass")
    eventually(lambda: teller.told() == {"out/0/0", "out/0/1"}, timeout_s=30, what="the report")
    teller.answered()


def test_what_waited_for_the_next_report_goes_with_the_end(teller: Teller) -> None:
    """A trainer that closes right after its last step: what that step consumed is Redis's."""
    teller.reports.connect()
    keys = teller.state.keys
    journal = keys.journal(teller.run.id, 0)
    seat = [f"{teller.who.state_id} {teller.run.id}", "a", 0, teller.who.incarnation]
    teller.reports.send("journal_note", [keys.roster, journal], [*seat, 3, 16, KEEP_MS, "numbers", "{}"], at_once=False)
    teller.reports.close()
    assert eventually(lambda: teller.state.redis.xlen(journal)) == 1


def test_what_a_full_server_refuses_is_sent_again(own_valkey: RedisServer, job: str) -> None:
    """Given reports that were refused for want of memory, when there is some again, then all have arrived."""
    teller = Teller(own_valkey, job)
    try:
        teller.reports.connect()
        teller.tell(1)
        teller.answered()
        teller.state.redis.config_set("maxmemory", 1)
        teller.tell(2)
        teller.tell(3)
        eventually(lambda: teller.reports._connection is None, what="the refusal")
        assert "out/0/3" not in teller.told()
        teller.state.redis.config_set("maxmemory", 0)
        teller.answered()
        assert "out/0/3" in teller.told()
    finally:
        teller.close()
