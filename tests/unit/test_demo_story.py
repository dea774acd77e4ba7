"""The demo's story, its lines, its checks and its figures, from notes as trainers write them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dtr.errors import BarrierBroken, RosterChanged
from dtr.runs import Member, Run
from worker_agent.demo.checks import Check, Ending, check_all
from worker_agent.demo.figures import Upload, measure
from worker_agent.demo.narrator import Narrator
from worker_agent.demo.proof import Position, Proof
from worker_agent.demo.records import (
    Committed,
    Event,
    Finished,
    Formed,
    Halted,
    Note,
    Notebook,
    Notes,
    Restored,
    Saved,
    Started,
    Stepped,
)
from worker_agent.demo.story import Kill, Story, moves
from worker_agent.demo.trainer import blamed

WORKERS = ["host-0", "host-1", "host-2", "host-3"]
FIRST, SECOND, THIRD = "0001-aaaa", "0002-bbbb", "0003-cccc"
KILL = Kill(at=2.0, wall_ms=1_000_000.0, worker="host-2", rank=2, pid=102, run=FIRST, step=5)
BATCH = 4  # samples that each rank takes for a step; step 7 is the first of epoch 1
REASON = "rank 2 (host-2) departed: signal 9 (SIGKILL)"

# Twelve shards: three each; host-2's go to the others; on its return it gets three, one of each.
HELD: dict[str, dict[str, tuple[int, ...]]] = {
    FIRST: {"host-0": (0, 1, 2), "host-1": (3, 4, 5), "host-2": (6, 7, 8), "host-3": (9, 10, 11)},
    SECOND: {"host-0": (0, 1, 2, 6), "host-1": (3, 4, 5, 7), "host-3": (8, 9, 10, 11)},
    THIRD: {"host-0": (1, 2, 6), "host-1": (3, 4, 5), "host-2": (0, 7, 8), "host-3": (9, 10, 11)},
}


def digest(step: int) -> str:
    return f"digest of {step}"


def in_run(
    run: str, at: float, restored: tuple[str, int], steps: Iterable[int], *, save_at: Iterable[int] = ()
) -> list[tuple[float, str, Event]]:
    """What every member of a run notes from its forming to its last step."""
    found: list[tuple[float, str, Event]] = []
    members = list(HELD[run])
    for rank, worker in enumerate(members):
        found.append((at, worker, Formed(run=run, rank=rank, world_size=len(members), shards=HELD[run][worker])))
        from_run, step = restored
        what = digest(step) if step >= 0 else ""
        found.append((at + 0.1, worker, Restored(run=run, rank=rank, from_run=from_run, step=step, digest=what, seconds=0.1)))
        for number, step in enumerate(steps):
            now = at + 0.2 + number / 10
            loss = 5.0 - step / 4
            found.append((now, worker, Stepped(run=run, step=step, loss=loss, epoch=int(step > 6), samples=BATCH * len(members))))
            if step in save_at:
                stall_s = 0.02 if rank == 0 else 0.001
                found.append(
                    (now, worker, Saved(run=run, rank=rank, step=step, digest=digest(step), stall_s=stall_s, size_bytes=30_000_000))
                )
    found += [(at + 1.0, members[0], Committed(run=run, step=step, seconds=0.5)) for step in save_at]
    return found


def rehearsal() -> list[Note]:
    """The notes of a demo of 12 steps: killed after step 5, restored at 3, with three ranks up to 7, restored at 7 with four."""
    events: list[tuple[float, str, Event]] = [(0.5, worker, Started(local_rank=n, restarts=0)) for n, worker in enumerate(WORKERS)]
    events += in_run(FIRST, 1.0, ("", -1), range(6), save_at=[3])
    broken = Halted(run=FIRST, rank=0, step=5, error="BarrierBroken", barrier="mean", missing=("host-2",), culprit="host-2", reason=REASON)
    events += [
        (2.03 + rank / 1000, worker, dataclasses.replace(broken, rank=rank)) for rank, worker in enumerate(WORKERS) if worker != "host-2"
    ]
    events += in_run(SECOND, 3.0, (FIRST, 3), range(4, 9), save_at=[7])
    events.append((4.0, "host-2", Started(local_rank=2, restarts=1)))
    events += [
        (4.5, worker, Halted(run=SECOND, rank=rank, step=8, error="RosterChanged", barrier="", missing=(), culprit="", reason="newcomer"))
        for rank, worker in enumerate(HELD[SECOND])
    ]
    events += in_run(THIRD, 5.0, (SECOND, 7), range(8, 12), save_at=[11])
    events += [(7.0, worker, Finished(step=11)) for worker in WORKERS]
    pids = {worker: 100 + n for n, worker in enumerate(WORKERS)}
    return [Note(at=at, worker=worker, pid=pids[worker], event=event) for at, worker, event in events]


def set_kill(story: Story) -> None:
    """The director kills, and Redis says so; what it says of others, or again when the trainer leaves in the end, changes nothing."""
    story.kill = KILL
    for worker, at_ms in (("host-1", 1_000_005.0), ("host-2", 1_000_012.0), ("host-2", 1_007_000.0)):
        story.add_departure(worker, at_ms)


def told(notes: Iterable[Note]) -> Story:
    story = Story()
    for note in notes:
        story.add(note)
    set_kill(story)
    return story


POSITION = Position(epoch=1, consumed=((0, 60),))
PROOF = Proof(
    samples=84, position=POSITION, consumed=144, lost=0, twice=0, strange=0, abandoned_steps=3, abandoned_samples=44
)  # fmt: skip


def ending(**changes: Any) -> Ending:
    verified = {f"{FIRST}/3": "", f"{SECOND}/7": "", f"{THIRD}/11": ""}
    whole = Ending(
        workers=4, steps=12, kill=True, status=0, verified=verified, last_restored=(THIRD, 11), last_digest=digest(11), proof=PROOF,
        position=POSITION,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def failed(checks: Iterable[Check]) -> list[str]:
    return [check.what for check in checks if not check.ok]


def test_notes_come_back_as_they_were_written(tmp_path):
    """Every kind of note survives the file, in the order of time over all files; a line that is not whole yet waits."""
    notes = rehearsal()
    for note in notes:
        assert Note.from_line(note.to_line()) == note
    for worker in WORKERS:
        book = Notebook(tmp_path, worker)
        for note in notes:
            if note.worker == worker:
                book.write(note.event, at=note.at)
        book.close()
    folder = Notes(tmp_path)
    found = folder.fresh()
    assert sorted((note.at, note.worker) for note in found) == sorted((note.at, note.worker) for note in notes)
    assert [note.at for note in found] == sorted(note.at for note in found)
    assert folder.fresh() == []
    with next(tmp_path.glob("*.jsonl")).open("a") as file:
        line = Note(at=9.0, worker="host-0", pid=1, event=Finished(step=3)).to_line()
        file.write(line[:10])
        file.flush()
        assert folder.fresh() == []
        file.write(line[10:] + "\n")
        file.flush()
        assert [note.event for note in folder.fresh()] == [Finished(step=3)]


def test_a_good_demo_passes_every_check():
    """Nothing is held against a demo in which all went as it should."""
    checks = check_all(told(rehearsal()), ending())
    assert failed(checks) == []
    assert len(checks) == 13


def test_the_order_in_which_notes_are_read_does_not_matter():
    """Notes of different trainers may be read in any order: figures and verdicts are the same."""
    in_order, mixed = rehearsal(), rehearsal()
    for seed in range(20):
        random.Random(seed).shuffle(mixed)
        # A process's own notes stay in order; so does time within a worker.
        per_worker = {worker: iter([note for note in in_order if note.worker == worker]) for worker in WORKERS}
        story = told(next(per_worker[note.worker]) for note in mixed)
        assert failed(check_all(story, ending())) == []
        assert measure(story, [], PROOF, workers=4, seconds=1.0) == measure(told(in_order), [], PROOF, workers=4, seconds=1.0)


def changed(choose: Callable[[Note], bool], **changes: Any) -> list[Note]:
    """The rehearsal with one event changed."""
    notes = rehearsal()
    index = next(n for n, note in enumerate(notes) if choose(note))
    notes[index] = dataclasses.replace(notes[index], event=dataclasses.replace(notes[index].event, **changes))
    return notes


def is_a(kind: type[Event], run: str, worker: str) -> Callable[[Note], bool]:
    return lambda note: isinstance(note.event, kind) and note.worker == worker and getattr(note.event, "run", "") == run


@pytest.mark.parametrize(
    ("notes", "what"),
    [
        (changed(is_a(Saved, FIRST, "host-1"), digest="other"), "same weights on all ranks"),
        (changed(is_a(Restored, SECOND, "host-1"), digest="other"), "restored equals saved, bit for bit"),
        (changed(is_a(Halted, FIRST, "host-3"), culprit="host-0"), "survivors learned who died"),
        (changed(is_a(Halted, FIRST, "host-3"), missing=("host-0",)), "survivors learned who died"),
        ([note for note in rehearsal() if not is_a(Halted, FIRST, "host-3")(note)], "survivors learned who died"),
        (changed(is_a(Formed, SECOND, "host-0"), shards=(0, 1, 3, 6)), "fewest shards moved"),
        (changed(is_a(Formed, THIRD, "host-0"), shards=(1, 2, 7)), "fewest shards moved"),
        (changed(is_a(Formed, THIRD, "host-2"), shards=(0, 7)), "placement even"),
        (changed(is_a(Formed, FIRST, "host-0"), shards=(0, 1, 2, 3, 4)), "placement even"),
        ([note for note in rehearsal() if note.event != Finished(step=11)], "every step done"),
        ([note for note in rehearsal() if getattr(note.event, "run", "") != THIRD], "went on without it, then with its replacement"),
    ],
)
def test_each_check_can_fail_by_what_trainers_note(notes, what):
    """A wrong note is found by the check that is about it."""
    assert what in failed(check_all(told(notes), ending()))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"status": 1}, "every step done"),
        ({"steps": 13}, "every step done"),
        ({"last_digest": "other"}, "restored equals saved, bit for bit"),
        ({"last_restored": None}, "restored equals saved, bit for bit"),
        ({"last_restored": (SECOND, 7), "last_digest": digest(7)}, "restores from outside the job"),
        ({"verified": {}}, "every checkpoint verifies"),
        ({"verified": {f"{FIRST}/3": "", f"{SECOND}/7": "", f"{THIRD}/11": "part 0 is damaged"}}, "every checkpoint verifies"),
        ({"verified": {f"{FIRST}/3": "", f"{THIRD}/11": ""}}, "every checkpoint verifies"),
        ({"running": ["process 7"]}, "nothing left running or in shared memory"),
        ({"remains": ["gradients/x"]}, "nothing left running or in shared memory"),
        ({"proof": dataclasses.replace(PROOF, lost=1)}, "each sample exactly once"),
        ({"proof": dataclasses.replace(PROOF, twice=1)}, "each sample exactly once"),
        ({"proof": dataclasses.replace(PROOF, strange=1)}, "each sample exactly once"),
        ({"proof": dataclasses.replace(PROOF, consumed=0)}, "each sample exactly once"),
        ({"position": None}, "data position committed"),
        ({"position": dataclasses.replace(POSITION, epoch=0)}, "data position committed"),
        ({"position": dataclasses.replace(POSITION, consumed=((1, 61),))}, "data position committed"),
    ],
)
def test_each_check_can_fail_by_what_is_found_at_the_end(changes, what):
    """So is what was found when training was over."""
    assert what in failed(check_all(told(rehearsal()), ending(**changes)))


def test_loss_that_rises_is_found():
    """The last tenth of the steps is compared with the first."""
    notes = [
        dataclasses.replace(note, event=dataclasses.replace(note.event, loss=float(note.event.step)))
        if isinstance(note.event, Stepped)
        else note
        for note in rehearsal()
    ]
    assert failed(check_all(told(notes), ending())) == ["loss fell"]


def test_a_commit_that_training_left_behind_need_not_be_listed():
    """What was saved after the step that the next run restored is off the lineage."""
    late = Note(at=2.01, worker="host-0", pid=100, event=Committed(run=FIRST, step=5, seconds=0.1))
    assert failed(check_all(told([*rehearsal(), late]), ending())) == []


def test_without_a_kill_nothing_about_it_is_checked():
    """--no-kill leaves the checks that are about training and checkpoints."""
    notes = [note for note in rehearsal() if getattr(note.event, "run", FIRST) == FIRST and not isinstance(note.event, Halted)]
    story = told(notes)
    story.kill = None
    checks = check_all(story, ending(kill=False, steps=6, last_restored=(FIRST, 3), last_digest=digest(3), verified={f"{FIRST}/3": ""}))
    assert failed(checks) == ["restores from outside the job"]
    assert len(checks) == 10


def test_the_data_check_prints_its_numbers():
    """Epochs, samples, and what was done again and does not count."""
    details = {check.what: check.detail for check in check_all(told(rehearsal()), ending())}
    assert details["each sample exactly once"] == "1 epoch of 84 + 60: 0 lost, 0 twice; 44 in 3 abandoned steps do not count"
    assert details["data position committed"] == "epoch 1 after 60 samples, as in the logs"


def test_the_position_is_that_of_the_newest_run():
    """Samples of an epoch are counted up to a step, as the run that did each step last had it."""
    story = told(rehearsal())
    assert [story.position(step) for step in (0, 3, 6, 7, 11, 12)] == [(0, 16), (0, 64), (0, 100), (1, 12), (1, 76), None]
    assert story.epoch_ends == {0: (SECOND, 6)}
    assert story.runs[FIRST].samples_after(3) == 32


def test_an_epoch_that_a_restore_went_back_into_ends_once_more():
    """It is told again, as the newest run had it; what an older run's note says later changes nothing."""
    story, narrator, lines = Story(), Narrator(saves=False), []
    ends = [(FIRST, 0, 0), (FIRST, 1, 0), (FIRST, 2, 1), (SECOND, 1, 0), (SECOND, 2, 0), (SECOND, 3, 1), (FIRST, 2, 1)]
    for run, step, epoch in ends:
        event = Stepped(run=run, step=step, loss=1.0, epoch=epoch, samples=10)
        story.add(Note(at=1.0, worker="host-0", pid=1, event=event))
        lines += [line.text for line in narrator.fresh(story)]
    assert lines == ["epoch 0 ends with step 1: 20 samples", "epoch 0 ends with step 2: 30 samples"]


