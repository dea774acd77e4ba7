"""Which batch each rank consumed at which step: the record that the time machine reads. Pure; the protocol, and what it survives:

    agent.step    a row in memory, and the same row to Redis by a report that nobody waits for (``journal:RUN:RANK``, the newest rows)
    save          the rows since the newest checkpoint that is known to be committed travel in the rank's share of the data state
    commit        the uploader puts the rows of all ranks into the store, ``journal/RUN/STEP.json.gz``, and each data set's files beside
                  them, ``datasets/NAME/DIGEST.json.gz``; then the manifest
    committed     the trainer lets go of the rows through that step; Redis soon of the shares

Killed before the share is told: the checkpoint never commits, so its steps are on no lineage. Killed between journal and manifest: the
next uploader finds the journal, which is as good as its own, and goes on to the manifest. An aborted or lost checkpoint loses no row:
the next share has them again, since none was known to be committed. Put twice, it is put once: the first stands.

A row is a fact about its run, whatever became of the checkpoint: that step STEP of run RUN gave these samples to that rank. Whether the
step counts is the lineage's to say. Ranges are positions within shards; in deterministic mode they follow from (seed, epoch, global
batch size) and are left out, save those that were skipped.
"""

from __future__ import annotations

import gzip
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import orjson

from dtr import names
from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.datastate import Cursor, DataState
from dtr.datasets.loading.batch import Batch, SampleRange, ranges_text, samples_of
from dtr.datasets.loading.order import share
from dtr.errors import InvalidInput, StateCorrupt

__all__ = ["Account", "Journal", "Origin", "Row", "decode", "encode", "journal_key", "merged_accounts", "parse_account"]

VERSION: Final = 1
MOST_ROWS: Final = (10_000, 1_000_000)  # of one rank, of all together: without a commit for so long, the oldest are in Redis alone


