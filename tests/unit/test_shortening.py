"""Reports that later ones make needless: what is left says the same to whoever reads the ledger, at any moment, and is little."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from dtr.datasets.consuming.ranges import Ranges, format_ranges, parse_ranges, union
from dtr.datasets.consuming.shortening import NOTES_KEPT, Report, shortened

SHARD = 40
Samples = set[tuple[int, int]]


def ledger_report(batch: str, out: str, old: int, *sums: Any, epoch: int = 0) -> Report:
    args = ("f", "w0", 0, "i", int(batch or -1) + 1, batch, 0, batch, out, old, 1, *sums)
    return Report(script="ledger_report", keys=("roster", f"ledger/{epoch}", "done"), args=args)


def told(dice: random.Random, batches: int) -> tuple[list[Report], list[Samples]]:
    """As a rank hands out batches of some samples, and has consumed most of them a while later, with journals between; and each batch."""
    given: list[tuple[int, int, int]] = []
    sums: dict[int, Ranges] = {}
    found, at, old = list[Report](), 0, 0
    for batch in range(batches):
        shard, start = divmod(at, SHARD)
        stop = min(SHARD, start + dice.randint(1, 5))
        at += stop - start
        given.append((shard, start, stop))
        if dice.random() < 0.3:
            found.append(ledger_report("", "", -1))
        args: list[Any] = [-1]
        if old < batch - 8 - dice.randint(0, 3):
            summed, *pair = given[old]
            sums[summed] = union(sums.get(summed, ()), ((pair[0], pair[1]),))
            args = [old, summed, 9, "" if sums[summed] == ((0, SHARD),) else format_ranges(sums[summed])]
            old += 1
        found.append(ledger_report(str(batch), f"{shard}:{start}-{stop}", *args))
        found.append(Report(script="journal_note", keys=("j",), args=(batch,)))
    return found, [{(shard, n) for n in range(start, stop)} for shard, start, stop in given]


def check_cuts(reports: Iterable[Report], batches: Sequence[Samples]) -> int:
    """After each report, by what its script does: a cut that may be made after a batch has what was given so far; returns how many may."""
    outs: dict[int, Samples] = {}
    parts: dict[int, Samples] = {}
    cuts = 0
    for report in reports:
        if report.script != "ledger_report":
            continue
        batch, out, old = report.args[7:10]
        if batch:
            outs[int(batch)] = samples_in(out)
        outs.pop(old, None)
        sums = report.args[11:]
        parts |= {shard: samples_in(f"{shard}:{text or f'0-{SHARD}'}") for shard, text in zip(sums[::3], sums[2::3], strict=True)}
        for through in range(min(outs) - 1, max(outs) + 1) if outs else ():
            found = set().union(*parts.values(), *(held for number, held in outs.items() if number <= through))
            assert found == set().union(*batches[: through + 1])
            cuts += 1
    return cuts


def samples_in(text: str) -> Samples:
    shard, _, held = text.partition(":")
    return {(int(shard), n) for start, stop in parse_ranges(held) for n in range(start, stop)}


@pytest.mark.parametrize("seed", range(20))
def test_every_cut_is_right(seed: int) -> None:
    """Given reports, the first heard and the rest shortened now and then, then each cut that what is left allows is right; it is little."""
    dice = random.Random(seed)
    every, batches = told(dice, 150)
    heard = dice.choice([0, 1, 30, 60])
    left: list[Report] = []
    for report in every[heard:]:
        left.append(report)
        if dice.random() < 0.05:
            left = shortened(left)
    left = shortened(left)
    assert check_cuts([*every[:heard], *left], batches) >= 8
    assert len([r for r in left if r.script == "ledger_report"]) < 50
    assert left[-1].args[7:9] == every[-2].args[7:9]


def test_epochs_do_not_mix() -> None:
    """Given batches of two epochs with equal numbers, then the sums of one are not those of the other."""
    one = [ledger_report("0", "1:0-5", -1), ledger_report("9", "1:5-9", 0, 1, 7, "0-5")]
    other = [ledger_report("0", "2:0-5", -1, epoch=1)]
    assert [(r.keys[1], r.args[7]) for r in shortened([*one, *other])] == [("ledger/0", ""), ("ledger/0", "9"), ("ledger/1", "0")]


def test_of_what_is_for_people_the_newest_is_left() -> None:
    """Given more notes than are kept, then the newest are left; a share and a quarantine are always."""
    notes = [Report(script="journal_note", keys=("j",), args=(n,)) for n in range(NOTES_KEPT + 7)]
    others = [Report(script=script, keys=("k",), args=()) for script in ("ckpt_data", "ledger_quarantine")]
    left = shortened([*others, *notes])
    assert [r.script for r in left[:2]] == ["ckpt_data", "ledger_quarantine"]
    assert [r.args[0] for r in left[2:]] == list(range(7, NOTES_KEPT + 7))
