"""The record of an upload that another uploader may go on with: who may write it, who gets it, and when it is of no use any more."""

from __future__ import annotations

import pytest

from dtr.checkpoint import parts
from dtr.checkpoint.uploading import lease
from dtr.checkpoint.uploading.lease import sent_before
from dtr.state.job import JobState
from dtr.store.resume import Sent
from tests.lua.checkpoints import based, begin, claim, done, lapse, seat, snapshot, spec

ONE, TWO = Sent(number=1, crc=2**64 - 1, tag='"e1"'), Sent(number=2, crc=0, tag="")


def started(state: JobState, *, pieces: tuple[Sent, ...] = (ONE, TWO)) -> tuple[str, int, int]:
    """A claim t1 with an upload u1 on record, and what was sent of it."""
    who, run = based(state, "a", "b")
    begin(state, who[0], run)
    claim(state, run, 0, "t1")
    part = (run.id, 10, 0)
    assert lease.begin(state, part, token="t1", nonce="nt1", upload="u1")
    assert lease.note(state, part, token="t1", upload="u1", pieces=pieces)
    return part


def successor(state: JobState, part: tuple[str, int, int], token: str = "t2") -> parts.Claim:
    """The claim of another uploader, after the first one's lapsed."""
    from dtr.runs import read_run

    run = read_run(state, part[0])
    lapse(state, run, 0)
    return claim(state, run, 0, token)


class TestSuccessor:
    def test_goes_on_under_the_same_nonce(self, job_state: JobState) -> None:
        """The nonce, the store's name for the upload and every piece, checksum and tag bit by bit."""
        part = started(job_state)
        assert successor(job_state, part).nonce == "nt1"
        assert sent_before(job_state, part, "nt1") == ("u1", {1: ONE, 2: TWO})
        assert job_state.redis.ttl(job_state.keys.transfer(*part)) > 3600
        assert parts.read(job_state, part[0], 10).parts[0].claims == 2  # type: ignore[union-attr]

    def test_begins_anew_without_a_record(self, job_state: JobState) -> None:
        """Nothing was begun, or its record has expired: a new nonce, so that the object's key is nobody else's."""
        part = started(job_state)
        job_state.redis.delete(job_state.keys.transfer(*part))
        second = successor(job_state, part)
        assert second.nonce == "nt2"
        assert sent_before(job_state, part, second.nonce) == ("", {})

    def test_an_upload_that_is_gone_is_replaced(self, job_state: JobState) -> None:
        """Another upload's pieces are not this one's."""
        part = started(job_state)
        successor(job_state, part)
        assert lease.begin(job_state, part, token="t2", nonce="nt1", upload="u2")
        assert sent_before(job_state, part, "nt1") == ("u2", {})

    def test_a_piece_that_cannot_be_read_is_sent_again(self, job_state: JobState) -> None:
        """Whatever somebody wrote into the hash, what is no piece is left out."""
        part = started(job_state)
        job_state.redis.hset(job_state.keys.transfer(*part), mapping={"3": "zz", "x": "0", "4": ""})
        assert sent_before(job_state, part, "nt1") == ("u1", {1: ONE, 2: TWO})


class TestFence:
    def test_a_late_holder_writes_nothing(self, job_state: JobState) -> None:
        """Its claim lapsed and another's stands: neither its upload nor its pieces get on record."""
        part = started(job_state)
        successor(job_state, part)
        before = snapshot(job_state)
        assert not lease.begin(job_state, part, token="t1", nonce="nt1", upload="late")
        assert not lease.note(job_state, part, token="t1", upload="u1", pieces=[ONE])
        assert not lease.note(job_state, part, token="t2", upload="late", pieces=[ONE])
        assert snapshot(job_state) == before

    @pytest.mark.parametrize("end", ["aborted", "done"])
    def test_an_upload_of_what_is_over_is_refused(self, job_state: JobState, end: str) -> None:
        """Whoever comes late with a new upload learns that it must be discarded."""
        who, run = based(job_state, "a", "b")
        begin(job_state, who[0], run)
        claim(job_state, run, 0, "t1")
        if end == "aborted":
            parts.fail(job_state, who[1].state_id, spec(run), seat(who[1], run), "no slot")
        else:
            done(job_state, run, 0, "nt1")
        assert not lease.begin(job_state, (run.id, 10, 0), token="t1", nonce="nt1", upload="u1")
        assert not job_state.redis.exists(job_state.keys.transfer(run.id, 10, 0))

    def test_a_part_that_is_done_needs_no_record(self, job_state: JobState) -> None:
        """It goes with the part's facts, by whichever of the two holders of the nonce is first; the other's facts are the same."""
        part = started(job_state)
        successor(job_state, part)
        from dtr.runs import read_run

        run = read_run(job_state, part[0])
        assert done(job_state, run, 0, "nt1") == ("WRITING", "")
        assert not job_state.redis.exists(job_state.keys.transfer(*part))
        assert done(job_state, run, 0, "nt1") == ("WRITING", "")


def test_many_pieces(job_state: JobState) -> None:
    """As many as S3 allows, in one go."""
    pieces = tuple(Sent(number=n, crc=n, tag=f'"{n:032x}"') for n in range(1, 9_001))
    part = started(job_state, pieces=pieces)
    assert sent_before(job_state, part, "nt1")[1] == {sent.number: sent for sent in pieces}
