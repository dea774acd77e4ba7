"""Samples that a person took out of a data set: which, why, and what a loader leaves out for it. Pure.

A skip names a file and samples in it, ``part-0.jsonl:5-9``, half open as a slice is, so that it holds for every later version of the
data set in which that file is as it was. It cannot be taken back: a state that was trained without the samples is not one with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import orjson

from dtr import names
from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.ranges import Ranges
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.sources.copies import Stamp
from dtr.errors import InvalidInput

__all__ = ["Skip", "Skips", "checked", "left_out", "merged_skips", "parse_skips", "parse_target"]

_TARGET: Final = re.compile(r"(?P<file>.+):(?P<start>\d{1,15})-(?P<stop>\d{1,15})", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Skip:
    """Why samples are left out.

    Args:
        at_ms: since when, by the coordinator's clock.
        reason: for people, one line.
        size_bytes, mtime_ns, tag: the stamp of the file as it was then; of another file it says nothing.
    """

    at_ms: int
    reason: str
    size_bytes: int
    mtime_ns: int
    tag: str = ""

    @property
    def stamp(self) -> Stamp:
        """What a file must have for this to be about it."""
        return Stamp(size_bytes=self.size_bytes, mtime_ns=self.mtime_ns, tag=self.tag)

    def to_json(self) -> dict[str, Any]:
        """As it stands in data states; a file on disk has no tag."""
        facts = {"at_ms": self.at_ms, "reason": self.reason, "size_bytes": self.size_bytes, "mtime_ns": self.mtime_ns}
        return facts | ({"tag": self.tag} if self.tag else {})

    def to_text(self) -> str:
        """As it stands in Redis."""
        return orjson.dumps(self.to_json()).decode()

    @classmethod
    def parse(cls, document: Any) -> Self:
        """What `to_json` wrote; raises InvalidInput for anything else."""
        if not isinstance(document, Mapping) or not isinstance(document.get("reason"), str):
            raise InvalidInput(f"a skip must have at_ms, reason, size_bytes and mtime_ns, got {str(document)[:60]!r}", field="skips")
        mtime_ns = document.get("mtime_ns")
        if type(mtime_ns) is not int:
            raise InvalidInput(f"mtime_ns must be an integer, got {str(mtime_ns)[:60]!r}", field="skips")
        tag = document.get("tag", "")
        if not isinstance(tag, str):
            raise InvalidInput(f"tag must be text, got {str(tag)[:60]!r}", field="skips")
        numbers = {key: names.step(document.get(key), key) for key in ("at_ms", "size_bytes")}
        return cls(reason=document["reason"], mtime_ns=mtime_ns, tag=tag, **numbers)


Skips = Mapping[str, Skip]  # FILE:START-STOP -> why


def parse_target(text: str) -> tuple[str, int, int]:
    """File, first sample and the one after the last of ``FILE:START-STOP``; raises InvalidInput for anything else."""
    found = _TARGET.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found["start"]) >= int(found["stop"]):
        raise InvalidInput(
            f"samples must be FILE:START-STOP such as part-0.jsonl:5-9, which has four samples, got {str(text)[:80]!r}", field="samples"
        )
    return found["file"], int(found["start"]), int(found["stop"])


def checked(dataset: Dataset, text: str, reason: str, at_ms: int) -> tuple[str, Skip]:
    """The skip that a person asked for; raises InvalidInput if the data set has no such samples, or nobody says why."""
    file, start, stop = parse_target(text)
    facts = next((facts for facts in dataset.files if facts.file == file), None)
    if facts is None:
        known = ", ".join(facts.file for facts in dataset.files[:3]) + (", ..." if len(dataset.files) > 3 else "")
        raise InvalidInput(f"samples: data set {dataset.spec.name!r} has no file {file!r}; it has {known}", field="samples")
    if stop > facts.samples:
        raise InvalidInput(f"samples: {file} has {facts.samples} samples, 0-{facts.samples}, got {start}-{stop}", field="samples")
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in reason).split())[:500]
    if not clean:
        raise InvalidInput("reason must say why the samples are left out, for those who wonder later", field="reason")
    skip = Skip(at_ms=at_ms, reason=clean, size_bytes=facts.size_bytes, mtime_ns=facts.mtime_ns, tag=facts.tag)
    return f"{file}:{start}-{stop}", skip


def left_out(dataset: Dataset, skips: Skips) -> dict[int, Ranges]:
    """Shard -> positions within it that are skipped, of those files that are as they were."""
    files = {facts.file: (number, facts) for number, facts in enumerate(dataset.files)}
    found: dict[int, Ranges] = {}
    for target, skip in skips.items():
        file, start, stop = parse_target(target)
        number, facts = files.get(file, (0, None))
        if facts is None or facts.stamp != skip.stamp:
            continue
        size, first = dataset.spec.shard_size, dataset.first_shards[number]
        for within in range(start // size, -(-min(stop, facts.samples) // size)):
            begin = within * size
            held = (max(start - begin, 0), min(stop, facts.samples) - begin)
            held = (held[0], min(held[1], size))
            found[first + within] = ranges.union(found.get(first + within, ()), ranges.normal([held]))
    return found


def merged_skips(one: Skips, other: Skips) -> Skips:
    """What either has; of two records of the same samples, always the same one."""
    if one == other or not other:
        return one
    if not one:
        return other
    return {key: min(some[key] for some in (one, other) if key in some) for key in sorted({**one, **other})}


def parse_skips(document: Any) -> Skips:
    """The skips of a data state; raises InvalidInput."""
    if not isinstance(document, Mapping):
        raise InvalidInput(f"skips must be an object, got {str(document)[:60]!r}", field="skips")
    for target in document:
        parse_target(target)
    return {target: Skip.parse(skip) for target, skip in document.items()}