def test_the_lineage_is_what_trainers_restored():
    """From a save back to the fresh start, each run with the last step that was taken from it; a run that nobody knows ends it."""
    story = told(rehearsal())
    assert story.lineage((THIRD, 11)) == {THIRD: 11, SECOND: 7, FIRST: 3}
    assert story.lineage((SECOND, 7)) == {SECOND: 7, FIRST: 3}
    assert story.lineage(("0009-zzzz", 7)) == {}


def test_moves_name_who_gave_and_who_got():
    """Only shards whose owner changed count."""
    story = told(rehearsal())
    found = moves(story.runs[FIRST], story.runs[SECOND])
    assert (found.total, dict(found.taken), dict(found.given)) == (3, {"host-2": 3}, {"host-0": 1, "host-1": 1, "host-3": 1})


def test_figures_are_those_of_the_notes():
    """Times are counted from the kill, the stall is the slowest rank's, steps done twice are counted."""
    found = measure(told(rehearsal()), [Upload(size_bytes=30_000_000, seconds=0.3)], PROOF, workers=4, seconds=60.0)
    assert (found.steps, found.steps_redone, found.saves, found.state_bytes) == (12, 3, 3, 30_000_000)
    assert found.noticed_ms == pytest.approx(33.0)
    assert found.recorded_ms == pytest.approx(12.0)
    assert found.recovery_s == pytest.approx(1.2)
    assert found.full_again_s == pytest.approx(3.2)
    assert found.stall_ms == pytest.approx(20.0)
    assert found.stall_gb_per_s == pytest.approx(1.5)
    assert found.upload_mb_per_s == pytest.approx(100.0)
    assert found.step_ms == pytest.approx(100.0)
    assert json.loads(json.dumps(found.as_dict()))["recovery_s"] == pytest.approx(1.2)
    assert ("data", "144 samples, 1.71 epochs; 0 lost, 0 twice, 44 done again") in found.rows()
    assert ("detection", "33 ms to the last survivor; Redis knew after 12 ms") in found.rows()


