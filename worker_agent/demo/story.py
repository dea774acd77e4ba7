"""What happened, folded from the trainers' notes: runs, steps, saves, the kill and the recovery. No clock and no I/O.

The order in which notes of different trainers come in does not matter; `tests/unit/test_demo_story.py` shuffles them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TypeAlias

from worker_agent.demo.records import Committed, Finished, Formed, Halted, Note, Restored, Saved, Started, Stepped

__all__ = ["Kill", "Moves", "RunStory", "Story", "moves"]

Save: TypeAlias = tuple[str, int]  # run and step; compares as they came


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One trainer got SIGKILL at ``at`` (monotonic), in ``run`` after ``step``; ``wall_ms`` is the same moment for Redis's clock."""

    at: float
    wall_ms: float
    worker: str
    rank: int
    pid: int
    run: str
    step: int


@dataclass(slots=True, kw_only=True)
class RunStory:
    """One run, by worker; ``reached`` is its newest step, ``samples`` has those of each step, ``world_size`` is 0 while nobody has
    said that it formed.
    """

    id: str
    world_size: int = 0
    reached: int = -1
    formed: dict[str, Formed] = field(default_factory=dict)
    formed_at: float = 0.0
    restored: dict[str, Restored] = field(default_factory=dict)
    first_step_at: dict[str, float] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    halted: dict[str, Halted] = field(default_factory=dict)
    halted_at: dict[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every rank has said what it holds."""
        return 0 < self.world_size == len(self.formed)

    @property
    def begins_after(self) -> int:
        """The step that it restored; -1 for a fresh start."""
        return max((restored.step for restored in self.restored.values()), default=-1)

    @property
    def training_at(self) -> float | None:
        """When every rank had done its first step; None before."""
        return max(self.first_step_at.values()) if 0 < self.world_size == len(self.first_step_at) else None

    def samples_after(self, step: int) -> int:
        """How many samples this run consumed in the steps after ``step``."""
        return sum(samples for number, samples in self.samples.items() if number > step)

    @property
    def shards(self) -> dict[str, frozenset[int]]:
        """What each worker holds."""
        return {worker: frozenset(formed.shards) for worker, formed in self.formed.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Which shards changed hands from one run to the next: ``taken`` from whom, ``given`` to whom, how many."""

    total: int
    taken: Mapping[str, int]
    given: Mapping[str, int]


def moves(before: RunStory, after: RunStory) -> Moves:
    """Compare what the workers of two complete runs hold."""
    owner = {shard: worker for worker, shards in before.shards.items() for shard in shards}
    pairs = [
        (owner.get(shard, ""), worker) for worker, shards in after.shards.items() for shard in shards if owner.get(shard, "") != worker
    ]
    return Moves(total=len(pairs), taken=Counter(old for old, _ in pairs), given=Counter(new for _, new in pairs))


class Story:
    """All that is known so far.

    Attributes:
        runs: in the order in which they formed.
        saves: the notes of each save, by worker.
        commits: of each save that is durable.
        epoch_ends: of each epoch that is over, the run that went on to the next one, and the last step before that.
        seats, pids: the worker in each seat of the launcher, and its newest process.
        kill: once it was done.
        recorded_at_ms: when Redis had the killed trainer's departure on record, by its own clock.
    """

    def __init__(self) -> None:
        self.runs: dict[str, RunStory] = {}
        self._steps: dict[int, Stepped] = {}  # as the run that did it last had it
        self.saves: dict[Save, dict[str, Saved]] = {}
        self.commits: dict[Save, Committed] = {}
        self.epoch_ends: dict[int, Save] = {}
        self.steps_done: dict[str, int] = {}
        self.phases: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        self.seats: dict[int, str] = {}
        self.finished: set[str] = set()
        self.kill: Kill | None = None
        self.recorded_at_ms: float | None = None
        self._seconds: list[float] = []
        self._last_step: dict[str, tuple[str, int, float]] = {}

    def add(self, note: Note) -> None:
        """Take in one note."""
        worker, event = note.worker, note.event
        match event:
            case Started():
                self.pids[worker] = note.pid
                self.seats[event.local_rank] = worker
                self.phases[worker] = "starting" if not event.restarts else "coming back"
            case Formed():
                run = self._run(event.run)
                run.world_size = event.world_size
                run.formed[worker] = event
                run.formed_at = max(run.formed_at, note.at)
                self.phases[worker] = "restoring"
            case Restored():
                self._run(event.run).restored[worker] = event
                self.steps_done[worker] = event.step
                self.phases[worker] = "training"
            case Stepped():
                self._add_step(note.at, worker, event)
            case Saved():
                self.saves.setdefault((event.run, event.step), {})[worker] = event
            case Committed():
                self.commits.setdefault((event.run, event.step), event)
            case Halted():
                self._run(event.run).halted[worker] = event
                self._run(event.run).halted_at[worker] = note.at
                self.phases[worker] = "forming"
            case Finished():
                self.finished.add(worker)
                self.phases[worker] = "done"

    def add_departure(self, worker: str, at_ms: float) -> None:
        """Take in what Redis says: ``worker`` departed at ``at_ms`` of its clock. What counts is the first time after the kill."""
        if self.kill is not None and worker == self.kill.worker and self.recorded_at_ms is None:
            self.recorded_at_ms = at_ms

    def _run(self, run: str) -> RunStory:
        if run not in self.runs:
            self.runs = dict(sorted([*self.runs.items(), (run, RunStory(id=run))]))
        return self.runs[run]

    def _add_step(self, at: float, worker: str, event: Stepped) -> None:
        run_story = self._run(event.run)
        run_story.first_step_at.setdefault(worker, at)
        run_story.reached = max(run_story.reached, event.step)
        run_story.samples[event.step] = event.samples
        if (known := self._steps.get(event.step)) is None or known.run < event.run:
            self._steps[event.step] = event
        if (previous := self._steps.get(event.step - 1)) is not None and previous.epoch < event.epoch:
            self.epoch_ends[previous.epoch] = max(self.epoch_ends.get(previous.epoch, ("", 0)), (event.run, previous.step))
        self.steps_done[worker] = event.step
        run, step, before = self._last_step.get(worker, ("", -1, 0.0))
        if run == event.run and step == event.step - 1:
            self._seconds.append(at - before)
        self._last_step[worker] = (event.run, event.step, at)

    def continues(self, save: Save) -> bool:
        """Whether training went on from this save, or passed it on the way to now; False for what a restore left behind."""
        run, step = save
        later = [other for other in self.runs.values() if other.id > run and other.restored]
        return all(other.begins_after >= step for other in later)

    # --- what can be asked ------------------------------------------------------------------------------------------

    @property
    def run(self) -> RunStory | None:
        """The newest run."""
        return next(reversed(self.runs.values()), None)

    @property
    def step(self) -> int:
        """The newest step that every rank of the newest run has done; -1 before the first."""
        run = self.run
        done = [self.steps_done.get(worker, -1) for worker in run.formed] if run is not None else []
        return min(done, default=-1)

    @property
    def losses(self) -> list[float]:
        """The mean loss of each step in order, as the run that did it last had it."""
        return [stepped.loss for _, stepped in sorted(self._steps.items())]

    def position(self, step: int) -> tuple[int, int] | None:
        """The epoch of ``step``, and how many of its samples were consumed by the end of it; None if nobody did that step."""
        newest = self._steps.get(step)
        if newest is None:
            return None
        samples = 0
        while (one := self._steps.get(step)) is not None and one.epoch == newest.epoch:
            samples += one.samples
            step -= 1
        return newest.epoch, samples

    def lineage(self, save: Save) -> dict[str, int]:
        """The runs that led to this save, with the last step taken from each, by what the trainers restored."""
        run, step = save
        found: dict[str, int] = {}
        while run in self.runs and run not in found:
            found[run] = step
            for restored in self.runs[run].restored.values():  # the same for all ranks
                run, step = restored.from_run, restored.step
        return found

    @property
    def step_s(self) -> float | None:
        """Median seconds from one step to the next."""
        return median(self._seconds) if self._seconds else None

    @property
    def killed_run(self) -> RunStory | None:
        """The run in which the trainer was killed."""
        return self.runs.get(self.kill.run) if self.kill is not None else None

    @property
    def survivors(self) -> list[str]:
        """The others of that run."""
        run = self.killed_run
        return sorted(set(run.formed) - {self.kill.worker}) if run is not None and self.kill is not None else []

    def run_after(self, run: RunStory) -> RunStory | None:
        """The complete run that came next; None if there is none yet."""
        later = [other for other in self.runs.values() if other.id > run.id]
        return later[0] if later and later[0].complete else None

    def stalls_s(self) -> list[float]:
        """For each save the longest time that it stopped a rank."""
        return [max(saved.stall_s for saved in ranks.values()) for ranks in self.saves.values()]

    def noticed_ms(self) -> list[float]:
        """From the kill until each survivor's call raised, sorted; empty before."""
        run = self.killed_run
        if run is None or self.kill is None:
            return []
        return sorted((at - self.kill.at) * 1000 for worker, at in run.halted_at.items() if worker in self.survivors)

    def recorded_ms(self) -> float | None:
        """From the kill until Redis had the departure on record, by the clock of this machine; None before."""
        return None if self.recorded_at_ms is None or self.kill is None else self.recorded_at_ms - self.kill.wall_ms

    def recovery_s(self) -> float | None:
        """From the kill until every survivor had done a step again; None before."""
        run = self.killed_run
        after = self.run_after(run) if run is not None else None
        trained = after.training_at if after is not None else None
        return None if trained is None or self.kill is None else trained - self.kill.at

    def full_again_s(self, workers: int) -> float | None:
        """From the kill until as many trainers as before had done a step again; None before."""
        if self.kill is None:
            return None
        full = [run.training_at for run in self.runs.values() if run.id > self.kill.run and run.world_size == workers]
        trained = next((at for at in full if at is not None), None)
        return None if trained is None else trained - self.kill.at

    def redone(self) -> int:
        """How many steps were done more than once, because a restore went back."""
        runs = list(self.runs.values())
        return sum(max(0, before.reached - after.begins_after) for before, after in itertools.pairwise(runs))
