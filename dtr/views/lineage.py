"""The history of a job as a tree: runs, the checkpoints of each, and where a run went on from another's.

A run that was left behind stays in the tree: its steps after the one that its successor restored are branches that end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint.lineage import Checkpoint, Lineage
from dtr.checkpoint.restoring.candidates import name_of
from dtr.checkpoint.survey import lineage_in_index, lineage_of, records, survey
from dtr.errors import StateCorrupt
from dtr.runs import run_number
from dtr.state.job import JobState
from dtr.views import stored
from dtr.views.reading import Fields, reading
from dtr.views.stored import CheckpointRow, Elsewhere, Sources

__all__ = ["GONE", "LineageView", "Node", "RunView", "paths", "read"]

GONE: Final = "GONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run. ``parent`` is the RUN/STEP that it continues, '' for a fresh start; ``known`` is False if no record tells that.

    ``left_at``: the last step that the lineage took from it; None: it goes on, or was left altogether (then not ``on_lineage``).
    """

    run: str
    parent: str
    known: bool
    on_lineage: bool
    left_at: int | None
    world_size: int
    began_at_ms: int | None
    checkpoints: tuple[CheckpointRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageView:
    """Every run of a job, the newest first; ``head`` is the one that goes on, ``older`` how many records were not read."""

    job: str
    store: str
    note: str
    head: str
    latest: str
    older: int
    runs: tuple[RunView, ...]
    elsewhere: tuple[Elsewhere, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A row of the drawing: a checkpoint, the start of a run, or the end of a branch, which joins the line ``depth - 1`` here."""

    depth: int
    run: RunView | None = None  # of a start
    checkpoint: CheckpointRow | None = None
    joins: bool = False
    folded: int = 0  # older checkpoints in the same state that this row stands for as well


def read(sources: Sources, *, most: int | None = 500) -> LineageView:
    """The history, from Redis and the store, or whichever is there.

    Args:
        sources: where to look.
        most: how many records that the index lacks are read from the store, the newest first; None: all.

    Raises:
        StoreUnavailable, CoordinatorUnavailable, StateCorrupt.
    """
    found = stored.read(sources, retired=True, most=most)
    lineage, facts = _facts(sources, {row.run for row in found.checkpoints})
    by_run: dict[str, list[CheckpointRow]] = {run: [] for run in facts}
    for row in found.checkpoints:
        by_run.setdefault(row.run, []).append(row)
    bounds = {segment.run: segment.last for segment in lineage.segments}
    runs = tuple(
        RunView(
            run=run, parent=facts[run].parent if run in facts else "", known=run in facts, on_lineage=run in bounds,
            left_at=bounds.get(run), world_size=facts[run].world_size if run in facts else rows[0].world_size,
            began_at_ms=facts[run].began_at_ms if run in facts else None,
            checkpoints=tuple(sorted(rows, key=lambda row: row.step, reverse=True)),
        )
        for run, rows in sorted(by_run.items(), key=lambda item: (run_number(item[0]), item[0]), reverse=True)
    )  # fmt: skip
    return LineageView(
        job=sources.job, store=found.store, note=found.note, head=lineage.head, latest=found.latest, older=found.older, runs=runs,
        elsewhere=found.elsewhere,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    parent: str
    world_size: int
    began_at_ms: int | None


def _facts(sources: Sources, runs: set[str]) -> tuple[Lineage, dict[str, _Facts]]:
    """The lineage, and what each run continues."""
    lineage, facts = Lineage(), {}
    if sources.state is not None:
        lineage, _ = lineage_in_index(sources.state)
        facts = _indexed_facts(sources.state, runs | {segment.run for segment in lineage.segments})
    if sources.store is not None:
        holdings = survey(sources.store)
        lineage = lineage_of(sources.store, sources.url, holdings, sources.state)
        for run, record in records(sources.store, holdings).items():
            parent = "" if record.parent_run is None or record.parent_step is None else name_of(record.parent_run, record.parent_step)
            facts[run] = _Facts(parent=parent, world_size=record.world_size, began_at_ms=record.created_at)
    return lineage, facts


def _indexed_facts(state: JobState, runs: set[str]) -> dict[str, _Facts]:
    keys, found = state.keys, {}
    with reading(state):
        last_run = state.redis.hget(keys.meta, "last_run")
        ordered = sorted(runs | ({last_run} if last_run else set()))
        pipeline = state.redis.pipeline(transaction=False)
        for run in ordered:
            pipeline.hgetall(keys.run(run))
        replies = pipeline.execute()
    for run, held in zip(ordered, replies, strict=True):
        fields = Fields(keys.run(run), held)
        if not fields:
            continue
        parent, step = fields.text("base_run"), fields.number("base_step")
        if parent and step is None:
            raise StateCorrupt(f"{fields.key} has a base_run and no base_step")
        found[run] = _Facts(
            parent=name_of(parent, step) if parent and step is not None else "",
            world_size=fields.integer("world_size"), began_at_ms=fields.number("base_at") or fields.number("formed_at"),
        )  # fmt: skip
    return found


# --- the drawing, pure ------------------------------------------------------------------------------------------------

_Key = tuple[str, int]  # run and step; step -1 is the start of the run
START: Final = -1


def paths(view: LineageView, *, fold: bool = True) -> Iterator[list[Node]]:
    """The rows of each tree, that of the lineage first; within one, what was saved later stands above what it grew from.

    The lineage is a straight line at depth 0. A branch that was left is drawn above the checkpoint that it grew from, one deeper, and
    ends in a row that joins. ``fold``: retired checkpoints that follow each other become one row.
    """
    tree = _Tree(view)
    for root in tree.roots:
        rows = list(tree.rows(root, 0))
        yield list(_folded(rows)) if fold else rows


class _Tree:
    """Checkpoints and starts of runs, each with what grew from it."""

    def __init__(self, view: LineageView) -> None:
        self._runs = {run.run: run for run in view.runs}
        self._bounds = {run.run: run.left_at for run in view.runs if run.on_lineage}
        self._rows: dict[_Key, CheckpointRow] = {(row.run, row.step): row for run in view.runs for row in run.checkpoints}
        parents = {run.run: parent for run in view.runs if (parent := _split(run.parent)) is not None and parent[0] in self._runs}
        for parent in set(parents.values()) - set(self._rows):
            self._rows[parent] = _gone(*parent)
        self._children: dict[_Key, list[_Key]] = {}
        steps_of: dict[str, list[int]] = {run: [START] for run in self._runs}
        for run, step in sorted(self._rows):
            steps_of[run].append(step)
        for run, steps in steps_of.items():
            for earlier, later in itertools.pairwise(steps):
                self._children.setdefault((run, earlier), []).append((run, later))
        for run, parent in _acyclic(parents).items():
            self._children.setdefault(parent, []).append((run, START))
        grown = {child for children in self._children.values() for child in children}
        self.roots = sorted((key for run in self._runs if (key := (run, START)) not in grown), key=self._rank, reverse=True)

    def rows(self, root: _Key, depth: int) -> Iterator[Node]:
        """The subtree of ``root``, its main line at ``depth``, from the newest down to the root."""
        line = [root]
        while children := self._children.get(line[-1]):
            line.append(max(children, key=self._rank))
        for at in range(len(line) - 1, -1, -1):
            after = line[at + 1] if at + 1 < len(line) else None
            for child in sorted((c for c in self._children.get(line[at], ()) if c != after), key=self._rank, reverse=True):
                yield from self.rows(child, depth + 1)
                yield Node(depth=depth + 1, joins=True)
            run, step = line[at]
            yield Node(depth=depth, run=self._runs[run]) if step == START else Node(depth=depth, checkpoint=self._rows[run, step])

    def _rank(self, key: _Key) -> tuple[bool, int, str, int]:
        """What is the main line: the lineage first, then the newest run."""
        run, step = key
        bound = self._bounds.get(run, START - 1)
        on = run in self._bounds and (bound is None or step <= bound)
        return on, run_number(run), run, step


def _acyclic(parents: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Without the links that would close a circle, which damaged records might."""
    found: dict[str, Checkpoint] = {}
    for run, parent in parents.items():
        at, seen = parent[0], {run}
        while at in found and at not in seen:
            seen.add(at)
            at = found[at][0]
        if at not in seen:
            found[run] = parent
    return found


def _folded(rows: Sequence[Node]) -> Iterator[Node]:
    """Retired checkpoints of one run that stand in neighbouring rows are one row, the newest of them."""
    held: Node | None = None
    for row in rows:
        if held is not None and _folds(held, row):
            held = Node(depth=held.depth, checkpoint=held.checkpoint, folded=held.folded + 1)
            continue
        if held is not None:
            yield held
        held = row
    if held is not None:
        yield held


def _folds(above: Node, below: Node) -> bool:
    one, other = above.checkpoint, below.checkpoint
    if one is None or other is None or above.depth != below.depth:
        return False
    return one.run == other.run and one.state == other.state == "RETIRED" and not one.pinned and not other.pinned


def _split(name: str) -> Checkpoint | None:
    run, _, step = name.rpartition("/")
    return (run, int(step)) if run else None


def _gone(run: str, step: int) -> CheckpointRow:
    """A checkpoint that a run continues, and that nobody has any more."""
    return CheckpointRow(
        run=run, step=step, state=GONE, reason="neither Redis nor the store has it any more", latest=False, size_bytes=None, world_size=0,
        replicated="none", done=0, expected=0, at_ms=None, in_index=None, in_store=None,
    )  # fmt: skip
