"""The lineage of a job: a run, the run it continues up to the step it restored, and so on. Pure.

A checkpoint counts only on the lineage: it is a candidate for restore, may be ``latest`` and is kept by retention. What a run saved after
the step that its successor restored is a branch that the job left; so is a run that nobody continued.

The truth is in the store: each run's record names what the run continues and when that was fixed (``created_at_ms``, later than that of
every record its writer saw). The newest record is the head. Redis's hash ``lineage`` is the index of the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dtr.runs import run_number

__all__ = ["Lineage", "Link", "Segment", "chain", "from_index", "head_of", "split_name"]

Checkpoint = tuple[str, int]  # run, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What one run continues: ``parent_run`` up to ``parent_step``, inclusive; '' and None: nothing."""

    run: str
    parent_run: str = ""
    parent_step: int | None = None
    created_at_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The steps that the lineage takes from one run: all up to ``last``, inclusive; None: it goes on."""

    run: str
    last: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Segments, the newest run first; none: the job has not begun."""

    segments: tuple[Segment, ...] = ()

    @property
    def head(self) -> str:
        """The run that goes on; '' if the job has not begun."""
        return self.segments[0].run if self.segments else ""

    def takes(self, run: str, step: int) -> bool:
        """Whether the checkpoint (run, step) is on the lineage."""
        return any(s.run == run and (s.last is None or step <= s.last) for s in self.segments)

    def newest_first(self, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Those of ``checkpoints`` that are on the lineage; a later run's come before its parent's, then the higher step first."""
        place = {segment.run: n for n, segment in reversed(list(enumerate(self.segments)))}
        return sorted((c for c in set(checkpoints) if self.takes(*c)), key=lambda c: (place[c[0]], -c[1]))

    def after(self, run: str, base: Checkpoint | None) -> Lineage:
        """The lineage of a new run that continues ``base``, which must be on this one; None: it continues nothing."""
        if base is None:
            return Lineage(segments=(Segment(run=run, last=None),))
        runs = [s.run for s in self.segments]
        rest = self.segments[runs.index(base[0]) + 1 :] if base[0] in runs else ()
        return Lineage(segments=(Segment(run=run, last=None), Segment(run=base[0], last=base[1]), *rest))

    def ancestors(self) -> list[tuple[str, int]]:
        """Run and last step of every segment but the head, oldest first."""
        return [(s.run, s.last) for s in reversed(self.segments[1:]) if s.last is not None]


def split_name(name: str) -> Checkpoint | None:
    """``RUN/STEP`` as Redis has it, or None if it is none."""
    run, _, step = name.rpartition("/")
    return (run, int(step)) if run and step.isascii() and step.isdigit() else None


def head_of(links: Iterable[Link]) -> str:
    """The newest run, '' if there is none."""
    newest = max(links, key=lambda link: (link.created_at_ms, run_number(link.run), link.run), default=None)
    return newest.run if newest is not None else ""


def chain(links: Mapping[str, Link], head: str) -> Lineage:
    """The lineage that ends in ``head``, as far back as ``links`` tell; ends where a run would come twice."""
    segments: list[Segment] = []
    seen: set[str] = set()
    run, last = head, None
    while run and run not in seen:
        seen.add(run)
        segments.append(Segment(run=run, last=last))
        link = links.get(run)
        if link is None or not link.parent_run or link.parent_step is None:
            break
        run, last = link.parent_run, link.parent_step
    return Lineage(segments=tuple(segments))


def from_index(held: Mapping[str, str], links: Mapping[str, Link]) -> Lineage:
    """The lineage in Redis's hash ``held`` (run -> last step, '' for the head), put in order by what each run continues.

    Runs that no link reaches come last, the highest number first.
    """
    bounds = {run: None if last == "" else int(last) for run, last in held.items()}
    heads = [run for run, last in bounds.items() if last is None]
    if not heads:
        return Lineage()
    ordered = [s.run for s in chain(links, max(heads, key=run_number)).segments if s.run in bounds]
    ordered += sorted((run for run in bounds if run not in ordered), key=run_number, reverse=True)
    return Lineage(segments=tuple(Segment(run=run, last=bounds[run]) for run in ordered))
