"""An upload, collections and a retirement, cut into steps and put in every order: no commit ever names a chunk that is gone.

Each actor is a thread that stops at its failpoints, so that an order of steps is an exact interleaving, and one that is never continued
is a death. The store is real; Redis is only asked for the newest commit.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint import records
from dtr.checkpoint.delta import carrying as delta
from dtr.checkpoint.delta import chunks as chunk_format
from dtr.checkpoint.delta import collection as chunk_collection
from dtr.checkpoint.delta.chunks import is_recipe
from dtr.checkpoint.delta.collection import CONDEMNED, collect_chunks
from dtr.checkpoint.delta.source import ChunkSource, recipe_of
from dtr.checkpoint.manifest import Manifest, PartFacts
from dtr.checkpoint.staging.slots import Reading
from dtr.checkpoint.survey import manifest_key, read_manifest
from dtr.errors import ManifestInvalid
from dtr.store import open_store
from tests.chunked import file_of
from tests.staged import RUN, record

CHUNK_BYTES = 4096
HERE = threading.local()


class Died(BaseException):
    """The actor was killed where it stood."""


class Actor:
    """Runs ``work`` up to its next failpoint at each ``step``."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._work, self._killed, self.over = work, False, False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        HERE.actor = self
        self._go.acquire()
        try:
            self._work()
        except Died:
            pass
        except BaseException as exc:
            self.failure = exc
        self.over = True
        self._stopped.release()

    def at_failpoint(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self._killed:
            raise Died

    def step(self) -> None:
        if not self.over:
            self._go.release()
            assert self._stopped.acquire(timeout=30), "an actor is stuck"

    def finish(self) -> None:
        while not self.over:
            self.step()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def kill(self) -> None:
        self._killed = True
        self.finish()


class AttemptDied(BaseException):
    """This attempt at the upload was killed; another one follows."""


def failpoint(name: str) -> None:
    if (actor := getattr(HERE, "actor", None)) is not None:
        actor.at_failpoint()
        HERE.left = getattr(HERE, "left", 0) - 1
        if HERE.left == 0:
            raise AttemptDied


@pytest.fixture(autouse=True)
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunk_format.cut.__kwdefaults__, "chunk_bytes", CHUNK_BYTES)
    monkeypatch.setattr(delta, "failpoint", failpoint)
    monkeypatch.setattr(chunk_collection, "failpoint", failpoint)
    monkeypatch.setattr(delta, "_SENDERS", 1)
    monkeypatch.setattr(delta.delta_payoff, "is_wanted", lambda *args: True)
    monkeypatch.setattr(delta.delta_payoff, "note", lambda *args, **kwargs: None)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is some: thousands of small files are synced."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:
        yield Path(made)


class Scene:
    """A store with one commit."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(str(folder))
        self.latest = ""
        self.save(1, seed=1)()

    def save(self, step: int, *, seed: int, deaths: Sequence[int] = ()) -> Callable[[], None]:
        """An upload of a state that shares four of its six tensors with every other seed's, and its commit.

        ``deaths``: at which of its failpoints each attempt dies, before the one that lives.
        """
        state = {f"w{n}": np.random.default_rng([n, 0 if n < 4 else seed]).integers(0, 255, CHUNK_BYTES, dtype=np.uint8) for n in range(6)}
        content, _ = file_of(state, {"step": str(step)})
        reading = Reading(record=record(step, delta="auto", size_bytes=len(content)), descriptor=-1, buffer=memoryview(content))
        fake: Any = SimpleNamespace(
            url="redis://none", keys=SimpleNamespace(meta="meta"), redis=SimpleNamespace(hget=lambda key, field: self.latest)
        )

        def work() -> None:
            for point in deaths:
                HERE.left = point
                with contextlib.suppress(AttemptDied):
                    delta.carry(self.store, reading, state=fake, nonce=f"{step:08x}", progress=lambda n: None, spare=lambda n: None)
            HERE.left = 0
            facts = delta.carry(self.store, reading, state=fake, nonce=f"{step:08x}", progress=lambda n: None, spare=lambda n: None)
            assert facts is not None
            failpoint("carried")
            self._commit(step, facts)
            self.latest = f"{RUN}/{step}"

        return work

    def _commit(self, step: int, facts: PartFacts) -> None:
        """What ``commit.settle`` leaves: the manifest, and no other recipe of this step."""
        manifest = Manifest(
            decision="commit", job="job", run=RUN, step=step, world_size=1, replicated="none", parent=None, created_at=1, parts=(facts,)
        )
        self.store.put(manifest_key(RUN, step), manifest.encode(), if_absent=True)
        for key in list(self.store.list(manifest_key(RUN, step).rpartition("/")[0])):
            if is_recipe(key) and key != facts.object:
                self.store.delete(key)

    def retire(self, step: int = 1) -> None:
        """A commit goes: its tombstone, then its recipe."""
        manifest = read_manifest(self.store, RUN, step)
        self.store.put(manifest_key(RUN, step), replace(manifest, decision="tombstone", reason="test").encode())
        failpoint("retired")
        self.store.delete(manifest.parts[0].object)

    def collect(self) -> None:
        collect_chunks(self.store)

    def check(self, *steps: int) -> None:
        """Every commit is whole; after a last collection there is nothing else.

        The list of a dead collector stays while a commit names a chunk of it, and goes with the last of these.
        """
        for step in steps:
            (part,) = read_manifest(self.store, RUN, step).parts
            ChunkSource(self.store, part).verify()
        collect_chunks(self.store)
        named = {c.key for step in steps for c in recipe_of(self.store, read_manifest(self.store, RUN, step).parts[0]).chunks}
        assert {key for key in self.store.list("chunks") if not key.startswith(CONDEMNED)} == named
        assert all(listed & named for listed in chunk_collection._lists(self.store).values())
        self.save(99, seed=2)()
        for step in steps:
            self.retire(step)
        collect_chunks(self.store)
        ChunkSource(self.store, read_manifest(self.store, RUN, 99).parts[0]).verify()
        assert list(self.store.list(CONDEMNED)) == []


def orders(seed: int, *steps: int) -> Sequence[int]:
    """One order of the actors' steps: actor n has steps[n]."""
    order = list(itertools.chain(*([n] * count for n, count in enumerate(steps))))
    random.Random(seed).shuffle(order)
    return order


