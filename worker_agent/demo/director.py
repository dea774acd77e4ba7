"""Directs the demo: prepares the data, starts the stack and the launcher, watches, kills one trainer, inspects what is left.

Everything is decided elsewhere (`story`, `narrator`, `checks`, `figures`); this is the shell that acts.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dtr.config import Settings
from dtr.errors import CoordinatorUnavailable, DtrError
from dtr.stack import Stack, Up, processes
from dtr.state.client import translate
from dtr.state.job import JobState
from worker_agent.demo.advice import advice
from worker_agent.demo.checks import Check, Ending, check_all
from worker_agent.demo.corpus import library, write_corpus
from worker_agent.demo.figures import Figures, measure
from worker_agent.demo.gradients import GRADIENTS
from worker_agent.demo.inspection import Inspection, inspect
from worker_agent.demo.model import Shape
from worker_agent.demo.narrator import Narrator, number_of
from worker_agent.demo.options import BATCH, SHARD_SIZE, Options
from worker_agent.demo.proof import Position, Proof, position_of, prove, read_logs
from worker_agent.demo.records import Notes
from worker_agent.demo.report import LiveReport, Now, Report
from worker_agent.demo.story import Kill, RunStory, Story
from worker_agent.demo.trainer import Plan
from worker_agent.demo.workplace import Workplace

__all__ = ["Outcome", "TrainersFailed", "direct"]

log = logging.getLogger(__name__)

_LOOK_EVERY_MS: Final = 100
_STUCK_S: Final = 150.0  # longer than any wait of a trainer's own
_READY_WITHIN_S: Final = 20.0
_END_WITHIN_S: Final = 10.0
_LOG_LINES: Final = 12
_FILE_SAMPLES: Final = 160 * SHARD_SIZE  # whole shards, so that shard n begins with sample n * SHARD_SIZE


class TrainersFailed(DtrError):
    """The trainers did not get to the end; the message has the end of their log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The numbers, the verdicts, and the URL of the store."""

    figures: Figures
    checks: Sequence[Check]
    store: str

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def direct(options: Options, place: Workplace, settings: Settings, report: Report) -> Outcome:
    """Run the demo; what it started has ended when this returns or raises.

    Args:
        options: what was asked for.
        place: its folders.
        settings: of everything that it starts; also in this process's environment.
        report: where to say what happens.

    Raises:
        DtrError: the stack did not start, or the trainers failed.
        KeyboardInterrupt: as whoever allows it says.
    """
    began = time.monotonic()
    shape = Shape(hidden=options.hidden)
    corpus = write_corpus(
        place.corpus, source=library(), text_bytes=shape.text_bytes, file_samples=_FILE_SAMPLES, samples=options.samples(shape.text_bytes)
    )
    report.say(f"data: {corpus.sources} modules of Python's standard library as {corpus.samples:,} samples")
    plan = Plan(
        corpus=str(corpus.folder), notes=str(place.notes), consumed=str(place.consumed), memory=str(place.gradients), steps=options.steps,
        workers=options.workers, save_every=options.save_every, batch=BATCH, shard_size=SHARD_SIZE, victim=options.victim,
        kill_at=options.kill_at, rejoin_after_s=options.rejoin_after_s, shape=shape,
    )  # fmt: skip
    report.say("starting Redis, an uploader and Flower")
    with (
        Stack(place.home, settings).borrowed() as up,
        contextlib.closing(JobState(settings.redis_url, settings.job, name="dtr-demo")) as state,
    ):
        _tell_where(report, up, place, settings, options)
        watch = Watch(options, state, place, report, samples=corpus.samples)
        status = watch.until_end(_launcher_command(options, plan))
        report.say("training is over; looking at every checkpoint from outside the job")
        found = inspect(settings, state, shape)
        if found.sample:
            report.say(f"the restored model writes: {found.sample}")
        report.say("ending everything")
    lineage = watch.story.lineage(found.restored) if found.restored is not None else {}
    proof = prove(read_logs(place.consumed), lineage, samples=corpus.samples)
    checks = check_all(watch.story, _ending(options, place, status, found, proof))
    seconds = time.monotonic() - began
    figures = measure(watch.story, found.uploads, proof, workers=options.workers, seconds=seconds)
    return Outcome(figures=figures, checks=checks, store=str(settings.store))


def _tell_where(report: Report, up: Up, place: Workplace, settings: Settings, options: Options) -> None:
    at = {service.name: service.address for service in up.record.services}
    report.say(f"up: Redis at {at.get('redis', settings.redis_url)}, uploader, Flower")
    report.say(f"checkpoints go to {settings.store}" if options.store else f"everything is in {place.folder}")
    report.hint()
    for line in advice(settings.redis_url, settings.job, at.get("flower"), executable=sys.executable, cwd=options.cwd):
        report.hint(line, "cyan")
    report.hint()


def _launcher_command(options: Options, plan: Plan) -> list[str]:
    elastic = [f"--min={options.fewest_workers}", "--max-restarts=1"] if options.kill else []
    return [
        sys.executable, "-m", "worker_agent", "run", f"-n={options.workers}", *elastic, f"--grace={_END_WITHIN_S / 2:g}",
        "--", sys.executable, "-m", "worker_agent.demo.trainer", plan.encode(),
    ]  # fmt: skip


def _ending(options: Options, place: Workplace, status: int, found: Inspection, proof: Proof) -> Ending:
    return Ending(
        workers=options.workers,
        steps=options.steps,
        kill=options.kill,
        status=status,
        verified=found.verified,
        last_restored=found.restored,
        last_digest=found.digest,
        last_problem=found.problem,
        proof=proof,
        position=_position(found, proof.samples),
        running=[f"process {process.pid}" for process in place.running()],
        remains=place.remains(),
    )


def _position(found: Inspection, samples: int) -> Position | None:
    return None if found.data is None else position_of(found.data, shard_size=SHARD_SIZE, samples=samples)


@contextlib.contextmanager
def launched(command: Sequence[str], place: Workplace) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher that ends with the block at the latest, its trainers first, and with this process whatever happens to it."""
    child = processes.start(command, log=place.launcher_log, cwd=place.folder)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()  # what it leaves behind is ended when the folders are cleared
            child.wait()


