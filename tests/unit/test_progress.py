"""How far a save is: rates and times from successive looks, what a handle shows, and what a screen has room for."""

from __future__ import annotations

import logging

import pytest

from dtr.checkpoint.saving.handle import Commit, SaveHandle
from dtr.checkpoint.saving.progress import Meter, PartProgress, PartSight, SaveProgress, Sight, answered, ask, ended, measure
from dtr.cli.ckpt_watch import below, line, rows_of
from dtr.errors import InvalidInput
from dtr.state.keys import Keys

MB = 1_000_000


def part(rank: int, done: int, *, size: int = 100 * MB, state: str = "staged", uploading: bool = True, error: str = "") -> PartSight:
    return PartSight(
        rank=rank, state=state, worker=f"w{rank}", host="h", size_bytes=size, progress_bytes=done, uploading=uploading, error=error,
        checksum="",
    )  # fmt: skip


def seen(at_s: float, *parts: PartSight, state: str = "WRITING", expected: int | None = None, size: int = 0, decided_s: float = 0) -> Sight:
    return Sight(
        state=state, at_ms=int(at_s * 1000), created_at_ms=1, parts=parts, size_bytes=size, decided_at_ms=int(decided_s * 1000),
        expected=range(len(parts) if expected is None else expected),
    )  # fmt: skip


def measured(*sights: Sight) -> SaveProgress:
    meter = Meter()
    return [measure("r", 1, sight, meter) for sight in sights][-1]


def test_rate_and_time_left_come_from_what_moved_between_looks() -> None:
    """30 MB in 3 seconds is 10 MB/s: 60 MB take 6 more."""
    found = measured(seen(0, part(0, 10 * MB)), seen(3, part(0, 40 * MB)))
    (one,) = found.parts
    assert (one.state, one.done_bytes, one.total_bytes) == ("uploading", 40 * MB, 100 * MB)
    assert (one.mb_per_s, one.left_s) == (pytest.approx(10), pytest.approx(6))
    assert (found.mb_per_s, found.left_s, found.age_s) == (pytest.approx(10), pytest.approx(6), pytest.approx(2.999))


def test_looks_between_two_reports_do_not_change_the_rate() -> None:
    """Uploaders report every few seconds; looks come more often."""
    looks = [seen(0, part(0, 10 * MB)), seen(3, part(0, 40 * MB)), seen(4, part(0, 40 * MB)), seen(5, part(0, 40 * MB))]
    assert measured(*looks).parts[0].mb_per_s == pytest.approx(10)


def test_an_upload_that_hangs_gets_slower_and_an_old_rate_is_forgotten() -> None:
    """The time left grows instead of standing still; ten seconds after the speed changed only the new one counts."""
    hangs = measured(seen(0, part(0, 10 * MB)), seen(3, part(0, 40 * MB)), seen(63, part(0, 40 * MB)))
    assert hangs.parts[0].mb_per_s is not None
    assert hangs.parts[0].mb_per_s < 1
    slow = [seen(0, part(0, 0)), seen(1, part(0, 50 * MB)), *(seen(n, part(0, (49 + n) * MB)) for n in range(2, 15))]
    assert measured(*slow).parts[0].mb_per_s == pytest.approx(1)


def test_an_upload_that_begins_anew_is_measured_anew() -> None:
    """Another uploader took over and sends again from the start: no negative rate."""
    looks = [seen(0, part(0, 0)), seen(2, part(0, 80 * MB)), seen(4, part(0, 10 * MB)), seen(5, part(0, 20 * MB))]
    assert measured(*looks[:3]).parts[0].mb_per_s is None
    assert measured(*looks).parts[0].mb_per_s == pytest.approx(10)


def test_the_slowest_rank_decides_when_it_is_over() -> None:
    """Rank 1 has 90 MB to go at 1 MB/s: the sum of the rates would promise 9 seconds."""
    found = measured(seen(0, part(0, 0), part(1, 0)), seen(10, part(0, 90 * MB), part(1, 10 * MB)))
    assert found.left_s == pytest.approx(90)
    assert found.mb_per_s == pytest.approx(10)


def test_what_is_not_staged_yet_leaves_the_time_open() -> None:
    """Nobody knows how much it will be; the parts that are there are counted."""
    absent = PartSight(rank=1, state="", worker="", host="", size_bytes=0, progress_bytes=0, uploading=False, error="", checksum="")
    found = measured(seen(0, part(0, 0), absent), seen(1, part(0, 50 * MB), absent))
    assert [one.state for one in found.parts] == ["uploading", "absent"]
    assert (found.total_bytes, found.left_s) == (100 * MB, None)


def test_a_part_that_waits_shows_why() -> None:
    """The error of the last attempt, while nobody has claimed it; a part that is done has none."""
    found = measured(seen(0, part(0, 5 * MB, uploading=False, error="503"), part(1, 0, state="done", uploading=False, error="503")))
    assert [(one.state, one.error, one.left_s) for one in found.parts] == [("staged", "503", None), ("done", "", 0.0)]
    assert found.done_bytes == 105 * MB


