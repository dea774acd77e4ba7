"""The one place that spells Redis keys, and the documented schema of dtr's state.

Every key of a job begins with ``dtr:{JOB}:``; the braces are a Redis Cluster hash tag, so all keys of a job live in one slot and every
script is a single-slot script. Times are milliseconds of the server's clock. Under the prefix:

=============================  ======  ==============================================================================================
key                            type    holds (TTL; written by)
=============================  ======  ==============================================================================================
``meta``                       hash    schema, state_id, phase (READY or RECOVERING, recover_by, recover_until), revision, generation,
                                       run (the current one, empty between runs), run_counter, last_run, ended_run, ended_worker,
                                       ended_rank, ended_reason, beat_at, grace_until, base_at, latest (RUN/STEP) (none; every module)
``members``                    zset    worker -> deadline in ms (none; join, beat, depart)
``fences``                     hash    worker -> incarnation; worker/CHANNEL -> ``number answer`` (none; join, depart, each channel)
``departed``                   hash    worker -> ``incarnation time reason`` of its newest departure (none; depart, reap)
``counters``                   hash    counter -> value: saves_skipped, ... (none; trainers)
``worker:ID``                  hash    incarnation, host, pid, address, step, loss, phase, idle_s, late_ms, beat, beat_at,
                                       stalled (why, or empty), stalled_at, ``samples_per_s/NAME`` of each data set that it loads
                                       (ttl and 2 beats; join, beat, stall, speed)
``ring``                       zset    ``worker#n`` -> mmh3 point, for people: agents compute it from member ids (none; join)
``roster``                     hash    the current run only: worker -> ``rank incarnation``; ``:fence`` (state and run, while open),
                                       ``:world``, ``:wanted``, ``:released/NAME`` (none; form, depart, arrive)
``forming``                    hash    arrivals of the next run: worker -> ``incarnation asked_rank host`` (none; form)
``run:RUN``                    hash    world_size, generation, previous, formed_at, base_state (NONE, CUT, SET), base_run, base_step,
                                       base_at, data (1 if ranks load data), store, keep_last, keep_every, keep_best, keep_for_ms,
                                       grace_ms, ``member:ID`` -> ``rank incarnation host`` (none; form, base)
``run:RUN:restore``            hash    the collective restore: attempt, state, choice, order, fresh, votes, seen, dropped, ``offer:RANK``,
                                       ``count:RUN/STEP``, ``verdict:N`` (1 day; restore)
``restores``                   hash    per checkpoint that a restore chose and did not complete since: ``RUN/STEP/begun``,
                                       ``RUN/STEP/damaged`` (how often it was found so), ``RUN/STEP/reason`` (90 days; restore)
``barrier:NAME:RUN:SEQ``       hash    one round: state, arrived, expected, members (digest), opened_at, missing, reason, wanted
                                       (60 s once final, else 1 day; arrive, timeout)
``...:arrived``                set     members that arrived (as the round)
``...:wake``                   stream  one entry when the round is final (as the round)
``wake``                       stream  news that interrupts a wait: departed, formed, ready, restore, based (about 1,000 entries)
``lineage``                    hash    run -> last step inclusive that the lineage took from it; empty for the current run (base)
``ckpts``                      zset    ``RUN/STEP`` -> step (retention removes)
``open_ckpts``                 zset    ``RUN/STEP`` -> created_at, while WRITING, SEALED or ABORTING (begin, decide)
``ckpt:RUN:STEP``              hash    state, reason, world_size, expected, done, replicated, writer, store, created_at, sealed_at,
                                       decided_at, size_bytes, metrics (JSON), pinned (the note of its pin, ``-`` for none), retired_at
                                       (retention removes)
``ckpt:RUN:STEP:parts``        hash    per rank R: ``R/state``, ``R/worker``, ``R/incarnation``, ``R/host``, ``R/save``,
                                       ``R/size_bytes``, ``R/checksum``, ``R/object``, ``R/state_checksum``, ``R/nonce``, ``R/uploader``,
                                       ``R/lease_until``,
                                       ``R/claims``, ``R/claimed_at``, ``R/attempts``, ``R/failures``, ``R/retry_at``, ``R/progress_bytes``,
                                       ``R/error``,
                                       ``R/metrics`` (as its checkpoint)
``ckpt:RUN:STEP:data``         hash    rank -> its share of the data state of this step, JSON
                                       (7 days after the last one, 1 hour after the commit; trainers, uploaders)
``ckpt:RUN:STEP:transfer:R``   hash    an upload that another uploader could go on with: nonce, upload (the store's name for it), and
                                       N -> ``CHECKSUM TAG`` of each piece sent (1 day; uploader; gone once the part is done)
``retention``                  hash    token, collected_at of the last collector (none; retention)
``failed_saves``               stream  saves that came to nothing: run, step, state (ABORTED, ABANDONED, CONFLICT, FAILED), reason, and
                                       rank, worker, save where one rank's failed alone (about 100 entries; decide, trainers)
``delta``                      hash    per rank R, how delta pays: ``R/last`` (RUN/STEP), ``R/state_bytes``, ``R/sent_bytes``, ``R/poor``,
                                       ``R/rest``, ``R/next_rest`` (none; uploaders)
``datasets``                   hash    data set -> its current version (none; register)
``dataset:NAME``               hash    the current spec; ``dataset:NAME:VERSION`` each version, kept (none; register)
``dataset:NAME:DIGEST:files``  hash    file -> facts of the spec with this digest (none once registered; register)
``dataset:NAME:counting``      string  token of the process that counts its samples just now (5 s, renewed; register)
``placement:NAME``             hash    parent, generation, version, members (digest), who computes the next (none; placement)
``placement:NAME:GENERATION``  hash    worker -> its shards; ``:weight/WORKER`` -> its weight, where that is not 1 (two kept; placement)
``ledger:NAME:EPOCH:RUN``      hash    consumption of one data set in one epoch and run: ``:version``, ``:digest``, ``:mode``, ``:seed``,
                                       ``:shards``, ``:base`` (digest of what was consumed before), ``:fence``, ``:most``,
                                       ``:dry`` (batches
                                       of the rank that has most, how many ranks have no more), per rank ``have/R``, ``dry/R``, ``step/R``,
                                       ``samples/R``, ``leases/R``, ``out/R/BATCH`` (sample ranges of its newest batches), per
                                       shard ``lease/SHARD`` (worker
                                       incarnation fence), ``part/SHARD`` (consumed ranges) (7 days after
                                       the last write, or the 16th batch before it; loader)
``...:taken``, ``...:done``    string  one bit a shard: not free; consumed whole in this run (as the ledger)
``quarantine:NAME:DIGEST``     hash    shard -> why it cannot be read (none; loader, `dtr data release`)
``skips:NAME``                 hash    ``FILE:START-STOP`` -> why these samples are left out, JSON (none; `dtr data skip`, loader)
``journal:RUN:RANK``           stream  ``STEP-1``: ``:at``, and data set -> what that step consumed, JSON (the newest steps; 1 day after
                                       the last one; loader)
``events``                     stream  members, runs, broken rounds, checkpoints, recovery (about 10,000 entries; every module)
=============================  ======  ==============================================================================================

Outside any job: ``dtr:jobs`` (zset, job -> last seen) and ``dtr:uploader:HOST`` (hash with TTL: an uploader lives there; host,
pid, started_at, last_scan_at, queue, version, what it has in hand, and stuck_s: how long parts wait though no process is busy).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from dtr import names

__all__ = ["JOBS", "Keys", "LedgerKeys", "RoundKeys", "uploader", "upload_queue"]

JOBS: Final = "dtr:jobs"


def uploader(host: str) -> str:
    """The presence of an uploader on ``host``."""
    return f"dtr:uploader:{host}"


def upload_queue(host: str) -> str:
    """The Celery queue that the uploaders of ``host`` consume."""
    return f"dtr.upload.{host}"


class RoundKeys(NamedTuple):
    """The three keys of one barrier round."""

    round: str
    arrived: str
    wake: str


class LedgerKeys(NamedTuple):
    """The three keys of one data set's ledger in one epoch and run."""

    ledger: str
    taken: str
    done: str


