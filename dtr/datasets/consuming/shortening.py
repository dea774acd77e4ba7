"""Which reports need not be sent any more, since later ones say what they did: what keeps a queue short while Redis is away. Pure.

Guarantee: whoever cuts the ledger (:mod:`dtr.datasets.consuming.cut`) between two of the reports that are left, or after the last, finds
what the batches through the cut consumed, or that he must wait, or that it is too late. For that, what was told and is old is taken back
first; then come the sums, those of batches that were never told included, and then the batches that are told by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

__all__ = ["NOTES_KEPT", "Report", "shortened"]

FOR_PEOPLE: Final = ("journal_note", "speed_note")
NOTES_KEPT: Final = 500  # of the newest steps; the store has all once the next checkpoint is committed
HAVE, BATCH, OUT, OLD, KEEP_MS, SUMS = 4, 7, 8, 9, 10, 11  # in the arguments of ledger_report


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """One call of a script."""

    script: str
    keys: tuple[Any, ...]
    args: tuple[Any, ...]


def shortened(waiting: Sequence[Report]) -> list[Report]:
    """What is left of the reports of one rank, the oldest first, of which Redis has heard none."""
    ledgers: dict[tuple[Any, ...], list[Report]] = {}
    others: list[Report] = []
    for report in waiting:
        (ledgers.setdefault(report.keys, []) if report.script == "ledger_report" else others).append(report)
    notes = [report for report in others if report.script in FOR_PEOPLE]
    dropped = set(map(id, notes[:-NOTES_KEPT]))
    return [report for report in others if id(report) not in dropped] + [
        report for reports in ledgers.values() for report in _of_one_ledger(reports)
    ]


def _of_one_ledger(reports: Sequence[Report]) -> list[Report]:
    newest, have = reports[-1], max(report.args[HAVE] for report in reports)

    def made(batch: str, out: str, old: int, sums: Sequence[Any]) -> Report:
        args = newest.args
        return replace(newest, args=(*args[:HAVE], have, *args[HAVE + 1 : BATCH], batch, out, old, args[KEEP_MS], *sums))

    unheard = {report.args[BATCH] for report in reports}
    taken_back: list[Report] = []
    sums: dict[Any, tuple[Any, ...]] = {}  # by shard: a later one has the earlier one in it
    summed = set[str]()
    for report in reports:
        old, told = report.args[OLD], report.args[SUMS:]
        if old == -1 or str(old) in unheard:
            summed.add(str(old))
            sums |= {told[n]: told[n : n + 3] for n in range(0, len(told), 3)}
        else:
            taken_back.append(made("", "", old, told))
    alone = [report.args for report in reports if report.args[BATCH] not in {"", *summed}]
    told_alone = [made(args[BATCH], args[OUT], -1, ()) for args in alone]
    whole = [made("", "", -1, [word for told in sums.values() for word in told])]
    return [*taken_back, *(whole if sums or not told_alone else ()), *told_alone]