def interleaved(folder: Path, seed: int, *, deaths: bool) -> None:
    """One upload of a state like the first, the retirement of the first, and two collections, in one order."""
    chooser = random.Random(seed)
    scene = Scene(folder / str(seed))
    attempts = [chooser.randrange(1, 6) for _ in range(chooser.randrange(3))] if deaths else []
    works = [scene.save(2, seed=2, deaths=attempts), scene.retire, scene.collect, scene.collect]
    actors = [Actor(work) for work in works]
    doomed = chooser.sample([2, 3], chooser.randrange(3)) if deaths else []
    steps = [7 + sum(attempts), 2, *(chooser.randrange(1, 6) if n in doomed else 12 for n in (2, 3))]
    try:
        for n in orders(seed, *steps):
            actors[n].step()
        for n in doomed:
            actors[n].kill()
        for actor in actors:
            actor.finish()
        scene.check(2)
    finally:
        for actor in actors:
            actor.kill()


@pytest.mark.parametrize("deaths", [False, True], ids=["all live", "some die"])
def test_some_orders(folder: Path, deaths: bool) -> None:
    """The same orders each time."""
    for seed in range(60):
        interleaved(folder, seed, deaths=deaths)


@pytest.mark.soak
@pytest.mark.parametrize("deaths", [False, True], ids=["all live", "some die"])
def test_many_orders(folder: Path, deaths: bool) -> None:
    """Five thousand orders."""
    for seed in range(100, 5_100):
        interleaved(folder, seed, deaths=deaths)


@pytest.mark.parametrize("uploaded", range(7))
@pytest.mark.parametrize("collected", range(9))
def test_each_pair_of_points(folder: Path, uploaded: int, collected: int) -> None:
    """The upload at each of its points, then the retirement, then the collector to each of its own; the upload ends first, or last."""
    for upload_first in (True, False):
        scene = Scene(folder / f"{upload_first}")
        upload, collector = Actor(scene.save(2, seed=2)), Actor(scene.collect)
        for _ in range(uploaded):
            upload.step()
        scene.retire()
        for _ in range(collected):
            collector.step()
        for actor in (upload, collector) if upload_first else (collector, upload):
            actor.finish()
        scene.check(2)


@pytest.mark.parametrize("point", range(1, 5))
def test_a_commit_between_two_deaths(folder: Path, point: int) -> None:
    """Collectors die at each point, before and after each of three saves of the very same bytes; all are whole."""
    scene = Scene(folder)
    for step in (2, 3, 4):
        dying = Actor(scene.collect)
        if step == 2:
            scene.retire()
        for _ in range(point):
            dying.step()
        scene.save(step, seed=1)()
        dying.kill()
    scene.check(2, 3, 4)


def test_a_list_stays_while_a_chunk_of_it_exists(folder: Path) -> None:
    """Its collector may only sleep: until the last of its chunks is gone, none of them is used again, though a commit names them."""
    scene = Scene(folder)
    live = min(scene.store.list("chunks"))
    key = f"{CONDEMNED}/{'0' * 16}.json"
    scene.store.put(key, records.encode({"condemned": [live, f"chunks/ff/{'f' * 64}-00000000"]}))
    collect_chunks(scene.store)
    assert list(scene.store.list(CONDEMNED)) == [key]
    assert live in set(scene.store.list("chunks"))
    scene.save(2, seed=1)()
    named = {chunk.key for chunk in recipe_of(scene.store, read_manifest(scene.store, RUN, 2).parts[0]).chunks}
    assert live not in named
    assert len(named & set(scene.store.list("chunks"))) == len(named)
    scene.retire()
    collect_chunks(scene.store)
    assert list(scene.store.list(CONDEMNED)) == []
    scene.check(2)


def test_a_damaged_list(folder: Path) -> None:
    """Nobody knows what is on it: a collector deletes nothing, and an upload uses nothing again, but commits."""
    scene = Scene(folder)
    scene.store.put(f"{CONDEMNED}/{'0' * 16}.json", b"{}")
    before = set(scene.store.list("chunks"))
    with pytest.raises(ManifestInvalid, match="condemned"):
        collect_chunks(scene.store)
    scene.save(2, seed=1)()
    named = {chunk.key for chunk in recipe_of(scene.store, read_manifest(scene.store, RUN, 2).parts[0]).chunks}
    assert not named & before
    assert named | before <= set(scene.store.list("chunks"))
