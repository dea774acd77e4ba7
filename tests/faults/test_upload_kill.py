"""Uploaders die and stop at every point between claim and decision: one commit, of the right bytes, and nothing left over (I1, I2, I9)."""

from __future__ import annotations

import os
import signal

import pytest

from dtr.checkpoint import parts
from dtr.checkpoint.staging.slots import finish
from dtr.errors import NotFound
from tests.uploads import LIMITS, Training, follow, other_uploader, outcome, payload, verified, wait_for_stop
from tests.waiting import eventually

UPLOADING = ["upload.after_claim", "upload.mid_put", "upload.after_put", "upload.after_part_done"]
DECIDING = ["commit.before_manifest", "commit.after_manifest", "commit.before_decide", "commit.after_decide"]
STORING = ["store.local.before_write", "store.local.before_link", "store.local.after_link", "store.local.after_sync"]


def killed(training: Training, name: str, *, step: int = 1, rank: int | str = 0) -> None:
    status, _ = outcome(other_uploader(training, step=step, rank=rank, fault=f"{name}=kill"))
    assert status == -signal.SIGKILL


@pytest.mark.parametrize("name", UPLOADING + DECIDING + STORING)
def test_a_killed_uploader_is_succeeded(training: Training, name: str) -> None:
    """Whatever it had done, the next one commits the part once, and frees the slot."""
    training.stage()
    killed(training, name)
    assert training.settled() == "COMMITTED"
    verified(training)
    assert not [found for found in training.slots() if found.kind == "STAGED"]
    assert [fields["event"] for _, fields in training.state.redis.xrange(training.state.keys.events)].count("ckpt_committed") == 1
    assert training.state.redis.hget(training.state.keys.meta, "latest") == f"{training.run.id}/1"


@pytest.mark.parametrize("name", ["commit.after_manifest", "commit.before_decide", "commit.after_decide"])
def test_a_commit_leaves_nothing_of_earlier_uploads(training: Training, name: str) -> None:
    """The first uploader leaves its object, the second dies at its decision: once the checkpoint is decided, that object is gone."""
    training.stage()
    killed(training, "upload.after_put")
    assert len(training.objects()) == 1
    eventually(lambda: training.view().parts[0].lease_until_ms < training.state.server_now_ms(), what="the lapse of the lease")
    killed(training, name)
    assert training.settled() == "COMMITTED"
    verified(training)


@pytest.mark.parametrize("name", ["upload.mid_put", "upload.after_put", "commit.before_manifest"])
def test_killed_twice_at_the_same_point(pair: Training, name: str) -> None:
    """A second death at the same point, with another rank's part beside it, changes nothing."""
    for rank in (0, 1):
        pair.stage(rank=rank)
    uploader = pair.uploader()
    assert uploader.upload_part(pair.job, pair.run.id, 1, 1) == "WRITING"
    killed(pair, name)
    if name in UPLOADING[:3]:
        eventually(lambda: pair.view().parts[0].lease_until_ms < pair.state.server_now_ms(), what="the lapse of the lease")
        killed(pair, name)
    else:
        killed(pair, name, rank="settle")
    assert pair.settled() == "COMMITTED"
    verified(pair)
    uploader.close()


def test_a_lease_protects_no_longer_than_it_lasts(training: Training) -> None:
    """Until the dead uploader's lease lapses the part is BUSY; then another has it."""
    training.stage()
    killed(training, "upload.after_claim")
    uploader = training.uploader()
    first = uploader.upload_part(training.job, training.run.id, 1, 0)
    assert first in {"BUSY", "COMMITTED"}
    eventually(lambda: uploader.upload_part(training.job, training.run.id, 1, 0) == "COMMITTED", what="the successor's commit")
    uploader.close()


def test_a_part_that_kills_its_uploader_each_time_is_given_up(training: Training) -> None:
    """After max_attempts without progress the checkpoint is aborted, with the reason; another step of the same job goes on."""
    training.stage(1)
    training.stage(2)
    for _ in range(LIMITS.max_attempts):
        eventually(lambda: training.view().parts[0].lease_until_ms < training.state.server_now_ms(), what="the lapse of the lease")
        killed(training, "upload.after_claim")
    assert training.settled(1) == "ABORTED"
    assert "3 attempts to upload its part ended without progress" in training.view(1).reason
    assert training.manifest(1).decision == "abort"
    assert training.objects(1) == []
    assert training.settled(2) == "COMMITTED"
    verified(training, 2)
    assert not [found for found in training.slots() if found.kind == "STAGED"]


