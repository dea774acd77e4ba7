"""Which commits a job keeps. Pure: ``plan`` decides from the index alone, ``dtr.checkpoint.keeping.collect`` acts.

A commit stays if any of these says so:

    newest, continued    always: the newest commit of the lineage, and what the newest run continues
    pinned               until it is unpinned
    keep_last  n         the newest n of the lineage
    keep_every m         of each m steps (0 to m - 1, m to 2m - 1, ...) the lineage's first
    keep_best  rules     ``loss:min:3``: the 3 of the lineage with the lowest loss; equal ones: the newer
    keep_for_s t         those of the lineage that were begun less than t ago, by the server's clock

Without any rule everything stays. What the lineage left behind can never be restored by the job, so it goes, unless it is pinned, once the
lineage has a commit and, with keep_last n, n that were begun after it: until then people may find that the job went on from too early.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from dtr import names
from dtr.checkpoint.lineage import Checkpoint, Lineage
from dtr.checkpoint.survey import Indexed
from dtr.config import Settings
from dtr.errors import InvalidInput, StateCorrupt

__all__ = ["Kept", "Plan", "Policy", "plan"]

FORGET_AFTER_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Rules of one job; 0 and empty: no such rule. ``grace_ms``: how long objects outlive their manifest, for readers under way."""

    keep_last: int = 0
    keep_every: int = 0
    keep_best: tuple[tuple[str, str, int], ...] = ()
    keep_for_ms: int = 0
    grace_ms: int = 600_000

    @property
    def keeps_all(self) -> bool:
        """Whether no rule was given."""
        return not (self.keep_last or self.keep_every or self.keep_best or self.keep_for_ms)

    @classmethod
    def of_settings(cls, settings: Settings) -> Self:
        """What the settings say."""
        return cls(
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            keep_best=names.best_rules(settings.keep_best),
            keep_for_ms=int(settings.keep_for_s * 1000),
            grace_ms=int(settings.reader_grace_s * 1000),
        )

    @classmethod
    def of_run(cls, held: Mapping[str, str], default: Policy, key: str) -> Policy:
        """What a run was started with, as Redis's hash ``key`` has it; ``default`` for a run that was rebuilt from the store."""
        if not held.get("keep_last"):
            return default
        try:
            return cls(
                keep_last=int(held["keep_last"]),
                keep_every=int(held.get("keep_every") or 0),
                keep_best=names.best_rules(held.get("keep_best")),
                keep_for_ms=int(held.get("keep_for_ms") or 0),
                grace_ms=int(held.get("grace_ms") or default.grace_ms),
            )
        except (ValueError, InvalidInput) as exc:
            raise StateCorrupt(f"{key} has a rule of retention that is none: {exc}") from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A commit that stays, and every reason for that."""

    run: str
    step: int
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do: ``retire`` is to be tombstoned, oldest first; ``sweep`` was retired before; ``forget`` concerns nobody any more."""

    keep: tuple[Kept, ...] = ()
    retire: tuple[Checkpoint, ...] = ()
    sweep: tuple[Checkpoint, ...] = ()
    forget: tuple[Checkpoint, ...] = ()


def plan(
    indexed: Iterable[Indexed], lineage: Lineage, policy: Policy, *, protected: Mapping[Checkpoint, str] | None = None, now_ms: int = 0
) -> Plan:
    """What retention does about the checkpoints in the index.

    Args:
        indexed: of one store.
        lineage: of the job in that store.
        policy: the rules.
        protected: checkpoints that stay whatever the rules say, and why.
        now_ms: the server's clock.
    """
    found = list(indexed)
    standing = {(c.run, c.step): c for c in found if c.state in {"COMMITTED", "ABANDONED"} and not c.retired}
    on = [c for c in lineage.newest_first(standing) if standing[c].state == "COMMITTED"]
    why: dict[Checkpoint, list[str]] = {}
    for name, reason in _reasons(standing, on, policy, now_ms):
        why.setdefault(name, []).append(reason)
    for name, reason in (protected or {}).items():
        if name in standing:
            why.setdefault(name, []).append(reason)
    if policy.keeps_all:
        why = {name: why.get(name, ["no rule lets it go"]) for name in standing}
    elif not on:  # nothing is safe yet: what was left behind may be all there is
        why = {name: why.get(name, ["nothing newer is safe"]) for name in standing}
    old_ms = now_ms - max(policy.grace_ms, FORGET_AFTER_MS)
    order = on + sorted(set(standing) - set(on), key=_by_step, reverse=True)
    return Plan(
        keep=tuple(Kept(run=name[0], step=name[1], why=tuple(dict.fromkeys(why[name]))) for name in order if name in why),
        retire=tuple(sorted(set(standing) - set(why), key=_by_step)),
        sweep=tuple((c.run, c.step) for c in found if c.retired),
        forget=tuple((c.run, c.step) for c in found if c.state == "ABORTED" and c.decided_at_ms < old_ms),
    )


def _by_step(name: Checkpoint) -> tuple[int, str]:
    return name[1], name[0]


def _reasons(standing: Mapping[Checkpoint, Indexed], on: list[Checkpoint], policy: Policy, now_ms: int) -> Iterable[tuple[Checkpoint, str]]:
    """(checkpoint, why it stays), by each rule in turn; ``on``: the commits of the lineage, the newest first."""
    if on:
        yield on[0], "newest"
    for name, one in standing.items():
        if one.pinned:
            yield name, "pinned" if one.pinned == "-" else f"pinned: {one.pinned}"
    for name in on[: policy.keep_last]:
        yield name, f"one of the last {policy.keep_last}"
    for name in standing.keys() - set(on):
        if sum(standing[one].created_at_ms > standing[name].created_at_ms for one in on) < policy.keep_last:
            yield name, "left behind lately"
    if policy.keep_every:
        firsts = {name[1] // policy.keep_every: name for name in sorted(on, key=_by_step, reverse=True)}
        for name in firsts.values():
            yield name, f"first of its {policy.keep_every} steps"
    for metric, mode, count in policy.keep_best:
        for name in _best(on, standing, metric, mode)[:count]:
            yield name, f"{metric} {standing[name].metrics[metric]:.6g}: one of the {count} {'lowest' if mode == 'min' else 'highest'}"
    for name in on if policy.keep_for_ms else ():
        if standing[name].created_at_ms > now_ms - policy.keep_for_ms:
            yield name, "young"


def _best(on: list[Checkpoint], standing: Mapping[Checkpoint, Indexed], metric: str, mode: str) -> list[Checkpoint]:
    """Those that have a finite value of the metric, the best first; ``sorted`` is stable, so of equal ones the newer comes first."""
    valued: list[tuple[Any, Checkpoint]] = [(value, name) for name in on if (value := standing[name].metrics.get(metric)) is not None]
    return [name for _, name in sorted(valued, key=lambda pair: pair[0] if mode == "min" else -pair[0])]
