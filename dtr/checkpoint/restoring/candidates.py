"""Which checkpoints one rank could restore, newest first, and why not the others.

``parts_of`` decides about one manifest, pure; ``gather`` reads manifests until it has enough. A configuration that does not fit (the
world size of a sharded checkpoint) ends the search, rather than silently going back to an older checkpoint that happens to fit; damage
does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from dtr.checkpoint.format.paths import Patterns
from dtr.checkpoint.lineage import Checkpoint, Lineage
from dtr.checkpoint.manifest import Manifest, PartFacts
from dtr.checkpoint.restoring.nearby import Nearby, Part
from dtr.checkpoint.survey import Holdings, read_manifest
from dtr.errors import IntegrityError, NotFound
from dtr.store import Store

__all__ = ["Candidate", "Offer", "Wish", "gather", "name_of", "newest_commit", "parts_of"]

ENOUGH: Final = 8  # candidates that a rank offers; older ones are reached by restore(step=...)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be restored: which rank's state, in a run of how many, only of this ``step``, only what these patterns select."""

    rank: int
    world_size: int
    step: int | None = None
    only: Patterns | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A commit whose every part that this rank needs is there in full length; their bytes are not yet verified."""

    run: str
    step: int
    manifest: Manifest
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return name_of(self.run, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What ``gather`` found: ``rejected`` is (RUN/STEP, reason); ``misfit`` says so if the newest one does not fit this world size."""

    candidates: tuple[Candidate, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    misfit: str = ""

    def of(self, name: str) -> Candidate | None:
        """The candidate of this name."""
        return next((candidate for candidate in self.candidates if candidate.name == name), None)


def name_of(run: str, step: int) -> str:
    """A checkpoint as Redis and messages name it."""
    return f"{run}/{step}"


def parts_of(manifest: Manifest, rank: int, world_size: int) -> tuple[PartFacts, ...] | str:
    """The parts that this rank of ``world_size`` reads, its own first, or why there are none."""
    if manifest.replicated == "all":
        return manifest.parts[:1]
    if manifest.replicated == "some":
        return tuple(sorted(manifest.parts, key=lambda part: part.rank != rank))
    if manifest.world_size != world_size:
        return (
            f"was saved by {manifest.world_size} ranks, each with a part of its own; here are {world_size}: "
            f"restore it with world_size={manifest.world_size}"
        )
    return tuple(part for part in manifest.parts if part.rank == rank)


def gather(
    store: Store, lineage: Lineage, holdings: Holdings, nearby: Nearby, wish: Wish, *, retired: AbstractSet[Checkpoint] = frozenset(),
    indexed: AbstractSet[Checkpoint] = frozenset(), refused: Mapping[Checkpoint, str] = MappingProxyType({}), enough: int = ENOUGH,
) -> Offer:  # fmt: skip
    """The checkpoints on ``lineage`` that this rank could restore.

    Args:
        store: of the job.
        lineage: only its checkpoints are candidates.
        holdings: what the store was seen to hold.
        nearby: where parts are read.
        wish: what is to be restored.
        retired: what retention has chosen, though its manifest may still stand.
        indexed: commits that Redis lists: one without a record is a loss (a mount that is missing), and no reason to start anew.
        refused: why some are passed over, unless their step is asked for, or there is no other.
        enough: how many to find.
    """
    offer = _gather(store, lineage, holdings, nearby, wish, retired, indexed, {} if wish.step is not None else refused, enough)
    if offer.candidates or offer.misfit or not refused:
        return offer
    return _gather(store, lineage, holdings, nearby, wish, retired, indexed, {}, enough)


def _gather(
    store: Store, lineage: Lineage, holdings: Holdings, nearby: Nearby, wish: Wish, retired: AbstractSet[Checkpoint],
    indexed: AbstractSet[Checkpoint], refused: Mapping[Checkpoint, str], enough: int,
) -> Offer:  # fmt: skip
    found: list[Candidate] = []
    rejected: list[tuple[str, str]] = []
    misfit = ""
    for run, at in lineage.newest_first((holdings.decided | indexed) - retired):
        if wish.step is not None and at != wish.step:
            continue
        name = name_of(run, at)
        if (run, at) not in holdings.decided:
            rejected.append((name, "Redis lists it as committed, and the store holds no record of it"))
            continue
        if len(found) >= enough:
            break
        if (run, at) in refused:
            rejected.append((name, refused[run, at]))
            continue
        try:
            manifest = read_manifest(store, run, at)
            if manifest.decision != "commit":
                continue
            judged = _judge(manifest, nearby, wish, fits=not misfit)
        except NotFound:
            continue  # retention, or a half-written abort record, was faster
        except IntegrityError as exc:
            rejected.append((name, exc.message))
            continue
        if isinstance(judged, str):
            misfit = misfit or f"checkpoint {name} {judged}"
            rejected.append((name, judged))
            continue
        if misfit:
            misfit += f"; or restore(step={at}), which fits"
            break
        found.append(Candidate(run=run, step=at, manifest=manifest, parts=judged))
    return Offer(candidates=tuple(found), rejected=tuple(rejected), misfit=misfit if not found else "")


def _judge(manifest: Manifest, nearby: Nearby, wish: Wish, *, fits: bool) -> tuple[Part, ...] | str:
    """The parts to read of a commit, or why it does not fit; raises IntegrityError if one of them is nowhere.

    With ``fits`` False nothing is going to be read: this is only about what would fit.
    """
    chosen = parts_of(manifest, wish.rank, wish.world_size)
    if isinstance(chosen, str):
        return chosen
    parts = tuple(Part(run=manifest.run, step=manifest.step, facts=facts) for facts in chosen)
    if fits:
        for part in parts:
            nearby.check(part)
    if manifest.replicated == "some" and manifest.world_size != wish.world_size:
        why = nearby.misfit(parts, rank=wish.rank, world_size=wish.world_size, only=wish.only)
        return why or parts
    return parts


def newest_commit(store: Store, checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The first of ``checkpoints`` whose decision record is a commit; a damaged record counts as one."""
    for run, step in checkpoints:
        try:
            if read_manifest(store, run, step).decision == "commit":
                return run, step
        except NotFound:
            continue
        except IntegrityError:
            return run, step
    return None
