"""One trainer of the demo, as the launcher starts it: ``python -m worker_agent.demo.trainer PLAN``.

It trains the model of :mod:`worker_agent.demo.model` together with the other ranks, saves while it trains, and when the run ends
under it, because a member departed or a newcomer waits, it forms the next one, restores, and goes on with the data that the restored
checkpoint has not consumed. It notes what happens, and which samples it trained on, in files that the director reads.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Self

import numpy as np

from dtr.checkpoint.saving.handle import Commit, SaveHandle
from dtr.config import LauncherEnvironment
from dtr.datasets.loading.batch import Batch
from dtr.errors import BarrierBroken, CheckpointError, RosterChanged
from dtr.runs import Run
from worker_agent import Agent
from worker_agent.demo.corpus import COLUMN, DATASET, NUMBER_BYTES, split
from worker_agent.demo.gradients import SharedGradients
from worker_agent.demo.model import Adam, ByteModel, Shape, digest, load, state_of
from worker_agent.demo.proof import SampleLog
from worker_agent.demo.records import Committed, Finished, Formed, Halted, Notebook, Restored, Saved, Started, Stepped

__all__ = ["Plan", "main"]

_KILLED_WITHIN_S: Final = 60.0
_COMMIT_WITHIN_S: Final = 120.0
_REPLACED_WITHIN_S: Final = 60.0
_REPLACEMENT_ROUND_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do: written by the director as JSON, and the only argument of a trainer.

    Args:
        corpus: folder of the data.
        notes: folder for what happens.
        consumed: folder for the log of which samples were trained on.
        memory: folder for the gradients, in shared memory if possible.
        steps: how many there are to do.
        workers: how many trainers there are to be.
        save_every: steps from one save to the next; the last step is saved in any case.
        batch: samples that each rank takes for a step, at most.
        shard_size: samples in a shard.
        victim: LOCAL_RANK of the trainer that is to be killed; None: nobody.
        kill_at: the step in which that happens.
        rejoin_after_s: how long a restarted trainer takes to come back, as a new machine would.
        seed: of the weights and the order of the data.
        shape: of the model.
    """

    corpus: str
    notes: str
    consumed: str
    memory: str
    steps: int
    workers: int
    save_every: int
    batch: int
    shard_size: int
    victim: int | None = None
    kill_at: int = -1
    rejoin_after_s: float = 0.0
    seed: int = 7
    shape: Shape = field(default_factory=Shape)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `encode` wrote; raises KeyError, TypeError or ValueError for anything else."""
        table = json.loads(text)
        return cls(**{**table, "shape": Shape(**table["shape"])})


class Trainer:
    """The trainer: its model, its optimizer, and the saves that are under way.

    Args:
        plan: what to do.
        agent: started.
        notebook: where to write what happens.
        consumed: where to write which samples were trained on.
        doomed: whether this is the process that is to be killed.
    """

    def __init__(self, plan: Plan, agent: Agent, notebook: Notebook, consumed: SampleLog, *, doomed: bool) -> None:
        self._plan, self._agent, self._notebook, self._consumed, self._doomed = plan, agent, notebook, consumed, doomed
        self._model = ByteModel(plan.shape, plan.seed)
        self._optimizer = Adam(plan.shape.parameters)
        self._last_save: SaveHandle | None = None

    def train(self) -> None:
        """Do all steps, in as many runs as it takes."""
        while True:
            try:
                self._train_in_run()
                return
            except (BarrierBroken, RosterChanged) as change:
                self._note_halt(change)
                self._agent.form()

    def _train_in_run(self) -> None:
        plan, agent = self._plan, self._agent
        self._register()
        self._restore()
        loader = agent.loader(DATASET, batch_size=plan.batch, epochs=None)
        width = plan.shape.parameters + 1  # the loss is averaged along with the gradient
        with SharedGradients(Path(plan.memory), run=agent.run, rank=agent.rank, world_size=agent.world_size, width=width) as shared:
            for batch in itertools.islice(loader, plan.steps - 1 - agent.current_step):
                self._step(batch, shared)
        self._await_replacement()
        self._finish()

    def _register(self) -> None:
        """Register the data, and note which shards are this rank's: those that it takes first."""
        plan, agent = self._plan, self._agent
        agent.datasets.register(
            DATASET, path=plan.corpus, format="bin", dtype="uint8", sample_length=NUMBER_BYTES + plan.shape.text_bytes,
            shard_size=plan.shard_size, shuffle=True, seed=plan.seed,
        )  # fmt: skip
        shards = agent.datasets.get_shard(DATASET)
        numbers = tuple(sorted(shard.index for shard in shards))
        self._notebook.write(Formed(run=agent.run, rank=agent.rank, world_size=agent.world_size, shards=numbers))

    def _restore(self) -> None:
        """Take over the newest commit, or begin anew if there is none yet."""
        agent = self._agent
        began = time.monotonic()
        found = agent.restore(fresh=True)
        if found is None:
            self._model, self._optimizer = ByteModel(self._plan.shape, self._plan.seed), Adam(self._plan.shape.parameters)
            step, from_run, found_digest = -1, "", ""
        else:
            load(found.state, self._model, self._optimizer)
            step, from_run, found_digest = found.step, found.run, digest(found.state)
        seconds = time.monotonic() - began
        self._notebook.write(Restored(run=agent.run, rank=agent.rank, from_run=from_run, step=step, digest=found_digest, seconds=seconds))

    def _step(self, batch: Batch, shared: SharedGradients) -> None:
        agent, plan = self._agent, self._plan
        numbers, text = split(np.asarray(batch[COLUMN]))
        if len(text):  # else this rank is out of data, and the epoch goes on for others
            shared.own[-1] = self._model.gradient(text, out=shared.own[:-1])
        if self._doomed and agent.current_step + 1 == plan.kill_at:
            time.sleep(_KILLED_WITHIN_S)  # the others wait for this rank's gradient when the signal comes
        mean, samples = shared.average(agent.barrier, weight=len(text))
        loss = float(mean[-1])
        self._optimizer.update(self._model.flat, mean[:-1])
        step = agent.step(batch, loss=loss)
        self._consumed.write(run=agent.run, step=step, rank=agent.rank, epoch=batch.epoch, numbers=numbers)
        self._notebook.write(Stepped(run=agent.run, step=step, loss=loss, epoch=batch.epoch, samples=samples))
        if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
            self._save(step)

    def _save(self, step: int) -> None:
        agent = self._agent
        state = state_of(self._model, self._optimizer)
        state_digest = digest(state)
        began = time.monotonic()
        handle = agent.save_async(state, step, replicated=True)
        stall_s = time.monotonic() - began
        handle.durable.add_done_callback(partial(self._note_commit, handle))
        self._last_save = handle
        size_bytes = 3 * self._model.flat.nbytes  # the weights and the optimizer's two moments
        self._notebook.write(Saved(run=agent.run, rank=agent.rank, step=step, digest=state_digest, stall_s=stall_s, size_bytes=size_bytes))

    def _note_commit(self, handle: SaveHandle, durable: Future[Commit]) -> None:
        if durable.exception() is not None:
            return  # abandoned with its run, or the manager was closed
        self._notebook.write(Committed(run=handle.run, step=handle.step, seconds=durable.result().seconds))

    def _note_halt(self, change: BarrierBroken | RosterChanged) -> None:
        agent = self._agent
        culprit, reason = blamed(change, agent.session.run)
        missing = tuple(member.worker for member in change.facts.get("missing", ()))
        self._notebook.write(
            Halted(
                run=agent.run,
                rank=agent.rank,
                step=agent.current_step,
                error=type(change).__name__,
                barrier=str(change.facts.get("barrier", "")),
                missing=missing,
                culprit=culprit,
                reason=reason,
            )
        )

    def _await_replacement(self) -> None:
        """With a trainer missing, stay: it is on its way, and cannot form a run alone. The barrier raises RosterChanged when it is here."""
        rounds = int(_REPLACED_WITHIN_S / _REPLACEMENT_ROUND_S) if self._agent.world_size < self._plan.workers else 0
        for _ in range(rounds):  # a number of rounds, and no deadline, so that all ranks stop together
            self._agent.barrier("replacement")
            time.sleep(_REPLACEMENT_ROUND_S)

    def _finish(self) -> None:
        """Wait until the last save is durable and everybody is here, so that nobody leaves a run that others still need."""
        if self._last_save is not None:
            try:
                self._last_save.durable.result(timeout=_COMMIT_WITHIN_S)
            except CheckpointError as exc:
                print(f"the last save, step {self._last_save.step} of run {self._last_save.run}: {exc}", file=sys.stderr)
        self._agent.barrier("finished")
        self._notebook.write(Finished(step=self._agent.current_step))


def blamed(change: BarrierBroken | RosterChanged, run: Run) -> tuple[str, str]:
    """Who departed, empty if nobody did, and the sentence that says so, the same from either error."""
    reason = str(change.facts.get("reason", ""))
    if isinstance(change, BarrierBroken):
        return next((worker for worker in run.roster if f"({worker})" in reason), ""), reason
    worker = change.facts.get("worker") or ""
    return worker, f"rank {change.rank} ({worker}) departed: {reason}" if worker else reason


def main(argv: list[str]) -> int:
    """Train; returns 0 when every step is done."""
    plan = Plan.parse(argv[0])
    launcher = LauncherEnvironment.load()
    agent = Agent.from_env()
    notebook = Notebook(Path(plan.notes), agent.worker_id)
    consumed = SampleLog(Path(plan.consumed), agent.worker_id)
    notebook.write(Started(local_rank=launcher.local_rank, restarts=launcher.restarts))
    if launcher.restarts:
        time.sleep(plan.rejoin_after_s)
    doomed = launcher.local_rank == plan.victim and not launcher.restarts
    with agent:
        Trainer(plan, agent, notebook, consumed, doomed=doomed).train()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