def test_figures_of_a_demo_in_which_nothing_happened():
    """There is a table all the same."""
    assert dict(measure(Story(), [], PROOF, workers=4, seconds=1.0).rows())["upload"] == "-"


def test_each_line_is_told_once_and_in_order():
    """Whatever the steps in which the story becomes known, its lines are the same."""
    narrator, story, lines = Narrator(saves=True), Story(), []
    for note in sorted(rehearsal(), key=lambda note: note.at):
        story.add(note)
        if note.at >= 2.0:
            set_kill(story)
        lines += [line.text for line in narrator.fresh(story)]
    assert lines == [
        "run 0001-aaaa: 4 ranks with 3 3 3 3 of 12 shards",
        "nothing to restore: training begins with fresh weights",
        "step 3 is saved: training stalled 20 ms, durable after 0.50 s",
        "SIGKILL to trainer 2 (rank 2, process 102) after step 5",
        "noticed: Redis knew after 12 ms, the others within 33 ms",
        f"barrier 'mean' broke: {REASON}",
        "run 0002-bbbb: 3 ranks with 4 4 4 of 12 shards",
        "only 3 shards moved: trainer 2 to trainers 0 (1), 1 (1), 3 (1)",
        "restored step 3 of run 0001-aaaa on 3 ranks in 0.10 s",
        "the data goes back too: to 64 samples of epoch 0; 32 come again",
        "training again with 3 ranks, 1.20 s after the kill",
        "epoch 0 ends with step 6: 100 samples",
        "step 7 is saved: training stalled 20 ms, durable after 0.50 s",
        "trainer 2 is back: a barrier told 3 ranks in one round, after step 8",
        "run 0003-cccc: 4 ranks with 3 3 3 3 of 12 shards",
        "only 3 shards moved: trainers 0 (1), 1 (1), 3 (1) to trainer 2",
        "restored step 7 of run 0002-bbbb on 4 ranks in 0.10 s",
        "the data goes back too: to 12 samples of epoch 1; 12 come again",
        "training again with 4 ranks, 3.20 s after the kill",
        "step 11 is saved: training stalled 20 ms, durable after 0.50 s",
    ]
    assert narrator.fresh(story) == []


