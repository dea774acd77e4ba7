"""Several ranks of one job in one process: each has a session, a manager and a thread of its own, as processes would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtr.checkpoint.keeping.rebuild import rebuild
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.saving.handle import Commit, SaveHandle
from dtr.config import Settings
from dtr.runs import World
from dtr.session import Session


@dataclass
class Rank:
    """One rank: what its process would hold."""

    session: Session
    manager: CheckpointManager

    @property
    def rank(self) -> int:
        return self.session.run.rank


class Job:
    """The ranks of a job, formed into a run. ``each`` runs one call on all of them at once."""

    def __init__(self, settings: Settings, store: Path | str, size: int, *, names: str = "w", **options: Any) -> None:
        self.settings, self.url = settings, str(store)
        self.ranks = [self._make(f"{names}{n}", n, size, options) for n in range(size)]

    def _make(self, worker_id: str, rank: int, size: int, options: dict[str, Any]) -> Rank:
        def recover(state_id: str) -> int:
            return rebuild(session.state, self.url, state_id=state_id)

        settings = replace(self.settings, **options)
        session = Session(settings, worker_id=worker_id, rank=rank, world=World(low=size, high=size), recover=recover)
        return Rank(session, CheckpointManager(self.url, session=session))

    def start(self) -> Job:
        for rank in self.ranks:
            rank.session.start()
        self.each(lambda rank: rank.session.form())
        return self

    def each(self, call: Callable[[Rank], Any], timeout_s: float = 60.0) -> list[Any]:
        """``call`` on every rank at once, in order of their seats; an exception is a result."""
        results: list[Any] = [None] * len(self.ranks)

        def run(n: int) -> None:
            try:
                results[n] = call(self.ranks[n])
            except Exception as exc:
                results[n] = exc

        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), "a rank is stuck"
        return results

    def save(self, state: Callable[[Rank], Any], step: int, *, replicated: bool = False) -> list[SaveHandle]:
        """Every rank saves ``state(rank)``."""
        return self.each(lambda rank: rank.manager.save_async(state(rank), step, replicated=replicated))

    def commit(self, state: Callable[[Rank], Any], step: int, *, replicated: bool = False) -> list[Commit]:
        """Every rank saves, and waits until that is durable."""
        return [handle.durable.result(30) for handle in self.save(state, step, replicated=replicated)]

    def restore(self, step: int | None = None, *, fresh: bool = False) -> list[Any]:
        """Every rank restores."""
        return self.each(lambda rank: rank.manager.restore(step, fresh=fresh))

    def close(self) -> None:
        for rank in self.ranks:
            rank.manager.close(0.5)
            rank.session.close()


@contextmanager
def running(settings: Settings, store: Path | str, size: int, **options: Any) -> Iterator[Job]:
    """A job of ``size`` ranks in a run, closed at the end."""
    job = Job(settings, store, size, **options)
    try:
        yield job.start()
    finally:
        job.close()
