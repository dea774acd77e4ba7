"""Whether a job consumed each sample exactly once, told from what its trainers wrote down themselves. Shares no code with dtr.

Each trainer appends JSON lines to a log of its own. When it begins in a run, what it restored; after each step, what that consumed::

    {"run": "0002-ab", "rank": 0, "restored": ["0001-xy", 9]}
    {"run": "0002-ab", "rank": 0, "world_size": 3, "step": 10, "seen": 11, "epoch": 0, "batch": 0, "ids": [4, 5]}

`judge` walks from the last run back along what was restored, and takes of each run the steps up to the one that its successor restored.
Those must have consumed every sample of every epoch exactly once, in steps that all ranks of the run took, with a state of their own age.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Place = tuple[int, int]  # epoch, sample
Lineage = list[tuple[str, int]]  # run and the last step that is taken from it, oldest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is wrong with the surviving lineage: nothing, if every tuple is empty."""

    lost: tuple[Place, ...] = ()
    twice: tuple[str, ...] = ()
    unknown: tuple[Place, ...] = ()
    uneven: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    runs: int = 0

    @property
    def clean(self) -> bool:
        return not (self.lost or self.twice or self.unknown or self.uneven or self.wrong)

    def __str__(self) -> str:
        found = {"lost": self.lost, "twice": self.twice, "unknown": self.unknown, "uneven": self.uneven, "wrong": self.wrong}
        told = [f"{len(held)} {what} ({'; '.join(map(str, held[:5]))})" for what, held in found.items() if held]
        return f"{self.runs} runs: " + (", ".join(told) or "each sample exactly once")


def judge(folder: Path, *, samples: int, epochs: int) -> Verdict:
    """The verdict on the logs ``log-*.jsonl`` of a folder and its ``lineage.json``."""
    entries = read_logs(folder)
    lineage, wrong = walked(entries, said := [(run, step) for run, step in json.loads((folder / "lineage.json").read_text())])
    if lineage != said:
        wrong.append(f"the job says that its lineage is {said}; what its trainers restored says {lineage}")
    taken = of_lineage(entries, lineage)
    by_place: dict[Place, list[str]] = defaultdict(list)
    for entry in taken:
        for sample in entry["ids"]:
            by_place[entry["epoch"], sample].append(f"run {entry['run']} step {entry['step']} rank {entry['rank']}")
    wanted = {(epoch, sample) for epoch in range(epochs) for sample in range(samples)}
    wrong += [f"step {e['step']} of run {e['run']} has the state of step {e['seen'] - 1}" for e in taken if e["seen"] != e["step"] + 1]
    return Verdict(
        lost=tuple(sorted(wanted - by_place.keys())),
        twice=tuple(f"epoch {e} sample {s}: {', '.join(who)}" for (e, s), who in sorted(by_place.items()) if len(who) > 1),
        unknown=tuple(sorted(by_place.keys() - wanted)),
        uneven=tuple(_uneven(taken, lineage)),
        wrong=tuple(wrong),
        runs=len(lineage),
    )


def read_logs(folder: Path) -> list[dict[str, Any]]:
    """All whole lines; the last one of a trainer that was killed may be torn."""
    texts = [path.read_text() for path in sorted(folder.glob("log-*.jsonl"))]
    return [json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]


def walked(entries: Iterable[Mapping[str, Any]], said: Lineage) -> tuple[Lineage, list[str]]:
    """The lineage that ends as the job says, by what was restored, and where the ranks of a run disagree about that."""
    restored: dict[str, set[tuple[str, int] | None]] = defaultdict(set)
    for entry in entries:
        if "restored" in entry:
            restored[entry["run"]].add(tuple(entry["restored"]) if entry["restored"] else None)
    wrong = [f"ranks of run {run} restored different steps: {parents}" for run, parents in restored.items() if len(parents) > 1]
    found: Lineage = said[-1:]
    while found and len(parents := restored[found[0][0]]) == 1 and (parent := next(iter(parents))) is not None:
        if parent[0] in dict(found):
            return found, [*wrong, f"run {parent[0]} is its own ancestor"]
        found = [parent, *found]
    return found, wrong


def of_lineage(entries: Iterable[Mapping[str, Any]], lineage: Lineage) -> list[Mapping[str, Any]]:
    """The steps that the lineage takes."""
    last_of = dict(lineage)
    return [entry for entry in entries if "ids" in entry and entry["step"] <= last_of.get(entry["run"], -1)]


def _uneven(taken: Iterable[Mapping[str, Any]], lineage: Lineage) -> Iterable[str]:
    """Steps that not every rank of the run took once, and steps that nobody took."""
    ranks: dict[tuple[str, int], list[int]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for entry in taken:
        ranks[entry["run"], entry["step"]].append(entry["rank"])
        sizes[entry["run"]] = entry["world_size"]
    step = 0
    for run, last in lineage:
        for number in range(step, last + 1):
            if sorted(ranks[run, number]) != list(range(sizes.get(run, 1))):
                yield f"step {number} of run {run} was taken by ranks {sorted(ranks[run, number])} of {sizes.get(run, '?')}"
        step = last + 1


def sequence(folder: Path) -> dict[tuple[int, int], str]:
    """Of deterministic mode: (epoch, number) of each global batch that the lineage consumed -> the hash of its samples in order."""
    lineage = [(run, step) for run, step in json.loads((folder / "lineage.json").read_text())]
    batches: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(dict)
    for entry in of_lineage(read_logs(folder), lineage):
        batches[entry["epoch"], entry["batch"]][entry["rank"]] = entry["ids"]
    ordered = {place: [i for _, ids in sorted(shares.items()) for i in ids] for place, shares in sorted(batches.items())}
    return {place: hashlib.sha256(json.dumps(ids).encode()).hexdigest() for place, ids in ordered.items()}
