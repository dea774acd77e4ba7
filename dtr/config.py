"""Settings as one frozen value: an argument beats the environment (``DTR_*``), which beats ``dtr.toml``, which beats the default.

Only this module reads the environment. Every setting may be given as ``DTR_NAME`` (upper case) or as ``name = ...`` in ``dtr.toml``
(of the working folder, or where ``DTR_CONFIG`` points); an unknown name is refused and the nearest one is named.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from dtr import names
from dtr.errors import ConfigError, InvalidInput

__all__ = ["DEFAULT_REDIS_URL", "LauncherEnvironment", "Origin", "Settings", "default_home", "default_staging"]

DEFAULT_REDIS_URL: Final = "redis://127.0.0.1:6379/0"
# Variables of the launcher and of tests; they are not settings, so they are no typing errors either.
_NOT_SETTINGS: Final = {"CONFIG", "LAUNCHER", "WORKER_ID", "WORLD_MIN", "RESTARTS", "FAILPOINT", "TESTING", "HOME"}

_TEXTS: Final[dict[str, Callable[[Any], Any]]] = {"job": names.job_name, "keep_best": names.best_rules}  # what a text must be


def default_staging() -> str:
    """A folder in shared memory that belongs to this user."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"  # noqa: S108 - named per user, made with mode 0700
    return f"{base}/dtr-{os.getuid()}"