class Keys:
    """Spells every key of one job."""

    def __init__(self, job: str) -> None:
        self.job = names.job_name(job)
        self.prefix = prefix = f"dtr:{{{job}}}:"
        self.meta: Final = prefix + "meta"
        self.members: Final = prefix + "members"
        self.fences: Final = prefix + "fences"
        self.departed: Final = prefix + "departed"
        self.counters: Final = prefix + "counters"
        self.ring: Final = prefix + "ring"
        self.roster: Final = prefix + "roster"
        self.forming: Final = prefix + "forming"
        self.wake: Final = prefix + "wake"
        self.lineage: Final = prefix + "lineage"
        self.restores: Final = prefix + "restores"
        self.ckpts: Final = prefix + "ckpts"
        self.open_ckpts: Final = prefix + "open_ckpts"
        self.retention: Final = prefix + "retention"
        self.failed_saves: Final = prefix + "failed_saves"
        self.delta: Final = prefix + "delta"
        self.datasets: Final = prefix + "datasets"
        self.events: Final = prefix + "events"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}worker:{worker_id}"

    def run(self, run: str) -> str:
        return f"{self.prefix}run:{run}"

    def restore(self, run: str) -> str:
        return f"{self.prefix}run:{run}:restore"

    def barrier(self, name: str, run: str, seq: int) -> RoundKeys:
        base = f"{self.prefix}barrier:{name}:{run}:{seq}"
        return RoundKeys(round=base, arrived=f"{base}:arrived", wake=f"{base}:wake")

    def ckpt(self, run: str, step: int) -> str:
        return f"{self.prefix}ckpt:{run}:{step}"

    def parts(self, run: str, step: int) -> str:
        return f"{self.prefix}ckpt:{run}:{step}:parts"

    def ckpt_data(self, run: str, step: int) -> str:
        return f"{self.prefix}ckpt:{run}:{step}:data"

    def transfer(self, run: str, step: int, rank: int) -> str:
        return f"{self.prefix}ckpt:{run}:{step}:transfer:{rank}"

    def dataset(self, name: str, version: int | None = None) -> str:
        base = f"{self.prefix}dataset:{name}"
        return base if version is None else f"{base}:{version}"

    def dataset_files(self, name: str, digest: str) -> str:
        return f"{self.prefix}dataset:{name}:{digest}:files"

    def dataset_counting(self, name: str) -> str:
        return f"{self.prefix}dataset:{name}:counting"

    def placement(self, name: str, generation: int | None = None) -> str:
        base = f"{self.prefix}placement:{name}"
        return base if generation is None else f"{base}:{generation}"

    def ledger(self, name: str, epoch: int, run: str) -> LedgerKeys:
        base = f"{self.prefix}ledger:{name}:{epoch}:{run}"
        return LedgerKeys(ledger=base, taken=f"{base}:taken", done=f"{base}:done")

    def quarantine(self, name: str, digest: str) -> str:
        return f"{self.prefix}quarantine:{name}:{digest}"

    def skips(self, name: str) -> str:
        return f"{self.prefix}skips:{name}"

    def journal(self, run: str, rank: int) -> str:
        return f"{self.prefix}journal:{run}:{rank}"
