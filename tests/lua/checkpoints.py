"""Checkpoints in a known state, written through the scripts themselves."""

from __future__ import annotations

from typing import Any

from dtr.checkpoint import parts
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.parts import Fence, Placed, Spec, StagedPart
from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.job import JobState
from tests.lua.jobs import formed

STORE = "file:///store"
SIZE = 1000


def based(state: JobState, *workers: str) -> tuple[list[Identity], Run]:
    """A run whose base is known, so that it may save."""
    who, run = formed(state, *workers)
    state.redis.hset(state.keys.run(run.id), "base_state", "SET")
    state.redis.hset(state.keys.lineage, run.id, "")
    return who, run


def seat(who: Identity, run: Run) -> Fence:
    return Fence(rank=run.roster[who.worker_id].rank, worker=who.worker_id, incarnation=who.incarnation, host=who.host)


def spec(run: Run | str, step: int = 10, **facts: Any) -> Spec:
    name, size = (run, 1) if isinstance(run, str) else (run.id, run.world_size)
    return Spec(**{"run": name, "step": step, "world_size": size, "store": STORE, **facts})


def part(save: str = "save-1", size_bytes: int = SIZE) -> StagedPart:
    return StagedPart(size_bytes=size_bytes, save=save)


def begin(state: JobState, who: Identity, run: Run, step: int = 10, given: StagedPart | None = None, **facts: Any) -> Placed:
    """One rank's part is staged."""
    return parts.begin(state, who.state_id, spec(run, step, **facts), seat(who, run), given or part(f"save-{who.worker_id}"))


def register(state: JobState, who: Identity, run: Run, step: int = 10, given: StagedPart | None = None, **facts: Any) -> Placed:
    """An uploader found one rank's part."""
    return parts.register(state, spec(run, step, **facts), seat(who, run), given or part(f"save-{who.worker_id}"))


def claim(state: JobState, run: Run, rank: int, token: str, *, host: str = "host-a", step: int = 10, **limits: int) -> parts.Claim:
    """An uploader's claim; its nonce is its token with an n."""
    times = {"lease_ms": 60_000, "max_attempts": 3, **limits}
    return parts.claim(state, run.id, step, rank, host=host, token=token, nonce=f"n{token}", **times)


def done(
    state: JobState, run: Run, rank: int, nonce: str, *, step: int = 10, checksum: str = "1", size_bytes: int = SIZE
) -> tuple[str, str]:
    facts = PartFacts(
        rank=rank, worker="w", incarnation="0" * 12, object=f"object-{rank}-{nonce}", size_bytes=size_bytes,
        checksum=f"crc64nvme:{checksum:>016}",
    )  # fmt: skip
    return parts.done(state, run.id, step, facts, nonce=nonce)


def decide(state: JobState, run: Run | str, step: int = 10, decision: str = "commit", reason: str = "") -> str:
    """The store's record was read back."""
    name = run if isinstance(run, str) else run.id
    return parts.decide(state, name, step, decision=decision, reason=reason, size_bytes=SIZE)


def sealed(state: JobState, who: list[Identity], run: Run, step: int = 10) -> None:
    """Every part is in the store."""
    for rank, member in enumerate(who):
        begin(state, member, run, step)
        claim(state, run, rank, f"t{rank}", host=member.host, step=step)
        done(state, run, rank, f"nt{rank}", step=step)


def lapse(state: JobState, run: Run, rank: int, step: int = 10) -> None:
    """The lease of a claim is over, as if its holder had died that long ago."""
    state.redis.hset(state.keys.parts(run.id, step), f"{rank}/lease_until", 1)


def events(state: JobState) -> list[str]:
    """The kinds of events so far, those about checkpoints."""
    return [fields["event"] for _, fields in state.redis.xrange(state.keys.events) if fields["event"].startswith("ckpt_")]


def snapshot(state: JobState) -> dict[str, Any]:
    """All of the job's state but streams."""
    found: dict[str, Any] = {}
    for key in sorted(state.redis.keys(f"{state.keys.prefix}*")):
        kind = state.redis.type(key)
        if kind == "hash":
            found[key] = state.redis.hgetall(key)
        elif kind == "zset":
            found[key] = state.redis.zrange(key, 0, -1, withscores=True)
    return found