@contextlib.contextmanager
def _interruption_told(report: Report) -> Iterator[None]:
    """Ending everything takes a few seconds: say at once that it has begun."""
    try:
        yield
    except KeyboardInterrupt:
        report.close()
        report.say("interrupted: ending everything")
        raise


class Watch:
    """Watches the trainers, tells the story, and kills one of them when its time has come."""

    def __init__(self, options: Options, state: JobState, place: Workplace, report: Report, *, samples: int) -> None:
        self.story = Story()
        self._options, self._state, self._place, self._report, self._samples = options, state, place, report, samples
        self._notes = Notes(place.notes)
        self._narrator = Narrator(saves=not isinstance(report, LiveReport))
        self._event_id = "0-0"
        self._heard_at = time.monotonic()
        self._due_at: float | None = None
        self._redis_is_away = False

    def until_end(self, command: Sequence[str]) -> int:
        """Start the launcher and watch until it has ended; returns its exit status.

        Raises:
            TrainersFailed: it failed, or nothing happened for long.
        """
        with launched(command, self._place) as child, _interruption_told(self._report):
            self._heard_at = time.monotonic()
            while child.poll() is None:
                self._look()
                if time.monotonic() - self._heard_at > _STUCK_S:
                    raise TrainersFailed(f"nothing has happened for {_STUCK_S:g} s; {self._log_end()}")
        self._look()
        self._report.close()
        if child.returncode != 0:
            raise TrainersFailed(f"the launcher ended with status {child.returncode}; {self._log_end()}")
        return child.returncode

    def _look(self) -> None:
        try:
            self._hear_events()
            if self._options.victim is not None and self.story.kill is None:
                self._kill_if_due(self._options.victim)
        except CoordinatorUnavailable as exc:
            self._without_redis(exc)
        else:
            if self._redis_is_away:
                self._redis_is_away = False
                self._report.say("Redis answers again")
        for note in self._notes.fresh():
            self._heard_at = time.monotonic()
            self.story.add(note)
        for line in self._narrator.fresh(self.story):
            self._report.say(line.text, line.style)
        if self.story.run is not None:
            self._report.show(now_of(self.story, self._options.steps, self._samples))

    def _hear_events(self) -> None:
        """Wait for a moment, or until Redis has news."""
        with translate(self._state.url):
            answer: Any = self._state.redis.xread({self._state.keys.events: self._event_id}, block=_LOOK_EVERY_MS)
        for _, entries in answer or ():
            for entry_id, fields in entries:
                self._event_id = entry_id
                if fields.get("event") == "departed":
                    self.story.add_departure(fields["worker"], float(entry_id.partition("-")[0]))

    def _without_redis(self, exc: CoordinatorUnavailable) -> None:
        """Trainers wait for it, so the director does: whoever ended it in mid-demo may want to see that."""
        if not self._redis_is_away:
            self._redis_is_away = True
            self._report.say("Redis is away: trainers wait for it at their next barrier", "yellow")
            log.warning("%s", exc.message)
        time.sleep(_LOOK_EVERY_MS / 1000)

    def _kill_if_due(self, victim: int) -> None:
        """Once there is a commit to restore and all the others wait for the victim, which stands still for this."""
        story, options = self.story, self._options
        run = story.run
        if run is None or run.world_size != options.workers or story.step < options.kill_at - 1:
            return
        self._due_at = self._due_at or time.monotonic()
        ready = bool(story.commits) and self._waiting_for_gradients(run) == options.workers - 1
        if not ready and time.monotonic() - self._due_at < _READY_WITHIN_S:
            return
        worker = story.seats[victim]
        process = processes.identify(story.pids[worker])
        if process is None:
            return  # it ended by itself; the launcher will say so
        kill = Kill(
            at=time.monotonic(),
            wall_ms=time.time() * 1000,
            worker=worker,
            rank=run.formed[worker].rank,
            pid=process.pid,
            run=run.id,
            step=story.step,
        )
        if processes.send(process, signal.SIGKILL):
            story.kill = kill

    def _waiting_for_gradients(self, run: RunStory) -> int:
        """How many ranks have arrived at the barrier of the step in which the kill is due, as anyone sees it in Redis."""
        seq = self._options.kill_at - run.begins_after - 1
        with translate(self._state.url):
            arrived = self._state.redis.hget(self._state.keys.barrier(GRADIENTS, run.id, seq).round, "arrived")
        return int(arrived or 0)

    def _log_end(self) -> str:
        log = self._place.launcher_log
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if log.exists() else []
        return "\n".join([f"the end of {log}:", *lines])


def now_of(story: Story, steps: int, samples: int) -> Now:
    """The story's present; ``samples`` are those of an epoch."""
    run = story.run
    gone = story.kill.worker if story.kill is not None and run is not None and story.kill.run == run.id else ""
    phases = {worker: "killed" if worker == gone else phase for worker, phase in sorted(story.phases.items())}
    stalls_s = story.stalls_s()
    epoch, consumed = story.position(story.step) or (0, 0)
    return Now(
        step=story.step,
        steps=steps,
        loss=story.losses[-1] if story.losses else None,
        step_s=story.step_s,
        doing={number_of(worker): phase for worker, phase in phases.items()},
        saved=len(story.saves),
        durable=len(story.commits),
        stall_s=stalls_s[-1] if stalls_s else None,
        epoch=epoch,
        consumed=consumed,
        samples=samples,
    )
