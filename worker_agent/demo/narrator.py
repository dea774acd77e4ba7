"""Turns the story into lines for people, each told once, as soon as it can be told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from worker_agent.demo.story import Kill, RunStory, Story, moves

__all__ = ["Line", "Narrator", "number_of", "trainer"]


@dataclass(frozen=True, slots=True)
class Line:
    """A line and its style, in rich's words."""

    text: str
    style: str = ""


def trainer(worker: str) -> str:
    """How people call a worker of the launcher, whose ids end in a number that stays the same while ranks change."""
    return f"trainer {number_of(worker)}"


def number_of(worker: str) -> str:
    """The number in a worker's id."""
    return worker.rpartition("-")[2]


class Narrator:
    """Remembers what it has told.

    Args:
        saves: whether each save is told; a live display shows them itself.
    """

    def __init__(self, *, saves: bool) -> None:
        self._tell_saves = saves
        self._told: set[str] = set()

    def fresh(self, story: Story) -> list[Line]:
        """The lines that can be told now and were not before."""
        found = []
        for key, line in self._lines(story):
            if key not in self._told:
                self._told.add(key)
                found.append(line)
        return found

    def _lines(self, story: Story) -> Iterator[tuple[str, Line]]:
        before: RunStory | None = None
        for run in story.runs.values():
            if run.complete:
                yield f"formed {run.id}", Line(_formed(run), "bold")
                if before is not None and before.complete:
                    yield f"moved {run.id}", Line(_moved(before, run))
            if len(run.restored) == run.world_size > 0:
                yield f"restored {run.id}", Line(_restored(run))
                if before is not None and (position := story.position(run.begins_after)) is not None:
                    yield f"goes on {run.id}", Line(_goes_on(*position, again=before.samples_after(run.begins_after)))
            if run.training_at is not None and story.kill is not None and before is not None:
                since_s = run.training_at - story.kill.at
                yield f"training {run.id}", Line(f"training again with {_ranks(run)}, {since_s:.2f} s after the kill", "green")
            if self._tell_saves:
                yield from _saved(story, run)
            if story.kill is not None and story.kill.run == run.id:
                yield f"kill {run.id}", Line(_killed(story.kill), "bold red")
                if len(run.halted) == run.world_size - 1:
                    yield f"noticed {run.id}", Line(_noticed(story), "yellow")
                    yield f"named {run.id}", Line(_named(run), "yellow")
            elif len(run.halted) == run.world_size > 0:
                yield f"halted {run.id}", Line(_halted(story, run), "yellow")
            before = run
        for epoch, (name, step) in story.epoch_ends.items():  # again, if a restore went back into it
            if (position := story.position(step)) is not None:
                yield f"epoch {epoch} {name}", Line(f"epoch {epoch} ends with step {step}: {position[1]:,} samples")


def _ranks(run: RunStory) -> str:
    return f"{run.world_size} rank{'s' if run.world_size > 1 else ''}"


def _formed(run: RunStory) -> str:
    held = " ".join(str(len(run.shards[worker])) for worker in sorted(run.formed, key=lambda worker: run.formed[worker].rank))
    total = sum(len(shards) for shards in run.shards.values())
    return f"run {run.id}: {_ranks(run)} with {held} of {total} shards"


def _moved(before: RunStory, run: RunStory) -> str:
    found = moves(before, run)
    if not found.total:
        return "no shard moved"
    return f"only {found.total} shards moved: {_counts(found.taken)} to {_counts(found.given)}"


def _counts(by_worker: Mapping[str, int]) -> str:
    """``trainer 2`` or ``trainers 0 (29), 1 (28), 3 (29)``."""
    if len(by_worker) == 1:
        return trainer(*by_worker)
    return "trainers " + ", ".join(f"{number_of(worker)} ({count})" for worker, count in sorted(by_worker.items()))


def _restored(run: RunStory) -> str:
    found = next(iter(run.restored.values()))
    if found.step < 0:
        return "nothing to restore: training begins with fresh weights"
    longest = max(restored.seconds for restored in run.restored.values())
    return f"restored step {found.step} of run {found.from_run} on {_ranks(run)} in {longest:.2f} s"


def _goes_on(epoch: int, samples: int, *, again: int) -> str:
    if not again:
        return f"the data goes on after {samples:,} samples of epoch {epoch}"
    return f"the data goes back too: to {samples:,} samples of epoch {epoch}; {again:,} come again"


def _saved(story: Story, run: RunStory) -> Iterator[tuple[str, Line]]:
    for (name, step), commit in story.commits.items():
        if name == run.id and (name, step) in story.saves:
            stall_ms = max(saved.stall_s for saved in story.saves[name, step].values()) * 1000
            text = f"step {step} is saved: training stalled {stall_ms:.0f} ms, durable after {commit.seconds:.2f} s"
            yield f"saved {name} {step}", Line(text)


def _killed(kill: Kill) -> str:
    return f"SIGKILL to {trainer(kill.worker)} (rank {kill.rank}, process {kill.pid}) after step {kill.step}"


def _noticed(story: Story) -> str:
    survivors = story.noticed_ms()
    recorded = story.recorded_ms()
    first = f"Redis knew after {recorded:.0f} ms, " if recorded is not None else ""
    return f"noticed: {first}the others within {survivors[-1]:.0f} ms"


def _named(run: RunStory) -> str:
    broken = [halted for halted in run.halted.values() if halted.error == "BarrierBroken"]
    told = (broken or list(run.halted.values()))[0]
    what = f"barrier {told.barrier!r} broke" if broken else "the next barrier was refused"
    return f"{what}: {told.reason}"


def _halted(story: Story, run: RunStory) -> str:
    told = next(iter(run.halted.values()))
    if told.culprit:
        return f"run {run.id} ended: {told.reason}"
    newcomers = sorted(trainer(worker) for worker, phase in story.phases.items() if worker not in run.formed) or ["a newcomer"]
    last = max(halted.step for halted in run.halted.values())
    return f"{', '.join(newcomers)} is back: a barrier told {_ranks(run)} in one round, after step {last}"