def journal_key(run: str, step: int) -> str:
    """Where the rows through ``step`` of a run lie in the job's store."""
    return f"journal/{run}/{step:012d}.json.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One batch that one rank consumed.

    Args:
        step: that consumed it.
        epoch, number: of the batch, as in :class:`dtr.datasets.loading.batch.Batch`.
        ranges: its samples, (shard, start, stop); empty in deterministic mode, unless some of the batch could not be read.
        padded: samples that it repeated.
        skipped: samples that would have been in it, and were left out by `dtr data skip`.
    """

    step: int
    epoch: int
    number: int
    ranges: tuple[SampleRange, ...] = ()
    padded: tuple[SampleRange, ...] = ()
    skipped: tuple[SampleRange, ...] = ()

    @classmethod
    def of(cls, step: int, batch: Batch, *, by_order: bool) -> Self:
        """The row of a batch; ``by_order`` in deterministic mode, where the order tells the ranges unless some could not be read."""
        given = ((), ()) if by_order and not batch.unread else (batch.ranges, batch.padded)
        return cls(step=step, epoch=batch.epoch, number=batch.number, ranges=given[0], padded=given[1], skipped=batch.skipped)

    def to_json(self) -> list[Any]:
        """As it stands everywhere: [step, epoch, number, ranges, padded, skipped], without the empty texts at its end."""
        texts = [ranges_text(some) for some in (self.ranges, self.padded, self.skipped)]
        while texts and not texts[-1]:
            texts.pop()
        return [self.step, self.epoch, self.number, *texts]

    @classmethod
    def parse(cls, row: Any) -> Self:
        """What `to_json` wrote; raises InvalidInput for anything else."""
        if not isinstance(row, list) or not 3 <= len(row) <= 6 or not all(isinstance(text, str) for text in row[3:]):
            raise InvalidInput(f"a row must be [step, epoch, number, ranges, padded, skipped], got {str(row)[:60]!r}", field="rows")
        step, epoch, number = (names.step(value, "rows") for value in row[:3])
        texts = [_parsed(text) for text in row[3:]] + [()] * 3
        return cls(step=step, epoch=epoch, number=number, ranges=texts[0], padded=texts[1], skipped=texts[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Of what a row is a place in: a version of a data set and, in deterministic mode, which order; in dynamic mode the rest is empty."""

    version: int
    digest: str
    mode: str
    seed: int = 0
    global_batch_size: int = 0
    window: int = 0
    tail: str = ""
    world_size: int = 0

    @classmethod
    def of(cls, state: DataState, world_size: int) -> Self:
        """That of a data state in a run of so many ranks."""
        if not isinstance(state, Cursor):
            return cls(version=state.version, digest=state.digest, mode=state.mode)
        return cls(
            version=state.version, digest=state.digest, mode=state.mode, seed=state.seed, global_batch_size=state.global_batch_size,
            window=state.window, tail=state.tail, world_size=world_size,
        )  # fmt: skip

    def samples_of(self, row: Row, rank: int, total_samples: int) -> int:
        """How many samples a rank's row has, none of them repeated; an epoch has ``total_samples``, so its last batch may be short.

        In deterministic mode what could not be read counts as if it had been.
        """
        if self.mode != "deterministic":
            return samples_of(row.ranges)
        left = max(0, total_samples - row.number * self.global_batch_size)
        size = self.global_batch_size if self.tail == "pad" else min(self.global_batch_size, left)
        start, stop = share(size, self.world_size, rank)
        return max(0, min(stop, left) - start) - samples_of(row.skipped)

    def to_json(self) -> dict[str, Any]:
        """Without what is empty in dynamic mode."""
        facts = {"version": self.version, "digest": self.digest, "mode": self.mode}
        if self.mode != "deterministic":
            return facts
        order = {"seed": self.seed, "global_batch_size": self.global_batch_size, "window": self.window, "tail": self.tail}
        return facts | order | {"world_size": self.world_size}

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Self:
        """What `to_json` wrote; raises InvalidInput for anything else."""
        facts: dict[str, Any] = {
            key: names.step(document.get(key, 0), key) for key in ("version", "seed", "global_batch_size", "window", "world_size")
        }
        texts = {key: document.get(key, "") for key in ("digest", "mode", "tail")}
        if not all(isinstance(text, str) for text in texts.values()) or texts["mode"] not in {"dynamic", "deterministic"}:
            raise InvalidInput(f"mode must be dynamic or deterministic, got {str(texts['mode'])[:60]!r}", field="mode")
        if texts["mode"] == "deterministic" and not (facts["global_batch_size"] and facts["world_size"]):
            raise InvalidInput("global_batch_size and world_size must be there in deterministic mode", field="global_batch_size")
        return cls(**facts, **texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Rows of one data set by one rank, and what they are places in."""

    origin: Origin
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in Redis and in a share."""
        return {**self.origin.to_json(), "rows": [row.to_json() for row in self.rows]}

    def at(self, step: int) -> Account:
        """Only what ``step`` consumed."""
        return Account(origin=self.origin, rows=tuple(row for row in self.rows if row.step == step))


def parse_account(document: Any) -> Account:
    """What `Account.to_json` wrote; raises StateCorrupt."""
    try:
        if not isinstance(document, Mapping) or not isinstance(document.get("rows"), list):
            raise InvalidInput(f"rows must be a list, got {str(document)[:60]!r}", field="rows")
        return Account(origin=Origin.parse(document), rows=tuple(map(Row.parse, document["rows"])))
    except InvalidInput as exc:
        raise StateCorrupt(f"a journal of consumed batches is not readable: {exc.message}") from exc


@dataclass(slots=True)
class Journal:
    """One process's rows in one run, those that no commit has yet. Not for two threads."""

    rows: dict[str, deque[tuple[int, list[Any]]]] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def add(self, name: str, origin: Origin, row: Row, world_size: int = 1) -> list[Any]:
        """A batch of data set ``name`` was consumed, in a run of so many ranks; the row as it stands everywhere."""
        self.origins[name] = origin
        if name not in self.rows:
            self.rows[name] = deque(maxlen=max(1, min(MOST_ROWS[0], MOST_ROWS[1] // world_size)))
        told = row.to_json()
        self.rows[name].append((row.step, told))
        return told

    def forget(self, step: int) -> None:
        """Let go of what a committed checkpoint of ``step`` has."""
        for rows in self.rows.values():
            while rows and rows[0][0] <= step:
                rows.popleft()

    def to_json(self, name: str) -> dict[str, Any] | None:
        """The account of one data set; None if nothing is left to tell."""
        rows = self.rows.get(name)
        return {**self.origins[name].to_json(), "rows": [row for _, row in rows]} if rows else None


def encode(*, job: str, run: str, step: int, accounts: Mapping[int, Mapping[str, Account]]) -> bytes:
    """The object for the store: JSON, compressed, the same for equal accounts."""
    ranks = {str(rank): {name: account.to_json() for name, account in sorted(of.items())} for rank, of in sorted(accounts.items()) if of}
    document = {"version": VERSION, "job": job, "run": run, "step": step, "ranks": ranks}
    return gzip.compress(orjson.dumps(document), mtime=0)


def decode(content: bytes, what: str) -> dict[int, dict[str, Account]]:
    """Rank -> data set -> its rows, of what `encode` wrote; raises StateCorrupt that names ``what``."""
    try:
        document = orjson.loads(gzip.decompress(content))
        if document["version"] != VERSION:
            raise StateCorrupt(f"{what} has the unknown version {document['version']!r}; this dtr reads {VERSION}")
        return {int(rank): {name: parse_account(account) for name, account in of.items()} for rank, of in document["ranks"].items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise StateCorrupt(f"{what} is no journal: {type(exc).__name__}: {exc}") from exc


def merged_accounts(accounts: Iterable[Account]) -> tuple[Account, ...]:
    """Accounts with equal origins as one, each row once."""
    found: dict[Origin, dict[tuple[int, int, int], Row]] = {}
    for account in accounts:
        rows = found.setdefault(account.origin, {})
        rows.update({(row.step, row.epoch, row.number): row for row in account.rows})
    return tuple(Account(origin=origin, rows=tuple(rows[key] for key in sorted(rows))) for origin, rows in found.items())


def _parsed(text: str) -> tuple[SampleRange, ...]:
    """What `ranges_text` wrote, in its order: a batch's samples need not ascend."""
    found: list[SampleRange] = []
    for word in text.split():
        shard, _, held = word.partition(":")
        if not shard.isascii() or not shard.isdigit():
            raise InvalidInput(f"ranges must be SHARD:START-STOP, got {word[:60]!r}", field="rows")
        found += [(int(shard), start, stop) for start, stop in ranges.parse_ranges(held)]
    return tuple(found)