def default_home(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of the local stack: ``DTR_HOME``, else ``~/.dtr``; raises ConfigError if the variable is empty."""
    given = (os.environ if environ is None else environ).get("DTR_HOME")
    if given == "":
        raise ConfigError("DTR_HOME is empty: unset it, or give a folder", setting="home")
    return Path(given).expanduser().absolute() if given else Path.home() / ".dtr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a setting comes from: ``kind`` is argument, environment, file or default; ``place`` is the variable or the file, else ''."""

    kind: str
    place: str


def _setting(default: Any, what: str, low: float | None = None, high: float | None = None, *, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"what": what, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of dtr. Make one with :meth:`load`."""

    redis_url: str = _setting(DEFAULT_REDIS_URL, "the coordinator, redis://[user:password@]host:port/db or rediss:// or unix://")
    broker_url: str | None = _setting(None, "Celery's broker; default: redis_url")
    job: str = _setting("default", "'name' or 'tenant/name'")
    store: str | None = _setting(
        None, "where checkpoints go: a folder, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix?account=NAME"
    )
    staging: str = _setting("", "folder for staging slots; default: in /dev/shm, per user")
    ttl_s: float = _setting(5.0, "a member that has not beaten for this long is taken for dead", 0.3, 86_400)
    beat_interval_s: float = _setting(1.0, "seconds between beats; ttl_s must hold at least 3", 0.1, 3_600)
    barrier_timeout_s: float = _setting(300.0, "how long a barrier waits", 0.01, 604_800)
    form_timeout_s: float = _setting(600.0, "how long forming a run waits for members", 0.01, 604_800)
    settle_s: float = _setting(3.0, "an elastic run forms when nobody new came for this long", 0.0, 3_600)
    slots: int = _setting(2, "staging slots per trainer", 2, 64)
    slot_policy: str = _setting("wait", "no free slot: wait for one, skip the save, or fail it", choices=("wait", "skip", "fail"))
    slot_wait_s: float = _setting(600.0, "how long policy 'wait' waits for a free slot", 0.0, 604_800)
    staging_budget_bytes: int | None = _setting(None, "upper bound of all slots in the staging folder; default: what is free", 1)
    on_failed_save: str = _setting(
        "warn", "after a failed save the next one raises (fatal), warns, or raises only once no commit is newer than rpo_s (rpo)",
        choices=("fatal", "warn", "rpo"),
    )  # fmt: skip
    rpo_s: float = _setting(3600.0, "on_failed_save=rpo: so many seconds of training may be at stake", 1.0, 31_536_000)
    leave_timeout_s: float = _setting(60.0, "how long an agent that leaves waits for its saves to become durable", 0.0, 86_400)
    lease_s: float = _setting(10.0, "an upload's claim on a part; renewed at a third of it", 1.0, 3_600)
    max_attempts: int = _setting(5, "attempts at one part without progress before the checkpoint is aborted", 1, 1_000)
    scan_interval_s: float = _setting(2.0, "seconds between two scans of the reconciler", 0.1, 3_600)
    keep_last: int = _setting(5, "newest commits that retention keeps on the lineage; 0: no such rule, and without any rule all stay", 0)
    keep_every: int = _setting(0, "retention keeps the first commit of each so many steps; 0: no such rule", 0, names.MAX_STEP)
    keep_best: str | None = _setting(None, "retention keeps the best by metric: NAME:min|max:COUNT, several separated by commas")
    keep_for_s: float = _setting(0.0, "retention keeps commits that are younger than this; 0: no such rule", 0.0, 3_155_760_000)
    collect_interval_s: float = _setting(300.0, "seconds between two collections of a job beside those after commits", 1.0, 86_400)
    reader_grace_s: float = _setting(600.0, "how long objects outlive their manifest, for readers under way", 0.0, 2_592_000)
    restore_attempts: int = _setting(5, "a checkpoint tried so often, and never restored, is passed over for an older one; 0: never", 0)
    cache: str | None = _setting(None, "folder of this host for parts that were restored from the store; default: none are kept")
    cache_budget_bytes: int | None = _setting(None, "what they may take; default: a quarter of the file system", 1)
    delta: str = _setting("off", "auto: of a save only the chunks that the last commit lacks go into the store", choices=("off", "auto"))
    upload_mbps: float | None = _setting(None, "bandwidth cap of all uploads of a host together in MB/s", 0.001)
    upload_nice: int = _setting(19, "how far uploads give way to others at the processor; from 1 on at the disk as well", 0, 19)
    upload_processes: int | None = _setting(None, "parts that an uploader carries at once; default: one per core, 2 to 4", 1, 64)
    shutdown_grace_s: float = _setting(8.0, "a stopping uploader has ended after this; container runtimes kill after 10", 1.0, 86_400)
    data_cache: str = _setting("", "folder for local copies of data files that are compressed or in a store; default: ~/.cache/dtr/data")
    data_cache_bytes: int = _setting(50 << 30, "what those copies may take; those not used for longest go first", 1)
    data_weights: str = _setting(
        "speed", "dynamic mode: a worker's shards follow its measured samples/s from run to run (speed), or all have as many (even)",
        choices=("speed", "even"),
    )  # fmt: skip
    flower_port: int = _setting(5555, "port of Flower on 127.0.0.1", 1, 65_535)

    @classmethod
    def load(cls, *, environ: Mapping[str, str] | None = None, config_file: str | Path | None = None, **given: Any) -> Settings:
        """Merge the sources and check every value.

        Args:
            environ: the environment; default ``os.environ``.
            config_file: the TOML file; default ``DTR_CONFIG``, else ``./dtr.toml`` if there is one.
            given: settings that the caller chose; None means "not given".

        Raises:
            ConfigError: names the setting, where it came from, what was given and what is expected.
        """
        env = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        values.update(cls._from_file(config_file or env.get("DTR_CONFIG")))
        values.update(cls._from_environment(env))
        values.update({k: cls._checked(k, v, "argument") for k, v in given.items() if v is not None})
        loaded = cls(**values)
        if not loaded.staging:
            loaded = replace(loaded, staging=default_staging())
        if not loaded.data_cache:
            loaded = replace(loaded, data_cache=str(Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dtr" / "data"))
        if loaded.ttl_s < 3 * loaded.beat_interval_s:
            raise ConfigError(
                f"ttl_s must hold at least 3 beats: ttl_s is {loaded.ttl_s:g} and beat_interval_s is {loaded.beat_interval_s:g}; "
                "raise ttl_s or lower beat_interval_s",
                setting="ttl_s",
            )
        return loaded

    @classmethod
    def origins(cls, *, environ: Mapping[str, str] | None = None, **given: Any) -> dict[str, Origin]:
        """Where :meth:`load` takes each setting from, given the same; raises ConfigError as it does."""
        env = os.environ if environ is None else environ
        file = env.get("DTR_CONFIG")
        table, variables = cls._from_file(file), cls._from_environment(env)

        def origin(name: str) -> Origin:
            if given.get(name) is not None:
                return Origin(kind="argument", place="")
            if name in variables:
                return Origin(kind="environment", place=f"DTR_{name.upper()}")
            return Origin(kind="file", place=file or "dtr.toml") if name in table else Origin(kind="default", place="")

        return {spec.name: origin(spec.name) for spec in fields(cls)}

    @property
    def broker(self) -> str:
        """The broker's URL."""
        return self.broker_url or self.redis_url

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, secrets included: mask URLs before showing them."""
        return asdict(self)

    @classmethod
    def _from_environment(cls, env: Mapping[str, str]) -> dict[str, Any]:
        known = {f.name for f in fields(cls)}
        found = {}
        for variable, text in env.items():
            if not variable.startswith("DTR_") or variable[4:] in _NOT_SETTINGS or variable.startswith("DTR_TEST_"):
                continue
            name = variable[4:].lower()
            if name not in known:
                raise ConfigError(f"{variable} is not a setting of dtr{_nearest(name, known, shown=lambda k: 'DTR_' + k.upper())}")
            if text == "":
                raise ConfigError(f"{variable} is empty: unset it, or give {_what(cls, name)}", setting=name)
            found[name] = cls._checked(name, text, variable)
        return found

    @classmethod
    def _from_file(cls, path: str | Path | None) -> dict[str, Any]:
        explicit = path is not None
        file = Path(path) if path is not None else Path("dtr.toml")
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if explicit:
                raise ConfigError(f"DTR_CONFIG: there is no file {file}") from None
            return {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise ConfigError(f"{file} is not readable TOML: {exc}") from exc
        known = {f.name for f in fields(cls)}
        for name in table:
            if name not in known:
                raise ConfigError(f"{file}: {name} is not a setting of dtr{_nearest(name, known)}")
        return {name: cls._checked(name, value, str(file)) for name, value in table.items()}

    @classmethod
    def _checked(cls, name: str, value: Any, source: str) -> Any:
        spec = {f.name: f for f in fields(cls)}.get(name)
        if spec is None:
            raise ConfigError(f"{name} is not a setting of dtr{_nearest(name, {f.name for f in fields(cls)})}")
        kind = str(spec.type).removesuffix(" | None")
        parsed = _parse(kind, value)
        low, high = spec.metadata["low"], spec.metadata["high"]
        if (
            parsed is None
            or (low is not None and not parsed >= low)
            or (high is not None and not parsed <= high)
            or (spec.metadata["choices"] and parsed not in spec.metadata["choices"])
        ):
            shown = "***" if "://" in str(value) else repr(value)
            expected = _expected(kind, low, high, spec.metadata["choices"])
            raise ConfigError(f"{source}: {name} must be {expected} ({spec.metadata['what']}), got {shown}", setting=name)
        if name in _TEXTS:
            try:
                _TEXTS[name](parsed)
            except InvalidInput as exc:
                raise ConfigError(f"{source}: {exc}", setting=name) from None
        return parsed


def _parse(kind: str, value: Any) -> Any:
    """The value as ``kind``, or None: numbers may be text (the environment), text may not be a number."""
    if kind == "str":
        return value if isinstance(value, str) and "\0" not in value and value else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
        if kind == "float":
            return number if math.isfinite(number) else None
        return int(value) if not isinstance(value, float) or value == int(value) else None
    except (ValueError, OverflowError):
        return None


def _expected(kind: str, low: float | None, high: float | None, choices: tuple[str, ...]) -> str:
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    if kind == "str":
        return "text"
    word = "a number" if kind == "float" else "an integer"
    if low is not None and high is not None:
        return f"{word} from {low:g} to {high:g}"
    return f"{word} from {low:g}" if low is not None else word


def _what(cls: type[Settings], name: str) -> str:
    """``a number from 0.3 to 86400 (what it is for)``."""
    spec = {f.name: f for f in fields(cls)}[name]
    kind = str(spec.type).removesuffix(" | None")
    return f"{_expected(kind, spec.metadata['low'], spec.metadata['high'], spec.metadata['choices'])} ({spec.metadata['what']})"


def _nearest(name: str, known: set[str], shown: Callable[[str], str] = str) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {shown(close[0])}?" if close else "; `dtr config show` lists them all"


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherEnvironment:
    """What a launcher (ours, torchrun, SLURM's wrappers) tells its trainers through the environment."""

    rank: int | None
    world_size: int | None
    local_rank: int
    world_min: int | None
    worker_id: str | None
    socket: str | None
    restarts: int

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> LauncherEnvironment:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and the DTR_* variables of the launcher; raises ConfigError that names the variable."""
        env = os.environ if environ is None else environ
        world_size = _env_integer(env, "WORLD_SIZE", 1)
        rank = _env_integer(env, "RANK", 0)
        if rank is not None and world_size is not None and rank >= world_size:
            raise ConfigError(f"RANK must be below WORLD_SIZE: RANK is {rank} and WORLD_SIZE is {world_size}")
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_env_integer(env, "LOCAL_RANK", 0) or 0,
            world_min=_env_integer(env, "DTR_WORLD_MIN", 1),
            worker_id=env.get("DTR_WORKER_ID"),
            socket=env.get("DTR_LAUNCHER"),
            restarts=_env_integer(env, "DTR_RESTARTS", 0) or 0,
        )


def _env_integer(env: Mapping[str, str], variable: str, low: int) -> int | None:
    text = env.get(variable)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= low):
        raise ConfigError(f"{variable} must be an integer from {low}, got {text!r}", setting=variable)
    return int(text)