class TestStopped:
    """An uploader is stopped, everything goes on without it, and it continues when all is over."""

    def test_before_the_manifest(self, training: Training) -> None:
        """Its manifest loses, it adopts what was decided, and the slot that was reused meanwhile is untouched."""
        training.stage()
        late = other_uploader(training, fault="commit.before_manifest=stop")
        wait_for_stop(late, eventually)
        assert training.settled() == "COMMITTED"
        before = training.manifest_bytes()
        for step in (2, 3):
            training.stage(step)
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late) == (0, "COMMITTED")
        assert training.manifest_bytes() == before
        verified(training)
        for step in (2, 3):
            assert training.settled(step) == "COMMITTED"
            verified(training, step)

    def test_before_the_manifest_of_what_was_aborted(self, pair: Training) -> None:
        """Nothing aborted comes back: the abort record is there first, and the late committer adopts it."""
        for rank in (0, 1):
            pair.stage(rank=rank)
        uploader = pair.uploader()
        uploader.upload_part(pair.job, pair.run.id, 1, 1)
        late = other_uploader(pair, fault="commit.before_manifest=stop")
        wait_for_stop(late, eventually)
        pair.state.redis.hset(pair.state.keys.ckpt(pair.run.id, 1), mapping={"state": "ABORTING", "reason": "a failover forgot the seal"})
        assert uploader.settle(pair.job, pair.run.id, 1) == "ABORTED"
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late) == (0, "ABORTED")
        assert pair.manifest().decision == "abort"
        assert pair.state_of() == "ABORTED"
        assert pair.objects() == []
        uploader.close()

    def test_in_mid_upload(self, training: Training) -> None:
        """Its slot stays its own while it holds it; its object becomes nobody's and is gone; its record comes too late."""
        training.stage()
        late = other_uploader(training, fault="upload.mid_put=stop")
        wait_for_stop(late, eventually)
        assert training.settled() == "COMMITTED"
        (held,) = [found for found in training.slots() if found.kind == "STAGED"]
        assert not finish(held, "committed")
        training.stage(2)
        before = training.manifest_bytes()
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late)[1] == "LOST"
        assert training.manifest_bytes() == before
        verified(training)
        training.reconciler().look()
        assert [found.record.step for found in training.slots() if found.kind == "STAGED" and found.record] == [2]
        assert training.settled(2) == "COMMITTED"
        verified(training, 2)

    def test_after_its_put(self, training: Training) -> None:
        """Another claim has a nonce of its own, so two whole objects of one part never meet; the unneeded one is deleted."""
        training.stage()
        late = other_uploader(training, fault="upload.after_put=stop")
        wait_for_stop(late, eventually)
        assert training.settled() == "COMMITTED"
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late)[1] == "LOST"
        verified(training)

    def test_while_the_record_is_known_to_redis_alone(self, training: Training) -> None:
        """Stopped between the manifest and Redis: another uploader adopts the manifest, which is what it would have put."""
        training.stage()
        late = other_uploader(training, fault="commit.after_manifest=stop")
        wait_for_stop(late, eventually)
        before = training.manifest_bytes()
        assert training.state_of() == "SEALED"
        assert training.settled() == "COMMITTED"
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late) == (0, "COMMITTED")
        assert training.manifest_bytes() == before
        verified(training)


class TestAbort:
    @pytest.mark.parametrize("name", ["abort.before_record", "abort.after_record", "commit.before_decide", "commit.after_decide"])
    def test_a_killed_aborter_is_succeeded(self, pair: Training, name: str) -> None:
        """The abort is decided once, objects go only after its record, slots are freed, and everyone reads the same reason."""
        pair.stage(rank=0)
        uploader = pair.uploader()
        assert uploader.upload_part(pair.job, pair.run.id, 1, 0) == "WRITING"
        parts.fail(pair.state, pair.members[1].state_id, pair.spec(), pair.fence(1), "rank 1: skipped: no slot")
        killed(pair, name, rank="settle")
        if name == "abort.before_record":
            assert len(pair.objects()) == 1
            with pytest.raises(NotFound):
                pair.manifest()
        assert pair.settled() == "ABORTED"
        assert (pair.manifest().decision, pair.manifest().reason) == ("abort", "rank 1: skipped: no slot")
        assert pair.view().reason == "rank 1: skipped: no slot"
        assert pair.objects() == []
        assert not [found for found in pair.slots() if found.kind == "STAGED"]
        uploader.close()

    def test_against_a_commit_that_was_first(self, training: Training) -> None:
        """The commit record is in the store; an aborter that Redis misled adopts it, and deletes nothing."""
        training.stage()
        killed(training, "commit.after_manifest")
        training.state.redis.hset(training.state.keys.ckpt(training.run.id, 1), mapping={"state": "ABORTING", "reason": "misled"})
        assert training.settled() == "COMMITTED"
        verified(training)

    def test_an_upload_for_an_aborted_checkpoint_stops(self, pair: Training) -> None:
        """The rank that still uploads when another fails learns it, and leaves nothing."""
        pair.stage(rank=0)
        late = other_uploader(pair, fault="upload.after_put=stop")
        wait_for_stop(late, eventually)
        parts.fail(pair.state, pair.members[1].state_id, pair.spec(), pair.fence(1), "rank 1: failed")
        assert pair.settled() == "ABORTED"
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late)[1] == "LOST"
        assert pair.objects() == []
        pair.reconciler().look()
        assert not [found for found in pair.slots() if found.kind == "STAGED"]


def test_objects_that_vanished_are_not_committed(pair: Training) -> None:
    """A sealed checkpoint whose object somebody deleted is aborted, naming it, rather than made visible."""
    for rank in (0, 1):
        pair.stage(rank=rank)
    uploader = pair.uploader()
    uploader.upload_part(pair.job, pair.run.id, 1, 0)
    (victim,) = pair.objects()
    pair.store.delete(victim)
    assert uploader.upload_part(pair.job, pair.run.id, 1, 1) == "ABORTED"
    assert victim in pair.manifest().reason
    assert pair.objects() == []
    uploader.close()


def test_two_uploaders_at_once_commit_once(training: Training) -> None:
    """Both are woken for every part; each part is carried once, and both tell the same end."""
    training.stage()
    children = [other_uploader(training) for _ in range(3)]
    words = sorted(outcome(child)[1] for child in children)
    assert "COMMITTED" in words
    assert set(words) <= {"COMMITTED", "BUSY"}
    verified(training)
    assert payload(1, 0) == training.store.get(training.objects()[0])
    uploader = training.uploader()
    for wake in training.reconciler().look().wakes:
        assert follow(uploader, wake) == "COMMITTED"
    uploader.close()
