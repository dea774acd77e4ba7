"""A checkpoint that was exported into a folder, or imported from one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtr.checkpoint.keeping import export as exporter
from dtr.checkpoint.keeping.rebuild import rebuild
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.survey import read_manifest
from dtr.config import Settings
from dtr.errors import ConfigError, CoordinatorUnavailable, InvalidInput, NoCheckpoint, NotFound, StateLost
from dtr.state.client import connect
from dtr.state.job import JobState
from dtr.store import open_store
from dtr.views import stored
from dtr.views.stored import Sources

__all__ = ["TransferView", "export", "take_in", "target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferView:
    """``checkpoint`` is RUN/STEP in ``store``; ``note`` says what could not be told to Redis."""

    job: str
    store: str
    checkpoint: str
    folder: str
    files: int
    size_bytes: int
    seconds: float
    note: str = ""


def target(sources: Sources, word: str) -> tuple[str, int]:
    """The checkpoint that a person named; raises InvalidInput or NoCheckpoint."""
    return stored.targets(sources, [word])[0]


def export(sources: Sources, run: str, step: int, folder: Path) -> TransferView:
    """Write a commit into a folder; see ``dtr.checkpoint.keeping.export``."""
    if sources.store is None:
        raise InvalidInput("store must be known to export from it: give --store, or set DTR_STORE", field="store")
    try:
        manifest = read_manifest(sources.store, run, step)
    except NotFound as exc:
        raise stored.missing(sources, run, step) from exc
    if manifest.decision != "commit":
        raise NoCheckpoint(f"{name_of(run, step)} {manifest.fate}: {manifest.reason}", run=run, step=step)
    done = exporter.export(sources.store, manifest, folder)
    return TransferView(
        job=sources.job, store=sources.url, checkpoint=name_of(done.run, done.step), folder=done.folder, files=done.files,
        size_bytes=done.size_bytes, seconds=done.seconds,
    )  # fmt: skip


def take_in(settings: Settings, folder: Path, *, wall_ms: int) -> TransferView:
    """Import a folder into the store, and tell Redis where it has a state of the job; without Redis the store alone is enough.

    Args:
        settings: job, store, and where Redis is.
        folder: that was exported.
        wall_ms: this machine's clock, for a job that no Redis answers for.
    """
    if settings.store is None:
        raise ConfigError("store is not set: give --store, or set DTR_STORE", setting="store")
    base = open_store(settings.store)
    state = JobState(settings.redis_url, settings.job, client=connect(settings.redis_url, name="dtr-import", retries=1))
    note = ""
    try:
        try:
            now_ms = state.server_now_ms()
        except CoordinatorUnavailable as exc:
            now_ms, note = wall_ms, f"Redis was not told, because {exc.message}"
        done = exporter.take_in(base.child(settings.job), base.url, settings.job, folder, now_ms=now_ms)
        if not note:
            try:
                rebuild(state, settings.store)
            except StateLost:
                pass  # nobody has begun this job there: its first member learns it from the store
            except CoordinatorUnavailable as exc:
                note = f"Redis was not told, because {exc.message}"
    finally:
        state.close()
    return TransferView(
        job=settings.job, store=base.url, checkpoint=name_of(done.run, done.step), folder=done.folder, files=done.files,
        size_bytes=done.size_bytes, seconds=done.seconds, note=note,
    )  # fmt: skip
