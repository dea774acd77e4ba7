"""Checkpoints of a job from both sides: Redis's index, which knows those under way, and the store, which is the truth about the others.

Either side alone is enough: without Redis the store tells, without a store the index does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

from dtr import names
from dtr.checkpoint.keeping.catalogue import Listed, catalogue
from dtr.checkpoint.lineage import Lineage
from dtr.checkpoint.manifest import Manifest, Replicated
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.saving.metrics import Metrics
from dtr.checkpoint.survey import Holdings, known_runs, lineage_of, read_manifest, survey
from dtr.errors import CoordinatorUnavailable, IntegrityError, InvalidInput, NoCheckpoint, NotFound
from dtr.runs import run_number
from dtr.state.job import JobState
from dtr.store import Store, open_store
from dtr.views import checkpoints
from dtr.views.checkpoints import CheckpointView, IndexView, PartView
from dtr.views.reading import reading
from dtr.views.words import count_of

__all__ = [
    "NO_MANIFEST",
    "CheckpointRow",
    "CheckpointsView",
    "Elsewhere",
    "OneView",
    "Sources",
    "elsewhere",
    "missing",
    "not_asked",
    "read",
    "read_one",
    "targets",
]

NO_MANIFEST: Final = "it was committed, but its manifest is not in the store"
_READERS: Final = 8
_LONGEST_STEP: Final = 20  # digits
_LEFT: Final = "the job went on from an earlier step"
_RUN_LEFT: Final = "the job went on without this run"
_NO_STORE: Final = "no store is known: give --store to compare with it"
_NOTHING: Final = (
    "Redis knows no checkpoint of this job: give --store to look there; if Redis was emptied, `dtr rebuild --from STORE` tells it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where one job's checkpoints are looked for; ``index`` is None without Redis, ``store`` is None if no store is known.

    ``store`` is the job's folder, ``url`` that of the store as users name it, ``note`` says why a side is missing.
    """

    job: str
    state: JobState | None
    index: IndexView | None
    store: Store | None
    url: str
    note: str

    @classmethod
    def open(cls, state: JobState, store_url: str | None) -> Sources:
        """Ask Redis, and open the store: the given one, or the one that Redis says the job uses.

        Raises:
            CoordinatorUnavailable: Redis does not answer, and no store was given.
            ConfigError: the store's URL is none.
        """
        index, note, url = None, "", store_url
        try:
            index = checkpoints.read(state)
            url = url or _recorded(state)
        except CoordinatorUnavailable as exc:
            if not url:
                raise
            note = f"showing what the store holds, because {exc.message}"
        if not url:
            return cls(
                job=state.job, state=state, index=index, store=None, url="", note=_NO_STORE if index and index.checkpoints else _NOTHING
            )
        base = open_store(url)
        return cls(job=state.job, state=None if index is None else state, index=index, store=base.child(state.job), url=base.url, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """One checkpoint. ``state``: WRITING, SEALED, ABORTING (under way), COMMITTED, ABANDONED, ABORTED, RETIRED, or DAMAGED.

    ``in_index`` and ``in_store`` are None where that side was not asked; ``at_ms`` is when it was begun, by the server's clock.
    ``store`` is the one that was asked, if it has the checkpoint, or else the one that Redis names.
    """

    run: str
    step: int
    state: str
    reason: str
    latest: bool
    size_bytes: int | None
    world_size: int
    replicated: Replicated
    done: int
    expected: int
    at_ms: int | None
    in_index: bool | None
    in_store: bool | None
    pinned: str = ""  # the note of its pin, `-` for none; empty: it is not pinned
    metrics: Metrics = field(default_factory=dict)
    store: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """So many checkpoints belong to ``store``, as Redis says, which was not asked: a job may move from one store to another."""

    store: str
    checkpoints: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsView:
    """The checkpoints of a job, the newest first; ``note`` says what could not be asked, ``older`` how many records were not read."""

    job: str
    store: str
    latest: str  # RUN/STEP, empty if there is none
    note: str
    checkpoints: tuple[CheckpointRow, ...]
    older: int = 0
    elsewhere: tuple[Elsewhere, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OneView:
    """One checkpoint with its parts; ``store`` is its own, ``parent`` the RUN/STEP that its run continues."""

    job: str
    store: str
    note: str
    checkpoint: CheckpointRow
    parent: str
    parts: tuple[PartView, ...]


# --- reading --------------------------------------------------------------------------------------------------------


def read(sources: Sources, *, retired: bool = False, most: int | None = None) -> CheckpointsView:
    """List the checkpoints, with those that retention removed only if asked for.

    A store keeps the tombstones of all that it ever held, so they are read only where the index may have gaps.

    Args:
        sources: where to look.
        retired: list also those that retention removed.
        most: how many records that the index lacks are read, the newest first; None: all.

    Raises:
        StoreUnavailable, CoordinatorUnavailable, StateCorrupt.
    """
    older = 0
    index, store = sources.index, sources.store
    indexed = [] if index is None else list(index.checkpoints)
    latest = "" if index is None else index.latest
    listed: list[Listed] = []
    holdings = None
    if store is not None:
        holdings = survey(store)
        known = {(ckpt.run, ckpt.step) for ckpt in indexed}
        if retired or sources.state is None or known_runs(sources.state, holdings.runs) < holdings.runs:
            lineage = lineage_of(store, sources.url, holdings, sources.state)
            unknown = sorted(holdings.decided - known, key=lambda name: (run_number(name[0]), *name), reverse=True)
            older = 0 if most is None else max(0, len(unknown) - most)
            listed = _listed(store, lineage, replace(holdings, decided=frozenset(unknown[:most])))
            latest = latest or _latest(lineage, listed)
    rows = [_indexed_row(ckpt, holdings, sources.url) for ckpt in indexed]
    rows += [_listed_row(one, latest, index, sources.url) for one in listed]
    rows = [row for row in rows if retired or row.state != "RETIRED"]
    rows.sort(key=lambda row: (row.at_ms or 0, row.step, row.run), reverse=True)
    others = elsewhere(sources, rows)
    return CheckpointsView(
        job=sources.job, store=sources.url, latest=latest, note=sources.note or not_asked(others), checkpoints=tuple(rows), older=older,
        elsewhere=others,
    )  # fmt: skip


def read_one(sources: Sources, run: str, step: int) -> OneView:
    """One checkpoint, from both sides.

    Raises:
        NoCheckpoint: neither side knows it.
        StoreUnavailable, CoordinatorUnavailable, StateCorrupt.
    """
    indexed = None if sources.state is None else checkpoints.read_one(sources.state, run, step)
    holdings = None if sources.store is None else survey(sources.store)
    manifest, damage = _manifest(sources.store, run, step)
    if indexed is not None:
        row = _indexed_row(indexed, holdings, sources.url)
    elif sources.store is not None and holdings is not None and (manifest is not None or damage):
        lineage = lineage_of(sources.store, sources.url, holdings, sources.state)
        listed = catalogue(sources.store, lineage, replace(holdings, decided=frozenset({(run, step)})))
        row = _listed_row(listed[0], read(sources).latest, sources.index, sources.url)
    else:
        raise NoCheckpoint(f"job {sources.job} has no checkpoint {run}/{step}; `dtr ckpt ls` lists them", run=run, step=step)
    if damage:
        row = replace(row, state="DAMAGED", reason=damage)
    parent = "" if manifest is None or manifest.parent is None else name_of(*manifest.parent)
    note = sources.note or not_asked(elsewhere(sources, [row]))
    return OneView(job=sources.job, store=row.store, note=note, checkpoint=row, parent=parent, parts=_parts(manifest, indexed))


def targets(sources: Sources, words: Sequence[str]) -> list[tuple[str, int]]:
    """What ``RUN STEP``, ``RUN/STEP``, ``STEP`` (of the newest run), ``latest`` (or nothing) mean.

    Raises:
        InvalidInput: the words are none of these.
        NoCheckpoint: there is no commit.
    """
    if len(words) == 1 and words[0].isascii() and words[0].isdigit() and len(words[0]) <= _LONGEST_STEP:
        return [_of_step(sources, names.step(int(words[0])))]
    if list(words) not in ([], ["latest"]):
        return [_parsed(words)]
    found = read(sources).latest
    if not found:
        raise NoCheckpoint(f"job {sources.job} has no commit yet in {sources.url}" if sources.url else f"job {sources.job}: {sources.note}")
    return [checkpoints.split(found)]


def _of_step(sources: Sources, step: int) -> tuple[str, int]:
    """The checkpoint of this step that was begun last: several runs may have one."""
    found = [row for row in read(sources, retired=True).checkpoints if row.step == step]
    if not found:
        raise NoCheckpoint(f"job {sources.job} has no checkpoint of step {step}; `dtr ckpt ls` lists them", step=step)
    return found[0].run, step


def _parsed(words: Sequence[str]) -> tuple[str, int]:
    pieces = words[0].split("/") if len(words) == 1 else list(words)
    if len(pieces) != 2 or pieces[0] == "latest" or not (pieces[1].isascii() and pieces[1].isdigit() and len(pieces[1]) <= _LONGEST_STEP):
        raise InvalidInput(f"expected RUN STEP, RUN/STEP, STEP or latest, got {' '.join(words)[:80]!r}", field="checkpoint")
    return names.name(pieces[0], "run"), names.step(int(pieces[1]))


# --- stores that were not asked -------------------------------------------------------------------------------------


def elsewhere(sources: Sources, rows: Iterable[CheckpointRow]) -> tuple[Elsewhere, ...]:
    """Where those of ``rows`` are that the asked store lacks and, as Redis says, need not have; by store. Empty if none was asked."""
    counted = Counter(row.store for row in rows if row.in_store is None) if sources.store is not None else {}
    return tuple(Elsewhere(store=store, checkpoints=number) for store, number in sorted(counted.items()))


def not_asked(others: Sequence[Elsewhere]) -> str:
    """``2 checkpoints belong to file:///old, as Redis says; that store was not asked``; empty if there are none."""
    said = [f"{count_of(one.checkpoints, 'checkpoint belongs', 'checkpoints belong')} to {one.store}" for one in others]
    stores = "that store was" if len(said) == 1 else "those stores were"
    return f"{', '.join(said)}, as Redis says; {stores} not asked" if said else ""


def missing(sources: Sources, run: str, step: int) -> NoCheckpoint:
    """The error that the asked store holds no decision about a checkpoint; it names the store that does, as far as Redis knows."""
    known = () if sources.index is None else sources.index.checkpoints
    where = next((ckpt.store for ckpt in known if (ckpt.run, ckpt.step) == (run, step)), "")
    hint = f"; it belongs to {where}, as Redis says: give that as --store" if where not in {"", sources.url} else ""
    return NoCheckpoint(f"{sources.url} holds no decision about {run}/{step} of job {sources.job}{hint}", run=run, step=step)


# --- how ------------------------------------------------------------------------------------------------------------


def _recorded(state: JobState) -> str:
    """The store of the newest run, as Redis has it; '' if it knows none."""
    with reading(state):
        run = state.redis.hget(state.keys.meta, "last_run")
        return (state.redis.hget(state.keys.run(run), "store") or "") if run else ""


def _listed(store: Store, lineage: Lineage, holdings: Holdings) -> list[Listed]:
    """What the store says of each decided checkpoint; several are read at once, since each is a round trip."""
    alone = [replace(holdings, decided=frozenset({one})) for one in holdings.decided]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="dtr-list") as readers:
        found = readers.map(lambda one: catalogue(store, lineage, one), alone)
        return [listed for several in found for listed in several]


def _latest(lineage: Lineage, listed: Sequence[Listed]) -> str:
    commits = lineage.newest_first((one.run, one.step) for one in listed if one.state == "COMMITTED")
    return name_of(*commits[0]) if commits else ""


def _indexed_row(ckpt: CheckpointView, holdings: Holdings | None, url: str) -> CheckpointRow:
    held = holdings is not None and (ckpt.run, ckpt.step) in holdings.decided
    asked = holdings is not None and (held or ckpt.store in {"", url})  # a job may have moved: another store was not asked
    in_store = held if asked else None
    gone = ckpt.state in {"COMMITTED", "ABANDONED"} and in_store is False
    left = ckpt.state == "COMMITTED" and not ckpt.on_lineage  # it was decided before the job went on from an earlier step
    return CheckpointRow(
        run=ckpt.run,
        step=ckpt.step,
        state="DAMAGED" if gone else "ABANDONED" if left else ckpt.state,
        reason=NO_MANIFEST if gone else ckpt.reason if not left else _RUN_LEFT if ckpt.run_left else _LEFT,
        latest=ckpt.latest,
        size_bytes=ckpt.size_bytes,
        world_size=ckpt.world_size,
        replicated=ckpt.replicated,
        done=ckpt.done,
        expected=ckpt.expected,
        at_ms=ckpt.created_at_ms,
        in_index=True,
        in_store=in_store,
        pinned=ckpt.pinned,
        metrics=ckpt.metrics,
        store=url if asked else ckpt.store,
    )


def _listed_row(listed: Listed, latest: str, index: IndexView | None, url: str) -> CheckpointRow:
    expected = 1 if listed.replicated == "all" else listed.world_size
    lost = index is not None and listed.state in {"COMMITTED", "ABANDONED"}
    return CheckpointRow(
        run=listed.run,
        step=listed.step,
        state=listed.state,
        reason=listed.reason or ("Redis does not know it: `dtr rebuild` tells it" if lost else ""),
        latest=latest == name_of(listed.run, listed.step),
        size_bytes=listed.size_bytes or None,
        world_size=listed.world_size,
        replicated=listed.replicated,
        done=expected if listed.state in {"COMMITTED", "ABANDONED"} else 0,
        expected=expected,
        at_ms=listed.created_at_ms or None,
        in_index=None if index is None else False,
        in_store=True,
        pinned="-" if listed.pinned else "",
        metrics=listed.metrics,
        store=url,
    )


def _manifest(store: Store | None, run: str, step: int) -> tuple[Manifest | None, str]:
    """The decision, None if there is none; or why it cannot be read."""
    if store is None:
        return None, ""
    try:
        return read_manifest(store, run, step), ""
    except NotFound:
        return None, ""
    except IntegrityError as exc:
        return None, exc.message


def _parts(manifest: Manifest | None, indexed: CheckpointView | None) -> tuple[PartView, ...]:
    """Those of the manifest, which are the truth, with what only the index knows of them; without a commit, the index's."""
    known = {} if indexed is None else {part.rank: part for part in indexed.parts or ()}
    if manifest is None or manifest.decision != "commit":
        return tuple(known.values())
    return tuple(
        PartView(
            rank=part.rank,
            worker=part.worker,
            host=known[part.rank].host if part.rank in known else "",
            state="done",
            size_bytes=part.size_bytes,
            progress_bytes=part.size_bytes,
            uploader="",
            lease_left_s=None,
            attempts=known[part.rank].attempts if part.rank in known else 0,
            failures=known[part.rank].failures if part.rank in known else 0,
            error="",
            object=part.object,
            checksum=part.checksum,
        )
        for part in manifest.parts
    )
