"""What a restore would take now, from where, and why not the others: looked up as a restore does, without reading a byte of a part.

A collective restore takes the newest checkpoint that every rank can read. So of each candidate all parts are looked for, until one has
them all; those behind it are not looked at any further.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dtr.checkpoint.lineage import Checkpoint, split_name
from dtr.checkpoint.restoring.attempts import Tally, tallies
from dtr.checkpoint.restoring.candidates import Candidate
from dtr.checkpoint.restoring.contract import Where
from dtr.checkpoint.restoring.nearby import Nearby, Part
from dtr.checkpoint.restoring.restore import Reader, look
from dtr.checkpoint.restoring.settling import PATIENCE_S, undecided
from dtr.checkpoint.survey import in_parallel, lineage_of, read_manifest, survey
from dtr.errors import CoordinatorUnavailable, IntegrityError, NotFound, StateCorrupt
from dtr.state.job import JobState

__all__ = ["Plan", "Planned", "plan", "world_size_of"]

Verdict = Literal["taken", "behind", "rejected", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One checkpoint of the lineage.

    ``verdict``: ``taken``; ``behind`` (it would be tried if that one turned out damaged); ``rejected``; or ``undecided`` (a save under
    way, which a restore waits for). ``where``: the nearest place of each part that is read, with how many parts; ``begun`` and ``damaged``:
    restores since the last one that succeeded, and how many of them found it so.
    """

    run: str
    step: int
    verdict: Verdict
    reason: str = ""
    where: Mapping[Where, int]
    size_bytes: int | None = None
    begun: int = 0
    damaged: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``choice``: RUN/STEP that would be restored, empty if nothing would; then ``reason`` says why. ``rank`` None: of all ranks."""

    job: str
    store: str
    rank: int | None
    world_size: int
    step: int | None
    choice: str
    reason: str
    checkpoints: tuple[Planned, ...]


def world_size_of(reader: Reader, state: JobState | None) -> int:
    """The number of ranks that saved the newest readable commit of the lineage; 1 if there is none."""
    holdings = survey(reader.store)
    order = lineage_of(reader.store, reader.url, holdings, state).newest_first(holdings.decided)
    for run, step in order:
        try:
            manifest = read_manifest(reader.store, run, step)
        except (IntegrityError, NotFound):
            continue
        if manifest.decision == "commit":
            return manifest.world_size
    return 1


def plan(reader: Reader, state: JobState | None, *, every_rank: bool) -> Plan:
    """What a restore would do.

    Args:
        reader: who would restore, and what.
        state: Redis; None, or one that is away: the store alone tells.
        every_rank: a collective one, of which the reader is one rank.

    Raises:
        StoreUnavailable.
    """
    nearby, counted = reader.nearby(0.0), _counted(state)
    offer = look(reader, nearby, state)
    wish, found, taken = reader.wish, list[Planned](), ""
    for name, reason in offer.rejected:
        found.append(_planned(name, counted, verdict="rejected", reason=reason))
    for candidate in offer.candidates:
        parts = _all_parts(candidate) if every_rank else candidate.parts
        size_bytes = sum(part.facts.state_bytes for part in parts)
        shown = _planned(candidate.name, counted, verdict="behind", size_bytes=size_bytes)
        if taken:
            found.append(replace(shown, verdict="behind"))
            continue
        where, missing = _places(nearby, parts)
        if missing:
            found.append(replace(shown, verdict="rejected", reason=missing))
        else:
            taken = candidate.name
            found.append(replace(shown, verdict="taken", where=where))
    found += [
        Planned(
            run=run, step=step, verdict="undecided", where={}, reason=f"a restore waits for it, at most {PATIENCE_S:g} s without progress"
        )
        for run, step in _undecided(reader, state)
        if wish.step in {None, step}
    ]
    return Plan(
        job=reader.settings.job, store=reader.url, rank=None if every_rank else wish.rank, world_size=wish.world_size, step=wish.step,
        choice=taken, reason="" if taken else _why_nothing(offer.misfit, found, reader), checkpoints=_in_order(found, reader, state),
    )  # fmt: skip


def _why_nothing(misfit: str, found: Iterable[Planned], reader: Reader) -> str:
    if misfit:
        return misfit
    if any(one.verdict == "rejected" for one in found):
        return "no checkpoint of the lineage can be restored"
    step = f" of step {reader.wish.step}" if reader.wish.step is not None else ""
    return f"the lineage has no checkpoint{step}"


def _counted(state: JobState | None) -> dict[Checkpoint, Tally]:
    try:
        return tallies(state) if state is not None else {}
    except (CoordinatorUnavailable, StateCorrupt):
        return {}


def _undecided(reader: Reader, state: JobState | None) -> list[Checkpoint]:
    if state is None:
        return []
    try:
        holdings = survey(reader.store)
        lineage = lineage_of(reader.store, reader.url, holdings, state)
        return undecided(state, reader.settings, reader.store, reader.url, holdings, lineage)
    except CoordinatorUnavailable:
        return []


def _planned(
    name: str, counted: Mapping[Checkpoint, Tally], *, verdict: Verdict, reason: str = "", size_bytes: int | None = None
) -> Planned:
    run, step = split_name(name) or (name, 0)
    tally = counted.get((run, step), Tally())
    return Planned(
        run=run, step=step, verdict=verdict, reason=reason, where={}, size_bytes=size_bytes, begun=tally.begun, damaged=tally.damaged
    )


def _all_parts(candidate: Candidate) -> tuple[Part, ...]:
    return tuple(Part(run=candidate.run, step=candidate.step, facts=facts) for facts in candidate.manifest.parts)


def _places(nearby: Nearby, parts: tuple[Part, ...]) -> tuple[dict[Where, int], str]:
    """The nearest place of each part, counted; and which part is nowhere."""
    places = in_parallel(nearby.places, parts)
    missing = [part.facts for part, where in zip(parts, places, strict=True) if not where]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return {}, f"rank {missing[0].rank}: object {missing[0].object}{more} is missing or has another size"
    return dict(Counter(where[0] for where in places)), ""


def _in_order(found: Iterable[Planned], reader: Reader, state: JobState | None) -> tuple[Planned, ...]:
    """As the lineage has them, the newest first."""
    by_name = {(one.run, one.step): one for one in found}
    holdings = survey(reader.store)
    lineage = lineage_of(reader.store, reader.url, holdings, state)
    order = lineage.newest_first(by_name)
    return tuple(by_name[name] for name in [*order, *(name for name in by_name if name not in set(order))])
