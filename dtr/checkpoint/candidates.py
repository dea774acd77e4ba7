"""Which checkpoints one rank could restore, newest first, and why not the others.

``judge`` decides about one manifest, pure; ``gather`` reads manifests until it has enough. A configuration that does not fit (the world
size of a sharded checkpoint) ends the search, rather than silently going back to an older checkpoint that happens to fit; damage does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint.lineage import Checkpoint, Lineage
from dtr.checkpoint.manifest import Manifest, PartFacts
from dtr.checkpoint.survey import Holdings, read_manifest
from dtr.errors import IntegrityError, NotFound
from dtr.store import Store

__all__ = ["Candidate", "Offer", "gather", "name_of", "newest_commit", "part_of"]

ENOUGH: Final = 8  # candidates that a rank offers; older ones are reached by restore(step=...)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A commit whose part for this rank is there in full length; its bytes are not yet verified."""

    run: str
    step: int
    manifest: Manifest
    part: PartFacts

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


def part_of(manifest: Manifest, rank: int, world_size: int) -> PartFacts | str:
    """The part that this rank of ``world_size`` reads, or why there is none."""
    if manifest.replicated == "all":
        return manifest.parts[0]
    if manifest.world_size != world_size:
        return (
            f"was saved by {manifest.world_size} ranks, each with a part of its own; here are {world_size}: "
            f"restore it with world_size={manifest.world_size}"
        )
    return next(part for part in manifest.parts if part.rank == rank)


def gather(
    store: Store, lineage: Lineage, holdings: Holdings, *, rank: int, world_size: int, step: int | None = None,
    retired: AbstractSet[Checkpoint] = frozenset(), indexed: AbstractSet[Checkpoint] = frozenset(), enough: int = ENOUGH,
) -> Offer:  # fmt: skip
    """The checkpoints on ``lineage`` that this rank could restore.

    Args:
        store: of the job.
        lineage: only its checkpoints are candidates.
        holdings: what the store was seen to hold.
        rank: of the reader.
        world_size: ranks of the reader's run.
        step: only checkpoints of this step.
        retired: what retention has chosen, though its manifest may still stand.
        indexed: commits that Redis lists: one without a record is a loss (a mount that is missing), and no reason to start anew.
        enough: how many to find.
    """
    found: list[Candidate] = []
    rejected: list[tuple[str, str]] = []
    misfit = ""
    for run, at in lineage.newest_first((holdings.decided | indexed) - retired):
        if step is not None and at != step:
            continue
        if (run, at) not in holdings.decided:
            rejected.append((name_of(run, at), "Redis lists it as committed, and the store holds no record of it"))
            continue
        if len(found) >= enough:
            break
        try:
            manifest = read_manifest(store, run, at)
            if manifest.decision != "commit":
                continue
            part = part_of(manifest, rank, world_size)
            if isinstance(part, str):
                misfit = misfit or f"checkpoint {name_of(run, at)} {part}"
                rejected.append((name_of(run, at), part))
                continue
            if misfit:
                misfit += f"; or restore(step={at}), which fits"
                break
            _check_there(store, part)
        except NotFound:
            continue  # retention, or a half-written abort record, was faster
        except IntegrityError as exc:
            rejected.append((name_of(run, at), exc.message))
            continue
        found.append(Candidate(run=run, step=at, manifest=manifest, part=part))
    return Offer(candidates=tuple(found), rejected=tuple(rejected), misfit=misfit if not found else "")


def _check_there(store: Store, part: PartFacts) -> None:
    try:
        size_bytes = store.size(part.object)
    except NotFound as exc:
        raise IntegrityError(f"object {part.object} is missing") from exc
    if size_bytes != part.size_bytes:
        raise IntegrityError(f"object {part.object} has {size_bytes} bytes, its manifest says {part.size_bytes}")


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