def test_a_commit_counts_whole() -> None:
    """Whatever was seen last: its size, the time that it took, and nothing left to say of speed."""
    found = measured(seen(9, part(0, 3 * MB), state="COMMITTED", size=100 * MB, decided_s=5))
    assert (found.done_bytes, found.total_bytes, found.done_parts) == (100 * MB, 100 * MB, 1)
    assert (found.mb_per_s, found.left_s, found.age_s) == (None, None, pytest.approx(4.999))


class Pipeline:
    """Records what is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def hmget(self, key: str, fields: list[str]) -> None:
        self.asked.append((key, list(fields)))

    def time(self) -> None:
        self.asked.append(("time", []))


def test_one_look_asks_for_no_more_than_it_shows() -> None:
    """Three commands however many ranks; not the checksums of a thousand pieces."""
    pipeline = Pipeline()
    ask(pipeline, Keys("j"), "r", 1, range(1000))
    assert len(pipeline.asked) == 3
    assert not [field for field in pipeline.asked[1][1] if field.endswith("/pieces")]


def test_a_checkpoint_that_redis_does_not_know_is_an_empty_sight() -> None:
    """No state, and parts without one."""
    sight = answered(iter([[None] * 8, [None] * 9, (5, 7000)]), range(1))
    assert (sight.state, sight.at_ms, sight.part(0)) == ("", 5007, None)


class TestHandle:
    def test_shows_what_was_seen_and_asks_for_more_once_somebody_looks(self) -> None:
        """The first call nudges whoever looks; later ones are free."""
        nudges: list[int] = []
        handle = SaveHandle("r", 1, nudge=lambda: nudges.append(1))
        assert not handle.asked
        handle.begin(PartProgress(rank=0, state="staged", total_bytes=7))
        assert handle.progress().total_bytes == 7
        handle.progress()
        assert (handle.asked, nudges) == (True, [1])

    def test_calls_back_when_something_is_new(self) -> None:
        """Not twice with the same; the end of a save that came to nothing is told with its reason."""
        told: list[str] = []
        handle = SaveHandle("r", 1, on_progress=lambda now: told.append(now.state + now.reason))
        for state in ("WRITING", "WRITING", "SEALED"):
            handle.show(SaveProgress(run="r", step=1, state=state))
        handle.show(ended(handle.seen, "ABORTED", ": disk full"))
        handle.tell()
        assert told == ["WRITING", "SEALED", "ABORTED: disk full"]

    def test_an_error_of_the_callback_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is called on, whatever it raises: SystemExit would end the thread that later saves need."""
        calls: list[str] = []

        def careless(now: SaveProgress) -> None:
            calls.append(now.state)
            raise SystemExit(3)

        handle = SaveHandle("r", 1, on_progress=careless)
        with caplog.at_level(logging.ERROR):
            for state in ("WRITING", "SEALED", "COMMITTED"):
                handle.show(SaveProgress(run="r", step=1, state=state))
        assert calls == ["WRITING", "SEALED", "COMMITTED"]
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("given", [3, "print", [print]])
    def test_what_cannot_be_called_is_refused(self, given: object) -> None:
        """Before anything is staged."""
        with pytest.raises(InvalidInput, match="on_progress must be a function"):
            SaveHandle("r", 1, on_progress=given)  # type: ignore[arg-type]

    def test_progress_of_a_failed_save_says_so(self) -> None:
        """Also without anybody who looks."""
        handle = SaveHandle("r", 1)
        handle.fail("SKIPPED", ValueError("no slot"))
        assert (handle.progress().state, handle.progress().reason) == ("SKIPPED", "no slot")
        handle.commit(Commit(run="r", step=1, size_bytes=1, seconds=1))
        assert handle.progress().state == "SKIPPED"


class TestScreen:
    def many(self, count: int) -> SaveProgress:
        parts = tuple(PartProgress(rank=n, state="uploading", done_bytes=n, total_bytes=count) for n in range(count))
        return SaveProgress(run="0001-a", step=7, state="WRITING", parts=parts, expected=count)

    def test_of_many_ranks_the_last_are_shown(self) -> None:
        """In order of rank, and the rest is counted."""
        now = self.many(1000)
        shown = rows_of(now, 3)
        assert [one.rank for one in shown] == [0, 1, 2]
        assert below(now, shown) == "and 997 ranks more: 997 uploading"
        assert below(self.many(3), rows_of(self.many(3), 3)) == ""

    def test_a_line_says_where_it_is_and_what_it_waits_for(self) -> None:
        """Under way, and at its end."""
        now = measured(
            seen(0, part(0, 0), part(1, 0, uploading=False)), seen(1, part(0, 50 * MB), part(1, 0, uploading=False, error="503"))
        )
        assert line(now) == (
            "r/1 writing · 0 of 2 parts in the store · 47.7 MiB of 191 MiB, 25 % · 50 MB/s · 3.0 s left: "
            "rank 1 waits to be uploaded again: 503"
        )
        over = measured(seen(9, part(0, 0, state="done"), state="COMMITTED", size=100 * MB, decided_s=4))
        assert line(over) == "r/1 committed: 1 part, 95.4 MiB in 4.0 s (25 MB/s)"
        assert line(ended(now, "ABORTED", "disk full")).endswith("25 %: disk full")
