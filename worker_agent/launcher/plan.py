"""What is to be launched, and the environment that each trainer gets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dtr import names
from dtr.config import Settings
from dtr.errors import DtrError, InvalidInput

__all__ = ["CommandNotFound", "Launch", "Seat", "check_descriptors", "environment", "find_command", "seats"]

MOST_TRAINERS: Final = 1024
# A trainer's socket, connection and pidfd, and a connection to Redis for beats, another for the departure.
_DESCRIPTORS_EACH: Final = 6
_DESCRIPTORS_OTHERWISE: Final = 24


class CommandNotFound(DtrError):
    """The command does not exist."""

    exit_code = 127


class CommandNotExecutable(DtrError):
    """The command is there, and may not be run."""

    exit_code = 126


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One call of ``dtr run``.

    Args:
        command: program and arguments of a trainer.
        nproc: trainers that this launcher starts.
        nnodes: launchers that work on the job, on this host or others, each with the same ``nproc``.
        minimum: the job may form with this many trainers; None: only with all.
        max_restarts: of all trainers of this launcher together.
        grace_s: between asking trainers to stop and SIGKILL.
        stall_timeout_s: without progress for this long a trainer is shown as stalled; 0: never.
        stall_kills: whether a stalled trainer is killed.
        prefix: whether each line of output begins with the rank, if there are several trainers.

    Raises:
        InvalidInput: names the field.
    """

    command: tuple[str, ...]
    nproc: int
    nnodes: int = 1
    minimum: int | None = None
    max_restarts: int = 0
    grace_s: float = 30.0
    stall_timeout_s: float = 300.0
    stall_kills: bool = False
    prefix: bool = True

    def __post_init__(self) -> None:
        names.positive(self.nproc, "n", MOST_TRAINERS)
        names.positive(self.nnodes, "nnodes", 100_000)
        if self.minimum is not None:
            names.positive(self.minimum, "min", self.world_size)
        if self.stall_kills and not self.stall_timeout_s:
            raise InvalidInput("stall-action kill needs a stall-timeout above 0, got 0", field="stall-timeout")

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    @property
    def may_lose(self) -> int:
        """How many trainers may fail for good before the job cannot go on."""
        return 0 if self.minimum is None else self.world_size - self.minimum


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """The place of one trainer. ``rank`` is None where several launchers work on the job: forming gives the rank then."""

    local_rank: int
    rank: int | None
    worker_id: str
    socket: str

    @property
    def label(self) -> str:
        return f"rank {self.rank} ({self.worker_id})" if self.rank is not None else self.worker_id


def seats(launch: Launch, *, host: str, index: int, folder: str) -> tuple[Seat, ...]:
    """The seats of the launcher that has claimed ``index`` on this host; their names stay the same over restarts of either.

    Raises:
        InvalidInput: the host id is too long to be part of a worker_id.
    """
    stem = host if index == 0 else f"{host}-l{index}"
    return tuple(
        Seat(
            local_rank=n,
            rank=n if launch.nnodes == 1 else None,
            worker_id=names.name(f"{stem}-{n}", "worker_id"),
            socket=os.path.join(folder, f"{n}.sock"),
        )
        for n in range(launch.nproc)
    )


def environment(
    launch: Launch, seat: Seat, *, settings: Settings, job: str | None, restarts: int, environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the trainer in ``seat``.

    Args:
        launch: what is started.
        seat: where.
        settings: whose server and staging folder the trainer uses.
        job: the job, if it was given to the launcher; a trainer may have its own way of choosing one otherwise.
        restarts: how often the trainer of this seat was started again.
        environ: what the launcher itself was started with.
    """
    env = dict(environ)
    for name in ("RANK", "DTR_WORLD_MIN"):
        env.pop(name, None)
    env.update(
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(seat.local_rank),
        LOCAL_WORLD_SIZE=str(launch.nproc),
        DTR_WORKER_ID=seat.worker_id,
        DTR_LAUNCHER=seat.socket,
        DTR_REDIS_URL=settings.redis_url,
        DTR_STAGING=os.path.abspath(settings.staging),
        DTR_RESTARTS=str(restarts),
    )
    if seat.rank is not None:
        env["RANK"] = str(seat.rank)
    if launch.minimum is not None:
        env["DTR_WORLD_MIN"] = str(launch.minimum)
    if job is not None:
        env["DTR_JOB"] = job
    if launch.nproc > 1 and launch.prefix:
        # Their output goes through a pipe, into which Python would print by the block: a killed trainer's last words would be lost.
        env.setdefault("PYTHONUNBUFFERED", "1")
    return env


def check_descriptors(launch: Launch, limit: int) -> None:
    """Make sure that ``limit`` descriptors of this process are enough for that many trainers; raises InvalidInput with the numbers."""
    needed = _DESCRIPTORS_EACH * launch.nproc + _DESCRIPTORS_OTHERWISE
    if needed > limit:
        raise InvalidInput(
            f"{launch.nproc} trainers need {needed} file descriptors of their launcher, and its limit is {limit}: "
            f"`ulimit -n {needed}`, or fewer trainers on this host",
            field="n",
        )


def find_command(command: tuple[str, ...], environ: Mapping[str, str]) -> None:
    """Make sure that the command can be run, before anything else is started for it.

    Raises:
        CommandNotFound, CommandNotExecutable: with the statuses of a shell, 127 and 126.
    """
    program, path = command[0], environ.get("PATH", os.defpath)
    if shutil.which(program, path=path) is not None:
        return
    if os.path.dirname(program) and os.path.exists(program):
        raise CommandNotExecutable(f"{program} is not an executable file: make it one (chmod +x), or name the program that runs it")
    where = "no such file" if os.path.dirname(program) else "it is not on PATH"
    raise CommandNotFound(f"command not found: {program} ({where})")