def test_data_that_was_saved_with_the_last_step_does_not_go_back():
    """Nothing was consumed after the save that is restored."""
    narrator = Narrator(saves=False)
    notes = [note for note in rehearsal() if not (isinstance(note.event, Stepped) and note.event.run == SECOND and note.event.step > 7)]
    lines = [line.text for line in narrator.fresh(told(notes))]
    assert "the data goes on after 12 samples of epoch 1" in lines


@pytest.mark.parametrize(
    "error",
    [
        BarrierBroken("told", barrier="mean", reason=REASON, missing=()),
        RosterChanged("told", run=FIRST, worker="host-2", rank=2, reason="signal 9 (SIGKILL)"),
    ],
)
def test_either_error_names_who_departed_in_the_same_words(error):
    """It depends on the moment whether a rank's barrier breaks or its next one is refused."""
    roster = {worker: Member(rank=rank, incarnation="a", host="h") for rank, worker in enumerate(WORKERS)}
    run = Run(id=FIRST, rank=0, world_size=4, generation=1, previous="", roster=roster)
    assert blamed(error, run) == ("host-2", REASON)


def test_a_newcomer_is_nobodys_fault():
    """A run that makes room blames nobody."""
    run = Run(id=FIRST, rank=0, world_size=4, generation=1, previous="", roster={})
    assert blamed(RosterChanged("told", run=FIRST, worker=None, rank=None, reason="newcomer"), run) == ("", "newcomer")
