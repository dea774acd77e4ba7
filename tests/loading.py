"""Ranks of one job that load data, in one process: each has a session, a data plane and a thread of its own, as processes would."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtr.config import Settings
from dtr.datasets.loading.batch import Batch
from dtr.datasets.loading.loader import Loader
from dtr.datasets.plane import DataPlane, merge_shares, plane_of
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.runs import World
from dtr.session import Session
from dtr.state.job import JobState

Act = Callable[["LoadingRank"], Any]


def write_lines(folder: Path, samples: int, files: int = 4) -> Path:
    """JSON lines with the ids 0 to ``samples`` - 1, spread over files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(files):
        rows = range(part * samples // files, (part + 1) * samples // files)
        (folder / f"part-{part}.jsonl").write_text("".join(json.dumps({"id": i, "x": i / 2}) + "\n" for i in rows))
    return folder


def registered(settings: Settings, tmp_path: Path) -> Path:
    """400 samples in 16 shards, shuffled, as ``numbers``; for a fixture."""
    folder = write_lines(tmp_path / "data", 400)
    with closing(DatasetRegistry(settings.redis_url, job=settings.job)) as registry:
        registry.register("numbers", path=folder, format="jsonl", shard_size=25, shuffle=True)
    return folder


def damage(path: Path) -> None:
    """The first bytes make no JSON any more, and the file looks as it was."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"?????")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@dataclass
class LoadingRank:
    """One rank, and what it has consumed: its own record, which shares nothing with the loader's."""

    session: Session
    registry: DatasetRegistry
    seen: list[tuple[int, list[int]]] = field(default_factory=list)  # (epoch, ids) by batch
    step: int = -1

    @property
    def plane(self) -> DataPlane:
        return plane_of(self.session)

    def loader(self, name: str = "numbers", **options: Any) -> Loader:
        settings = {
            "batch_size": None if options.get("mode") == "deterministic" else 10, "global_batch_size": None, "epochs": 1, "columns": ["id"],
            "seed": 7, "prefetch": 2, "mode": "dynamic", "tail": "empty", "window": None,
        }  # fmt: skip
        return self.plane.loader(self.registry, name, **(settings | options))

    def consume(self, batch: Batch) -> None:
        """What a trainer does after its optimizer step."""
        self.step += 1
        self.plane.consumed(batch, self.step)
        self.seen.append((batch.epoch, [int(i) for i in batch["id"]]))


class Loading:
    """A job whose ranks are formed into a run."""

    def __init__(self, settings: Settings, size: int, *, names: str = "w", recover: Callable[[JobState, str], int] | None = None) -> None:
        world = World(low=size, high=size)

        def session(n: int) -> Session:
            made: list[Session] = []
            rebuild = None if recover is None else lambda state_id: recover(made[0].state, state_id)
            made.append(Session(settings, worker_id=f"{names}{n}", rank=n, world=world, recover=rebuild))
            return made[0]

        sessions = [session(n) for n in range(size)]
        self._looks = itertools.count(1_000_000)
        self.ranks = [LoadingRank(session, DatasetRegistry(settings.redis_url, job=settings.job)) for session in sessions]

    def start(self) -> Loading:
        for rank in self.ranks:
            rank.session.start()
        self.each(lambda rank: rank.session.form())
        return self

    def each(self, call: Act, timeout_s: float = 60.0) -> list[Any]:
        """``call`` on every rank at once; what it raises is raised here."""
        results: list[Any] = [None] * len(self.ranks)
        errors: list[BaseException] = []

        def run(n: int) -> None:
            try:
                results[n] = call(self.ranks[n])
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), "a rank is stuck"
        if errors:
            raise errors[0]
        return results

    def train(self, steps: int | None = None, *, lockstep: bool = True, **options: Any) -> list[int]:
        """Every rank consumes batches, all of them or ``steps``; returns how many each one had."""
        meeting = threading.Barrier(len(self.ranks), timeout=30)

        def loop(rank: LoadingRank) -> int:
            count = 0
            loader = rank.loader(**options)
            while steps is None or count < steps:
                try:
                    batch = next(loader)
                except StopIteration:
                    break
                if lockstep:
                    meeting.wait()
                rank.consume(batch)
                count += 1
            return count

        return self.each(loop)

    def told(self) -> None:
        """Redis has heard every report: some go with the next one."""
        assert all(rank.plane.reports.flush(30) for rank in self.ranks)

    def merged(self) -> dict[str, Any]:
        """The data state that a checkpoint of this moment would have."""
        step = next(self._looks)  # a step is captured once
        return merge_shares({n: rank.plane.captured(step) for n, rank in enumerate(self.ranks)})

    def restored(self, data: dict[str, Any]) -> Loading:
        for rank in self.ranks:
            rank.plane.restored(data)
        return self

    def seen(self, epoch: int = 0) -> Counter[int]:
        """How often each id was consumed in an epoch."""
        return Counter(i for rank in self.ranks for e, ids in rank.seen if e == epoch for i in ids)

    def close(self) -> None:
        for rank in self.ranks:
            rank.plane.close()
            rank.registry.close()
            rank.session.close()


@contextmanager
def loading(settings: Settings, size: int, **options: Any) -> Iterator[Loading]:
    """A formed job of ``size`` ranks, closed at the end."""
    job = Loading(settings, size, **options)
    try:
        yield job.start()
    finally:
        job.close()


def once_each(counts: Counter[int], ids: Iterable[int]) -> bool:
    """Whether these ids were consumed exactly once, and no others."""
    return counts == Counter(ids)
