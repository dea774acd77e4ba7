"""When a living trainer counts as stalled: decided from what its progress page showed, look by look.

Time in which the launcher itself did not look (it was stopped, or the host slept) is not held against the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtr.progress import Progress

__all__ = ["StallRule", "Watch", "observe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StallRule:
    """``timeout_s`` without progress is a stall, 0 never; a pause of ``blind_s`` between two looks starts the count anew."""

    timeout_s: float
    blind_s: float = 20.0  # longer than a beat that waits for a Redis that does not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is known after a look. ``stalled`` is the reason, for people, or empty; ``overdue``: the time is up."""

    page_at: float
    since: float
    looked_at: float
    stalled: str = ""
    overdue: bool = False


def observe(before: Watch | None, progress: Progress, now: float, *, stopped: bool, rule: StallRule) -> Watch:
    """One look at a trainer.

    Args:
        before: the answer of the last look; None at the first.
        progress: its newest report.
        now: monotonic seconds.
        stopped: whether the process is stopped (SIGSTOP, debugger): shown at once.
        rule: when it counts as stalled.
    """
    goes_on = before is None or progress.at != before.page_at or now - before.looked_at > rule.blind_s
    since = now if before is None or goes_on else before.since
    idle_s = now - since
    overdue = 0 < rule.timeout_s < idle_s and (stopped or not _announced(progress.phase))
    if stopped:
        reason = "the process is stopped (SIGSTOP or a debugger)"
    elif overdue:
        reason = f"no progress for {rule.timeout_s:g} s"
    else:
        reason = ""
    return Watch(page_at=progress.at, since=since, looked_at=now, stalled=reason, overdue=overdue)


def _announced(phase: str) -> bool:
    """Whether the trainer said that it does something longer (``evaluating``, ``restoring``) than a step."""
    return not phase.startswith(("training", "starting"))
