"""Did the demo do what it claims? Pure: from the story and from what was found at the end to verdicts, each with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Final

from worker_agent.demo.proof import Position, Proof
from worker_agent.demo.story import Story, moves

__all__ = ["Check", "Ending", "check_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What was found when training was over.

    Args:
        workers: how many trainers there were to be.
        steps: how many steps there were to do.
        kill: whether a trainer was to be killed.
        status: the launcher's exit status.
        verified: for each commit that was listed, ``RUN/STEP`` and what is wrong with it, empty if nothing is.
        last_restored: run and step of what a restore outside the job gave in the end; None: nothing, and ``last_problem`` says why.
        last_digest: of that.
        proof: what the trainers' own logs say of the lineage that it ends.
        position: where in its data it says that it stands; None: it does not say.
        running: processes that were left.
        remains: files in memory that were left.
    """

    workers: int
    steps: int
    kill: bool
    status: int
    verified: dict[str, str] = field(default_factory=dict)
    last_restored: tuple[str, int] | None = None
    last_digest: str = ""
    last_problem: str = ""
    proof: Proof
    position: Position | None = None
    running: Sequence[str] = ()
    remains: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One verdict: ``what`` should hold, and the numbers."""

    ok: bool
    what: str
    detail: str


def check_all(story: Story, ending: Ending) -> list[Check]:
    """Every verdict, in the order of the story; those about the kill only if there was to be one."""
    about_kill = _ABOUT_KILL if ending.kill else ()
    return [check(story, ending) for check in (*_TRAINING, *about_kill, *_STATE, *_DATA, *_END)]


def _finished(story: Story, ending: Ending) -> Check:
    done = len(story.losses)
    ok = ending.status == 0 and done == ending.steps and len(story.finished) == ending.workers
    detail = f"{done} of {ending.steps}; {len(story.finished)} of {ending.workers} trainers finished, exit status {ending.status}"
    return Check(ok=ok, what="every step done", detail=detail)


def _loss_fell(story: Story, ending: Ending) -> Check:
    losses = story.losses
    tenth = max(1, len(losses) // 10)
    if len(losses) < 2:
        return Check(ok=False, what="loss fell", detail="there are fewer than two steps")
    first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
    return Check(ok=last < first, what="loss fell", detail=f"{first:.2f} to {last:.2f} nats a byte")


def _same_weights(story: Story, ending: Ending) -> Check:
    differing = [f"{run}/{step}" for (run, step), ranks in story.saves.items() if len({saved.digest for saved in ranks.values()}) > 1]
    detail = f"they differ at {', '.join(differing)}" if differing else f"identical bits at each of {len(story.saves)} saves"
    return Check(ok=bool(story.saves) and not differing, what="same weights on all ranks", detail=detail)


def _runs(story: Story, ending: Ending) -> Check:
    run = story.killed_run
    sizes = [other.world_size for other in story.runs.values() if run is not None and other.id >= run.id]
    wanted = [ending.workers, ending.workers - 1, ending.workers]
    return Check(
        ok=sizes == wanted, what="went on without it, then with its replacement", detail=f"ranks {', '.join(map(str, sizes)) or 'none'}"
    )


def _named(story: Story, ending: Ending) -> Check:
    run, kill = story.killed_run, story.kill
    if run is None or kill is None:
        return Check(ok=False, what="survivors learned who died", detail="nobody was killed")
    right = [
        worker
        for worker, halted in run.halted.items()
        if halted.culprit == kill.worker and (kill.worker in halted.missing or halted.error != "BarrierBroken")
    ]
    ok = sorted(right) == story.survivors == sorted(run.halted)
    return Check(
        ok=ok, what="survivors learned who died", detail=f"{len(right)} of {len(story.survivors)} named rank {kill.rank}, {kill.worker}"
    )


def _moved_least(story: Story, ending: Ending) -> Check:
    what = "fewest shards moved"
    before = story.killed_run
    without = story.run_after(before) if before is not None else None
    again = story.run_after(without) if without is not None else None
    if before is None or without is None or again is None or story.kill is None:
        return Check(ok=False, what=what, detail="there was no run without the killed trainer, and one with its replacement")
    victim = story.kill.worker
    left, back = moves(before, without), moves(without, again)
    had = len(before.shards.get(victim, ()))
    share = sum(map(len, again.shards.values())) // again.world_size
    ok = dict(left.taken) == {victim: had} and set(back.given) == {victim} and back.total == share
    return Check(ok=ok, what=what, detail=f"{left.total} of the dead one's {had}, {back.total} back (share {share})")


def _even(story: Story, ending: Ending) -> Check:
    held = [[len(shards) for shards in run.shards.values()] for run in story.runs.values()]
    spread = max((max(counts, default=0) - min(counts, default=0) for counts in held), default=0)
    everything = {frozenset().union(*run.shards.values()) for run in story.runs.values()}
    once = len(everything) == 1 and all(sum(counts) == len(all_shards) for counts in held for all_shards in everything)
    complete = all(run.complete for run in story.runs.values())
    detail = f"shards of two ranks differ by at most {spread}" + ("" if once else ", and not every shard is held exactly once")
    return Check(ok=once and complete and spread <= 1, what="placement even", detail=detail)


def _restored_equal(story: Story, ending: Ending) -> Check:
    found = [
        ((restored.from_run, restored.step), restored.digest)
        for run in story.runs.values()
        for restored in run.restored.values()
        if restored.step >= 0
    ]
    if ending.last_restored is not None:
        found.append((ending.last_restored, ending.last_digest))
    saved = {save: {note.digest for note in ranks.values()} for save, ranks in story.saves.items()}
    equal = sum(saved.get(save) == {digest} for save, digest in found)
    what = "restored equals saved, bit for bit"
    ok = ending.last_restored is not None and equal == len(found)
    return Check(ok=ok, what=what, detail=f"{equal} of {len(found)} restores, by SHA-256")


def _last_is_newest(story: Story, ending: Ending) -> Check:
    last = ending.last_restored
    ok = last is not None and last[1] == ending.steps - 1
    detail = f"step {last[1]} of run {last[0]}" if last is not None else f"nothing could be restored: {ending.last_problem}"
    return Check(ok=ok, what="restores from outside the job", detail=detail)


def _verifies(story: Story, ending: Ending) -> Check:
    wrong = [f"{name}: {problem}" for name, problem in ending.verified.items() if problem]
    missing = [f"{run}/{step}" for run, step in story.commits if story.continues((run, step)) and f"{run}/{step}" not in ending.verified]
    sound = len(ending.verified) - len(wrong)
    detail = "; ".join([f"{sound} of {len(ending.verified)}", *wrong, *(f"{name} is not listed" for name in missing)])
    return Check(ok=bool(ending.verified) and not wrong and not missing, what="every checkpoint verifies", detail=detail)


def _nothing_left(story: Story, ending: Ending) -> Check:
    left = [*ending.running, *ending.remains]
    detail = ", ".join(left) if left else "no process, no file"
    return Check(ok=not left, what="nothing left running or in shared memory", detail=detail)


def _exactly_once(story: Story, ending: Ending) -> Check:
    proof, position = ending.proof, ending.proof.position
    rest = f" + {position.samples:,}" if 0 < position.samples < proof.samples else ""
    counted = f"{proof.whole_epochs} epoch{'s' if proof.whole_epochs != 1 else ''} of {proof.samples:,}{rest}"
    strange = f", {proof.strange:,} of no data" if proof.strange else ""
    again = f"; {proof.abandoned_samples:,} in {proof.abandoned_steps} abandoned steps do not count" if proof.abandoned_steps else ""
    detail = f"{counted}: {proof.lost:,} lost, {proof.twice:,} twice{strange}{again}"
    return Check(ok=proof.exact, what="each sample exactly once", detail=detail)


def _knows_its_place(story: Story, ending: Ending) -> Check:
    what = "data position committed"
    said, found = ending.position, ending.proof.position
    if said is None:
        return Check(ok=False, what=what, detail="the checkpoint says nothing of data")
    detail = f"epoch {said.epoch} after {said.samples:,} samples, "
    detail += "as in the logs" if said == found else f"but by the logs epoch {found.epoch} after {found.samples:,}, or after others"
    return Check(ok=said == found, what=what, detail=detail)


_Rule = Callable[[Story, Ending], Check]
_TRAINING: Final[tuple[_Rule, ...]] = (_finished, _loss_fell, _same_weights)
_DATA: Final[tuple[_Rule, ...]] = (_exactly_once, _knows_its_place)
_ABOUT_KILL: Final[tuple[_Rule, ...]] = (_named, _moved_least, _runs)
_STATE: Final[tuple[_Rule, ...]] = (_even, _restored_equal, _last_is_newest, _verifies)
_END: Final[tuple[_Rule, ...]] = (_nothing_left,)
